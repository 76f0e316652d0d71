"""Rounding: what the floating type of a pair does to its log-weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from .sites import data_plate, log_prob_of, per_datum, plate_nesting, sites_of
from .tracing import Traces
from .wrappers import is_factor, layers_of

__all__ = ["rounding_of"]

# An error of this many nats at one draw is a reason to look at others, whose parameters are smaller by these parts.
NOTICEABLE, NEIGHBOURS = 1e-3, tuple(1e-6 * 2.3**step for step in range(8))


def rounding_of(traces: Traces) -> Tensor:
    """What rounding does to each datum's log-weight, shape (B,), in nats.

    It is the larger of one rounding of the largest term, before sites cancel, and the error of the sites that cancel within, as
    a Poisson of ten million counts does, whose log-density near 10 is a difference of numbers near 10^8.
    """
    sites = [*sites_of(traces.model), *sites_of(traces.guide)]
    data, nesting = data_plate(sites), plate_nesting(traces.model, traces.guide)
    terms = [per_datum(site, log_prob_of(site), data, 1, nesting)[0] for site in sites]
    largest = torch.stack([term.double().abs() for term in terms]).nan_to_num(posinf=0.0).amax(0)
    total = largest * max(torch.finfo(term.dtype).eps for term in terms)
    for site in sites:
        error = _error_within(site)
        if error is not None:
            total = torch.maximum(total, per_datum(site, error, data, 1, nesting)[0].abs())
    return total


def _error_within(site: dict) -> Tensor | None:
    """A site's log-probability in float32 less that in float64, or ``None`` where it is no float32 or not known."""
    value, layers = site["value"], list(layers_of(site["fn"]))
    # A flow keeps the value that it drew, and a network inside it its type.
    if is_factor(site) or not isinstance(value, Tensor) or any(isinstance(each, TransformedDistribution) for each in layers):
        return None
    try:
        error = _float32_error(site)
        if error is None:
            return None
        if bool((error.abs() > NOTICEABLE).any()):
            # Rounding is small by chance at some draws: look at the same distribution with parameters next to its own.
            for change in NEIGHBOURS:
                neighbour = {**site, "fn": _with_tensors(site["fn"], partial(torch.mul, other=1 - change))}
                near = _float32_error(neighbour)
                if near is not None:
                    error = torch.where(near.isfinite() & (near.abs() > error.abs()), near, error)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):  # a distribution of a user's own, say
        return None
    return torch.where(error.isfinite(), error, 0.0)


def _float32_error(site: dict) -> Tensor | None:
    """A site's log-probability in float32 less that in float64; ``None`` if it is not float32."""
    own, value = log_prob_of(site), site["value"]
    if own.dtype != torch.float32:
        return None
    wide = value.double() if value.is_floating_point() else value
    return own.double() - log_prob_of({**site, "fn": _with_tensors(site["fn"], torch.Tensor.double), "value": wide})


def _with_tensors(distribution: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A distribution with changed float32 parameters."""
    other = copy.copy(distribution)
    other._validate_args = False
    for name, part in vars(distribution).items():
        if isinstance(part, Tensor) and part.dtype == torch.float32:
            other.__dict__[name] = change(part)
        elif isinstance(part, torch.distributions.Distribution):
            other.__dict__[name] = _with_tensors(part, change)
    return other

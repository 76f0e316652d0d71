"""Rounding errors: of the log-weights of a pair, and of a log-joint without sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from .sites import data_plate, log_prob_of, per_datum, plate_nesting, sites_of
from .tracing import Trace, Traces
from .wrappers import base_distribution, is_factor, layers_of, with_tensors

__all__ = ["log_joint_rounding", "log_weight_rounding"]

# An error of this many nats at one draw is a reason to look at others, whose parameters are smaller by these parts.
NOTICEABLE, NEIGHBOURS = 1e-3, tuple(1e-6 * 2.3**step for step in range(8))


def log_weight_rounding(traces: Traces) -> Tensor:
    """The rounding error of each datum's log-weight in the floating type of the pair, shape (B,), in nats.

    It is the larger of two numbers: one rounding of the largest term, before terms of different sites cancel; and the error
    within a site, measured as the difference of its log-probability in float32 and float64. A Poisson of ten million counts has
    a large one: its log-density near 10 is a difference of numbers near 10^8.
    """
    sites = [*sites_of(traces.model), *sites_of(traces.guide)]
    data, nesting = data_plate(sites), plate_nesting(traces.model, traces.guide)
    log_probs = [log_prob_of(site) for site in sites]
    terms = [per_datum(site, log_prob, data, 1, nesting)[0] for site, log_prob in zip(sites, log_probs, strict=True)]
    largest = torch.stack([term.double().abs() for term in terms]).nan_to_num(posinf=0.0).amax(0)
    total = largest * max(torch.finfo(term.dtype).eps for term in terms)
    for site, log_prob in zip(sites, log_probs, strict=True):
        error = _error_within(site, log_prob)
        if error is not None:
            total = torch.maximum(total, per_datum(site, error, data, 1, nesting)[0].abs())
    return total


def _error_within(site: dict, log_prob: Tensor) -> Tensor | None:
    """A site's log-probability in float64 minus that in float32, or ``None`` if it is not float32 or cannot be computed."""
    value, layers = site["value"], list(layers_of(site["fn"]))
    # Flows are left out: they keep their own draws, and the networks inside them keep their type.
    if is_factor(site) or not isinstance(value, Tensor) or any(isinstance(each, TransformedDistribution) for each in layers):
        return None
    try:
        error = _float32_error(site, log_prob)
        if error is None:
            return None
        if bool((error.abs() > NOTICEABLE).any()):
            # Rounding is small by chance at some draws: look at the same distribution with parameters next to its own.
            for change in NEIGHBOURS:
                neighbour = {**site, "fn": with_tensors(site["fn"], partial(torch.mul, other=1 - change))}
                near = _float32_error(neighbour, log_prob_of(neighbour))
                if near is not None:
                    error = torch.where(near.isfinite() & (near.abs() > error.abs()), near, error)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):  # such as a user's own distribution
        return None
    return torch.where(error.isfinite(), error, 0.0)


def _float32_error(site: dict, log_prob: Tensor) -> Tensor | None:
    """A site's log-probability in float32 less that in float64; ``None`` if it is not float32."""
    if log_prob.dtype != torch.float32:
        return None
    value = site["value"]
    wide = value.double() if value.is_floating_point() else value
    return log_prob.double() - log_prob_of({**site, "fn": with_tensors(site["fn"], torch.Tensor.double), "value": wide})


def log_joint_rounding(trace: Trace, data: Any, num: int, nesting: int) -> Tensor:
    """A bound on the rounding error of a log-joint, shape (K, B), in nats.

    A sum has a relative error, and so does each of its terms. If a location is subtracted from a value, the rounding error of
    their difference is multiplied by the slope of the log-density: with noise of scale 0.01 around locations near 1, the error
    is thousands of times that of the log-density alone.

    Args:
        trace: a trace of the model, with K particles.
        data: the plate of data, of B data.
        num: K.
        nesting: the number of plate dimensions.
    """
    total = torch.zeros(num, data.size, dtype=torch.float64)
    for site in sites_of(trace):
        terms, eps = _terms(site)
        inner = tuple(range(terms.dim() - site["fn"].event_dim + base_distribution(site).event_dim, terms.dim()))
        squares = terms.square().sum(inner) if inner else terms.square()
        parts = (log_prob_of(site).double().abs(), squares)
        sums, squares = (per_datum(site, part, data, num, nesting) for part in parts)
        total = total.to(sums.device) + eps * (sums + 2 * squares.sqrt())
    return total


def _terms(site: dict) -> tuple[Tensor, float]:
    """The magnitudes of the terms of a site's log-probability, one for each draw, and the epsilon of their type."""
    distribution, value = base_distribution(site), site["value"]
    if isinstance(getattr(distribution, "loc", None), Tensor) and value.is_floating_point():
        with torch.enable_grad():
            at = value.detach().requires_grad_()
            log_prob = distribution.log_prob(at)
            (slope,) = torch.autograd.grad(log_prob.sum(), at)
        lever = (slope * value).double().abs()
        terms = log_prob.detach().double().abs() + (
            lever.flatten(-distribution.event_dim).sum(-1) if distribution.event_dim else lever
        )
    else:
        log_prob, size = distribution.log_prob(value), value.double().abs()
        powers = torch.xlogy(size, size + 1)  # as in factorials and powers, which nearly cancel
        terms = log_prob.double().abs() + (
            powers.flatten(-distribution.event_dim).sum(-1) if distribution.event_dim else powers
        )
    return torch.nan_to_num(terms, posinf=0.0), torch.finfo(log_prob.dtype).eps

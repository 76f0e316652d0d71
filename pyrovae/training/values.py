"""Checks of the values that a pair observes: their supports, and values that make a loss infinite or absurd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from ..data.batches import Batches
from ..data.datasets import binarize, dequantize
from ..data.matching import Batch
from ..programs.checks import check_finite, check_support
from ..programs.inspect import inspect_pair
from ..programs.sites import Program, sites_of
from ..programs.tracing import inspection, same_random_stream, trace_pair
from ..programs.wrappers import base_distribution, is_factor, is_point

__all__ = ["SupportCheck", "cause_in_data", "check_first_loss", "large_values", "observed_sites", "values_at_the_edge"]

# Rows whose support is checked at once.
ROWS_AT_ONCE = 8192
# A first loss beyond this many bits per dimension, on data beyond this size, means that the data want another scale.
ABSURD_BITS, LARGE_VALUE = 100.0, 20.0


def observed_sites(model: Program, guide: Program, args: Batch) -> list[dict]:
    """The observed sites of one run, without factors; the run leaves no trace."""
    with inspection(model, guide, args):
        trace = trace_pair(model, guide, args, {}, 1, None).model
    return [site for site in sites_of(trace) if site["is_observed"] and not is_factor(site) and not is_point(site)]


class SupportCheck:
    """Refuses batches with values outside their supports, without a run of the pair if possible.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: a first batch.

    Attributes:
        direct: whether the arguments themselves are observed, under supports that nothing moves; else each check runs the pair.
    """

    def __init__(self, model: Program, guide: Program, args: Batch):
        self.model, self.guide = model, guide
        sites = [site for site in observed_sites(model, guide, args) if isinstance(site["value"], Tensor)]
        places = [_place_of(site, args) for site in sites]
        self._sites = [(site, place) for site, place in zip(sites, places, strict=True) if place is not None]
        fixed = all((site["mask"] is None or site["mask"] is True) and _is_fixed(site["fn"]) for site in sites)
        self.direct = fixed and len(self._sites) == len(sites)

    def __call__(self, args: Batch, where: str, first_row: int = 0) -> None:
        """Check a batch.

        Args:
            args: the arguments of model and guide.
            where: what the batch is called, such as ``"batch 2 of epoch 1"``.
            first_row: the number of its first row there.

        Raises:
            ValueError: a value is NaN, infinite or outside its support; says where.
        """
        try:
            if not self.direct:
                inspect_pair(self.model, self.guide, *args)
                return
            self._check(args)
        except ValueError as error:
            row = None if not self.direct else next(row for row in range(len(args[0])) if self._is_bad(args, row))
            place = "" if row is None else f", row {first_row + row} (counted from 0)"
            raise ValueError(f"In {where}{place}: {error}") from error

    def _check(self, args: Batch) -> None:
        check_finite(args)
        for site, place in self._sites:
            check_support({**site, "value": args[place].reshape(-1, *site["value"].shape[1:])})

    def _is_bad(self, args: Batch, row: int) -> bool:
        try:
            self._check(tuple(arg[row : row + 1] for arg in args))
        except ValueError:
            return True
        return False

    def check_early(self, batches: Batches) -> bool:
        """Check whole arrays, if that takes no run of the pair; returns whether it did. If not, check each batch in training.

        Raises:
            ValueError: as for a batch; says the row.
        """
        in_reach = batches.loader is None or batches.rows is not None
        if not self.direct or not in_reach or batches.transform not in (None, binarize, dequantize):
            return False
        for number, rows in enumerate(batches.in_order(ROWS_AT_ONCE)):
            if batches.transform is not None:
                with same_random_stream(rows):
                    rows = (batches.transform(rows[0]), *rows[1:])
            self(rows, "the data", number * ROWS_AT_ONCE)
        return True


def _place_of(site: dict, args: Batch) -> int | None:
    """Which argument a site observes as it is, or in another shape of each datum."""
    value = site["value"]
    for place, arg in enumerate(args):
        same = value.data_ptr() == arg.data_ptr() and value.dtype == arg.dtype and value.numel() == arg.numel()
        if value is arg or (same and value.is_contiguous() and arg.is_contiguous() and value.shape[:1] == arg.shape[:1]):
            return place
    return None


def _is_fixed(distribution: Any) -> bool:
    """Whether a support depends on no parameter: whether it holds no tensor."""
    try:
        waiting = [distribution.support]
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return True
    while waiting:
        constraint = waiting.pop()
        if not isinstance(constraint, constraints.Constraint):
            return False
        for part in vars(constraint).values():
            if isinstance(part, constraints.Constraint):
                waiting.append(part)
            elif not isinstance(part, bool | int | float):
                return False
    return True


def check_first_loss(loss: float, num_dims: int, model: Program, guide: Program, args: Batch) -> None:
    """Refuse data that make the first loss infinite, and warn of data that make it absurd; the loss is in nats per datum.

    Raises:
        ValueError: it is infinite or NaN by values at the edge of a support.
    """
    if not math.isfinite(loss):
        sentence = values_at_the_edge(observed_sites(model, guide, args))
        if sentence:
            raise ValueError(sentence)
        return
    bits = loss / max(num_dims, 1) / math.log(2)
    large = large_values(observed_sites(model, guide, args)) if bits > ABSURD_BITS else None
    if large:
        warnings.warn(f"The first bound is {-loss:,.0f} nats per datum, {bits:,.0f} bits per dimension: {large}", stacklevel=5)


def cause_in_data(model: Program, guide: Program, args: Batch) -> str | None:
    """One sentence on the data of a batch that make a loss or gradient infinite, or ``None`` if the data do not."""
    try:
        with pyro.validation_enabled(False):
            sites = observed_sites(model, guide, args)
    except (RuntimeError, ValueError):  # with parameters that are NaN no program may run
        return None
    for site in sites:
        if isinstance(site["value"], Tensor) and not bool(torch.isfinite(site["value"]).all()):
            return f"site {site['name']!r} observes infinite or NaN values: drop or repair what makes them."
    return values_at_the_edge(sites) or large_values(sites)


def values_at_the_edge(sites: list[dict]) -> str | None:
    """A sentence on values where a density is zero or infinite, such as 0 under a Beta."""
    for site, distribution, value in _densities(sites):
        log_prob = distribution.log_prob(value)
        bad = ~torch.isfinite(log_prob)
        edges = _edges(distribution)
        if bad.shape != value.shape:
            bad = bad.reshape(*bad.shape, *[1] * (value.dim() - bad.dim())).expand(value.shape)
            edges, bad = [0.0], bad & (value == 0)
        at_edge = torch.stack([value == edge for edge in edges]).any(0) if edges else torch.zeros_like(bad)
        if bool(bad.any()) and bool((at_edge | ~bad).all()):
            edge = value[bad][0].item()
            return (
                f"{type(distribution).__name__} at site {site['name']!r} has no finite log-density at {edge:g}, which "
                f"{int(bad.sum())} of the {value.numel()} observed values are: drop them, or clamp the data into the open "
                f"interval."
            )
    return None


def large_values(sites: list[dict]) -> str | None:
    """A sentence on values far from the scale of one, such as pixels from 0 to 255 under a Normal."""
    for site, distribution, value in _densities(sites):
        low, high = value.min().item(), value.max().item()
        if max(-low, high) > LARGE_VALUE:
            whole = bool((value == value.round()).all()) and low >= 0
            pixels = "divide them (data / 255), or for whole levels choose a discretized_logistic or dequantized likelihood"
            return (
                f"{type(distribution).__name__} at site {site['name']!r} observes values from {low:g} to {high:g}: "
                f"{pixels if whole else 'bring them to a scale near 1, such as zero mean and unit variance'}."
            )
    return None


def _densities(sites: list[dict]) -> Iterator[tuple[dict, Any, Tensor]]:
    """The observed sites with a density, each with its elementwise distribution and its values."""
    for site in sites:
        distribution, value = base_distribution(site), site["value"]
        try:
            discrete = distribution.support.is_discrete
        except NotImplementedError:  # it declares no support
            continue
        if isinstance(value, Tensor) and value.is_floating_point() and not discrete:
            yield site, distribution, value


def _edges(distribution: Any) -> list[float]:
    bounds = [getattr(distribution.support, name, None) for name in ("lower_bound", "upper_bound")]
    return [float(bound) for bound in bounds if isinstance(bound, int | float)]

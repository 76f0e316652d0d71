"""What rounding may have changed in a log-joint."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..programs.sites import log_prob_of, per_datum, sites_of
from ..programs.tracing import Trace
from ..programs.wrappers import base_distribution

__all__ = ["Answer", "log_joint_rounding"]


class Answer(NamedTuple):
    """log p(x) of B data without sampling, in nats."""

    log_px: np.ndarray  # (B,)
    error: np.ndarray  # (B,), what is in doubt
    num_points: int  # terms that were summed


def log_joint_rounding(trace: Trace, data: Any, num: int, nesting: int) -> Tensor:
    """What rounding may have moved the log-joint by, shape (K, B), in nats.

    A sum has a relative error, each of its terms one of its own, and where a location was subtracted, its error times the
    slope there. Noise of 0.01 about locations near one costs thousands of times what the log-density alone would.
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
    """The magnitudes that a site's log-probability is computed from, one for each draw, and the epsilon of their type."""
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

"""Sums and integrals over the support of any distribution of one or two latents, for tests of densities and samplers."""

from __future__ import annotations

import math
from typing import Any

import torch
from parts import same_set
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import MixtureSameFamily, biject_to

NODES = 401  # in each dimension


def nodes(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Points z and log-weights such that an integral of f over the support is about the sum of f(z) exp(log_weight).

    Args:
        distribution: batch shape ``()``, event shape ``(size,)``, with ``size`` 1 or 2. A few of its draws say where the points
            must be dense.

    Returns:
        Points of shape ``(N, size)`` and log-weights of shape ``(N,)``; ``None`` if no rule for this support is known.
    """
    mixture = isinstance(distribution, MixtureSameFamily)
    support = (distribution.component_distribution if mixture else distribution).support
    size = distribution.event_shape[0]
    if support.is_discrete:
        points = distribution.enumerate_support() if distribution.has_enumerate_support else None
        return None if points is None else (points, torch.zeros(len(points)))
    if same_set(support, constraints.sphere) and size == 2:
        angle = 2 * math.pi * torch.arange(4 * NODES) / (4 * NODES)
        return torch.stack([angle.cos(), angle.sin()], -1), torch.full((4 * NODES,), math.log(2 * math.pi / (4 * NODES)))
    try:
        transform = biject_to(support)
    except NotImplementedError:
        return None
    with torch.no_grad():
        unconstrained = transform.inv(distribution.sample((2000,)))
    if unconstrained.shape[-1] == 0:
        return None  # a simplex of one corner
    low, middle, high = unconstrained.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    # u = middle + scale t / (1 - t^2) takes (-1, 1) to all numbers, and the rule of equal steps converges fast in t.
    t = torch.linspace(-1, 1, NODES + 2)[1:-1]
    axes = [m + s * t / (1 - t * t) for m, s in zip(middle, (high - low) / 2, strict=True)]
    slopes = [torch.log(2 / (NODES + 1) * s * (1 + t * t) / (1 - t * t) ** 2) for s in (high - low) / 2]
    grid = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    log_weight = torch.cartesian_prod(*slopes).reshape(-1, len(axes)).sum(-1)
    points = transform(grid)
    jacobian = transform.log_abs_det_jacobian(grid, points)
    inside = support.check(points) & jacobian.isfinite()
    return points[inside], (log_weight + jacobian)[inside]


def total(distribution: Any, points: Tensor, log_weight: Tensor) -> float:
    """The integral of the density."""
    return (distribution.log_prob(points) + log_weight).exp().sum().item()


def features(z: Tensor) -> Tensor:
    """Bounded functions of z, whose means tell distributions apart: shape ``(..., number)``."""
    z = z.clamp(-1e6, 1e6)
    return torch.cat([z.tanh(), (2 * z).sin(), z.cos(), z.sum(-1, keepdim=True).sin(), z.prod(-1, keepdim=True).tanh()], -1)


def mean_features(distribution: Any, points: Tensor, log_weight: Tensor) -> Tensor:
    """The exact means of :func:`features`."""
    weight = (distribution.log_prob(points) + log_weight).exp()
    return (weight[:, None] * features(points)).sum(0)

"""Modes of the posterior of many data at once, by gradient ascent of single points, and the curvature there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Gradient", "Peaks", "climb", "curvature", "distinct"]

# log p(x, u) (K, B) and its gradient (K, B, L) at points (K, B, L), in float64; not finite where the model overflows.
Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Pairs of steps that L-BFGS remembers.
MEMORY = 6
# The longest step, in the units that points are measured in, for each square root of a dimension.
LONGEST_STEP = 1.0
# Relative step of the finite differences, in units of the prior's standard deviation; gradients are float32 at the least.
DIFFERENCE = 2e-3
# Eigenvalues of the precision relative to the prior's: a flat direction is not wider than twice the prior.
LEAST_PRECISION, MOST_PRECISION = 0.25, 1e10


class Peaks(NamedTuple):
    """Points that have climbed.

    Attributes:
        point: where they are, (K, B, L), float64.
        log_joint: log p(x, u) there, (K, B).
        slope: its gradient, (K, B, L).
        left: nats that a quadratic still promises, (K, B); small where the ascent has converged.
    """

    point: Tensor
    log_joint: Tensor
    slope: Tensor
    left: Tensor


def climb(gradient: Gradient, start: Tensor, unit: Tensor, steps: int) -> Peaks:
    """Climb from each start to a mode nearby, by L-BFGS with one gradient a step; a step that does not rise is halved.

    Args:
        gradient: log p(x, u) and its gradient.
        start: (K, B, L), float64.
        unit: a length scale of each latent, (B, L), such as the prior's standard deviation.
        steps: gradients for each point.
    """
    point = start / unit
    value, slope = _in_units(gradient, point, unit)
    value = torch.where(value.isnan(), -math.inf, value)
    memory = _Memory(point)
    shrink = torch.ones_like(value)
    longest = LONGEST_STEP * math.sqrt(point.shape[-1])
    for _ in range(steps):
        direction = memory.ascent(slope)
        # Where memory points downhill, the gradient itself.
        rise = (direction * slope).sum(-1)
        direction = torch.where((rise > 0)[..., None], direction, slope)
        length = direction.norm(dim=-1).clamp(min=1e-300)
        step = (shrink * (longest / length).clamp(max=1.0))[..., None] * direction
        there = point + step
        new, new_slope = _in_units(gradient, there, unit)
        better = new >= value + 1e-4 * (step * slope).sum(-1)  # False for NaN
        memory.add(step, slope - new_slope, better)
        point = torch.where(better[..., None], there, point)
        slope = torch.where(better[..., None], new_slope, slope)
        value = torch.where(better, new, value)
        shrink = torch.where(better, (2 * shrink).clamp(max=1.0), shrink / 4)
    left = (memory.ascent(slope) * slope).sum(-1).abs() / 2
    return Peaks(point * unit, value, slope / unit, left)


def _in_units(gradient: Gradient, point: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = gradient(point * unit)
    return value, torch.nan_to_num(slope * unit, nan=0.0, posinf=0.0, neginf=0.0)


class _Memory:
    """The last steps of L-BFGS and how the gradient turned along each; a step that was not taken leaves an empty place."""

    def __init__(self, point: Tensor):
        self.moves = torch.zeros(MEMORY, *point.shape, dtype=point.dtype, device=point.device)
        self.turns = torch.zeros_like(self.moves)
        self.inverse = torch.zeros_like(self.moves[..., 0])  # 1 / (move . turn), or 0
        self.scale = torch.ones_like(self.inverse[0])
        self.number = 0

    def add(self, move: Tensor, turn: Tensor, taken: Tensor) -> None:
        """Remember a step in place of the oldest, for the points that took it, if the curvature along it is positive."""
        place = self.number % MEMORY
        product = (move * turn).sum(-1)
        kept = taken & (product > 1e-10 * move.norm(dim=-1) * turn.norm(dim=-1))
        self.moves[place], self.turns[place] = move, torch.nan_to_num(turn)
        self.inverse[place] = torch.where(kept, 1 / product.clamp(min=1e-300), 0.0)
        self.scale = torch.where(kept, product / turn.square().sum(-1).clamp(min=1e-300), self.scale)
        self.number += 1

    def ascent(self, slope: Tensor) -> Tensor:
        """The direction (the recursion of two loops)."""
        places = [place % MEMORY for place in range(max(0, self.number - MEMORY), self.number)]
        direction, factors = slope, []
        for place in reversed(places):
            factor = self.inverse[place] * (self.moves[place] * direction).sum(-1)
            direction = torch.addcmul(direction, factor[..., None], self.turns[place], value=-1)
            factors.append(factor)
        direction = self.scale[..., None] * direction
        for place, factor in zip(places, reversed(factors), strict=True):
            back = self.inverse[place] * (self.turns[place] * direction).sum(-1)
            direction = torch.addcmul(direction, (factor - back)[..., None], self.moves[place])
        return direction


def curvature(gradient: Gradient, point: Tensor, unit: Tensor) -> Tensor:
    r"""The Gaussian of Laplace's method: factors C of the covariance at modes (M, B, L), shape (M, B, L, L).

    .. math:: C C^\top = (-\nabla^2 \log p(x, u))^{-1}

    by differences of gradients, with eigenvalues clipped to the prior's order, so that the covariance is always one.
    """
    modes, _, latents = point.shape
    moves = torch.diag_embed(DIFFERENCE * unit).movedim(1, 0)[:, None]  # (L, 1, B, L), one latent after another
    there = torch.cat([point[None] + moves, point[None]])
    slope = gradient(there.flatten(0, 1))[1].reshape(there.shape) * unit
    slope = torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
    precision = ((slope[-1] - slope[:-1]) / DIFFERENCE).movedim(0, -1)
    assert precision.shape == (modes, len(unit), latents, latents)
    precision = (precision + precision.mT) / 2
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(LEAST_PRECISION, MOST_PRECISION)
    covariance = (vectors / values[..., None, :]) @ vectors.mT
    return unit[..., None] * torch.linalg.cholesky(covariance)


def distinct(peaks: Peaks, unit: Tensor, *, within: float, nats: float) -> tuple[list[Tensor], Tensor]:
    """The modes of each datum, the highest first, as numbers of the points that stand for them, (B,); -1 if there are no more.

    Points are taken from the highest down. One is left out that is near one taken before, or ``nats`` below the highest.

    Args:
        peaks: points that have climbed, K of them.
        unit: the length scale, (B, L).
        within: the distance at which two points are one mode, in the units, for each square root of a dimension.
        nats: how much lower than the highest a mode may be.

    Returns:
        The modes, and how many points came to each, (modes, B).
    """
    place = peaks.point / unit
    height = torch.nan_to_num(peaks.log_joint, nan=-math.inf)
    data = torch.arange(height.shape[1], device=height.device)
    free = (height >= height.max(0).values - nats) & (height > -math.inf)
    free[height.argmax(0), data] = True
    near = within * math.sqrt(place.shape[-1])
    chosen, sizes = [], []
    while bool(free.any()):
        best = torch.where(free, height, -math.inf).argmax(0)
        any_left = free.any(0)
        centre = place.gather(0, best[None, :, None].expand_as(place[:1]))
        same = free & ((place - centre).norm(dim=-1) <= near)
        same[best, data] = any_left
        free = free & ~same
        chosen.append(torch.where(any_left, best, -1))
        sizes.append(same.sum(0))
    return chosen, torch.stack(sizes)

"""Quadrature: the integral of a positive function of one or two variables, by cells that are split where they are in doubt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Integral", "integrate"]

LogFunction = Callable[[Tensor], Tensor]  # (P, B, L) -> (P, B)
MOST_POINTS = 2**18  # per datum
# Edges of the first cells along an axis in s, where sinh s is in units of the scale that the caller gives: sinh 40 is 10^17,
# and sinh 16 four million.
FIRST_EDGES = {
    1: np.concatenate([np.arange(0, 4, 1 / 64), np.arange(4, 10, 1 / 8), np.arange(10, 41, 1.0)]),
    2: np.concatenate([np.arange(0, 4, 0.5), np.arange(4, 17, 1.0)]),
}
# A cell is resolved where its mass is no further below the bound on it than this, in nats.
RESOLVED = 3.0
# Nats below the highest point from which no peak is looked for between points: it would be a millionth of a cell wide.
HOPELESS = 1e12
# Of the Lobatto rule, exact to degree seven; since its first and last points are the cell's edges, where the function falls
# from an edge on, that edge bounds it.
_NODES = np.array([-1, -math.sqrt(3 / 7), 0, math.sqrt(3 / 7), 1])
_WEIGHTS = np.array([1 / 10, 49 / 90, 32 / 45, 49 / 90, 1 / 10])


class Integral(NamedTuple):
    """The integral for each of B data, and what was seen on the way."""

    log_value: Tensor  # (B,)
    error: Tensor  # (B,), relative, so in nats where it is small
    num_points: int  # per datum
    mode: Tensor  # (B, L), the highest point seen
    mean: Tensor  # (B, L)
    covariance: Tensor  # (B, L, L)


class _Cells(NamedTuple):
    """Boxes in s, and what their points say of each."""

    middle: Tensor  # (C, B, L)
    half: Tensor  # (C, B, L), half their widths
    log_mass: Tensor  # (C, B), by the product Lobatto rule
    log_bound: Tensor  # (C, B), above the mass, if the log of the function is concave within the cell
    jumps: Tensor  # (C, B), whether the function is zero at some points and not at others
    axis: Tensor  # (C, B), along which the function changes most
    peak: Tensor  # (C, B), the highest log f
    peak_at: Tensor  # (C, B, L), in s


def integrate(log_f: LogFunction, centre: Tensor, factor: Tensor, tolerance: Tensor, *, shift: float = 0.0) -> Integral:
    r"""Integrate f over u in :math:`R^L`, for each of B data at once, with u = centre + factor sinh(s).

    Cells in s are split where they may hold more than is known of them: a cell counts for the most that a function whose
    logarithm is concave can hold between its points, until its mass comes near that, and from then on for what its last split
    changed. So a peak that falls between the points of the first cells is found, if the logarithm rises towards it.

    Args:
        log_f: log of the function at points (P, B, L), shape (P, B).
        centre: where the first cells are finest, shape (B, L), in float64.
        factor: the triangular scale in which they are, shape (B, L, L).
        tolerance: the relative error at which it stops, shape (B,).
        shift: moves the first cells, in s, so that two runs have no point in common.

    Returns:
        The integrals; ``error`` is what remains in doubt where the points ran out.
    """
    volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def in_s(s: Tensor) -> Tensor:
        return log_f(_to_u(s, centre, factor)) + s.cosh().log().sum(-1) + volume

    middle, half = _first_cells(centre, shift)
    cells = _measure(in_s, middle, half)
    doubt, each = cells.log_bound, len(_NODES) ** centre.shape[-1]
    points, checked = len(middle) * each, (0, math.inf)
    while True:
        total = torch.logsumexp(cells.log_mass, 0)
        doubt = torch.where(cells.peak < cells.peak.amax(0) - HOPELESS, -math.inf, doubt)
        error = torch.nan_to_num((torch.logsumexp(doubt, 0) - total).exp(), nan=math.inf, posinf=math.inf)
        error = torch.where(total == -math.inf, 0.0, error)
        worst = float(error.max())
        if bool((error <= tolerance).all()) or points >= MOST_POINTS:
            break
        if points > 2 * checked[0]:  # what twice the points do not lower is rounding
            if worst < 0.1 and worst > 0.7 * checked[1]:
                break
            checked = (points, worst)
        number = max(16, len(doubt) // 20)
        cells, doubt = _split(in_s, cells, doubt, number)
        points += 2 * number * each
    return Integral(total, error, points, *_moments(cells, centre, factor))


def _to_u(s: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    return centre + (factor @ s.sinh()[..., None])[..., 0]


def _first_cells(centre: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Middles and halves of the first cells, (C, B, L)."""
    num_data, dims = centre.shape
    right = torch.as_tensor(FIRST_EDGES[dims], device=centre.device)
    edges = torch.cat([-right[1:].flip(0), right]) + shift
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    middles, halves = (torch.cartesian_prod(*[part] * dims).reshape(-1, 1, dims) for part in (middle, half))
    return middles.expand(-1, num_data, -1), halves.expand(-1, num_data, -1)


def _measure(log_f: LogFunction, middle: Tensor, half: Tensor) -> _Cells:
    """Look at each cell at the points of the product Lobatto rule."""
    num, num_data, dims = middle.shape
    nodes, weights = (torch.as_tensor(part, device=middle.device) for part in (_NODES, _WEIGHTS))
    grid = torch.cartesian_prod(*[nodes] * dims).reshape(-1, dims)
    log_weight = torch.cartesian_prod(*[weights.log()] * dims).reshape(-1, dims).sum(-1)
    s = middle[:, None] + half[:, None] * grid[:, None]  # (C, P, B, L)
    values = log_f(s.flatten(0, 1)).reshape(num, len(grid), num_data)
    log_half = half.log().sum(-1)
    peak, which = values.max(1)
    lines = values.reshape(num, *[len(nodes)] * dims, num_data)
    excess, change = zip(*[_along(lines.movedim(1 + axis, -1), nodes) for axis in range(dims)], strict=True)
    bound = peak + torch.stack([(part - peak).clamp(min=0) for part in excess]).nan_to_num(nan=0.0).sum(0)
    zero = values == -math.inf
    return _Cells(
        middle,
        half,
        torch.logsumexp(values + log_weight[:, None], 1) + log_half,
        bound + log_half + dims * math.log(2),
        zero.any(1) & ~zero.all(1),
        torch.stack(change).argmax(0),
        peak,
        s.gather(1, which[:, None, :, None].expand(-1, 1, -1, dims))[:, 0],
    )


def _along(values: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Of lines of five points (C, ..., B, 5): the most that a concave function can reach, and its greatest change, (C, B)."""
    steps = values.diff(dim=-1)
    steps = torch.where(steps.isfinite(), steps, 0.0)
    slope, gap = steps / nodes.diff(), nodes.diff()
    # Between two points a concave function lies below the secants from either side, carried on.
    from_left = values[..., 1:4] + slope[..., :3].clamp(min=0) * gap[1:]
    from_right = values[..., 1:4] + (-slope[..., 1:]).clamp(min=0) * gap[:3]
    between = torch.minimum(from_left[..., :2], from_right[..., 1:])
    reach = torch.cat([between, from_left[..., 2:], from_right[..., :1]], -1).amax(-1)
    change = steps.abs().amax(-1)
    inner = tuple(range(1, reach.dim() - 1))
    return (reach.amax(inner), change.amax(inner)) if inner else (reach, change)


def _split(log_f: LogFunction, cells: _Cells, doubt: Tensor, number: int) -> tuple[_Cells, Tensor]:
    """Halve the cells of each datum that are most in doubt, and say what it changed."""
    which = torch.topk(doubt, min(number, len(doubt)), dim=0).indices  # (M, B)
    wide = which[..., None].expand(-1, -1, cells.middle.shape[-1])
    middle, half = cells.middle.gather(0, wide), cells.half.gather(0, wide)
    along = torch.nn.functional.one_hot(cells.axis.gather(0, which), middle.shape[-1])
    halved = half * (1 - along / 2)
    new = _measure(log_f, torch.cat([middle - along * half / 2, middle + along * half / 2]), halved.repeat(2, 1, 1))
    before = cells.log_mass.gather(0, which)
    first, second = new.log_mass.split(len(which))
    change = _log_difference(before, torch.logaddexp(first, second)).repeat(2, 1)
    unresolved = new.jumps | (new.log_bound - new.log_mass > RESOLVED)
    new_doubt = torch.where(unresolved, new.log_bound, torch.minimum(change, new.log_bound))

    def put(old: Tensor, found: Tensor) -> Tensor:
        one, other = found.split(len(which))
        index = which if old.dim() == 2 else wide
        return torch.cat([old.scatter(0, index, one), other])

    return _Cells(*[put(old, found) for old, found in zip(cells, new, strict=True)]), put(doubt, new_doubt)


def _log_difference(one: Tensor, other: Tensor) -> Tensor:
    """log |exp(one) - exp(other)|."""
    top = torch.maximum(one, other)
    below = torch.where(top == -math.inf, 0.0, -(one - other).abs())
    return top + torch.log(-torch.expm1(below))


def _moments(cells: _Cells, centre: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest point, and the mean and covariance of what was integrated, in u, from the cells' highest points."""
    heights = cells.peak - cells.peak_at.cosh().log().sum(-1)  # of the function of u, not of s
    rows = heights.argmax(0)[None, :, None].expand(1, -1, centre.shape[-1])
    mode = _to_u(cells.peak_at.gather(0, rows)[0], centre, factor)
    weights = torch.softmax(torch.nan_to_num(cells.log_mass, neginf=-1e300), 0)[..., None]
    u = _to_u(cells.peak_at, centre, factor)
    mean = (weights * u).sum(0)
    covariance = torch.einsum("cbi,cbj->bij", weights * (u - mean), u - mean)
    within = factor * (cells.half * cells.peak_at.cosh())[..., None, :]  # what a cell spans, (C, B, L, L)
    return mode, mean, covariance + (weights[..., None] * (within @ within.mT)).sum(0) / 3

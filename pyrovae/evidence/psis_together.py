"""Pareto smoothing of many data at once, on the device that holds their weights.

ArviZ fits one tail after the other, a quarter of a millisecond each, and scoring on a GPU would wait for that. This is the same
fit, to rounding, of all tails together; those that are not ordinary are left to :func:`pyrovae.evidence.pareto_smooth`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Numbers that a fit holds at once.
MOST_NUMBERS = 2**25
# With fewer samples ArviZ's tail is of another size; below the cutoff's exponent, it is moved to where float64 begins.
FEWEST_SAMPLES, LOWEST_CUTOFF = 225, -700.0
# The shape's prior is a normal about a half that counts for ten samples; then the scale's, and the points of its grid.
PRIOR_K, PRIOR_B, FEWEST_POINTS = 10, 3, 30


def pareto_smooth_together(
    largest: Tensor, log_sum: Tensor, num_samples: int, *, precision: float = 2.3e-16
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Pareto shape and smoothed log p(x) of each datum, as :func:`pyrovae.evidence.pareto_smooth` has them.

    Args:
        largest: the largest log-weights of each datum in descending order, five times the tail that is fitted, float64, shape
            (N, 5 M), in nats.
        log_sum: the logarithm of the sum of all S weights, shape (N,).
        num_samples: S.
        precision: relative rounding error of the log-weights; weights that differ by no more are constant.

    Returns:
        k, the smoothed estimate, and whether the tail is an ordinary one, each of shape (N,). One that is not has ties at its
        lower end, constant, infinite or missing weights, or too few samples; its k and estimate mean nothing.

    References:
        Zhang and Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution, 2009. Vehtari,
        Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, 2024.

    Example:
        >>> import torch
        >>> from pyrovae.evidence.psis_together import pareto_smooth_together
        >>> weights = 0.3 * torch.empty(4, 2000, dtype=torch.float64).exponential_()  # Pareto weights of k = 0.3
        >>> largest = weights.topk(675).values
        >>> khat, _, ordinary = pareto_smooth_together(largest, weights.logsumexp(1), 2000)
        >>> bool(ordinary.all()), bool((khat.mean() - 0.3).abs() < 0.2)
        (True, True)
    """
    size = largest.shape[1] // 5
    if num_samples < FEWEST_SAMPLES:
        nothing = torch.full_like(log_sum, math.nan)
        return nothing, nothing.clone(), torch.zeros_like(log_sum, dtype=torch.bool)
    rows = max(1, MOST_NUMBERS // (size * _points(size)))
    parts = [
        _smooth(part, sums, num_samples, size, precision)
        for part, sums in zip(largest.split(rows), log_sum.split(rows), strict=True)
    ]
    khat, smoothed, ordinary = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return khat, smoothed, ordinary


def _smooth(largest: Tensor, log_sum: Tensor, num_samples: int, size: int, precision: float) -> tuple[Tensor, ...]:
    top = largest[:, 0]
    relative = largest - top[:, None]
    tail, cutoff = relative[:, :size].flip(1).exp(), relative[:, size]  # ascending, as multiples of the largest
    excess = tail - cutoff.exp()[:, None]
    khat, sigma = _fit(excess)
    probability = (torch.arange(size, dtype=largest.dtype, device=largest.device) + 0.5) / size
    far = -torch.log1p(-probability)  # (M,)
    shape = khat[:, None]
    quantile = torch.where(shape == 0, far, torch.expm1(shape * far) / shape)
    wanted = (cutoff.exp()[:, None] + sigma[:, None] * quantile).clamp(max=1.0)
    # What lies below the tail stays; the kept weights are a part of it.
    whole = (log_sum - top).exp()
    below = (whole - tail.sum(1)).clamp(min=0.0)
    smoothed = top + torch.log(below + wanted.sum(1)) - math.log(num_samples)
    varied = -cutoff > 64 * precision * top.abs().clamp(min=1.0)
    ordinary = varied & (excess[:, 0] > 0) & (cutoff > LOWEST_CUTOFF) & ~largest.isnan().any(1) & top.isfinite()
    return khat, smoothed, ordinary & khat.isfinite() & smoothed.isfinite() & (sigma > 0)


def _points(size: int) -> int:
    return FEWEST_POINTS + int(size**0.5)


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of the generalised Pareto distribution of each row of ascending excesses, (N, M)."""
    size, number = excess.shape[1], _points(excess.shape[1])
    place = torch.arange(1, number + 1, dtype=excess.dtype, device=excess.device) - 0.5
    b = (1 - torch.sqrt(number / place)) / (PRIOR_B * excess[:, int(size / 4 + 0.5) - 1, None]) + 1 / excess[:, -1:]
    k = torch.log1p(-b[:, :, None] * excess[:, None]).mean(-1)
    weight = torch.softmax(size * (torch.log(-b / k) - k - 1), -1)
    weight = torch.where(weight >= 10 * torch.finfo(weight.dtype).eps, weight, 0.0)
    b = (b * weight).sum(-1) / weight.sum(-1)
    k = torch.log1p(-b[:, None] * excess).mean(-1)
    return (size * k + PRIOR_K * 0.5) / (size + PRIOR_K), -k / b

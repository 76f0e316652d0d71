"""log p(x) of one or two continuous latents, by quadrature."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..programs.rounding import log_joint_rounding
from ..programs.unconstrained import UnconstrainedPair
from .answer import Answer
from .quadrature import integrate

__all__ = ["integrate_by_quadrature"]

DRAWS = 1024  # of prior and of guide, which show the scale of the latents
SHIFTS = (0.0041, -0.0035, 0.0057, -0.0063)  # of the first cells of each further quadrature, in s
HIGHER = 2.0  # nats by which the log-joint at a draw may exceed its largest value at the cells


def integrate_by_quadrature(pair: UnconstrainedPair, tolerance: float, most: int) -> Answer:
    """Quadrature in the prior's scale, then in that of the posterior that it found, until two answers agree."""
    dims = pair.num_latents
    if dims > 2:
        raise ValueError(
            f"Quadrature takes one or two continuous latent numbers per datum, not {dims}: use pyrovae.ais, or log_marginal."
        )
    most = most if pair.vectorize else 1

    def log_f(flat: Tensor) -> Tensor:
        return torch.cat([_log_joint(pair, part) for part in flat.split(most)])

    prior, guide = (_draws(pair, most, start) for start in ("prior", "guide"))
    draws = torch.cat([prior, guide])
    heights = log_f(draws)
    likeliest = draws.gather(0, heights.argmax(0)[None, :, None].expand(1, -1, dims))
    rounding = log_joint_rounding(pair.model_trace(likeliest.to(pair.dtype))[0], pair.data, 1, pair.nesting)[0]
    target = rounding.clamp(min=tolerance)
    low, middle, high = torch.quantile(prior, torch.tensor([0.25, 0.5, 0.75], dtype=prior.dtype, device=prior.device), 0)
    before = integrate(log_f, middle, torch.diag_embed(((high - low) / 1.35).clamp(min=1e-6)), target / 2)
    slanted = torch.zeros_like(target, dtype=torch.bool)
    for shift in SHIFTS:
        # Cells along the axes, as most tails are; if they do not resolve the integral, along the principal directions.
        slanted = slanted | (before.error > target)
        along = torch.diag_embed(before.covariance.diagonal(dim1=-2, dim2=-1))
        factor = _factor(torch.where(slanted[:, None, None], before.covariance, along))
        last = integrate(log_f, before.mean, factor, target / 2, shift=shift)
        difference = torch.where(last.log_value == before.log_value, 0.0, (last.log_value - before.log_value).abs())
        error = torch.maximum(difference, last.error)
        if bool((error <= target).all()):
            break
        before = last
    # A draw whose log-joint is far above that of all cells lies on a peak between them.
    error = torch.where(heights.amax(0) > log_f(last.mode[None])[0] + HIGHER, math.inf, error)
    return Answer(last.log_value.cpu().numpy(), (error + rounding).cpu().numpy(), last.num_points)


def _log_joint(pair: UnconstrainedPair, flat: Tensor) -> Tensor:
    log_joint = pair.log_joint(flat.to(pair.dtype)).double()
    return torch.where(log_joint.isnan(), -math.inf, log_joint)  # where the model overflows, far out


def _draws(pair: UnconstrainedPair, most: int, start: Literal["prior", "guide"]) -> Tensor:
    size = max(1, min(most, DRAWS))
    return torch.cat([pair.draw(size, start, inside=True) for _ in range(math.ceil(DRAWS / size))]).double()


def _factor(covariance: Tensor) -> Tensor:
    """The Cholesky factor of a covariance, (B, L, L), regularised for directions without visible variance."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return torch.linalg.cholesky(covariance + torch.diag_embed(1e-12 * diagonal + 1e-100))

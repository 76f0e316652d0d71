"""Gaussians fitted to posteriors: to the gradients at draws, and to the weights of draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["match_gradients", "match_weights", "smoothed_weights"]


def match_gradients(loc: Tensor, tril: Tensor, draws: Tensor, slopes: Tensor, trust: float) -> tuple[Tensor, Tensor]:
    r"""One step of batch and match: the Gaussian whose score is closest to the gradients at draws of the last one.

    .. math:: \min_{\mu, \Sigma} \; \sum_k \| \nabla \log q(u_k) - \nabla \log p(x, u_k) \|^2_\Sigma
        + \tfrac{2}{\lambda} \mathrm{KL}(q_{\text{last}} \,\|\, q)

    It has a closed form, and its covariance is one whatever the draws. If the posterior is a Gaussian and there are more draws
    than latents, a large lambda finds it in one step. A small one averages over steps.

    Args:
        loc: mean of the last Gaussian, (..., L).
        tril: its factor, (..., L, L).
        draws: K draws of it, (K, ..., L).
        slopes: the gradient of log p(x, u) there, (K, ..., L); draws where it is not finite are left out.
        trust: lambda, how much the draws count against the last Gaussian.

    References:
        `Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul, Batch and match: black-box variational inference with a
        score-based divergence, 2024 <https://arxiv.org/abs/2402.14758>`_.
    """
    usable = torch.isfinite(slopes).all(-1) & torch.isfinite(draws).all(-1)
    weight = usable.to(draws.dtype) / usable.sum(0).clamp(min=1)
    draws, slopes = (torch.where(usable[..., None], part, 0.0) for part in (draws, slopes))
    centre, slope = ((weight[..., None] * part).sum(0) for part in (draws, slopes))
    spread = _second(draws - centre, weight)
    turn = _second(slopes - slope, weight)
    part = trust / (1 + trust)
    away = loc - centre
    left = trust * turn + part * slope[..., None] * slope[..., None, :]
    right = tril @ tril.mT + trust * spread + part * away[..., None] * away[..., None, :]
    factor = _factor(right)
    values, vectors = torch.linalg.eigh(_symmetric(factor.mT @ left @ factor))
    shrink = 2 / (1 + torch.sqrt(1 + 4 * values.clamp(min=0.0)))
    root = factor @ (vectors * shrink.sqrt()[..., None, :])
    covariance = root @ root.mT
    mean = (1 - part) * loc + part * ((covariance @ slope[..., None])[..., 0] + centre)
    fresh = _factor(covariance)
    sound = torch.isfinite(mean).all(-1) & torch.isfinite(fresh).all(-1).all(-1) & (usable.sum(0) > 1)
    return torch.where(sound[..., None], mean, loc), torch.where(sound[..., None, None], fresh, tril)


def match_weights(loc: Tensor, tril: Tensor, draws: Tensor, weights: Tensor, shrinkage: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Means and covariances of weighted draws, pulled toward the last ones where few draws carry the weight.

    .. math:: \Sigma = \frac{n \Sigma_w + \kappa \Sigma_{\text{last}}}{n + \kappa}, \qquad n = 1 / \sum_s \bar w_s^2

    Args:
        loc: the last means, (B, M, L).
        tril: the last factors, (B, M, L, L).
        draws: (S, B, L).
        weights: normalised for each datum, and divided among its components, (S, B, M).
        shrinkage: kappa, the number of draws that the last Gaussian counts for.

    Returns:
        Means, factors, and the summed weight of each component, (B, M).
    """
    total = weights.sum(0)
    own = weights / total.clamp(min=1e-300)
    # A component without weight, which a datum has if others have more modes, keeps its Gaussian.
    effective = torch.where(total > 0, 1 / own.square().sum(0).clamp(min=1e-300), 0.0)
    pull = (effective / (effective + shrinkage))[..., None]
    mean = torch.einsum("sbm,sbl->bml", own, draws)
    fresh_loc = loc + pull * (mean - loc)
    # Second moments about the new mean, one component at a time.
    parts = []
    for component in range(loc.shape[1]):
        centred = (draws - fresh_loc[:, component]) * own[..., component].clamp(min=0).sqrt()[..., None]
        parts.append(torch.einsum("sbi,sbj->bij", centred, centred))
    covariance = pull[..., None] * torch.stack(parts, 1) + (1 - pull[..., None]) * (tril @ tril.mT)
    fresh = _factor(_symmetric(covariance))
    sound = torch.isfinite(fresh_loc).all(-1) & torch.isfinite(fresh).all(-1).all(-1)
    return (
        torch.where(sound[..., None], fresh_loc, loc),
        torch.where(sound[..., None, None], fresh, tril),
        torch.where(sound, total, 0.0),
    )


def smoothed_weights(log_w: Tensor) -> Tensor:
    r"""Normalised weights (S, B) whose largest are cut at :math:`\sqrt S` times their mean (Ionides 2008)."""
    log_w = torch.nan_to_num(log_w, nan=-math.inf, posinf=-math.inf)
    limit = torch.logsumexp(log_w, 0) - math.log(len(log_w)) / 2
    cut = torch.minimum(log_w, limit)
    return torch.nan_to_num(torch.softmax(cut, 0), nan=1 / len(log_w))


def _second(centred: Tensor, weight: Tensor) -> Tensor:
    """The weighted second moment of (K, ..., L), with weights (K, ...)."""
    return torch.einsum("k...i,k...j->...ij", centred * weight[..., None], centred)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor; NaN where a matrix is not positive definite to rounding."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).sqrt()
    unit = matrix / scale[..., :, None] / scale[..., None, :]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(torch.nan_to_num(unit) + 1e-12 * eye)
    return torch.where((failed != 0)[..., None, None], math.nan, scale[..., None] * factor)

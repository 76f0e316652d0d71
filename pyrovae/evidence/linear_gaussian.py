"""log p(x) of linear-Gaussian pairs, in closed form."""

from __future__ import annotations

import math

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor

from ..programs.sites import Layout, plate_sizes, sites_of
from ..programs.unconstrained import UnconstrainedPair
from ..programs.wrappers import base_distribution, is_factor
from .affine import AffineOnly, NotAffineError
from .answer import Answer

__all__ = ["integrate_linear_gaussian", "why_not_linear_gaussian"]

_GAUSSIAN = (Normal, MultivariateNormal, torch.distributions.Normal, torch.distributions.MultivariateNormal)


def integrate_linear_gaussian(pair: UnconstrainedPair) -> Answer:
    r"""Least squares: log p(x, u) = c - |r(u)|^2 / 2, where r(u), all sites' residuals over their scales, is affine in u.

    With small noise the log-joint is a difference of large numbers, which float32 cannot represent. So only the locations come
    from the program, everything else is float64, and the residuals are computed again at the posterior mean, where they are
    small.
    """
    why = why_not_linear_gaussian(pair)
    if why is not None:
        raise ValueError(f'This pair is not linear-Gaussian, since {why}: choose method="auto", or use log_marginal.')
    size, unit = pair.num_latents, torch.eye(pair.num_latents, dtype=pair.dtype, device=pair.device)
    points = torch.cat([torch.zeros_like(unit[:1]), unit])[:, None].expand(size + 1, pair.num_data, size)
    residual, rounding, log_norm = _residuals(pair, points)
    slope = (residual[1:] - residual[0]).permute(1, 2, 0)  # (B, n, L)
    slope_rounding = (rounding[1:] + rounding[0]).permute(1, 2, 0)
    q, r = torch.linalg.qr(slope)
    inverse = torch.linalg.solve_triangular(r, q.mT, upper=True)  # (B, L, n)
    mean = -(inverse @ residual[0][..., None])[..., 0]
    for _ in range(2):
        mean = mean.to(pair.dtype).double()
        at_mean, at_rounding, _ = _residuals(pair, mean[None].to(pair.dtype))
        # What the program computes there, beside what its values elsewhere predict, shows how it rounds.
        predicted = residual[0] + (slope @ mean[..., None])[..., 0]
        expected = at_rounding[0] + rounding[0] + (slope_rounding @ mean.abs()[..., None])[..., 0]
        growth = torch.where(expected > 0, (at_mean[0] - predicted).abs() / expected, 0.0).amax().clamp(min=1.0)
        step = -(inverse @ at_mean[0][..., None])[..., 0]
        mean = mean + step
    left = at_mean[0] + (slope @ step[..., None])[..., 0]
    half_log_det = r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    log_px = log_norm - left.square().sum(-1) / 2 - half_log_det + size / 2 * math.log(2 * math.pi)
    squares = (left * at_rounding[0]).square().sum(-1) + (inverse.mT * slope_rounding).square().sum((-2, -1))
    scales = torch.finfo(pair.dtype).eps * (left.square().sum(-1) + left.shape[-1])
    return Answer(log_px.cpu().numpy(), (growth * squares.sqrt() + scales).cpu().numpy(), 1)


def _residuals(pair: UnconstrainedPair, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All sites' residuals over their scales at ``flat``, what rounding adds to each, both (K, B, n), and c (B,)."""
    if not pair.vectorize and len(flat) > 1:
        parts = [_residuals(pair, row[None]) for row in flat]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), parts[0][2]
    layout = Layout(len(flat), pair.num_data, pair.nesting, pair.data.dim)
    residuals: list[Tensor] = []
    roundings: list[Tensor] = []
    norms: list[Tensor] = []
    with torch.no_grad():
        for site in sites_of(pair.model_trace(flat)[0]):
            distribution, value = base_distribution(site), site["value"].double()
            loc, eps = distribution.loc.double(), torch.finfo(distribution.loc.dtype).eps
            gap, size = value - loc, eps / 2 * (value.abs() + loc.abs())
            if isinstance(distribution, torch.distributions.Normal):
                gap, size, log_scale = gap / distribution.scale, size / distribution.scale, distribution.scale.double().log()
            else:
                inverse = torch.linalg.inv(distribution._unbroadcasted_scale_tril.double())
                gap, size = ((part @ size_of[..., None])[..., 0] for part, size_of in ((inverse, gap), (inverse.abs(), size)))
                log_scale = -inverse.diagonal(dim1=-2, dim2=-1).log()
            observed = _observed(site).expand(gap.shape)
            log_norm = -log_scale - math.log(2 * math.pi) / 2
            place = (plate_sizes(site, pair.nesting), site["fn"].event_shape)
            for terms, part in ((residuals, gap), (roundings, size), (norms, log_norm.expand(gap.shape))):
                terms.append(layout.from_site(torch.where(observed, part, 0.0), *place))
    return torch.cat(residuals, -1), torch.cat(roundings, -1), torch.cat(norms, -1)[0].sum(-1)


def _observed(site: dict) -> Tensor:
    """Which numbers of a Gaussian site no mask leaves out, to be broadcast to its value."""
    distribution, inner = site["fn"], base_distribution(site)
    total = len(inner.batch_shape) + len(inner.event_shape)
    observed = torch.ones((), dtype=torch.bool, device=site["value"].device)
    masks = [] if site["mask"] is None else [(site["mask"], distribution)]
    while distribution is not inner:
        if isinstance(distribution, pyro.distributions.MaskedDistribution):
            masks.append((distribution._mask, distribution))
        distribution = distribution.base_dist
    for mask, distribution in masks:
        mask = torch.as_tensor(mask, device=observed.device)
        observed = observed & mask.reshape(*mask.shape, *[1] * (total - len(distribution.batch_shape)))
    return observed


def why_not_linear_gaussian(pair: UnconstrainedPair) -> str | None:
    """Why a pair is not linear-Gaussian, or ``None`` if it is."""
    flat = torch.zeros(1, pair.num_data, pair.num_latents, dtype=pair.dtype, device=pair.device)
    for site in sites_of(pair.model_trace(flat)[0]):
        if is_factor(site):
            return f"it has the pyro.factor {site['name']!r}"
        if type(base_distribution(site)) not in _GAUSSIAN:
            return f"its site {site['name']!r} is {type(base_distribution(site)).__name__}, not Normal"
    watch = AffineOnly()
    try:
        trace = pair.follow(flat, watch)
    except NotAffineError as error:
        return f"its model takes {error} of a latent, which is not affine"
    for site in sites_of(trace):
        distribution = base_distribution(site)
        scale = (
            distribution.scale
            if isinstance(distribution, torch.distributions.Normal)
            else distribution._unbroadcasted_scale_tril
        )
        for what, value in [("scale", scale), ("mask", site["mask"])]:
            if value in watch:
                return f"the {what} of its site {site['name']!r} depends on a latent"
    return None

"""Log-weights per particle and datum, their parts, and the gradients that estimators give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sites import Layout
from .tracing import Gradients, PathGradientScaler

__all__ = ["Leaf", "LogWeights", "SiteTerms", "zero_negligible"]


class SiteTerms(NamedTuple):
    """The terms of one site of the guide: log p and log q at the samples, (K, B), and KL(q || p) if it has a closed form."""

    name: str
    log_prior: Tensor
    log_guide: Tensor
    kl: Tensor | None


class Leaf(NamedTuple):
    """One latent without a path to the guide: the model runs on ``value``, a leaf of the graph that equals ``sample``."""

    name: str
    sample: Tensor
    value: Tensor
    event_dim: int
    prior: Any  # p(z | its parents) as the model declares it; None if only the guide has the site
    is_point: bool  # the guide's site is a Delta, whose density at z lies in other sites
    log_prior: Tensor
    rows: slice  # its particles, among the K
    layout: Layout


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights per particle and datum, in nats, and their parts.

    Attributes:
        log_likelihood: log p(x|z), shape (K, B).
        log_prior: log p(z), shape (K, B).
        log_guide: log q(z|x), shape (K, B).
        scale: N/B of a subsampled data plate, else 1.0. It multiplies an objective, never a weight.
        common_scale: the scale of a ``poutine.scale`` around all sites, else 1.0. It multiplies an objective, never a weight.
        log_guide_factors: the sum of the guide's ``pyro.factor`` sites, shape (K, B), or ``None``. They are subtracted from an
            objective, as in Pyro, and are not part of a weight.
        num_dims: the number of observed numbers per datum.
        not_reparameterized: guide sites through which no gradient flows.
        masked: latent sites of the guide whose density is masked for some data.
        gradients: how gradients reach the samples; see :func:`log_weights`.
        log_guide_score: log q of the detached samples, shape (K, B), if gradients are split.
        log_simulated: log q of one simulated (z, x) per datum, shape (B,), if an estimator needs it.
        sites: the terms of each site of the guide.
        gates: the gradient scalers of each run of the pair, if gradients are split.
        leaves: the latents, if they are leaves of the graph.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    scale: float = 1.0
    common_scale: float = 1.0
    log_guide_factors: Tensor | None = None
    num_dims: int = 0
    not_reparameterized: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    gradients: Gradients = Gradients.TOTAL
    log_guide_score: Tensor | None = None
    log_simulated: Tensor | None = None
    sites: tuple[SiteTerms, ...] = ()
    gates: tuple[PathGradientScaler, ...] = ()
    leaves: tuple[Leaf, ...] = ()

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z|x), shape (K, B), in nats."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_guide.shape[0]

    @property
    def num_data(self) -> int:
        """B, the data in this batch."""
        return self.log_guide.shape[1]

    def surrogate(self, model: Tensor, path: Tensor, score: Tensor) -> Tensor:
        r"""A tensor (B,) with the gradient below; its value has no meaning.

        .. math:: \sum_k a_k \, \partial_\theta \log p_\theta(x, z_k) + b_k \, \frac{\partial \log w_k}{\partial z_k}
            \frac{d z_k}{d\phi} - c_k \, \partial_\phi \log q_\phi(z_k \mid x)

        With total gradients only ``model`` is used. With scores there is no path. For a particle of weight zero a and b are
        set to zero, and for a datum whose weights are all zero c is too.

        Args:
            model: a, shape (K, B), detached.
            path: b, shape (K, B), detached.
            score: c, shape (K, B), detached.
        """
        has_discrete_latents = len(self.not_reparameterized) > 0
        model = zero_negligible(model, has_discrete_latents)
        log_joint = self.log_likelihood + self.log_prior
        dead = (log_joint - self.log_guide).detach() == -torch.inf
        lost = dead.all(0)

        def times(coefficient: Tensor, term: Tensor, excluded: Tensor) -> Tensor:
            # Both factors are set to zero: zero times infinity is NaN, here and in the backward pass.
            return (torch.where(excluded, 0.0, coefficient) * torch.where(excluded, 0.0, term)).sum(0)

        if self.gradients == Gradients.TOTAL:
            return times(model, log_joint - self.log_guide, dead)
        score = zero_negligible(score, has_discrete_latents)
        if self.gradients == Gradients.SCORE:
            return times(model, log_joint, dead) - times(score, self.log_guide, lost)
        assert self.log_guide_score is not None
        path = zero_negligible(path, has_discrete_latents)
        # The path's gradient is the model's times a factor, so the model needs a coefficient where the path has one.
        model = torch.maximum(model, torch.finfo(model.dtype).eps * path)
        factor = torch.where(dead | (model == 0), 0.0, path / model)
        for gate, rows in zip(self.gates, factor.split(self.num_particles // len(self.gates)), strict=True):
            gate.factor = rows
        pathwise = times(path, self.log_guide - self.log_guide_score, dead)
        return times(model, log_joint, dead) - pathwise - times(score, self.log_guide_score, lost)


def zero_negligible(coefficient: Tensor, has_discrete_latents: bool = False) -> Tensor:
    r"""Set to zero the coefficients (K, B) that are negligible, at floating-point precision, beside the datum's largest.

    .. math:: \sum_{k \, \text{cleared}} |c_k| < \varepsilon \max_j |c_j|

    A coefficient is cleared if it is below :math:`\varepsilon / K` of the largest, or below :math:`\varepsilon / 4` of it
    provided that all of these together satisfy the bound. Weights spread over hundreds of nats. Gradients weighted by
    :math:`e^{-90}` would be subnormal numbers, which slow down matrix products, and rows of zeros can be skipped.

    Args:
        coefficient: of each particle's gradient.
        has_discrete_latents: whether one particle may be the only one that reaches some parameters, as the values of a
            discrete latent do; the threshold is then :math:`\varepsilon^2` in place of :math:`\varepsilon`.
    """
    if len(coefficient) == 1:
        return coefficient
    size = coefficient.abs()
    rounding = torch.finfo(size.dtype).eps ** (2 if has_discrete_latents else 1) * size.amax(0)
    small = size < rounding / 4
    few = torch.where(small, size, 0.0).sum(0) < rounding
    return torch.where(small & few | (size < rounding / len(size)), 0.0, coefficient)

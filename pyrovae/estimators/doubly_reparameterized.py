"""Importance-weighted bounds with doubly reparameterised gradients."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ..programs.sites import Program
from ..programs.tracing import Gradients
from ..programs.weights import Leaf, LogWeights, zero_negligible
from ..registry import register
from .base import Coefficients, ManyParticles, iwae

__all__ = ["DReG", "GDReG"]


@register("estimator", "dreg")
class DReG(ManyParticles):
    r"""The importance-weighted bound, its score reparameterised a second time.

    The reported bound is :class:`IWAE`'s, a lower bound. The gradient has the same mean with

    .. math:: a_k = \tilde w_k, \qquad b_k = \tilde w_k^2, \qquad c_k = 0

    where :math:`\tilde w_k` are the normalised weights, and a signal-to-noise ratio for the guide that grows with K. At K = 1
    it is :class:`STL`. It also holds for guides with several dependent latents, which run twice. The estimator needs
    reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Tucker, Lawson, Gu and Maddison, Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2019,
        https://arxiv.org/abs/1810.04152.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.DReG(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = Gradients.SPLIT

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, their squares for the path, nothing for the score."""
        normalized = torch.softmax(log_w, 0)
        return Coefficients(normalized, normalized**2, torch.zeros_like(normalized))


@register("estimator", "gdreg")
class GDReG(ManyParticles):
    r"""DReG with doubly reparameterised gradients for learned priors too.

    The reported bound is :class:`IWAE`'s, a lower bound. Guide and likelihood get :class:`DReG`'s gradient. The parameters of
    the prior of each latent site i, with the model's own sampler :math:`z_i = T(\epsilon; \theta)` inverted at the sample, get

    .. math:: \sum_k \Big( \tilde w_k \, \partial_{z_i} \big[ \log p(x, z_k) - \log p_\theta(z_{ik} \mid \cdot) \big]
        - \tilde w_k^2 \, \partial_{z_i} \log w_k \Big) \frac{\partial T(\epsilon_k; \theta)}{\partial \theta}

    which has the mean of the ordinary gradient :math:`\tilde w_k \partial_\theta \log p_\theta(z_{ik} | \cdot)`. A prior whose
    sampler cannot be inverted, such as a mixture, keeps the ordinary gradient, and so does a site that is a Delta in the guide;
    :meth:`prior_terms` says which. Samplers that can be inverted are those of Normal, Laplace, Cauchy, StudentT, Gumbel,
    MultivariateNormal, and invertible transforms of these. The model's graph is differentiated twice. The estimator needs
    reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Bauer and Mnih, Generalized Doubly Reparameterized Gradient Estimators, 2021,
        https://proceedings.mlr.press/v139/bauer21a.html.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.GDReG(num_particles=5).prior_terms(vae.model, vae.guide, torch.zeros(5, 9))
        {'z': 'reparameterised'}
    """

    gradients = Gradients.LEAF

    def prior_terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """How the prior of each latent gets its gradient: ``"reparameterised"`` or ``"score"``."""
        with torch.enable_grad():
            leaves = self._draw(model, guide, args, kwargs).leaves
        priors = {leaf.name: _resample_leaf(leaf) for leaf in leaves if leaf.prior is not None}
        return {name: "score" if resampled is None else "reparameterised" for name, resampled in priors.items()}

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return iwae(weights)

    def _objective(self, weights: LogWeights, beta: float | Tensor | None) -> Tensor:
        dead = weights.log_weights.detach() == -torch.inf
        normalized = zero_negligible(torch.where(dead, 0.0, torch.softmax(weights.log_weights.detach(), 0)))
        values = [leaf.value for leaf in weights.leaves]

        def slopes(log_density: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
            alive = torch.where(dead, 0.0, log_density).sum()
            return torch.autograd.grad(alive, at, retain_graph=True, allow_unused=True, materialize_grads=True)

        objective = (normalized * torch.where(dead, 0.0, weights.log_likelihood)).sum(0)
        joint_slopes = slopes(weights.log_likelihood + weights.log_prior, *values)
        guide_slopes = slopes(weights.log_guide, *values)
        for leaf, joint, guide in zip(weights.leaves, joint_slopes, guide_slopes, strict=True):
            part = leaf.layout.broadcast_to_site(normalized[leaf.rows], leaf.value, leaf.event_dim)
            path = torch.where(part == 0, 0.0, part**2 * (joint - guide))
            objective = objective + leaf.layout.sum_per_datum(path * leaf.sample, leaf.event_dim).sum(0)
            resampled = _resample_leaf(leaf)
            if resampled is None:
                objective = objective + normalized[leaf.rows].mul(torch.where(dead[leaf.rows], 0.0, leaf.log_prior)).sum(0)
            else:
                (own,) = torch.autograd.grad(leaf.log_prior.sum(), leaf.value, retain_graph=True)
                direct = torch.where(part == 0, 0.0, part * (joint - own)) - path
                objective = objective + leaf.layout.sum_per_datum(direct * resampled, leaf.event_dim).sum(0)
        return objective


_LOC_SCALE = (dist.Normal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Gumbel)


def _resample_leaf(leaf: Leaf) -> Tensor | None:
    return None if leaf.is_point else _resample(leaf.prior, leaf.value.detach())


def _resample(prior: Any, value: Tensor) -> Tensor | None:
    """``value`` as the prior's sampler makes it from its noise: the same numbers, differentiable in the prior's parameters."""
    if isinstance(prior, torch.distributions.Independent):
        return _resample(prior.base_dist, value)
    # Before the case of transforms: torch builds its Gumbel from a uniform draw, which has no location and scale.
    if isinstance(prior, _LOC_SCALE) and not getattr(prior, "df", prior.loc.detach()).requires_grad:
        return prior.loc + prior.scale * ((value - prior.loc) / prior.scale).detach()
    if isinstance(prior, torch.distributions.TransformedDistribution):
        noise = value
        for transform in reversed(prior.transforms):
            noise = transform.inv(noise)
        resampled = _resample(prior.base_dist, noise.detach())
        for transform in prior.transforms if resampled is not None else ():
            resampled = transform(resampled)
        return resampled
    if isinstance(prior, torch.distributions.MultivariateNormal):
        centred = (value - prior.loc).detach().unsqueeze(-1)
        noise = torch.linalg.solve_triangular(prior.scale_tril.detach(), centred, upper=False)
        return prior.loc + (prior.scale_tril.tril() @ noise).squeeze(-1)
    return None

"""The evidence lower bound, and its gradient along the path alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..programs.sites import Program
from ..programs.tracing import Gradients
from ..programs.weights import LogWeights
from ..registry import register
from .base import Coefficients, Estimator, elbo

__all__ = ["ELBO", "STL"]


@register("estimator")
class ELBO(Estimator):
    r"""The evidence lower bound.

    .. math:: L = E_q \Big[ \frac1K \sum_k \log w_k \Big] = E_q[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z)) \le \log p(x)

    More particles lower the gradient's variance and do not change the bound. The objective is

    .. math:: E_q[\log p(x \mid z)] - \beta \sum_i \max(\lambda, KL_i)

    with one term for each latent site i, whose KL is averaged over particles and batch inside the maximum. At beta = 1 and
    lambda = 0, the defaults, it is the bound. The reported bound is the ELBO for any beta and lambda. The estimator needs
    reparameterised sites.

    Args:
        num_particles: K.
        kl: ``"sample"`` takes log q - log p at the samples. ``"analytic"`` takes the closed form for each site that has one,
            given its parents, and the samples for the others; :meth:`kl_terms` says which.
        beta: weight of the KL; a float, or a scalar tensor.
        warm_up: steps over which beta rises linearly to its value; ``steps`` counts the differentiated losses.
        free_bits: lambda, in nats per latent site; a KL below it has no gradient.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: an option out of range, or a site that is not reparameterised.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, https://arxiv.org/abs/1312.6114.
        Beta: Higgins et al., beta-VAE, 2017, https://openreview.net/forum?id=Sy2fzU9gl.
        Warm-up: Sonderby et al., Ladder Variational Autoencoders, 2016, https://arxiv.org/abs/1602.02282.
        Free bits: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016,
        https://arxiv.org/abs/1606.04934.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> elbo = pv.estimators.ELBO(kl="analytic")
        >>> elbo.bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
        >>> elbo.kl_terms(vae.model, vae.guide, torch.zeros(5, 9))
        {'z': 'analytic'}
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl: Literal["sample", "analytic"] = "sample",
        beta: float = 1.0,
        warm_up: int = 0,
        free_bits: float = 0.0,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if kl not in ("sample", "analytic"):
            raise ValueError(f'kl must be "sample" or "analytic", got {kl!r}.')
        for name, value in {"beta": beta, "warm_up": warm_up, "free_bits": free_bits}.items():
            if value < 0:
                raise ValueError(f"{name} must be non-negative, got {value!r}.")
        self.kl, self.beta, self.warm_up, self.free_bits = kl, beta, warm_up, free_bits
        self.steps = 0

    @property
    def current_beta(self) -> float:
        """Beta at the present step of the warm-up."""
        return self.beta * min(1.0, (self.steps + 1) / self.warm_up) if self.warm_up else self.beta

    def kl_terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """How the KL of each site of the guide is computed: ``"analytic"`` or ``"sample"``."""
        with torch.no_grad():
            sites = self._draw(model, guide, args, kwargs).sites
        return {site.name: "sample" if site.kl is None else "analytic" for site in sites}

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,), or of the likelihood less the closed-form KL."""
        if self.kl == "sample":
            return elbo(weights)
        return (weights.log_likelihood - sum(_kls(weights))).mean(0)

    def advance(self) -> None:
        """Move the warm-up on by one step."""
        self.steps += 1

    def _objective(self, weights: LogWeights, beta: float | Tensor | None) -> Tensor:
        assert beta is not None
        if self.kl == "sample" and isinstance(beta, float) and beta == 1.0 and self.free_bits == 0.0:
            return super()._objective(weights, beta)
        dead = weights.log_weights.detach() == -torch.inf
        objective = torch.where(dead, 0.0, weights.log_likelihood).mean(0)
        for term in _kls(weights):
            kl = torch.where(dead, 0.0, term).mean(0)
            if self.free_bits > 0:  # without free bits a sampled KL may be negative, and counts
                kl = torch.where(kl.detach().mean() < self.free_bits, 0.0, kl)
            objective = objective - beta * kl
        return objective

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict, **options: Any) -> LogWeights:
        return super()._draw(model, guide, args, kwargs, analytic_kl=self.kl == "analytic", **options)


def _kls(weights: LogWeights) -> list[Tensor]:
    return [site.log_guide - site.log_prior if site.kl is None else site.kl for site in weights.sites]


@register("estimator")
class STL(Estimator):
    r"""The ELBO with the gradient of the path alone: sticking the landing.

    The reported bound is the ELBO, a lower bound. The gradient leaves out the score :math:`\partial_\phi \log q_\phi(z|x)`,
    whose mean is zero:

    .. math:: a_k = b_k = \frac1K, \qquad c_k = 0

    Its mean is that of the ELBO's gradient, and its variance for the guide is zero if q is the exact posterior. The estimator
    needs reparameterised sites; a guide with several sites runs twice.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Roeder, Wu and Duvenaud, Sticking the Landing, 2017, https://arxiv.org/abs/1703.09194.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.STL().differentiable_loss(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([])
    """

    gradients = Gradients.SPLIT
    drops_score = True

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,)."""
        return elbo(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Equal weights for model and path, nothing for the score."""
        mean = torch.full_like(log_w, 1 / len(log_w))
        return Coefficients(mean, mean, torch.zeros_like(log_w))

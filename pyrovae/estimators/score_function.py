"""Estimators for latents without a reparameterised sampler."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ..programs.tracing import Gradients
from ..programs.weights import LogWeights
from ..registry import register
from .base import Coefficients, ManyParticles, elbo, iwae, log_mean_exp

__all__ = ["OVIS", "VIMCO", "ScoreELBO"]


class _ScoreFunction(ManyParticles):
    r"""The importance-weighted bound with a score-function gradient and a control variate.

    .. math:: a_k = \tilde w_k, \qquad -c_k = \log \frac1K \sum_j w_j - \tilde w_k - h_k
    """

    gradients = Gradients.SCORE
    fewest_particles = 2

    @abstractmethod
    def control(self, log_w: Tensor, normalized: Tensor) -> Tensor:
        """The control variate, subtracted from the learning signal of each particle, shape (K, B)."""

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, the controlled learning signal for the score."""
        normalized = torch.softmax(log_w, 0)
        control = self.control(log_w, normalized)
        # If all other weights are zero there is no control variate. Whether they are does not depend on this particle.
        control = torch.where(control == -torch.inf, 0.0, control)
        return Coefficients(normalized, torch.zeros_like(normalized), normalized + control - log_mean_exp(log_w))


@register("estimator")
class VIMCO(_ScoreFunction):
    r"""The importance-weighted bound with a score-function gradient, whose baseline is a bound of the other particles.

    The reported bound is :class:`IWAE`'s, a lower bound. Its gradient, unbiased, is

    .. math:: \sum_k (\hat L - \hat L_{-k}) \, \partial_\phi \log q_\phi(z_k | x) + \sum_k \tilde w_k \, \partial \log w_k

    at fixed samples, where :math:`\hat L_{-k}` is the bound with :math:`\log w_k` replaced by the mean of the others. Sites
    need not be reparameterised, and may be discrete; K >= 2.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles.

    References:
        Mnih and Rezende, Variational Inference for Monte Carlo Objectives, 2016, https://arxiv.org/abs/1602.06725.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.VIMCO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def control(self, log_w: Tensor, normalized: Tensor) -> Tensor:
        """The bound with each weight replaced by the geometric mean of the others."""
        own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)[..., None]
        others = torch.where(own, 0.0, log_w).sum(1) / (len(log_w) - 1)
        return log_mean_exp(_others(log_w, others[:, None]), 1)


@register("estimator")
class OVIS(_ScoreFunction):
    r"""The importance-weighted bound with a score-function gradient and the control variate of least variance.

    The reported bound is :class:`IWAE`'s, a lower bound. Its gradient is

    .. math:: \sum_k (\hat L - \tilde w_k - h_k) \, \partial_\phi \log q_\phi(z_k | x) + \tilde w_k \, \partial_\theta \log p,
        \qquad h_k = \log \frac{1}{K-1} \sum_{j \ne k} w_j - \gamma \tilde w_k + (1 - \gamma) \log \Big(1 - \frac1K\Big)

    gamma = 0 is for a small effective sample size, and is unbiased. gamma = 1 is for a large one, and its bias vanishes as K
    grows. Sites need not be reparameterised, and may be discrete; K >= 2.

    Args:
        num_particles: K.
        gamma: between the two limits, in [0, 1].
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles, or gamma outside [0, 1].

    References:
        Lievin, Dittadi, Christensen and Winther, Optimal Variance Control of the Score-Function Gradient Estimator for
        Importance-Weighted Bounds, 2020, equation 17, https://arxiv.org/abs/2008.01998.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.OVIS(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, gamma: float = 0.0, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be between 0 and 1, got {gamma!r}.")
        self.gamma = gamma

    def control(self, log_w: Tensor, normalized: Tensor) -> Tensor:
        """Equation 17 of the paper."""
        K = len(log_w)
        others = torch.logsumexp(_others(log_w, log_w.new_tensor(-torch.inf)), 1) - math.log(K - 1)
        return others - self.gamma * normalized + (1 - self.gamma) * math.log(1 - 1 / K)


@register("estimator", "score_elbo")
class ScoreELBO(ManyParticles):
    r"""The ELBO with a score-function gradient, whose baseline is the mean of the other particles.

    The reported bound is the ELBO, a lower bound. Its gradient, unbiased, is

    .. math:: \frac1K \sum_k \partial_\theta \log p_\theta(x, z_k)
        + \Big( \log w_k - \frac{1}{K-1} \sum_{j \ne k} \log w_j \Big) \, \partial_\phi \log q_\phi(z_k | x)

    Sites need not be reparameterised, and may be discrete; K >= 2.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles.

    References:
        Ranganath, Gerrish and Blei, Black Box Variational Inference, 2014, https://arxiv.org/abs/1401.0118.
        The baseline: Kool, van Hoof and Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019,
        https://openreview.net/forum?id=r1lgTGL5DE.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.ScoreELBO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = Gradients.SCORE
    fewest_particles = 2

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,)."""
        return elbo(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Equal weights for the model, the centred log-weights for the score."""
        K = len(log_w)
        mean = torch.full_like(log_w, 1 / K)
        signal = (log_w - log_w.mean(0)) / (K - 1)  # (log w_k - mean of the others) / K
        # One weight of zero makes the bound minus infinity whatever the others are, so it has no gradient.
        signal = torch.where((log_w == -torch.inf).any(0), 0.0, signal)
        return Coefficients(mean, torch.zeros_like(mean), -signal)


def _others(log_w: Tensor, replacement: Tensor) -> Tensor:
    """Log-weights of shape (K, K, B): row k has the k-th one replaced."""
    own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)[..., None]
    return torch.where(own, replacement, log_w)

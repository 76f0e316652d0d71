"""The thermodynamic bound."""

from __future__ import annotations

import torch
from torch import Tensor

from .._validation import positive_integer
from ..programs.tracing import Gradients
from ..programs.weights import LogWeights
from ..registry import register
from .base import Coefficients, ManyParticles

__all__ = ["TVO"]


@register("estimator")
class TVO(ManyParticles):
    r"""The thermodynamic variational objective: a left Riemann sum along the path from guide to posterior.

    .. math:: \log p(x) = \int_0^1 E_{\pi_\beta}[\log w] \, d\beta \;\ge\; \sum_{s=0}^{S-1} (\beta_{s+1} - \beta_s) \,
        E_{\pi_{\beta_s}}[\log w], \qquad \pi_\beta \propto q^{1-\beta} \, p(x, z)^\beta

    The points are 0 and S more, evenly spaced in log beta up to 1; S = 1 is the ELBO. Each expectation is estimated with
    self-normalised weights :math:`v_{sk} \propto w_k^{\beta_s}`, which biases the reported sum at finite K; with exact
    expectations it is a lower bound. The gradient is the covariance gradient of the exact sum, estimated with the same weights:

    .. math:: g = \sum_s (\beta_{s+1} - \beta_s) \sum_k v_{sk} \big[ \partial \log w_k + (\log w_k - \overline{\log w}_s)
        \, \partial ( \beta_s \log p(x, z_k) + (1 - \beta_s) \log q(z_k | x) ) \big]

    at fixed samples, with :math:`\overline{\log w}_s = \sum_k v_{sk} \log w_k`. It is not the gradient of the reported number.
    Sites need not be reparameterised, and may be discrete; K >= 2.

    Args:
        num_particles: K.
        num_partitions: S.
        log10_beta: the first point after 0, as a power of ten.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: ``num_particles`` is below 2, ``num_partitions`` below 1, or ``log10_beta`` not negative.

    References:
        Masrani, Le and Wood, The Thermodynamic Variational Objective, 2019, https://arxiv.org/abs/1907.00031.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.TVO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = Gradients.SCORE
    fewest_particles = 2

    def __init__(
        self,
        num_particles: int = 5,
        *,
        num_partitions: int = 5,
        log10_beta: float = -2.0,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if log10_beta >= 0:
            raise ValueError(f"log10_beta must be negative, got {log10_beta!r}.")
        self.num_partitions, self.log10_beta = positive_integer(num_partitions, "num_partitions"), log10_beta

    @property
    def points(self) -> list[float]:
        """The S + 1 points from 0 to 1."""
        S = self.num_partitions
        return [0.0] + [10 ** (self.log10_beta * (S - s) / max(S - 1, 1)) for s in range(1, S + 1)]

    def reduce(self, weights: LogWeights) -> Tensor:
        """The left Riemann sum, shape (B,)."""
        _, width, normalized, log_w = self._tempered(weights.log_weights)
        total = (width * normalized * log_w).sum((0, 1))
        return torch.where((weights.log_weights == -torch.inf).any(0), -torch.inf, total)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """The coefficients of the covariance gradient, for the model's log p and the guide's log q."""
        beta, width, normalized, log_w = self._tempered(log_w)
        covariance = width * normalized * (log_w - (normalized * log_w).sum(1, keepdim=True))
        mean = (width * normalized).sum(0)
        return Coefficients(mean + (beta * covariance).sum(0), torch.zeros_like(mean), mean - ((1 - beta) * covariance).sum(0))

    def _tempered(self, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points and widths (S, 1, 1), weights (S, K, B), and log-weights (K, B) without their infinities."""
        dead = log_w == -torch.inf
        points = log_w.new_tensor(self.points)[:, None, None]
        beta, width = points[:-1], points.diff(dim=0)
        log_w = torch.where(dead, 0.0, log_w)
        normalized = torch.softmax(torch.where(dead, -torch.inf, beta * log_w), 1)
        return beta, width, torch.where(dead, 0.0, normalized), log_w

"""Wake-sleep objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..programs.sites import Program
from ..programs.tracing import Gradients
from ..programs.wake_sleep import simulated_log_guide
from ..programs.weights import LogWeights
from ..registry import register
from .base import Coefficients, ManyParticles, iwae

__all__ = ["RWS"]


@register("estimator")
class RWS(ManyParticles):
    r"""Reweighted wake-sleep.

    The reported bound is :class:`IWAE`'s, a lower bound, and the model gets its gradient. The guide is fitted to the posterior,
    either by the weights (wake) or on data simulated from the model (sleep), and its gradient is not that of a bound:

    .. math:: g_\phi^{wake} = \sum_k \tilde w_k \, \partial_\phi \log q_\phi(z_k \mid x), \qquad
        g_\phi^{sleep} = \partial_\phi \log q_\phi(z \mid x), \quad (x, z) \sim p_\theta

    with one simulated pair (x, z) for each datum. Wake is biased at finite K; sleep is unbiased for data of the model. Sites
    need not be reparameterised.

    Args:
        num_particles: K.
        guide_phase: ``"wake"`` or ``"sleep"``.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: an unknown phase; or, in the sleep phase, the model observes a value that is not one of its arguments.

    References:
        Bornschein and Bengio, Reweighted Wake-Sleep, 2015, https://arxiv.org/abs/1406.2751.
        Le et al., Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow, 2019,
        https://arxiv.org/abs/1805.10469.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.RWS(guide_phase="sleep").differentiable_loss(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([])
    """

    gradients = Gradients.SCORE

    def __init__(
        self, num_particles: int = 5, *, guide_phase: Literal["wake", "sleep"] = "wake", vectorize_particles: bool = True
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if guide_phase not in ("wake", "sleep"):
            raise ValueError(f'guide_phase must be "wake" or "sleep", got {guide_phase!r}.')
        self.guide_phase = guide_phase

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, and in the wake phase for the guide's log q."""
        normalized, zeros = torch.softmax(log_w, 0), torch.zeros_like(log_w)
        return Coefficients(normalized, zeros, -normalized if self.guide_phase == "wake" else zeros)

    def _objective(self, weights: LogWeights, beta: float | Tensor | None) -> Tensor:
        objective = super()._objective(weights, beta)
        return objective if weights.log_simulated is None else objective + weights.log_simulated

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict, **options: Any) -> LogWeights:
        weights = super()._draw(model, guide, args, kwargs, **options)
        if self.guide_phase == "sleep" and torch.is_grad_enabled():
            weights = replace(weights, log_simulated=simulated_log_guide(model, guide, *args, **kwargs))
        return weights

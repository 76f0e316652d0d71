r"""Estimators: what is differentiated and what is reported, as reductions of log-weights.

Each is a ``pyro.infer.ELBO``: it runs under ``pyro.infer.SVI``, under :func:`pyrovae.fit` and by name, on any pair of Pyro
programs. Two differ by how they reduce the same (K, B) log-weights. A subsampled plate's N/B multiplies the objective after
the reduction, never the inside of a logsumexp.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from .registry import build, register
from .weights import LogWeights, Program, inspect_pair, log_weights

for _pyros_own, _name in [
    (pyro.infer.Trace_ELBO, "trace_elbo"),
    (pyro.infer.TraceMeanField_ELBO, "trace_mean_field_elbo"),
    (pyro.infer.TraceGraph_ELBO, "trace_graph_elbo"),
    (pyro.infer.TraceEnum_ELBO, "trace_enum_elbo"),
    (pyro.infer.RenyiELBO, "renyi_elbo"),
]:
    register("estimator", _name)(_pyros_own)


def make_estimator(spec: Any) -> pyro.infer.ELBO:
    """An estimator from its name, a table, or a ready ``pyro.infer.ELBO``.

    Raises:
        ValueError: an unknown name or option, or something that is no ELBO.

    Example:
        >>> from pyrovae.estimators import make_estimator
        >>> make_estimator({"kind": "iwae", "num_particles": 5}).num_particles
        5
    """
    estimator = build("estimator", spec)
    if not isinstance(estimator, pyro.infer.ELBO):
        raise ValueError(f"An estimator is a name, a table or a pyro.infer.ELBO, not a {type(estimator).__name__}.")
    return estimator


class Estimator(pyro.infer.ELBO):
    """An objective and a bound over log-weights; concrete estimators implement ``objective`` and ``reduce``.

    Args:
        num_particles: K, draws from the guide per datum.
        vectorize_particles: run the pair once with particles on the left, or K times.

    Raises:
        ValueError: ``num_particles`` is not a positive integer.
    """

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        if int(num_particles) != num_particles or num_particles < 1:
            raise ValueError(f"num_particles is a positive integer, not {num_particles!r}.")
        super().__init__(num_particles=int(num_particles), vectorize_particles=vectorize_particles)
        # Pyro's ELBOs keep the nesting of the first pair they meet; this one keeps it per pair.
        self._nesting: dict[tuple[Program, Program], int] = {}

    @abstractmethod
    def reduce(self, weights: LogWeights) -> Tensor:
        """The bound per datum, shape (B,), in nats."""

    def objective(self, weights: LogWeights) -> Tensor:
        """What is differentiated, shape (B,); the bound itself unless an estimator says otherwise."""
        return self.reduce(weights)

    @torch.no_grad()
    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The reported bound per datum, shape (B,), in nats, without gradients and without the plate's scale."""
        return self.reduce(self._draw(model, guide, args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar whose value is minus the summed bound and whose gradient is minus the objective's."""
        weights = self._draw(model, guide, args, kwargs)
        loss = -weights.scale * self.objective(weights).sum()
        value = -weights.scale * self.reduce(weights).detach().sum()
        return loss + (value - loss.detach())

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, summed over the data and scaled as Pyro scales it, in nats."""
        with torch.no_grad():
            weights = self._draw(model, guide, args, kwargs)
            return -weights.scale * self.reduce(weights).sum().item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """As :meth:`loss`, after adding the gradients of the objective to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} reads log-weights, not single traces: call log_weights(model, guide, ...).")

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> LogWeights:
        nesting = None
        if self.num_particles > 1 and self.vectorize_particles:
            if (model, guide) not in self._nesting:
                self._nesting[model, guide] = inspect_pair(model, guide, *args, **kwargs).max_plate_nesting
            nesting = self._nesting[model, guide]
        return log_weights(
            model,
            guide,
            *args,
            num_particles=self.num_particles,
            vectorize_particles=self.vectorize_particles,
            max_plate_nesting=nesting,
            **kwargs,
        )


@register("estimator")
class ELBO(Estimator):
    r"""The evidence lower bound.

    .. math:: L = E_q \Big[ \frac1K \sum_k \log w_k \Big] \le \log p(x)

    Particles average; they lower the gradient's noise and leave the bound where it is.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.ELBO().bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,)."""
        return weights.log_weights.mean(0)


@register("estimator")
class IWAE(Estimator):
    r"""The importance-weighted bound.

    .. math:: L_K = E_q \Big[ \log \frac1K \sum_k w_k \Big] \le \log p(x)

    It rises with K towards log p(x); at K = 1 it is the ELBO.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.IWAE(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return torch.logsumexp(weights.log_weights, 0) - math.log(weights.num_particles)

"""Estimators: what an estimator of a bound declares, and what all of them do the same way."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import pyro.infer
import torch
from torch import Tensor

from .._validation import positive_integer
from ..programs.inspect import PairInfo, inspect_pair
from ..programs.log_weights import log_weights
from ..programs.sites import Program
from ..programs.tracing import Gradients
from ..programs.weights import LogWeights
from ..registry import build, register

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


def runs_together(estimator: pyro.infer.ELBO) -> bool:
    """Whether an estimator has several particles, which run side by side."""
    return estimator.num_particles > 1 and bool(getattr(estimator, "vectorize_particles", False))


def check_estimator(estimator: pyro.infer.ELBO, info: PairInfo) -> None:
    """Refuse an estimator that would train a pair wrongly, before the first step.

    Args:
        estimator: one of ours or Pyro's.
        info: what :func:`pyrovae.programs.inspect.inspect_pair` says of the pair.

    Raises:
        ValueError: the estimator needs reparameterised sites and the pair has others, it is Pyro's ``RenyiELBO`` on a
            scaled or subsampled plate, or it cannot sum out a site that the model leaves to enumeration.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> info = pv.programs.inspect.inspect_pair(vae.model, vae.guide, torch.zeros(5, 9))
        >>> pv.estimators.check_estimator(pv.estimators.IWAE(), info)
    """
    if isinstance(estimator, pyro.infer.ReweightedWakeSleep):
        raise ValueError("Pyro's ReweightedWakeSleep has two losses and no bound: choose 'rws'.")
    if isinstance(estimator, pyro.infer.TraceTailAdaptive_ELBO):
        raise ValueError("Pyro's TraceTailAdaptive_ELBO has a gradient and no loss: choose 'vr_max' or 'dreg'.")
    if info.enumerated and not isinstance(estimator, pyro.infer.TraceEnum_ELBO):
        raise ValueError(
            f"{type(estimator).__name__} cannot sum out {', '.join(map(repr, info.enumerated))}, which the model marks for "
            f"enumeration and the guide does not sample: choose 'trace_enum_elbo', or sample it in the guide."
        )
    scale = info.scale * info.common_scale
    if isinstance(estimator, pyro.infer.RenyiELBO) and scale != 1.0:
        what = "data plate's scale N/B" if info.common_scale == 1.0 else "scale of all sites"
        raise ValueError(
            f"RenyiELBO puts the {what} = {scale:g} inside the logsumexp, where it is no bound on log p(x): choose 'renyi' or "
            f"'iwae', which scale the sum outside it."
        )
    silent = isinstance(estimator, pyro.infer.TraceMeanField_ELBO) or (
        isinstance(estimator, pyro.infer.RenyiELBO) and estimator.alpha == 0.0
    )
    if silent or (isinstance(estimator, Estimator) and estimator.gradients != "score"):
        _refuse_unreparameterized(estimator, info.not_reparameterized)


def _refuse_unreparameterized(estimator: pyro.infer.ELBO, sites: tuple[str, ...]) -> None:
    if sites:
        raise ValueError(
            f"{type(estimator).__name__} needs reparameterised sites, and no gradient (or a part of it only) flows "
            f"through {', '.join(map(repr, sites))}: choose 'vimco' or 'score_elbo', or 'trace_enum_elbo' to sum over a few "
            f"values."
        )


class Coefficients(NamedTuple):
    """What multiplies each part of the gradient, shape (K, B) each, detached; see the top of :mod:`pyrovae.estimators`."""

    model: Tensor
    path: Tensor
    score: Tensor


def loss_and_grads(estimator: pyro.infer.ELBO, model: Program, guide: Program, *args: Any) -> float:
    """An estimator's loss in nats, after adding its gradients to the parameters', for ours and Pyro's alike.

    Pyro's own ``loss_and_grads`` skip the backward pass, in silence, where no parameter was announced by a pyro statement, as
    with the bound methods of a plain module. Their differentiable losses do not, so those are used where there is one.

    Example:
        >>> import pyro, torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> loss = pv.estimators.loss_and_grads(pyro.infer.Trace_ELBO(), vae.model, vae.guide, torch.zeros(5, 9))
        >>> all(parameter.grad is not None for parameter in vae.parameters())
        True
    """
    if not hasattr(estimator, "differentiable_loss"):
        return estimator.loss_and_grads(model, guide, *args)
    loss = estimator.differentiable_loss(model, guide, *args)
    if loss.requires_grad:
        loss.backward(retain_graph=estimator.retain_graph)
    return loss.item()


class Estimator(pyro.infer.ELBO):
    """A bound over log-weights and a gradient.

    A concrete estimator implements ``reduce``, and ``coefficients`` where the gradient is not the bound's own.

    Args:
        num_particles: K, draws from the guide per datum.
        vectorize_particles: run the pair once with particles on the left, or K times.

    Raises:
        ValueError: ``num_particles`` is not a positive integer, or fewer than the estimator can do with.
    """

    gradients: ClassVar[Gradients] = "total"
    fewest_particles: ClassVar[int] = 1
    drops_score: ClassVar[bool] = False

    @property
    def needs_density(self) -> bool:
        """Whether the gradient rests on the score of each sample's own density: all but the plain path's and STL's do."""
        return self.gradients != "total" and not self.drops_score

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        num_particles = positive_integer(num_particles, "num_particles")
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"{type(self).__name__} compares particles of one datum: give it num_particles of at least "
                f"{self.fewest_particles}, not {num_particles}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.captured_beta: Tensor | None = None
        # Pyro's ELBOs keep the nesting of the first pair they meet; this one keeps it per pair.
        self._nesting: dict[tuple[Program, Program], int] = {}

    @abstractmethod
    def reduce(self, weights: LogWeights) -> Tensor:
        """The bound per datum, shape (B,), in nats."""

    def advance_beta(self) -> float | None:
        """The number that the objective takes anew at each step, if there is one; each call moves on by a step.

        A captured step has it as an input, which :attr:`held` is while the step is captured.
        """
        return None

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """The gradient's coefficients from detached log-weights (K, B); those of the bound itself unless overridden."""
        with torch.enable_grad():
            leaf = log_w.clone().requires_grad_()
            zeros = torch.zeros_like(log_w)
            (share,) = torch.autograd.grad(self.reduce(LogWeights(leaf, zeros, zeros)).sum(), leaf)
        return Coefficients(share, share, share)

    def objective(self, weights: LogWeights) -> Tensor:
        """What is differentiated, shape (B,); only its gradient means something.

        Raises:
            ValueError: a site is not reparameterised, or its density is masked, and the estimator needs it; the message names
                the site. Or the guide has a ``pyro.factor``, and the estimator follows scores.
        """
        if self.gradients != "score":
            _refuse_unreparameterized(self, weights.not_reparameterized)
        if self.needs_density and weights.masked:
            sites = ", ".join(map(repr, weights.masked))
            raise ValueError(
                f"{type(self).__name__} needs the density of every latent it samples, and that of {sites} "
                f"is masked for some data: choose 'iwae', 'elbo' or 'stl', or leave what is masked out of the guide."
            )
        if weights.log_guide_factors is None:
            return self._objective(weights)
        if self.gradients == "score":
            raise ValueError(
                f"{type(self).__name__} does not see how the guide's pyro.factor depends on its samples: choose "
                f"'elbo' or 'iwae'."
            )
        return self._objective(weights) - weights.log_guide_factors.mean(0)

    def _objective(self, weights: LogWeights) -> Tensor:
        return weights.surrogate(*self.coefficients(weights.log_weights.detach()))

    @torch.no_grad()
    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The reported bound per datum, shape (B,), in nats, without gradients and without the plate's scale."""
        return self.reduce(self._draw(model, guide, args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar whose value is minus the summed bound and whose gradient is minus the objective's."""
        weights = self._draw(model, guide, args, kwargs)
        with torch.no_grad():
            value = -weights.scale * weights.common_scale * self.reduce(weights).sum()
        if not torch.is_grad_enabled():
            return value
        loss = -weights.scale * weights.common_scale * self.objective(weights).sum()
        return loss + (value - loss.detach())

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, summed over the data and scaled as Pyro scales it, in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """As :meth:`loss`, after adding the gradients of the objective to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} reads log-weights, not single traces: call log_weights(model, guide, ...).")

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict, **options: Any) -> LogWeights:
        nesting = 0  # of no use where particles run one by one
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
            gradients=self.gradients,
            **options,
            **kwargs,
        )


def _log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def _elbo(weights: LogWeights) -> Tensor:
    return weights.log_weights.mean(0)


def _iwae(weights: LogWeights) -> Tensor:
    return _log_mean_exp(weights.log_weights)


class _ManyParticles(Estimator):
    """An estimator of a bound that tightens with K, so that one particle is no sensible default."""

    def __init__(self, num_particles: int = 5, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)


class _Grouped(_ManyParticles):
    """Particles in M groups of equal size."""

    def __init__(self, num_particles: int = 8, *, num_groups: int = 2, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if positive_integer(num_groups, "num_groups") > self.num_particles or self.num_particles % num_groups:
            raise ValueError(f"num_groups divides num_particles = {num_particles} into equal parts, unlike {num_groups!r}.")
        self.num_groups = int(num_groups)

    def _mean_group(self, log_w: Tensor) -> Tensor:
        return _log_mean_exp(log_w.unflatten(0, (self.num_groups, -1)), 1).mean(0)


def _others(log_w: Tensor, stand_in: Tensor) -> Tensor:
    """Row k holds all log-weights with the k-th replaced by ``stand_in``'s: shape (K, K, B)."""
    own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)[..., None]
    return torch.where(own, stand_in, log_w)

"""The base class of estimators, the functions that take any ``pyro.infer.ELBO``, and the reductions that several bounds use."""

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

__all__ = [
    "Coefficients", "Estimator", "ManyParticles", "check_estimator", "elbo", "iwae", "log_mean_exp", "loss_and_grads",
    "make_estimator", "runs_together",
]  # fmt: skip

for _pyro_estimator, _name in [
    (pyro.infer.Trace_ELBO, "trace_elbo"),
    (pyro.infer.TraceMeanField_ELBO, "trace_mean_field_elbo"),
    (pyro.infer.TraceGraph_ELBO, "trace_graph_elbo"),
    (pyro.infer.TraceEnum_ELBO, "trace_enum_elbo"),
    (pyro.infer.RenyiELBO, "renyi_elbo"),
]:
    register("estimator", _name)(_pyro_estimator)


def make_estimator(spec: Any) -> pyro.infer.ELBO:
    """An estimator from its name, a table, or a ready ``pyro.infer.ELBO``.

    Raises:
        ValueError: an unknown name or option, or an object that is not a ``pyro.infer.ELBO``.

    Example:
        >>> from pyrovae.estimators import make_estimator
        >>> make_estimator({"kind": "iwae", "num_particles": 5}).num_particles
        5
    """
    estimator = build("estimator", spec)
    if not isinstance(estimator, pyro.infer.ELBO):
        raise ValueError(f"An estimator must be a name, a table or a pyro.infer.ELBO, got a {type(estimator).__name__}.")
    return estimator


def runs_together(estimator: pyro.infer.ELBO) -> bool:
    """Whether an estimator runs several particles at once."""
    return estimator.num_particles > 1 and bool(getattr(estimator, "vectorize_particles", False))


def check_estimator(estimator: pyro.infer.ELBO, info: PairInfo) -> None:
    """Refuse an estimator that would train a pair wrongly, before the first step.

    Args:
        estimator: one of ours or Pyro's.
        info: the pair, as :func:`pyrovae.programs.inspect.inspect_pair` describes it.

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
        name = "data plate's scale N/B" if info.common_scale == 1.0 else "scale of all sites"
        raise ValueError(
            f"RenyiELBO puts the {name} = {scale:g} inside the logsumexp, so it does not bound log p(x): choose 'renyi' or "
            f"'iwae', which scale the sum outside it."
        )
    drops_gradients = isinstance(estimator, pyro.infer.TraceMeanField_ELBO) or (
        isinstance(estimator, pyro.infer.RenyiELBO) and estimator.alpha == 0.0
    )
    if drops_gradients or (isinstance(estimator, Estimator) and estimator.gradients != Gradients.SCORE):
        _refuse_unreparameterized(estimator, info.not_reparameterized)


def _refuse_unreparameterized(estimator: pyro.infer.ELBO, sites: tuple[str, ...]) -> None:
    if sites:
        raise ValueError(
            f"{type(estimator).__name__} needs reparameterised sites, and no gradient (or a part of it only) flows "
            f"through {', '.join(map(repr, sites))}: choose 'vimco' or 'score_elbo', or 'trace_enum_elbo' to sum over a few "
            f"values."
        )


class Coefficients(NamedTuple):
    """The coefficients a, b and c of :meth:`pyrovae.LogWeights.surrogate`, shape (K, B) each, detached."""

    model: Tensor
    path: Tensor
    score: Tensor


def loss_and_grads(estimator: pyro.infer.ELBO, model: Program, guide: Program, *args: Any) -> float:
    """The loss of any estimator in nats, after adding its gradients to the parameters'.

    Pyro's ``loss_and_grads`` skips the backward pass without a warning if no pyro statement named a parameter, as with the
    bound methods of a plain module. Its ``differentiable_loss`` does not, so this uses it if there is one.

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

    A subclass implements ``reduce``, and ``coefficients`` if its gradient is not the bound's own. Its class attributes say what
    it needs of the pair and of its draws.

    Args:
        num_particles: K, draws from the guide per datum.
        vectorize_particles: run the pair once with particles on the left, or K times.

    Attributes:
        gradients: how gradients reach the samples; see :class:`pyrovae.programs.tracing.Gradients`.
        fewest_particles: the smallest K that the estimator allows.
        drops_score: whether the gradient leaves out the score of the guide.

    Raises:
        ValueError: ``num_particles`` is not a positive integer, or below ``fewest_particles``.
    """

    gradients: ClassVar[Gradients] = Gradients.TOTAL
    fewest_particles: ClassVar[int] = 1
    drops_score: ClassVar[bool] = False

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        num_particles = positive_integer(num_particles, "num_particles")
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"num_particles of {type(self).__name__} must be at least {self.fewest_particles}, got {num_particles}: it "
                f"compares the particles of one datum."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        # Pyro's ELBOs keep the plate nesting of the first pair that they run; this one keeps it for each pair.
        self._nesting: dict[tuple[Program, Program], int] = {}

    @property
    def needs_density(self) -> bool:
        """Whether the gradient uses the score of each sample's density, as all do but those of the plain path and of STL."""
        return self.gradients != Gradients.TOTAL and not self.drops_score

    @property
    def current_beta(self) -> float | None:
        """The annealed coefficient of the objective at this step; ``None`` if the objective has none."""
        return None

    def advance(self) -> None:
        """Move the schedule of :attr:`current_beta` on by one step."""

    @abstractmethod
    def reduce(self, weights: LogWeights) -> Tensor:
        """The bound per datum, shape (B,), in nats."""

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """The gradient's coefficients from detached log-weights (K, B); by default those of the bound itself."""
        with torch.enable_grad():
            leaf = log_w.clone().requires_grad_()
            zeros = torch.zeros_like(log_w)
            (slope,) = torch.autograd.grad(self.reduce(LogWeights(leaf, zeros, zeros)).sum(), leaf)
        return Coefficients(slope, slope, slope)

    def objective(self, weights: LogWeights, beta: float | Tensor | None = None) -> Tensor:
        """The quantity that is differentiated, shape (B,); only its gradient has a meaning.

        Args:
            weights: log-weights, drawn with this estimator's ``gradients``.
            beta: the annealed coefficient; by default :attr:`current_beta`.

        Raises:
            ValueError: a site is not reparameterised, or its density is masked, and the estimator needs it; the message names
                the site. Or the guide has a ``pyro.factor``, and the estimator follows scores.
        """
        if self.gradients != Gradients.SCORE:
            _refuse_unreparameterized(self, weights.not_reparameterized)
        if self.needs_density and weights.masked:
            sites = ", ".join(map(repr, weights.masked))
            raise ValueError(
                f"{type(self).__name__} needs the density of every latent it samples, and that of {sites} "
                f"is masked for some data: choose 'iwae', 'elbo' or 'stl', or leave what is masked out of the guide."
            )
        beta = self.current_beta if beta is None else beta
        if weights.log_guide_factors is None:
            return self._objective(weights, beta)
        if self.gradients == Gradients.SCORE:
            raise ValueError(
                f"{type(self).__name__} does not see how the guide's pyro.factor depends on its samples: choose "
                f"'elbo' or 'iwae'."
            )
        return self._objective(weights, beta) - weights.log_guide_factors.mean(0)

    def _objective(self, weights: LogWeights, beta: float | Tensor | None) -> Tensor:
        return weights.surrogate(*self.coefficients(weights.log_weights.detach()))

    @torch.no_grad()
    def bound(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The reported bound per datum, shape (B,), in nats, without gradients and without the plate's scale."""
        return self.reduce(self._draw(model, guide, args, kwargs))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar whose value is minus the summed bound and whose gradient is minus the objective's.

        If gradients are enabled, this is one step of training, and the schedule advances.
        """
        loss = self.loss_at(self.current_beta, model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            self.advance()
        return loss

    def loss_at(self, beta: float | Tensor | None, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`differentiable_loss` at a given annealed coefficient, without advancing the schedule.

        A captured step passes the coefficient as a tensor, which is an input of its graph.
        """
        weights = self._draw(model, guide, args, kwargs)
        with torch.no_grad():
            value = -weights.scale * weights.common_scale * self.reduce(weights).sum()
        if not torch.is_grad_enabled():
            return value
        loss = -weights.scale * weights.common_scale * self.objective(weights, beta).sum()
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
        nesting = 0  # not needed by particles that run one by one
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


class ManyParticles(Estimator):
    """An estimator of a bound that tightens with K, whose default is therefore more than one particle."""

    def __init__(self, num_particles: int = 5, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """The log of the mean weight along a dimension."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def elbo(weights: LogWeights) -> Tensor:
    """The mean of the log-weights, shape (B,)."""
    return weights.log_weights.mean(0)


def iwae(weights: LogWeights) -> Tensor:
    """The log of the mean weight, shape (B,)."""
    return log_mean_exp(weights.log_weights)

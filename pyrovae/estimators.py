r"""Estimators: what is differentiated and what is reported, as reductions of log-weights.

Each is a ``pyro.infer.ELBO``: it runs under ``pyro.infer.SVI``, under :func:`pyrovae.fit` and by name, on any pair of Pyro
programs. Two differ by how they reduce the same (K, B) log-weights. A subsampled plate's N/B multiplies the objective after
the reduction, never the inside of a logsumexp.

The bound that is reported and the gradient that is followed are two things. Every gradient here is

.. math:: g = \sum_k a_k \, \partial_\theta \log p_\theta(x, z_k)
    + b_k \, \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d\phi} - c_k \, \partial_\phi \log q_\phi(z_k \mid x)

for model parameters :math:`\theta` and guide parameters :math:`\phi` (one that both share gets the sum): a *model*, a *path*
and a *score* part. An estimator is the three coefficients. Where all are :math:`\partial L / \partial \log w_k`, that is the
reparameterised gradient of its bound L, and writing ``reduce`` is enough. Below, :math:`\tilde w_k = w_k / \sum_j w_j`.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import pyro.distributions as dist
import pyro.infer
import torch
from torch import Tensor

from .pairs import PairInfo, inspect_pair
from .registry import build, positive_integer, register
from .traces import Gradients, Program
from .weights import Leaf, LogWeights, dreamt_log_guide, log_weights, without_specks

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


def check_estimator(estimator: pyro.infer.ELBO, info: PairInfo) -> None:
    """Refuse an estimator that would train a pair wrongly, before the first step.

    Args:
        estimator: one of ours or Pyro's.
        info: what :func:`pyrovae.pairs.inspect_pair` says of the pair.

    Raises:
        ValueError: the estimator needs reparameterised sites and the pair has others, it is Pyro's ``RenyiELBO`` on a
            scaled or subsampled plate, or it cannot sum out a site that the model leaves to enumeration.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> info = pv.pairs.inspect_pair(vae.model, vae.guide, torch.zeros(5, 9))
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

    @property
    def needs_density(self) -> bool:
        """Whether the gradient rests on the score of each sample's own density: all but the plain path's and STL's do."""
        return self.gradients != "total" and not isinstance(self, STL)

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        num_particles = positive_integer(num_particles, "num_particles")
        if num_particles < self.fewest_particles:
            raise ValueError(
                f"{type(self).__name__} compares particles of one datum: give it num_particles of at least "
                f"{self.fewest_particles}, not {num_particles}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self.held: Tensor | None = None
        # Pyro's ELBOs keep the nesting of the first pair they meet; this one keeps it per pair.
        self._nesting: dict[tuple[Program, Program], int] = {}

    @abstractmethod
    def reduce(self, weights: LogWeights) -> Tensor:
        """The bound per datum, shape (B,), in nats."""

    def step_input(self) -> float | None:
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


@register("estimator")
class ELBO(Estimator):
    r"""The evidence lower bound.

    .. math:: L = E_q \Big[ \frac1K \sum_k \log w_k \Big] = E_q[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z)) \le \log p(x)

    Particles average; they lower the gradient's noise and leave the bound where it is. What is differentiated is

    .. math:: E_q[\log p(x \mid z)] - \beta \sum_i \max(\lambda, KL_i)

    with one term for each latent site i, its KL averaged over particles and batch in the maximum. At beta = 1 and
    lambda = 0, the defaults, that is the bound. The reported bound is the ELBO whatever they are. Needs reparameterised sites.

    Args:
        num_particles: K.
        kl: ``"sample"`` takes log q - log p at the samples; ``"analytic"`` the closed form for each site that has one, given
            its parents, and the samples elsewhere: :meth:`kl_terms` says which.
        beta: weight of the KL; a float, or a scalar tensor.
        warm_up: steps over which beta rises linearly to its value; ``steps`` counts the differentiated losses.
        free_bits: lambda, nats per latent site below which its KL is not pressed further down.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: an option out of range, or a site that is not reparameterised.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014. Beta: Higgins et al., beta-VAE, 2017. Warm-up: Sonderby et
        al., Ladder Variational Autoencoders, 2016. Free bits: Kingma et al., Inverse Autoregressive Flow, 2016.

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
            raise ValueError(f'kl is "sample" or "analytic", not {kl!r}.')
        for name, value in {"beta": beta, "warm_up": warm_up, "free_bits": free_bits}.items():
            if value < 0:
                raise ValueError(f"{name} is not negative, so not {value!r}.")
        self.kl, self.beta, self.warm_up, self.free_bits = kl, beta, warm_up, free_bits
        self.steps = 0

    @property
    def current_beta(self) -> float:
        """Beta at the present step of the warm-up."""
        return self.beta * min(1.0, (self.steps + 1) / self.warm_up) if self.warm_up else self.beta

    def kl_terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """For each site of the guide, ``"analytic"`` or ``"sample"``: how its KL is found."""
        with torch.no_grad():
            sites = self._draw(model, guide, args, kwargs).sites
        return {site.name: "sample" if site.kl is None else "analytic" for site in sites}

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,), or of the likelihood less the closed-form KL."""
        if self.kl == "sample":
            return _elbo(weights)
        return (weights.log_likelihood - sum(_kls(weights))).mean(0)

    def step_input(self) -> float:
        """Beta, and a step of its warm-up."""
        beta = self.current_beta
        self.steps += 1
        return beta

    def _objective(self, weights: LogWeights) -> Tensor:
        beta = self.step_input() if self.held is None else self.held
        if self.kl == "sample" and isinstance(beta, float) and beta == 1.0 and self.free_bits == 0.0:
            return super()._objective(weights)
        dead = weights.log_weights.detach() == -torch.inf
        objective = torch.where(dead, 0.0, weights.log_likelihood).mean(0)
        for term in _kls(weights):
            kl = torch.where(dead, 0.0, term).mean(0)
            if self.free_bits > 0:  # a sampled KL can be negative, so that none is not the same as zero
                kl = torch.where(kl.detach().mean() < self.free_bits, 0.0, kl)
            objective = objective - beta * kl
        return objective

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict, **options: Any) -> LogWeights:
        return super()._draw(model, guide, args, kwargs, analytic_kl=self.kl == "analytic", **options)


def _kls(weights: LogWeights) -> list[Tensor]:
    return [site.log_guide - site.log_prior if site.kl is None else site.kl for site in weights.sites]


@register("estimator")
class STL(Estimator):
    r"""The ELBO by its path alone: sticking the landing.

    The reported bound is the ELBO, a lower bound. The gradient leaves out the score :math:`\partial_\phi \log q_\phi(z|x)`,
    whose mean is zero:

    .. math:: a_k = b_k = \frac1K, \qquad c_k = 0

    so it has the ELBO gradient's mean, and no noise at all for the guide where q is the exact posterior. Any reparameterised
    guide will do; a guide with several sites runs twice. Needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Roeder, Wu and Duvenaud, Sticking the Landing, 2017.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.STL().differentiable_loss(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([])
    """

    gradients = "split"

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,)."""
        return _elbo(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Equal weights for model and path, nothing for the score."""
        mean = torch.full_like(log_w, 1 / len(log_w))
        return Coefficients(mean, mean, torch.zeros_like(log_w))


class _ManyParticles(Estimator):
    """An estimator of a bound that tightens with K, so that one particle is no sensible default."""

    def __init__(self, num_particles: int = 5, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)


@register("estimator")
class IWAE(_ManyParticles):
    r"""The importance-weighted bound.

    .. math:: L_K = E_q \Big[ \log \frac1K \sum_k w_k \Big] \le \log p(x)

    It rises with K towards log p(x); at K = 1 it is the ELBO. It is differentiated as it stands, which weighs every particle
    by :math:`\tilde w_k`; the guide's gradient loses its signal as K grows (:class:`DReG` does not). Needs reparameterised
    sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.IWAE(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return _iwae(weights)


@register("estimator", "dreg")
class DReG(_ManyParticles):
    r"""The importance-weighted bound, its score reparameterised a second time.

    The reported bound is :class:`IWAE`'s, a lower bound. The gradient has the same mean with

    .. math:: a_k = \tilde w_k, \qquad b_k = \tilde w_k^2, \qquad c_k = 0

    and a guide's signal that grows with K. At K = 1 it is :class:`STL`. It holds for guides of several dependent latents too,
    which run twice: they are reparameterised as one. Needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Tucker, Lawson, Gu and Maddison, Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2019.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.DReG(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = "split"

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return _iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, their squares for the path, nothing for the score."""
        share = torch.softmax(log_w, 0)
        return Coefficients(share, share**2, torch.zeros_like(share))


@register("estimator", "gdreg")
class GDReG(_ManyParticles):
    r"""DReG, whose learned priors are doubly reparameterised too.

    The reported bound is :class:`IWAE`'s, a lower bound. Guide and likelihood get :class:`DReG`'s gradient. The parameters of
    the prior of each latent site i, with the model's own sampler :math:`z_i = T(\epsilon; \theta)` inverted at the sample, get

    .. math:: \sum_k \Big( \tilde w_k \, \partial_{z_i} \big[ \log p(x, z_k) - \log p_\theta(z_{ik} \mid \cdot) \big]
        - \tilde w_k^2 \, \partial_{z_i} \log w_k \Big) \frac{\partial T(\epsilon_k; \theta)}{\partial \theta}

    which has the mean of :math:`\tilde w_k \partial_\theta \log p_\theta(z_{ik} | \cdot)`, the ordinary one. That one stays
    where no sampler can be inverted (a mixture, say) or the guide's site is a Delta; :meth:`prior_terms` says which. Known
    samplers: Normal, Laplace, Cauchy, StudentT and Gumbel, MultivariateNormal, and invertible transforms of these. The model's
    graph is traversed twice. Needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised, or is a flow that cannot be inverted.

    References:
        Bauer and Mnih, Generalized Doubly Reparameterized Gradient Estimators, 2021.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.GDReG(num_particles=5).prior_terms(vae.model, vae.guide, torch.zeros(5, 9))
        {'z': 'reparameterised'}
    """

    gradients = "leaf"

    def prior_terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """For each latent, how its prior gets its gradient: ``"reparameterised"`` or ``"score"``."""
        with torch.enable_grad():
            leaves = self._draw(model, guide, args, kwargs).leaves
        priors = {leaf.name: _resample_leaf(leaf) for leaf in leaves if leaf.prior is not None}
        return {name: "score" if resampled is None else "reparameterised" for name, resampled in priors.items()}

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return _iwae(weights)

    def _objective(self, weights: LogWeights) -> Tensor:
        dead = weights.log_weights.detach() == -torch.inf
        share = without_specks(torch.where(dead, 0.0, torch.softmax(weights.log_weights.detach(), 0)))
        values = [leaf.value for leaf in weights.leaves]

        def slopes(log_density: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
            alive = torch.where(dead, 0.0, log_density).sum()
            return torch.autograd.grad(alive, at, retain_graph=True, allow_unused=True, materialize_grads=True)

        def shared(term: Tensor) -> Tensor:
            return (share * torch.where(dead, 0.0, term)).sum(0)

        objective = shared(weights.log_likelihood)
        joint_slopes = slopes(weights.log_likelihood + weights.log_prior, *values)
        guide_slopes = slopes(weights.log_guide, *values)
        for leaf, joint, guide in zip(weights.leaves, joint_slopes, guide_slopes, strict=True):
            part = leaf.layout.spread(share[leaf.rows], leaf.value, leaf.event_dim)
            path = torch.where(part == 0, 0.0, part**2 * (joint - guide))
            objective = objective + leaf.layout.gather(path * leaf.sample, leaf.event_dim).sum(0)
            resampled = _resample_leaf(leaf)
            if resampled is None:
                objective = objective + share[leaf.rows].mul(torch.where(dead[leaf.rows], 0.0, leaf.log_prior)).sum(0)
            else:
                (own,) = torch.autograd.grad(leaf.log_prior.sum(), leaf.value, retain_graph=True)
                direct = torch.where(part == 0, 0.0, part * (joint - own)) - path
                objective = objective + leaf.layout.gather(direct * resampled, leaf.event_dim).sum(0)
        return objective


_LOC_SCALE = (dist.Normal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Gumbel)


def _resample_leaf(leaf: Leaf) -> Tensor | None:
    return None if leaf.is_point else _resample(leaf.prior, leaf.value.detach())


def _resample(prior: Any, value: Tensor) -> Tensor | None:
    """``value`` as the prior's own sampler would make it from its noise: the same numbers, with dT/d(parameters) behind."""
    if isinstance(prior, torch.distributions.Independent):
        return _resample(prior.base_dist, value)
    # Before the transforms: torch makes its Gumbel of a uniform draw, which has no location and scale to move.
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


class _Grouped(_ManyParticles):
    """Particles in M groups of equal size."""

    def __init__(self, num_particles: int = 8, *, num_groups: int = 2, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if positive_integer(num_groups, "num_groups") > self.num_particles or self.num_particles % num_groups:
            raise ValueError(f"num_groups divides num_particles = {num_particles} into equal parts, unlike {num_groups!r}.")
        self.num_groups = int(num_groups)

    def _mean_group(self, log_w: Tensor) -> Tensor:
        return _log_mean_exp(log_w.unflatten(0, (self.num_groups, -1)), 1).mean(0)


@register("estimator")
class MIWAE(_Grouped):
    r"""The mean of M importance-weighted bounds of K particles each.

    .. math:: L_{M,K} = E_q \Big[ \frac1M \sum_m \log \frac1K \sum_k w_{mk} \Big] \le \log p(x)

    MIWAE(M, 1) is the :class:`ELBO` and MIWAE(1, K) the :class:`IWAE`. It is differentiated as it stands. Needs
    reparameterised sites.

    Args:
        num_particles: M K, all draws per datum.
        num_groups: M, which divides it.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: the groups are not equal, or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> miwae = pv.estimators.MIWAE(num_particles=8, num_groups=4)
        >>> miwae.bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean over groups of the log of the mean weight, shape (B,)."""
        return self._mean_group(weights.log_weights)


@register("estimator")
class PIWAE(_Grouped):
    r"""IWAE for the model, MIWAE for the guide.

    The reported bound is :class:`IWAE`'s with all M K particles, a lower bound. The model's parameters get its gradient and
    the guide's that of :class:`MIWAE`:

    .. math:: a_{mk} = \frac{w_{mk}}{\sum_{nj} w_{nj}}, \qquad b_{mk} = c_{mk} = \frac1M \frac{w_{mk}}{\sum_j w_{mj}}

    PIWAE with one group is IWAE. Needs reparameterised sites.

    Args:
        num_particles: M K, all draws per datum.
        num_groups: M, which divides it.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: the groups are not equal, or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> piwae = pv.estimators.PIWAE(num_particles=8, num_groups=4)
        >>> piwae.bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = "split"

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight of all particles, shape (B,)."""
        return _iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Weights normalised over all particles for the model, within each group for the guide."""
        grouped = torch.softmax(log_w.unflatten(0, (self.num_groups, -1)), 1).flatten(0, 1) / self.num_groups
        grouped = torch.where(log_w == -torch.inf, 0.0, grouped)  # a group may have no other weights
        return Coefficients(torch.softmax(log_w, 0), grouped, grouped)


@register("estimator")
class CIWAE(_ManyParticles):
    r"""A mixture of the ELBO and the importance-weighted bound.

    .. math:: L = \beta L_{ELBO} + (1 - \beta) L_{IWAE} \le \log p(x)

    beta = 1 is the :class:`ELBO` of K particles, beta = 0 the :class:`IWAE`. It is differentiated as it stands. Needs
    reparameterised sites.

    Args:
        num_particles: K.
        beta: the ELBO's share, in [0, 1].
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: beta lies outside [0, 1], or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.CIWAE(num_particles=8, beta=0.2).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, beta: float = 0.5, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta is the ELBO's share, between 0 and 1, not {beta!r}.")
        self.beta = beta

    def reduce(self, weights: LogWeights) -> Tensor:
        """The weighted mean of both bounds, shape (B,)."""
        return self.beta * _elbo(weights) + (1 - self.beta) * _iwae(weights)


@register("estimator")
class Renyi(_ManyParticles):
    r"""The variational Renyi bound of order alpha.

    .. math:: L_\alpha = E_q \Big[ \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha} \Big]

    A lower bound on log p(x) for alpha >= 0, which falls as alpha rises; for alpha < 0 it may lie on either side. alpha = 1 is
    the :class:`ELBO`, alpha = 0 the :class:`IWAE`, alpha to minus infinity :class:`VRMax`. It is differentiated as it stands.
    Needs reparameterised sites.

    Args:
        num_particles: K.
        alpha: the order, any finite number.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: alpha is not finite, or a site is not reparameterised.

    References:
        Li and Turner, Renyi Divergence Variational Inference, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.Renyi(num_particles=5, alpha=0.5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, alpha: float = 0.5, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is a finite number, not {alpha!r}: choose 'vr_max' for minus infinity.")
        self.alpha = alpha

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the power mean of the weights, shape (B,)."""
        if self.alpha == 1.0:
            return _elbo(weights)
        power = 1.0 - self.alpha
        # In float64: near alpha = 1 the quotient would magnify float32's rounding without bound.
        mean = _log_mean_exp(power * weights.log_weights.double()) / power
        return mean.to(weights.log_weights.dtype)


@register("estimator", "vr_max")
class VRMax(_ManyParticles):
    r"""The largest log-weight alone: the variational Renyi objective as alpha goes to minus infinity.

    .. math:: L = E_q \big[ \max_k \log w_k \big]

    It is no bound: it lies above the :class:`IWAE` of the same particles, by at most log K, and may exceed log p(x). At K = 1
    it is the ELBO. It is differentiated as it stands, so the best particle alone is followed. Needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised.

    References:
        Li and Turner, Renyi Divergence Variational Inference, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.VRMax(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The largest log-weight, shape (B,)."""
        return weights.log_weights.max(0).values


@register("estimator")
class JVI(_ManyParticles):
    r"""The importance-weighted bound with its bias in 1/K jackknifed away to a given order.

    .. math:: L = \sum_{j=0}^m c_j \, \bar L_{K-j}, \qquad c_j = (-1)^j \frac{(K - j)^m}{(m - j)! \, j!}

    with :math:`\bar L_{K-j}` the mean :class:`IWAE` bound over all subsets that leave j of the K particles out. Its bias is
    :math:`O(K^{-(m+1)})`, so it is nearer to log p(x), and no bound for m > 0; m = 0 is the IWAE. It is differentiated as it
    stands. Its cost grows as K choose m times K numbers per datum. Needs reparameterised sites and K > m.

    Args:
        num_particles: K.
        order: m.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: the order is negative or not below K, or a site is not reparameterised.

    References:
        Nowozin, Debiasing Evidence Approximations: On Importance-Weighted Autoencoders and Jackknife Variational Inference,
        2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.JVI(num_particles=5, order=1).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, order: int = 1, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if order != 0:
            order = positive_integer(order, "order, where it is not 0,")
        if order >= self.num_particles:
            raise ValueError(f"JVI leaves out order = {order!r} of num_particles = {num_particles}: give it more particles.")
        self.order = order

    def reduce(self, weights: LogWeights) -> Tensor:
        """The jackknife combination of the log of mean weights, shape (B,)."""
        log_w, K, m = weights.log_weights, self.num_particles, self.order
        total = torch.zeros_like(log_w[0])
        for j in range(m + 1):
            kept = torch.tensor(list(itertools.combinations(range(K), K - j)), device=log_w.device)  # (K choose j, K - j)
            c = (-1) ** j * (K - j) ** m / (math.factorial(m - j) * math.factorial(j))
            total = total + c * _log_mean_exp(log_w[kept], 1).mean(0)
        return torch.where((log_w == -torch.inf).all(0), -torch.inf, total)


@register("estimator")
class TVO(_ManyParticles):
    r"""The thermodynamic variational objective: a left Riemann sum along the path from guide to posterior.

    .. math:: \log p(x) = \int_0^1 E_{\pi_\beta}[\log w] \, d\beta \;\ge\; \sum_{s=0}^{S-1} (\beta_{s+1} - \beta_s) \,
        E_{\pi_{\beta_s}}[\log w], \qquad \pi_\beta \propto q^{1-\beta} \, p(x, z)^\beta

    The points are 0 and S more, evenly spaced in log beta up to 1; S = 1 is the ELBO. Each expectation is estimated with
    self-normalised weights :math:`v_{sk} \propto w_k^{\beta_s}`, which biases the reported sum at finite K; with exact
    expectations it is a lower bound. What is followed is the covariance gradient of the exact sum, by the same weights:

    .. math:: g = \sum_s (\beta_{s+1} - \beta_s) \sum_k v_{sk} \big[ \partial \log w_k + (\log w_k - \overline{\log w}_s)
        \, \partial ( \beta_s \log p(x, z_k) + (1 - \beta_s) \log q(z_k | x) ) \big]

    at fixed samples, with :math:`\overline{\log w}_s = \sum_k v_{sk} \log w_k`. It is no gradient of the reported number. Any
    site will do, discrete ones too; K >= 2.

    Args:
        num_particles: K.
        num_partitions: S.
        log10_beta: the first point after 0, as a power of ten.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: one particle, no partition, or a first point that is not below 1.

    References:
        Masrani, Le and Wood, The Thermodynamic Variational Objective, 2019.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.TVO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = "score"
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
            raise ValueError(f"log10_beta is negative, so that the first point lies below 1, not {log10_beta!r}.")
        self.num_partitions, self.log10_beta = positive_integer(num_partitions, "num_partitions"), log10_beta

    @property
    def points(self) -> list[float]:
        """The S + 1 points from 0 to 1."""
        S = self.num_partitions
        return [0.0] + [10 ** (self.log10_beta * (S - s) / max(S - 1, 1)) for s in range(1, S + 1)]

    def reduce(self, weights: LogWeights) -> Tensor:
        """The left Riemann sum, shape (B,)."""
        _, width, share, log_w = self._heated(weights.log_weights)
        total = (width * share * log_w).sum((0, 1))
        return torch.where((weights.log_weights == -torch.inf).any(0), -torch.inf, total)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """The covariance gradient's, for the model's log p and the guide's log q."""
        beta, width, share, log_w = self._heated(log_w)
        covariance = width * share * (log_w - (share * log_w).sum(1, keepdim=True))
        mean = (width * share).sum(0)
        return Coefficients(mean + (beta * covariance).sum(0), torch.zeros_like(mean), mean - ((1 - beta) * covariance).sum(0))

    def _heated(self, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points and widths (S, 1, 1), weights (S, K, B), and log-weights (K, B) without their infinities."""
        dead = log_w == -torch.inf
        points = log_w.new_tensor(self.points)[:, None, None]
        beta, width = points[:-1], points.diff(dim=0)
        log_w = torch.where(dead, 0.0, log_w)
        share = torch.softmax(torch.where(dead, -torch.inf, beta * log_w), 1)
        return beta, width, torch.where(dead, 0.0, share), log_w


@register("estimator")
class RWS(_ManyParticles):
    r"""Reweighted wake-sleep.

    The reported bound is :class:`IWAE`'s, a lower bound, and the model gets its gradient, the wake phase of theta. The guide
    follows no bound: it fits the posterior, as the weights show it (wake) or as the model dreams it (sleep),

    .. math:: g_\phi^{wake} = \sum_k \tilde w_k \, \partial_\phi \log q_\phi(z_k \mid x), \qquad
        g_\phi^{sleep} = \partial_\phi \log q_\phi(z \mid x), \quad (x, z) \sim p_\theta

    with as many dreams as data. Wake is biased at finite K, sleep is unbiased for the model's own data. Any site will do.

    Args:
        num_particles: K.
        guide_phase: ``"wake"`` or ``"sleep"``.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: an unknown phase; in sleep, a model that observes something else than the arguments it was given.

    References:
        Bornschein and Bengio, Reweighted Wake-Sleep, 2015. Le et al., Revisiting Reweighted Wake-Sleep, 2019.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.RWS(guide_phase="sleep").differentiable_loss(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([])
    """

    gradients = "score"

    def __init__(
        self, num_particles: int = 5, *, guide_phase: Literal["wake", "sleep"] = "wake", vectorize_particles: bool = True
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if guide_phase not in ("wake", "sleep"):
            raise ValueError(f'guide_phase is "wake" or "sleep", not {guide_phase!r}.')
        self.guide_phase = guide_phase

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return _iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, and for the guide's log q where it learns awake."""
        share, zeros = torch.softmax(log_w, 0), torch.zeros_like(log_w)
        return Coefficients(share, zeros, -share if self.guide_phase == "wake" else zeros)

    def _objective(self, weights: LogWeights) -> Tensor:
        objective = super()._objective(weights)
        return objective if weights.log_dream is None else objective + weights.log_dream

    def _draw(self, model: Program, guide: Program, args: tuple, kwargs: dict, **options: Any) -> LogWeights:
        weights = super()._draw(model, guide, args, kwargs, **options)
        if self.guide_phase == "sleep" and torch.is_grad_enabled():
            weights = replace(weights, log_dream=dreamt_log_guide(model, guide, *args, **kwargs))
        return weights


class _ScoreFunction(_ManyParticles):
    r"""The importance-weighted bound by the score function with a control variate.

    .. math:: a_k = \tilde w_k, \qquad -c_k = \log \frac1K \sum_j w_j - \tilde w_k - h_k
    """

    gradients = "score"
    fewest_particles = 2

    @abstractmethod
    def control(self, log_w: Tensor, share: Tensor) -> Tensor:
        """What is taken off the learning signal of each particle, shape (K, B)."""

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return _iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Normalised weights for the model, the controlled learning signal for the score."""
        share = torch.softmax(log_w, 0)
        control = self.control(log_w, share)
        # Where all other weights are zero there is nothing to compare with; whether they are does not depend on this one.
        control = torch.where(control == -torch.inf, 0.0, control)
        return Coefficients(share, torch.zeros_like(share), share + control - _log_mean_exp(log_w))


def _others(log_w: Tensor, stand_in: Tensor) -> Tensor:
    """Row k holds all log-weights with the k-th replaced by ``stand_in``'s: shape (K, K, B)."""
    own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)[..., None]
    return torch.where(own, stand_in, log_w)


@register("estimator")
class VIMCO(_ScoreFunction):
    r"""The importance-weighted bound by the score function, each particle measured against the others.

    The reported bound is :class:`IWAE`'s, a lower bound. Its gradient, unbiased, is

    .. math:: \sum_k (\hat L - \hat L_{-k}) \, \partial_\phi \log q_\phi(z_k | x) + \sum_k \tilde w_k \, \partial \log w_k

    at fixed samples, with :math:`\hat L_{-k}` the bound in which :math:`\log w_k` is replaced by the mean of the others'. Any
    site will do, discrete ones too; K >= 2.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles.

    References:
        Mnih and Rezende, Variational Inference for Monte Carlo Objectives, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.VIMCO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def control(self, log_w: Tensor, share: Tensor) -> Tensor:
        """The bound with each weight replaced by the geometric mean of the others."""
        own = torch.eye(len(log_w), dtype=torch.bool, device=log_w.device)[..., None]
        others = torch.where(own, 0.0, log_w).sum(1) / (len(log_w) - 1)
        return _log_mean_exp(_others(log_w, others[:, None]), 1)


@register("estimator")
class OVIS(_ScoreFunction):
    r"""The importance-weighted bound by the score function with the control variate of least variance, for many particles.

    The reported bound is :class:`IWAE`'s, a lower bound. Its gradient is

    .. math:: \sum_k (\hat L - \tilde w_k - h_k) \, \partial_\phi \log q_\phi(z_k | x) + \tilde w_k \, \partial_\theta \log p,
        \qquad h_k = \log \frac{1}{K-1} \sum_{j \ne k} w_j - \gamma \tilde w_k + (1 - \gamma) \log \Big(1 - \frac1K\Big)

    gamma = 0 suits weights of which few count, and is unbiased; gamma = 1 suits weights of which many count, and its bias
    vanishes as K grows. Any site will do, discrete ones too; K >= 2.

    Args:
        num_particles: K.
        gamma: between the two limits, in [0, 1].
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles, or gamma outside [0, 1].

    References:
        Lievin, Dittadi, Christensen and Winther, Optimal Variance Control of the Score-Function Gradient Estimator for
        Importance-Weighted Bounds, 2020, equation 17.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.OVIS(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, gamma: float = 0.0, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma lies between 0 and 1, not at {gamma!r}.")
        self.gamma = gamma

    def control(self, log_w: Tensor, share: Tensor) -> Tensor:
        """Equation 17 of the paper."""
        K = len(log_w)
        others = torch.logsumexp(_others(log_w, log_w.new_tensor(-torch.inf)), 1) - math.log(K - 1)
        return others - self.gamma * share + (1 - self.gamma) * math.log(1 - 1 / K)


@register("estimator", "score_elbo")
class ScoreELBO(_ManyParticles):
    r"""The ELBO by the score function, each particle measured against the mean of the others.

    The reported bound is the ELBO, a lower bound. Its gradient, unbiased, is

    .. math:: \frac1K \sum_k \partial_\theta \log p_\theta(x, z_k)
        + \Big( \log w_k - \frac{1}{K-1} \sum_{j \ne k} \log w_j \Big) \, \partial_\phi \log q_\phi(z_k | x)

    Any site will do, discrete ones too; K >= 2.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: fewer than two particles.

    References:
        Ranganath, Gerrish and Blei, Black Box Variational Inference, 2014. The baseline: Kool, van Hoof and Welling, Buy 4
        REINFORCE Samples, Get a Baseline for Free!, 2019.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.ScoreELBO(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = "score"
    fewest_particles = 2

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean of the log-weights, shape (B,)."""
        return _elbo(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Equal weights for the model, the centred log-weights for the score."""
        K = len(log_w)
        mean = torch.full_like(log_w, 1 / K)
        signal = (log_w - log_w.mean(0)) / (K - 1)  # (log w_k - mean of the others) / K
        # One weight of zero makes the bound minus infinity whatever the others do: there is no direction to give.
        signal = torch.where((log_w == -torch.inf).any(0), 0.0, signal)
        return Coefficients(mean, torch.zeros_like(mean), -signal)

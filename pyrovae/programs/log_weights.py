r"""Log-weights of a pair of Pyro programs: reductions of what the traces of a run hold.

A *pair* is a ``model`` and a ``guide`` that take the same arguments and hold every latent and observed site in one data
plate. For K particles and B data,

.. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b), \quad z_{kb} \sim q(\cdot \mid x_b).

Every bound and every estimate in this package is a reduction of these numbers. The plate's subsampling scale N/B is kept
apart, because it belongs outside a logsumexp; particles stand in a plate to the left of all the pair's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from .._validation import positive_integer
from .checks import check_same_latents, check_scores, look_at
from .sites import Layout, Program, common_scale, data_plate, log_prob_of, num_dims_of, per_datum, plate_nesting, sites_of
from .support import reaches_beyond, support_of
from .tracing import Gradients, PathGradientScaler, Traces, find_nesting, trace_from_prior, trace_pair
from .wrappers import is_point, is_reparameterized, masks_of


class SiteTerms(NamedTuple):
    """What one site of the guide adds: log p and log q at the samples, (K, B), and KL(q || p) where it has a closed form."""

    name: str
    log_prior: Tensor
    log_guide: Tensor
    kl: Tensor | None


class Leaf(NamedTuple):
    """One latent cut off from the guide: the model saw ``value``, a leaf of the graph that equals ``sample``."""

    name: str
    sample: Tensor
    value: Tensor
    event_dim: int
    prior: Any  # p(z | its parents) as the model declared it; None where the guide alone has the site
    is_point: bool  # the guide puts a Delta here, whose density at z lies in other sites
    log_prior: Tensor
    rows: slice  # its particles, among the K
    layout: Layout


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights per particle and datum, in nats, each part apart.

    Attributes:
        log_likelihood: log p(x|z), shape (K, B).
        log_prior: log p(z), shape (K, B).
        log_guide: log q(z|x), shape (K, B).
        scale: N/B of a subsampled data plate, else 1.0; it multiplies an objective, never a weight.
        common_scale: what one poutine.scale around all sites says, else 1.0; it too multiplies an objective only.
        log_guide_factors: the sum of the guide's ``pyro.factor`` sites, shape (K, B), where it has some: terms of its loss,
            which an objective loses as Pyro's does, and of no weight.
        num_dims: how many observed numbers one datum has.
        not_reparameterized: guide sites through which no gradient flows.
        masked: latent sites of the guide whose density is masked for some data.
        gradients: how they were drawn; see :func:`log_weights`.
        log_guide_score: log q of the detached samples, shape (K, B), where gradients are split.
        log_simulated: log q of a pair that the model dreamt per datum, shape (B,), where an estimator asked for it.
        sites: the terms of each site of the guide.
        gates: for each run of the pair, where gradients are split.
        leaves: the latents, where they are leaves of the graph.
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
    gradients: Gradients = "total"
    log_guide_score: Tensor | None = None
    log_simulated: Tensor | None = None
    sites: tuple[SiteTerms, ...] = ()
    gates: tuple[PathGradientScaler, ...] = ()
    leaves: tuple[Leaf, ...] = ()

    @property
    def log_weights(self) -> Tensor:
        """Their sum, log p(x, z) - log q(z|x), shape (K, B)."""
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
        r"""A tensor (B,) with a chosen gradient; its value means nothing.

        .. math:: \sum_k a_k \, \partial_\theta \log p_\theta(x, z_k) + b_k \, \frac{\partial \log w_k}{\partial z_k}
            \frac{d z_k}{d\phi} - c_k \, \partial_\phi \log q_\phi(z_k \mid x)

        Weights drawn with total gradients have one coefficient, ``model``; detached samples have no path. A particle of
        weight zero gets none of a and b, and a datum all of whose weights are zero gets nothing at all.

        Args:
            model: a, shape (K, B), detached, as all three.
            path: b.
            score: c.
        """
        has_discrete_latents = len(self.not_reparameterized) > 0
        model = zero_negligible(model, has_discrete_latents)
        log_joint = self.log_likelihood + self.log_prior
        dead = (log_joint - self.log_guide).detach() == -torch.inf
        lost = dead.all(0)

        def times(coefficient: Tensor, term: Tensor, out: Tensor) -> Tensor:
            # Both are cleared: zero times infinity is no number, here and in the backward pass.
            return (torch.where(out, 0.0, coefficient) * torch.where(out, 0.0, term)).sum(0)

        if self.gradients == "total":
            return times(model, log_joint - self.log_guide, dead)
        score = zero_negligible(score, has_discrete_latents)
        if self.gradients == "score":
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

    They are those below :math:`\varepsilon / K` of the largest, or below :math:`\varepsilon / 4` where these too add up to so
    little. Weights spread over hundreds of nats: the gradients of those near :math:`e^{-90}` would be subnormal numbers, on
    which a processor's products take many times as long, and gradients of zero are left out of large products.

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


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    gradients: Gradients = "total",
    analytic_kl: bool = False,
    **kwargs: Any,
) -> LogWeights:
    r"""Draw particles from the guide and weigh them, for any pair of Pyro programs.

    .. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b)

    Several latent sites, any site names, nested plates, masks and ``pyro.factor`` are read as Pyro reads them. Gradients flow
    through reparameterised samples; wrap the call in ``torch.no_grad()`` to only score.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        *args: the arguments of both, usually the batch ``x`` of shape ``(B, ...)``.
        num_particles: K.
        vectorize_particles: run once with K particles in a plate on the left, or K times. Programs whose networks accept
            leading dimensions want ``True``.
        max_plate_nesting: how many plate dimensions the pair uses; when not given, an extra run finds it and checks the pair.
        gradients: ``"total"`` as reparameterised samples give them; ``"split"`` also the part of log q that reaches the guide's
            parameters at fixed samples, so that :meth:`LogWeights.surrogate` can weigh model, path and score apart;
            ``"score"`` samples detached, for latents without a path; ``"leaf"`` samples as leaves of the graph. A guide
            with several sites runs once more for ``"split"`` and ``"leaf"``, so it must not draw dropout masks of its own.
        analytic_kl: fill in the closed-form KL of each site that has one.
        **kwargs: keyword arguments of both programs.

    Returns:
        The parts, each of shape (K, B), in nats.

    Raises:
        ValueError: there is no data plate, a site lies outside it, plates and shapes disagree, a latent of one program is
            missing from the other or of another kind there, the guide has no density, or only some sites are scaled. The
            message says what to write.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.log_weights(vae.model, vae.guide, torch.zeros(5, 9), num_particles=3).log_weights.shape
        torch.Size([3, 5])
    """
    num_particles = positive_integer(num_particles, "num_particles")
    if not torch.is_grad_enabled():
        gradients = "total"
    together = num_particles if vectorize_particles else 1
    if max_plate_nesting is None:
        max_plate_nesting = look_at(model, guide, args, kwargs)

    # Runs one by one must score the same rows of a subsampled plate, or a datum's particles would be of several data.
    rows = None if together == num_particles else Trace()

    def draw() -> LogWeights:
        traces = trace_pair(model, guide, args, kwargs, together, max_plate_nesting, gradients, rows)
        return read_weights(traces, together, gradients, analytic_kl)

    return draw() if together == num_particles else _concatenate([draw() for _ in range(num_particles)])


def prior_weights(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
) -> LogWeights:
    """Draw particles from the model's own prior, and score them under the guide too, unless there is none.

    A draw outside the guide's support has log q of minus infinity. Without a guide, ``log_guide`` is the prior's.

    Raises:
        ValueError: as :func:`log_weights`; also where the guide's density is not known at draws that are not its own.
    """
    together = num_particles if vectorize_particles else 1
    if max_plate_nesting is None and together > 1:
        max_plate_nesting = find_nesting(model, model if guide is None else guide, args, {})

    def draw() -> LogWeights:
        with pyro.validation_enabled(False):  # a prior's draw may well lie outside the guide's support
            traces = trace_from_prior(model, guide, args, together, max_plate_nesting)
            try:
                weights = read_weights(traces, together)
            except (NotImplementedError, KeyError) as error:
                raise ValueError(
                    f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its density at the "
                    f'prior\'s draws is not known: choose proposal="guide", "prior" or "refined".'
                ) from error
        outside = torch.zeros_like(weights.log_guide, dtype=torch.bool)
        if guide is not None:
            sites = [*sites_of(traces.model), *sites_of(traces.guide)]
            layout = Layout(together, weights.num_data, plate_nesting(traces.model, traces.guide), data_plate(sites).dim)
            for site in sites_of(traces.guide):
                with suppress(NotImplementedError):  # torch's word for a distribution that declares no support
                    support = support_of(site["fn"])
                    if not reaches_beyond(support_of(traces.model.nodes[site["name"]]["fn"]), support):
                        continue
                    beyond = ~support.check(site["value"])
                    outside = outside | (layout.sum_per_datum(beyond.to(weights.log_guide.dtype), 0) > 0)
        return replace(weights, log_guide=torch.where(outside, -torch.inf, weights.log_guide))

    return draw() if together == num_particles else _concatenate([draw() for _ in range(num_particles)])


def _concatenate(draws: list[LogWeights]) -> LogWeights:
    """Runs of one particle each as one set of weights."""
    first = draws[0]

    def join(part: Callable[[LogWeights], Tensor | None]) -> Any:
        parts = [part(draw) for draw in draws]
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

    def join_site(index: int) -> SiteTerms:
        return SiteTerms(
            first.sites[index].name,
            join(lambda draw: draw.sites[index].log_prior),
            join(lambda draw: draw.sites[index].log_guide),
            join(lambda draw: draw.sites[index].kl),
        )

    return replace(
        first,
        log_likelihood=join(lambda draw: draw.log_likelihood),
        log_prior=join(lambda draw: draw.log_prior),
        log_guide=join(lambda draw: draw.log_guide),
        log_guide_score=join(lambda draw: draw.log_guide_score),
        log_guide_factors=join(lambda draw: draw.log_guide_factors),
        sites=tuple(join_site(index) for index in range(len(first.sites))),
        gates=tuple(gate for draw in draws for gate in draw.gates),
        leaves=tuple(leaf._replace(rows=slice(row, row + 1)) for row, draw in enumerate(draws) for leaf in draw.leaves),
    )


def read_weights(traces: Traces, num_particles: int, gradients: Gradients = "total", analytic_kl: bool = False) -> LogWeights:
    """Log-weights from the traces of one run."""
    model_sites, guide_sites = list(sites_of(traces.model)), list(sites_of(traces.guide))
    check_same_latents(model_sites, guide_sites)
    factors = traces.guide_factors
    sites = model_sites + guide_sites + factors
    data = data_plate(sites)
    nesting = plate_nesting(traces.model, traces.guide)
    zeros = log_prob_of(sites[0]).new_zeros(num_particles, data.size)

    def read(site: dict) -> Tensor:
        return per_datum(site, log_prob_of(site), data, num_particles, nesting)

    observed = [site for site in model_sites if site["is_observed"]]
    priors = {site["name"]: site for site in model_sites if not site["is_observed"]}
    # Sampled before detached: a flow remembers the inverse of its last value only.
    if gradients == "score":
        check_scores(guide_sites)
    try:
        log_guide = {site["name"]: read(site) for site in guide_sites}
        rescored = None if traces.rescored is None else sum((read(site) for site in sites_of(traces.rescored)), zeros)
    except (NotImplementedError, KeyError) as error:
        if gradients == "total":
            raise
        raise ValueError(
            f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its score cannot be told from its "
            f"path: choose an estimator that needs the total gradient only, such as elbo or iwae."
        ) from error
    log_prior = {name: read(site) for name, site in priors.items()}
    kls = _analytic_kls(priors, guide_sites) if analytic_kl else {}
    leaves, layout = [], Layout(num_particles, data.size, nesting, data.dim)
    if traces.gate is not None:
        traces.gate.layout = layout
    if gradients == "leaf" and traces.rescored is not None:
        for site in guide_sites:
            name, value = site["name"], traces.rescored.nodes[site["name"]]["value"]
            prior = priors[name]["fn"] if name in priors else None
            terms = (site["value"], value, site["fn"].event_dim, prior, is_point(site), log_prior.get(name, zeros))
            leaves.append(Leaf(name, *terms, slice(0, num_particles), layout))
    return LogWeights(
        log_likelihood=sum((read(site) for site in observed), zeros),
        log_prior=sum(log_prior.values(), zeros),
        log_guide=rescored if rescored is not None and gradients == "leaf" else sum(log_guide.values(), zeros),
        scale=data.full_size / data.size,
        common_scale=common_scale(sites, data),
        log_guide_factors=sum((read(site) for site in factors), zeros) if factors else None,
        num_dims=sum(num_dims_of(site, data) for site in observed),
        masked=tuple(site["name"] for site in guide_sites if masks_of(site)),
        not_reparameterized=tuple(site["name"] for site in guide_sites if not is_reparameterized(site)),
        gradients=gradients,
        log_guide_score=rescored if gradients == "split" else None,
        sites=tuple(
            SiteTerms(
                name,
                log_prior.get(name, zeros),
                log_guide[name],
                per_datum(priors[name], kls[name], data, num_particles, nesting) if name in kls else None,
            )
            for name in log_guide
        ),
        gates=() if traces.gate is None else (traces.gate,),
        leaves=tuple(leaves),
    )


def _analytic_kls(priors: dict[str, dict], guide_sites: list[dict]) -> dict[str, Tensor]:
    """KL(q || p) of each site that has a closed form, given its parents.

    The sample of a site can be integrated out of its own term only if p(z|parents) does not depend on it through a parent:
    what precedes the site in the model must precede it in the guide.
    """
    found: dict[str, Tensor] = {}
    before: set[str] = set()
    order = list(priors)
    for site in guide_sites:
        name, prior = site["name"], priors.get(site["name"])
        # Of a Delta Pyro's closed form forgets the density that it was given.
        alike = prior is not None and site["mask"] is prior["mask"] and not is_point(site)
        if prior is not None and alike and before.issuperset(order[: order.index(name)]):
            with suppress(NotImplementedError):  # torch's word for a pair of families without a closed form
                found[name] = scale_and_mask(kl_divergence(site["fn"], prior["fn"]), 1.0, site["mask"])
        before.add(name)
    return found

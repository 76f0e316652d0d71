r"""Log-weights of a pair of Pyro programs, from the traces of a run.

A *pair* is a ``model`` and a ``guide`` that take the same arguments and hold every latent and observed site in one data
plate. For K particles and B data,

.. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b), \quad z_{kb} \sim q(\cdot \mid x_b).

Every bound and every estimate in this package is a reduction of these numbers. They do not include the plate's subsampling
scale N/B, which belongs outside a logsumexp. Particles stand in a plate to the left of all the pair's own plates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from .._validation import positive_integer
from .checks import check_same_latents, check_scores, look_at
from .edges import densities_beyond
from .sites import Layout, Program, common_scale, data_plate, log_prob_of, num_dims_of, per_datum, plate_nesting, sites_of
from .support import reaches_beyond, support_of
from .tracing import Gradients, Traces, find_nesting, trace_from_prior, trace_pair
from .weights import Leaf, LogWeights, SiteTerms
from .wrappers import is_point, is_reparameterized, masks_of

__all__ = ["log_weights", "prior_weights", "read_weights"]


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    gradients: Gradients | str = Gradients.TOTAL,
    analytic_kl: bool = False,
    **kwargs: Any,
) -> LogWeights:
    r"""Draw particles from the guide and weigh them, for any pair of Pyro programs.

    .. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b)

    Several latent sites, any site names, nested plates, masks and ``pyro.factor`` mean what they mean in Pyro. Gradients flow
    through reparameterised samples; call it under ``torch.no_grad()`` to only score.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        *args: the arguments of both, usually the batch ``x`` of shape ``(B, ...)``.
        num_particles: K.
        vectorize_particles: run once with K particles in a plate on the left, which needs networks that accept leading
            dimensions; or run K times.
        max_plate_nesting: the number of plate dimensions that the pair uses. By default an extra run finds it and checks the
            pair.
        gradients: how gradients reach the samples; a member of :class:`pyrovae.programs.tracing.Gradients` or its value. A
            guide with several sites runs once more for ``"split"`` and ``"leaf"``, so it must not draw dropout masks of its
            own.
        analytic_kl: fill in the closed-form KL of each site that has one.
        **kwargs: keyword arguments of both programs.

    Returns:
        The parts, each of shape (K, B), in nats.

    Raises:
        ValueError: there is no data plate, a site lies outside it, plates and shapes disagree, a latent of one program is
            missing from the other or of another kind there, the guide has no density, or only some sites are scaled. The
            message names the site and the cure.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.log_weights(vae.model, vae.guide, torch.zeros(5, 9), num_particles=3).log_weights.shape
        torch.Size([3, 5])
    """
    num_particles = positive_integer(num_particles, "num_particles")
    gradients = Gradients(gradients) if torch.is_grad_enabled() else Gradients.TOTAL
    together = num_particles if vectorize_particles else 1
    if max_plate_nesting is None:
        max_plate_nesting = look_at(model, guide, args, kwargs)

    # Particles that run one by one must score the same rows of a subsampled plate.
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
    """Draw particles from the model's own prior, and score them under the guide, if there is one.

    A draw outside the guide's support has log q of minus infinity. Without a guide, ``log_guide`` is the prior's.

    Raises:
        ValueError: as :func:`log_weights`; also if the guide's density is not known at the prior's draws.
    """
    together = num_particles if vectorize_particles else 1
    if max_plate_nesting is None and together > 1:
        max_plate_nesting = find_nesting(model, model if guide is None else guide, args, {})

    def draw() -> LogWeights:
        with pyro.validation_enabled(False):  # a prior's draw may well lie outside the guide's support
            traces = trace_from_prior(model, guide, args, together, max_plate_nesting)
            try:
                weights = read_weights(traces, together, from_prior=True)
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
                with suppress(NotImplementedError):  # raised by a distribution without a support
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


def read_weights(
    traces: Traces,
    num_particles: int,
    gradients: Gradients = Gradients.TOTAL,
    analytic_kl: bool = False,
    from_prior: bool = False,
) -> LogWeights:
    """Log-weights from the traces of one run.

    Without gradients, the densities of latents are those of :func:`pyrovae.programs.edges.densities_beyond`.

    Args:
        traces: the traces of one run of guide and model.
        num_particles: K.
        gradients: how the samples were drawn; see :func:`log_weights`.
        analytic_kl: fill in the closed-form KL of each site that has one.
        from_prior: the latents were drawn from the prior.
    """
    model_sites, guide_sites = list(sites_of(traces.model)), list(sites_of(traces.guide))
    check_same_latents(model_sites, guide_sites)
    factors = traces.guide_factors
    sites = model_sites + guide_sites + factors
    data = data_plate(sites)
    layout = Layout(num_particles, data.size, plate_nesting(traces.model, traces.guide), data.dim)
    zeros = log_prob_of(sites[0]).new_zeros(num_particles, data.size)

    def read(site: dict) -> Tensor:
        return per_datum(site, log_prob_of(site), data, num_particles, layout.nesting)

    observed = [site for site in model_sites if site["is_observed"]]
    priors = {site["name"]: site for site in model_sites if not site["is_observed"]}
    # The samples are scored before the detached ones: a flow remembers the inverse of its last value only.
    if gradients == Gradients.SCORE:
        check_scores(guide_sites)
    try:
        log_guide = {site["name"]: read(site) for site in guide_sites}
        rescored = None if traces.rescored is None else sum((read(site) for site in sites_of(traces.rescored)), zeros)
    except (NotImplementedError, KeyError) as error:
        if gradients == Gradients.TOTAL:
            raise
        raise ValueError(
            f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its score cannot be told from its "
            f"path: choose an estimator that needs the total gradient only, such as elbo or iwae."
        ) from error
    log_prior = {name: read(site) for name, site in priors.items()}
    if not torch.is_grad_enabled():
        for site, *beyond in _beyond_ends(priors, guide_sites, from_prior):
            log_prior[site["name"]], log_guide[site["name"]] = (
                per_datum(site, term, data, num_particles, layout.nesting) for term in beyond
            )
    kls = _analytic_kls(priors, guide_sites) if analytic_kl else {}
    kl_terms = {name: per_datum(priors[name], kl, data, num_particles, layout.nesting) for name, kl in kls.items()}
    if traces.gate is not None:
        traces.gate.layout = layout
    return LogWeights(
        log_likelihood=sum((read(site) for site in observed), zeros),
        log_prior=sum(log_prior.values(), zeros),
        log_guide=rescored if rescored is not None and gradients == Gradients.LEAF else sum(log_guide.values(), zeros),
        scale=data.full_size / data.size,
        common_scale=common_scale(sites, data),
        log_guide_factors=sum((read(site) for site in factors), zeros) if factors else None,
        num_dims=sum(num_dims_of(site, data) for site in observed),
        masked=tuple(site["name"] for site in guide_sites if masks_of(site)),
        not_reparameterized=tuple(site["name"] for site in guide_sites if not is_reparameterized(site)),
        gradients=gradients,
        log_guide_score=rescored if gradients == Gradients.SPLIT else None,
        sites=tuple(SiteTerms(name, log_prior.get(name, zeros), term, kl_terms.get(name)) for name, term in log_guide.items()),
        gates=() if traces.gate is None else (traces.gate,),
        leaves=_leaves(traces, priors, log_prior, layout) if gradients == Gradients.LEAF else (),
    )


def _leaves(traces: Traces, priors: dict[str, dict], log_prior: dict[str, Tensor], layout: Layout) -> tuple[Leaf, ...]:
    """The latents of a run whose samples are leaves of the graph."""
    if traces.rescored is None:  # gradients are disabled
        return ()
    zeros = torch.zeros_like(next(iter(log_prior.values())))
    return tuple(
        Leaf(
            name=site["name"],
            sample=site["value"],
            value=traces.rescored.nodes[site["name"]]["value"],
            event_dim=site["fn"].event_dim,
            prior=priors[site["name"]]["fn"] if site["name"] in priors else None,
            is_point=is_point(site),
            log_prior=log_prior.get(site["name"], zeros),
            rows=slice(0, layout.num_particles),
            layout=layout,
        )
        for site in sites_of(traces.guide)
    )


def _beyond_ends(priors: dict[str, dict], guide_sites: list[dict], from_prior: bool) -> Iterator[tuple[dict, Tensor, Tensor]]:
    """The latents of which rounding has left some at an end of their support, with both log-densities there."""
    for site in guide_sites:
        prior = priors.get(site["name"])
        if prior is None or site["fn"] is prior["fn"]:
            continue
        beyond = densities_beyond(prior if from_prior else site, prior, site)
        if beyond is not None:
            yield site, *beyond


def _analytic_kls(priors: dict[str, dict], guide_sites: list[dict]) -> dict[str, Tensor]:
    """KL(q || p) of each site that has a closed form, given its parents.

    A site can be integrated out of its own term only if p(z|parents) does not depend on it through a parent: the sites that
    precede it in the model must precede it in the guide.
    """
    found: dict[str, Tensor] = {}
    before: set[str] = set()
    order = list(priors)
    for site in guide_sites:
        name, prior = site["name"], priors.get(site["name"])
        # Pyro's closed form ignores the ``log_density`` of a Delta.
        has_closed_form = prior is not None and site["mask"] is prior["mask"] and not is_point(site)
        if prior is not None and has_closed_form and before.issuperset(order[: order.index(name)]):
            with suppress(NotImplementedError):  # raised for two families without a closed form
                found[name] = scale_and_mask(kl_divergence(site["fn"], prior["fn"]), 1.0, site["mask"])
        before.add(name)
    return found

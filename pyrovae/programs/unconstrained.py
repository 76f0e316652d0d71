"""The continuous latents of a pair as one vector of unconstrained numbers per datum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints

from .checks import check_same_latents, refuse_masked
from .edges import from_value, log_density, takes_float64
from .sites import (
    Layout,
    Program,
    common_scale,
    data_plate,
    latents_of,
    log_prob_of,
    per_datum,
    plate_nesting,
    plate_sizes,
    refuse_auxiliary,
    sites_of,
)
from .support import _Image, _Union, support_of
from .tracing import Substitute, explained, same_random_stream, trace_from_prior, trace_pair, trace_program
from .wake_sleep import unconditioned
from .wrappers import base_distribution, is_factor, is_point

__all__ = ["UnconstrainedPair", "UnconstrainedTerms"]


class UnconstrainedTerms(NamedTuple):
    """The parts of log p(x, u) for unconstrained latents u, each (K, B), in nats; densities are with respect to u."""

    log_prior: Tensor
    log_likelihood: Tensor
    log_guide: Tensor | None

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u), shape (K, B)."""
        return self.log_prior + self.log_likelihood


class UnconstrainedPair:
    r"""The continuous latents of each datum of a batch as one vector u of L unconstrained numbers, for any pair.

    .. math:: z = T(u), \qquad \log p(x, u) = \log p(x, T(u)) + \log \left| \det \frac{\partial T}{\partial u} \right|

    T is ``torch.distributions.biject_to`` of the support of each latent site in the model, which may depend on earlier latents.
    Latents in plates within a datum are part of its vector; a ``Delta`` of the model is not, since it is a function of them.
    The integral of p(x, u) over u is p(x).

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        args: one batch of arguments.
        vectorize_particles: as in :func:`pyrovae.log_weights`.

    Attributes:
        num_latents: L.
        num_data: B.
        latents: the model's latent sites, in the order of their numbers.

    Raises:
        ValueError: a latent is discrete, masked, in the guide only, or has a support without a known bijection; or
            :func:`pyrovae.log_weights` refuses the pair.
    """

    def __init__(self, model: Program, guide: Program, args: tuple, *, vectorize_particles: bool = True):
        self.model, self.guide, self.args, self.vectorize = model, guide, args, vectorize_particles
        with torch.no_grad(), same_random_stream(args), poutine.block():
            traces = trace_pair(model, guide, args, {}, 1, None)
        model_sites, guide_sites = list(sites_of(traces.model)), list(sites_of(traces.guide))
        check_same_latents(model_sites, guide_sites)
        self.data = data_plate(model_sites + guide_sites)
        common_scale(model_sites + guide_sites, self.data)
        refuse_masked(model_sites + guide_sites)
        if self.data.full_size != self.data.size:
            raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
        self.nesting, self.num_data = plate_nesting(traces.model, traces.guide), self.data.size
        self.latents: tuple[str, ...] = ()
        self._sizes: dict[str, list[int]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._columns: dict[str, slice] = {}
        self._wide: dict[str, bool] = {}
        start = 0
        for site in model_sites:
            if site["is_observed"] or is_point(site):  # a Delta of the model is a function of other latents
                continue
            name, sizes = site["name"], plate_sizes(site, self.nesting)
            shape = _unconstrained_shape(site)
            width = shape.numel() * torch.Size(sizes).numel() // self.num_data
            self.latents += (name,)
            self._wide[name] = _both_take_float64(site, traces.guide.nodes[name])
            self._sizes[name], self._shapes[name], self._columns[name] = sizes, shape, slice(start, start + width)
            start += width
        if not self.latents:
            raise ValueError(
                "All latents of the model are Deltas, so there is nothing to integrate over: log p(x) is the log-likelihood, "
                "and pyro.deterministic records values that are no latents."
            )
        self.num_latents = start
        self.dtype = next(site["value"].dtype for site in model_sites if site["name"] in self.latents)
        self.device = args[0].device

    def terms(self, flat: Tensor, *, guide: bool = False) -> UnconstrainedTerms:
        """The parts of log p(x, u) at ``flat`` (K, B, L), and with ``guide`` log q(u|x)."""
        return self._in_turn(flat, lambda rows: self._terms(rows, guide))

    def log_joint(self, flat: Tensor) -> Tensor:
        """log p(x, u), shape (K, B), in nats, at ``flat`` (K, B, L); differentiable."""
        return self.terms(flat).log_joint

    def draw(self, num: int, start: Literal["prior", "guide"], *, inside: bool = False) -> Tensor:
        """Draws of the prior or the guide, shape (num, B, L).

        A guide may draw values outside the model's support. With ``inside``, draws of the prior replace them.

        Raises:
            ValueError: a draw lies outside the model's support, without ``inside``.
        """
        together = num if self.vectorize else 1
        with torch.no_grad():
            return torch.cat([self._draw(together, start, inside) for _ in range(num // together)])

    def prior_draws(self, num: int) -> Tensor:
        """Draws of the prior, (num, B, L), of whose support nothing is read into Python, so that a graph can capture it."""
        parts = []
        for _ in range(1 if self.vectorize else num):
            together = num if self.vectorize else 1
            trace = trace_from_prior(self.model, None, self.args, together, self.nesting).model
            sites = [self._flat_site(trace.nodes[name], trace.nodes[name], together) for name in self.latents]
            parts.append(torch.cat([flat for flat, _ in sites], -1))
        return torch.cat(parts)

    def model_trace(self, flat: Tensor) -> tuple[Trace, Substitute]:
        """The model's trace at ``flat`` (K, B, L), and the messenger that set the latents."""
        return self._run(self.model, self._values(flat), len(flat), unconstrained=True)

    def on(self, args: tuple) -> UnconstrainedPair:
        """The same pair on another batch of the same shape."""
        other = copy.copy(self)
        other.args = args
        return other

    def follow(self, flat: Tensor, watch: Any) -> Trace:
        """The model's trace at ``flat`` under a dispatch mode that tracks the latents, which must be unconstrained."""
        values = self._values(flat)
        for value in values.values():
            watch.hold(value)
        with watch:
            return self._run(self.model, values, len(flat))[0]

    def simulate(self) -> tuple[Trace, Tensor]:
        """Simulate one (z, x) per datum from the model: its unconditioned trace, and u of shape (1, B, L)."""
        with torch.no_grad(), poutine.block():
            trace = trace_program(unconditioned(self.model), self.args)
        for site in sites_of(trace):
            if is_factor(site):
                raise ValueError(f"The model's pyro.factor {site['name']!r} cannot be simulated: remove it.")
        return trace, self._flatten(trace, trace, 1)

    def _terms(self, flat: Tensor, with_guide: bool) -> UnconstrainedTerms:
        size = len(flat)
        trace, place = self.model_trace(flat)
        prior = likelihood = flat.new_zeros(size, self.num_data)
        for site in sites_of(trace):
            if site["is_observed"]:
                likelihood = likelihood + per_datum(site, log_prob_of(site), self.data, size, self.nesting)
            else:
                prior = prior + self._log_density(site, place, size)
        log_guide = None
        if with_guide:
            values = {name: trace.nodes[name]["value"] for name in self.latents}
            guide_sites = latents_of(self._run(self.guide, values, size)[0])
            refuse_auxiliary(guide_sites)
            try:
                terms = [self._log_density(site, place, size) for site in guide_sites]
            except (NotImplementedError, KeyError) as error:
                raise ValueError(
                    f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its density is not "
                    f"known at draws that are not its own: start from the prior."
                ) from error
            log_guide = sum(terms, torch.zeros_like(prior))
        return UnconstrainedTerms(prior, likelihood, log_guide)

    def _log_density(self, site: dict, place: Substitute, size: int) -> Tensor:
        """A latent site's log-density over unconstrained numbers, (K, B)."""
        if site["name"] not in place.placed:  # a Delta of the model
            term = log_prob_of(site)
        else:
            term = log_density(site, *place.placed[site["name"]], self._wide[site["name"]])
        return per_datum(site, term, self.data, size, self.nesting)

    def _draw(self, num: int, start: str, inside: bool) -> Tensor:
        if start == "prior":
            model_trace = trace_from_prior(self.model, None, self.args, num, self.nesting).model
            return self._flatten(model_trace, model_trace, num)
        traces = trace_pair(self.model, self.guide, self.args, {}, num, self.nesting)
        if not inside:
            return self._flatten(traces.model, traces.guide, num)
        parts = [self._flat_site(traces.model.nodes[name], traces.guide.nodes[name], num) for name in self.latents]
        kept = torch.stack([within.all(-1) for _, within in parts]).all(0)[..., None]
        flat = torch.cat([part for part, _ in parts], -1)
        return flat if bool(kept.all()) else torch.where(kept, flat, self._draw(num, "prior", True))

    def _flatten(self, model_trace: Trace, drawn: Trace, num: int) -> Tensor:
        parts = []
        for name in self.latents:
            flat, within = self._flat_site(model_trace.nodes[name], drawn.nodes[name], num)
            if not bool(within.all()):
                if drawn is model_trace:
                    raise ValueError(
                        f"A draw of the prior at the latent site {name!r} rounds to an end of its support, such as infinity: "
                        f"run the pair in float64, or give the site a prior of less extreme values."
                    )
                raise ValueError(
                    f"A draw of the latent site {name!r} lies outside the support that the model declares for it: start from "
                    f"the prior, or give the guide a distribution with that support."
                )
            parts.append(flat)
        return torch.cat(parts, -1)

    def _flat_site(self, site: dict, drawn: dict, num: int) -> tuple[Tensor, Tensor]:
        """The unconstrained numbers of a draw of one site, (num, B, n), and which belong to a value inside its support."""
        support, value = support_of(site["fn"]), drawn["value"]
        flat = from_value(drawn, support, value)
        within = torch.isfinite(flat)
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if isinstance(support, constraints.interval | constraints.half_open_interval | _Union | _Image):
            within = within & support.check(value)  # the inverse of a sigmoid clamps values outside to an edge
        name = site["name"]
        flat, within = (self._layout(num).from_site(part, self._sizes[name], self._shapes[name]) for part in (flat, within))
        return flat, within

    def _values(self, flat: Tensor) -> dict[str, Tensor]:
        layout = self._layout(len(flat))
        return {
            name: layout.to_site(flat[..., self._columns[name]], self._sizes[name], self._shapes[name]) for name in self.latents
        }

    def _run(
        self, program: Program, values: dict[str, Tensor], num: int, *, unconstrained: bool = False
    ) -> tuple[Trace, Substitute]:
        place = Substitute(values, unconstrained=unconstrained)
        with explained(num):
            return trace_program(program, self.args, num, self.nesting, place), place

    def _layout(self, num: int) -> Layout:
        return Layout(num, self.num_data, self.nesting, self.data.dim)

    def _in_turn(self, flat: Tensor, score: Callable[[Tensor], UnconstrainedTerms]) -> UnconstrainedTerms:
        if self.vectorize or len(flat) == 1:
            return score(flat)
        parts = [score(flat[k : k + 1]) for k in range(len(flat))]
        guides = [terms.log_guide for terms in parts if terms.log_guide is not None]
        return UnconstrainedTerms(
            torch.cat([terms.log_prior for terms in parts]),
            torch.cat([terms.log_likelihood for terms in parts]),
            torch.cat(guides) if guides else None,
        )


def _both_take_float64(model_site: dict, guide_site: dict) -> bool:
    """Whether the densities of a latent in both programs can be computed in float64."""
    try:
        support = support_of(model_site["fn"])
        return all(
            takes_float64(site, support, biject_to(support).inv(model_site["value"])) for site in (model_site, guide_site)
        )
    except NotImplementedError:  # such as a support without a bijection, which is refused in words elsewhere
        return False


def _unconstrained_shape(site: dict) -> torch.Size:
    """The shape of one draw's unconstrained numbers."""
    name, distribution = site["name"], type(base_distribution(site)).__name__
    try:
        support = support_of(site["fn"])
        if support.is_discrete:
            others = ', or pyrovae.exact(..., method="enumerate") where all are discrete'
            raise ValueError(
                f"The latent site {name!r} ({distribution}) is discrete, and this needs continuous latents: use "
                f"log_marginal with draws of the guide{others if site['fn'].has_enumerate_support else ''}."
            )
        transform = biject_to(support)
        # From a value, since inverse_shape mistakes bounds that differ between data for dimensions of the draw.
        batch_dim = site["value"].dim() - site["fn"].event_dim
        return transform.inv(site["value"]).shape[batch_dim:]
    except NotImplementedError as error:
        raise ValueError(
            f"No bijection from unconstrained numbers is known for the support of the latent site {name!r} ({distribution}): "
            f"register one with torch.distributions.biject_to, or use log_marginal."
        ) from error

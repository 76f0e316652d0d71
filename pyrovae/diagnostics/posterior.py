"""Draws from the posterior, and expectations under the guide, of any pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._validation import positive_integer
from ..data.batches import Batches
from ..evidence.draws import Draws
from ..evidence.planning import CHUNK_NUMBERS
from ..evidence.streaming import LogMoments, Resampler
from ..programs.checks import refuse_no_weights
from ..programs.inspect import inspect_pair, open_pair
from ..programs.log_weights import read_weights
from ..programs.sites import Layout, Program, data_plate, latents_of, log_prob_of, per_datum, sites_of
from ..programs.state import in_own_scope
from ..programs.tracing import Substitute, scoring_context, trace_pair, trace_program
from ..programs.wake_sleep import unconditioned, was_observed
from ..programs.wrappers import is_factor

__all__ = ["Expectations", "PairOnData", "WeightedDraws", "posterior_draws"]

Array = np.ndarray


@in_own_scope()
def posterior_draws(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 100,
    num_samples: int = 1000,
    predictive: bool = True,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Draws:
    r"""Draw latents from p(z|x) of every datum by importance resampling, in the groups that ArviZ uses.

    Of S samples from the guide, each of the M draws takes one with probability in proportion to its weight p(x, z) / q(z|x),
    with replacement. The samples are processed in chunks, so the memory does not grow with S. The draws are reliable only if
    the effective sample size ``ess`` is large.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: an array or tensor (N, ...), a tuple of them, a Dataset or a DataLoader. Results hold M copies of it.
        num_draws: M, draws per datum.
        num_samples: S, importance samples per datum.
        predictive: also draw the observed sites anew, and everything from the prior.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: a seed, with which the draws are reproducible and the global random stream untouched.
        progress: show a bar.

    Returns:
        The draws by site; ``to_datatree()`` converts them for ArviZ.

    Raises:
        ValueError: bad data, a pair that :func:`pyrovae.log_weights` refuses, or a datum all of whose weights are zero.

    References:
        Smith and Gelfand, Bayesian Statistics without Tears: A Sampling-Resampling Perspective, 1992,
        https://doi.org/10.1080/00031305.1992.10475856.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> draws = pv.posterior_draws(vae.model, vae.guide, torch.eye(9), num_draws=20, num_samples=50, seed=0)
        >>> draws.posterior["z"].shape, draws.posterior_predictive["x"].shape
        ((20, 9, 2), (20, 9, 9))
    """
    num_draws, num_samples = positive_integer(num_draws, "num_draws"), positive_integer(num_samples, "num_samples")
    pair = PairOnData(model, guide, x, vectorize_particles)
    groups: dict[str, dict[str, list[Tensor]]] = {}
    ess: list[Tensor] = []
    with pair.scoring(seed):
        for batch in pair.batches(max(num_draws, num_samples), progress):
            drawn, sizes = pair.resample(batch, num_draws, num_samples)
            if not bool((sizes > 0).all()):
                datum = sum(len(size) for size in ess) + int((~(sizes > 0)).nonzero()[0])
                raise ValueError(
                    f"Datum {datum} has only zero, NaN or infinite weights, so nothing can be resampled: widen the guide, or "
                    f"check the model for overflow."
                )
            if predictive:
                drawn |= pair.predict(batch, drawn["posterior"])
            ess.append(sizes)
            for group, values in drawn.items():
                for site, drawn_values in values.items():
                    groups.setdefault(group, {}).setdefault(site, []).append(drawn_values.cpu())
    joined = {
        group: {site: torch.cat(values, 0 if group == "observed_data" else 1).numpy() for site, values in sites.items()}
        for group, sites in groups.items()
    }
    empty: dict[str, dict[str, Array]] = {"posterior_predictive": {}, "prior": {}, "prior_predictive": {}}
    return Draws(**(empty | joined), ess=torch.cat(ess).cpu().numpy(), num_samples=num_samples)


@dataclass(frozen=True)
class Expectations:
    """Expectations under q(z|x) of one batch as (mean, standard error), and the draws that the other estimates need.

    Attributes:
        terms: rate, distortion and bound, shape (2, B) each, in nats.
        latents: some of the draws by site, shape (k, B, ...).
        log_guide: log q of these at their own datum, shape (k, B).
        means: posterior means by continuous site, shape (B, ...).
        mean_variances: the sampling variances of those means, shape (B, ...).
        closed_form: the sites whose rate has a closed form.
        sites: the guide's latent sites, from one run.
        plate: the data plate of that run.
    """

    terms: dict[str, Tensor]
    latents: dict[str, Tensor]
    log_guide: Tensor
    means: dict[str, Tensor]
    mean_variances: dict[str, Tensor]
    closed_form: tuple[str, ...]
    sites: dict[str, dict]
    plate: Any


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of the guide for one batch, with their weights.

    Attributes:
        log_weights: shape (K, B), in nats.
        latents: the values of the latents that the model has too, by site, shape (K, B, ...).
        log_likelihood: log p(x|z) by observed site, shape (K, B), in nats.
        observed: the observed values by site, shape (B, ...).
    """

    log_weights: Tensor
    latents: dict[str, Tensor]
    log_likelihood: dict[str, Tensor]
    observed: dict[str, Tensor]


class PairOnData:
    """A pair and its data: runs with the particles on the left, and values of sites as (K, B, ...).

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: data, as :class:`pyrovae.data.Batches` takes them; all of it is kept in memory.
        vectorize: whether particles run together.

    Raises:
        ValueError: the data plate is subsampled, or the pair is one that :func:`pyrovae.log_weights` refuses.
    """

    def __init__(self, model: Program, guide: Program, x: Any, vectorize: bool):
        self.model, self.guide, self.vectorize = model, guide, vectorize
        data, first = open_pair(model, guide, x, vectorize_particles=vectorize)
        data.batch_size = 1000
        self.info, self.device, self.dtype = first.info, first.device, first.dtype
        self.arrays = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
        self.num_data = len(self.arrays[0])
        self.chunk = max(1, CHUNK_NUMBERS // max(self.info.num_dims, 256))
        self.nesting = self.info.max_plate_nesting

    @contextmanager
    def scoring(self, seed: int | None) -> Iterator[None]:
        """Score without gradients, in evaluation mode, with a seed of its own."""
        with torch.no_grad(), scoring_context(self.model, self.guide, seed, self.device):
            yield

    def batches(self, num_samples: int, progress: bool) -> Iterator[tuple]:
        """The data in batches on which that many particles fit into memory, each checked first."""
        data = Batches(self.arrays, batch_size=max(1, self.chunk // num_samples), dtype=self.dtype, device=self.device)
        for batch in tqdm(data, total=data.num_batches, unit="batch", disable=not progress):
            refuse_no_weights(inspect_pair(self.model, self.guide, *batch).no_weights)
            yield batch

    def sizes(self, total: int, num_data: int) -> Iterator[int]:
        """The numbers of particles that run together, which add up to ``total``."""
        most = max(1, self.chunk // num_data) if self.vectorize else 1
        for start in range(0, total, most):
            yield min(most, total - start)

    def layout(self, size: int, plate: Any) -> Layout:
        """Where particles and data stand in the tensors of a run of ``size`` particles."""
        return Layout(size, plate.size, self.nesting, plate.dim)

    def expectations(self, batch: tuple, num_draws: int, mixture_draws: int) -> Expectations:
        """Rate, distortion, bound and posterior means of each datum of a batch, from draws of the guide."""
        terms: dict[str, list[Tensor]] = {"rate": [], "distortion": [], "elbo": []}
        latents: dict[str, list[Tensor]] = {}
        means: dict[str, list[Tensor]] = {}
        log_guide = []
        for size in self.sizes(num_draws, len(batch[0])):
            traces = trace_pair(self.model, self.guide, batch, {}, size, self.nesting)
            weights = read_weights(traces, size, analytic_kl=True)
            rate = [site.log_guide - site.log_prior if site.kl is None else site.kl for site in weights.sites]
            terms["rate"].append(torch.stack(rate).sum(0).double())
            terms["distortion"].append(-weights.log_likelihood.double())
            terms["elbo"].append(-terms["rate"][-1] - terms["distortion"][-1])
            log_guide.append(weights.log_guide)
            plate = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
            layout = self.layout(size, plate)
            sites = {site["name"]: site for site in latents_of(traces.guide)}
            for name, site in sites.items():
                value = layout.rows(site, site["value"])
                latents.setdefault(name, []).append(value)
                if _is_continuous(site):
                    mean = _mean_of(site)
                    means.setdefault(name, []).append(value if mean is None else layout.rows(site, mean))
        drawn = {name: torch.cat(parts) for name, parts in terms.items()}
        centres = {name: torch.cat(parts).double() for name, parts in means.items()}
        return Expectations(
            terms={name: torch.stack([d.mean(0), d.std(0) / math.sqrt(num_draws)]) for name, d in drawn.items()},
            latents={name: torch.cat(parts)[:mixture_draws] for name, parts in latents.items()},
            log_guide=torch.cat(log_guide)[:mixture_draws].double(),
            means={name: centre.mean(0) for name, centre in centres.items()},
            mean_variances={name: centre.var(0) / num_draws for name, centre in centres.items()},
            closed_form=tuple(site.name for site in weights.sites if site.kl is not None),
            sites=sites,
            plate=plate,
        )

    def log_aggregate(self, latents: dict[str, Tensor], like: Expectations, progress: bool) -> Tensor:
        """The log density of every latent under the mixture of all data's guides, shape (k, N), in nats.

        Args:
            latents: values by site, shape (k, N, ...).
            like: the expectations of a batch, for the shapes of its sites.
            progress: show a bar.
        """
        counts = next(iter(latents.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in latents.items()}  # (J, ...)
        width = max(1, sum(value[0].numel() for value in flat.values()))
        data = Batches(self.arrays, batch_size=1000, dtype=self.dtype, device=self.device)
        found = []
        together = max(1, CHUNK_NUMBERS // (width * min(1000, self.num_data))) if self.vectorize else 1
        bar = tqdm(range(0, counts.numel(), together), desc="log q(z)", unit="chunk", disable=not progress)
        for start in bar:
            some = {name: value[start : start + together] for name, value in flat.items()}
            size = len(next(iter(some.values())))
            log_sum = torch.full((size,), -math.inf, dtype=torch.float64, device=self.device)
            for batch in data:
                layout = self.layout(size, like.plate)._replace(num_data=len(batch[0]))
                values = {
                    name: layout.value(like.sites[name], value.unsqueeze(1).expand(size, len(batch[0]), *value.shape[1:]))
                    for name, value in some.items()
                }
                scored = trace_program(self.guide, batch, size, self.nesting, Substitute(values))
                sites = latents_of(scored)
                plate = data_plate(sites)
                log_q = torch.stack([per_datum(site, log_prob_of(site), plate, size, self.nesting) for site in sites]).sum(0)
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_q.double(), 1))
            found.append(log_sum - math.log(self.num_data))
        return torch.cat(found).reshape(counts)

    def weighted_draws(self, batch: tuple, size: int) -> WeightedDraws:
        """Draws of the guide, with their weights and the scores of the observed sites."""
        traces = trace_pair(self.model, self.guide, batch, {}, size, self.nesting)
        plate = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
        layout, observed = self.layout(size, plate), [site for site in sites_of(traces.model) if site["is_observed"]]
        return WeightedDraws(
            log_weights=read_weights(traces, size).log_weights,
            latents={
                site["name"]: layout.rows(site, site["value"])
                for site in latents_of(traces.guide)
                if site["name"] in traces.model
            },
            log_likelihood={site["name"]: per_datum(site, log_prob_of(site), plate, size, self.nesting) for site in observed},
            observed={
                site["name"]: layout._replace(num_particles=1).rows(site, site["value"])[0]
                for site in observed
                if not is_factor(site)
            },
        )

    def resample(self, batch: tuple, num_draws: int, num_samples: int) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """Draws of the posterior of each datum by importance resampling, and the effective sample sizes, shape (B,)."""
        num_data = len(batch[0])
        resampler = Resampler(LogMoments(num_data, num_samples, self.device), num_draws)
        observed: dict[str, Tensor] = {}
        for size in self.sizes(num_samples, num_data):
            draws = self.weighted_draws(batch, size)
            observed = draws.observed
            values = {("posterior", name): value for name, value in draws.latents.items()}
            values |= {("log_likelihood", name): value for name, value in draws.log_likelihood.items()}
            resampler.update(draws.log_weights.double(), values)
        groups: dict[str, dict[str, Tensor]] = {"posterior": {}, "log_likelihood": {}, "observed_data": observed}
        for (group, name), value in resampler.draws.items():
            groups[group][name] = value
        return groups, torch.as_tensor(resampler.moments.finish().ess)

    def predict(self, batch: tuple, posterior: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """New draws of the observed sites at the posterior's latents, and of all sites from the model alone."""
        num_draws, num_data = next(iter(posterior.values())).shape[:2]
        drawn: dict[str, dict[str, list[Tensor]]] = {"posterior_predictive": {}, "prior": {}, "prior_predictive": {}}

        def add(group: str, site: dict, layout: Layout) -> None:
            drawn[group].setdefault(site["name"], []).append(layout.rows(site, site["value"]))

        start, simulator = 0, unconditioned(self.model)
        for size in self.sizes(num_draws, num_data):
            like = trace_program(self.model, batch)
            layout = self.layout(size, data_plate(list(sites_of(like))))
            values = {name: layout.value(like.nodes[name], value[start : start + size]) for name, value in posterior.items()}
            start += size
            for site in sites_of(trace_program(simulator, batch, size, self.nesting, Substitute(values))):
                if was_observed(site):
                    add("posterior_predictive", site, layout)
            for site in sites_of(trace_program(simulator, batch, size, self.nesting)):
                if not is_factor(site):
                    add("prior_predictive" if was_observed(site) else "prior", site, layout)
        return {group: {name: torch.cat(values) for name, values in sites.items()} for group, sites in drawn.items()}


def _mean_of(site: dict) -> Tensor | None:
    """The mean of a site's distribution in closed form, where it has one."""
    try:
        mean = site["fn"].mean
    except NotImplementedError:  # raised by a distribution without a mean, such as a flow
        return None
    return mean.expand(site["value"].shape)


def _is_continuous(site: dict) -> bool:
    try:
        return not site["fn"].support.is_discrete
    except NotImplementedError:  # raised by a distribution without a support
        return site["value"].is_floating_point()

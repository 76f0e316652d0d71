"""Posterior draws and expectations of any pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.infer
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from tqdm import tqdm

from ..data.batches import Batches
from ..evidence.draws import Draws
from ..evidence.planning import CHUNK_NUMBERS
from ..evidence.streaming import LogMoments, Resampler
from ..programs.checks import refuse_no_weights
from ..programs.inspect import FIRST_ROWS, inspect_pair, prepare
from ..programs.log_weights import read_weights
from ..programs.sites import PARTICLES, Program, data_plate, latents_of, log_prob_of, per_datum, plates_of, sites_of
from ..programs.state import in_own_scope
from ..programs.tracing import evaluation_mode, trace_pair
from ..programs.wrappers import is_factor

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
    r"""Draw latents from p(z|x) of every datum, by importance resampling, with all that ArviZ wants beside them.

    Of S samples from the guide, each of the M draws takes one with probability in proportion to its weight p(x, z) / q(z|x),
    with replacement. Samples stream by, so the memory does not grow with S. The draws are as good as the weights: read ``ess``.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: an array or tensor (N, ...), a tuple of them, a Dataset or a DataLoader. Results hold M copies of it.
        num_draws: M, draws per datum.
        num_samples: S, importance samples per datum.
        predictive: also draw the observed sites anew, and everything from the prior.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the draws reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The draws by site; ``to_datatree()`` gives them to ArviZ.

    Raises:
        ValueError: bad data, a pair that :func:`pyrovae.log_weights` refuses, or a datum all of whose weights are zero.

    References:
        Rubin, Using the SIR algorithm to simulate posterior distributions, 1988.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> draws = pv.posterior_draws(vae.model, vae.guide, torch.eye(9), num_draws=20, num_samples=50, seed=0)
        >>> draws.posterior["z"].shape, draws.posterior_predictive["x"].shape
        ((20, 9, 2), (20, 9, 9))
    """
    for name, value in (("num_draws", num_draws), ("num_samples", num_samples)):
        if int(value) != value or value < 1:
            raise ValueError(f"{name} is a positive integer, not {value!r}.")
    pair = _Pair(model, guide, x, vectorize_particles)
    groups: dict[str, dict[str, list[Tensor]]] = {}
    ess: list[Tensor] = []
    with pair.scoring(seed):
        for batch in pair.batches(max(num_draws, num_samples), progress):
            drawn, sizes = pair.resample(batch, num_draws, num_samples)
            if not bool((sizes > 0).all()):
                datum = sum(len(size) for size in ess) + int((~(sizes > 0)).nonzero()[0])
                raise ValueError(
                    f"Datum {datum} has zero weight in all samples, or NaN or infinite ones, so nothing can be resampled: "
                    f"widen the guide, or look where the model overflows."
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
class _Expectations:
    """Of one batch: expectations under q(z|x) as (mean, se) over (B,), and what the mixture and active units need."""

    terms: dict[str, Tensor]  # (2, B)
    latents: dict[str, Tensor]  # some of the draws, (k, B, ...)
    log_guide: Tensor  # log q of these at their own datum, (k, B)
    means: dict[str, Tensor]  # posterior means, (B, ...)
    spreads: dict[str, Tensor]  # the variance of their sampling noise, (B, ...)
    closed_form: tuple[str, ...]
    sites: dict[str, dict]  # the guide's, as one run left them
    data: Any


class _Pair:
    """A pair and its data, as the functions above run it: particles left of everything, values of sites as (K, B, ...)."""

    def __init__(self, model: Program, guide: Program, x: Any, vectorize: bool):
        self.model, self.guide, self.vectorize = model, guide, vectorize
        data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
        first = prepare(model, guide, data, vectorize_particles=vectorize)
        data.to(first.dtype, first.device, first.floating)
        data.batch_size = 1000
        self.info, self.device, self.dtype = first.info, first.device, first.dtype
        if self.info.scale != 1.0:
            raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
        self.arrays = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
        self.num_data = len(self.arrays[0])
        self.chunk = max(1, CHUNK_NUMBERS // max(self.info.num_dims, 256))
        self.nesting = self.info.max_plate_nesting

    def scoring(self, seed: int | None) -> Any:
        return _scoring(self.model, self.guide, self.device, seed)

    def batches(self, num_samples: int, progress: bool) -> Iterator[tuple]:
        data = Batches(self.arrays, batch_size=max(1, self.chunk // num_samples), dtype=self.dtype, device=self.device)
        for batch in tqdm(data, total=data.num_batches, unit="batch", disable=not progress):
            refuse_no_weights(inspect_pair(self.model, self.guide, *batch).no_weights)
            yield batch

    def sizes(self, total: int, num_data: int) -> Iterator[int]:
        """How many particles run together, until all have."""
        most = max(1, self.chunk // num_data) if self.vectorize else 1
        for start in range(0, total, most):
            yield min(most, total - start)

    def expectations(self, batch: tuple, num_draws: int, mixture_draws: int) -> _Expectations:
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
            data = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
            sites = {site["name"]: site for site in sites_of(traces.guide) if not site["is_observed"]}
            for name, site in sites.items():
                value = self.rows_of(site, site["value"], data, size)
                latents.setdefault(name, []).append(value)
                if _is_continuous(site):
                    mean = _mean_of(site)
                    means.setdefault(name, []).append(value if mean is None else self.rows_of(site, mean, data, size))
        drawn = {name: torch.cat(parts) for name, parts in terms.items()}
        centres = {name: torch.cat(parts).double() for name, parts in means.items()}
        return _Expectations(
            terms={name: torch.stack([d.mean(0), d.std(0) / math.sqrt(num_draws)]) for name, d in drawn.items()},
            latents={name: torch.cat(parts)[:mixture_draws] for name, parts in latents.items()},
            log_guide=torch.cat(log_guide)[:mixture_draws].double(),
            means={name: centre.mean(0) for name, centre in centres.items()},
            spreads={name: centre.var(0) / num_draws for name, centre in centres.items()},
            closed_form=tuple(site.name for site in weights.sites if site.kl is not None),
            sites=sites,
            data=data,
        )

    def log_aggregate(self, latents: dict[str, Tensor], like: _Expectations, progress: bool) -> Tensor:
        """Log density of every latent under the mixture of all data's guides, shape (k, N)."""
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
                trace = Trace()
                for name, value in some.items():
                    spread = value.unsqueeze(1).expand(size, len(batch[0]), *value.shape[1:])
                    trace.add_node(name, **{**like.sites[name], "value": self.value_of(like.sites[name], spread, like.data)})
                scored = self.run(poutine.replay, self.guide, batch, size, trace)
                sites = latents_of(scored)
                plate = data_plate(sites)
                log_q = torch.stack([per_datum(site, log_prob_of(site), plate, size, self.nesting) for site in sites]).sum(0)
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_q.double(), 1))
            found.append(log_sum - math.log(self.num_data))
        return torch.cat(found).reshape(counts)

    def run(self, wrap: Any, program: Program, batch: tuple, size: int, trace: Trace) -> Trace:
        """A program's trace with particles on the left and some values given."""
        if size > 1:
            program = pyro.plate(PARTICLES, size, dim=-self.nesting - 1)(program)
        return prune_subsample_sites(poutine.trace(wrap(program, trace=trace)).get_trace(*batch))

    def resample(self, batch: tuple, num_draws: int, num_samples: int) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        num_data = len(batch[0])
        resampler = Resampler(LogMoments(num_data, num_samples, self.device), num_draws)
        observed: dict[str, Tensor] = {}
        for size in self.sizes(num_samples, num_data):
            traces = trace_pair(self.model, self.guide, batch, {}, size, self.nesting)
            data = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
            values = {
                ("posterior", site["name"]): self.rows_of(site, site["value"], data, size)
                for site in sites_of(traces.guide)
                if not site["is_observed"] and site["name"] in traces.model
            }
            for site in sites_of(traces.model):
                if site["is_observed"]:
                    values["log_likelihood", site["name"]] = per_datum(site, log_prob_of(site), data, size, self.nesting)
                    if not is_factor(site):
                        observed[site["name"]] = self.rows_of(site, site["value"], data, 1)[0]
            resampler.update(read_weights(traces, size).log_weights.double(), values)
        groups: dict[str, dict[str, Tensor]] = {"posterior": {}, "log_likelihood": {}, "observed_data": observed}
        for (group, name), value in resampler.draws.items():
            groups[group][name] = value
        return groups, torch.as_tensor(resampler.moments.finish().ess)

    def predict(self, batch: tuple, posterior: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The observed sites drawn anew at the posterior's latents, and all sites drawn from the model alone."""
        num_draws, num_data = next(iter(posterior.values())).shape[:2]
        found: dict[str, dict[str, list[Tensor]]] = {"posterior_predictive": {}, "prior": {}, "prior_predictive": {}}
        start = 0
        for size in self.sizes(num_draws, num_data):
            like = poutine.trace(self.model).get_trace(*batch)
            data = data_plate(list(sites_of(prune_subsample_sites(like))))
            given = Trace()
            for name, value in posterior.items():
                site = like.nodes[name]
                given.add_node(name, **{**site, "value": self.value_of(site, value[start : start + size], data)})
            start += size
            for trace, after in ((given, True), (Trace(), False)):
                drawn = self.run(poutine.replay, poutine.uncondition(self.model), batch, size, trace)
                for site in sites_of(drawn):
                    seen = "was_observed" in site["infer"]
                    if is_factor(site) or (after and not seen):
                        continue
                    group = "posterior_predictive" if after else "prior_predictive" if seen else "prior"
                    value = self.rows_of(site, site["value"], data, size)
                    found[group].setdefault(site["name"], []).append(value)
        return {group: {name: torch.cat(values) for name, values in sites.items()} for group, sites in found.items()}

    def inner(self, site: dict, data: Any) -> list[int]:
        """Sizes of the plates between particles and event but the data's; 1 where the site is not in one."""
        size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized}
        return [size.get(dim, 1) for dim in range(-self.nesting, 0) if dim != data.dim]

    def rows_of(self, site: dict, value: Tensor, data: Any, size: int) -> Tensor:
        """A site's value as (K, B, ...): the plates inside a datum that hold it, then its event."""
        event = site["fn"].event_dim
        value = value.reshape((1,) * (self.nesting + 1 + event - value.dim()) + value.shape)
        value = value.movedim(data.dim - event, 1)
        inner, shape = self.inner(site, data), value.shape[value.dim() - event :]
        value = value.expand(size, data.size, *inner, *shape)
        return value.reshape(size, data.size, *(n for n in inner if n != 1), *shape)

    def value_of(self, site: dict, rows: Tensor, data: Any) -> Tensor:
        """A value as the site has it, from (K, B, ...); the inverse of :meth:`rows_of`."""
        event = site["fn"].event_dim
        shape = rows.shape[rows.dim() - event :]
        value = rows.reshape(*rows.shape[:2], *self.inner(site, data), *shape).movedim(1, data.dim - event)
        return value.squeeze(0) if len(rows) == 1 else value


@contextmanager
def _scoring(model: Program, guide: Program, device: torch.device, seed: int | None) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _mean_of(site: dict) -> Tensor | None:
    """The mean of a site's distribution in closed form, where it has one."""
    try:
        mean = site["fn"].mean
    except NotImplementedError:  # torch's word for a distribution that declares none, as a flow
        return None
    return mean.expand(site["value"].shape)


def _is_continuous(site: dict) -> bool:
    try:
        return not site["fn"].support.is_discrete
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return site["value"].is_floating_point()

"""Evidence that repairs itself: each datum climbs from cheap proposals to dear ones, only as far as its weights demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.matching import Batch
from .annealing_options import AnnealingOptions
from .chunks import ahead
from .fitted import Fitted, stacked, tempered
from .fitting import Scored, adapted, draws_for, fit, tuned
from .kinds import RUNGS
from .modes import FEW_LATENTS, Found, Modes
from .paths import AnnealingPath
from .planning import needed_draws
from .proposals import prior_count
from .psis import FEWEST_SAMPLES, Array, khat_limit, pareto_khat, tail_size
from .strata import FittedField, Strata, prior_draws
from .streaming import LogMoments
from .task import Task
from .terms import CALLS_OF_A_GRADIENT

__all__ = ["Ladder", "pilot_draws"]

GUIDE, FITTED, ADAPTED, MIXTURE, ANNEALED, EXACT = range(len(RUNGS))
# Draws of the guide's pilot, a twentieth of the estimate's, but no fewer or more; a fitted proposal's has twice as many, from
# which it is also tuned.
FEWEST_PILOT, MOST_PILOT = 250, 1000
# A pilot promises a reliable estimate if Pareto k is this far below the limit for the estimate's own draws, as k of few draws
# is itself uncertain, and if so many of its draws are effective.
MARGIN, LEAST_ESS = 0.1, 0.02
# An estimate of which fewer draws are effective is made anew by chains.
LEAST_EFFECTIVE = 0.01
# What the guide may miss by the draws of the prior, in nats, before a proposal is fitted.
MISSED = 0.005
# The power of the likelihood and the degrees of freedom of a proposal before any of its draws was scored.
FIRST_POWER, FIRST_DF = 0.6, 30.0
# Adaptations to the weights of all pilots so far, and draws of each such pilot, in those of the guide's; and of a second fit.
ADAPTATIONS, FITTED_PILOT, SECOND_PILOT = 2, 2, 4
# Nats that modes which were not found may add before more starts look for them.
UNSEEN = 0.02
# The last rung: chains from the best proposal so far, and again through more temperatures if they do not agree.
CHAINS, TEMPERATURES = AnnealingOptions(num_chains=64, leapfrog_steps=4, step_size=0.2), (60, 240)
# The prior's fraction of the mixture with the guide, where nothing can be fitted.
MIXTURE_SHARE = 0.25
# Numbers that the covariances of data that are fitted together may have.
FIT_NUMBERS = 2**23


def pilot_draws(num_samples: int) -> int:
    """Draws of a pilot for an estimate from ``num_samples``; none if nothing could tell whether to believe that."""
    if num_samples < FEWEST_SAMPLES:
        return 0
    return min(max(num_samples // 20, min(num_samples, FEWEST_PILOT)), MOST_PILOT)


class Ladder:
    r"""One group of data on the rungs of ``proposal="auto"``.

    .. math:: \hat p(x) = \frac1S \sum_s \frac{p(x, u_s)}{\alpha \, p(u_s) + (1 - \alpha) \, r_P(u_s \mid x)}

    The rung, its proposal :math:`r_P` and the number S depend on pilots P alone, and S fresh draws are made afterwards. Given
    the pilots each term has the mean p(x), whatever they chose, because the proposal covers what the prior allows; so
    :math:`E \hat p(x) = E[E(\hat p(x) \mid P)] = p(x)`. The draws are stratified: exactly :math:`\alpha S` of them come from
    the prior.

    If the fresh draws then have a tail that their pilot did not show, the datum climbs on, and its estimate is made anew: by
    a second fit, from more starts and larger pilots, and at last by chains. That selects. With A the event that the first
    estimate is kept, :math:`E \hat p = p + E[(\hat p_1 - p) 1_A]`, and the relative bias is at most
    :math:`\sigma \sqrt{P(A) (1 - P(A))}`, where :math:`\sigma` is the relative standard error of the first estimate: half a
    standard error at the most, and a tenth of one if the pilot errs once in a hundred times. Later estimates add as much for
    the few data that come to them.

    Args:
        task: what the call fixes.
        batch: the group's data.
        covered: whether the guide can draw what the prior allows, for each datum.
    """

    def __init__(self, task: Task, batch: Batch, covered: Array):
        self.task, self.batch, size = task, batch, len(covered)
        self.covered, self.size = covered, size
        self.device = batch[0].device
        self.pilot = pilot_draws(task.num_samples)
        self.block = min(self.pilot or task.num_samples, task.num_samples, max(1, task.chunk))
        self.width = task.whole or max(1, task.chunk // self.block)
        self.rung = np.zeros(size, np.int64)
        self.calls, self.piloted = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.khat, self.sound = np.full(size, np.inf), np.zeros(size, bool)
        self.needed = np.full(size, task.num_samples)
        self.found = None if task.terms is None else Found(task.terms, size)
        self.proposals: dict[int, Fitted] = {}
        self.arrays: dict[str, Array] = {}

    def run(self) -> dict[str, Array]:
        """The answers for the group, by the names of the store's files."""
        guide_elbo = np.zeros(self.size)
        if self.pilot:
            guide_elbo = self._try_guide()
            self.arrays = self.task.exact(self.batch) or {}
            if self.arrays:
                self.rung[:], self.calls = EXACT, self.calls + self.arrays["drawn"]
            elif self.task.terms is None:
                self._try_mixture(np.flatnonzero(~self.sound))
            else:
                self._search()
                self._fit(np.flatnonzero(~self.sound), FITTED_PILOT)
        self._estimate(np.flatnonzero((self.sound | ~self._fitted) & (self.rung != EXACT)))
        if self.found is not None and self.pilot:
            # The guide's own draws may show a tail that its pilot did not.
            self._again(np.flatnonzero(~self._fitted & ~self._reliable() & ~np.isneginf(self.khat)), FITTED_PILOT)
            # Most proposals that fail lack a mode.
            failed = np.flatnonzero(self._fitted & ~(self.sound & self._reliable()))
            self._look(torch.from_numpy(failed[~self.found.wide[failed].numpy()]))
            self._again(failed, SECOND_PILOT)
            failed = np.flatnonzero(self._fitted & ~(self.sound & self._reliable()))
            self.piloted[failed[self.sound[failed]]] += self.arrays["drawn"][failed[self.sound[failed]]]
            self._anneal(failed)
        if self.pilot:
            climbed = self.rung != GUIDE
            self.arrays["elbo"][climbed] = guide_elbo[climbed]
        self.arrays["missed"] = self._still_missed()
        own = {"rung": self.rung, "calls": self.calls, "pilot": self.piloted, "covered": self.covered | (self.rung != GUIDE)}
        return self.arrays | own

    def _still_missed(self) -> Array:
        """What the guide's estimates miss, in nats; a proposal that draws from the prior has nothing more to learn from it."""
        missed = np.zeros(self.size)
        rows = np.arange(self.size) if self.task.whole else np.flatnonzero(self.rung == GUIDE)
        if len(rows):
            largest, log_px = (self.arrays[name][rows] for name in ("largest", "log_px"))
            missed[rows] = self.task.probe(self.part(torch.from_numpy(rows)), largest, log_px)
        unseen = 0.0 if self.found is None else self.found.unseen.numpy()
        return np.fmax(np.where(self.rung == GUIDE, missed, 0.0), unseen)

    @property
    def _fitted(self) -> Array:
        """Whether a datum has a proposal of its own."""
        return np.array([row in self.proposals for row in range(self.size)])

    @property
    def _num_latents(self) -> int:
        assert self.task.terms is not None
        return self.task.terms.pair(self.part(torch.arange(self.task.whole or 1))).num_latents

    def part(self, rows: Tensor) -> Batch:
        """The data in some rows."""
        return tuple(array[rows.to(array.device)] for array in self.batch)

    def _judge(self, rows: Array, log_w: Tensor, rung: int) -> Array:
        """Take note of a pilot's weights (S, rows); which rows it is the best for so far."""
        moments, size = LogMoments.of(log_w), len(log_w)
        estimate = moments.finish()
        tail = moments.tail[:, : tail_size(size)].cpu().numpy()
        khat = np.nan_to_num(pareto_khat(tail, size, precision=self.task.precision), nan=np.inf)
        light = (khat < khat_limit(self.task.num_samples) - MARGIN) & (estimate.ess >= LEAST_ESS * size) | np.isneginf(khat)
        sound = light & np.isfinite(estimate.log_px)
        self.calls[rows] += size
        self.piloted[rows] += size
        better = (khat < self.khat[rows]) | ((rung > GUIDE) & (self.rung[rows] == GUIDE))
        chosen = rows[better]
        self.khat[chosen], self.sound[chosen], self.rung[chosen] = khat[better], sound[better], rung
        if self.task.target_se is not None:
            self._need(chosen, needed_draws(moments, self.task.target_se, self.task.discrete)[better])
        return better

    def _try_guide(self) -> Array:
        """A pilot from the guide; returns its mean log-weights, which are the guide's ELBO."""
        rows, elbo = np.arange(self.size), np.zeros(self.size)
        for part, blocks in self._guide_blocks(torch.arange(self.size), self.pilot):
            log_w, chosen = torch.cat(list(blocks)), part.numpy()
            self._judge(chosen, log_w, GUIDE)
            elbo[chosen] = log_w.mean(0).cpu().numpy()
            moments = LogMoments.of(log_w)
            estimate, largest = moments.finish(), moments.tail[:, 0].cpu().numpy()
            missed = self.task.probe(self.part(part), largest, estimate.log_px)
            self.sound[chosen] &= ~(missed > np.fmax(MISSED, estimate.se / 10))
        self.sound[rows] &= self.covered
        return elbo

    def _search(self) -> None:
        """Look for modes that no draw of the guide may have visited: its weights would not show them."""
        assert self.found is not None
        exact = np.isneginf(self.khat)
        rows = np.flatnonzero(~exact | ~self.sound)
        self._look(torch.from_numpy(rows))
        self._look(torch.from_numpy(rows)[self.found.unseen[rows] > UNSEEN])
        # With few latents posteriors often have several modes, and fits are cheap.
        few = len(rows) > 0 and self._num_latents <= FEW_LATENTS
        self.sound[rows[(self.found.number[rows] > 1).numpy() | few]] = False

    def _look(self, rows: Tensor) -> None:
        """Search some data for modes, more widely if they were searched before."""
        assert self.found is not None
        self.calls[rows.numpy()] += self.found.search(rows, self.part(rows)).numpy()

    def _again(self, rows: Array, pilot: int) -> None:
        """Fit proposals, and make the estimates of some data anew by them."""
        if len(rows):
            made = rows[self.sound[rows]]
            self.piloted[made] += self.arrays["drawn"][made]
            self.sound[rows], self.khat[rows] = False, np.inf
            self._fit(rows, pilot)
            self._estimate(rows[self.sound[rows]])

    def _fit(self, wanted: Array, pilot: int) -> None:
        """Fit a proposal to each of some data, and adapt it where its pilot fails, of so many times the guide's draws."""
        assert self.found is not None
        for rows, modes in self.found.of(torch.from_numpy(wanted)):
            most = max(1, FIT_NUMBERS // (self._num_latents**2 * len(modes.chosen)))
            for part in torch.arange(len(rows)).split(most):
                self._fit_part(rows[part], modes.rows(part), pilot * self.pilot)

    def _fit_part(self, rows: Tensor, modes: Modes, pilot: int) -> None:
        terms, unit, calls = self.task.terms, modes.unit, torch.zeros(len(rows), dtype=torch.long)
        assert terms is not None
        assert self.found is not None
        fitted = fit(terms, self.part(rows), modes, calls)
        self.found.unseen[rows] = modes.unseen(fitted).cpu()
        self.calls[rows.numpy()] += calls.numpy()
        first = Fitted(*tempered(fitted, unit, FIRST_POWER)[:-1], torch.full_like(fitted.df, FIRST_DF))
        history = self._scored(rows, first, pilot)
        self._judge(rows.numpy(), history.log_w, FITTED)
        current = tuned(fitted, unit, history)
        self._keep(rows, current, history)
        for _ in range(ADAPTATIONS):
            active = torch.from_numpy(np.flatnonzero(~self.sound[rows.numpy()]))
            if not len(active):
                break
            rows, unit, history, current = rows[active], unit[active], history.rows(active), current.rows(active)
            current = adapted(current, unit, history)
            fresh = self._scored(rows, current, pilot)
            better = torch.from_numpy(self._judge(rows.numpy(), fresh.log_w, ADAPTED))
            history = history.joined(fresh)
            self._keep(rows[better], tuned(current, unit, history).rows(better), history.rows(better))

    def _need(self, rows: Array, number: Array) -> None:
        """Take note of how many draws the target error takes, of the numbers that there are."""
        checks = np.array(self.task.checks)
        self.needed[rows] = checks[np.searchsorted(checks[:-1], number)]

    def _keep(self, rows: Tensor, fitted: Fitted, scored: Scored) -> None:
        if self.task.target_se is not None:
            self._need(rows.numpy(), draws_for(fitted, scored, self.task.target_se).cpu().numpy())
        for place, row in enumerate(rows.tolist()):
            self.proposals[row] = fitted.rows(torch.tensor([place]))

    def _try_mixture(self, rows: Array) -> None:
        """A pilot from the mixture of prior and guide, which is all that is left for a pair without unconstrained latents."""
        if not len(rows):
            return
        rows = rows if self.task.whole is None else np.arange(self.size)
        for part in torch.from_numpy(rows).split(self.task.whole or self.width):
            draw = self.task.mixture(self.pilot, prior_count(self.pilot, MIXTURE_SHARE))
            batch = self.part(part)
            log_w = torch.cat([draw(batch, size) for size in _sizes(self.pilot, self.block)])
            self._judge(part.numpy(), log_w, MIXTURE)

    def _scored(self, rows: Tensor, fitted: Fitted, number: int) -> Scored:
        """A pilot of so many draws from the proposals of some data."""
        kept: list[list[Tensor]] = []
        for _, blocks in self._fitted_blocks(rows, fitted, number):
            kept.append([torch.cat(columns) for columns in zip(*blocks, strict=True)])
        flat, log_prior, log_joint = (torch.cat(columns, 1) for columns in zip(*kept, strict=True))
        return Scored(flat, log_prior, log_joint, (fitted,), prior_draws(number) / number)

    def _blocks(self, rows: Tensor) -> Iterator[tuple[Tensor, Batch, Tensor]]:
        """Rows that draw together; their data and numbers, repeated to one width, since a graph serves one shape."""
        for part in rows.split(self.width):
            padded = torch.cat([part, part[:1].expand(self.width - len(part))]) if self.task.whole is None else part
            yield part, self.part(padded), padded

    def _guide_blocks(self, rows: Tensor, number: int) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        """For rows that draw together, blocks of log-weights of the guide's draws, (size, rows)."""
        threads = self.task.threads
        for part, batch, _ in self._blocks(rows):
            sizes = list(_sizes(number, self.block))

            def calls(batch: Batch = batch, sizes: list[int] = sizes) -> Iterator[Callable[[], Tensor]]:
                yield from (self.task.draw_guide(batch, self.block) for _ in sizes)

            values = ahead(calls(), threads + 2 if threads > 1 else 0)
            yield part, (value[:size, : len(part)] for value, size in zip(values, sizes, strict=True))

    def _fitted_blocks(
        self, rows: Tensor, fitted: Fitted, number: int
    ) -> Iterator[tuple[Tensor, Iterator[tuple[Tensor, Tensor, Tensor]]]]:
        """For rows that draw together, blocks of points of their proposals, with log p(u) and log p(x, u) there."""
        terms, place, from_prior = self.task.terms, 0, prior_draws(number)
        assert terms is not None
        for part, batch, padded in self._blocks(rows):
            which = torch.arange(place, place + len(part))
            proposals = fitted.rows(torch.cat([which, which[:1].expand(len(padded) - len(part))]))
            place += len(part)

            def blocks(
                batch: Batch = batch, proposals: Fitted = proposals, size: int = len(part)
            ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                done, prior = 0, terms.prior(batch, from_prior)
                for drawn in _sizes(number, self.block):
                    first, last = (part * from_prior // number for part in (done, done + drawn))
                    done += drawn
                    flat = torch.cat([prior[first:last], proposals.sample(self.block - (last - first))])
                    log_prior, log_likelihood = terms.score(batch, flat)
                    columns = (flat, log_prior, log_prior + log_likelihood)
                    yield tuple(column[:drawn, :size] for column in columns)  # type: ignore[misc]

            yield part, blocks()

    def _estimate(self, rows: Array) -> None:
        """Estimates from fresh draws, as many as the pilots decided on."""
        for rung in np.unique(self.rung[rows]).tolist():
            for number in np.unique(self.needed[rows]).tolist():
                chosen = rows[(self.rung[rows] == rung) & (self.needed[rows] == number)]
                if len(chosen):
                    strata = Strata(len(chosen), self.device)
                    for part, blocks in self._final(torch.from_numpy(chosen), rung, number, strata):
                        moments = LogMoments(len(part), self.task.num_samples, self.device, curve=True)
                        moments.extend(blocks, number)
                        self._put(part.numpy(), moments)
                    if rung in (FITTED, ADAPTED):
                        self.arrays["se"][chosen] = strata.standard_error(self.arrays, chosen, number)
                    self.calls[chosen] += number

    def _final(self, rows: Tensor, rung: int, number: int, strata: Strata) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        """For rows that draw together, blocks of log-weights of their proposal."""
        if rung == GUIDE:
            yield from self._guide_blocks(rows, number)
        elif rung == MIXTURE:
            for part in rows.split(self.task.whole or self.width):
                draw, batch = self.task.mixture(number, prior_count(number, MIXTURE_SHARE)), self.part(part)
                yield part, (draw(batch, size) for size in _sizes(number, self.block))
        else:
            fitted = stacked([self.proposals[row] for row in rows.tolist()])
            place = 0
            for part, blocks in self._fitted_blocks(rows, fitted, number):
                which = torch.arange(place, place + len(part))
                place += len(part)
                yield part, self._weights(blocks, fitted.rows(which), which, number, strata)

    def _weights(
        self, blocks: Iterator[tuple[Tensor, Tensor, Tensor]], proposal: Fitted, which: Tensor, number: int, strata: Strata
    ) -> Iterator[Tensor]:
        """Log-weights of blocks from a proposal; the prior's draws come first in each."""
        from_prior, done = prior_draws(number), 0
        for flat, log_prior, log_joint in blocks:
            log_drawn = Scored(flat, log_prior, log_joint, (proposal,), from_prior / number).log_drawn
            own = (done + len(flat)) * from_prior // number - done * from_prior // number
            done += len(flat)
            strata.add(which, log_joint - log_drawn, log_prior - log_drawn, own)
            yield log_joint - log_drawn

    def _anneal(self, rows: Array) -> None:
        """Chains from the best proposals to the posterior, for what no proposal was good enough for; longer ones if need be."""
        for temperatures in TEMPERATURES if self.task.terms is not None else ():
            options = replace(CHAINS, num_temperatures=temperatures)
            if len(rows):
                self.piloted[rows[self.rung[rows] == ANNEALED]] += CHAINS.num_chains
                self._anneal_by(AnnealingPath(options, options.betas), rows)
                rows = rows[self.arrays["ess"][rows] < CHAINS.num_chains / 2]

    def _anneal_by(self, path: AnnealingPath, rows: Array) -> None:
        terms = self.task.terms
        assert terms is not None
        for part in torch.from_numpy(rows).split(max(1, terms.gradients // CHAINS.num_chains)):
            field = FittedField.of(terms, self.part(part), stacked([self.proposals[row] for row in part.tolist()]))
            with tqdm(disable=True) as bar:
                log_w = path.forward(field, path.tune(field, bar), bar)
            moments = LogMoments(len(part), self.task.num_samples, self.device, curve=True)
            moments.update(log_w)
            self._put(part.numpy(), moments)
        self.rung[rows] = ANNEALED
        self.calls[rows] += CALLS_OF_A_GRADIENT * path.num_gradients

    def _put(self, rows: Array, moments: LogMoments) -> None:
        for name, part in self.task.finish(moments).items():
            place = self.arrays.setdefault(name, np.zeros((self.size, *part.shape[1:]), part.dtype))
            place[rows] = part

    def _reliable(self) -> Array:
        """Whether the estimates so far have light tails."""
        if not self.arrays:
            return np.zeros(self.size, bool)
        khat = self.arrays["khat"]
        limits = np.array([khat_limit(int(number)) for number in self.arrays["drawn"]])
        enough = self.arrays["ess"] >= LEAST_EFFECTIVE * self.arrays["drawn"]
        with np.errstate(invalid="ignore"):
            return ((khat < limits) & enough | np.isneginf(khat)) & np.isfinite(self.arrays["log_px"])


def _sizes(number: int, most: int) -> Iterator[int]:
    """``number`` draws in blocks of ``most``; the last may be smaller."""
    return (min(most, number - start) for start in range(0, number, most))

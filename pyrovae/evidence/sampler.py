"""Importance sampling of one set of data: plan the chunks, draw log-weights, reduce them to sums, finish the evidence."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ..compile.cuda import check_precision, products_in
from ..compile.graph import Staged
from ..data.batches import content_hash
from ..data.matching import Batch
from ..programs.checks import refuse_no_weights
from ..programs.coverage import covered_data
from ..programs.inspect import inspect_pair, open_pair
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode
from . import planning
from .chunks import ahead, chunk_sizes, parts_of, runs_of, side_by_side
from .curve import curve_of
from .finishing import finished
from .kinds import KINDS
from .ladder import Ladder
from .measure import SCORED_DATA, evidence_fields, scored_data
from .planning import REACH, Group, ImportanceOptions, make_plan, needed_draws, one_datum, pilot_sizes
from .proposals import (
    Draw,
    Probe,
    Refinement,
    guide_draws,
    guide_probe,
    missed_nats,
    mixture_draws,
    prior_draws,
    prior_probe,
    refined_draws,
    refined_probe,
)
from .psis import CONSTANT, Array
from .refine import joined, refine_batch
from .results import Evidence
from .store import PairIdentity, Store, agreed_seed, state_hash
from .streaming import LogMoments
from .task import Task, make_task

__all__ = ["ImportanceSampler"]


class ImportanceSampler:
    """One call of :func:`pyrovae.log_marginal`, which is ``ImportanceSampler(model, guide, x, options).run()``.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        options: what is asked for.

    Raises:
        ValueError: the data, or options that do not fit the pair.
    """

    def __init__(self, model: Program, guide: Program, x: Any, options: ImportanceOptions):
        self.model, self.guide, self.options = model, guide, options
        self.data, self.first = open_pair(model, guide, x, vectorize_particles=options.vectorize_particles)
        self.info, self.device = self.first.info, self.first.device
        check_precision(options.precision, self.device)
        if self.first.whole is not None and options.target_se is not None:
            raise ValueError(
                "target_se must be None for a pair that is tied to one set of data, of which none can stop before the others: "
                "leave it out."
            )
        self.eps = torch.finfo(self.first.dtype).eps
        nesting, vectorize = self.info.max_plate_nesting, options.vectorize_particles
        self._draw_plain = (
            prior_draws(model, vectorize, nesting) if options.kind == "prior" else guide_draws(model, guide, vectorize, nesting)
        )
        self._probe_errors: list[str] = []
        self._task: Task | None = None
        self._why_unfitted: str | None = None
        self._chunks_drawn, self._next_recheck = 0, planning.CHUNKS_TO_RECHECK

    def run(self) -> Evidence:
        """Score all data."""
        self.plan()
        self.store = self._open_store()
        with self._scoring() as bar:
            start = 0
            for batch in self.data:
                if self.store.wants(start, batch):
                    self.store.add(start, self.score(start, batch, bar))
                    bar.set_postfix_str(f"{self.store.mean:.2f} nats/datum")
                start += len(batch[0])
        return self.finish(start)

    def plan(self) -> None:
        """Divide the draws into chunks, and stage what draws one.

        Raises:
            ValueError: the data are not those of the refinement that is the proposal.
        """
        self._plan = make_plan(self.options, self.model, self.guide, self.data, self.first, self._staged_draw)
        self.data.batch_size = self._plan.batch_size
        refinement = self.options.refinement
        if refinement is not None and (self.data.loader is not None or self.data.num_data != len(refinement)):
            raise ValueError(
                f"x must be the {len(refinement)} data of the refinement in their order: pass the same data, as arrays."
            )
        backend = "inductor" if self._plan.compile else "eager"
        threads = self._plan.threads
        programs, own_draws = (self.model, self.guide), ("prior" if self.options.kind == "prior" else "guide")
        name = (self.options.vectorize_particles, self.info.max_plate_nesting)
        self.staged = Staged(self._staged_draw, backend, self.options.precision, threads, programs, keep=(own_draws, *name))
        # So few draws repay a capture at most: Inductor takes longer to compile than it saves.
        many = (self.data.num_data or 0) * self._plan.num_probes >= planning.PROBES_TO_CAPTURE
        probe_backend = "native" if self._plan.compile and many else "eager"
        self.staged_probe = Staged(
            self._probe_plain, probe_backend, threads=threads, programs=programs, keep=(f"beside {own_draws}", *name)
        )
        if self.options.kind == "auto":
            own: Any = {"draw_guide": self._submit_staged, "probe": self._probe, "finish": self._finish_part}
            self._task, self._why_unfitted = make_task(*programs, self.first, self.options, self._plan, **own)

    def _open_store(self) -> Store:
        """What keeps the groups that have been scored. The names of the settings are those of files."""
        options, refinement = self.options, self.options.refinement
        settings: dict[str, Any] = {
            "num_samples": options.num_samples,
            "proposal": str(options.kind),
            "chunk": self._plan.chunk,
            "num_dims": self.info.num_dims,
            "target_se": options.target_se,
            "precision": options.precision,
            "num_prior": self._plan.num_prior,
            "given": list(self.info.given),
        }
        if refinement is not None:
            parts = (refinement.loc, refinement.scale_tril, refinement.shares)
            settings["refinement"] = content_hash(torch.as_tensor(part) for part in parts)
        pair = None if options.resume is None else PairIdentity.of(self.model, self.guide, self.first, one_datum(self.first))
        store = Store(options.resume, agreed_seed(options.seed), settings, pair, chosen=options.seed is not None)
        store.compare(settings | {"parameters": state_hash(self.model, self.guide, self.first), "seed": options.seed})
        return store

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[tqdm]:
        """Evaluation mode, a random stream of our own, and the progress bar."""
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.no_grad(),
            evaluation_mode(self.model, self.guide),
            torch.random.fork_rng(devices),
            contextlib.closing(self.staged),
            contextlib.closing(self.staged_probe),
            products_in(self.options.precision, self.device),
            tqdm(total=self.data.num_data, desc="log p(x)", unit="datum", disable=not self.options.progress) as bar,
        ):
            yield bar

    def score(self, start: int, batch: Batch, bar: tqdm) -> dict[str, Array]:
        """The answer for one group of data, as arrays over them."""
        kind, seed = self.options.kind, self.store.seed_of(start)
        info = inspect_pair(self.model, self.guide, *batch)
        if kind in ("guide", "mixture", "auto"):
            refuse_no_weights(info.no_weights)
        described = scored_data(info, batch)
        torch.manual_seed(seed)
        if self._chunks_drawn >= self._next_recheck:
            self.staged.recheck(f"from datum {start} on")
            self._next_recheck = 2 * self._chunks_drawn
        if self._task is not None and self._task.terms is not None and (start // self._plan.group).bit_count() == 1:
            self._task.terms.recheck(f"from datum {start} on")
        covered = None
        if kind in ("guide", "auto"):
            vectorize = self.options.vectorize_particles
            covered = covered_data(self.model, self.guide, batch, **self.info.layout, vectorize=vectorize)
        with pyro.validation_enabled(False):
            if self._task is not None:
                covers = np.ones(info.num_data, bool) if covered is None else covered.cpu().numpy()
                arrays = Ladder(self._task, batch, covers).run()
                bar.update(info.num_data)
                return arrays | described
            group = Group(start, batch, self._refinement_of(start, batch))
            arrays = self._estimate(group, bar)
            if self._plan.num_probes and not (kind == "prior" and self.info.no_weights):
                # A random stream of its own, independent of how much the draws took of theirs.
                torch.manual_seed(seed + 1)
                arrays["missed"] = self._missed(group, arrays)
        if covered is not None:
            arrays["covered"] = covered.cpu().numpy()
        return arrays | described

    def _refinement_of(self, start: int, batch: Batch) -> Refinement | None:
        """The proposal of a group, if the proposal is fitted."""
        if self.options.refinement is not None:
            return self.options.refinement.rows(np.arange(start, start + len(batch[0])))
        if self._plan.refine is None:
            return None
        vectorize = self.options.vectorize_particles
        blocks = zip(*(array.split(self._plan.refined_rows) for array in batch), strict=True)
        return joined([refine_batch(self.model, self.guide, block, self._plan.refine, vectorize) for block in blocks])

    def _estimate(self, group: Group, bar: tqdm) -> dict[str, Array]:
        """The estimates for a group, from as many fresh draws of each datum as its pilot decided on."""
        arrays: dict[str, Array] = {}
        wanted, pilot = self._pilot(group)
        for until in np.unique(wanted).tolist():
            active = torch.from_numpy(np.flatnonzero(wanted == until))
            first = None if self.options.target_se is None else self._plan.checks[0]
            for rows, moments in self.reduce(group, active, self._moments(group), until, first):
                # Each part is finished at once, while other threads still draw.
                for name, part in self._finish_part(moments).items():
                    place = arrays.setdefault(name, np.empty((len(group), *part.shape[1:]), part.dtype))
                    place[rows.numpy()] = part
                bar.update(len(rows))
        arrays["pilot"] = pilot
        return arrays

    def _moments(self, group: Group) -> LogMoments:
        return LogMoments(len(group), self.options.num_samples, self.device, curve=True)

    def _pilot(self, group: Group) -> tuple[Array, Array]:
        """How many draws each datum's estimate shall be from, and how many were made to decide on that."""
        options, checks = self.options, self._plan.checks
        wanted, pilot = np.full(len(group), options.num_samples), np.zeros(len(group), np.int64)
        if options.target_se is None:
            return wanted, pilot
        sizes, active, moments = pilot_sizes(checks), torch.arange(len(group)), self._moments(group)
        for size in sizes:
            undecided = []
            for chosen, part in self.reduce(group, active, moments, size, sizes[0]):
                number = needed_draws(part, options.target_se, bool(self.info.discrete))
                enough = np.array(checks)[np.searchsorted(checks[:-1], number)]
                rows, decided = chosen.numpy(), (enough <= REACH * size) | (number >= 2 * options.num_samples)
                wanted[rows[decided]] = enough[decided]
                pilot[rows] = size
                undecided.append(chosen[torch.from_numpy(~decided)])
            active, moments.num_drawn = torch.cat(undecided), size
            if not len(active):
                break
        return wanted, pilot

    def draw(self, group: Group, parts: list[tuple[Tensor, int]], done: int, step: int) -> Iterator[Tensor]:
        """Log-weights of each part of a group in turn, ``step`` draws for each of its data in blocks (size, B), float64.

        Args:
            group: the data.
            parts: rows of the group that draw together, and how many draws each takes at once.
            done: draws that they have had before, by which a mixture divides the next ones.
            step: draws for each row.
        """

        def calls() -> Iterator[Callable[[], Tensor]]:
            for rows, most in parts:
                place = rows.to(self.device, non_blocking=True)
                submit, batch = self._submit(group, rows, done), tuple(array[place] for array in group.batch)
                yield from (submit(batch, size) for size in chunk_sizes(step, most))

        return ahead(calls(), self._num_ahead)

    @property
    def _num_ahead(self) -> int:
        """Chunks that are submitted before the first is waited for."""
        return self._plan.threads + 2 if self._plan.threads > 1 else 0

    def _submit(self, group: Group, rows: Tensor, done: int) -> Callable[[Batch, int], Callable[[], Tensor]]:
        """What starts to draw log-weights of some rows of a group, and returns the function that waits for them."""
        model, guide, vectorize = self.model, self.guide, self.options.vectorize_particles
        if self.options.kind == "mixture":
            nesting, numbers = self.info.max_plate_nesting, (self.options.num_samples, self._plan.num_prior)
            draw: Draw = mixture_draws(model, guide, vectorize, nesting, *numbers, done)
        elif group.refinement is not None:
            draw = refined_draws(model, guide, group.refinement.rows(rows.numpy()), vectorize)
        else:
            return self._submit_staged
        return lambda batch, size: partial(draw, batch, size)

    def _submit_staged(self, batch: Batch, size: int) -> Callable[[], Tensor]:
        self._chunks_drawn += 1
        value = self.staged.submit(torch.empty(size, 0, device=self.device), *batch)
        return lambda: value()[0]

    def _staged_draw(self, length: Tensor, *batch: Tensor) -> tuple[Tensor]:
        # Graphs are captured for a shape, so the number of samples is passed as the length of an empty tensor.
        return (self._draw_plain(batch, len(length)),)

    def reduce(
        self, group: Group, active: Tensor, moments: LogMoments, until: int, first: int | None
    ) -> Iterator[tuple[Tensor, LogMoments]]:
        """Draw until the active rows of a group have ``until`` draws; yield rows and their sums as they are complete.

        Args:
            group: the data.
            active: the rows, by their numbers.
            moments: the sums of all rows of the group so far, which are written to.
            until: draws that each active row shall have.
            first: the smallest number of draws that is used; see :func:`~pyrovae.evidence.planning.parts_of`.
        """
        done, plan = moments.num_drawn, self._plan
        step = until - done
        parts = list(parts_of(active, step, plan.chunk, first, plan.group, plan.whole))
        blocks = self.draw(group, parts, done, step)
        for run in runs_of(parts, step, plan.reduced):
            rows = torch.cat([chosen for chosen, _ in run])
            part = moments.rows(rows)
            part.extend(side_by_side(blocks, run, step), until)
            moments.put(rows, part)
            yield rows, part

    def _finish_part(self, moments: LogMoments) -> dict[str, Array]:
        return finished(moments, self.eps)

    def _probe(self, batch: Batch, largest: Array, log_px: Array) -> Array:
        """What the guide missed of some data, in nats; nothing if there are too few samples to ask."""
        if not self._plan.num_probes:
            return np.zeros(len(log_px))
        return self._missed(Group(0, batch, None), {"largest": largest, "log_px": log_px})

    def _missed(self, group: Group, arrays: dict[str, Array]) -> Array:
        """What the proposal missed of each datum of a group, by draws of the prior or the guide, in nats."""
        plan, missed = self._plan, np.full(len(group), math.nan)
        try:
            # A number of rows that divides a group, so that there is one shape to capture; draws of half a chunk stay nearer to
            # a cache.
            rows_at_once = 1 << (max(1, plan.chunk // 2 // plan.num_probes).bit_length() - 1)
            chunk = min(plan.chunk, rows_at_once * plan.num_probes)
            parts = list(parts_of(torch.arange(len(group)), plan.num_probes, chunk, None, plan.group, plan.whole))
            with self.staged.all_threads() if self.staged_probe.backend == "eager" else contextlib.nullcontext():
                blocks = ahead(self._probe_calls(group, parts), self._num_ahead)
                for chosen, most in parts:
                    rows, own = chosen.numpy(), [next(blocks) for _ in chunk_sizes(plan.num_probes, most)]
                    joint = Probe(*(torch.cat(columns).cpu() for columns in zip(*own, strict=True)))
                    largest, log_px = (torch.from_numpy(arrays[name][rows]) for name in ("largest", "log_px"))
                    missed[rows] = missed_nats(joint, largest, log_px, CONSTANT).numpy()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # The prior may have no sampler, the guide no density there, and a network no answer; the pair may be valid.
            self._probe_errors.append(str(error) or type(error).__name__)
        return missed

    def _probe_calls(self, group: Group, parts: list[tuple[Tensor, int]]) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        for chosen, most in parts:
            batch, submit = tuple(array[chosen] for array in group.batch), self._submit_probe
            if group.refinement is not None:
                refinement, vectorize = group.refinement.rows(chosen.numpy()), self.options.vectorize_particles
                submit = partial(partial, refined_probe(self.model, self.guide, refinement, vectorize))
            yield from (submit(batch, size) for size in chunk_sizes(self._plan.num_probes, most))

    def _submit_probe(self, batch: Batch, size: int) -> Callable[[], tuple[Tensor, ...]]:
        return self.staged_probe.submit(torch.empty(size, 0, device=self.device), *batch)

    def _probe_plain(self, length: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        other = guide_probe if self.options.kind == "prior" else prior_probe
        draw = other(self.model, self.guide, self.options.vectorize_particles, self.info.max_plate_nesting)
        return tuple(draw(batch, len(length)))  # a graph returns no named tuple

    def finish(self, num_data: int) -> Evidence:
        """The evidence, from all groups of all processes."""
        options, info = self.options, self.info
        scored = self.store.gathered(num_data)
        drawn, pilot, _ = (scored.pop(name) for name in ("drawn", "pilot", "largest"))
        sums, squares = scored.pop("curve_sum").T, scored.pop("curve_square").T
        curve = curve_of(sums, squares, scored["elbo"], options.num_samples, drawn)
        fields = evidence_fields([{name: scored.pop(name) for name in SCORED_DATA}], info.given)
        if info.discrete and set(info.discrete) == set(info.latents):
            # Weights with finitely many values have no Pareto tail to smooth.
            scored["log_px_psis"] = scored["log_px"].copy()
        missed = scored.pop("missed", None)
        if missed is not None and info.discrete:
            # A value that was never drawn leaves no trace in the weights, and the prior was not asked.
            scored["khat"][np.isnan(missed) & np.isneginf(scored["khat"])] = math.nan
        notes: dict[str, Any] = {} if options.target_se is None else {"target_se": float(options.target_se)}
        notes |= {"prior_not_asked": self._probe_errors[0]} if self._probe_errors else {}
        notes |= {} if options.precision == "float32" else {"precision": options.precision}
        decided = options.target_se is not None or options.kind == "auto"
        if self._why_unfitted is not None:
            notes["not_refined"] = self._why_unfitted
        return Evidence(
            **scored,
            **fields,
            curve=curve,
            num_samples=options.num_samples,
            method=KINDS[options.kind].method,
            drawn=drawn if decided else None,
            pilot=pilot if decided else None,
            missed=None if missed is None or np.isnan(missed).all() else missed,
            notes=notes,
        )

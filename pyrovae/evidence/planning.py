"""What importance sampling is asked for, and the plan of its draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch

from .._validation import positive_integer, unknown
from ..compile.cuda import free_memory
from ..compile.graph import largest_value
from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.inspect import FirstBatch
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode
from ..programs.unconstrained import UnconstrainedPair
from .kinds import PROPOSALS
from .proposals import Kind, Refinement, prior_count
from .psis import CONSTANT, FEWEST_SAMPLES
from .refine import RefineOptions, rows_at_once, usual_options
from .streaming import LogMoments

__all__ = [
    "CHUNK_NUMBERS",
    "GROUP",
    "Group",
    "ImportanceOptions",
    "Plan",
    "make_plan",
    "needed_draws",
    "num_probes",
    "one_datum",
    "pilot_sizes",
    "stopping_checks",
]

# Observed numbers in a chunk. With a decoder's output of more than 32 MB every temporary is mapped anew, which is slower than
# many small chunks.
CHUNK_NUMBERS = 2**22
# A compiled chunk has no overhead of Python to spread over many numbers, and is fastest if its widest value stays in a cache.
COMPILED_CHUNK_NUMBERS = 2**21
# Lower limits on the width that chunks are sized by, eager and compiled. Larger chunks bring no speed, and compiled ones would
# make seeded runs differ more.
SMALLEST_WIDTH, SMALLEST_COMPILED_WIDTH = 256, 150
# Draws of the graph that shows how wide its values are.
SIZING_DRAWS = 1000
# Temporaries of a chunk's size that a decoder and its likelihood hold at once.
TEMPORARIES = 6
# Bytes that a chunk's temporaries may fill on a CPU.
USUAL_MEMORY = 2**29
# Data that are validated, seeded, smoothed and stored together.
GROUP = 256
# Log-weights of several data that are reduced together, since a reduction is many small operations.
REDUCED_JOINTLY = 2**16
# On a GPU launches cost more than memory: larger groups, all of whose data are scored together, in chunks that take up to this
# fraction of the free memory.
GPU_GROUP, GPU_REDUCED, GPU_PAIRS, GPU_MEMORY_FRACTION = 2048, 2**24, 2**19, 0.25
# Chunks that repay the 5 to 20 seconds of Inductor.
CHUNKS_TO_COMPILE = 300
# Chunks after which a captured graph is compared with the program again, on other data; then after twice as many, and so on. A
# comparison takes as long as some six compiled chunks.
CHUNKS_TO_RECHECK = 1000
# Draws of the prior, over all data, that repay the capture of a graph.
PROBES_TO_CAPTURE = 2**16
# If there is a target for the standard error, the fewest draws that an estimate is from. Other numbers of draws are this times
# a power of two.
MIN_DRAWS = 250
# A pilot of n draws decides on numbers of draws up to REACH times n.
REACH = 4
# One draw of the prior is scored for every PROBE_EVERY draws of the proposal, and at least and at most these many. Of few draws
# twice as many are, up to USUAL_PROBES: sixteen show too little of a mode with a third of the posterior.
PROBE_EVERY, FEWEST_PROBES, MOST_PROBES = 80, 16, 256
PROBE_FEW_EVERY, USUAL_PROBES = 32, 64


@dataclass(frozen=True)
class ImportanceOptions:
    """The options of :func:`pyrovae.log_marginal`, checked.

    Raises:
        ValueError: an option is none that it can be; the message says what it must be.

    Example:
        >>> from pyrovae.evidence.planning import ImportanceOptions
        >>> ImportanceOptions(num_samples=100, proposal="prior").kind
        'prior'
    """

    num_samples: int = 5000
    target_se: float | None = None
    proposal: Kind | Refinement = "guide"
    prior_share: float = 0.1
    chunk_size: int | None = None
    max_memory: float | None = None
    vectorize_particles: bool = True
    compile: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    seed: int | None = None
    resume: str | Path | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse what an option cannot be."""
        object.__setattr__(self, "num_samples", positive_integer(self.num_samples, "num_samples"))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", positive_integer(self.chunk_size, "chunk_size"))
        if self.target_se is not None and not (isinstance(self.target_se, int | float) and 0 < self.target_se < math.inf):
            raise ValueError(f"target_se must be a positive number of nats or None, got {self.target_se!r}.")
        if not (self.max_memory is None or (isinstance(self.max_memory, int | float) and self.max_memory > 0)):
            raise ValueError(f"max_memory must be a positive number of MiB, got {self.max_memory!r}.")
        if self.kind not in PROPOSALS:
            raise ValueError(unknown("proposal", self.kind, PROPOSALS))
        if self.kind == "mixture" and not 0 < self.prior_share < 1:
            raise ValueError(f"prior_share must be between 0 and 1, got {self.prior_share!r}.")
        if self.kind == "mixture" and self.num_samples < 2:
            raise ValueError("num_samples must be at least 2 for a mixture, one of the prior and one of the guide, got 1.")
        if self.precision == "bfloat16" and not self.compiles:
            raise ValueError(
                f'precision="bfloat16" must be used with a proposal that is compiled, "guide", "prior" or "auto", got '
                f"proposal={self.kind!r}: leave precision out."
            )

    @property
    def kind(self) -> Kind:
        """The kind of the proposal."""
        return "refined" if isinstance(self.proposal, Refinement) else self.proposal

    @property
    def refinement(self) -> Refinement | None:
        """The refinement that was passed as the proposal."""
        return self.proposal if isinstance(self.proposal, Refinement) else None

    @property
    def compiles(self) -> bool:
        """Whether draws from this proposal can be compiled."""
        return self.kind in ("guide", "prior", "auto")

    @property
    def typical_draws(self) -> int:
        """How many draws to expect for a datum."""
        return self.num_samples if self.target_se is None else min(self.num_samples, 4 * MIN_DRAWS)


@dataclass(frozen=True)
class Plan:
    """How one call of :func:`pyrovae.log_marginal` divides its draws.

    Attributes:
        batch_size: data that are loaded at once, a whole number of groups' parts.
        group: data that are seeded, smoothed and stored together.
        whole: how many data have to run together, if the pair is tied to one set of data.
        chunk: (sample, datum) pairs that are scored at once.
        compile: whether the scoring of a chunk is compiled.
        threads: compiled chunks that run at the same time.
        reduced: log-weights of several data that are reduced together.
        checks: the numbers of draws that an estimate may be from, ascending.
        num_prior: draws of a mixture that come from the prior.
        num_probes: draws for each datum, not the proposal's own, that show what it misses.
        refine: the options by which each datum's proposal is fitted, if it is.
        refined_rows: data that are refined together.
    """

    batch_size: int
    group: int
    whole: int | None
    chunk: int
    compile: bool
    threads: int
    reduced: int
    checks: list[int]
    num_prior: int
    num_probes: int
    refine: RefineOptions | None
    refined_rows: int


@dataclass(frozen=True)
class Group:
    """Data that are scored together.

    Attributes:
        start: the number of the first of them.
        batch: the arrays, one for each argument of the programs.
        refinement: the proposal that was fitted to them, if there is one.
    """

    start: int
    batch: Batch
    refinement: Refinement | None

    def __len__(self) -> int:
        """How many data there are."""
        return len(self.batch[0])


def num_probes(options: ImportanceOptions) -> int:
    """Draws of the prior, or of the guide if the prior is the proposal, scored beside it; none if samples are too few."""
    if options.kind == "mixture" or options.num_samples < FEWEST_SAMPLES:
        return 0
    fewest = max(min(options.typical_draws // PROBE_FEW_EVERY, USUAL_PROBES), FEWEST_PROBES)
    return min(max(options.typical_draws // PROBE_EVERY, fewest), MOST_PROBES)


def stopping_checks(num_samples: int, target_se: float | None, every: int) -> list[int]:
    """The numbers of draws that a datum's estimate may be from, up to ``num_samples``; each a multiple of ``every``."""
    if target_se is None:
        return [num_samples]
    checks = [math.ceil(MIN_DRAWS / every) * every]
    while checks[-1] < num_samples:
        checks.append(2 * checks[-1])
    return [*checks[:-1], num_samples]


def pilot_sizes(checks: list[int]) -> list[int]:
    """The numbers of draws at which a pilot may decide on one of several numbers; none if there is only one."""
    pilots = [] if len(checks) == 1 else [math.ceil(checks[0] / REACH)]
    while pilots and 2 * pilots[-1] * REACH < 2 * checks[-1]:
        pilots.append(2 * pilots[-1])
    return pilots


def needed_draws(moments: LogMoments, target_se: float, discrete: bool) -> np.ndarray:
    """How many draws the target error takes by a pilot's weights, with a margin of a fifth, shape (N,)."""
    drawn, se, log_sum = moments.num_drawn, moments.finish().se, moments.log_sum.cpu().numpy()
    number = 1.2 * drawn * (se / target_se) ** 2
    if discrete:
        # All draws may have the same value, which says nothing of the others.
        number[se * math.sqrt(drawn) <= CONSTANT] = math.inf
    # Later weights may be positive if all are zero so far, but a sum that is NaN or infinite stays so.
    lost = np.isnan(log_sum) | (log_sum == math.inf)
    return np.where(lost, 0.0, np.nan_to_num(number, nan=math.inf, posinf=math.inf))


def make_plan(
    options: ImportanceOptions, model: Program, guide: Program, data: Batches, first: FirstBatch, draw: Callable[..., Any]
) -> Plan:
    """Divide the draws into chunks, and the data into groups.

    Args:
        options: what is asked for.
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        data: what is scored.
        first: what the first run of the pair settled.
        draw: the function that is compiled: of an empty tensor, whose length is the number of samples, and a batch.
    """
    whole, on_gpu, cpu = first.whole, _on_gpu(first.device), first.device.type == "cpu"
    group, reduced = (GPU_GROUP, GPU_REDUCED) if on_gpu else (GROUP, REDUCED_JOINTLY)
    compile = _compile(options, data, _width(first))
    # Compiled chunks run at the same time, one on each thread: a chunk's small operations would not keep several busy.
    threads = torch.get_num_threads() if compile and options.compiles and cpu else 1
    chunk = options.chunk_size
    if chunk is None:
        usual = GPU_PAIRS if on_gpu else (COMPILED_CHUNK_NUMBERS if compile else CHUNK_NUMBERS) // _width(first)
        if compile and options.compiles and cpu:
            with torch.no_grad(), evaluation_mode(model, guide), pyro.validation_enabled(False):
                usual = COMPILED_CHUNK_NUMBERS // _widest_value(draw, first)
        chunk = max(1, min(usual, _affordable(options, first, on_gpu) // threads))
    num_prior = prior_count(options.num_samples, options.prior_share) if options.kind == "mixture" else 0
    every = options.num_samples // math.gcd(options.num_samples, num_prior)
    checks = stopping_checks(options.num_samples, options.target_se, every)
    rows = whole or min(max(1, chunk // checks[0]), group)
    refine = None
    if options.kind == "refined" and options.refinement is None:
        with evaluation_mode(model, guide):
            pair = UnconstrainedPair(model, guide, one_datum(first), vectorize_particles=options.vectorize_particles)
            refine = usual_options(pair.num_latents)
        # A step of a fit costs as much for one datum as for many.
        rows *= max(1, rows_at_once(first.info.num_dims, refine) // rows)
    return Plan(
        batch_size=whole or math.ceil(group / rows) * rows,
        group=group,
        whole=whole,
        chunk=chunk,
        compile=compile,
        threads=threads,
        reduced=reduced,
        checks=checks,
        num_prior=num_prior,
        num_probes=num_probes(options),
        refine=refine,
        refined_rows=whole or rows,
    )


def one_datum(first: FirstBatch) -> Batch:
    """One datum of the first batch; all of them if they have to run together."""
    return first.args if first.whole is not None else tuple(array[:1] for array in first.args)


def _width(first: FirstBatch) -> Any:
    """Observed numbers of a datum, as chunks are sized by them."""
    return max(first.info.num_dims, SMALLEST_WIDTH)


def _compile(options: ImportanceOptions, data: Batches, width: Any) -> bool:
    """Whether to compile the scoring of a chunk."""
    if options.compile != "auto":
        return bool(options.compile)
    numbers = (data.num_data or 0) * options.typical_draws * width
    return options.precision == "bfloat16" or numbers >= CHUNKS_TO_COMPILE * CHUNK_NUMBERS


def _widest_value(draw: Callable[..., Any], first: FirstBatch) -> Any:
    """Numbers for each draw of the widest value of a graph."""
    number = largest_value(draw, torch.empty(SIZING_DRAWS, 0, device=first.device), *one_datum(first))
    return _width(first) if number is None else max(number // SIZING_DRAWS, SMALLEST_COMPILED_WIDTH)


def _affordable(options: ImportanceOptions, first: FirstBatch, on_gpu: bool) -> int:
    """(sample, datum) pairs whose temporaries fit in the memory."""
    if options.max_memory is not None:
        memory = options.max_memory * 2**20
    else:
        memory = GPU_MEMORY_FRACTION * free_memory(first.device) if on_gpu else USUAL_MEMORY
    return int(memory / (TEMPORARIES * _width(first) * torch.finfo(first.dtype).bits / 8))


def _on_gpu(device: torch.device) -> bool:
    """Whether launches cost more than memory."""
    return device.type == "cuda"

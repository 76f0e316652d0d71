"""log p(x) by importance sampling: per datum, exactly as many samples as asked, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .data import Batch, Batches, arguments
from .evidence import Evidence, curve_of, curve_sizes, pareto_smooth, tail_size
from .pairs import first_run, inspect_pair
from .proposals import (
    METHODS,
    Draw,
    Kind,
    Options,
    Refinement,
    guide_draws,
    mixture_draws,
    prior_draws,
    refine_batch,
    refined_draws,
    rows_at_once,
)
from .registry import positive_integer, unknown
from .staging import Staged
from .traces import Program, evaluation_mode

# A chunk of decoder output past 32 MB makes every temporary a fresh mapping, which is slower than many small chunks. A
# compiled chunk has no Python to repay, and is fastest where its output stays in a cache.
CHUNK_NUMBERS, COMPILED_CHUNK_NUMBERS = 2**22, 2**20
# Data that are validated, seeded, smoothed and stored together.
GROUP = 256
# Temporaries of a chunk's size that a decoder and its likelihood hold at once.
TEMPORARIES = 6
# Log-weights of a datum that are summed at once: the sums are many small operations, a tenth of a compiled chunk's time.
REDUCED_AT_ONCE = 2**13
# Inductor's 5 to 20 seconds are repaid by so many chunks.
CHUNKS_TO_COMPILE = 1000


def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 5000,
    proposal: Kind | Refinement = "guide",
    prior_share: float = 0.1,
    chunk_size: int | None = None,
    max_memory: float = 512.0,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Importance-sampled log p(x) of every datum, with what tells whether to believe it.

    .. math:: \log \hat p(x) = \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{r(z_s \mid x)}, \qquad z_s \sim r(z \mid x)

    The proposal r is

    - ``"guide"``: q(z|x) as the guide declares it;
    - ``"prior"``: p(z), so that the weights are likelihoods: the naive estimator, hopeless where x says much about z;
    - ``"mixture"``: :math:`\alpha p(z) + (1 - \alpha) q(z \mid x)`, whose weights are at most :math:`p(x \mid z) / \alpha` even
      where the guide misses what the model allows (Owen and Zhou 2000). Exactly :math:`\alpha S` of the S draws come from the
      prior, whose error is no larger than the one reported, which takes them for draws of the whole mixture;
    - ``"refined"``: a Student-t of 5 degrees of freedom about a Gaussian of full covariance, which is fitted to each datum from
      where the guide put it; see :func:`pyrovae.refine`, whose result may be given instead of the name, for settings of one's
      own. It has one mode: where the posterior has several, prefer a mixture.

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and the memory
    does not grow with ``num_samples`` beyond its square root. Modules whose bound methods the programs are score in evaluation
    mode; where the programs are functions, call ``eval()`` on their modules first. Where values are missing, it is
    log p(x_obs), and ``num_dims`` the mean number of observed values per datum.

    Where ``torch.distributed`` is initialised, the processes share the data, which each is given whole, and all get the whole
    answer.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a Dataset or a DataLoader.
        num_samples: S, drawn for every datum, no more and no fewer.
        proposal: a name from above, or what :func:`pyrovae.refine` returned for the same data in the same order.
        prior_share: :math:`\alpha`, the share of draws that ``"mixture"`` takes from the prior, rounded to whole draws.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations (4 MB where
            compiled), or fewer where ``max_memory`` asks for it.
        max_memory: MiB that a chunk's temporaries may fill, by their estimated number.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: capture and compile the scoring of a chunk (:mod:`pyrovae.staging`), for proposals from guide and prior;
            ``"auto"`` does so from a thousand chunks of the default size on. The draws are the same either way, for one
            ``chunk_size``; by default a compiled chunk is a quarter of an eager one.
        seed: makes the estimate reproducible, by how many processes it is made and however often it was interrupted; the global
            random stream is left alone. Without one, a seed is drawn from that stream.
        resume: a file that keeps what has been scored; an interrupted call goes on from it when made again.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats, with arrays over the N data; its ``elbo`` is that of the proposal.

    Raises:
        ValueError: bad data or options, a proposal that the pair has no density for, or a pair that
            :func:`pyrovae.log_weights` refuses, or a ``resume`` file of another evaluation.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. Vehtari et al., Pareto smoothed importance
        sampling, 2024. Owen and Zhou, Safe and Effective Importance Sampling, 2000.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> evidence = pv.log_marginal(vae.model, vae.guide, torch.zeros(5, 9), num_samples=100, seed=0)
        >>> evidence.log_px.shape, evidence.num_samples
        ((5,), 100)
    """
    num_samples = positive_integer(num_samples, "num_samples")
    if not (isinstance(max_memory, int | float) and max_memory > 0):
        raise ValueError(f"max_memory is a positive number of MiB, not {max_memory!r}.")
    given = proposal if isinstance(proposal, Refinement) else None
    kind = "refined" if isinstance(proposal, Refinement) else proposal
    if kind not in METHODS:
        raise ValueError(unknown("proposal", kind, METHODS))
    if kind == "mixture" and not 0 < prior_share < 1:
        raise ValueError(f"prior_share lies between 0 and 1, not {prior_share!r}.")
    if kind == "mixture" and num_samples < 2:
        raise ValueError("A mixture takes at least two samples, one of the prior and one of the guide.")
    first = first_run(model, guide, *arguments(model, next(iter(Batches(x, batch_size=1)))))
    info, dtype, device = first.info, first.dtype, first.device
    nesting = info.max_plate_nesting
    if info.scale != 1.0:
        raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
    width = max(info.num_dims, 256)
    affordable = int(max_memory * 2**20 / (TEMPORARIES * width * torch.finfo(dtype).bits / 8))
    data = Batches(x, batch_size=GROUP, dtype=dtype, device=device)
    if compile == "auto":
        compile = (data.num_data or 0) * num_samples * width >= CHUNKS_TO_COMPILE * CHUNK_NUMBERS
    usual = (COMPILED_CHUNK_NUMBERS if compile else CHUNK_NUMBERS) // width
    chunk = max(1, min(usual, affordable)) if chunk_size is None else positive_integer(chunk_size, "chunk_size")
    rows = min(max(1, chunk // num_samples), GROUP)
    # As even as can be, so that one compiled graph serves all chunks of a datum.
    most = math.ceil(num_samples / math.ceil(num_samples / max(1, chunk // rows)))
    options = Options(covariance="full", tail_df=5.0)
    # Steps of a fit cost for one datum as much as for many.
    together = max(1, rows_at_once(info.num_dims, options) // rows) * rows if kind == "refined" and given is None else rows
    data.batch_size = math.ceil(GROUP / together) * together
    if given is not None and (data.loader is not None or data.num_data != len(given)):
        raise ValueError(f"The refinement is of {len(given)} data in their order: give the same data, as arrays.")
    plain = (
        prior_draws(model, vectorize_particles, nesting)
        if kind == "prior"
        else guide_draws(model, guide, vectorize_particles, nesting)
    )
    staged = _staged(plain, device, compile)

    def pieces(batch: Batch, start: int) -> Iterator[tuple[Batch, Draw]]:
        """A group in parts of at most one chunk, each with what draws its log-weights."""
        for begin in range(0, len(batch[0]), together):
            block = tuple(array[begin : begin + together] for array in batch)
            fitted = given.rows(start + begin, len(block[0])) if given else None
            if kind == "refined" and fitted is None:
                fitted = refine_batch(model, guide, block, options, vectorize_particles)
            for row in range(0, len(block[0]), rows):
                part = tuple(array[row : row + rows] for array in block)
                if fitted is not None:
                    yield part, refined_draws(model, guide, fitted.rows(row, rows), vectorize_particles)
                elif kind == "mixture":
                    yield part, mixture_draws(model, guide, vectorize_particles, nesting, num_samples, prior_share)
                else:
                    yield part, staged

    settings = {"num_samples": num_samples, "proposal": str(kind), "chunk": chunk, "num_dims": info.num_dims}
    store = _Store(resume, _agreed_seed(seed), settings)
    generator_devices = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        evaluation_mode(model, guide),
        torch.random.fork_rng(generator_devices),
        tqdm(total=data.num_data, desc="log p(x)", unit="datum", disable=not progress) as bar,
    ):
        start = 0
        for batch in data:
            batch = arguments(model, batch)
            if store.wants(start, batch):
                observed = inspect_pair(model, guide, *batch).num_observed
                torch.manual_seed(store.seed_of(start))
                parts = []
                with pyro.validation_enabled(False):
                    for part, draw in pieces(batch, start):
                        parts.append(_score(draw, part, num_samples, most))
                        bar.update(len(part[0]))
                arrays = {name: torch.cat([each[name] for each in parts]).cpu().numpy() for name in parts[0]}
                tail = arrays.pop("tail")
                smoothed = pareto_smooth(tail, arrays["log_px"], num_samples, precision=torch.finfo(dtype).eps)
                arrays["khat"], arrays["log_px_psis"] = smoothed
                arrays["observed"] = np.full(len(batch[0]), observed / len(batch[0]))
                store.add(start, arrays)
                bar.set_postfix_str(f"{store.mean:.2f} nats/datum")
            start += len(batch[0])
    scored = store.gathered()
    curve = curve_of(scored.pop("curve_sum").T, scored.pop("curve_square").T, scored["elbo"], num_samples)
    num_dims = float(scored.pop("observed").mean())
    num_dims = round(num_dims) if math.isclose(num_dims, round(num_dims), rel_tol=1e-12) else num_dims
    return Evidence(**scored, curve=curve, num_samples=num_samples, num_dims=num_dims, method=METHODS[kind])


def _staged(draw: Draw, device: torch.device, compile: bool) -> Draw:
    """The same draws from one graph; the number of samples travels as the length of an empty tensor, as graphs go by shape."""
    staged = Staged(lambda length, *batch: (draw(batch, len(length)),), "inductor" if compile else "eager")
    return lambda batch, size: staged(torch.empty(size, 0, device=device), *batch)[0]


def _agreed_seed(seed: int | None) -> int:
    """The seed, or one from the global stream; the same in all processes."""
    chosen = [int(torch.randint(2**62, ())) if seed is None else int(seed)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


class _Store:
    """Groups of data that have been scored: here, in other processes, and in a file from before."""

    def __init__(self, path: str | Path | None, seed: int, settings: dict[str, Any]):
        self.path, self.seed, self.settings = None if path is None else Path(path), seed, settings
        self.groups: dict[int, dict[str, np.ndarray]] = {}
        self.sums: dict[str, float] = {}
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)
        if self.path is not None and self.world > 1:
            self.path = self.path.with_name(f"{self.path.stem}.{self.rank}of{self.world}{self.path.suffix}")
        self.turn = itertools.count()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        arrays, notes = checkpoint.read_arrays(path)
        kept = notes.get("scored")
        if not isinstance(kept, dict) or kept.get("settings") != self.settings:
            raise ValueError(f"{path} keeps another evaluation: remove it, or resume from a file of its own.")
        self.seed, self.sums = int(kept["seed"]), kept["sums"]
        for name, tensor in arrays.items():
            start, _, field = name.partition(".")
            self.groups.setdefault(int(start), {})[field] = tensor.numpy()

    def seed_of(self, start: int) -> int:
        """The seed of the group that starts there: the same whatever was scored before it."""
        return int(np.random.SeedSequence([self.seed, start]).generate_state(1, np.uint64)[0] >> 1)

    def wants(self, start: int, batch: Batch) -> bool:
        """Whether this process has to score the group that starts there."""
        mine = next(self.turn) % self.world == self.rank
        held = float(sum(array.double().sum() for array in batch))
        if self.sums.setdefault(str(start), held) != held:
            raise ValueError(f"{self.path} keeps an evaluation of other data: remove it, or resume from a file of its own.")
        return mine and start not in self.groups

    def add(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a group's answer."""
        self.groups[start] = arrays
        if self.path is not None:
            flat = {
                f"{start}.{name}": torch.as_tensor(array) for start, held in self.groups.items() for name, array in held.items()
            }
            notes = {"seed": self.seed, "settings": self.settings, "sums": self.sums}
            checkpoint.write_arrays(self.path, flat, {"scored": notes})

    @property
    def mean(self) -> float:
        """Mean estimate over the data so far."""
        return float(np.concatenate([held["log_px"] for held in self.groups.values()]).mean())

    def gathered(self) -> dict[str, Any]:
        """All groups of all processes, in the data's order."""
        everyone: list[Any] = [self.groups]
        if self.world > 1:
            everyone = [None] * self.world
            torch.distributed.all_gather_object(everyone, self.groups)
        groups: dict[int, dict[str, np.ndarray]] = {start: held for part in everyone for start, held in part.items()}
        ordered = [groups[start] for start in sorted(groups)]
        return {name: np.concatenate([held[name] for held in ordered]) for name in ordered[0]}


def _score(draw: Callable[[Batch, int], Tensor], batch: Batch, num_samples: int, most: int) -> dict[str, Tensor]:
    """One batch: streaming sums of w, w^2 and log w, and the largest weights, which are all that Pareto k needs."""
    zeros = torch.zeros(len(batch[0]), dtype=torch.float64, device=batch[0].device)
    log_sum, log_square, mean, tail = zeros - math.inf, zeros - math.inf, zeros, zeros.new_zeros(0, len(zeros))
    keep, left = tail_size(num_samples), num_samples
    curve: list[tuple[Tensor, Tensor]] = []
    drawn: list[Tensor] = []
    while left:
        drawn.append(draw(batch, min(left, most)))  # (size, B), float64
        left -= len(drawn[-1])
        waiting = sum(map(len, drawn))
        if left and waiting < REDUCED_AT_ONCE:
            continue
        log_w = torch.cat(drawn)
        drawn.clear()
        for head in (count - num_samples + left + waiting for count in curve_sizes(num_samples)[:-1]):
            if 0 < head <= waiting:
                squares = torch.logaddexp(log_square, torch.logsumexp(2 * log_w[:head], 0))
                curve.append((torch.logaddexp(log_sum, torch.logsumexp(log_w[:head], 0)), squares))
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 0))
        log_square = torch.logaddexp(log_square, torch.logsumexp(2 * log_w, 0))
        mean = mean + log_w.sum(0) / num_samples
        tail = torch.cat([tail, log_w])
        tail = torch.topk(tail, min(keep, len(tail)), dim=0).values
    share = torch.exp(log_square - 2 * log_sum)  # sum of squared normalised weights, 1/ESS
    variance = (share - 1 / num_samples).clamp(min=0) * num_samples / (num_samples - 1) if num_samples > 1 else share * math.nan
    return {
        "log_px": log_sum - math.log(num_samples),
        "se": variance.sqrt(),
        "ess": torch.where(log_sum == -math.inf, zeros, 1 / share),
        "elbo": mean,
        "tail": tail.T,
        "curve_sum": torch.stack([*(sums for sums, _ in curve), log_sum], 1),
        "curve_square": torch.stack([*(squares for _, squares in curve), log_square], 1),
    }

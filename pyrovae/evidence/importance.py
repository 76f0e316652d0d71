"""log p(x) by importance sampling: per datum, exactly as many samples as asked, in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from .._validation import positive_integer, unknown
from ..compile.cuda import check_precision, free_memory, products_in
from ..compile.graph import Staged, largest_value
from ..data.batches import Batches, content_hash
from ..data.matching import Batch
from ..programs.checks import refuse_no_weights
from ..programs.coverage import covered_data
from ..programs.inspect import FIRST_ROWS, inspect_pair, prepare
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.tracing import evaluation_mode
from ..programs.unconstrained import UnconstrainedPair
from .measure import SCORED_DATA, evidence_fields, scored_data
from .proposals import (
    METHODS,
    Draw,
    Kind,
    Probe,
    Refinement,
    guide_draws,
    missed_nats,
    mixture_draws,
    prior_count,
    prior_draws,
    prior_probe,
    refined_draws,
    refined_probe,
)
from .psis import CONSTANT, FEWEST_SAMPLES, pareto_smooth, tail_size
from .psis_together import pareto_smooth_together
from .refine import joined, refine_batch, rows_at_once, usual_options
from .results import Evidence, curve_of, curve_sizes
from .store import _agreed_seed, _Pair, _Store

DrawLater = Callable[[Batch, int], Callable[[], Tensor]]
# A chunk of decoder output past 32 MB makes every temporary a fresh mapping, which is slower than many small chunks. A
# compiled chunk has no Python to repay, and is fastest where its largest value stays in a cache.
CHUNK_NUMBERS, COMPILED_CHUNK_NUMBERS = 2**22, 2**21
# Compiled chunks of values that are narrower than this take no more draws: they gain nothing, and seeds would go farther apart.
NARROWEST = 150
# Draws at which a graph is looked at for how wide its values are.
PROBED = 1000
# Data that are validated, seeded, smoothed and stored together.
GROUP = 256
# Temporaries of a chunk's size that a decoder and its likelihood hold at once.
TEMPORARIES = 6
# Log-weights of a datum, and of several data, that are summed at once: the sums are many small operations.
REDUCED_AT_ONCE, REDUCED_JOINTLY = 2**13, 2**16
# A GPU takes all data of a group together, of more data, and pairs by the hundred thousand: launches cost it more than memory,
# of which a chunk may have this share of what is free.
GPU_GROUP, GPU_REDUCED, GPU_PAIRS, GPU_SHARE = 2048, 2**24, 2**19, 0.25
# Inductor's 5 to 20 seconds are repaid by so many chunks.
CHUNKS_TO_COMPILE = 300
# With a target for the standard error, the fewest draws that an estimate is from; others are this times a power of two.
MIN_DRAWS = 250
# A pilot of so many draws decides on a number up to so many times as large.
REACH = 4
# One draw of the prior for so many of the proposal shows what the proposal misses; no fewer and no more than so many.
PROBE_EVERY, FEWEST_PROBES, MOST_PROBES = 64, 16, 256


@in_own_scope()
def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 5000,
    target_se: float | None = None,
    proposal: Kind | Refinement = "guide",
    prior_share: float = 0.1,
    chunk_size: int | None = None,
    max_memory: float | None = None,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
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
      where the guide put it; with three latents or fewer, eight of them, the others fitted from likely draws of the prior, to
      find more modes. With more latents it has one mode: where the posterior has several, prefer a mixture, or give the result
      of :func:`pyrovae.refine` instead of the name, for settings of one's own.

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and the memory
    does not grow with ``num_samples`` beyond its square root. Modules that the programs use score in evaluation mode, as far
    as they are found in closures, partials and attributes. Where values are missing, it is log p(x_obs), and ``num_dims`` the
    mean number of observed values per datum.

    With a ``target_se`` a pilot decides for each datum how many draws it needs: 250, 500, 1,000 and so on up to
    ``num_samples``. The estimate is from that many fresh draws, so :math:`\hat p(x)` is as unbiased as without a target; to
    stop at an error seen in the same draws would favour those in which large weights are missing. ``drawn`` says how many a
    datum's estimate is from, and ``pilot`` how many decided, a quarter of them or more. The error is measured on the fresh
    draws, and misses the target by chance, or where the tail is heavy and the pilot has not seen the large weights. Latents
    that are discrete may give weights without any spread, which shows nothing but that all draws fell on one value: such a
    pilot decides for ``num_samples``.

    No weight shows what the proposal never draws. So one draw of the prior for every 64 is scored as well; ``missed`` says what
    they add to log p(x) where the weights are larger than any that was drawn, and a datum of which that is more than 0.05 nats
    and three standard errors is not reliable. A mixture draws from the prior by itself. Where a draw of the prior cannot be
    scored under the guide, as with a flow that cannot be inverted, ``missed`` is ``None`` and ``notes`` say why.

    Where ``torch.distributed`` is initialised, the processes share the data, which each is given whole, and all get the whole
    answer.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a masked array for those with a
            parameter ``mask``, a Dataset or a DataLoader. All data are scored in the order of the data set, also where a
            DataLoader shuffles or drops its last batch.
        num_samples: S, drawn for every datum, no more and no fewer; with a ``target_se`` the most that an estimate is from.
        target_se: the standard error to aim at for each datum's estimate, in nats; ``None`` draws all S. A mixture takes only
            numbers of draws of which its share of the prior is a whole number.
        proposal: a name from above, or what :func:`pyrovae.refine` returned for the same data in the same order.
        prior_share: :math:`\alpha`, the share of draws that ``"mixture"`` takes from the prior, rounded to whole draws.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations, or where
            compiled 8 MB of the widest value, on a GPU half a million, or fewer where ``max_memory`` asks for it.
        max_memory: MiB that a chunk's temporaries may fill, by their estimated number; by default 512, and on a GPU a quarter
            of its free memory.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: capture and compile the scoring of a chunk (:mod:`pyrovae.compile`), for proposals from guide and prior;
            ``"auto"`` does so from three hundred chunks of 16 MB on, with a ``target_se`` as if it took a thousand
            draws. By default a compiled chunk is of another size than an eager one, and many normal numbers are not drawn
            by torch but made from a seed that is, on each thread: the estimates differ within their errors.
        precision: ``"bfloat16"`` rounds the factors of matrix products and convolutions, and compiles; ``"tf32"`` takes an
            NVIDIA GPU's faster units, which round them less, and is refused on a CPU; all else stays as it is. Either is an
            approximation of the model, whose error no standard error shows; the evidence's ``notes`` have it.
        seed: makes the estimate reproducible, by how many processes it is made and however often it was interrupted; the global
            random stream is left alone. Without one, a seed is drawn from that stream. Eager numbers are the same to rounding
            on any number of threads; compiled ones differ with that number, within their errors.
        resume: a file that keeps what has been scored; an interrupted call goes on from it when made again. It holds hashes of
            the parameters, buffers and data, and what the pair gave for one draw, and is refused where they differ.
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
    if target_se is not None and not (isinstance(target_se, int | float) and 0 < target_se < math.inf):
        raise ValueError(f"target_se is a positive number of nats, or None, not {target_se!r}.")
    if not (max_memory is None or (isinstance(max_memory, int | float) and max_memory > 0)):
        raise ValueError(f"max_memory is a positive number of MiB, not {max_memory!r}.")
    given = proposal if isinstance(proposal, Refinement) else None
    kind = "refined" if isinstance(proposal, Refinement) else proposal
    if kind not in METHODS:
        raise ValueError(unknown("proposal", kind, METHODS))
    if kind == "mixture" and not 0 < prior_share < 1:
        raise ValueError(f"prior_share must be between 0 and 1, got {prior_share!r}.")
    if kind == "mixture" and num_samples < 2:
        raise ValueError("A mixture takes at least two samples, one of the prior and one of the guide.")
    if precision == "bfloat16" and kind in ("mixture", "refined"):
        raise ValueError(f"Only draws from guide and prior are compiled: leave precision out for proposal={kind!r}.")
    data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
    first = prepare(model, guide, data, vectorize_particles=vectorize_particles)
    info, dtype, device, whole = first.info, first.dtype, first.device, first.whole
    check_precision(precision, device)
    on_gpu = _on_gpu(device)
    nesting = info.max_plate_nesting
    if info.scale != 1.0:
        raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
    width = max(info.num_dims, 256)
    if whole is not None and target_se is not None:
        raise ValueError("The pair is tied to one set of data, of which none can stop before the others: leave target_se out.")
    group, reduced = (GPU_GROUP, GPU_REDUCED) if on_gpu else (GROUP, REDUCED_JOINTLY)
    memory = max_memory * 2**20 if max_memory is not None else GPU_SHARE * free_memory(device) if on_gpu else 2**29
    affordable = int(memory / (TEMPORARIES * width * torch.finfo(dtype).bits / 8))
    data.to(dtype, device, first.floating)
    data.batch_size = whole or group
    if compile == "auto":
        usually = num_samples if target_se is None else min(num_samples, 4 * MIN_DRAWS)
        compile = precision == "bfloat16" or (data.num_data or 0) * usually * width >= CHUNKS_TO_COMPILE * CHUNK_NUMBERS
    # Compiled chunks run side by side, one a thread, which keeps all threads busy where a chunk's own small parts would not.
    threads = torch.get_num_threads() if compile and kind in ("guide", "prior") and device.type == "cpu" else 1
    plain = (
        prior_draws(model, vectorize_particles, nesting)
        if kind == "prior"
        else guide_draws(model, guide, vectorize_particles, nesting)
    )

    def drawn_at(length: Tensor, *batch: Tensor) -> tuple[Tensor]:
        # Graphs go by shape, so the number of samples travels as the length of an empty tensor.
        return (plain(batch, len(length)),)

    one = first.args if first.whole is not None else tuple(array[:1] for array in first.args)
    if chunk_size is not None:
        chunk = positive_integer(chunk_size, "chunk_size")
    else:
        usual = GPU_PAIRS if on_gpu else (COMPILED_CHUNK_NUMBERS if compile else CHUNK_NUMBERS) // width
        if compile and kind in ("guide", "prior") and device.type == "cpu":
            with torch.no_grad(), evaluation_mode(model, guide), pyro.validation_enabled(False):
                number = largest_value(drawn_at, torch.empty(PROBED, 0, device=device), *one)
            usual = COMPILED_CHUNK_NUMBERS // (width if number is None else max(number // PROBED, NARROWEST))
        chunk = max(1, min(usual, affordable // threads))
    num_prior = prior_count(num_samples, prior_share) if kind == "mixture" else 0
    looks = _stopping_checks(num_samples, target_se, num_samples // math.gcd(num_samples, num_prior))
    rows = whole or min(max(1, chunk // looks[0]), group)
    together = rows
    if kind == "refined" and given is None:
        with evaluation_mode(model, guide):
            options = usual_options(UnconstrainedPair(model, guide, one, vectorize_particles=vectorize_particles).num_latents)
        # Steps of a fit cost for one datum as much as for many.
        together *= max(1, rows_at_once(info.num_dims, options) // rows)
    if whole is None:
        data.batch_size = math.ceil(group / together) * together
    else:
        together = whole
    if given is not None and (data.loader is not None or data.num_data != len(given)):
        raise ValueError(f"The refinement is of {len(given)} data in their order: give the same data, as arrays.")
    backend, eps = "inductor" if compile else "eager", torch.finfo(dtype).eps
    staged = Staged(drawn_at, backend, precision, threads, programs=(model, guide))

    def draw_staged(batch: Batch, size: int) -> Callable[[], Tensor]:
        value = staged.submit(torch.empty(size, 0, device=device), *batch)
        return lambda: value()[0]

    def refinement_of(batch: Batch, start: int) -> Refinement | None:
        """A group's own refinement, where the proposal is one."""
        if kind != "refined":
            return None
        if given is not None:
            return given.rows(np.arange(start, start + len(batch[0])))
        blocks = zip(*(array.split(together) for array in batch), strict=True)
        return joined([refine_batch(model, guide, block, options, vectorize_particles) for block in blocks])

    def drawing(fitted: Refinement | None) -> Callable[[Tensor, int], DrawLater]:
        """What draws the log-weights of some rows of a group, once each has a number of draws."""
        if kind == "mixture":
            return lambda _, done: _at_once(
                mixture_draws(model, guide, vectorize_particles, nesting, num_samples, num_prior, done)
            )
        if fitted is None:
            return lambda _, done: draw_staged
        return lambda chosen, _: _at_once(refined_draws(model, guide, fitted.rows(chosen.numpy()), vectorize_particles))

    probes = 0 if kind in ("prior", "mixture") else _num_probes(num_samples, target_se)
    unprobed: list[str] = []

    def probe(batch: Batch, fitted: Refinement | None, found: dict[str, np.ndarray]) -> np.ndarray:
        """What the proposal missed of each datum of a group, by draws of the prior."""
        missed = np.full(len(batch[0]), math.nan)
        try:
            for chosen, most in _parts(torch.arange(len(batch[0])), probes, chunk, None, group, whole):
                rows, part = chosen.numpy(), tuple(array[chosen] for array in batch)
                seen = prior_probe(model, guide, vectorize_particles, nesting)
                if fitted is not None:
                    seen = refined_probe(model, guide, fitted.rows(rows), vectorize_particles)
                blocks = [seen(part, size) for size in _sizes(probes, most)]
                joint = Probe(*(torch.cat(columns).cpu() for columns in zip(*blocks, strict=True)))
                largest, log_px = (torch.from_numpy(found[name][rows]) for name in ("largest", "log_px"))
                missed[rows] = missed_nats(joint, largest, log_px, CONSTANT).numpy()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # The prior may have no sampler, the guide no density there, and a network no answer: that is no fault of the pair.
            unprobed.append(str(error) or type(error).__name__)
        return missed

    def score(batch: Batch, fitted: Refinement | None, bar: tqdm) -> dict[str, np.ndarray]:
        """A group's answer, by parts of at most one chunk."""
        draws, size = drawing(fitted), len(batch[0])
        arrays: dict[str, np.ndarray] = {}

        def calls(parts: list[tuple[Tensor, int]], done: int, step: int) -> Iterator[Callable[[], Tensor]]:
            for chosen, most in parts:
                place = chosen.to(device, non_blocking=True)
                draw, part = draws(chosen, done), tuple(array[place] for array in batch)
                yield from (draw(part, number) for number in _sizes(step, most))

        def more(
            active: Tensor, sums: dict[str, Tensor], done: int, until: int, first: int | None
        ) -> Iterator[tuple[Tensor, dict[str, np.ndarray]]]:
            """Take some rows from so many draws to so many; their numbers, and what is known of them, as they are ready."""
            step = until - done
            parts = list(_parts(active, step, chunk, first, group, whole))
            blocks = _ahead(calls(parts, done, step), threads + 2 if threads > 1 else 0)
            for joint in _joint(parts, step, reduced):
                chosen = torch.cat([rows for rows, _ in joint])
                held = {name: values[chosen] for name, values in sums.items()}
                new = _score(_side_by_side(blocks, joint, step), held, num_samples, done, until)
                for name, values in new.items():
                    sums[name][chosen] = values
                new |= _tails_together(new, until, eps) if on_gpu else {}
                found = {name: values.cpu().numpy() for name, values in new.items()}
                yield chosen, found | _moments(found, until)

        wanted, pilot = np.full(size, num_samples), np.zeros(size, np.int64)
        if target_se is not None:
            active, sums, done = torch.arange(size), _nothing(size, num_samples, device), 0
            for look in _pilots(looks):
                on = []
                for chosen, found in more(active, sums, done, look, _pilots(looks)[0]):
                    number = _needed(found, look, target_se, bool(info.discrete))
                    enough = np.array(looks)[np.searchsorted(looks[:-1], number)]
                    rows, decided = chosen.numpy(), (enough <= REACH * look) | (number >= 2 * num_samples)
                    wanted[rows[decided]] = enough[decided]
                    pilot[rows] = look
                    on.append(chosen[torch.from_numpy(~decided)])
                active, done = torch.cat(on), look
                if not len(active):
                    break
        for until in np.unique(wanted).tolist():
            active = torch.from_numpy(np.flatnonzero(wanted == until))
            sums = _nothing(size, num_samples, device)
            for chosen, found in more(active, sums, 0, until, None if target_se is None else looks[0]):
                # Finished here and not once for all, as other threads still draw meanwhile.
                for name, part in _finished(found, until, num_samples, precision=eps).items():
                    place = arrays.setdefault(name, np.empty((size, *part.shape[1:]), part.dtype))
                    place[chosen.numpy()] = part
                bar.update(len(chosen))
        arrays["pilot"] = pilot
        return arrays

    settings: dict[str, Any] = {"num_samples": num_samples, "proposal": str(kind), "chunk": chunk, "num_dims": info.num_dims}
    settings |= {"target_se": target_se, "precision": precision, "num_prior": num_prior, "given": list(info.given)}
    if given is not None:
        settings["refinement"] = content_hash(torch.as_tensor(part) for part in (given.loc, given.scale_tril, given.shares))
    pair = None if resume is None else _Pair.of(model, guide, first, one)
    store = _Store(resume, _agreed_seed(seed), settings, pair, chosen=seed is not None)
    generator_devices = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        evaluation_mode(model, guide),
        torch.random.fork_rng(generator_devices),
        contextlib.closing(staged),
        products_in(precision, device),
        tqdm(total=data.num_data, desc="log p(x)", unit="datum", disable=not progress) as bar,
    ):
        start = 0
        for batch in data:
            if store.wants(start, batch):
                seen = inspect_pair(model, guide, *batch)
                if kind in ("guide", "mixture"):
                    refuse_no_weights(seen.no_weights)
                described = scored_data(seen, batch)
                torch.manual_seed(store.seed_of(start))
                if (start // group).bit_count() == 1:  # other data than it was captured on, in groups 1, 2, 4, ...
                    staged.recheck(f"from datum {start} on")
                covered = None
                if kind == "guide":
                    covered = covered_data(model, guide, batch, **info.layout, vectorize=vectorize_particles)
                with pyro.validation_enabled(False):
                    fitted = refinement_of(batch, start)
                    arrays = score(batch, fitted, bar)
                    if probes:
                        # A stream of its own, whatever the draws took of theirs.
                        torch.manual_seed(store.seed_of(start) + 1)
                        arrays["missed"] = probe(batch, fitted, arrays)
                if covered is not None:
                    arrays["covered"] = covered.cpu().numpy()
                store.add(start, arrays | described)
                bar.set_postfix_str(f"{store.mean:.2f} nats/datum")
            start += len(batch[0])
    scored = store.gathered(start)
    drawn, pilot, _ = (scored.pop(name) for name in ("drawn", "pilot", "largest"))
    curve = curve_of(scored.pop("curve_sum").T, scored.pop("curve_square").T, scored["elbo"], num_samples, drawn)
    fields = evidence_fields([{name: scored.pop(name) for name in SCORED_DATA}], info.given)
    if info.discrete and set(info.discrete) == set(info.latents):
        # Weights of finitely many values have no Pareto tail to smooth.
        scored["log_px_psis"] = scored["log_px"].copy()
    missed = scored.pop("missed", None)
    if missed is not None and info.discrete:
        # A value that no draw fell on leaves no trace in the weights, and nothing else was asked.
        scored["khat"][np.isnan(missed) & np.isneginf(scored["khat"])] = math.nan
    notes: dict[str, Any] = {} if target_se is None else {"target_se": float(target_se)}
    notes |= {"prior_not_asked": unprobed[0]} if unprobed else {}
    notes |= {} if precision == "float32" else {"precision": precision}
    return Evidence(
        **scored,
        **fields,
        curve=curve,
        num_samples=num_samples,
        method=METHODS[kind],
        drawn=None if target_se is None else drawn,
        pilot=None if target_se is None else pilot,
        missed=None if missed is None or np.isnan(missed).all() else missed,
        notes=notes,
    )


def _on_gpu(device: torch.device) -> bool:
    """Whether launches cost more than memory."""
    return device.type == "cuda"


def _num_probes(num_samples: int, target_se: float | None) -> int:
    """How many draws of the prior are scored beside so many of the proposal; none where too few to believe are drawn anyway."""
    usual = num_samples if target_se is None else min(num_samples, 4 * MIN_DRAWS)
    return 0 if num_samples < FEWEST_SAMPLES else min(max(usual // PROBE_EVERY, FEWEST_PROBES), MOST_PROBES)


def _pilots(looks: list[int]) -> list[int]:
    """The numbers of draws at which a pilot may decide on one of several numbers; none where there is only one."""
    pilots = [] if len(looks) == 1 else [math.ceil(looks[0] / REACH)]
    while pilots and 2 * pilots[-1] * REACH < 2 * looks[-1]:
        pilots.append(2 * pilots[-1])
    return pilots


def _needed(found: dict[str, np.ndarray], drawn: int, target_se: float, discrete: bool) -> np.ndarray:
    """How many draws the target error takes, by what so many show; a fifth more than that, as what they show is not certain."""
    number = 1.2 * drawn * (found["se"] / target_se) ** 2
    if discrete:
        # All draws may have fallen on one value, which shows nothing of the others.
        number[found["se"] * math.sqrt(drawn) <= CONSTANT] = math.inf
    # Weights of zero may yet be followed by others; one that is NaN or infinite stays.
    lost = np.isnan(found["log_sum"]) | (found["log_sum"] == math.inf)
    return np.where(lost, 0.0, np.nan_to_num(number, nan=math.inf, posinf=math.inf))


def _stopping_checks(num_samples: int, target_se: float | None, every: int) -> list[int]:
    """How many draws a datum's estimate may be from, up to the most; each a multiple of ``every``."""
    if target_se is None:
        return [num_samples]
    looks = [math.ceil(MIN_DRAWS / every) * every]
    while looks[-1] < num_samples:
        looks.append(2 * looks[-1])
    return [*looks[:-1], num_samples]


def _parts(
    active: Tensor, step: int, chunk: int, first: int | None, group: int = GROUP, whole: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """The rows that draw together, and how many draws each takes at once, to make ``step`` draws for all.

    Compiled graphs go by shape, so with a first look there are few: many rows of that many draws in the first rounds, one row
    of a power of two times as many in later ones. Without, chunks are as even as can be, for the same end. Data that have to
    run together, so many, are one part.
    """
    if first is None:
        rows = whole or min(max(1, chunk // step), group)
        most = math.ceil(step / math.ceil(step / max(1, chunk // rows)))
        yield from ((chosen, most) for chosen in active.split(rows))
        return
    tall = _doubled(first, chunk)
    for chosen in active.split(max(1, chunk // first) if step < tall else 1):
        most = _doubled(first, chunk // len(chosen))
        yield chosen, most if most <= chunk else math.ceil(first / math.ceil(first / chunk))


def _doubled(number: int, limit: int) -> int:
    """The number times the largest power of two that stays within the limit, or the number itself."""
    return number << max(0, (limit // number).bit_length() - 1)


def _sizes(number: int, most: int) -> Iterator[int]:
    """So many draws in chunks of the largest size, the last one ragged."""
    yield from [most] * (number // most)
    if number % most:
        yield number % most


def _joint(parts: list[tuple[Tensor, int]], step: int, numbers: int) -> Iterator[list[tuple[Tensor, int]]]:
    """The parts in runs whose log-weights are few enough to be summed together."""
    number = max(1, numbers // (step * max(len(rows) for rows, _ in parts)))
    yield from (parts[place : place + number] for place in range(0, len(parts), number))


def _side_by_side(blocks: Iterator[Tensor], parts: list[tuple[Tensor, int]], step: int) -> Iterator[Tensor]:
    """The blocks of one part as they come, or of several as one that holds the data of all."""
    if len(parts) == 1:
        return blocks
    columns = [torch.cat([next(blocks) for _ in _sizes(step, most)]) for _, most in parts]
    return iter([torch.cat(columns, 1)])


def _ahead(calls: Iterable[Callable[[], Tensor]], number: int) -> Iterator[Tensor]:
    """The calls' values in order, where so many later ones are made before each is waited for."""
    waiting: deque[Callable[[], Tensor]] = deque()
    for call in calls:
        waiting.append(call)
        if len(waiting) > number:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _at_once(draw: Draw) -> DrawLater:
    return lambda batch, size: lambda: draw(batch, size)


def _nothing(num_data: int, num_samples: int, device: torch.device) -> dict[str, Tensor]:
    """The sums of data of which nothing has been drawn."""
    log_zero = torch.full((num_data,), -math.inf, dtype=torch.float64, device=device)
    heads = log_zero[:, None].repeat(1, len(curve_sizes(num_samples)) - 1)
    return {
        "log_sum": log_zero,
        "log_square": log_zero.clone(),
        "total": torch.zeros_like(log_zero),
        "tail": log_zero[:, None].repeat(1, tail_size(num_samples)),
        "curve_sum": heads,
        "curve_square": heads.clone(),
    }


def _score(blocks: Iterator[Tensor], sums: dict[str, Tensor], num_samples: int, done: int, until: int) -> dict[str, Tensor]:
    """Take in more draws: streaming sums of w, w^2 and log w, and the largest weights, which are all that Pareto k needs.

    The next blocks of log-weights of the same data, (size, B) in float64, make it so many draws for each.
    """
    # Of w and of w^2 side by side, as each operation costs more than what it computes.
    both, total = torch.stack([sums["log_sum"], sums["log_square"]]), sums["total"]
    curve = torch.stack([sums["curve_sum"], sums["curve_square"]])
    places = {count: place for place, count in enumerate(curve_sizes(num_samples)[:-1])}
    keep = tail_size(num_samples)
    tail = sums["tail"][:, : min(keep, done)]
    drawn: list[Tensor] = []
    while done < until:
        drawn.append(next(blocks))
        waiting = sum(map(len, drawn))
        if waiting < min(REDUCED_AT_ONCE, until - done):
            continue
        log_w = torch.cat(drawn).T.contiguous()
        drawn.clear()
        powers = torch.stack([log_w, 2 * log_w])
        for count in sorted({done + waiting} | {count for count in places if done < count < done + waiting}):
            both = torch.logaddexp(both, torch.logsumexp(powers[..., : count - done], -1))
            powers, done = powers[..., count - done :], count
            if count in places:
                curve[..., places[count]] = both
        total = total + log_w.sum(-1)
        tail = torch.cat([tail, log_w], -1)
        tail = torch.topk(tail, min(keep, tail.shape[-1])).values
    tail = torch.cat([tail, sums["tail"][:, tail.shape[-1] :]], -1)
    new = {"log_sum": both[0], "log_square": both[1], "total": total}
    return new | {"tail": tail, "curve_sum": curve[0], "curve_square": curve[1]}


def _tails_together(sums: dict[str, Tensor], drawn: int, precision: float) -> dict[str, Tensor]:
    """Pareto k and the smoothed estimate of the data whose tails can be fitted on their device."""
    tail = sums["tail"][:, : tail_size(drawn)]
    khat, smoothed, ordinary = pareto_smooth_together(tail, sums["log_sum"], drawn, precision=precision)
    return {"khat": khat, "log_px_psis": smoothed, "ordinary": ordinary}


def _moments(sums: dict[str, np.ndarray], drawn: int) -> dict[str, np.ndarray]:
    """Estimate, standard error, effective sample size and mean log-weight from the sums over so many draws."""
    with np.errstate(all="ignore"):
        share = np.exp(sums["log_square"] - 2 * sums["log_sum"])  # sum of squared normalised weights, 1/ESS
        return {
            "log_px": sums["log_sum"] - np.log(drawn),
            "se": np.sqrt(np.maximum(share - 1 / drawn, 0.0) * (drawn / (drawn - 1) if drawn > 1 else np.nan)),
            "ess": np.where(np.isneginf(sums["log_sum"]), 0.0, 1 / share),
            "elbo": sums["total"] / drawn,
        }


def _finished(found: dict[str, np.ndarray], drawn: int, num_samples: int, precision: float) -> dict[str, np.ndarray]:
    """The answer for some data, from their sums over so many draws and the moments of those."""
    names = ("log_px", "se", "ess", "elbo")
    size = len(found["log_px"])
    khat, smoothed = found.get("khat", np.empty(size)), found.get("log_px_psis", np.empty(size))
    rest = ~found["ordinary"] if "ordinary" in found else np.ones(size, dtype=bool)
    tail = found["tail"][rest, : tail_size(drawn)]
    khat[rest], smoothed[rest] = pareto_smooth(tail, found["log_px"][rest], drawn, precision=precision)
    # Where a datum stopped before K draws, its curve stays at what it had.
    reached = np.array(curve_sizes(num_samples)[:-1]) <= drawn
    curves = {
        name: np.column_stack([np.where(reached, found[name], found[whole][:, None]), found[whole]])
        for name, whole in (("curve_sum", "log_sum"), ("curve_square", "log_square"))
    }
    counts = np.full(len(khat), drawn, dtype=np.int64)
    own = {"khat": khat, "log_px_psis": smoothed, "drawn": counts, "largest": found["tail"][:, 0]}
    return {name: found[name] for name in names} | own | curves

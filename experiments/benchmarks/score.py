"""What log p(x) by importance sampling costs: ours beside hand-written PyTorch, NumPyro, pythae, and the bare products.

The network is the importance-weighted autoencoder paper's 784-200-200-50 with tanh, the images are random and binary: no time
depends on them. All contenders score the same images with the same weights, interleaved over blocks of images; the ratio within
a block counts, since the machine is noisy. Ours is one call over all images, as a user's, whose data make it pause after each
block, until the others have scored that block too. All estimates must agree within four standard errors, or the run stops.

Hand-written PyTorch, NumPyro and pythae each work in the chunk of samples that is fastest for them; the bare products are
torch.mm's of the decoder alone, in our chunk's shape. Ours and they score all images; the others the first few of each block,
and are scaled: one in ten, and pythae, whose seconds are known best by then, one in fifty. The compilers' seconds count
in the total of ours, where they fall into the first block, and not in NumPyro's. With products of factors in bfloat16 ours is a
call for each block, and so begins and compiles anew in each.

    python experiments/benchmarks/score.py            # half an hour; writes ../results/score.json and score_memory.json
    python experiments/benchmarks/score.py --images 200 --samples 500 --memory-images 20
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import PIXELS, LeftOut, Network, library
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import pyrovae as pv
from pyrovae.evidence.planning import CHUNK_NUMBERS

SEED = 0
OURS, ROUNDED, EAGER = "pyrovae log_marginal", "pyrovae log_marginal, bfloat16", "pyrovae log_marginal, compile=False"
BARE = "bare products, torch.mm"
BY_HAND, NUMPYRO, PYTHAE = "hand-written eager", "NumPyro, jitted", "pythae get_nll"
CHUNKS = (100, 250, 500, 1000, 5000)  # samples of one image, to choose from
SHARES = {EAGER: 10, BY_HAND: 10, NUMPYRO: 10, PYTHAE: 50}  # one image in so many
Estimate = tuple[Any, Any]  # log p(x) of each image and its standard error, in nats; pythae says the mean over images alone
Score = Callable[[Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--memory-images", type=int, default=100, help="images whose memory is measured at S and at 20 S")
    parser.add_argument("--memory-only", action="store_true", help="leave the times as they are on file")
    parser.add_argument("--memory-of", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(growth(*options.memory_of)))
        return
    if not options.memory_only:
        time_scores(options.images, options.samples, options.blocks)
    common.write("score_memory", {"mebibytes_above_the_start": memory(options.images, options.samples, options.memory_images)})


def time_scores(num_images: int, samples: int, num_blocks: int) -> None:
    torch.manual_seed(SEED)
    net, images = Network("tanh", spread=0.1), common.binary_images(num_images, SEED)
    net.decoder[0].weight.data *= 0.3  # with this and the spread a posterior near the guide, whose errors can be believed
    scores, chunks, left_out = contenders(net, samples, images[:2])
    check({name: [score(images[:10])] for name, score in scores.items()})  # NumPyro compiles here

    blocks = images.tensor_split(num_blocks)
    few = {name: max(1, len(blocks[-1]) // SHARES.get(name, 1)) for name in scores}
    times: dict[str, list[float]] = {name: [] for name in scores}
    found: dict[str, list[Estimate]] = {name: [] for name in scores}
    order = np.random.default_rng(SEED)

    threads = torch.get_num_threads()

    def others(block: Tensor) -> None:
        ours_took = torch.get_num_threads()
        torch.set_num_threads(threads)
        parts = {name: block[: few[name]] if name in SHARES else block for name in scores if name != OURS}
        calls = {name: partial(scores[name], part) for name, part in parts.items()}
        for name, (seconds, estimate) in common.lap(calls, order).items():
            times[name].append(seconds * len(block) / len(parts[name]))
            found[name].append(estimate)
        torch.set_num_threads(ours_took)
        print(f"block {len(times[OURS])} of {len(blocks)} done", file=sys.stderr)

    data = Pausing(blocks, others, times[OURS])
    log_px, se = scores[OURS](DataLoader(data, batch_size=None))
    data.stop()
    ends = np.cumsum([len(block) for block in blocks])[:-1]
    found[OURS] = list(zip(np.split(log_px, ends), np.split(se, ends), strict=True))
    seconds = {name: round(sum(values), 2) for name, values in times.items()}
    ratios = {name: common.ratio(times, name, BARE) for name in times}
    to_ours = {name: common.ratio(times, OURS, name) for name in times}
    result = {
        "network": "784-200-200-50, tanh, Bernoulli, diagonal normal guide",
        "images": len(images),
        "samples": samples,
        "blocks": len(blocks),
        "seconds": seconds,
        "seconds_of_our_first_block": round(times[OURS][0], 2),
        "ratio_to_bare_products": ratios,
        "ratio_of_ours_to_it": to_ours,
        "mean_log_px_and_its_error": check(found),
        "samples_of_a_chunk": chunks,
        "scaled": {name: f"timed on {few[name] * len(blocks)} images" for name in times if name in SHARES},
        "left_out": left_out,
        "seed": SEED,
    }
    title = f"{len(images):,} images x {samples:,} samples"
    common.table((title, "seconds", "x bare"), seconds, ratios, to_ours, left_out)
    common.write("score", result)


class Pausing(IterableDataset):
    """The images of each block; when whoever reads them has done with a block, it waits until the others have too."""

    def __init__(self, blocks: Sequence[Tensor], others: Callable[[Tensor], None], times: list[float]):
        super().__init__()
        self.blocks, self.others, self.times, self.began = blocks, others, times, time.perf_counter()

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def __iter__(self) -> Iterator[Tensor]:
        for block in self.blocks:
            yield from block.split(256)
            self.times.append(time.perf_counter() - self.began)
            self.others(block)
            self.began = time.perf_counter()

    def stop(self) -> None:
        """Count what came after the last block."""
        self.times[-1] += time.perf_counter() - self.began


def contenders(net: Network, samples: int, images: Tensor) -> tuple[dict[str, Score], dict[str, int], dict[str, str]]:
    scores: dict[str, Score] = {OURS: ours(net, samples), ROUNDED: ours(net, samples, precision="bfloat16")}
    chunks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    if "compile" in inspect.signature(pv.log_marginal).parameters:
        scores[EAGER] = ours(net, samples, compile=False)
    else:
        left_out[EAGER] = "log_marginal has no such argument"
    scores[BARE], chunks[BARE] = bare_products(net, samples)
    for name, build in {BY_HAND: by_hand, NUMPYRO: numpyros, PYTHAE: pythaes}.items():
        try:
            scores[name], chunks[name] = fastest(partial(build, copy.deepcopy(net), samples), samples, images)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return scores, chunks, left_out


def fastest(build: Callable[[int], Score], samples: int, images: Tensor) -> tuple[Score, int]:
    """The contender in the chunk that suits it best."""
    tried: dict[int, tuple[float, Score]] = {}
    for rows in [rows for rows in CHUNKS if samples % rows == 0] or [samples]:
        score, seconds = build(rows), []
        for _ in range(4):  # the first compiles
            began = time.perf_counter()
            score(images)
            seconds.append(time.perf_counter() - began)
        tried[rows] = min(seconds[1:]), score
    best = min(tried, key=lambda rows: tried[rows][0])
    return tried[best][1], best


def check(found: dict[str, list[Estimate]]) -> dict[str, list[float]]:
    """The mean of each contender with its standard error; stop where one does not agree with the hand-written estimate."""
    means = {}
    for name in (each for each in found if each != BARE):
        estimates = found[name]
        # On the same images, the first few of each block.
        pairs = list(zip(estimates, found[BY_HAND], strict=True))
        both = [min(len(mine), len(log_px)) for (mine, _), (log_px, _) in pairs]
        theirs = [(log_px[:size], se[:size]) for (_, (log_px, se)), size in zip(pairs, both, strict=True)]
        # pythae says no error, but has the same one.
        errors = theirs if name == PYTHAE else estimates
        estimates = [(mine[:size], se[:size]) for (mine, _), (_, se), size in zip(estimates, errors, both, strict=True)]
        common.agree(name, average(estimates), average(theirs))
        means[name] = [round(number, 5) for number in average(estimates)]
    return means


def average(estimates: list[Estimate]) -> tuple[float, float]:
    log_px, se = (np.concatenate(parts) for parts in zip(*estimates, strict=True))
    return float(log_px.mean()), float(np.sqrt((se**2).sum()) / len(se))


def log_px_and_se(log_sum: Any, log_square: Any, samples: int) -> Estimate:
    """From log sum w and log sum w^2 of each image."""
    share = np.exp(np.asarray(log_square) - 2 * np.asarray(log_sum))
    return np.asarray(log_sum) - np.log(samples), np.sqrt(np.maximum(share - 1 / samples, 0) * samples / (samples - 1))


def ours(net: Network, samples: int, **options: Any) -> Score:
    vae = common.as_vae(net)

    def score(x: Any) -> Estimate:
        evidence = vae.log_marginal(x, num_samples=samples, **options)
        return evidence.log_px, evidence.se

    return score


def by_hand(net: Network, samples: int, rows: int) -> Score:
    @torch.no_grad()
    def image(x: Tensor) -> Tensor:
        log_w = torch.cat([net.log_weights(x[None], rows)[:, 0].double() for _ in range(samples // rows)])
        return torch.stack([log_w.logsumexp(0), (2 * log_w).logsumexp(0)])

    return lambda x: log_px_and_se(*torch.stack([image(each) for each in x], 1), samples)


def numpyros(net: Network, samples: int, rows: int) -> Score:
    jax, jnp, handlers = library("jax"), library("jax.numpy"), library("numpyro.handlers")
    log_density = library("numpyro.infer.util").log_density
    model, guide = common.numpyro_pair(net)
    key = jax.random.PRNGKey(SEED)
    sites = [handlers.trace(handlers.seed(program, key)).get_trace(jnp.zeros((1, PIXELS))) for program in (model, guide)]
    weights = {name: site["value"] for trace in sites for name, site in trace.items() if site["type"] == "param"}

    def log_weight(key: Any, weights: dict[str, Any], x: Any) -> Any:
        log_q, trace = log_density(handlers.seed(guide, key), (x,), {}, weights)
        return log_density(model, (x,), {}, weights | {"z": trace["z"]["value"]})[0] - log_q

    @jax.jit
    def image(key: Any, weights: dict[str, Any], x: Any) -> Any:
        def chunk(key: Any) -> Any:
            log_w = jax.vmap(log_weight, (0, None, None))(jax.random.split(key, rows), weights, x)
            return jnp.stack([jax.nn.logsumexp(log_w), jax.nn.logsumexp(2 * log_w)])

        return jax.nn.logsumexp(jax.lax.map(chunk, jax.random.split(key, samples // rows)), 0)

    def score(x: Tensor) -> Estimate:
        nonlocal key
        key, *keys = jax.random.split(key, len(x) + 1)
        # Not waited for one by one, so that JAX may run ahead.
        sums = [image(one, weights, each[None]) for one, each in zip(keys, jnp.array(x.numpy()), strict=True)]
        return log_px_and_se(*np.asarray(jnp.stack(sums, 1), dtype=float), samples)

    return score


def pythaes(net: Network, samples: int, rows: int) -> Score:
    model = common.as_pythae(net).eval()

    def score(x: Tensor) -> Estimate:
        with torch.no_grad():
            mean = model.get_nll(x, n_samples=samples, batch_size=rows)  # its sign is that of log p(x)
        return np.full(len(x), mean), None

    return score


def bare_products(net: Network, samples: int) -> tuple[Score, int]:
    chunk = CHUNK_NUMBERS // PIXELS
    images = max(1, chunk // samples)
    rows = images * -(-samples // -(-samples // (chunk // images)))  # as even as can be
    chain = common.products(net.decoder, rows, backward=False)

    def score(x: Tensor) -> None:
        for _ in range(-(-len(x) * samples // rows)):
            for a, b, out in chain:
                torch.mm(a, b, out=out)

    return score, rows


def memory(images: int, samples: int, few: int) -> dict[str, float]:
    """By how much the resident memory grows beyond network and images, each case in a process of its own."""
    found = {}
    for cases in dict.fromkeys([(few, samples), (few, 20 * samples), (images, samples)]):
        command = [sys.executable, __file__, "--memory-of", *map(str, cases)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        label = "{:,} images x {:,} samples".format(*cases)
        found[label] = json.loads(run.stdout.splitlines()[-1])
        print(f"  {label + ', MiB above the start':<50}{found[label]:12.1f}")
    return found


def growth(images: int, samples: int) -> float:
    torch.manual_seed(SEED)
    vae, x = common.as_vae(Network("tanh")), common.binary_images(images, SEED)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = peak_resident()
    vae.log_marginal(x, num_samples=samples, compile=True)  # by default so in the larger cases alone
    return round((peak_resident() - before) / 2**10, 1)


def peak_resident() -> int:
    """In KiB. Not getrusage's ru_maxrss: a process inherits that from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()

"""What one training step costs: ours beside Pyro's, NumPyro's, pythae's and hand-written PyTorch, same weights and data.

In every round each contender takes a block of consecutive steps, in an order drawn afresh; the ratio within a round counts,
since the machine is noisy. A block takes ours about 100 ms: an epoch is longer yet, and the first steps after another
contender find the caches full of what was its own and the threads asleep. The learning rate is 1e-12, so the weights stay
where they are while the arithmetic is that of training: the losses of all contenders must then have one mean, and the run
stops where they do not. The steps on which this is checked come before the timed ones, and take the compilers' time.

Each is at its best: NumPyro hands its state on without a copy (donated) and waits once a block, pythae's trainer is given ready
batches in place of its loader, and TraceMeanField_ELBO and pythae have the closed form of the KL. For K > 1 all follow IWAE.
All compute in float32 but for one of ours, whose products are of factors in bfloat16.

    python experiments/benchmarks/step.py --root ../shared/data      # 20 minutes on two cores
    python experiments/benchmarks/step.py --cells tanh-100 epoch --rounds 10
    python experiments/benchmarks/step.py --native none decoder all  # our step with and without our own C++, interleaved

What it finds goes to ../results: the cells to step.json, where those that are not asked for stay as they were, an epoch of
MNIST through fit to epoch.json, what a step allocates to memory.json; with --native, the cells to native.json. A library that
is not installed leaves its contenders out, and the result names them: pip install numpyro pythae.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import common
import numpy as np
import pyro
import torch
from common import LeftOut, Network, library
from torch import Tensor

import pyrovae as pv
from pyrovae.compile.step import Step

LR, SEED, CHECKED_BLOCKS = 1e-12, 0, 20
OURS, ROUNDED, BASELINE = "pyrovae staged", "pyrovae staged, bfloat16", "hand-written eager"
PYTHAE, BARE = "pythae trainer", "bare products, torch.mm"
STEPS, NATIVES = common.RESULTS / "step.json", common.RESULTS / "native.json"
NOWHERE = open(os.devnull, "w")  # noqa: SIM115  (progress bars are drawn, but for nobody)
Block = Callable[[], Any]  # takes one step on each batch; returns their losses, each in nats, summed over the batch
Contenders = dict[str, Callable[["Cell", Network, list[Tensor]], Block]]


@dataclass(frozen=True)
class Cell:
    """A network, a batch size, a number of particles, the steps of a block, and those of training before.

    A network at its start, on random images, gives weights that spread by ten nats or less. In training on MNIST they spread
    farther, and most gradients are then nothing beside the datum's largest: ours are zero, which spares a part of the
    products, others' subnormal numbers, which take an Intel many times as long (cleared.py counts).
    """

    kind: str
    batch: int
    particles: int = 1
    components: int = 0
    steps: int = 20
    trained: int = 0


CELLS = {
    "tanh-20": Cell("tanh", 20, steps=200),
    "tanh-100": Cell("tanh", 100, steps=50),
    "tanh-256": Cell("tanh", 256),
    "tanh-20-k5": Cell("tanh", 20, particles=5, steps=100),
    "tanh-100-k5": Cell("tanh", 100, particles=5),
    "tanh-20-k50": Cell("tanh", 20, particles=50),
    "tanh-20-k50-mnist": Cell("tanh", 20, particles=50, trained=6_000),
    "gated-100": Cell("gated", 100),
    "conv-100": Cell("conv", 100, steps=5),
    "vamp-100": Cell("gated", 100, components=500, steps=5),
}
PARTS = [*CELLS, "epoch", "memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=PARTS, default=PARTS, metavar="CELL", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    levels = ("none", "decoder", "all")
    parser.add_argument(
        "--native",
        nargs="+",
        choices=levels,
        metavar="LEVEL",
        help=f"time our step at these of PYROVAE_NATIVE, {', '.join(levels)}",
    )
    parser.add_argument("--peak", choices=CELLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peaks(CELLS[options.peak])))
        return
    setting = {"seed": SEED, "learning_rate": LR}
    contenders, target = CONTENDERS, STEPS
    if options.native:
        ours_at = {natively(level): partial(ours, backend="inductor", native=level) for level in options.native}
        contenders, target = {**ours_at, BASELINE: CONTENDERS[BASELINE]}, NATIVES
    for name in [name for name in options.cells if name in CELLS]:
        try:
            measured = time_cell(name, CELLS[name], options.rounds, options.root, contenders)
        except LeftOut as reason:
            print(f"\n{name}: left out, {reason}")
            continue
        kept = json.loads(target.read_text())["cells"] if target.exists() else {}
        cells = {each: measured if each == name else kept[each] for each in CELLS if each == name or each in kept}
        common.write(target.stem, {**setting, "cells": cells})  # after each, so that a later failure loses nothing
    if options.native:
        return
    if "epoch" in options.cells:
        common.write("epoch", {**setting, "rounds": options.rounds, **time_epoch(options.root, options.rounds)})
    if "memory" in options.cells:
        common.write("memory", memory())


def natively(level: str) -> str:
    """The name of our step at a level of PYROVAE_NATIVE; at "all" it is whatever the package chooses on this machine."""
    return f"{OURS}, native {level}"


def time_cell(name: str, cell: Cell, rounds: int, root: str, contenders: Contenders) -> dict[str, Any]:
    torch._dynamo.reset()  # the cells share code, whose cache of compiled shapes would overflow
    pyro.clear_param_store()
    net, batches = start(cell, root)
    blocks: dict[str, Block] = {}
    left_out: dict[str, str] = {}
    for contender, build in contenders.items():
        try:
            blocks[contender] = build(cell, copy.deepcopy(net), batches)
        except LeftOut as reason:
            left_out[contender] = str(reason)
    losses = check(name, cell, net, batches, blocks)

    times: dict[str, list[float]] = {contender: [] for contender in blocks}
    order = np.random.default_rng(SEED)
    for _ in range(rounds):
        for contender, (seconds, _) in common.lap(blocks, order).items():
            times[contender].append(seconds / cell.steps)
    milliseconds = {contender: round(1e3 * float(np.median(values)), 4) for contender, values in times.items()}
    ratios = {contender: common.ratio(times, contender, BASELINE) for contender in times}
    own = next((each for each in (OURS, natively("all")) if each in times), None)
    to_ours = {contender: common.ratio(times, own, contender) for contender in times if own is not None}
    common.table((name, "ms a step", "x eager"), milliseconds, ratios, to_ours, left_out)
    return {
        "cell": asdict(cell),
        "rounds": rounds,
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "milliseconds": milliseconds,
        "ratio_to_hand_written_eager": ratios,
        "ratio_of_ours_staged_to_it": to_ours,
        "loss_per_datum": losses,
        "left_out": left_out,
    }


def start(cell: Cell, root: str) -> tuple[Network, list[Tensor]]:
    """The network and the batches of a block: of random images, or of MNIST, as many steps into training."""
    torch.manual_seed(SEED)
    net = Network(cell.kind, cell.components)
    if not cell.trained:
        return net, list(common.binary_images(cell.batch * cell.steps, SEED).split(cell.batch))
    images = mnist(root).train.flatten(1)
    drawn = images[torch.randint(len(images), (cell.batch * (cell.trained + cell.steps),))]
    batches = torch.bernoulli(drawn).split(cell.batch)
    by_hand(cell, net, batches[: cell.trained], compiled=True, lr=1e-3)()
    return net, list(batches[cell.trained :])


def mnist(root: str) -> pv.data.Split:
    try:
        return pv.data.load("mnist", root=root, binarize="dynamic")
    except (FileNotFoundError, ValueError) as error:
        raise LeftOut(str(error)) from error


def check(name: str, cell: Cell, net: Network, batches: list[Tensor], blocks: dict[str, Block]) -> dict[str, list[float]]:
    """The mean loss of each contender's own steps with its standard error; stop where they do not agree."""

    @torch.no_grad()
    def by_the_network(weighted: bool) -> list[float]:
        log_w = [net.log_weights(x, cell.particles) for x in batches]
        # pythae's IWAE reports the mean of log w under the normalised weights, whose gradient is the bound's, not the bound.
        reduce = (lambda w: (w.softmax(0) * w).sum(0)) if weighted else (lambda w: w.logsumexp(0) - np.log(len(w)))
        return [-reduce(w).sum().item() for w in log_w]

    def summary(block: Block) -> tuple[float, float]:
        losses = np.array([np.array(block(), dtype=float) for _ in range(CHECKED_BLOCKS)]) / cell.batch
        # Spread about each batch's own mean: the batches are the same for all.
        return float(losses.mean()), float(np.sqrt(losses.var(0, ddof=1).sum() / CHECKED_BLOCKS) / cell.steps)

    wanted = {weighted: summary(partial(by_the_network, weighted)) for weighted in (False, True)}
    found = {contender: summary(block) for contender, block in blocks.items() if contender != BARE}
    for contender, mean_and_error in found.items():
        common.agree(f"{name}: {contender}", mean_and_error, wanted[contender == PYTHAE and cell.particles > 1])
    return {contender: [round(number, 5) for number in pair] for contender, pair in found.items()}


def ours(cell: Cell, net: Network, batches: list[Tensor], native: str | None = None, **options: str) -> Block:
    with mock.patch.dict(os.environ, {} if native is None else {"PYROVAE_NATIVE": native}):  # read where a graph is compiled
        return staged(cell, net, batches, **options)


def staged(cell: Cell, net: Network, batches: list[Tensor], **options: str) -> Block:
    vae = common.as_vae(net)
    data = [x.reshape(-1, *vae.data_shape) for x in batches]
    estimator = pv.estimators.ELBO() if cell.particles == 1 else pv.estimators.IWAE(cell.particles)
    step = Step(estimator, vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=LR, fused=True), **options)
    estimator.loss(vae.model, vae.guide, data[0])  # as fit does: the first look at a pair reads values, and cannot be captured
    step(data[0]), step(data[1 % len(data)])  # the first captures, the second compiles
    if step.reason is not None:
        raise LeftOut(step.reason)
    return lambda: [step(x).loss for x in data]


def pyros(cell: Cell, net: Network, batches: list[Tensor], elbo: type, validation: bool = False) -> Block:
    many = elbo is pyro.infer.RenyiELBO
    if many != (cell.particles > 1):
        raise LeftOut("K > 1 only, in IWAE's place" if many else "K = 1 only")
    options: dict[str, Any] = {"num_particles": cell.particles, "vectorize_particles": many, "max_plate_nesting": 1}
    options |= {"alpha": 0} if many else {"ignore_jit_warnings": True} if elbo is pyro.infer.JitTrace_ELBO else {}
    pair = common.pyro_pair(net, f"{elbo.__name__}-{validation}")
    svi = pyro.infer.SVI(*pair, pyro.optim.Adam({"lr": LR}), elbo(**options))

    def block() -> list[float]:
        with pyro.validation_enabled(validation):
            return [svi.step(x) for x in batches]

    return block


def by_hand(cell: Cell, net: Network, batches: Sequence[Tensor], compiled: bool, lr: float = LR) -> Block:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True if compiled else None)

    def loss_of(x: Tensor) -> Tensor:
        log_w = net.log_weights(x, cell.particles)
        return -(torch.logsumexp(log_w, 0) - np.log(cell.particles)).sum() if cell.particles > 1 else -log_w.sum()

    run = torch.compile(loss_of) if compiled else loss_of

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = run(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return lambda: [step(x) for x in batches]


def numpyros(cell: Cell, net: Network, batches: list[Tensor], scan: bool) -> Block:
    jax, jnp, infer = library("jax"), library("jax.numpy"), library("numpyro.infer")
    elbo = infer.Trace_ELBO() if cell.particles == 1 else infer.RenyiELBO(alpha=0, num_particles=cell.particles)
    svi = infer.SVI(*common.numpyro_pair(net), library("numpyro.optim").Adam(LR), elbo)
    data = [jnp.array(x.numpy()) for x in batches]
    stacked, state = jnp.stack(data), svi.init(jax.random.PRNGKey(SEED), data[0])
    update = jax.jit(svi.update, donate_argnums=0)
    # Not as a loop where there are convolutions, which XLA's CPU code runs ten times slower in one.
    unroll = cell.steps if cell.kind == "conv" else 1
    scanned = jax.jit(lambda state, stacked: jax.lax.scan(svi.update, state, stacked, unroll=unroll), donate_argnums=0)

    def block() -> Any:
        nonlocal state
        losses: Any = []
        if scan:
            state, losses = scanned(state, stacked)
        else:
            for x in data:
                state, loss = update(state, x)
                losses.append(loss)
        return jax.block_until_ready((losses, state))[0]

    return block


def pythaes(cell: Cell, net: Network, batches: list[Tensor]) -> Block:
    if cell.components:
        raise LeftOut("its VampPrior has networks of its own")
    trainers, datasets = library("pythae.trainers"), library("pythae.data.datasets")
    labels, losses = torch.zeros(cell.batch), []

    class Trainer(trainers.BaseTrainer):
        def _optimizers_step(self, model_output: Any = None) -> None:
            losses.append(model_output.loss.detach())
            super()._optimizers_step(model_output)

    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        config = trainers.BaseTrainerConfig(output_dir=folder, per_device_train_batch_size=cell.batch, learning_rate=LR)
        data = datasets.BaseDataset(batches[0], labels)
        trainer = Trainer(common.as_pythae(net, cell.particles), data, training_config=config)
        trainer.prepare_training()
    logging.disable(logging.NOTSET)
    loader = type("Ready", (list,), {"dataset": range(cell.batch * cell.steps)})
    trainer.train_loader = loader(datasets.DatasetOutput(data=x, labels=labels) for x in batches)

    def block() -> list[Tensor]:
        losses.clear()
        with redirect_stderr(NOWHERE):
            trainer.train_step(1)
            trainer.callback_handler.on_epoch_end(config)
        return [loss * cell.batch for loss in losses]

    return block


def bare_products(cell: Cell, net: Network, batches: list[Tensor]) -> Block:
    """The products of the linear layers, forward and backward, and nothing else."""
    if cell.kind == "conv":
        raise LeftOut("a convolution is no plain product")
    chain = common.products(net.inference, cell.batch, backward=True, to_the_input=False)
    chain += common.products(net.decoder, cell.batch * cell.particles, backward=True)
    if cell.components:
        chain += common.products(net.inference, cell.components, backward=True)

    def block() -> None:
        for _ in batches:
            for a, b, out in chain:
                torch.mm(a, b, out=out)

    return block


CONTENDERS: Contenders = {
    OURS: partial(ours, backend="inductor"),
    ROUNDED: partial(ours, backend="inductor", precision="bfloat16"),
    "pyrovae eager": partial(ours, backend="eager"),
    "Pyro SVI Trace_ELBO, validating": partial(pyros, elbo=pyro.infer.Trace_ELBO, validation=True),
    "Pyro SVI Trace_ELBO": partial(pyros, elbo=pyro.infer.Trace_ELBO),
    "Pyro SVI TraceMeanField_ELBO": partial(pyros, elbo=pyro.infer.TraceMeanField_ELBO),
    "Pyro SVI JitTrace_ELBO": partial(pyros, elbo=pyro.infer.JitTrace_ELBO),
    "Pyro SVI RenyiELBO": partial(pyros, elbo=pyro.infer.RenyiELBO),
    BASELINE: partial(by_hand, compiled=False),
    "hand-written torch.compile": partial(by_hand, compiled=True),
    "NumPyro svi.update, jitted": partial(numpyros, scan=False),
    "NumPyro lax.scan": partial(numpyros, scan=True),
    PYTHAE: pythaes,
    BARE: bare_products,
}


def time_epoch(root: str, rounds: int) -> dict[str, Any]:
    """An epoch of MNIST through ``fit``, each followed by as many bare staged steps."""
    try:
        split = mnist(root)
    except LeftOut as reason:
        print(f"\nepoch: left out, {reason}")
        return {"left_out": str(reason)}
    torch.manual_seed(SEED)
    cell, images = CELLS["tanh-100"], split.train.flatten(1)
    net = Network(cell.kind)
    batches = list(common.binary_images(cell.batch * cell.steps, SEED).split(cell.batch))
    bare = ours(cell, net, batches, backend="inductor")
    marks: list[tuple[float, float]] = []

    def on_epoch(record: dict[str, Any]) -> None:
        ended = time.perf_counter()
        for _ in range(len(images) // cell.batch // cell.steps):
            bare()
        marks.append((ended, time.perf_counter()))

    epochs = 1 + max(2, rounds // 5)  # the first compiles
    options = {"epochs": epochs, "batch_size": cell.batch, "transform": split.transform, "seed": SEED, "on_epoch": on_epoch}
    with redirect_stderr(NOWHERE):
        common.as_vae(net).fit(images, **options, compile=True)
    times = {"fit": [later[0] - sooner[1] for sooner, later in pairwise(marks)], "bare": [b - a for a, b in marks[1:]]}
    seconds = {name: round(float(np.median(values)), 4) for name, values in times.items()}
    through = common.ratio(times, "fit", "bare")
    print(f"\nAn epoch of {len(images)} images through fit takes {through:.2f} x the time of as many bare staged steps")
    return {"images": len(images), "batch": cell.batch, "epochs": epochs - 1, "seconds": seconds, "ratio": through}


def memory() -> dict[str, Any]:
    """The most that a step allocates beyond what stays, by torch's own account, in a process of its own for each cell."""
    found = {}
    print(f"\n{'peak memory of a step, MiB':<38}{OURS:>20}{BASELINE:>20}")
    for name in ("tanh-100", "tanh-20-k50"):
        run = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(f"  {name:<36}{found[name][OURS]:20.2f}{found[name][BASELINE]:20.2f}")
    return {"peak_mebibytes": found}


def peaks(cell: Cell) -> dict[str, float]:
    torch.manual_seed(SEED)
    net, x = Network(cell.kind, cell.components), common.binary_images(cell.batch)
    found = {}
    for contender in (OURS, BASELINE):
        block = CONTENDERS[contender](cell, copy.deepcopy(net), [x])
        for _ in range(3):
            block()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            block()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        # What was there before is not in the account, nor its end: the last step's gradients, which go first.
        held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        found[contender] = round(float(held.max()) / 2**20, 3)
    return found


if __name__ == "__main__":
    main()

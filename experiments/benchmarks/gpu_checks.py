"""That a GPU's steps are the right ones: checks for the benchmark and the tests, which run on a CPU too, without the graphs.

Each takes a machine, raises AssertionError or returns what it measured.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import common
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from common import Network
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.compile.step import Step
from pyrovae.data.datasets import binarize
from pyrovae.programs.parameters import find_parameters

ADAM = torch.optim.Adam
Pair = Any  # something with a model and a guide, whose parameters a step finds


@dataclass(frozen=True)
class Cell:
    particles: int
    batch: int
    kind: str = "tanh"
    components: int = 0


CELLS = {
    "K=1 B=100": Cell(1, 100),
    "K=1 B=20": Cell(1, 20),
    "K=50 B=20": Cell(50, 20),
    "K=1 B=1000": Cell(1, 1000),
    "K=50 B=100": Cell(50, 100),
}
OTHERS = {
    "conv B=100": Cell(1, 100, "conv"),
    "gated, VampPrior B=100": Cell(1, 100, "gated", 500),
    "two sites B=100": Cell(1, 100, "two"),
}


class Machine:
    """Where it runs and how much of it."""

    def __init__(self, small: bool, root: str, device: torch.device | None = None):
        self.device = device or torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
        self.cuda, self.small, self.root = self.device.type == "cuda", small, root

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def data(self, number: int | None = None, grey: bool = False) -> Tensor:
        number = number or (2_000 if self.small else 60_000)
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(number, 784, generator=generator)
        return (x * 0.3 if grey else (x < 0.13).float()).to(self.device)


class TwoSites(nn.Module):
    """A foreign pair of two latent sites, plain Pyro."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 100))
        self.top = nn.Linear(50, 40)
        self.middle, self.down = nn.Linear(20, 50), nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 784))

    def model(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            style = pyro.sample("style", dist.Normal(x.new_zeros(len(x), 20), 1.0).to_event(1))
            code = pyro.sample("code", dist.Normal(self.middle(style), 1.0).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=self.down(code)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            loc, log_scale = self.up(x).chunk(2, -1)
            code = pyro.sample("code", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.top(code).chunk(2, -1)
            pyro.sample("style", dist.Normal(loc, log_scale.exp()).to_event(1))


def the_pair(on: Machine, cell: Cell, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    if cell.kind == "two":
        return TwoSites().to(on.device)
    if on.small and cell.kind == "tanh":
        return pv.make_vae(784, latent_dim=10, hidden=[30], activation="tanh")
    return common.as_vae(Network(cell.kind, cell.components)).to(on.device)


def the_step(
    on: Machine,
    pair: Pair,
    data: Tensor,
    cell: Cell,
    *,
    compiled: bool = True,
    precision: str = "float32",
    lr: float = 1e-3,
    optimizer: Callable[..., Any] | None = None,
    estimator: Any = None,
    **options: Any,
) -> Step:
    """A step that takes rows and the whole data; on a CPU in place of a graph the steps that it would record."""
    shape = getattr(pair, "data_shape", (784,))

    def load(rows: Tensor, data: Tensor) -> tuple[Tensor]:
        return (data.index_select(0, rows).reshape(-1, *shape),)

    estimator = estimator or (pv.estimators.ELBO() if cell.particles == 1 else pv.estimators.IWAE(cell.particles))
    example = load(torch.arange(cell.batch, device=on.device), data)
    made = (optimizer or (lambda p: ADAM(p, lr=lr, fused=True)))(find_parameters(pair.model, pair.guide, *example))
    backend = "eager" if not compiled else "inductor" if on.cuda else "aten"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = pv.stage(
            estimator, pair.model, pair.guide, made, example, load=load, backend=backend, precision=precision, **options
        )
    if compiled and not on.cuda:
        step.asynchronous, step.recorder = True, lambda run: run
    return step


def rows_of(on: Machine, data: Tensor, cell: Cell, number: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = min(cell.batch, len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(-(-number * size // len(data)))])
    return [order.to(on.device)[place * size : (place + 1) * size] for place in range(number)]


def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def check_equal_to_eager(on: Machine) -> dict[str, Any]:
    """200 steps with a schedule, a warm-up of beta and clipping, graph beside eager: the same losses and parameters."""
    cell, steps = CELLS["K=1 B=100"], 30 if on.small else 200
    data, runs = on.data(5_000 if on.cuda else 500), []
    for compiled in (False, True):
        pair = the_pair(on, cell)
        step = the_step(on, pair, data, cell, compiled=compiled, clip_norm=5.0, estimator=pv.estimators.ELBO(warm_up=50))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, steps)
        seeded(1)
        for rows in rows_of(on, data, cell, steps):
            step.step_async(rows, data)
            schedule.step()
        outcomes = torch.tensor(step.drain())
        runs.append((outcomes, [par.detach().clone() for par in step.parameters], step, torch.rand(1, device=on.device)))
    (eager, before, _, one), (graphed, after, step, other) = runs
    relative = ((eager - graphed).abs() / eager.abs()).amax(0).tolist()
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]
    found = {"worst_loss": relative[0], "worst_norm": relative[1], "worst_parameter": max(moved), "reason": step.reason}
    assert step.reason is None, found
    assert len(step._graphs) == 1, "no graph was made"
    assert relative[0] < 1e-3, found
    assert torch.equal(one, other), "the random stream is elsewhere"
    return found


def check_near_the_cpu(on: Machine) -> dict[str, Any]:
    """The losses of training on the CPU, within noise."""
    cell, steps = CELLS["K=1 B=100"], 20 if on.small else 200
    means = []
    for where in (on, Machine(on.small, on.root, torch.device("cpu"))):
        data = where.data(5_000 if on.cuda else 500)
        step = the_step(where, the_pair(where, cell), data, cell, compiled=where.cuda)
        seeded(5)
        for rows in rows_of(where, data, cell, steps, seed=2):
            step.step_async(rows, data)
        losses = np.array(step.drain())[-steps // 2 :, 0] / cell.batch
        means.append((float(losses.mean()), float(losses.std(ddof=1) / len(losses) ** 0.5)))
    difference = abs(means[0][0] - means[1][0])
    found = {"loss_per_datum_and_error": means}
    assert difference < 4 * (means[0][1] ** 2 + means[1][1] ** 2) ** 0.5 + 1e-9, found
    return found


def check_new_numbers(on: Machine) -> dict[str, Any]:
    """Replays draw new numbers, and the same ones from the same state of the generator."""
    cell, data = CELLS["K=1 B=20"], on.data(500)
    step = the_step(on, the_pair(on, cell), data, cell, lr=1e-12)
    rows = torch.arange(20, device=on.device)
    for _ in range(3):
        step.step_async(rows, data)
    step.drain()

    def losses() -> list[float]:
        for _ in range(25):
            step.step_async(rows, data)
        return [loss for loss, _ in step.drain()]

    state = torch.cuda.get_rng_state() if on.cuda else torch.get_rng_state()
    first, more = losses(), losses()
    (torch.cuda.set_rng_state if on.cuda else torch.set_rng_state)(state)
    again = losses()
    assert len(set(first + more)) == 50, "losses come twice"
    assert np.allclose(first, again, rtol=1e-5), "the state of the generator is not resumed"
    seeded(3)
    one = losses()
    seeded(3)
    assert np.allclose(one, losses(), rtol=1e-5), "a seed does not give its numbers"
    return {"spread_of_losses": float(np.std(first))}


def check_nan_guard(on: Machine) -> dict[str, Any]:
    """A bad step and all after it leave parameters and the optimizer's state alone, until somebody looks."""
    cell, data = CELLS["K=1 B=20"], on.data(500)
    data[7] = torch.nan
    pair = the_pair(on, cell)
    fine, bad = torch.arange(20, 40, device=on.device), torch.arange(20, device=on.device)
    step = the_step(on, pair, on.data(500), cell)
    for rows in [fine] * 5:
        step.step_async(rows, data)
    assert all(np.isfinite(loss) for loss, _ in step.drain())
    before = [each.detach().clone() for each in (*step.parameters, *step._update.touched)]
    for rows in [bad, *[fine] * 16]:
        step.step_async(rows, data)
    losses = [loss for loss, _ in step.drain()]
    assert np.isnan(losses[0]), "the loss is a number"
    after = [*step.parameters, *step._update.touched]
    assert all(map(torch.equal, before, after)), "something moved"
    step.step_async(fine, data)
    assert np.isfinite(step.drain()[0].loss)
    assert not torch.equal(before[0], step.parameters[0]), "nothing moves any more"
    return {"losses_after": losses[1:4]}


def check_learning_rate(on: Machine) -> dict[str, Any]:
    """The learning rate of each step is the optimizer's at that step."""
    cell, data = CELLS["K=1 B=20"], on.data(500)
    step = the_step(on, the_pair(on, cell), data, cell, lr=0.01)
    rows, moved = torch.arange(20, device=on.device), []
    for turn in range(40):
        step.optimizer.param_groups[0]["lr"] = 0.01 if turn % 13 < 6 else 0.0
        before = [each.detach().clone() for each in step.parameters]
        outcome = step(rows, data)
        assert np.isfinite(outcome.loss)
        moved.append(not all(map(torch.equal, before, step.parameters)))
    assert moved == [turn % 13 < 6 for turn in range(40)], moved
    return {}


def check_fit(on: Machine) -> dict[str, Any]:
    """``fit`` compiled and not, on grey data binarised within, with a ragged last batch, validation and a schedule."""
    bounds, seconds = [], []
    grey = on.data(1_050 if on.cuda else 250, grey=True).cpu()  # data may lie anywhere
    for compile in (False, on.cuda):
        vae = the_pair(on, CELLS["K=1 B=100"])
        began = time.perf_counter()
        history = vae.fit(
            grey, epochs=8 if on.cuda else 2, batch_size=100, seed=0, transform=binarize, compile=compile, schedule="cosine",
            validation=0.1, progress=False, lr=1e-3,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
        bounds.append(history.bound + history.validation)
    worst = float(np.max(np.abs(np.array(bounds[0]) / np.array(bounds[1]) - 1)))
    assert worst < 1e-3, (worst, bounds)
    return {"worst": worst, "seconds": seconds}


def check_memory_is_flat(on: Machine) -> dict[str, Any]:
    cell, data = CELLS["K=1 B=100"], on.data(1_000)
    step = the_step(on, the_pair(on, cell), data, cell)
    held = []
    for number in (40, 200, 1_000) if on.cuda else (12, 20):
        for rows in rows_of(on, data, cell, number):
            step.step_async(rows, data)
        step.drain()
        on.sync()
        del rows  # a view of all rows
        held.append(torch.cuda.memory_allocated() if on.cuda else 0)
    assert held[-1] <= held[-2] + 2**16, held
    return {"bytes": held}


def check_two_models(on: Machine) -> dict[str, Any]:
    """Two models in one process, step by step in turn, are what they are alone."""
    cell, data = CELLS["K=1 B=20"], on.data(500)
    rows = rows_of(on, data, cell, 24)

    def losses(together: bool) -> list[list[float]]:
        steps = [the_step(on, the_pair(on, cell, seed), data, cell, lr=lr) for seed, lr in ((0, 1e-3), (1, 3e-3))]
        found: list[list[float]] = [[], []]
        for block in range(2):
            for which in (0, 1) if together else (0,):
                seeded(10 * block + 1)
                for each in rows[12 * block : 12 * block + 12]:
                    steps[which].step_async(each, data)
                found[which] += [loss for loss, _ in steps[which].drain()]
        return found

    alone, (first, second) = losses(False)[0], losses(True)
    assert np.allclose(alone, first, rtol=1e-4), (alone[-3:], first[-3:])
    assert not np.allclose(first, second, rtol=1e-4)
    return {}


def check_other_optimizers(on: Machine) -> dict[str, Any]:
    """What is no kernel runs outside the graph, says so, and is right."""
    cell, data, losses = CELLS["K=1 B=20"], on.data(500), []
    for compiled in (False, True):
        step = the_step(on, the_pair(on, cell), data, cell, compiled=compiled, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seeded(1)
            for rows in rows_of(on, data, cell, 15):
                step.step_async(rows, data)
        losses.append([loss for loss, _ in step.drain()])
    assert np.allclose(*losses, rtol=1e-4), losses
    assert any("outside the step's CUDA graph" in str(each.message) for each in caught), [str(each.message) for each in caught]
    return {}


def check_precisions(on: Machine) -> dict[str, Any]:
    """The effect of TF32 and bfloat16 on the loss and on log p(x), beside the CPU's float64."""
    if not on.cuda:
        return {"left_out": "no GPU"}
    cell, data, found = CELLS["K=1 B=100"], on.data(2_000), {}
    exact = the_pair(on, cell).double()
    reference = exact.log_marginal(data[:200].double(), num_samples=1_000, seed=0, compile=False)
    for precision in ("float32", "tf32", "bfloat16"):
        step = the_step(on, the_pair(on, cell), data, cell, precision=precision)
        seeded(1)
        for rows in rows_of(on, data, cell, 60):
            step.step_async(rows, data)
        losses = [loss for loss, _ in step.drain()]
        evidence = the_pair(on, cell).log_marginal(data[:200], num_samples=1_000, seed=0, precision=precision)
        found[precision] = {
            "last_losses": losses[-3:],
            "mean_log_px": evidence.mean,
            "mean_difference_to_float64": float((evidence.log_px - reference.log_px).mean()),
            "worst_difference_to_float64": float(np.abs(evidence.log_px - reference.log_px).max()),
            "notes": evidence.notes,
            "reason": step.reason,
        }
    found["float64"] = {"mean_log_px": reference.mean, "mean_se": reference.mean_se}
    assert evidence.notes == {"precision": "bfloat16"}
    assert torch.get_float32_matmul_precision() == "highest", "the setting was not put back"
    assert abs(found["float32"]["mean_log_px"] - reference.mean) < 1, found
    return found


def check_chunks_do_not_matter(on: Machine) -> dict[str, Any]:
    """log p(x) of a GPU, compiled or not, and of the CPU, within their errors."""
    x = on.data(40)
    found = {}
    for name, where, options in [
        ("default", on, {}),
        ("eager", on, {"compile": False}),
        ("compiled", on, {"compile": on.cuda}),
        ("small chunks", on, {"chunk_size": 3_000}),
        ("CPU", Machine(on.small, on.root, torch.device("cpu")), {"compile": False}),
    ]:
        evidence = the_pair(where, CELLS["K=1 B=100"]).log_marginal(x, num_samples=400, seed=0, **options)
        found[name] = (evidence.mean, evidence.mean_se)
    for name, (mean, error) in found.items():
        assert abs(mean - found["CPU"][0]) < 5 * (error**2 + found["CPU"][1] ** 2) ** 0.5, (name, found)
    return found


def check_data_from_anywhere(on: Machine) -> dict[str, Any]:
    """A model on the GPU takes data of the CPU, of any type, and masks."""
    vae, x = the_pair(on, CELLS["K=1 B=20"]), on.data(12).cpu()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    for data in (x, x.bool(), x.double()):
        assert vae.reconstruct(data).device.type == vae.embed(data).device.type == on.device.type
    filled = vae.impute(x, mask, num_samples=20, seed=0)
    assert torch.equal(filled.cpu()[mask], x[mask])
    for data in (x, x.numpy(), (x, mask)):
        assert np.isfinite(vae.log_marginal(data, num_samples=50, seed=0).log_px).all()
    return {}


def check_other_methods(on: Machine) -> dict[str, Any]:
    """Refinement, mixture, annealing and quadrature of a pair of one latent agree on the GPU."""
    torch.manual_seed(0)
    vae, x = pv.make_vae(20, latent_dim=1, hidden=[10]).to(on.device), on.data(4)[:, :20]
    exact = pv.exact(vae.model, vae.guide, x)
    found: dict[str, Any] = {"exact": exact.mean, "method": exact.method}
    for name, take in {
        "refined": lambda: vae.log_marginal(x, num_samples=500, proposal="refined", seed=0),
        "mixture": lambda: vae.log_marginal(x, num_samples=2_000, proposal="mixture", seed=0),
        "target": lambda: vae.log_marginal(x, num_samples=2_000, target_se=0.02, seed=0),
        "annealed": lambda: pv.ais(vae.model, vae.guide, x, num_chains=16, num_temperatures=30, seed=0),
    }.items():
        evidence = take()
        found[name] = (evidence.mean, evidence.mean_se)
        assert np.abs(evidence.log_px - exact.log_px).max() < 6 * evidence.se.max() + 1e-3, (name, found)
    return found


CHECKS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}

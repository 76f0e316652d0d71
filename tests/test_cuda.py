"""Steps as CUDA graphs: what they do is tested on any machine, with a recorder that runs what it would record."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pairs import two_latents_pair
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrovae as pv
from pyrovae.compile import cuda, inductor
from pyrovae.compile import graph as compile_graph
from pyrovae.compile import step as compile_step
from pyrovae.compile.step import Step
from pyrovae.data.batches import Batches
from pyrovae.data.datasets import binarize
from pyrovae.evidence import finishing, planning
from pyrovae.evidence.psis import pareto_smooth_together
from pyrovae.programs.parameters import find_parameters


def _loaded_from(path: Path) -> Any:
    """A script as a module, loaded by its path: tests import nothing from experiments/ by name."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = _loaded_from(Path(__file__).parent.parent / "experiments" / "benchmarks" / "gpu.py")

X = torch.bernoulli(torch.full((12, 6), 0.3), generator=torch.Generator().manual_seed(0))
ADAM = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


def a_vae() -> Any:
    torch.manual_seed(0)
    return pv.make_vae(6, latent_dim=2, hidden=[8])


def replayed(run: cuda.Run) -> cuda.Run:
    """In a CUDA graph's place."""
    return run


def steps_of(
    batches: list[tuple[Tensor, ...]],
    *,
    graphs: bool,
    optimizer: Callable[..., Any] = ADAM["adam"],
    estimator: Any = None,
    pair: Any = None,
    schedule: Callable[..., Any] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
    recorder: Callable[[cuda.Run], cuda.Run] = replayed,
    **options: Any,
) -> SimpleNamespace:
    """Steps one by one, or ahead through graphs, and all that they leave behind."""
    pair = pair or a_vae()
    elbo = estimator or pv.estimators.ELBO(warm_up=9)
    parameters = find_parameters(pair.model, pair.guide, X if options.get("load") else batches[0][0])
    options.setdefault("load", lambda x: (x,))  # so that several are launched at once
    made = optimizer(parameters)
    if estimator is not None:  # as fit does: the first look at a pair reads values, and cannot be captured
        elbo.loss(pair.model, pair.guide, *batches[0])
    step = Step(elbo, pair.model, pair.guide, made, backend="aten", **options)
    if graphs:
        step.asynchronous, step.recorder = True, recorder
    scheduler = schedule(made)
    torch.manual_seed(1)
    outcomes = []
    for batch in batches:
        if graphs:
            step.step_async(*batch)
        else:
            outcomes.append(step(*batch))
        scheduler.step()
    outcomes += step.drain()
    state = [value.clone() for each in made.state.values() for value in each.values() if isinstance(value, Tensor)]
    parameters = [parameter.detach().clone() for parameter in parameters]
    return SimpleNamespace(outcomes=outcomes, parameters=parameters, state=state, step=step, draw=torch.rand(1))


def assert_same(one: SimpleNamespace, other: SimpleNamespace) -> None:
    torch.testing.assert_close(torch.tensor(one.outcomes), torch.tensor(other.outcomes), rtol=1e-5, atol=0, equal_nan=True)
    for have, want in zip(one.parameters + one.state, other.parameters + other.state, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.draw, other.draw)  # the random stream stands at the same place


@pytest.mark.parametrize(("optimizer", "clip_norm"), [("adam", None), ("adamw", 0.5)])
def test_graphs_take_the_steps_that_are_asked_for(optimizer: str, clip_norm: float | None) -> None:
    # Of other data each time, with a schedule and a warm-up of beta, more and fewer than one launch takes.
    batches = [(x,) for x in torch.bernoulli(torch.full((33, 12, 6), 0.3))]
    one, other = (steps_of(batches, graphs=graphs, optimizer=ADAM[optimizer], clip_norm=clip_norm) for graphs in (False, True))
    assert len(other.step._graphs) == 1
    assert_same(one, other)
    assert other.step.reason is None


def test_only_the_graph_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiler(module: Any, inputs: Any, rounded: bool, apart: bool) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(compile_graph, "_inductor", compiler)
    vae = a_vae()
    step = Step(pv.estimators.ELBO(), vae.model, vae.guide, ADAM["adam"](vae.parameters()))
    step.asynchronous, step.recorder = True, replayed
    for _ in range(25):
        step.step_async(X)
    assert len(step.drain()) == 25
    assert len(compiled) == 1
    (graphed,) = step._graphs.values()
    assert graphed.compute is not step._staged


def test_rows_are_gathered_and_drawn_within() -> None:
    grey, labels = torch.rand(60, 6), torch.arange(60)
    data = Batches((grey, labels), 12, shuffle=True, transform=binarize)
    torch.manual_seed(3)
    batches = [inputs for _ in range(7) for inputs in data.inputs()]
    runs = [steps_of(batches, graphs=graphs, load=lambda *rows: data.load(*rows)[:1]) for graphs in (False, True)]
    (graphed,) = runs[1].step._graphs.values()
    assert graphed.moving == 1
    assert graphed.kept == (data.arrays[0], data.arrays[1])  # the data stay where they are
    assert_same(*runs)


def test_ragged_batches_take_their_own_way_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(X,), (X.flip(0),), (X[:5],)] * 9
    one = steps_of(batches, graphs=False)
    for uses, number in ((50, 1), (3, 2)):
        monkeypatch.setattr(compile_step, "USES_BEFORE_CAPTURE", uses)
        other = steps_of(batches, graphs=True)
        assert len(other.step._graphs) == number
        assert_same(one, other)


def test_nothing_moves_from_a_nan_until_looked_at() -> None:
    bad = torch.full_like(X, torch.nan)
    three, more = (steps_of([(X,)] * 3 + [(x,) for x in rest], graphs=True) for rest in ([], [bad, *[X] * 14]))
    assert [math.isnan(loss) for loss, _ in more.outcomes] == [False] * 3 + [True] + [False] * 14
    for have, want in zip(three.parameters + three.state, more.parameters + more.state, strict=True):
        assert torch.equal(have, want)  # nor was a step counted
    outcome = more.step(X)
    assert math.isfinite(outcome.loss)
    assert not torch.equal(more.step.parameters[0], three.parameters[0])


def test_other_optimizers_stay_outside_and_say_so() -> None:
    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    with pytest.warns(RuntimeWarning, match="SGD runs outside the step's CUDA graph") as caught:
        other = steps_of([(X,)] * 15, graphs=True, optimizer=sgd)
    assert len(caught) == 1
    assert len(other.step._graphs) == 1
    assert_same(steps_of([(X,)] * 15, graphs=False, optimizer=sgd), other)


@pytest.mark.parametrize("from_step", [0, 15])
def test_hooks_of_an_optimizer_run_at_every_step_of_a_graph(from_step: int) -> None:
    vae, calls = a_vae(), []
    adam = ADAM["adam"](vae.parameters())
    step = Step(pv.estimators.ELBO(), vae.model, vae.guide, adam, backend="aten", load=lambda x: (x,))
    step.asynchronous, step.recorder = True, replayed
    why = "remove its hooks" if from_step == 0 else "settings or hooks change"

    def take(number: int) -> None:
        for _ in range(number):
            step.step_async(X)
        step.drain()

    take(from_step)
    adam.register_step_post_hook(lambda *args: calls.append(1))
    with pytest.warns(RuntimeWarning, match=why):
        take(20)
    assert len(calls) == 20


def test_betas_that_change_are_noticed() -> None:
    def one_cycle(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)  # which cycles Adam's first beta too

    with pytest.warns(RuntimeWarning, match="launched one by one, since the optimizer's settings or hooks change"):
        other = steps_of([(X,)] * 15, graphs=True, schedule=one_cycle)
    assert_same(steps_of([(X,)] * 15, graphs=False, schedule=one_cycle), other)


def test_a_checkpoint_loaded_in_between_is_noticed() -> None:
    runs = []
    for graphs in (False, True):
        run = steps_of([(X,)] * 12, graphs=graphs)
        made = run.step.optimizer
        made.load_state_dict({"state": made.state_dict()["state"], "param_groups": made.state_dict()["param_groups"]})
        torch.manual_seed(5)
        runs.append([run.step(X) for _ in range(5)])
    torch.testing.assert_close(*(torch.tensor(run) for run in runs), rtol=1e-5, atol=0)


class Tempered(nn.Module):
    """A pair that reads a number of Python's, which a graph keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.vae, self.power = a_vae(), 1.0

    def model(self, x: Tensor) -> None:
        with pyro.poutine.scale(scale=self.power):
            self.vae.model(x)

    def guide(self, x: Tensor) -> None:
        with pyro.poutine.scale(scale=self.power):
            self.vae.guide(x)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_a_program_that_changes_is_noticed_when_it_is_asked_for(power: float) -> None:
    runs = []
    for graphs in (False, True):
        pair = Tempered()
        step = Step(
            pyro.infer.Trace_ELBO(),
            pair.model,
            pair.guide,
            ADAM["adam"](pair.vae.parameters()),
            backend="aten",
            load=lambda x: (x,),
        )
        if graphs:
            step.asynchronous, step.recorder = True, replayed
        torch.manual_seed(1)
        for _ in range(17):
            step.step_async(X)
        found = step.drain()
        pair.power = power
        if power != 1.0:
            with pytest.warns(RuntimeWarning, match="its captured graph gives other numbers at half time"):
                step.recheck("at half time"), step.step_async(X)
        else:
            step.recheck("at half time"), step.step_async(X)
        for _ in range(17):
            step.step_async(X)
        runs.append(found + step.drain())
        if graphs:
            assert step.captured == (power == 1.0)
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-5, atol=0)


class Refusing:
    """A recorder that fails, or replays something else."""

    def __init__(self, how: str):
        self.how = how

    def __call__(self, run: cuda.Run) -> cuda.Run:
        if self.how == "refuses":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        return {"twice": lambda: (run(), run()), "never": lambda: None, "numbers": lambda: (torch.rand(1), run())}[self.how]


@pytest.mark.parametrize("how", ["refuses", "twice", "never", "numbers"])
def test_what_cannot_be_replayed_runs_without_a_graph_and_says_why(how: str) -> None:
    why = "CUDA refuses to capture it .*capturing\\)" if how == "refuses" else "a replay differs from the step: its losses .*"
    with pytest.warns(RuntimeWarning, match=f"launched one by one, since {why}: pass compile=False") as caught:
        other = steps_of([(X,)] * 15, graphs=True, recorder=Refusing(how))
    assert len(caught) == 1
    assert not other.step._graphs
    assert_same(steps_of([(X,)] * 15, graphs=False), other)


class Normalised(nn.Module):
    """A pair with running statistics, which the check at capture must not move, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vae = a_vae()
        self.norm, self.drop = nn.BatchNorm1d(6, affine=False), nn.Dropout(0.2)

    def model(self, x: Tensor) -> None:
        self.vae.model(x)

    def guide(self, x: Tensor) -> None:
        self.vae.guide(self.drop(self.norm(x)))


@pytest.mark.parametrize("pair", ["statistics", "two latents"])
def test_other_pairs_are_graphed_too(pair: str) -> None:
    runs, statistics = [], []
    for graphs in (False, True):
        torch.manual_seed(0)
        pyro.clear_param_store()
        made = Normalised() if pair == "statistics" else two_latents_pair()
        x = X if pair == "statistics" else torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
        runs.append(steps_of([(x,)] * 23, graphs=graphs, pair=made, estimator=pv.estimators.DReG(3), load=None))
        statistics.append(list(made.buffers()) if isinstance(made, nn.Module) else [])
    assert_same(*runs)
    for have, want in zip(*statistics, strict=True):
        torch.testing.assert_close(have, want)
    assert runs[1].step.reason is None


@pytest.mark.parametrize("options", [{}, {"target_se": 0.05}, {"proposal": "mixture"}], ids=str)
def test_a_gpu_scores_in_large_groups_and_fits_tails_together(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vae, x = a_vae(), torch.bernoulli(torch.full((700, 6), 0.4))
    expected = vae.log_marginal(x, num_samples=300, seed=0, **options)
    monkeypatch.setattr(planning, "_on_gpu", lambda device: True)
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**26)
    monkeypatch.setattr(planning, "GPU_GROUP", 300)
    fitted: list[Tensor] = []

    def together(*given: Any, **options: Any) -> Any:
        fitted.append(pareto_smooth_together(*given, **options))
        return fitted[-1]

    def no_tail_is_ordinary(*given: Any, **options: Any) -> Any:
        return *pareto_smooth_together(*given, **options)[:2], torch.zeros(len(given[0]), dtype=torch.bool)

    monkeypatch.setattr(finishing, "pareto_smooth_together", together)
    found = vae.log_marginal(x, num_samples=300, chunk_size=3060, seed=0, **options)
    # Other groups have other seeds, so the numbers agree within their errors.
    error = (expected.se**2 + found.se**2) ** 0.5
    assert abs(found.log_px - expected.log_px).max() < 5 * error.max()
    assert abs(found.mean - expected.mean) < 4 * (expected.mean_se**2 + found.mean_se**2) ** 0.5
    assert fitted
    monkeypatch.setattr(finishing, "pareto_smooth_together", no_tail_is_ordinary)
    by_arviz = vae.log_marginal(x, num_samples=300, chunk_size=3060, seed=0, **options)
    for one, other in [(found.khat, by_arviz.khat), (found.log_px_psis, by_arviz.log_px_psis), (found.log_px, by_arviz.log_px)]:
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    again = vae.log_marginal(x[:300], num_samples=300, chunk_size=3060, seed=0, **options)
    assert (again.log_px == found.log_px[:300]).all()  # in the data's order
    np.testing.assert_allclose(again.khat, found.khat[:300], rtol=1e-9)


def test_tf32_is_refused_on_a_cpu() -> None:
    vae = a_vae()
    for call in (lambda **options: vae.fit(X, progress=False, **options), lambda **options: vae.log_marginal(X, **options)):
        with pytest.raises(ValueError, match='precision="tf32" must run on an NVIDIA GPU, got a pair on the CPU'):
            call(precision="tf32")


def test_a_cpu_takes_no_graph() -> None:
    step = Step(pv.estimators.ELBO(), a_vae().model, a_vae().guide, torch.optim.Adam(a_vae().parameters()), backend="aten")
    assert step.recorder is None
    before = torch.get_float32_matmul_precision()
    with cuda.products_in("tf32", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


# The same on a GPU, by the checks of the benchmark.

NO_GPU = "" if torch.cuda.is_available() else "this torch finds no GPU: experiments/benchmarks/gpu.py runs where there is one"


@pytest.mark.cuda
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("name", gpu.CHECKS)
def test_on_a_gpu(name: str) -> None:
    gpu.CHECKS[name](gpu.Machine(small=False, root="../shared/data"))


@pytest.mark.filterwarnings("ignore")  # other libraries' own, which the benchmark writes down
@pytest.mark.parametrize(
    "parts",
    [
        ["cells", "products"],
        # But NumPyro, which has a process of its own. What the checks hold, tests of this file hold one by one.
        pytest.param(["checks", *[part for part in gpu.PARTS if part != "numpyro"]], marks=pytest.mark.slow),
    ],
    ids=["cells", "all"],
)
def test_the_benchmark_runs_small(tmp_path: Path, parts: list[str]) -> None:
    out = tmp_path / "gpu.json"
    result = gpu.run_all(gpu.Machine(small=True, root=str(tmp_path)), parts, out, seconds=600)
    assert result["failed"] == [], result
    kept = json.loads(out.read_text())
    assert set(kept["checks"]) == (set(gpu.CHECKS) if "checks" in parts else set())
    assert kept["cells"]["K=1 B=100"]["float32"]["ms"] > 0
    assert "K=1 B=100" in gpu.table(kept)


def test_scalar_constants_of_a_graph_move_to_the_device() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(x > 0, 0.0, x).sum(), torch.where(x > 1, x, 1.0))

    module = inductor.scalars_on(make_fx(program)(torch.randn(4)), torch.device("meta"))
    constants = module.graph.find_nodes(op="call_function", target=torch.ops.aten.scalar_tensor.default)
    assert [node.kwargs["device"].type for node in constants] == ["meta", "meta"]
    assert module(torch.randn(4, device="meta"))[1].device.type == "meta"

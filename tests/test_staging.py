"""A staged step is the eager step: the same draws, losses, parameters, buffers and optimizer state."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bare_param_pair, nested_plates_pair, pyro_nn_pair, two_latents_pair
from torch import Tensor, fx, nn

import pyrovae as pv
from pyrovae.compile import graph as compile_graph
from pyrovae.compile import matmul, rewrites
from pyrovae.compile import optimizer as compile_optimizer
from pyrovae.compile.graph import Staged
from pyrovae.compile.step import Step
from pyrovae.evidence import planning
from pyrovae.programs.parameters import find_parameters
from pyrovae.registry import names
from pyrovae.training import loop

X = torch.bernoulli(torch.full((12, 6), 0.3), generator=torch.Generator().manual_seed(0))
UNCAPTURED = {"trace_graph_elbo", "trace_enum_elbo", "renyi_elbo"}  # Pyro's, without a differentiable loss


def a_vae() -> Any:
    torch.manual_seed(0)
    return pv.make_vae(6, latent_dim=2, hidden=[8])


def train(pair: Any, x: Tensor, estimator: Any, backend: str, steps: int = 10, **options: Any) -> SimpleNamespace:
    """Train a pair whose parameters are known by name, and return all that a step leaves behind."""
    elbo = pv.estimators.make_estimator(estimator)
    elbo.loss(pair.model, pair.guide, x)
    optimizer = torch.optim.Adam(find_parameters(pair.model, pair.guide, x), lr=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = Step(elbo, pair.model, pair.guide, optimizer, backend=backend, **options)
    torch.manual_seed(1)
    losses = []
    for turn in range(steps):
        losses.append(step(x if turn % 5 != 4 else x[:5]).loss)
        schedule.step()
    parameters = [parameter.detach().clone() for parameter in step.parameters]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return SimpleNamespace(losses=losses, parameters=parameters, state=state, step=step, draw=torch.rand(1))


def assert_same(one: SimpleNamespace, other: SimpleNamespace, rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=rtol, atol=0)
    for have, want in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(have, want, rtol=100 * rtol, atol=100 * rtol)
    assert one.state.keys() == other.state.keys()
    for index in one.state:
        for key, want in one.state[index].items():
            torch.testing.assert_close(other.state[index][key], want, rtol=100 * rtol, atol=100 * rtol)
    assert torch.equal(one.draw, other.draw)  # the random stream stands at the same place


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", sorted(set(names("estimator")) - {"trace_enum_elbo"}))
def test_captured_equals_eager_for_every_estimator(name: str) -> None:
    spec = name if name.startswith("trace_") else {"kind": name, "num_particles": 4}
    runs = []
    for backend in ("eager", "aten"):
        pyro.clear_param_store()
        runs.append(train(a_vae(), X.double(), spec, backend))
    assert_same(*runs, rtol=1e-12)
    assert runs[1].step.reason is None
    assert runs[1].step.captured == (name not in UNCAPTURED)


OPTIONS: list[dict[str, Any]] = [
    {"kind": "elbo", "warm_up": 9, "num_particles": 3},
    {"kind": "elbo", "kl": "analytic", "beta": 0.5, "free_bits": 0.1},
    {"kind": "rws", "num_particles": 4, "guide_phase": "sleep"},
    {"kind": "ovis", "num_particles": 4, "gamma": 0.5},
    {"kind": "iwae", "num_particles": 4, "vectorize_particles": False},
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", OPTIONS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_captured_equals_eager_for_options(spec: dict[str, Any]) -> None:
    runs = [train(a_vae(), X.double(), spec, backend) for backend in ("eager", "aten")]
    assert_same(*runs, rtol=1e-12)
    assert runs[1].step.captured


PAIRS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "bare params": (bare_param_pair, torch.linspace(-2, 2, 12)),
    "pyro modules": (pyro_nn_pair, torch.randn(12, 3, generator=torch.Generator().manual_seed(2))),
    "two latents": (two_latents_pair, torch.randn(12, 4, generator=torch.Generator().manual_seed(2))),
}


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        *(("two latents", kind) for kind in ("elbo", "iwae", "dreg", "gdreg", "rws")),
        *(("bare params", kind) for kind in ("elbo", "dreg")),
        *(("pyro modules", kind) for kind in ("iwae", "gdreg")),
    ],
)
def test_captured_equals_eager_on_foreign_pairs(pair: str, kind: str) -> None:
    build, x = PAIRS[pair]
    runs = []
    for backend in ("eager", "aten"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        runs.append(train(build(), x, {"kind": kind, "num_particles": 3}, backend))
    assert_same(*runs, rtol=1e-6)
    assert runs[1].step.captured


def test_a_pair_without_parameters_says_so() -> None:
    pair = nested_plates_pair(-2)
    scale = nn.Parameter(torch.ones(()))
    step = Step(pv.estimators.ELBO(), pair.model, pair.guide, torch.optim.SGD([scale], lr=0.1), backend="eager")
    with pytest.raises(ValueError, match="No gradient reached any parameter"):
        step(torch.zeros(5, 2))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "dreg", "num_particles": 4},
        pytest.param({"kind": "elbo", "warm_up": 30}, marks=pytest.mark.slow),
        pytest.param({"kind": "gdreg", "num_particles": 4}, marks=pytest.mark.slow),
        pytest.param({"kind": "vimco", "num_particles": 4}, marks=pytest.mark.slow),
        pytest.param("trace_elbo", marks=pytest.mark.slow),
        pytest.param("trace_mean_field_elbo", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_equals_eager_over_100_steps(spec: Any) -> None:
    runs = []
    for backend in ("eager", "inductor"):
        pyro.clear_param_store()
        runs.append(train(a_vae(), X, spec, backend, steps=100))
    assert_same(*runs, rtol=1e-5)
    assert runs[1].step.captured
    assert runs[1].step.reason is None


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_compiled_equals_eager_on_foreign_pairs(pair: str) -> None:
    build, x = PAIRS[pair]
    runs = []
    for backend in ("eager", "inductor"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        runs.append(train(build(), x, {"kind": "dreg", "num_particles": 3}, backend, steps=100))
    assert_same(*runs, rtol=1e-5)
    assert runs[1].step.reason is None


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("way", ["straight", "transposed"])
def test_compiled_with_onednn_products_equals_eager(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_onednn_time_ratio", lambda *product: {way: 0.1})
    monkeypatch.setattr(matmul, "FEWEST_MULTIPLICATIONS", 0)
    runs, scores = [], []
    for backend in ("eager", "inductor"):
        vae = a_vae()
        runs.append(train(vae, X, {"kind": "dreg", "num_particles": 4}, backend, steps=100))
        scores.append(vae.log_marginal(X, num_samples=3000, seed=0, compile=backend == "inductor", max_memory=8))
    assert_same(*runs, rtol=1e-5)
    assert runs[1].step.reason is None
    (graph, *_) = runs[1].step._staged._graphs.values()
    assert torch.ops.pyrovae.mm.default in [node.target for node in graph.module.graph.nodes]
    torch.testing.assert_close(*(torch.tensor(each.log_px) for each in scores), rtol=1e-5, atol=1e-5)


ONEDNN = torch.ops.pyrovae.mm.default


class Bare(nn.Module):
    """A pair that multiplies by its parameters with no layer in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = (nn.Parameter(torch.randn(shape) / 3) for shape in ((6, 2), (2, 6)))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.up).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x @ self.down, 1.0).to_event(1))


@pytest.mark.parametrize("how", ["bfloat16", "oneDNN"])
def test_products_with_parameters_themselves_are_rewritten_too(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def compiler(module: fx.GraphModule, inputs: Any, rounded: bool, apart: bool) -> Any:
        module = matmul.round_products(module) if rounded else matmul.select_matmul_backend(rewrites.rewrite(module), 1)
        products.extend(node for node in module.graph.nodes if node.target in (torch.ops.aten.mm.default, ONEDNN))
        return module

    monkeypatch.setattr(compile_graph, "_inductor", compiler)
    monkeypatch.setattr(matmul, "_onednn_time_ratio", lambda *product: {"straight": 0.1})
    monkeypatch.setattr(matmul, "FEWEST_MULTIPLICATIONS", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = train(Bare(), X, "elbo", "inductor", precision="bfloat16" if how == "bfloat16" else "float32")
    assert run.step.reason is None
    assert len(products) == 5  # two forward, and back to both parameters and to z
    if how == "oneDNN":
        assert all(node.target == ONEDNN for node in products)
    else:
        assert all(factor.kwargs["dtype"] is torch.bfloat16 for node in products for factor in node.args)


class Normalised(nn.Module):
    """A pair whose networks keep running statistics and draw dropout masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # No bias where normalisation takes it away again: its gradient is rounding, which Adam would blow up to whole steps.
        self.encoder = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.decoder = nn.Linear(2, 6)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_buffers_and_dropout_are_as_in_eager_mode(backend: str) -> None:
    runs, statistics = [], []
    for each in ("eager", backend):
        pair = Normalised()
        runs.append(train(pair, X, "elbo", each))
        statistics.append([buffer.clone() for buffer in pair.buffers()])
    assert_same(*runs, rtol=1e-5)
    assert runs[1].step.captured
    for have, want in zip(*statistics, strict=True):
        torch.testing.assert_close(have, want)
    assert int(statistics[0][2]) == 11  # num_batches_tracked: ten steps, and the loss before them


def test_a_program_that_reads_values_runs_as_it_is_and_says_why() -> None:
    pair = bare_param_pair()

    def model(x: Tensor) -> None:
        if x.sum() > 0:
            pair.model(x)
        else:
            pair.model(-x)

    reading = SimpleNamespace(model=model, guide=pair.guide)
    with pytest.warns(RuntimeWarning, match="it cannot be captured .* compile=False") as caught:
        staged = train(reading, torch.linspace(-2, 3, 12), "elbo", "inductor")
    assert len(caught) == 1
    pyro.clear_param_store()
    assert_same(train(reading, torch.linspace(-2, 3, 12), "elbo", "eager"), staged, rtol=0)


def test_without_a_compiler_the_captured_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: Any) -> None:
        raise RuntimeError("No working C++ compiler found.\nmore lines")

    monkeypatch.setattr(compile_graph, "_inductor", no_compiler)
    with pytest.warns(RuntimeWarning, match="captured, but not compiled.*No working C\\+\\+ compiler found\\)") as caught:
        staged = train(a_vae(), X, "elbo", "inductor")
    assert len(caught) == 1
    assert staged.step.captured
    assert_same(train(a_vae(), X, "elbo", "eager"), staged, rtol=1e-6)


def test_a_state_kept_in_python_is_found_out() -> None:
    calls = [0]

    def counting(x: Tensor) -> tuple[Tensor]:
        calls[0] += 1
        return (x * calls[0],)

    staged = Staged(counting, "aten")
    assert staged(torch.ones(2))[0].tolist() == [1.0, 1.0]
    with pytest.warns(RuntimeWarning, match=r"keeps a state in Python, which a graph does not: calls\.0"):
        second = staged(torch.ones(2))[0]
    assert second[0] == calls[0] == 2, "counted as without a graph"
    assert not staged.captured


SETTINGS = SimpleNamespace(temperature=1.0)


class Changeable(nn.Module):
    """A pair whose numbers depend on Python state of every kind; the loss is a different one in each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.drop = nn.Linear(6, 2), nn.Linear(2, 6), nn.Dropout(0.5)
        self.activation: nn.Module = nn.Tanh()
        self.kind, self.beta, self.calls, self.weights = kind, 1.0, 0, [1.0, 1.0]
        SETTINGS.temperature = 1.0

    def temper(self, x: Tensor) -> Any:
        self.calls += self.kind == "counter"
        values: dict[str, Callable[[], Any]] = {
            "attribute": lambda: self.beta,
            "list": lambda: sum(self.weights),
            "global": lambda: SETTINGS.temperature,
            "counter": lambda: 1.0 + 0.1 * self.calls,
            "counter at a step": lambda: 1.0 + (self.calls > 4),
            "numpy": lambda: 1.0 + float(x.numpy().mean()),
            "rows": lambda: torch.tensor([1.0 + row[0] for row in x.tolist()]),
            "item": lambda: 1.0 + x[0].sum().item(),
            "memory": lambda: 1.0 + ctypes.c_float.from_address(x.data_ptr()).value,  # past torch
        }
        self.calls += self.kind == "counter at a step"
        return values.get(self.kind, lambda: 1.0)()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = self.decoder(self.activation(self.drop(z)))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
            pyro.factor("tempered", -self.temper(x) * logits.square().sum(-1))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))

    def on_epoch(self, record: dict) -> None:
        """Change something, in the second epoch and not in the first, when the graph has been found right."""
        if record["epoch"] != 2:
            return
        if self.kind == "attribute":
            self.beta = 3.0
        elif self.kind == "list":
            self.weights[1] = 3.0
        elif self.kind == "global":
            SETTINGS.temperature = 3.0
        elif self.kind == "module":
            self.activation = nn.ReLU()
        elif self.kind == "mode":
            self.drop.eval()


def fitted(kind: str, compile: bool, **options: Any) -> tuple[list[float], list[Tensor]]:
    pair = Changeable(kind)
    pair.drop.train(kind == "mode")
    history = pv.fit(
        pair.model, pair.guide, X, epochs=5, batch_size=4, lr=0.02, progress=False, seed=3, compile=compile,
        on_epoch=pair.on_epoch, **options,
    )  # fmt: skip
    return history.bound, [parameter.detach().clone() for parameter in pair.parameters()]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured graph itself in place of what a compiler makes of it, which takes seconds."""
    monkeypatch.setattr(compile_graph, "_inductor", lambda module, *args: module)


STATE_OF = {
    "attribute": "after on_epoch of epoch 2",
    "list": "after on_epoch of epoch 2",
    "global": "after on_epoch of epoch 2",
    "module": "after on_epoch of epoch 2",
    "mode": "after on_epoch of epoch 2",
    "counter": "keeps a state in Python, which a graph does not: calls:",
    "counter at a step": "keeps a state in Python, which a graph does not: calls:",
    "numpy": "cannot be captured .*values into Python, by numpy",
    "rows": "cannot be captured .*values into Python, by tolist",
    "item": "cannot be captured",
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", STATE_OF)
def test_python_state_is_as_in_eager_mode(kind: str) -> None:
    with pytest.warns(RuntimeWarning, match=STATE_OF[kind]) as caught:
        staged = fitted(kind, compile=True)
    assert len(caught) == 1
    eager = fitted(kind, compile=False)
    assert staged[0] == pytest.approx(eager[0], rel=1e-6)
    torch.testing.assert_close(staged[1], eager[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attribute", "mode"])
def test_python_state_is_as_in_eager_mode_when_compiled(kind: str) -> None:
    with pytest.warns(RuntimeWarning, match=STATE_OF[kind]):
        staged = fitted(kind, compile=True)
    assert staged[0] == pytest.approx(fitted(kind, compile=False)[0], rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_what_does_not_change_stays_captured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        staged = fitted("none", compile=True)
    assert staged[0] == pytest.approx(fitted("none", compile=False)[0], rel=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_a_state_out_of_sight_is_found_at_an_epochs_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 3)
    monkeypatch.setattr(compile_graph, "python_state", lambda *programs: {})
    monkeypatch.setattr(loop, "python_state", lambda *programs: {})
    with pytest.warns(RuntimeWarning, match="other numbers at the start of epoch 3; they agreed at the start of epoch 2"):
        staged = fitted("attribute", compile=True)
    assert staged[0] == pytest.approx(fitted("attribute", compile=False)[0], rel=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_checks_take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"eager": 0}
    original = Step._differentiate

    def counted(step: Step, *inputs: Tensor) -> Any:
        counts["eager"] += 1
        return original(step, *inputs)

    monkeypatch.setattr(Step, "_differentiate", counted)
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 50)
    pair = Changeable("none").eval()
    pv.fit(pair.model, pair.guide, X, epochs=120, batch_size=4, progress=False, compile=True, on_epoch=lambda record: None)
    assert counts["eager"] == 2 + 360 // 51  # captured, compared, and once after each 17 epochs of 3 steps


def test_other_rows_show_what_the_captured_ones_hide() -> None:
    table = {(1.0, 2.0): 1.0}  # read past torch, through memory

    def reading(x: Tensor) -> tuple[Tensor]:
        values = (ctypes.c_float * len(x)).from_address(x.data_ptr())
        return (x * table.get(tuple(values), 5.0),)

    staged = Staged(reading, "aten")
    x = torch.tensor([1.0, 2.0])
    staged(x)
    with pytest.warns(RuntimeWarning, match="gives other numbers"):
        assert staged(x)[0].tolist() == [1.0, 2.0]
    assert staged(x.flip(0))[0].tolist() == [10.0, 5.0]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["rows", "item"])
def test_scoring_reads_each_chunk_anew(kind: str) -> None:
    scores = []
    for compile in (True, False):
        pair = Changeable(kind).eval()
        context = pytest.warns(RuntimeWarning, match=STATE_OF[kind]) if compile else contextlib.nullcontext()
        with context:
            scores.append(pv.log_marginal(pair.model, pair.guide, X, num_samples=40, seed=0, compile=compile, chunk_size=40))
    assert scores[0].log_px == pytest.approx(scores[1].log_px, rel=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_scoring_is_compared_again_on_later_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CHUNKS_TO_RECHECK", 200)
    pair = Changeable("memory").eval()
    x = torch.cat([torch.zeros(256, 6), torch.ones(4, 6)])
    with pytest.warns(RuntimeWarning, match="gives other numbers from datum 256 on; they agreed at its second call"):
        staged = pv.log_marginal(pair.model, pair.guide, x, num_samples=4, seed=0, compile=True, chunk_size=4)
    eager = pv.log_marginal(pair.model, pair.guide, x, num_samples=4, seed=0, compile=False, chunk_size=4)
    assert staged.log_px == pytest.approx(eager.log_px, rel=1e-5)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda tensor: float(tensor.detach().numpy().mean()),
    "tolist": lambda tensor: sum(tensor.tolist()) / len(tensor),
    "item": lambda tensor: tensor.mean().item(),
    "__array__": lambda tensor: float(np.mean(np.asarray(tensor.detach()))),
    "__float__": lambda tensor: sum(map(float, tensor.detach())),
    "rows": lambda tensor: torch.tensor([2 * value for value in tensor.tolist()]),
}


@pytest.mark.parametrize("what", ["input", "parameter", "data of a parameter"])
@pytest.mark.parametrize("read", READERS)
def test_values_read_into_python_are_never_frozen(read: str, what: str) -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def reading(x: Tensor) -> tuple[Tensor]:
        read_from = {"input": x, "parameter": weight, "data of a parameter": weight.data}[what]
        return (x * READERS[read](read_from) + 0 * weight.detach(),)

    staged = Staged(reading, "aten")
    with pytest.warns(RuntimeWarning, match=r"cannot be captured \(.*(into Python, by|get value out of a tracing tensor)"):
        staged(torch.ones(2))
    x = torch.tensor([4.0, 5.0])
    weight.data.add_(1.0)
    assert torch.equal(staged(x)[0], reading(x)[0])
    assert not staged.captured


def test_a_constant_may_be_read() -> None:
    shift = torch.tensor([1.0, 2.0])
    staged = Staged(lambda x: (x + sum(shift.tolist()),), "aten")
    for _ in range(3):
        assert staged(torch.ones(2))[0].tolist() == [4.0, 4.0]
    assert staged.captured
    assert staged.reason is None


def test_torchs_wrappers_are_left_out_only_where_they_do_nothing() -> None:
    from torch._inductor.output_code import CompiledFxGraph

    x, y, kept = torch.arange(4.0), torch.ones(4), torch.zeros(4)
    calls = {"within": 0}
    original = CompiledFxGraph.__call__

    def counted(graph: CompiledFxGraph, inputs: Any) -> Any:
        calls["within"] += 1
        return original(graph, inputs)

    def keeps_count(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        kept.add_(1)
        return (a * b + kept,)

    plain, aliased = Staged(lambda a, b: (a - 2 * b, a.sum())), Staged(lambda a, b: (a.view(2, 2), a - 2 * b))
    counting = Staged(keeps_count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledFxGraph, "__call__", counted)
        for staged, past in ((plain, False), (aliased, True), (counting, False)):
            for _ in range(3):
                staged(x, y)
            calls["within"] = 0
            staged(y, x)
            assert (calls["within"] > 0) == past
    assert torch.equal(kept, torch.full((4,), 4.0))
    for turn in (1.0, 2.0):
        torch.testing.assert_close(plain(y, turn * x), (y - 2 * turn * x, y.sum()))
        torch.testing.assert_close(aliased(turn * x, y), ((turn * x).view(2, 2), turn * x - 2 * y))
        torch.testing.assert_close(counting(x, turn * y), (turn * x + 4 + turn,))
    assert plain.reason is aliased.reason is counting.reason is None


@pytest.mark.parametrize("backend", ["inductor", "aten"])
def test_data_that_ask_for_a_gradient_are_data(backend: str) -> None:
    plain, asking = (
        train(a_vae(), x, "elbo", how, steps=4) for x, how in ((X, "eager"), (X.clone().requires_grad_(), backend))
    )
    assert_same(plain, asking, rtol=1e-5)
    assert asking.step.captured
    assert not any(parameter.grad_fn for parameter in asking.step.parameters)


@pytest.mark.parametrize("backend", ["inductor", "aten"])
def test_an_input_given_twice_is_two_inputs(backend: str) -> None:
    x, y = torch.arange(4.0), torch.ones(4)
    staged = Staged(lambda a, b, c: (a - 2 * b + 4 * c,), backend)
    for given in ((x, x, y), (x, x, y), (x, y, y), (y, x, x), (x, y, 2 * y)):
        torch.testing.assert_close(staged(*given), (given[0] - 2 * given[1] + 4 * given[2],))


def test_ragged_and_many_shapes_make_few_graphs() -> None:
    staged = Staged(lambda x: (x.sum(),), "aten")
    for _ in range(3):
        for size in range(1, 30):
            assert staged(torch.ones(size))[0] == size
    assert len(staged._graphs) == 1
    for _ in range(compile_graph.USES_BEFORE_CAPTURE):
        for size in range(1, 30):
            staged(torch.ones(size))
    assert len(staged._graphs) == compile_graph.MOST_GRAPHS


def test_nothing_moves_on_nan() -> None:
    vae = a_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1, fused=True)
    step = Step(pv.estimators.ELBO(), vae.model, vae.guide, optimizer, backend="aten")
    step(X)
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    assert torch.isnan(torch.tensor(step(torch.full_like(X, torch.nan)).loss))
    assert all(torch.equal(have, want) for have, want in zip(vae.parameters(), before, strict=True))
    step(X)
    assert not torch.equal(before[0], next(iter(vae.parameters())))


OPTIMIZERS = {"adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True), "sgd": lambda p: torch.optim.SGD(p, lr=0.01)}


def steps_of(optimizer: str, batches: list[Tensor], ahead: bool) -> SimpleNamespace:
    vae = a_vae()
    elbo = pv.estimators.ELBO(warm_up=5)
    step = Step(elbo, vae.model, vae.guide, OPTIMIZERS[optimizer](vae.parameters()), backend="aten", clip_norm=3.0)
    torch.manual_seed(1)
    if ahead:
        step.asynchronous = True  # as on a GPU
        for x in batches:
            assert step.step_async(x) is None
        outcomes = step.drain()
        assert step.drain() == []
    else:
        outcomes = [step(x) for x in batches]
    return SimpleNamespace(outcomes=outcomes, parameters=[each.detach().clone() for each in vae.parameters()], step=step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_taken_ahead_are_the_steps(optimizer: str) -> None:
    one, other = (steps_of(optimizer, [X] * 12, ahead) for ahead in (False, True))
    assert len(one.outcomes) == 12
    assert one.outcomes == other.outcomes
    assert all(map(torch.equal, one.parameters, other.parameters))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_taken_ahead_move_nothing_from_a_nan_until_looked_at(optimizer: str) -> None:
    bad = torch.full_like(X, torch.nan)
    three, more = steps_of(optimizer, [X] * 3, True), steps_of(optimizer, [X] * 3 + [bad, X, X], True)
    assert [math.isnan(loss) for loss, _ in more.outcomes] == [False] * 3 + [True] + [False] * 2
    assert all(map(torch.equal, three.parameters, more.parameters))
    more.step.step_async(X)
    (outcome,) = more.step.drain()
    assert math.isfinite(outcome.loss)
    assert not all(map(torch.equal, three.parameters, more.step.parameters))
    if optimizer == "adam":  # nor was a step counted
        steps = {int(state["step"]) for state in more.step.optimizer.state_dict()["state"].values()}
        assert steps == {4}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_kernel_alone_is_the_optimizers_step(kind: type[torch.optim.Optimizer], amsgrad: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad, "betas": (0.8, 0.9), "eps": 1e-3}
    one, other = kind(ours, fused=True, **options), kind(theirs, **options)
    update = compile_optimizer._Update(one)
    for turn in range(12):
        if turn == 4:  # as resuming from a checkpoint does
            one.load_state_dict(one.state_dict())
        if turn == 8:
            one.state.clear()
            other.state.clear()
        gradients = [torch.randn(3), torch.randn(2, 2)]
        for optimizer in (one, other):  # as a schedule does
            optimizer.param_groups[0]["lr"] *= 0.9
        update(ours, gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        other.step()
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("backend", ["eager", "aten"])
def test_each_step_has_the_beta_of_its_place_in_the_warm_up(backend: str) -> None:
    vae = a_vae()
    ours, theirs = (pv.estimators.ELBO(kl="analytic", warm_up=4) for _ in range(2))
    step = Step(ours, vae.model, vae.guide, torch.optim.SGD(vae.parameters(), lr=0.0), backend=backend)
    norms = []
    for turn in range(8):
        torch.manual_seed(turn % 2)
        norms.append(step(X).norm)
        torch.manual_seed(turn % 2)
        loss = theirs.differentiable_loss(vae.model, vae.guide, X) / len(X)
        expected = nn.utils.get_total_norm(torch.autograd.grad(loss, step.reached))
        assert norms[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(norms[:5])) == 5
    assert norms[4:6] == norms[6:]


def test_clipping_bounds_the_step() -> None:
    vae = a_vae()
    optimizer = torch.optim.SGD(vae.parameters(), lr=1.0)
    step = Step(pv.estimators.ELBO(), vae.model, vae.guide, optimizer, clip_norm=0.01, backend="aten")
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in vae.parameters()]
        assert step(X).norm > 0.01
        moved = [have.detach() - want for have, want in zip(vae.parameters(), before, strict=True)]
        assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aten"])
def test_clipping_leaves_short_gradients_as_they_are(backend: str) -> None:
    moved = []
    for clip_norm in (None, 1e6):
        vae = a_vae()
        optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
        step = Step(pv.estimators.ELBO(), vae.model, vae.guide, optimizer, clip_norm=clip_norm, backend=backend)
        torch.manual_seed(1)
        assert all(step(X).norm < 1e3 for _ in range(3))
        moved.append([each.detach().clone() for each in vae.parameters()])
    assert all(map(torch.equal, *moved))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_moves_where_the_gradient_is_infinite_and_the_loss_is_not(optimizer: str, ahead: bool) -> None:
    root, shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("root", root).sqrt(), 1.0))
            pyro.sample("x", dist.Normal(z + pyro.param("shift", shift), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    adam = OPTIMIZERS[optimizer]([root, shift])
    step = Step(pv.estimators.ELBO(), model, guide, adam, backend="eager")
    step.asynchronous = ahead
    for _ in range(2):
        step.step_async(torch.ones(4))
    outcomes = step.drain()
    assert all(math.isfinite(loss) and norm == math.inf for loss, norm in outcomes)
    assert (root.item(), shift.item()) == (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "binarize", "own"])
def test_fit_compiled_is_fit_eager(how: str) -> None:
    # The rows of a batch, and our own transforms, belong to the graph; a user's transform may be anything.
    transform = {"plain": None, "binarize": pv.data.binarize, "own": lambda x: torch.as_tensor(1 - x.numpy())}[how]
    data = (X.repeat(20, 1) * (0.7 if how == "binarize" else 1), torch.arange(20 * len(X)))
    bounds = []
    for compile in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history = pv.fit(
                *pair_of(a_vae()),
                data,
                epochs=20,
                batch_size=50,
                lr=0.01,
                progress=False,
                seed=0,
                transform=transform,
                compile=compile,
            )
        bounds.append(history.bound)
    torch.testing.assert_close(torch.tensor(bounds[0]), torch.tensor(bounds[1]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_products_in_bfloat16_are_near_those_in_float32() -> None:
    histories, evidence = [], []
    for precision in ("float32", "bfloat16"):
        vae = a_vae()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            histories.append(vae.fit(X, epochs=30, lr=0.01, progress=False, seed=0, compile=True, precision=precision))
            evidence.append(vae.log_marginal(X, num_samples=200, seed=0, compile=True, precision=precision))
    bounds = torch.tensor([history.bound for history in histories], dtype=torch.float64)
    assert not torch.equal(*bounds)
    torch.testing.assert_close(*bounds, rtol=2e-2, atol=0.0)
    difference = evidence[0].log_px - evidence[1].log_px
    assert 1e-6 < abs(difference).max() < 0.5


def test_bfloat16_is_refused_where_nothing_is_compiled() -> None:
    vae = a_vae()
    with pytest.raises(ValueError, match="must have a compiled step"):
        pv.fit(*pair_of(vae), X, compile=False, precision="bfloat16", progress=False)
    with pytest.raises(ValueError, match="must have a compiled step"):
        vae.log_marginal(X, compile=False, precision="bfloat16")
    with pytest.raises(ValueError, match="leave precision out"):
        vae.log_marginal(X, proposal="refined", precision="bfloat16")
    with pytest.raises(ValueError, match=r'precision must be "float32", "tf32" or "bfloat16", got .half.'):
        pv.fit(*pair_of(vae), X, precision="half", progress=False)


def test_compile_is_refused_where_it_is_no_choice() -> None:
    with pytest.raises(ValueError, match='compile must be True, False or "auto"'):
        pv.fit(*pair_of(a_vae()), X, compile="always", progress=False)
    with pytest.raises(ValueError, match="backend must be"):
        Staged(lambda x: (x,), "jit")


def test_short_runs_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_graph, "_inductor", lambda *args: pytest.fail("compiled"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(*pair_of(a_vae()), X, epochs=3, progress=False)


def pair_of(vae: Any) -> tuple[Any, Any]:
    return vae.model, vae.guide

"""Schedules, averages, accumulation, validation by importance sampling, and callbacks."""

from __future__ import annotations

import copy
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyrovae as pv
from pyrovae.compile.average import Average
from pyrovae.compile.step import Step
from pyrovae.training import callbacks
from pyrovae.training.schedules import OPTIMIZERS, Schedule, named_optimizer

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def a_vae() -> pv.VAE:
    torch.manual_seed(0)
    return pv.make_vae(4, latent_dim=2, hidden=[8], likelihood={"kind": "normal", "scale": "shared"})


def rates(schedule: Any, *, epochs: int = 4, **options: Any) -> list[float]:
    """The learning rate that each of two steps an epoch took."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)

    a_vae().fit(
        X, epochs=epochs, batch_size=30, lr=0.1, optimizer=Watched, schedule=schedule, progress=False, seed=0, **options
    )
    return seen


def test_schedules_have_their_formulas() -> None:
    assert rates("constant") == [0.1] * 8
    assert rates({"kind": "constant", "warm_up": 3}) == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 5)
    assert rates({"kind": "Step", "every": 2, "factor": 0.5}) == pytest.approx([0.1] * 4 + [0.05] * 4)
    cosine = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates({"kind": "cosine", "final": 0.2}) == pytest.approx([0.02 + 0.8 * rate for rate in cosine])
    after = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates({"kind": "cosine", "warm_up": 2}) == pytest.approx([0.1 / 3, 0.2 / 3, *after])


def test_a_plateau_follows_the_validation_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = iter([-3.0, -4.0, -4.0, -2.0, -2.5, -2.5, -2.5, -2.5])
    monkeypatch.setattr("pyrovae.training.validation.bound_of", lambda *_: next(bounds))
    seen = rates({"kind": "plateau", "patience": 1, "factor": 0.5}, epochs=8, validation=0.5)
    # The second epoch without a better bound halves the rate, and the count begins again.
    assert seen == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 2)


def test_torchs_plateau_is_stepped_with_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("min", "max"):
        bounds = iter([-3.0, -4.0, -4.0, -2.0])
        monkeypatch.setattr("pyrovae.training.validation.bound_of", lambda *_, bounds=bounds: next(bounds))
        seen = rates(lambda o, mode=mode: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode, 0.5, patience=1), validation=0.5)
        assert seen == pytest.approx([0.1] * 3 + [0.05])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "There is no schedule 'cosin'; did you mean 'cosine'?"),
        ({"schedule": {"kind": "cosine", "warmup": 3}}, "option 'warmup'; did you mean 'warm_up'?"),
        ({"schedule": "step"}, "must say after how many epochs"),
        ({"schedule": {"kind": "step", "every": 0}}, "every of a schedule must be a whole number from 1 on, got 0"),
        ({"schedule": "plateau"}, "needs one: pass validation=0.1"),
        ({"optimizer": {"kind": "sgd", "momentun": 0.9}}, "option 'momentun'; did you mean 'momentum'?"),
        ({"optimizer": {"kind": "sdg"}}, "There is no optimizer 'sdg'"),
        ({"ema": 1.0}, "ema must be a decay between 0 and 1"),
        ({"accumulate": 0}, "accumulate must be a positive integer"),
        ({"validation_samples": 5}, "validation_samples needs validation data"),
        ({"validation": 0.1, "validate_every": 0}, "validate_every must be a positive integer"),
        ({"validation": 0.1, "validate_every": 5, "patience": 2}, "patience must be at least validate_every = 5"),
        ({"max_steps": 0}, "max_steps must be a positive integer"),
        ({"max_skips": 0}, "max_skips must be a positive integer"),
        ({"every": "hour"}, "every must be a positive integer"),
    ],
)
def test_bad_options_get_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        a_vae().fit(X, **{"epochs": 1, "progress": False} | options)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(name: str) -> None:
    lr = 1.0 if name == "adadelta" else 0.01
    history = a_vae().fit(X, epochs=15, batch_size=20, lr=lr, optimizer=name, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0]


def test_options_of_an_optimizer_reach_it() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    optimizer = named_optimizer({"kind": "AdamW", "weight_decay": 0.3, "betas": (0.5, 0.6)})(parameters, lr=0.2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["fused"]) == (0.2, 0.3, (0.5, 0.6), True)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_schedule_free_optimizer_ends_at_its_average(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and the trained model have what the library's own ``optimizer.eval()`` makes of the parameters."""
    expected, validated = [], []

    class Evaluated(pv.Callback):
        def step(self, training: callbacks.Training) -> None:
            if training.step % 3 == 0:  # an epoch has three steps
                parameters, optimizer = copy.deepcopy((list(vae.parameters()), training.optimizer))
                assert optimizer.param_groups[0]["train_mode"]
                optimizer.eval()
                expected.append(parameters)

    def bound_of(*_: Any) -> float:
        validated.append([each.detach().clone() for each in vae.parameters()])
        return -1.0

    vae = a_vae()
    monkeypatch.setattr("pyrovae.training.validation.bound_of", bound_of)
    options = {"optimizer": {"kind": "Schedule-Free", "betas": (0.8, 0.99)}, "compile": compiled, "callbacks": [Evaluated()]}
    vae.fit(X, epochs=2, batch_size=20, lr=0.05, validation=X[:5], seed=0, progress=False, **options)
    assert len(expected) == len(validated) == 2
    for found, wanted in ((validated[0], expected[0]), (validated[1], expected[1]), (list(vae.parameters()), expected[1])):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "schedule_free", "schedule": "cosine"}, "pass schedule='constant' (--train.schedule constant)"),
        ({"optimizer": "schedule_free_sgd", "ema": 0.9}, "and leave ema out"),
        ({"optimizer": {"kind": "schedule_free", "beta": 3}}, "There is no optimizer 'AdamWScheduleFree' option 'beta'"),
    ],
)
def test_what_a_schedule_free_optimizer_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        a_vae().fit(X, epochs=1, progress=False, **options)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ValueError, match="not installed: pip install"):
        a_vae().fit(X, epochs=1, progress=False, optimizer="schedule_free")


def averages(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The moving average by its formula."""
    average = values[0].double()
    for count, value in enumerate(values[1:], 1):
        share = min(decay, (1 + count) / (10 + count))
        average = share * average + (1 - share) * value.double()
    return average


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_average_is_that_of_the_steps(asynchronous: bool, float64: None) -> None:
    vae = a_vae()
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.05, fused=True)
    step = Step(pv.estimators.ELBO(), vae.model, vae.guide, optimizer, backend="aten")
    step.asynchronous, step.waits, step.average = asynchronous, False, Average(list(vae.parameters()), 0.3)
    seen = [[parameter.detach().clone() for parameter in vae.parameters()]]
    x = X.double()
    for batch in (x, x, torch.full_like(x, math.nan), x, x, x, x):
        step.step_async(batch)
        if not bool(torch.isnan(batch).any()):  # a skipped step does not count
            seen.append([parameter.detach().clone() for parameter in vae.parameters()])
    step.drain()
    for place, value in enumerate(step.average.values):
        torch.testing.assert_close(value, averages([each[place] for each in seen], 0.3), rtol=1e-12, atol=1e-12)


def test_the_average_is_validated_kept_and_returned(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 6, "batch_size": 20, "lr": 0.05, "seed": 1, "validation": 0.2, "progress": False}
    plain, vae = a_vae(), a_vae()
    raw = plain.fit(X, **options)
    history = vae.fit(X, ema=0.9, **options, checkpoint=tmp_path)
    assert history.bound == raw.bound  # what is trained is the same
    assert history.validation != raw.validation
    kept = pv.load_checkpoint(tmp_path)
    assert all(torch.equal(parameter, kept.weights[name]) for name, parameter in plain.named_parameters())
    assert all(torch.equal(parameter, kept.state[f"average.1.{place}"]) for place, parameter in enumerate(vae.parameters()))
    again = a_vae()
    for budget in (3, 6):
        again = a_vae()
        again.fit(X, ema=0.9, **options | {"epochs": budget}, checkpoint=tmp_path / "again", resume="auto")
    assert all(map(torch.equal, again.parameters(), vae.parameters()))


@pytest.mark.parametrize("estimator", ["elbo", "iwae", "trace_elbo"])
@pytest.mark.parametrize("compile", [False, True])
def test_parts_add_up_to_the_gradient_of_the_batch(estimator: str, compile: bool, float64: None) -> None:
    # An encoder without noise would be no test, so both take the same noise: the batch holds the same datum throughout.
    vae = a_vae()

    def gradients(parts: int) -> list[torch.Tensor]:
        backend, sgd = "aten" if compile else "eager", torch.optim.SGD(vae.parameters(), lr=1.0)
        step = pv.stage(
            pv.estimators.make_estimator(estimator), vae.model, vae.guide, sgd, X.double(), backend=backend, clip_norm=0.5
        )
        step.parts = parts
        before = [parameter.detach().clone() for parameter in vae.parameters()]
        outcomes = []
        for _ in range(3):
            outcomes.append(step(X.double()))
        after = [old - parameter.detach() for old, parameter in zip(before, vae.parameters(), strict=True)]
        with torch.no_grad():
            for parameter, old in zip(vae.parameters(), before, strict=True):
                parameter.copy_(old)
        return [torch.tensor([each.loss for each in outcomes]), *after]

    noise = torch.distributions.Normal.rsample
    try:  # without noise, the gradient of the batch is exactly the sum of those of its parts
        torch.distributions.Normal.rsample = lambda self, shape=(): (
            self.loc.expand(self._extended_shape(shape)) + 0.3 * self.scale
        )
        whole, parted = gradients(1), gradients(7)
    finally:
        torch.distributions.Normal.rsample = noise
    for one, other in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_accumulation_trains_and_has_the_same_steps() -> None:
    one, other = (
        a_vae().fit(X, epochs=20, batch_size=20, lr=0.02, accumulate=parts, seed=0, progress=False) for parts in (1, 3)
    )
    assert one.records[-1]["step"] == other.records[-1]["step"]
    assert other.bound[-1] > other.bound[0] + 0.5
    assert other.bound[-1] == pytest.approx(one.bound[-1], abs=0.5)


def test_validation_by_importance_sampling_every_so_often() -> None:
    options: dict[str, Any] = {"epochs": 6, "batch_size": 20, "lr": 0.02, "seed": 0, "progress": False}
    held_out = X[:10]
    vae, plain = a_vae(), a_vae()
    history = vae.fit(X[10:], validation=held_out, validation_samples=300, validate_every=2, **options)
    assert [record["validation"] is None for record in history.records] == [True, False] * 3
    assert history.validation[-1] == pytest.approx(vae.log_marginal(held_out, num_samples=300, seed=0).mean, abs=1e-6)
    plain.fit(X[10:], **options)
    assert all(map(torch.equal, vae.parameters(), plain.parameters())), "validation moves nothing"


class Recorder(pv.Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, training: callbacks.Training) -> None:
        self.calls.append("start")

    def step(self, training: callbacks.Training) -> None:
        self.calls.append((training.epoch, training.step))

    def epoch(self, training: callbacks.Training, record: dict[str, Any]) -> None:
        self.calls.append(record["epoch"])
        if record["epoch"] == 2:
            training.stop("two are enough")

    def end(self, training: callbacks.Training) -> None:
        self.calls.append("end")


def test_callbacks_are_called_in_order_and_may_stop() -> None:
    recorder = Recorder()
    history = a_vae().fit(X, epochs=5, batch_size=30, progress=False, callbacks=[recorder])
    assert recorder.calls == ["start", (1, 1), (1, 2), 1, (2, 3), (2, 4), 2, "end"]
    assert history.stopped == "two are enough"


class Failing(pv.Callback):
    def epoch(self, training: callbacks.Training, record: dict[str, Any]) -> None:
        raise RuntimeError("its own")


def test_the_end_is_called_however_a_run_ends() -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="its own"):
        a_vae().fit(X, epochs=5, batch_size=30, progress=False, callbacks=[recorder, Failing()])
    assert recorder.calls[-1] == "end"


class Module(SimpleNamespace):
    """Stands for a logging library: notes what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return called


@pytest.mark.parametrize(
    ("name", "library"), [("WandB", "wandb"), ("MLflow", "mlflow"), ("TensorBoard", "torch.utils.tensorboard")]
)
def test_loggers_log_or_say_how_to_install(name: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path} if name == "TensorBoard" else {}
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"is not installed: pip install"):
        getattr(callbacks, name)(**options)
    module = Module()
    monkeypatch.setitem(sys.modules, library, module)
    a_vae().fit(X, epochs=2, validation=0.5, progress=False, callbacks=[getattr(callbacks, name)(**options)])
    called = [call for call, _, _ in module.calls]
    logged = {
        "WandB": ["init", "log", "log", "finish"],
        "MLflow": ["start_run", "log_params", "log_metrics", "log_metrics", "end_run"],
        "TensorBoard": ["SummaryWriter", *["add_scalar"] * 6, "close"],
    }
    assert called == logged[name]


def test_a_schedule_goes_on_from_its_state() -> None:
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3) for _ in range(2)]
    one, other = (Schedule(each, lambda step: 0.9**step, warm_up=3, patience=0, factor=0.5) for each in optimizers)
    for bound in (1.0, 0.0, 0.0):
        one.step()
        one.follow_bound(bound)
    other.load_state_dict(one.state_dict())
    one.step(), other.step()
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] == pytest.approx(0.3 * 0.9 * 0.25)

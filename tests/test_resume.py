"""Runs that end early go on from their checkpoint to the same bits, and damaged checkpoints are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import resumed_run
import safetensors.torch
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pyrovae as pv
from pyrovae.compile.step import Step
from pyrovae.training import checkpoint as checkpoints
from pyrovae.training import keeper, loop, setup
from pyrovae.training.interrupts import Interrupted

X = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))


class Killed(Exception):  # noqa: N818
    """Stands for SIGKILL: nothing is written after it."""


def ended_at(step: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end after a step."""
    due = keeper.Keeper.due

    def dying(self: keeper.Keeper, state: Any, *, epoch_over: bool = False) -> bool:
        if not epoch_over and state.position.step == step:
            how()
        return due(self, state, epoch_over=epoch_over)

    monkeypatch.setattr(keeper.Keeper, "due", dying)


def killed() -> None:
    raise Killed


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


ENDS = {"killed": killed, "interrupted": interrupted}


def numbers(history: pv.History) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history.records]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("step", [8, 26])
def test_a_run_that_ends_early_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    whole = resumed_run.run(None, "eager", 1, epochs=4)
    with monkeypatch.context() as patch:
        ended_at(step, ENDS[how], patch)
        with pytest.raises((Killed, KeyboardInterrupt)):
            resumed_run.run(str(tmp_path), "eager", 5, epochs=4)
    assert resumed_run.run(str(tmp_path), "eager", 5, epochs=4) == whole


def test_a_compiled_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the start of an epoch, steps of the program take the place of compiled ones, which round otherwise.
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 8)
    whole = resumed_run.run(None, "compiled", 1, epochs=4)
    with monkeypatch.context() as patch:
        ended_at(23, killed, patch)
        with pytest.raises(Killed):
            resumed_run.run(str(tmp_path), "compiled", 7, epochs=4)
    assert resumed_run.run(str(tmp_path), "compiled", 7, epochs=4) == whole


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_run_of_cuda_graphs_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    # Without a GPU, a recorder that runs what it would record.
    stage, made, recorded = setup.stage, [], []

    def staged(*args: Any, **options: Any) -> Step:
        step = stage(*args, **options)
        step.asynchronous, step.recorder = True, lambda run: recorded.append(run) or run
        made.append(step)
        return step

    monkeypatch.setattr(setup, "stage", staged)
    monkeypatch.setenv("PYROVAE_COMPILE", "aten")
    options: dict[str, Any] = {"epochs": 3, "optimizer": optimizer, "patience": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SGD runs outside the step's CUDA graph")
        whole = resumed_run.run(None, "compiled", 1, **options)
        for step in (2, 21):
            with monkeypatch.context() as patch:
                ended_at(step, killed if step == 21 else interrupted, patch)
                with pytest.raises((Killed, Interrupted)):
                    resumed_run.run(str(tmp_path / str(step)), "compiled", 4, **options)
            recorded.clear()
            assert resumed_run.run(str(tmp_path / str(step)), "compiled", 4, **options) == whole
            assert recorded
            assert made[-1].recorder is not None


def test_without_a_seed_the_same_data_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int, **kept: Any) -> pv.History:
        vae = of_normal_data()
        torch.manual_seed(seed)  # of the process, which a resumed one does not share
        return vae.fit(X, epochs=3, batch_size=20, validation=0.3, progress=False, **kept)

    whole = run(7)
    with monkeypatch.context() as patch:
        ended_at(4, interrupted, patch)
        with pytest.raises(Interrupted):
            run(7, checkpoint=tmp_path)
    assert numbers(run(8, checkpoint=tmp_path, resume="auto")) == numbers(whole)


class Noisy(Dataset):
    """Draws from NumPy and Python for each datum, as augmentations do."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> torch.Tensor:
        return X[row] * float(np.random.rand()) * random.random()  # noqa: NPY002


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(X * torch.rand(()))


def of_normal_data() -> pv.VAE:
    torch.manual_seed(0)
    return pv.make_vae(4, latent_dim=2, hidden=[8], likelihood={"kind": "normal", "scale": "shared"})


SOURCES: dict[str, Callable[[], Any]] = {
    "a data set": Noisy,
    "a loader": lambda: DataLoader(Noisy(), batch_size=16, shuffle=True),
    "a loader with a generator": lambda: DataLoader(
        Noisy(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "a stream": Streamed,
    "data in order": lambda: X,
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_of_every_kind_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    def run(**kept: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        random.seed(0), np.random.seed(0), torch.manual_seed(5)  # noqa: NPY002
        vae = of_normal_data()
        shuffle = source != "data in order"
        history = vae.fit(SOURCES[source](), epochs=3, batch_size=16, shuffle=shuffle, progress=False, **kept)
        return numbers(history), vae.state_dict()

    records, weights = run()
    for step in (2, 6):
        folder = {"checkpoint": tmp_path / str(step), "every": 1}
        with monkeypatch.context() as patch:
            ended_at(step, interrupted, patch)
            with pytest.raises(Interrupted):
                run(**folder)
        again, resumed = run(**folder, resume="auto")
        assert again == records
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


SCHEDULES: dict[str, Callable] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=40),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "in turn": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [7]
    ),
}


@pytest.mark.filterwarnings("ignore:.*scheduler.step. before:UserWarning")
# torch 2.8's own SequentialLR calls its parts in a way that torch 2.8 warns of.
@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adam", "one cycle"), (torch.optim.SGD, "warm restarts"), (torch.optim.NAdam, "in turn"), (torch.optim.ASGD, "in turn"),
     (torch.optim.Adagrad, "warm restarts"), ("schedule_free", "constant")],
)  # fmt: skip
def test_any_optimizer_and_schedule_go_on(
    tmp_path: Path, optimizer: Any, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**kept: Any) -> dict[str, torch.Tensor]:
        vae = of_normal_data()
        kept = {"optimizer": optimizer, "schedule": SCHEDULES.get(schedule, schedule)} | kept
        vae.fit(X, epochs=3, batch_size=20, lr=0.01, seed=1, progress=False, **kept)
        return vae.state_dict()

    weights = run()
    with monkeypatch.context() as patch:
        ended_at(4, interrupted, patch)
        with pytest.raises(Interrupted):
            run(checkpoint=tmp_path)
    resumed = run(checkpoint=tmp_path, resume="auto")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_batch_norm_bare_parameters_and_baselines_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parameters in closures and in Pyro's store, moving statistics, and a running mean of Pyro's estimator.
    def run(**kept: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        pyro.clear_param_store()
        norm, head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)

        def model(x: torch.Tensor) -> None:
            shift = pyro.param("shift", torch.zeros(4))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.full((len(x), 2), 0.5)).to_event(1))
                pyro.sample("x", dist.Normal(shift + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            pyro.module("norm", norm), pyro.module("head", head)
            with pyro.plate("data", len(x)):
                logits = head(norm(x))
                options = {"baseline": {"use_decaying_avg_baseline": True}}
                pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1), infer=options)

        pv.fit(model, guide, X, estimator="trace_graph_elbo", epochs=3, batch_size=20, lr=0.1, seed=1, progress=False, **kept)
        return [pyro.param("shift").detach().clone(), norm.running_mean.clone(), head.weight.detach().clone()]

    whole = run()
    with monkeypatch.context() as patch:
        ended_at(4, interrupted, patch)
        with pytest.raises(Interrupted):
            run(checkpoint=tmp_path)
    weights = pv.load_checkpoint(tmp_path).weights
    assert {"shift", "norm.running_mean", "head.weight"} <= set(weights)
    assert all(map(torch.equal, run(checkpoint=tmp_path, resume="auto"), whole))


def test_an_error_in_a_callback_loses_no_step(tmp_path: Path) -> None:
    whole = of_normal_data()
    records = numbers(whole.fit(X, epochs=4, batch_size=20, seed=1, validation=0.2, progress=False))

    def fail(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            raise RuntimeError("the callback's own")

    vae = of_normal_data()
    options = {"epochs": 4, "batch_size": 20, "seed": 1, "validation": 0.2, "progress": False, "checkpoint": tmp_path}
    with pytest.raises(RuntimeError, match="the callback's own") as error:
        vae.fit(X, on_epoch=fail, every=10**6, **options)
    assert len(error.value.history.records) == 3
    assert pv.load_checkpoint(tmp_path).step == 9
    vae = of_normal_data()
    assert numbers(vae.fit(X, resume="auto", **options)) == records
    assert all(map(torch.equal, vae.parameters(), whole.parameters()))


def test_a_budget_can_be_raised(tmp_path: Path) -> None:
    whole = of_normal_data()
    records = numbers(whole.fit(X, epochs=6, batch_size=25, seed=1, progress=False))
    options: dict[str, Any] = {"batch_size": 25, "seed": 1, "progress": False, "checkpoint": tmp_path, "resume": "auto"}
    for budget in ({"epochs": 1}, {"epochs": 6, "max_steps": 4}, {"epochs": 6, "max_steps": 4}, {"epochs": 3}, {"epochs": 6}):
        vae = of_normal_data()
        history = vae.fit(X, **options, **budget)
        assert history.records[-1]["step"] == min(budget.get("max_steps", 99), 3 * budget["epochs"])
    assert numbers(history) == records
    assert all(map(torch.equal, vae.parameters(), whole.parameters()))
    # And one that is over is not trained further.
    again = of_normal_data()
    assert numbers(again.fit(X, epochs=6, **options)) == records
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def test_patience_goes_back_to_the_best_after_every_kind_of_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = of_normal_data()
    ended_at(40, interrupted, monkeypatch)
    with pytest.raises(Interrupted, match=r"after step 41, in epoch 21: .*resume='auto'") as error:
        vae.fit(X, epochs=50, lr=0.5, validation=0.3, patience=50, batch_size=30, seed=0, progress=False, checkpoint=tmp_path)
    kept = pv.load_checkpoint(tmp_path)
    bounds = error.value.history.validation
    assert kept.history.validation == bounds
    best = int(np.argmax(bounds)) + 1
    assert kept.notes["best"] == [max(bounds), best]
    assert best < 20
    assert all(torch.equal(parameter, kept.best[name]) for name, parameter in vae.named_parameters())
    assert not all(torch.equal(parameter, kept.weights[name]) for name, parameter in vae.named_parameters())
    vae.load_state_dict({name: kept.best[name] for name in vae.state_dict()})


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a checkpoint of a short run."""
    of_normal_data().fit(X, validation=0.2, checkpoint=tmp_path / "kept", **SHORT)
    return tmp_path / "kept"


SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 30, "seed": 1, "progress": False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 20}, "batch_size was 30, is 20"),
        ({"lr": 0.5}, "lr was 0.001, is 0.5"),
        ({"optimizer": "sgd"}, "optimizer was adam, is sgd"),
        ({"estimator": "iwae"}, "estimator was {"),
        ({"seed": 2}, "data was"),
        ({"data": X + 1e-6}, "data was"),
        ({"data": X.flip(0)}, "data was"),
        ({"validation": 0.3}, "data was"),
        ({"schedule": "cosine"}, "schedule was constant, is cosine; steps of the schedule was missing, is 4"),
        ({"compile": True}, "compile was False, is True"),
        ({"hidden": [9]}, "tensor encoder.body.layers.0.weight was (8, 4) float32, is (9, 4) float32"),
    ],
)
def test_a_checkpoint_of_another_configuration_names_the_keys(kept: Path, changes: dict[str, Any], words: str) -> None:
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    torch.manual_seed(0)
    hidden = changes.get("hidden", [8])
    vae = pv.make_vae(4, latent_dim=2, hidden=hidden, likelihood={"kind": "normal", "scale": "shared"})
    options = {"validation": 0.2} | SHORT | {name: value for name, value in changes.items() if name not in ("data", "hidden")}
    with pytest.raises(ValueError, match="is a checkpoint of another run") as error:
        vae.fit(changes.get("data", X), checkpoint=kept, resume="auto", **options)
    assert words in str(error.value)
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before


def test_a_folder_is_not_overwritten_nor_shared(kept: Path, tmp_path: Path) -> None:
    vae = of_normal_data()
    with pytest.raises(ValueError, match="is a checkpoint already: pass resume='auto'"):
        vae.fit(X, checkpoint=kept, **SHORT)
    with pytest.raises(ValueError, match="different lengths"):
        vae.fit((X, X[:3]), checkpoint=tmp_path / "refused", **SHORT)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match='resume="auto" must have a folder'):
        vae.fit(X, resume="auto", **SHORT)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        vae.fit(X, resume=tmp_path / "nothing", **SHORT)

    def another(record: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"new is in use by process {os.getpid()} on "):
            of_normal_data().fit(X, checkpoint=tmp_path / "new", **SHORT)

    vae.fit(X, checkpoint=tmp_path / "new", on_epoch=another, **SHORT)


def test_a_path_is_resumed_without_being_written(kept: Path) -> None:
    whole = of_normal_data()
    whole.fit(X, validation=0.2, **SHORT | {"epochs": 4})
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    vae = of_normal_data()
    vae.fit(X, validation=0.2, resume=kept, **SHORT | {"epochs": 4})
    assert all(map(torch.equal, vae.parameters(), whole.parameters()))
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


@pytest.mark.parametrize("places", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_one_flipped_bit_is_refused_and_the_file_named(kept: Path, places: int) -> None:
    (step,) = kept.glob("step-*")
    files = [path for path in step.iterdir() if path.is_file()]
    assert {path.name for path in files} == {"weights.safetensors", "best.safetensors", "state.safetensors", "checkpoint.json"}
    draws = random.Random(0)
    for path in files:
        size = 8 * path.stat().st_size
        for place in sorted({0, size - 1, *(draws.randrange(size) for _ in range(places - 2))}):
            flipped(path, place)
            with pytest.raises(ValueError, match=f"{path.name} (is damaged|has format|lacks)"):
                pv.load_checkpoint(kept)
            flipped(path, place)
    pv.load_checkpoint(kept)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def lying() -> bytes:
    """Safetensors whose header promises more than there is."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 16


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "pickle": lambda content: pickle.dumps(Malicious()),
    "lying": lambda content: lying(),
    "another": lambda content: safetensors.torch.save({"x": torch.ones(2)}),
}


@pytest.mark.parametrize("kind", [*CONTENTS, "missing"])
def test_damaged_files_get_one_sentence_and_nothing_is_run_or_removed(
    kept: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kept.parent)
    (step,) = kept.glob("step-*")
    for path in sorted(step.iterdir()):
        before = path.read_bytes()
        path.unlink()
        if kind != "missing":
            path.write_bytes(CONTENTS[kind](before))
        vae = of_normal_data()
        weights = [parameter.detach().clone() for parameter in vae.parameters()]
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{path.name} .*: |There is no checkpoint") as error:
            vae.fit(X, validation=0.2, checkpoint=kept, resume="auto", **SHORT)
        assert len(str(error.value).splitlines()) == 1
        assert all(map(torch.equal, vae.parameters(), weights))
        assert len(list(step.iterdir())) == (3 if kind == "missing" else 4)
        path.write_bytes(before)
    assert not (kept.parent / "executed").exists()
    of_normal_data().fit(X, validation=0.2, checkpoint=kept, resume="auto", **SHORT)


@pytest.mark.parametrize("content", [lying(), pickle.dumps(Malicious())])
def test_a_lie_with_a_right_checksum_is_refused_too(kept: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kept.parent)
    (step,) = kept.glob("step-*")
    notes = json.loads((step / "checkpoint.json").read_text())["checkpoint"]
    (step / "weights.safetensors").write_bytes(content)
    notes["files"]["weights"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "checkpoint.json").write_bytes(checkpoints._with_checksum(notes))
    with pytest.raises(ValueError, match=r"weights.safetensors cannot be read"):
        pv.load_checkpoint(kept)
    assert not (kept.parent / "executed").exists()


@pytest.mark.parametrize("write", range(5))
def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    vae, fsync, calls = of_normal_data(), os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 6 + write:  # four files and two folders make a checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step-0000000004 cannot be .*No space left.*: free some space") as error:
        vae.fit(X, validation=0.2, checkpoint=tmp_path, every="epoch", **SHORT | {"epochs": 3})
    monkeypatch.undo()
    assert len(error.value.history.records) == 2
    assert not list(tmp_path.glob(".new-*"))
    kept = pv.load_checkpoint(tmp_path)
    assert kept.step == 2 or (kept.step == 4 and write == 4)  # the last call follows the renaming
    assert kept.best
    whole, resumed = of_normal_data(), of_normal_data()
    whole.fit(X, validation=0.2, **SHORT | {"epochs": 3})
    resumed.fit(X, validation=0.2, checkpoint=tmp_path, resume="auto", **SHORT | {"epochs": 3})
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-0000000006"]


def test_what_interrupted_writes_left_is_swept(kept: Path) -> None:
    (kept / ".new-1").mkdir()
    (kept / ".new-1" / "weights.safetensors").write_bytes(b"half")
    (kept / ".old-1").mkdir()
    (kept / "step-0000000001").mkdir()
    (kept / "notes.txt").write_text("the user's own")
    of_normal_data().fit(X, validation=0.2, checkpoint=kept, resume="auto", **SHORT)
    assert sorted(path.name for path in kept.iterdir()) == [".lock", "notes.txt", "step-0000000004"]


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    vae = of_normal_data()
    with pytest.raises(OSError, match=r"file/kept cannot be read or written \(Not a directory\)"):
        vae.fit(X, checkpoint=tmp_path / "file" / "kept", **SHORT)


def test_a_nan_is_skipped_counted_and_named(tmp_path: Path) -> None:
    bad = X.clone()
    bad[37] = 3e38
    vae = of_normal_data()
    with pytest.warns(UserWarning, match=r"is skipped: .*\(row 37 of the data \(counted from 0\)\).* history.skipped, and 10"):
        history = vae.fit(bad, epochs=3, batch_size=20, validation=None, seed=0, progress=False, checkpoint=tmp_path)
    assert history.skipped == pv.load_checkpoint(tmp_path).history.skipped == 3
    assert all(bool(torch.isfinite(parameter).all()) for parameter in vae.parameters())
    assert all(np.isfinite(history.bound))


def test_too_many_nans_keep_the_last_good_state(tmp_path: Path) -> None:
    vae = of_normal_data()
    options: dict[str, Any] = {"epochs": 50, "batch_size": 20, "lr": 1e4, "optimizer": "sgd", "seed": 0, "max_skips": 4}
    with pytest.warns(UserWarning, match="is skipped"), pytest.raises(FloatingPointError, match="in the 3 before it") as error:
        vae.fit(X, checkpoint=tmp_path, progress=False, **options)
    kept = pv.load_checkpoint(tmp_path)
    assert kept.history.skipped == error.value.history.skipped == 4
    assert all(bool(torch.isfinite(value).all()) for value in kept.weights.values())
    assert all(torch.equal(parameter, kept.weights[name]) for name, parameter in vae.named_parameters())


def child(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(pv.__file__).parents[1]}"}
    command = [sys.executable, resumed_run.__file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def answer(process: subprocess.Popen) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def killed_and_resumed(folder: Path, kind: str, number: int, seed: int, kills: int) -> tuple[dict[str, Any], list[int]]:
    """Send a signal at random moments after the first checkpoint, then let the run end; its answer and the exit codes."""
    draws, codes = random.Random(seed), []
    for _ in range(kills):
        process = child(str(folder), kind)
        began = time.monotonic()
        seen = set(folder.glob("*"))
        while not any(path.name.startswith("step-") for path in set(folder.glob("*")) - seen) and process.poll() is None:
            assert time.monotonic() - began < 200
            time.sleep(0.001)
        time.sleep(draws.random() * 0.3)  # a moment of the training that follows, or of a write
        process.send_signal(number)
        process.communicate(timeout=300)
        codes.append(process.returncode)
    return answer(child(str(folder), kind)), codes


def test_a_process_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = resumed_run.run(None, "eager", 1)
    resumed, codes = killed_and_resumed(tmp_path / "kept", "eager", signal.SIGKILL, 0, kills=1)
    assert codes in ([-signal.SIGKILL], [0])
    assert resumed == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", resumed_run.KINDS)
@pytest.mark.parametrize(("number", "runs"), [(signal.SIGKILL, 20), (signal.SIGTERM, 10), (signal.SIGINT, 10)])
def test_signals_at_random_moments(tmp_path: Path, kind: str, number: int, runs: int) -> None:
    whole = answer(child("-", kind))
    ended = 0
    for run in range(runs):
        resumed, codes = killed_and_resumed(tmp_path / str(run), kind, number, run, kills=1)
        assert resumed == whole
        ended += codes != [0]
    assert ended > runs // 2

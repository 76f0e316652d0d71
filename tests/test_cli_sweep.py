"""Sweeps: grids of settings and seeds, trained side by side or as jobs of an array, ended and resumed, in one table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrovae as pv
from pyrovae.cli import main, sweeping
from pyrovae.cli.config import read_run
from pyrovae.cli.grid import Grid, parse_axes, read_plan, write_plan

QUICK = [
    *("--train.max-steps", "2", "--evaluate.num-samples", "20", "--evaluate.decompose", "0", "--evaluate.limit", "6"),
    *("--evaluate.proposal", "guide", "--model.hidden", "6", "--model.latent-dim", "2"),
]
AXES = ["--grid", "train.lr=1e-2,1e-3", "--seeds", "2", "--name", "s"]


class _Here:
    """A process of a sweep as a call in this one."""

    def __init__(self, folder: Path, place: int, cell: Any, threads: int):
        with (
            (folder / "logs" / f"{cell.name}.log").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            self.returncode = main(["sweep", "--resume", str(folder), "--index", str(place)])

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeping, "_start", _Here)
    # Other tests draw reports, which takes longer than these runs.
    monkeypatch.setattr("pyrovae.cli.report.write_report", lambda path, **_: Path(path).write_text("report"))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_sweep_is_a_table_with_each_error_and_is_extended(in_folder: Path, capsys: pytest.CaptureFixture):
    assert main(["sweep", *AXES, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "2 models, 2 seeds each: 4 runs" in out
    assert "[4/4] train.lr=0.001,seed=1: log p(x) -" in out
    folder = in_folder / "runs" / "s"
    evidence = {
        f"train.lr={lr}": [pv.Evidence.load(folder / f"train.lr={lr},seed={seed}" / "evidence.safetensors") for seed in (0, 1)]
        for lr in (0.01, 0.001)
    }
    found = json.loads((folder / "sweep.json").read_text())
    comparison = pv.compare(evidence)
    assert [model["name"] for model in found["models"]] == comparison.names == found["comparison"]["models"]
    np.testing.assert_allclose(found["comparison"]["training_se"], comparison.training_se)
    for model in found["models"]:
        runs = evidence[model["name"]]
        means = np.array([run.mean for run in runs])
        assert model["num_runs"] == 2
        assert model["log_px"] == pytest.approx(means.mean())
        sampling = np.mean([run.mean_se**2 for run in runs])
        assert model["monte_carlo_se"] == pytest.approx(np.sqrt(sampling / 2))
        assert model["training_se"] == pytest.approx(np.sqrt(max(0, np.var(means, ddof=1) - sampling) / 2))
        data = np.mean([run.log_px for run in runs], 0)
        assert model["data_se"] == pytest.approx(np.std(data, ddof=1) / np.sqrt(6))
    assert [run["state"] for run in found["runs"]] == ["done"] * 4
    assert (folder / "comparison.html").is_file()
    one = next(folder.glob("train.lr=0.001,seed=1"))
    assert (read_run(one / "run.toml").train.lr, read_run(one / "run.toml").seed) == (0.001, 1)
    # What is done stays, byte for byte; a value and a seed more are runs more.
    kept = {path: content for path, content in contents(folder).items() if "seed=" in path and "logs" not in path}
    more = [word.replace("1e-2,1e-3", "1e-2,1e-3,1e-4") for word in AXES]
    assert main(["sweep", *more, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 6
    assert kept.items() <= contents(folder).items()


def test_jobs_of_an_array_make_the_same_runs(in_folder: Path, capsys: pytest.CaptureFixture):
    seeds = ["--seeds", "2", "--name", "array"]
    for index in ("1", "0"):
        assert main(["sweep", *seeds, *QUICK, "--index", index, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    folder = in_folder / "runs" / "array"
    assert sorted(path.name for path in folder.iterdir()) == ["seed=0", "seed=1", "sweep.toml"]
    alone = [*QUICK, "--seed", "1", "--name", "alone", "--quiet"]
    assert main(["train", *alone]) == 0
    log_px = [
        pv.Evidence.load(path / "evidence.safetensors").log_px for path in (folder / "seed=1", in_folder / "runs" / "alone")
    ]
    np.testing.assert_array_equal(*log_px)
    assert main(["sweep", "--resume", "runs/array", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in found["models"]] == ["digits-dreg-2"]
    assert found["comparison"] is None
    assert main(["sweep", "--resume", "runs/array", "--index", "2"]) == 2
    assert "--index must be from 0 to 1, since the sweep has 2 runs, got 2" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others(in_folder: Path, capsys: pytest.CaptureFixture):
    assert main(["sweep", "--grid", "model.likelihood=bernoulli,poisson", "--name", "s", *QUICK, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("pyrovae: 1 of 2 runs failed; model.likelihood=bernoulli,seed=0: ")
    assert printed.err.count("\n") == 1
    found = json.loads(printed.out)
    assert [run["state"] for run in found["runs"]] == ["failed", "done"]
    assert found["runs"][0]["error"] in printed.err
    assert not (in_folder / "runs" / "s" / "model.likelihood=bernoulli,seed=0").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--grid train.lrr=1,2", "The run with train.lrr=1: There is no key 'train.lrr'; did you mean 'train.lr'?"),
        ("--grid train.lr=1,-2", "The run with train.lr=-2: train.lr is -2, but input should be greater than 0."),
        ("--grid train.lr", "--grid must be of the form KEY=VALUE,VALUE, got 'train.lr'"),
        ("--grid train.lr=1,1", "--grid must have different values, got 'train.lr=1,1'"),
        ("--grid train.lr=1 train.lr=2", "--grid has train.lr twice: give all its values at once."),
        ("--grid seed=1,2", "--grid must be of settings other than seed: use --seeds."),
        ("--grid estimator=iwae estimator.num_particles=2", "--grid has estimator and estimator.num_particles: vary one"),
        ("--seeds 0", "--jobs and --seeds must be positive, got 1 and 0."),
        ("--resume runs/none", "There is no sweep in runs/none"),
        ("--name a/b", "A run's name must be that of one folder, got 'a/b'"),
        ("--name run", "runs/run is the folder of a run: choose another --name."),
        ("--name sweep", "runs/sweep has another sweep, over train.lr: choose another --name."),
        ("--name sweep --grid train.lr=1 --train.epochs 2", "with other settings (train.epochs): choose another --name."),
    ],
)
def test_mistakes_get_one_sentence(in_folder: Path, capsys: pytest.CaptureFixture, options: str, message: str):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/run.toml").write_text("")
    from pyrovae.cli.grid import base_of, write_plan

    write_plan(Path("runs/sweep"), Grid(base_of(None, {}), {"train.lr": [1, 2]}, 1))
    before = contents(in_folder)
    assert main(["sweep", *options.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert contents(in_folder) == before


def test_values_of_every_kind_are_read_and_named_apart():
    axes = parse_axes(
        [
            "model.prior=vamp,{kind='vamp',components=5}",
            "model.hidden=[8,4],[6]",
            "train.compile=true,false",
            "data.key=a b,a/b",
        ]
    )
    assert axes == {
        "model.prior": ["vamp", {"kind": "vamp", "components": 5}],
        "model.hidden": [[8, 4], [6]],
        "train.compile": [True, False],
        "data.key": ["a b", "a/b"],
    }
    del axes["data.key"]
    cells = Grid({}, axes, seeds=2).cells()
    assert len({cell.name for cell in cells}) == len(cells) == 16
    assert all(len(Path(cell.name).parts) == 1 for cell in cells)
    assert cells[-1].run.model.prior == {"kind": "vamp", "components": 5}
    assert cells[-1].run.train.compile is False
    names = [Grid({}, {"name": [value]}, 1).cells()[0].name for value in ("a b", "a/b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 4
    assert max(map(len, names)) < 200
    # Another kind of model leaves the options of the one before.
    kinds = Grid(
        {"model": {"kind": "vae", "latent_dim": 3, "encoder": "diagonal_normal"}}, {"model.kind": ["vae", "conditional"]}, 1
    )
    assert [cell.run.model.kind for cell in kinds.cells()] == ["vae", "conditional"]


def test_a_sweep_keeps_its_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rounding depends on it, so that a sweep that goes on with another --jobs would end with other numbers."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [sweeping.threads_each(jobs) for jobs in (1, 2, 3, 20)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweeping.threads_each(2) == 5
    write_plan(tmp_path, Grid({}, {}, 1, threads=4))
    assert write_plan(tmp_path, Grid({}, {}, 3, threads=8)) == read_plan(tmp_path) == Grid({}, {}, 3, threads=4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_ended_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    options = [*QUICK[2:], "--train.epochs", "30", "--train.every", "7", "--grid", "train.lr=1e-2,1e-3"]
    command = [sys.executable, "-m", "pyrovae", "sweep", *options, "--jobs", "2", "--name"]
    subprocess.run([*command, "whole"], env=environment, check=True, timeout=300)
    process = subprocess.Popen([*command, "ended"], env=environment, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("runs/ended/*/checkpoint/step-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert said.splitlines()[-1] == "pyrovae: The sweep was interrupted: go on with pyrovae sweep --resume runs/ended."
        assert not list(tmp_path.glob("runs/ended/*/summary.json"))
    for _ in range(100):  # after SIGKILL the runs themselves go on, and hold their folders until they are done
        if (
            subprocess.run([sys.executable, "-m", "pyrovae", "sweep", "--resume", "runs/ended"], env=environment).returncode
            == 0
        ):
            break
    one, other = (json.loads((tmp_path / "runs" / name / "sweep.json").read_text()) for name in ("whole", "ended"))
    assert [{**model} for model in one["models"]] == other["models"]
    for path in (tmp_path / "runs" / "whole").glob("*/model.safetensors"):
        assert path.read_bytes() == (tmp_path / "runs" / "ended" / path.parent.name / path.name).read_bytes()

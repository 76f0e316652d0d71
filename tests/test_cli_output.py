"""What the commands print: words, JSON or nothing; and the folder of a run, which is taken before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyrovae.cli import main
from pyrovae.cli.folders import new_folder

QUICK = [
    *("--train.epochs", "1", "--evaluate.num-samples", "30", "--evaluate.decompose", "0", "--evaluate.limit", "20"),
    *("--evaluate.proposal", "guide"),
    *("--model.hidden", "8", "--model.latent-dim", "2"),
]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture):
    assert main(["train", "--name", "a", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == "runs/a"
    assert found["num_data"] == 20
    assert {key: value for key, value in found.items() if key != "folder"} == json.loads(
        Path("runs/a/summary.json").read_text()
    )
    assert main(["evaluate", "runs/a", "--num-samples", "20", "--output", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 20
    assert main(["compare", "runs/a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["models"]) == ["b", "runs/a"]
    assert found["difference"][0] == 0
    assert len(found["log_px"]) == len(found["unreliable"]) == 2
    assert main(["train", "--name", "a", *QUICK, "--json"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err.startswith("pyrovae: runs/a exists already")


def test_quiet_prints_errors_alone(capsys: pytest.CaptureFixture):
    assert main(["train", "--name", "a", *QUICK, "--quiet"]) == 0
    assert main(["evaluate", "runs/a", "--quiet"]) == 0
    assert main(["evaluate", "runs/a", "--num-samples", "20", "--output", "b", "--quiet"]) == 0
    assert main(["compare", "runs/a", "b", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["evaluate", "runs/none", "--quiet"]) == 2
    assert "no run folder runs/none" in capsys.readouterr().err
    assert main(["evaluate", "runs/a", "--output", "runs/a"]) == 2
    assert "--output must not be the folder of a run" in capsys.readouterr().err


def test_a_log_of_the_default_number_of_epochs_is_short(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pyrovae.training.progress.SECONDS_BETWEEN_LINES", 0.0)  # as of epochs that take a second each
    quick = ["--evaluate.num-samples", "100", "--evaluate.decompose", "5", "--train.batch-size", "700", "--model.hidden", "8"]
    quick += ["--evaluate.limit", "8", "--evaluate.proposal", "guide"]
    assert main(["train", *quick]) == 0
    printed = capsys.readouterr()
    assert len((printed.out + printed.err).encode()) < 3000
    lines = [line.split(":")[0] for line in printed.err.splitlines() if line.startswith("epoch")]
    assert [lines[0], lines[-1], len(lines)] == ["epoch 1 of 60", "epoch 60 of 60", 16]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/a", "../a"])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    assert main(["train", "--name", name, *QUICK]) == 2
    assert f"A run's name must be that of one folder, got {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, copied_run: Callable[[str], Path]
):
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    copied_run("a")
    monkeypatch.setattr("pyrovae.training.loop.fit", worked)
    monkeypatch.setattr("pyrovae.models.base.PairModule.log_marginal", worked)
    Path("file").write_text("x")
    assert main(["evaluate", "runs/a", "--output", "file/b"]) == 3
    assert capsys.readouterr().err == "pyrovae: file/b cannot be used: not a directory.\n"
    monkeypatch.setattr("pyrovae.cli.folders.RUNS", Path("file"))
    assert main(["train", "--name", "a", *QUICK]) == 3
    assert capsys.readouterr().err == "pyrovae: file/a cannot be used: not a directory.\n"
    assert Path("file").read_text() == "x"


def test_two_processes_never_share_a_folder(tmp_path: Path):
    code = (
        "import sys, time\nfrom pyrovae.cli.folders import new_folder\n"
        "while time.time() < float(sys.argv[1]): pass\n"
        "taken = []\n"
        "for _ in range(100):\n"
        "    with new_folder('same', chosen=False) as path: taken.append(str(path))\n"
        "print(' '.join(taken))"
    )
    together = str(time.time() + 1.5)
    command = [sys.executable, "-c", code, together]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ, cwd=tmp_path) for _ in range(2)]
    taken = [name for each in both for name in each.communicate(timeout=120)[0].split()]
    assert len(taken) == 200
    assert len(set(taken)) == 200
    assert len(list((tmp_path / "runs").iterdir())) == 200


def test_a_refused_run_removes_its_folder_and_no_other(tmp_path: Path):
    def refused() -> None:
        with new_folder("a", chosen=True):
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert not list(tmp_path.iterdir())
    Path("runs/b").mkdir(parents=True)
    with pytest.raises(ValueError, match="refused"):
        refused()
    assert os.listdir("runs") == ["b"]


def test_data_that_changed_are_refused(capsys: pytest.CaptureFixture):
    x = np.random.default_rng(0).poisson(4.0, (60, 5))
    np.save("x.npy", x)
    assert main(["train", "x.npy", "--name", "a", *QUICK]) == 0
    before = Path("runs/a/evidence.safetensors").read_bytes()
    assert main(["evaluate", "runs/a", "--num-samples", "20", "--limit", "7", "--output", "b"]) == 0
    np.save("x.npy", x[::-1])
    for options in ([], ["--limit", "5"], ["--output", "c"]):
        assert main(["evaluate", "runs/a", *options]) == 2
        assert "The test data of runs/a are not those that it was scored on before (first in row" in capsys.readouterr().err
    assert Path("runs/a/evidence.safetensors").read_bytes() == before
    assert not Path("c").exists()
    assert main(["evaluate", "b", "--limit", "5"]) == 2, "a folder of results has no model"

"""Runs of the command line that are ended and resumed, and the folders that they take."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pyrovae as pv
from pyrovae.cli.app import main
from pyrovae.training import keeper

QUICK = [
    *("--train.epochs", "4", "--evaluate.num-samples", "40", "--evaluate.decompose", "0", "--evaluate.limit", "30"),
    *("--evaluate.proposal", "guide"),
    *("--model.hidden", "20", "--model.latent-dim", "2", "--estimator.num_particles", "2", "--train.every", "7"),
]
ONE_EPOCH, MANY_EPOCHS = ([QUICK[0], epochs, *QUICK[2:]] for epochs in ("1", "60"))


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(folder: Path) -> tuple[list[dict], bytes, dict]:
    """Curve, weights and evidence of a run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in records]
    evidence = pv.Evidence.load(folder / "evidence.safetensors")
    return records, (folder / "model.safetensors").read_bytes(), evidence.log_px.tolist()


def test_an_interrupted_run_is_resumed(in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--name", "whole", *QUICK]) == 0
    due = keeper.Keeper.due

    def interrupting(self, state, *, epoch_over=False):
        if not epoch_over and state.position.step == 50:
            signal.raise_signal(signal.SIGTERM)
        return due(self, state, epoch_over=epoch_over)

    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "due", interrupting)
        capsys.readouterr()
        assert main(["train", "--name", "ended", *QUICK]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    how = "pyrovae train --resume runs/ended"
    assert said == f"pyrovae: Training was interrupted after step 51, in epoch 3: go on with {how}."
    assert len((in_folder / "runs" / "ended" / "metrics.jsonl").read_text().splitlines()) == 2
    pv.VAE.from_pretrained(in_folder / "runs" / "ended")
    assert main(how.split()[1:]) == 0
    assert numbers(in_folder / "runs" / "ended") == numbers(in_folder / "runs" / "whole")
    # What is finished is scored again, and goes on with a larger budget unless the schedule forbids it.
    before = numbers(in_folder / "runs" / "whole")
    assert main(["train", "--resume", "runs/whole"]) == 0
    assert numbers(in_folder / "runs" / "whole") == before
    capsys.readouterr()
    assert main(["train", "--resume", "runs/whole", "--train.epochs", "5"]) == 2
    assert "is a checkpoint of another run (steps of the schedule was 84, is 105)" in capsys.readouterr().err
    assert "epochs = 4" in (in_folder / "runs" / "whole" / "run.toml").read_text()
    assert numbers(in_folder / "runs" / "whole") == before


def test_what_cannot_be_resumed_is_said(in_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--resume", "runs/none"]) == 2
    assert "There is no run folder runs/none" in capsys.readouterr().err
    (in_folder / "run.toml").write_text("seed = 1\n")
    assert main(["train", "run.toml", "--resume", "runs/none"]) == 2
    assert "give run.toml or --resume runs/none, and not both" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_left_alone(copied_run: Callable[[str], Path], capsys: pytest.CaptureFixture) -> None:
    folder = copied_run("mine")
    (path,) = folder.glob("checkpoint/step-*/weights.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert main(["train", "--resume", "runs/mine"]) == 2
    assert "weights.safetensors is damaged" in capsys.readouterr().err
    assert {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()} == before


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pyrovae", *arguments]


def _holds(folder: Path) -> subprocess.Popen:
    """A process that has taken a folder."""
    code = "import sys\nfrom pyrovae.files import taken\nwith taken(sys.argv[1]):\n    print(flush=True)\n    sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    arguments = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_run_folder_has_one_process_at_a_time(in_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--name", "mine", *ONE_EPOCH]) == 0
    folder = in_folder / "runs" / "mine"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = _holds(folder)
    for arguments in (["train", "--resume", "runs/mine"], ["evaluate", "runs/mine"]):
        capsys.readouterr()
        assert main(arguments) == 2
        assert f"runs/mine is in use by process {other.pid} on " in capsys.readouterr().err
    (folder / ".owner.json").unlink()
    assert main(["train", "--resume", "runs/mine"]) == 2
    assert "runs/mine is in use by another process" in capsys.readouterr().err
    other.communicate()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with _holds(folder) as killed:
        killed.kill()
    assert main(["train", "--resume", "runs/mine"]) == 0
    line = (
        f"Process {killed.pid} on {socket.gethostname()}, which was the last in runs/mine, has ended: its work is taken over."
    )
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert not (folder / ".owner.json").exists()


@pytest.mark.slow
def test_of_two_that_resume_at_once_one_is_refused(in_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    assert main(["train", "--name", "mine", *QUICK]) == 0
    expected = numbers(in_folder / "runs" / "mine")
    both = [
        subprocess.Popen(command("train", "--resume", "runs/mine"), env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [each.communicate(timeout=300)[1] for each in both]
    codes = [each.returncode for each in both]
    assert sorted(codes) in ([0, 2], [0, 0]), "the second may come when the first has ended"
    assert all("runs/mine is in use by process" in text for text, code in zip(said, codes, strict=True) if code)
    assert numbers(in_folder / "runs" / "mine") == expected


@pytest.mark.slow
def test_two_runs_at_once_have_two_folders(in_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    both = [subprocess.Popen(command("train", *QUICK), env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [each.wait(300) for each in both] == [0, 0]
    first, second = sorted(path.name for path in (in_folder / "runs").iterdir())
    assert second == f"{first}-2"
    assert numbers(in_folder / "runs" / first) == numbers(in_folder / "runs" / second)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_is_resumed(in_folder: Path, number: int, code: int) -> None:
    # The same bits take the same number of threads, which is this process's.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = os.environ | threads | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    assert main(["train", "--name", "whole", *MANY_EPOCHS]) == 0
    process = subprocess.Popen(command("train", "--name", "ended", *MANY_EPOCHS), env=environment, stderr=subprocess.DEVNULL)
    while not list(in_folder.glob("runs/ended/checkpoint/step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == code
    assert main(["train", "--resume", "runs/ended"]) == 0
    assert numbers(in_folder / "runs" / "ended") == numbers(in_folder / "runs" / "whole")

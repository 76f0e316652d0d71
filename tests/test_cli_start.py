"""``pyrovae list`` and ``pyrovae init``, and how the command line ends."""

from __future__ import annotations

import errno
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrovae.cli import main
from pyrovae.cli.app import app
from pyrovae.cli.config import read_run
from pyrovae.cli.exits import DIVERGED, MISTAKE, NO_MEMORY, SYSTEM, UNFORESEEN, explain
from pyrovae.registry import KINDS, names


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_shows_its_options_and_its_paper(capsys: pytest.CaptureFixture):
    assert main(["list", "DReG"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("dreg, an estimator: ")
    assert "\n  num_particles = 5  K." in out
    assert "Tucker, Lawson, Gu and Maddison" in out
    assert "https://arxiv.org/abs/1810.04152" in out
    assert main(["list", "hierarchical"]) == 0
    assert "\n  latent_dims  sizes of the stochastic layers" in capsys.readouterr().out
    assert main(["list", "flow"]) == 0
    out = capsys.readouterr().out
    assert "flow, a prior: " in out
    assert "flow, an encoder: " in out
    assert main(["list", "bodies"]) == 0
    assert "  gated_mlp " in capsys.readouterr().out
    assert main(["list", "dregg"]) == 2
    assert "did you mean 'dreg'?" in capsys.readouterr().err


def test_every_name_is_shown_in_80_columns(capsys: pytest.CaptureFixture):
    for name in sorted({name for kind in KINDS for name in names(kind)}):
        assert main(["list", name]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{name}, a")
        assert max(len(line) for line in out.splitlines() if "://" not in line) <= 80


@pytest.mark.parametrize("name", ["counts", "digits", "linear_gaussian"])
def test_init_writes_a_file_that_train_reads(capsys: pytest.CaptureFixture, name: str):
    if name == "counts":
        np.savetxt("counts.csv", np.random.default_rng(0).poisson(3.0, (60, 4)), "%d", ",", header="a,b,c,d", comments="")
    assert main(["init", "counts.csv" if name == "counts" else name]) == 0
    assert f"Wrote {name}.toml" in capsys.readouterr().out
    text = Path(f"{name}.toml").read_text()
    run = read_run(f"{name}.toml")
    assert (run.data.path or run.data.name) == ("counts.csv" if name == "counts" else name)
    assert "Chosen by the data: " in text
    # What is shown as a default is one: with every "#" removed it is the same run.
    Path("whole.toml").write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    assert read_run("whole.toml") == run
    assert main(["init", "counts.csv" if name == "counts" else name]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("init nothing.csv", "There is no data set 'nothing.csv'"),
        ("init digits --output run.txt", "--output must end in .toml, got run.txt"),
    ],
)
def test_init_refuses_in_one_line(capsys: pytest.CaptureFixture, tmp_path: Path, command: str, message: str):
    assert main(command.split()) == MISTAKE
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("lr must be positive.\nMore."), MISTAKE, "lr must be positive."),
        (FileNotFoundError("There is no run folder x."), MISTAKE, "There is no run folder x."),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), SYSTEM, "runs/a cannot be used: no space left on device."),
        (FloatingPointError("The loss is NaN."), DIVERGED, "The loss is NaN."),
        (MemoryError(), NO_MEMORY, "There is not enough memory: use a smaller model, batch_size or num_samples, or less data."),
        (KeyError("x"), UNFORESEEN, "'x' (pyrovae did not foresee"),
    ],
)
def test_an_exit_code_says_the_cause(error: Exception, code: int, line: str):
    found = explain(error)
    assert found[0] == code
    assert found[1].startswith(line)


def test_torchs_want_of_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.float64)
    assert explain(caught.value)[0] == NO_MEMORY


def test_every_command_has_an_example_in_its_help_that_names_its_options(capsys: pytest.CaptureFixture):
    commands = [name for name in app if not name.startswith("-")]
    assert {
        "train",
        "evaluate",
        "compare",
        "estimators",
        "list",
        "doctor",
        "init",
        "export",
        "sweep",
        "impute",
        "interpolate",
        "report",
    } <= set(commands)
    for command in commands:
        assert main([command, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"Example: pyrovae {command}" in said
        assert {"--json", "--quiet"} <= set(said.split()), command
        for option in re.findall(r"--[\w.-]+", said.partition("Example: ")[2].partition("╭")[0]):
            assert said.count(option) > 1


def test_names_are_listed_as_json(capsys: pytest.CaptureFixture):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(KINDS)
    assert found["prior"]["vamp"] == json_of(capsys, "list", "priors")["prior"]["vamp"]
    dreg = json_of(capsys, "list", "DReG")["estimator"]["dreg"]
    assert dreg["options"]["num_particles"] == {"default": "5", "meaning": "K."}
    assert "https://arxiv.org/abs/1810.04152" in dreg["references"][0]
    assert main(["list", "dregg", "--json"]) == 2
    assert capsys.readouterr() == ("", "pyrovae: There is no name 'dregg'; did you mean 'dreg'?\n")


def json_of(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    """What a command prints as JSON."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_shell_completes_commands_and_options(tmp_path: Path):
    script = app.generate_completion(shell="bash")
    assert "evaluate" in script
    assert "--num-samples" in script
    (tmp_path / "completion").write_text(script)
    subprocess.run(["bash", "-n", "completion"], check=True, cwd=tmp_path)

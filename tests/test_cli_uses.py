"""Commands that use a trained run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

import pyrovae as pv
from pyrovae.cli.app import main
from pyrovae.cli.config import DataSection, Run, write_run

RUN = Run()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of digits, untrained, as these commands do not care."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pv.make_vae((1, 8, 8), latent_dim=3, hidden=[5], likelihood={"kind": "binomial", "total_count": 16}).save_pretrained("run")
    (tmp_path / "run" / "run.toml").write_text(write_run(RUN))
    return tmp_path / "run"


def test_samples_are_drawn_and_repeated_by_their_seed(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["sample", "run", "--num-samples", "7"]) == 0
    assert capsys.readouterr().out == "Wrote run/samples.npy: 7 x 1 x 8 x 8\nWrote run/samples.png\n"
    means = np.load(folder / "samples.npy")
    assert matplotlib.image.imread(folder / "samples.png").shape[2] == 4
    assert main(["sample", "run", "--num-samples", "7"]) == 0
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), means)
    assert main(["sample", "run", "--num-samples", "7", "--seed", "1"]) == 0
    assert not np.array_equal(np.load(folder / "samples.npy"), means)
    assert main(["sample", "run", "--num-samples", "7", "--no-mean"]) == 0
    drawn = np.load(folder / "samples.npy")
    assert set(np.unique(drawn)) <= set(range(17))
    assert main(["sample", "run", "--num-samples", "0"]) == 2
    assert "must be positive, got 0" in capsys.readouterr().err


def test_data_are_encoded_and_reconstructed(folder: Path):
    vae, digits = pv.VAE.from_pretrained(folder), pv.data.load("digits")
    assert main(["encode", "run"]) == 0
    np.testing.assert_allclose(np.load(folder / "latents.npy"), vae.embed(digits.test).detach(), rtol=1e-5, atol=1e-6)
    assert main(["encode", "run", "--part", "train", "--limit", "9"]) == 0
    np.testing.assert_allclose(np.load(folder / "latents.npy"), vae.embed(digits.train[:9]).detach(), rtol=1e-5, atol=1e-6)
    assert main(["reconstruct", "run", "--limit", "4"]) == 0
    np.testing.assert_allclose(np.load(folder / "reconstructions.npy"), vae.reconstruct(digits.test[:4]), rtol=1e-5)
    assert (folder / "reconstructions.png").is_file()


def test_a_trained_vae_is_exported_and_other_models_are_refused(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["export", "run"]) == 0
    vae, x = pv.VAE.from_pretrained(folder), pv.data.load("digits").test[:5]
    found = torch.export.load(folder / "encoder.pt2").module()(x)
    torch.testing.assert_close(found, vae.embed(x), rtol=1e-4, atol=1e-5)
    pv.make_conditional_vae((1, 8, 8), num_classes=10, latent_dim=2, hidden=[5]).save_pretrained(folder)
    assert main(["export", "run"]) == 2
    assert "this is a ConditionalVAE" in capsys.readouterr().err
    assert main(["sample", "run", "--no-mean"]) == 2
    assert "draws means only" in capsys.readouterr().err
    assert main(["encode", "elsewhere"]) == 2
    assert "There is no run folder elsewhere" in capsys.readouterr().err


def test_lines_between_encodings_are_decoded(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["interpolate", "run", "--rows", "3", "5", "0", "9", "--steps", "4"]) == 0
    assert capsys.readouterr().out == "Wrote run/interpolations.npy: 2 x 4 x 1 x 8 x 8\nWrote run/interpolations.png\n"
    vae, x = pv.VAE.from_pretrained(folder), pv.data.load("digits").test
    expected = vae.interpolate(x[[3, 0]], x[[5, 9]], 4).detach().transpose(0, 1)
    np.testing.assert_allclose(np.load(folder / "interpolations.npy"), expected, rtol=1e-5)
    assert main(["interpolate", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "files": ["run/interpolations.npy", "run/interpolations.png"],
        "shape": [4, 10, 1, 8, 8],
    }
    for options, words in {
        "--rows 1": "--rows must be pairs and --steps 2 or more, got 1 rows and 10 steps",
        "--rows 0 360": "--rows must be from 0 to 359, the last of the test data",
        "--steps 1": "got 8 rows and 1 steps",
    }.items():
        assert main(["interpolate", "run", *options.split()]) == 2
        assert words in capsys.readouterr().err


def test_every_command_prints_json_or_nothing(folder: Path, capsys: pytest.CaptureFixture):
    for command, names in {"sample": ["samples.npy", "samples.png"], "encode": ["latents.npy"]}.items():
        assert main([command, "run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["files"] == [f"run/{name}" for name in names]
        assert main([command, "run", "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")
    assert main(["export", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["run/encoder.pt2", "run/decoder.pt2"]


def test_missing_values_are_filled_in_in_the_order_of_the_file(folder: Path, capsys: pytest.CaptureFixture):
    columns = ["a", 'b "x", y', "c", "d"]
    torch.manual_seed(0)
    vae = pv.make_vae(4, latent_dim=2, hidden=[5], likelihood="poisson")
    vae.save_pretrained("run")
    run = Run(data=DataSection(path="counts.csv", ignore=["id"]))
    (folder / "run.toml").write_text(write_run(run))
    (folder / "summary.json").write_text(json.dumps({"names": {"columns": columns}}))
    counts = pd.DataFrame(np.random.default_rng(0).poisson(3.0, (9, 4)), columns=columns).astype(float)
    holes = counts.mask(np.random.default_rng(1).random((9, 4)) < 0.3)
    holes.assign(id=range(9)).to_csv("counts.csv", index=False)
    assert main(["impute", "run", "--num-samples", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == ["run/imputed.npy", "run/imputed.csv"]
    values = torch.tensor(holes.fillna(0).to_numpy(np.float32)), torch.tensor(~holes.isna().to_numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = vae.impute(*values, num_samples=200, seed=0)
    filled = pd.read_csv(folder / "imputed.csv")
    assert list(filled.columns) == columns
    np.testing.assert_allclose(filled, expected, rtol=1e-6)
    np.testing.assert_array_equal(filled.to_numpy()[values[1]], holes.to_numpy()[values[1]])
    assert main(["impute", "run", "counts.csv", "--num-draws", "3", "--num-samples", "20"]) == 0
    said = capsys.readouterr().out
    assert f"{int(holes.isna().sum().sum())} values of counts.csv filled in, draws given the others" in said
    assert "Wrote run/imputed.npy: 3 x 9 x 4" in said
    counts.assign(id=0).to_csv("whole.csv", index=False)
    holes.assign(id=0, e=1).to_csv("more.csv", index=False)
    holes[columns[::-1]].assign(id=0).to_csv("order.csv", index=False)
    for name, words in {
        "whole.csv": "whole.csv has no missing values",
        "more.csv": "must have the columns that run was trained on, and has 'e'",
        "order.csv": "and has them in another order",
        "none.csv": "none.csv",
    }.items():
        assert main(["impute", "run", name]) == 2
        assert words in capsys.readouterr().err
    (folder / "run.toml").write_text(write_run(RUN))
    assert main(["impute", "run"]) == 2
    assert "digits has no missing values: give a file to impute" in capsys.readouterr().err


def test_a_report_is_made_again_from_its_scores(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    quick = ["--train.max-steps", "2", "--evaluate.num-samples", "30", "--evaluate.decompose", "0", "--evaluate.limit", "12"]
    quick += ["--evaluate.proposal", "guide", "--model.hidden", "5", "--model.latent-dim", "2"]
    assert main(["train", *quick, "--name", "a", "--quiet"]) == 0
    place = Path("runs/a")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    (place / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", "runs/a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": ["runs/a/report.html"]}
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert before == after, "the same page to the byte, and nothing else has changed"
    found = {}
    monkeypatch.setattr("pyrovae.cli.report.write_report", lambda path, **options: found.update(options))
    assert main(["report", "runs/a", "--decompose", "3"]) == 0
    assert len(found["decomposition"]) == 3
    (place / "evidence.safetensors").unlink()
    assert main(["report", "runs/a"]) == 2
    assert "evidence.safetensors" in capsys.readouterr().err

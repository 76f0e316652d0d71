"""Commands that use a trained run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import pyrovae as pv
from pyrovae.cli.app import main
from pyrovae.cli.config import Run, write_run

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

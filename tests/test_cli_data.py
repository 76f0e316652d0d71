"""Data of every kind trained and scored by one command of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image

import pyrovae as pv
from pyrovae.cli.app import main
from pyrovae.cli.config import read_run

QUICK = [
    *("--train.epochs", "2", "--evaluate.num-samples", "30", "--evaluate.decompose", "0", "--train.compile", "false"),
    *("--evaluate.proposal", "guide"),
    *("--model.hidden", "16", "--model.latent-dim", "2"),
]
COLUMNS = [f"gene{i}" for i in range(8)]


def _counts() -> pd.DataFrame:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.poisson(3.0, (60, 8)), columns=COLUMNS, index=[f"cell{i}" for i in range(60)])
    return frame.assign(kind=["T cell", "B cell", "NK"] * 20, depth=random.random(60))


def _write(name: str) -> None:
    counts = _counts()
    if name == "counts.csv":
        counts[COLUMNS].to_csv(name)
    elif name == "labelled.csv":
        counts.to_csv(name)
    elif name == "holes.csv":
        counts[COLUMNS].mask(np.random.default_rng(1).random((60, 8)) < 0.1).to_csv(name)
    elif name == "cells.h5ad":
        matrix = sp.csr_matrix(counts[COLUMNS].to_numpy())
        with h5py.File(name, "w") as file:
            for place in ("X", "layers/raw"):
                group = file.create_group(place)
                group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", matrix.shape
                group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
            file["var/_index"], file["obs/kind"], file["obs/depth"] = COLUMNS, counts["kind"].to_list(), counts["depth"]
    else:
        random = np.random.default_rng(0)
        for i in range(24):
            path = Path(name, ("cat", "dog")[i % 2], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (*random.integers(6, 12, 2), 3), dtype=np.uint8)).save(path)


CASES = {
    "counts.csv": (["counts.csv"], "negative_binomial", {"columns": COLUMNS}),
    "counts.csv by option": (["--data", "counts.csv"], "negative_binomial", {"columns": COLUMNS}),
    "labelled.csv": (
        ["labelled.csv", "--data.labels", "kind", "--data.covariates", "depth", "--model.kind", "conditional"],
        "negative_binomial",
        {"columns": COLUMNS, "classes": ["B cell", "NK", "T cell"], "covariates": ["depth"]},
    ),
    "holes.csv": (["holes.csv"], "negative_binomial", {"columns": COLUMNS}),
    "cells.h5ad": (
        ["cells.h5ad", "--data.labels", "kind", "--data.key", "raw", "--model.kind", "semi_supervised"],
        "negative_binomial",
        {"columns": COLUMNS, "classes": ["B cell", "NK", "T cell"]},
    ),
    "photos": (["photos"], "discretized_logistic", {"classes": ["cat", "dog"]}),
    "photos of one size": (
        ["photos", "--data.size", "[8, 8]", "--data.colour", "grey", "--data.binarize", "dynamic", "--model.body", "conv"],
        "bernoulli",
        {"classes": ["cat", "dog"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_command_trains_scores_and_keeps_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, kind, names = CASES[case]
    _write(case.split(" ")[0])
    options = [*QUICK[:-4], *QUICK[-2:], "--model.hidden", "4", "8"] if "conv" in arguments else QUICK
    assert main(["train", *arguments, "--name", "mine", *options]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "mine"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["names"] == names
    assert math.isfinite(summary["bits_per_dim"])
    assert f"Likelihood: {kind}, since " in out
    said = " ".join(out.split())
    assert all(name in said for name in [*names.get("columns", [])[:3], *names.get("classes", [])])
    assert names.get("columns", names.get("classes", [""]))[0] in (folder / "report.html").read_text()
    before = pv.Evidence.load(folder / "evidence.safetensors").log_px
    monkeypatch.setattr("pyrovae.cli.report.write_report", lambda *_, **__: None)  # the page was read above
    assert main(["evaluate", str(folder)]) == 0, "the data are found again, as the run was told to read them"
    np.testing.assert_array_equal(pv.Evidence.load(folder / "evidence.safetensors").log_px, before)
    if case == "holes.csv":
        assert "values missing" in said
    if case == "photos":
        assert "rgb images of" in said
        assert "scaled and cut from" in said


def test_a_run_from_disk_is_the_run_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (80, 6, 5), dtype=np.uint8))
    for name, memory in (("disk", "1e-9"), ("memory", "1")):
        assert main(["train", "x.npy", "--data.memory", memory, "--name", name, *QUICK]) == 0
    one, other = (json.loads(Path("runs", name, "summary.json").read_text()) for name in ("disk", "memory"))
    assert one["log_px"] == pytest.approx(other["log_px"], rel=1e-5)
    assert "read from disk in batches" in one["facts"]["data"]
    assert "read from disk" not in other["facts"]["data"]


def test_the_true_log_density_stands_beside_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data.name", "linear_gaussian", "--name", "mine", *QUICK, "--evaluate.limit", "50"]) == 0
    summary = json.loads(Path("runs", "mine", "summary.json").read_text())
    truth = pv.data.load("linear_gaussian").test_log_px[:50].mean().item()
    assert summary["true_log_px"] == pytest.approx(truth)
    assert summary["bound"] < truth


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train labelled.csv", "column 'kind' must hold numbers, got 'T cell' in row 0"),
        ("train labelled.csv --data.labels kinds", "There is no column 'kinds'; did you mean 'kind'?"),
        (
            "train counts.csv --data.path labelled.csv",
            "The data are counts.csv by the argument, and 'labelled.csv' by an option",
        ),
        ("train nowhere.csv", "There is no run file or data nowhere.csv"),
        ("train runs/one", "runs/one is the folder of a run"),
        ("train counts.csv --data.size 8", "counts.csv takes no option 'size'"),
        ("train --data.labels kind", "'labels' is for data of a file"),
        ("train labelled.csv --data.labels kind --data.covariates depth", "A VAE takes no covariates"),
        ("train holes.csv --model.kind conditional --model.num-classes 2", "takes no missing values"),
        ("train --data.name ring --data.binarize none", "'ring' has no grey values"),
        ("train empty", "empty must hold images"),
    ],
)
def test_mistakes_get_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("counts.csv", "labelled.csv", "holes.csv"):
        _write(name)
    for folder in ("empty", "runs/one"):
        Path(folder).mkdir(parents=True)
    Path("runs/one/run.toml").write_text("")
    assert main([*command.split(), *QUICK]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path("runs").iterdir()) == ["one"], "no folder is left behind"


def test_a_run_of_data_by_argument_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write("counts.csv")
    run = read_run("counts.csv", {"data": {"ignore": ["gene1"], "memory": 2.0}})
    assert (run.data.path, run.data.reading()) == ("counts.csv", {"ignore": ["gene1"], "memory": 2e9})


def faces() -> np.ndarray:
    """1,965 smooth grey images of 28 x 20 with noise of 4 levels, as the Frey faces are stored: one array of bytes."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:28, 0:20] / 20
    modes = np.stack([np.sin(2 * (i + 1) * y + random.normal()) + np.cos(2 * (i + 1) * x + random.normal()) for i in range(5)])
    means = 128 + 17 * np.einsum("nk,khw->nhw", random.normal(size=(1965, 5)), modes)
    return (means + random.normal(0, 4, means.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_faces_train_with_nothing_but_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    array = faces()
    np.save("faces.npy", array)
    assert main(["train", "--data.path", "faces.npy"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Likelihood: discretized_logistic, since the values are 8-bit levels 0..255" in said
    bits = json.loads(Path("runs", "faces-dreg-4", "summary.json").read_text())["bits_per_dim"]
    # No model codes a pixel in fewer bits than its noise has; pixels coded one by one, from their own histograms, need more.
    noise = 0.5 * math.log2(2 * math.pi * math.e * 4**2)
    shares = np.stack([np.bincount(pixel, minlength=256) / len(array) for pixel in array.reshape(len(array), -1).T])
    alone = -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(1).mean()
    assert noise < bits < alone - 0.5

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_runs import QUICK, TrainedRun

import pyrovae as pv
from pyrovae.cli.app import main
from pyrovae.cli.config import load_model, read_run
from pyrovae.cli.scoring import decomposed
from pyrovae.evidence.store import Store


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_folder(copied_run: Callable[[str], Path]) -> Path:
    return copied_run("mine")


def test_train_writes_everything_and_says_what_it_found(trained_run: TrainedRun):
    folder, out = trained_run.folder, trained_run.out
    assert {path.name for path in folder.iterdir()} == {
        "run.toml", "metrics.jsonl", "model.json", "model.safetensors", "evidence.safetensors", "summary.json", "report.html",
        "checkpoint", ".lock",
    }  # fmt: skip
    evidence = pv.Evidence.load(folder / "evidence.safetensors")
    assert (len(evidence), evidence.num_samples, evidence.num_dims) == (360, 60, 64)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["log_px"] == pytest.approx(evidence.mean)
    assert summary["bits_per_dim"] == pytest.approx(-evidence.mean / 64 / math.log(2))
    assert summary["facts"]["torch"] == torch.__version__
    assert summary["seed"] == 0
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    vae = pv.VAE.from_pretrained(folder)
    again = vae.log_marginal(pv.data.load("digits").test, num_samples=60, proposal="guide", seed=0)
    np.testing.assert_allclose(again.log_px, evidence.log_px, rtol=1e-6)
    for text in (f"{evidence.mean:.2f}", f"{evidence.bits_per_dim:.3f}", "nats per image", "runs/mine/report.html"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 110
    first = out.splitlines()[0]
    assert first.startswith("vae of digits, beta_binomial likelihood, ")
    assert f" {sum(each.numel() for each in vae.parameters()):,} parameters, on the " in first
    assert all(len(line) <= 80 for line in out.splitlines()[2:])


@pytest.mark.parametrize("option", ["--device", "--train.device"])
def test_the_device_is_chosen(in_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--name", "mine", *QUICK, "--evaluate.limit", "5", option, "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(" parameters, on the CPU")
    run = read_run(in_folder / "runs" / "mine" / "run.toml")
    assert run.train.device == "cpu"
    assert main(["train", *QUICK, option, "cuda"]) == 2
    assert 'train.device must be "cpu" or "auto" where torch finds no GPU, got "cuda"' in capsys.readouterr().err
    assert main(["evaluate", "runs/mine", "--device", "cuda"]) == 2
    assert main(["train", *QUICK, option, "tpu"]) == 2


def test_toml_file_and_overrides(in_folder: Path):
    (in_folder / "r.toml").write_text('[train]\nepochs = 50\n[model]\nencoder = "diagonal_normal"\nhidden = [9]\n')
    command = ["train", "r.toml", "--train.epochs", "1", "--evaluate.num-samples", "30", "--estimator.kind", "iwae"]
    command += ["--evaluate.decompose", "0", "--evaluate.limit", "10", "--evaluate.proposal", "guide"]
    command += ["--estimator.num-particles", "3", "--model.latent-dim", "2", "--model.hidden", "[8, 7]"]
    assert main(command) == 0
    run = read_run(in_folder / "runs" / "digits-iwae-2" / "run.toml")
    assert run.train.epochs == 1
    assert run.model.encoder == "diagonal_normal"
    assert run.model.hidden == [8, 7]
    assert run.estimator == {"kind": "iwae", "num_particles": 3}


def test_the_summary_is_json_even_where_numbers_are_undefined(run_folder: Path):
    assert main(["evaluate", "runs/mine", "--num-samples", "1"]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (run_folder / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["monte_carlo_se"] is None


def test_tensorboard_logs_the_curves_or_says_how_to_install(in_folder: Path, capsys: pytest.CaptureFixture):
    installed = importlib.util.find_spec("tensorboard") is not None
    code = main(["train", "--name", "mine", *QUICK, "--train.tensorboard"])
    if not installed:
        assert code == 2
        assert "pyrovae[tensorboard]" in capsys.readouterr().err
        return
    assert code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(in_folder / "runs" / "mine" / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (in_folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    logged = {event.step: event.value for event in events.Scalars("validation")}
    assert logged == pytest.approx({record["step"]: record["validation"] for record in records})


FILES = {
    "faces": (lambda random: random.integers(0, 256, (60, 28, 20)).astype(np.uint8), "discretized_logistic", "images"),
    "Counts": (lambda random: random.poisson(4.0, (60, 5)), "negative_binomial", "data"),
    "bits": (lambda random: random.integers(0, 2, (60, 5)), "bernoulli", "data"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_likelihood_of_a_file_is_said_and_written_down(in_folder: Path, capsys: pytest.CaptureFixture, name: str):
    make, kind, units = FILES[name]
    np.save(f"{name}.npy", make(np.random.default_rng(0)))
    assert main(["train", "--data.path", f"{name}.npy", *QUICK]) == 0
    out = capsys.readouterr().out
    assert f"Data: {name}.npy, 48 train and 12 test rows" in out
    assert f"\nLikelihood: {kind}, since " in out
    assert f"Held-out {name}, 12 {units}, in nats per {'image' if units == 'images' else 'datum'}:" in out
    assert f"the choice of {units}" in out
    assert max(map(len, out.splitlines())) <= 80
    folder = in_folder / "runs" / f"{name}-dreg-2"
    assert read_run(folder / "run.toml").model.likelihood == {"kind": kind}
    assert 'name = "digits"' not in (folder / "run.toml").read_text()
    assert f"{kind}, since " in (folder / "report.html").read_text()
    assert json.loads((folder / "summary.json").read_text())["facts"]["likelihood"].startswith(f"{kind}, since ")
    assert pv.VAE.from_pretrained(folder).data_shape == np.load(f"{name}.npy").shape[1:]


def test_a_likelihood_that_does_not_fit_is_said_to_be_the_users(
    in_folder: Path, capsys: pytest.CaptureFixture, trained_run: TrainedRun
):
    np.save("x.npy", np.random.default_rng(0).poisson(4.0, (60, 5)))
    assert main(["train", "--data.path", "x.npy", *QUICK, "--model.likelihood", "normal"]) == 0
    assert "normal, as the settings say; negative_binomial would be the choice" in " ".join(capsys.readouterr().out.split())
    said = " ".join(trained_run.out.split())
    assert "Likelihood: beta_binomial, since the pixels are counts 0..16 that vary more than a binomial's." in said
    assert "kind = &#34;beta_binomial&#34;\ntotal_count = 16" in (trained_run.folder / "report.html").read_text()


def test_a_second_run_gets_its_own_folder_and_a_chosen_name_is_not_overwritten(
    run_folder: Path, capsys: pytest.CaptureFixture, copied_run: Callable[[str], Path]
):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert main(["train", "--name", "mine", *QUICK]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    copied_run("digits-dreg-2")  # the name that a run of these options gets
    assert main(["train", *QUICK, "--evaluate.limit", "5"]) == 0
    assert {path.name for path in run_folder.parent.iterdir()} == {"mine", "digits-dreg-2", "digits-dreg-2-2"}


def test_evaluate_scores_again(run_folder: Path):
    first = pv.Evidence.load(run_folder / "evidence.safetensors")
    assert main(["evaluate", str(run_folder), "--num-samples", "90", "--limit", "50"]) == 0
    second = pv.Evidence.load(run_folder / "evidence.safetensors")
    assert (len(second), second.num_samples) == (50, 90)
    assert second.mean == pytest.approx(first.log_px[:50].mean(), abs=2)
    assert "90 samples" in json.loads((run_folder / "summary.json").read_text())["findings"]


def test_evaluate_goes_on_where_it_was_interrupted(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    command = ["evaluate", "runs/mine", "--num-samples", "40"]
    assert main([*command, "--output", "whole"]) == 0
    whole = pv.Evidence.load("whole/evidence.safetensors")
    kept = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    add, wants, drawn = Store.add, Store.wants, []

    def interrupted(self: Store, start: int, arrays: dict) -> None:
        add(self, start, arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "add", interrupted)
    assert main(command) == 130
    now = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    [unfinished] = set(now) - set(kept)
    assert unfinished.startswith("scoring-")
    assert {name: content for name, content in now.items() if name in kept} == kept, "the old results stay"
    monkeypatch.setattr(Store, "add", add)

    def counted(self: Store, start: int, batch: tuple) -> bool:
        drawn.append(wants(self, start, batch))
        return drawn[-1]

    monkeypatch.setattr(Store, "wants", counted)
    assert main(command) == 0
    assert drawn == [False, True], "the first 256 of 360 data are not scored again"
    np.testing.assert_array_equal(pv.Evidence.load(run_folder / "evidence.safetensors").log_px, whole.log_px)
    assert {path.name for path in run_folder.iterdir() if path.is_file()} == set(kept)


SCORED = ("evidence.safetensors", "summary.json", "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("output", [None, "elsewhere"])
def test_evaluate_that_ends_at_any_rename_leaves_one_whole_set(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
):
    command = ["evaluate", "runs/mine", "--limit", "20", "--decompose", "0", "--proposal", "guide"]
    command += [] if output is None else ["--output", output]
    assert main([*command, "--num-samples", "20"]) == 0
    folder = run_folder if output is None else Path(output)
    names = SCORED if output is None else (*SCORED, "run.toml", "metrics.jsonl")
    rename, replace = os.rename, os.replace
    for last in range(1, 100):
        before, calls = {name: (folder / name).read_bytes() for name in names}, list[int]()

        def until_the_last(move: Callable[..., None], *paths: str, calls: list[int] = calls, last: int = last) -> None:
            move(*paths)
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "rename", partial(until_the_last, rename))
        monkeypatch.setattr(os, "replace", partial(until_the_last, replace))
        code = main([*command, "--num-samples", str(20 + last)])
        monkeypatch.undo()
        monkeypatch.chdir(run_folder.parents[1])
        num_samples = {
            pv.Evidence.load(folder / "evidence.safetensors").num_samples,
            json.loads((folder / "summary.json").read_text())["num_samples"],
        }
        changed = {name for name in SCORED if (folder / name).read_bytes() != before[name]}
        if output is not None:
            num_samples.add(read_run(folder / "run.toml").evaluate.num_samples)
        assert len(num_samples) == 1
        assert changed in (set(), set(SCORED))
        assert bool(changed) == (20 + last in num_samples)
        assert not [path for path in folder.iterdir() if path.name.startswith((".staged", ".complete"))]
        if code == 0:
            break
        assert code == 130
    assert len(calls) >= len(names) * 2 + 1


def test_a_command_completes_the_set_of_files_that_a_killed_one_was_moving(run_folder: Path, capsys: pytest.CaptureFixture):
    assert main(["evaluate", "runs/mine", "--num-samples", "30", "--limit", "20", "--decompose", "0", "--output", "other"]) == 0
    moving = run_folder / ".complete-0"
    moving.mkdir()
    for name in ("summary.json", "report.html"):  # the evidence has been moved
        Path("other", name).rename(moving / name)
    Path("other/evidence.safetensors").replace(run_folder / "evidence.safetensors")
    capsys.readouterr()
    assert main(["encode", "runs/mine"]) == 0, capsys.readouterr().err
    assert json.loads((run_folder / "summary.json").read_text())["num_data"] == 20
    assert "20" in (run_folder / "report.html").read_text()
    assert not moving.exists()


def test_evaluate_writes_elsewhere_and_compare_takes_it(run_folder: Path, capsys: pytest.CaptureFixture):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert main(["evaluate", "runs/mine", "--num-samples", "30", "--output", "elsewhere"]) == 0
    assert "Report: elsewhere/report.html" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    assert read_run("elsewhere/run.toml").evaluate.num_samples == 30
    assert main(["compare", "runs/mine", "elsewhere"]) == 0
    out = capsys.readouterr().out
    assert "runs/mine" in out
    assert "elsewhere" in out
    Path("file").write_text("x")
    assert main(["evaluate", "runs/mine", "--num-samples", "30", "--output", "file/in"]) == 3
    assert "file" in capsys.readouterr().err


def test_a_target_error_stops_each_datum(run_folder: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    assert main(["evaluate", "runs/mine", "--num-samples", "600", "--target-se", "0.1", "--limit", "60"]) == 0
    scored = pv.Evidence.load(run_folder / "evidence.safetensors")
    assert set(scored.drawn) == {250, 500, 600}
    missed = int((~(scored.se <= 0.1)).sum())  # the draws that count are not those that decided on their number
    findings = json.loads((run_folder / "summary.json").read_text())["findings"]
    assert f"{missed} of 60 data miss the target error 0.1" in findings
    out = capsys.readouterr().out
    assert f"250 to 600 samples each, {scored.drawn.mean():.0f} on average" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "250 to 600 samples each" in (run_folder / "report.html").read_text()
    assert json.loads((run_folder / "summary.json").read_text())["target_se"] == 0.1
    assert main(["evaluate", "runs/mine", "--num-samples", "50", "--proposal", "mixture", "--limit", "20"]) == 0
    scored = pv.Evidence.load(run_folder / "evidence.safetensors")
    assert scored.method == "importance sampling from the mixture of prior and guide"
    out = capsys.readouterr().out
    assert "the proposal's ELBO" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert main(["evaluate", "runs/mine", "--proposal", "gide"]) == 2
    assert "evaluate.proposal is 'gide'" in capsys.readouterr().err
    assert main(["evaluate", "runs/mine", "--target-se", "-1"]) == 2
    assert "evaluate.target_se is" in capsys.readouterr().err


def test_the_nats_are_decomposed_and_add_up(run_folder: Path, capsys: pytest.CaptureFixture):
    assert json.loads((run_folder / "summary.json").read_text())["decomposition"] is None
    assert "Where the nats go" not in (run_folder / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", "runs/mine", "--num-samples", "500", "--decompose", "30", "--limit", "50"]) == 0
    out = capsys.readouterr().out
    assert "Where the nats of the first 30 go:" in out
    for name in ("approximation", "amortisation", "mutual information", "aggregate KL", "distortion", "active units: "):
        assert name in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "Where the nats go" in (run_folder / "report.html").read_text()
    parts = json.loads((run_folder / "summary.json").read_text())["decomposition"]
    scored = pv.Evidence.load(run_folder / "evidence.safetensors")
    assert parts["num_data"] == 30
    assert parts["log p(x)"]["nats"] == pytest.approx(scored.log_px[:30].mean())
    nats = {name: part["nats"] for name, part in parts.items() if isinstance(part, dict) and "nats" in part}
    assert nats["ELBO"] == pytest.approx(-nats["rate"] - nats["distortion"])
    assert nats["gap"] == pytest.approx(nats["approximation"] + nats["amortisation"])
    assert nats["rate"] == pytest.approx(nats["mutual information"] + nats["aggregate KL"])
    assert nats["amortisation"] > 0, "two epochs leave the encoder behind"


@pytest.mark.parametrize(("encoder", "split"), [("diagonal_normal", True), ("flow", False)])
def test_the_gap_is_split_where_the_guides_family_can_be_fitted(encoder: str, split: bool):
    vae = pv.make_vae(9, latent_dim=2, hidden=[8], encoder=encoder)
    x = torch.bernoulli(torch.full((12, 9), 0.5))
    evidence = vae.log_marginal(x, num_samples=100, seed=0)
    parts = decomposed(vae, (x[:10],), evidence, seed=0)
    assert parts is not None
    assert len(parts) == 10
    assert (parts.refined is not None) == split
    np.testing.assert_array_equal(parts.evidence.log_px, evidence.log_px[:10])


def test_estimators_are_compared_on_a_run(run_folder: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    command = [
        "estimators",
        "runs/mine",
        "--names",
        "elbo",
        "iwae",
        "--num-draws",
        "10",
        "--num-particles",
        "3",
        "--batch-size",
        "20",
        "--reference-particles",
        "64",
    ]
    assert main([*command, "--train-seconds", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "elbo" in out
    assert "from the same start" in out
    assert max(map(len, out.splitlines())) <= 80
    written = json.loads((run_folder / "estimators.json").read_text())
    assert written["data_vars"]["num_particles"]["data"] == [1, 3]
    assert (run_folder / "estimators.png").stat().st_size > 5000


def test_a_hierarchy_runs_like_any_model(in_folder: Path, capsys: pytest.CaptureFixture):
    (in_folder / "r.toml").write_text('[model]\nkind = "hierarchical"\nlatent_dims = [3, 2]\nguide = "ladder"\n')
    quick = ["--train.epochs", "1", "--evaluate.num-samples", "60", "--evaluate.limit", "4", "--model.hidden", "[20]", "[10]"]
    assert main(["train", "r.toml", *quick]) == 0
    folder = in_folder / "runs" / "digits-dreg-3-2"
    vae = pv.HierarchicalVAE.from_pretrained(folder)
    assert (vae.latent_dims, type(vae.inference).__name__) == ((3, 2), "Ladder")
    first = pv.Evidence.load(folder / "evidence.safetensors")
    again = vae.log_marginal(pv.data.load("digits").test[:4], num_samples=60, proposal="auto", seed=0)
    np.testing.assert_allclose(again.log_px, first.log_px, rtol=1e-6)
    assert "<h3>Latent space</h3>" in (folder / "report.html").read_text()
    assert main(["evaluate", str(folder), "--num-samples", "90", "--limit", "3"]) == 0
    second = pv.Evidence.load(folder / "evidence.safetensors")
    assert (len(second), second.num_samples) == (3, 90)
    assert second.mean == pytest.approx(first.log_px[:3].mean(), abs=3)
    assert main(["train", "--name", "wide", *QUICK, "--model.kind", "hierarchical"]) == 2
    assert 'model.latent_dim is for models of kind "conditional", "semi_supervised", "vae"' in capsys.readouterr().err


def test_list_names_the_components(capsys: pytest.CaptureFixture):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("standard_normal", "binomial", "full_covariance_normal", "gated_mlp", "iwae", "trace_elbo"):
        assert f"  {name} " in out
    assert max(map(len, out.splitlines())) <= 80
    assert "`" not in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --train.epohcs 3", "Did you mean --train.epochs?"),
        ("train --train.epochs x", "train.epochs is 'x'"),
        ("train --train.lr -1", "train.lr is '-1'"),
        ("train nope.toml", "no run file nope.toml"),
        ("train bad.toml", "bad.toml is not valid TOML"),
        ("train odd.toml", "no key 'train.epohcs'; did you mean 'train.epochs'"),
        ("train lost.toml", "no key 'train.estimator'; did you mean 'estimator', above the first table?"),
        ("train top.toml", "no key 'epochs'; did you mean 'train.epochs'?"),
        ("train --data.name mnits", "did you mean 'mnist'"),
        ("train --data.name mnist --data.root nowhere", "--data.root"),
        ("train --data.path nan.npy", "NaN or infinite values in 1 of 20 rows"),
        ("train --data.path empty.npy", "empty"),
        ("train --data.path text.npy", "cannot be read"),
        ("train --data.path x.npy --model.likelihood bernoulli", "outside the support of Bernoulli"),
        ("train --data.path x.npy --data.binarize dequantized", "must be given 8-bit levels 0..255"),
        ("train --data.path x.npy --data.name mnist", "a run has one data set"),
        ("train --data.binarize levels", "the digits are counts 0..16"),
        ("train --model.prior standrd_normal", "did you mean 'standard_normal'"),
        ("train --model.likelihood binomal", "did you mean 'binomial'"),
        ("train --model.likelihood.kind normal --model.likelihood.scale wide", "scale must be a positive number"),
        ("train --model.likelihood binomial", "needs total_count"),
        ("train --model.likelihood normal --model.likelihood.scale 1", "give the name as --model.likelihood.kind beside"),
        ("train --model.encoder diagnal_normal", "did you mean 'diagonal_normal'"),
        ("train --model.kind hierarchical --model.latent-dims 8 4 --model.guide ladr", "did you mean 'ladder'"),
        ("train --model.kind hierarchical --model.latent-dims 8", "latent_dims must hold two sizes or more"),
        ("train --model.kind hierarchical --model.latent-dims 8 4 --model.hidden 9", "a list of widths for each of 2 layers"),
        (
            "train --model.kind hierarchical --model.latent-dims 8 4 --model.hidden 9 9",
            "hidden must be a list of positive integers",
        ),
        ("train --model.hidden [9] [9]", "hidden must be a list of positive integers"),
        ("train --seed 0 1 2", "2 belongs to no option, each of which takes one value: pyrovae sweep"),
        ("train --seeds 3", "--seeds is an option of pyrovae sweep"),
        ("train --model.body conw", "did you mean 'conv"),
        ("train --model.activation tahn", "did you mean 'tanh'"),
        ("train --estimator iwea", "did you mean 'iwae'"),
        ("train --estimator.kind iwae --estimator.num_particle 3", "did you mean 'num_particles'"),
        ("train --train.optimizer adm", "did you mean 'adam'"),
        ("train --name a/b", "slashes"),
        ("trian", 'Did you mean "train"'),
        ("evaluate runs/none", "no run folder"),
        ("evaluate hollow", "no run folder hollow"),
        ("compare runs/none runs/other", "no run folder runs/none"),
        ("compare", "two or more"),
    ],
)
def test_mistakes_get_one_line_exit_2_and_leave_files_alone(
    in_folder: Path, capsys: pytest.CaptureFixture, command: str, message: str
):
    (in_folder / "bad.toml").write_text("[train\n")
    (in_folder / "odd.toml").write_text("[train]\nepohcs = 3\n")
    (in_folder / "lost.toml").write_text('[train]\nestimator = "iwae"\n')
    (in_folder / "top.toml").write_text("epochs = 3\n")
    (in_folder / "hollow").mkdir()
    x = np.random.default_rng(0).normal(size=(20, 3))
    np.save(in_folder / "x.npy", x)
    np.save(in_folder / "empty.npy", x[:0])
    x[3, 1] = math.nan
    np.save(in_folder / "nan.npy", x)
    (in_folder / "text.npy").write_text("1,2,3")
    before = sorted(in_folder.rglob("*"))
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("pyrovae: ")]
    assert message in err
    assert len(lines) == 1
    assert "Traceback" not in err
    assert sorted(in_folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "run.toml", "metrics.jsonl"])
def test_a_truncated_run_folder_is_named_and_left_alone(run_folder: Path, capsys: pytest.CaptureFixture, name: str):
    whole = (run_folder / name).read_bytes()
    cut = len(whole) * 2 // 5
    # A TOML file cut between two lines is one of fewer settings.
    (run_folder / name).write_bytes(whole[: whole.index(b" = ", cut) + 3 if name == "run.toml" else cut])
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["evaluate", str(run_folder), "--num-samples", "30"]) == 2
    err = capsys.readouterr().err
    assert name in err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:The loss became")
def test_a_diverging_run_says_so(in_folder: Path, capsys: pytest.CaptureFixture):
    assert main(["train", *QUICK, "--train.optimizer", "sgd", "--train.lr", "1e12"]) == 4
    assert "lower the learning rate" in capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("some tensor\nis off")

    monkeypatch.setattr("pyrovae.training.loop.fit", broken)
    assert main(["train", *QUICK]) == 1
    err = capsys.readouterr().err
    assert "some tensor" in err
    assert "PYROVAE_DEBUG=1" in err
    assert "is off" not in err
    monkeypatch.setenv("PYROVAE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="some tensor"):
        main(["train", *QUICK])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pyrovae.cli import main; assert main(['--help']) == 0; "
        "print([m for m in ('torch', 'pyro', 'arviz', 'sklearn', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "train" in done.stdout


def test_the_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", "from pyrovae.cli.app import app; app(['--version'])"], capture_output=True, text=True
    )
    assert done.stdout.strip() == pv.__version__


def test_an_interrupt_is_a_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyrovae.training.loop.fit", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "pyrovae: interrupted.\n"


def test_a_run_file_can_do_without_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--train.validation 0 --evaluate.limit 5 --name short"
    assert main(["train", *QUICK, *options.split()]) == 0
    records = (tmp_path / "runs" / "short" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["validation"] for record in records] == [None, None]


@pytest.mark.parametrize(("kind", "quantity"), [("conditional", "log p(x|y)"), ("semi_supervised", "log p(x)")])
def test_models_of_data_with_labels_run_like_any(in_folder: Path, capsys: pytest.CaptureFixture, kind: str, quantity: str):
    quick = [*QUICK, "--name", "mine", "--evaluate.limit", "20", "--model.kind", kind]
    quick[quick.index("--evaluate.decompose") + 1] = "10"
    assert main(["train", *quick]) == 0
    out = capsys.readouterr().out
    given = f"{quantity}, each of the images given its label"
    assert (given in out) == (kind == "conditional")
    assert f"\n  {quantity} " in out
    assert ("correctly, by the largest p(y|x)" in out) == (kind == "semi_supervised")
    folder = in_folder / "runs" / "mine"
    split = pv.data.load("digits")
    labels = split.test_labels[:20] if kind == "conditional" else torch.full((20,), -1)
    vae = load_model(folder)
    again = vae.log_marginal((split.test[:20], labels), num_samples=60, proposal="guide", seed=0)
    evidence = pv.Evidence.load(folder / "evidence.safetensors")
    np.testing.assert_allclose(again.log_px, evidence.log_px, rtol=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert ("of log p(x|y)" in summary["log_px_kind"]) == (kind == "conditional")
    assert f"<dt>{quantity}, estimate</dt>" in (folder / "report.html").read_text()
    assert main(["evaluate", str(folder), "--num-samples", "30", "--decompose", "0"]) == 0
    capsys.readouterr()
    options = ["--names", "elbo", "iwae", "--num-draws", "10", "--batch-size", "10", "--json"]
    assert main(["estimators", str(folder), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "estimators.json").read_text()) | {"figure": str(folder / "estimators.png")}


def test_labels_are_kept_for_a_part_of_the_data(in_folder: Path, capsys: pytest.CaptureFixture):
    labelled = ["--data.labelled", "0.1", "--evaluate.limit", "20", "--name", "mine"]
    assert main(["train", *QUICK, "--model.kind", "semi_supervised", *labelled]) == 0
    assert read_run(in_folder / "runs" / "mine" / "run.toml").data.labelled == 0.1
    assert main(["train", *QUICK, "--model.kind", "conditional", *labelled[:-1], "other"]) == 2
    assert "Labels must lie between 0 and 9, got -1" in capsys.readouterr().err


def test_names_in_any_case(in_folder: Path, capsys: pytest.CaptureFixture):
    np.save("x.npy", np.random.default_rng(0).poisson(4.0, (60, 5)))
    names = ["--estimator.kind", "IWAE", "--model.likelihood", "NB", "--train.optimizer", "AdamW", "--name", "mine"]
    assert main(["train", "--data.path", "x.npy", *QUICK, *names]) == 0
    assert "Likelihood: negative_binomial, since" in capsys.readouterr().out
    assert pv.VAE.from_pretrained(in_folder / "runs" / "mine").likelihood.dispersion == "per_dimension"


def test_the_package_is_a_command_and_its_output_may_end_early():
    code = f"{sys.executable} -m pyrovae list | head -n 1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert (done.stdout, done.stderr) == ("priors\n", "")


def test_epochs_are_lines_where_there_is_no_terminal(trained_run: TrainedRun):
    lines = trained_run.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]

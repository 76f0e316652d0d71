"""Training on two processes: the same weights on both, the gradient of the whole batch, and every refusal on both."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks

import pyrovae as pv

FAST = (
    "exact", "noisy", "curves", "in_order", "normed", "spoiled", "other_data", "other_weights", "other_options",
    "refused_by_one", "changed_by_one", "in_two_parts", "captured_in_two_parts", "interrupted", "scored",
)  # fmt: skip
Found = Callable[[str], list[Any]]


def start(folder: Path, *scenarios: str) -> list[subprocess.Popen[str]]:
    script = Path(two_ranks.__file__)
    paths = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", folder, *scenarios], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in (0, 1)
    ]


def run(folder: Path, *scenarios: str) -> None:
    ranks = start(folder, *scenarios)
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said


def read(folder: Path, scenario: str) -> list[Any]:
    return [torch.load(folder / f"{scenario}.{rank}", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run(path, *FAST)
    return path


@pytest.fixture
def double() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    return tensors and one["bound"] == other["bound"] and one["validation"] == other["validation"]


@pytest.mark.parametrize("scenario", ["exact", "noisy", "in_order", "normed", "spoiled"])
def test_weights_buffers_and_curves_are_the_same_to_the_bit(folder: Path, scenario: str):
    assert same(*read(folder, scenario))


def test_ranks_draw_different_noise(folder: Path):
    one, other = read(folder, "in_order")  # which draws nothing while it trains
    assert not torch.equal(one["noise"], other["noise"])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("scenario", ["exact", "in_order"])
def test_a_step_follows_the_gradient_of_the_whole_batch(folder: Path, scenario: str):
    # 61 data in batches of 20: for the last one, of one datum, one rank has none. 67 are held out.
    alone, two = getattr(two_ranks, scenario)(folder, 0), read(folder, scenario)[0]
    for name, value in alone["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-12, atol=1e-12)
    assert two["bound"] == pytest.approx(alone["bound"], rel=1e-12)
    assert two["validation"] == pytest.approx(alone["validation"], rel=1e-12)


@pytest.mark.usefixtures("double")
def test_the_curve_is_statistically_that_of_one_process(folder: Path):
    alone, two = two_ranks.curves(folder, 0), read(folder, "curves")[0]
    assert not torch.equal(alone, two)
    assert bool(((alone - two).mean(0).abs() < 4 * (alone.var(0) / 8 + two.var(0) / 8).sqrt()).all())


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_both(folder: Path):
    assert [found["skipped"] for found in read(folder, "spoiled")] == [1, 1]


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("other_data", "data: 50 data"),
        ("other_weights", "parameters: "),
        ("other_options", "lr: 0.01 and 0.02; epochs: 2 and 3"),
    ],
)
def test_ranks_that_differ_are_refused_by_both(folder: Path, scenario: str, what: str):
    for found in read(folder, scenario):
        assert found["error"].startswith("ValueError: Ranks 0 and 1 must train the same model on the same data")
        assert what in found["error"]


def test_what_one_rank_refuses_ends_both(folder: Path):
    one, other = read(folder, "refused_by_one")
    assert one["error"].startswith("ValueError: Rank 1 failed: The data have values outside the support of Bernoulli")
    assert other["error"].startswith("ValueError: The data have values outside the support of Bernoulli")


def test_only_the_first_rank_calls_on_epoch_which_must_not_change_the_pair(folder: Path):
    one, other = read(folder, "changed_by_one")
    assert (one["calls"], other["calls"]) == ([1, 2], [])
    assert one["error"] == other["error"]
    assert "The parameters of ranks 0 and 1 differ after epoch 2" in one["error"]


@pytest.mark.parametrize("scenario", ["in_two_parts", "captured_in_two_parts"])
def test_a_run_goes_on_to_the_same_bits(folder: Path, scenario: str):
    for found in read(folder, scenario):
        assert not same(found["first"], found["whole"])
        assert same(found["resumed"], found["whole"])


def test_a_signal_to_one_rank_ends_both_after_the_same_step(folder: Path):
    found = read(folder, "interrupted")
    for each in found:
        assert each["ended"]["error"].startswith("Interrupted: Training was interrupted after step 7, in epoch 2")
        assert same(each["resumed"], each["whole"])
    assert same(found[0]["resumed"], found[1]["resumed"])


@pytest.mark.usefixtures("double")
def test_a_run_of_two_processes_does_not_go_on_in_one(folder: Path):
    found = two_ranks.trained(
        two_ranks.new_vae(), two_ranks.data(), checkpoint=folder / "kept", resume="auto", validation=two_ranks.data(30)
    )
    assert "is a checkpoint of another run (processes was 2, is 1)" in found["error"]


@pytest.mark.usefixtures("double")
def test_67_data_evaluate_to_67_and_ranks_with_other_weights_are_not_mixed(folder: Path):
    alone = two_ranks.new_vae().log_marginal(two_ranks.data(67), num_samples=20, seed=0)
    for found in read(folder, "scored"):
        torch.testing.assert_close(found["log_px"], torch.as_tensor(alone.log_px), rtol=1e-12, atol=1e-12)
        assert len(found["log_px"]) == 67
        assert "Ranks 0 and 1 must score the same model" in found["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_two_processes_repair_evidence_as_one_does(tmp_path: Path):
    alone = two_ranks.repaired(tmp_path, 0)
    assert len(alone["rung"].unique()) > 1
    run(tmp_path, "repaired")
    for found in read(tmp_path, "repaired"):
        for name, values in alone.items():
            assert torch.equal(found[name], values), name


@pytest.mark.usefixtures("double")
def test_one_process_of_a_group_trains_as_none(tmp_path: Path):
    alone = two_ranks.noisy(tmp_path, 0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert same(two_ranks.noisy(tmp_path, 0), alone)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_steps_give_the_same_weights_on_both_ranks(tmp_path: Path):
    run(tmp_path, "compiled")
    assert same(*read(tmp_path, "compiled"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["killed", "stopped"])
def test_a_lost_rank_ends_the_job_within_a_minute_with_a_whole_checkpoint(tmp_path: Path, scenario: str):
    first, second = start(tmp_path, scenario)
    try:
        while not (tmp_path / scenario).exists() and first.poll() is None:
            time.sleep(0.1)
        first.wait(timeout=65)  # a second or two of them before the rank is lost
    finally:
        for rank in (first, second):
            rank.kill()
            rank.communicate()
    error = torch.load(tmp_path / f"{scenario}.0", weights_only=False)["error"]
    assert error.startswith("ConnectionError: Rank 0 lost another rank"), error
    assert pv.load_checkpoint(tmp_path / scenario).step == 8


@pytest.mark.slow
def test_the_command_line_under_torchrun_writes_one_run(tmp_path: Path):
    train = ["-m", "pyrovae", "train", "--name", "two", "--train.epochs", "2", "--model.hidden", "8"]
    options = ["--evaluate.num-samples", "20", "--evaluate.decompose", "0"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    done = subprocess.run([*launcher, *train, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["two"]
    assert len(pv.Evidence.load(tmp_path / "runs/two/evidence.safetensors")) == 360
    assert done.stdout.count("Report: ") == 1
    evaluate = ["-m", "pyrovae", "evaluate", "runs/two", "--num-samples", "30", "--decompose", "0"]
    done = subprocess.run([*launcher, *evaluate], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report: ") == 1
    again = subprocess.run([*launcher, *train, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr
    assert "pyrovae: " in again.stderr

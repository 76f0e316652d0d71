from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrovae import checkpoint, evidence
from pyrovae.evidence import Evidence, compare, pareto_khat, tail_size


def made(log_px: object, **changes: object) -> Evidence:
    log_px = np.asarray(log_px, float)
    one = np.ones(len(log_px))
    fields = {"se": 0.1 * one, "ess": 50 * one, "khat": 0.3 * one, "elbo": log_px - 1, "num_samples": 5000, "num_dims": 4}
    return Evidence(log_px=log_px, **(fields | changes))


@pytest.fixture(params=["0.23", "1.x"])
def line(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each line of ArviZ that is installed, whichever this Python gets by itself."""
    if request.param == "1.x":
        pytest.importorskip("arviz_stats")
        monkeypatch.setattr(evidence, "_psislw", evidence._psislw_of_1)
    else:
        if not version("arviz").startswith("0."):
            pytest.skip("ArviZ 0.23 is not installed")
        monkeypatch.setattr(evidence, "_psislw", evidence._psislw_of_023)
    return request.param


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize("num_samples", [30, 100, 224, 226, 300, 2000, 5000])
def test_the_tail_alone_gives_arviz_answer_on_all_weights(num_samples: int):
    log_w = np.random.default_rng(0).normal(size=(4, num_samples))
    psislw, negates = evidence._psislw()
    whole = [float(psislw(-row)[1] if negates else psislw(row.copy())[1]) for row in log_w]
    tail = pareto_khat(np.sort(log_w)[:, -tail_size(num_samples) :], num_samples)
    # The 1.x line rounds the tail's size down where the paper and 0.23 round up.
    np.testing.assert_allclose(tail, whole, atol=0.05 if negates else 1e-12)


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize("k", [-0.2, 0.3, 0.7, 1.0])
def test_pareto_k_of_generalised_pareto_weights(k: float):
    uniform = np.random.default_rng(1).uniform(size=(200, 5000))
    log_w = np.log((uniform**-k - 1) / k + 1e-300)
    khat = pareto_khat(np.sort(log_w)[:, -tail_size(5000) :], 5000)
    assert khat.mean() == pytest.approx(k, abs=0.05)


@pytest.mark.usefixtures("line")
def test_pareto_k_has_a_defined_answer_where_arviz_fails():
    rows = np.random.default_rng(0).normal(size=(4, tail_size(5000)))
    rows[0] = -3.0
    rows[1] = -math.inf
    rows[2, 5] = math.nan
    rows[3] = -700.0 + 1e-13 * rows[3]
    khat = pareto_khat(rows, 5000)
    assert khat[0] == -math.inf
    assert khat[1] == math.inf
    assert math.isnan(khat[2])
    assert khat[3] == -math.inf
    assert np.isnan(pareto_khat(rows[:, :24], 24)).all()


def test_reliability_threshold_is_the_papers():
    assert made([-1.0], num_samples=100).khat_threshold == pytest.approx(0.5)
    assert made([-1.0], num_samples=100_000).khat_threshold == 0.7
    khat = np.array([0.69, 0.71, -math.inf, math.inf, math.nan])
    assert made(-np.ones(5), khat=khat).reliable.tolist() == [True, False, True, False, False]
    assert not made(-np.ones(5), khat=khat * math.nan, num_samples=10).reliable.any()


def test_numbers_over_data():
    scored = made(np.array([-8.0, -12.0]), se=np.array([0.3, 0.4]))
    assert scored.mean == -10
    assert scored.total == -20
    assert scored.gap == pytest.approx(1.0)
    assert scored.mean_se == pytest.approx(0.25)
    assert scored.data_se == pytest.approx(2.0)
    assert scored.bits_per_dim == pytest.approx(10 / 4 / math.log(2))


def test_summary_says_how_many_are_unreliable_and_what_to_do():
    assert "can be believed" in made(-np.ones(3)).summary()
    said = made(-np.ones(3), khat=np.array([0.1, 0.9, 0.8])).summary()
    assert "2 of 3 data (first datum 1)" in said
    assert "draw more samples" in said
    assert "Fewer" in made(-np.ones(3), num_samples=10).summary().replace("fewer", "Fewer")
    assert "Datum 0 has NaN weights" in made(np.array([math.nan, 1.0])).summary()


def test_save_and_load_round_trip_and_truncation(tmp_path: Path):
    scored = made(np.array([-8.0, -12.5]), khat=np.array([-math.inf, 0.4]))
    path = tmp_path / "evidence.safetensors"
    scored.save(path)
    loaded = Evidence.load(path)
    for name in ("log_px", "se", "ess", "khat", "elbo"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scored, name))
    assert (loaded.num_samples, loaded.num_dims, loaded.method) == (5000, 4, "importance sampling")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        Evidence.load(path)
    with pytest.raises(FileNotFoundError):
        Evidence.load(tmp_path / "none")
    arrays = {name: torch.zeros(2) for name in ("log_px", "se", "ess", "khat", "elbo")}
    for notes in ({"evidence": 3}, {"evidence": {"foo": 1}}, {}):
        checkpoint.write_arrays(path, arrays, notes)
        with pytest.raises(ValueError, match="holds no evidence"):
            Evidence.load(path)


def test_datatree_holds_the_arrays():
    tree = made(np.array([-8.0, -12.5])).to_datatree()
    np.testing.assert_array_equal(tree["evidence"]["log_px"].values, [-8.0, -12.5])
    assert tree["evidence"].attrs["num_samples"] == 5000


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one entry per datum"):
        made(np.array([-8.0, -12.5]), se=np.ones(3))


def test_comparison_is_paired():
    random = np.random.default_rng(0)
    base = random.normal(-90, 10, size=400)
    noise = random.normal(0, 0.5, size=400)
    result = compare({"worse": made(base), "better": made(base + 1 + noise)})
    assert result.names == ["better", "worse"]
    assert result.difference[1] == pytest.approx(-(1 + noise.mean()))
    assert result.difference_se[1] == pytest.approx(noise.std(ddof=1) / 20)
    assert result.monte_carlo_se[1] == pytest.approx(math.sqrt(2) * 0.1 / 20)
    assert max(map(len, str(result).splitlines())) <= 80
    with pytest.raises(ValueError, match="at least two"):
        compare({"one": made(base)})
    with pytest.raises(ValueError, match="different numbers of data"):
        compare({"one": made(base), "two": made(base[:5])})


def test_an_unwritable_cache_folder_does_not_stop_the_fit(tmp_path: Path):
    (tmp_path / "file").write_text("no folder can be made under a file")
    code = (
        "import os, numpy as np; from pyrovae.evidence import pareto_khat; "
        "khat = pareto_khat(np.random.default_rng(0).normal(size=(1, 100)), 100); "
        "print(np.isfinite(khat).all(), os.environ['XDG_CACHE_HOME'])"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file" / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["True", str(tmp_path / "file" / "cache")], done.stderr

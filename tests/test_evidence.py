from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae import files
from pyrovae.evidence import kinds, planning, psis
from pyrovae.evidence.annealing import ais
from pyrovae.evidence.comparison import compare
from pyrovae.evidence.curve import Curve, curve_of
from pyrovae.evidence.draws import Draws
from pyrovae.evidence.exact import exact
from pyrovae.evidence.importance import log_marginal
from pyrovae.evidence.measure import Measure
from pyrovae.evidence.psis import pareto_khat, pareto_smooth, tail_size
from pyrovae.evidence.results import Evidence
from pyrovae.evidence.streaming import curve_sizes


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
        monkeypatch.setattr(psis, "_psislw", psis._psislw_of_1)
    else:
        if not version("arviz").startswith("0."):
            pytest.skip("ArviZ 0.23 is not installed")
        monkeypatch.setattr(psis, "_psislw", psis._psislw_of_023)
    return request.param


@pytest.mark.usefixtures("line")
@pytest.mark.parametrize("num_samples", [30, 100, 224, 226, 300, 2000, 5000])
def test_the_tail_alone_gives_arviz_answer_on_all_weights(num_samples: int):
    log_w = np.random.default_rng(0).normal(size=(4, num_samples))
    psislw, negates = psis._psislw()
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
@pytest.mark.parametrize("num_samples", [30, 100, 400, 2500])
def test_the_tail_alone_gives_arviz_smoothed_mean_of_all_weights(num_samples: int):
    # Sizes at which both lines fit the same tail; far from zero, and one of weight zero.
    log_w = 1.5 * np.random.default_rng(0).normal(size=(4, num_samples)) - np.array([[0], [1000], [-1000], [7]])
    log_w[3, 0] = -math.inf
    psislw, negates = psis._psislw()
    expected = []
    for row in np.maximum(log_w, -1e4):
        smoothed = psislw(-row)[0] if negates else psislw(row.copy())[0]
        expected.append(logsumexp(smoothed + (row[row.argmin()] - smoothed[row.argmin()])) - math.log(num_samples))
    raw = logsumexp(log_w, axis=1) - math.log(num_samples)
    khat, smoothed = pareto_smooth(np.sort(log_w)[:, -tail_size(num_samples) :], raw, num_samples)
    np.testing.assert_allclose(smoothed, expected, atol=1e-10)
    assert np.abs(smoothed - raw).min() > 1e-6
    np.testing.assert_array_equal(khat, pareto_khat(np.sort(log_w)[:, -tail_size(num_samples) :], num_samples))


@pytest.mark.usefixtures("line")
def test_smoothing_is_closer_to_the_truth_where_the_tail_is_heavy():
    # Pareto weights of k = 0.65 have the mean 1 / 0.35.
    log_w = 0.65 * np.random.default_rng(0).standard_exponential((400, 2000))
    raw = np.log(np.mean(np.exp(log_w), 1))
    smoothed = pareto_smooth(np.sort(log_w)[:, -tail_size(2000) :], raw, 2000)[1]
    error, raw_error = (np.sqrt(np.mean((values + math.log(0.35)) ** 2)) for values in (smoothed, raw))
    assert error < 0.9 * raw_error


@pytest.mark.usefixtures("line")
def test_pareto_k_has_a_defined_answer_where_arviz_fails():
    rows = np.random.default_rng(0).normal(size=(6, tail_size(5000)))
    rows[0] = -3.0
    rows[1] = -math.inf
    rows[2, 5] = math.nan
    rows[3] = -700.0 + 1e-13 * rows[3]
    rows[4, 5] = math.inf
    rows[5, 0] = -math.inf
    raw = np.array([-3.0, -math.inf, math.nan, -700.0, math.inf, 0.0])
    khat, smoothed = pareto_smooth(rows, raw, 5000)
    np.testing.assert_array_equal(khat[:5], [-math.inf, math.inf, math.nan, -math.inf, math.nan])
    np.testing.assert_array_equal(smoothed[:5], [-3.0, -math.inf, math.nan, -700.0, math.nan])
    assert np.isfinite([khat[5], smoothed[5]]).all()
    assert np.isnan(pareto_smooth(rows[:, :24], raw, 24)).all()
    scored = made(raw, khat=khat, log_px_psis=smoothed, elbo=np.zeros(6))
    assert scored.reliable.tolist() == [True, False, False, True, False, True]


@pytest.mark.usefixtures("float64")
def test_a_guide_narrower_by_w_has_the_pareto_k_of_its_law():
    def scored(spread: float) -> Evidence:
        pair = LinearGaussian(latent_dim=3, data_dim=4, spread=spread)
        return log_marginal(pair.model, pair.guide, pair.sample(300), num_samples=2000, seed=0)

    for spread in (0.8, 0.7, 0.5, 0.35):
        assert scored(spread).khat.mean() == pytest.approx(1 - spread**2, abs=0.05), spread
    assert (~scored(0.2).reliable).mean() >= 0.95
    assert (~scored(1.1).reliable).mean() < 0.02


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [1500, 700, 8])
def test_the_curve_is_the_estimate_from_the_first_samples(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_probes", lambda *_: 0)
    log_w = np.random.default_rng(0).normal(size=(1500, 3))
    size = math.ceil(1500 / math.ceil(1500 / chunk))  # chunks are as even as can be
    weights = iter(part for datum in torch.as_tensor(log_w).split(1, 1) for part in datum.split(size))

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x)
            if z.dim() == 2 and len(z) > 2:  # not where the pair is looked at
                pyro.factor("w", next(weights))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))

    loader = DataLoader(TensorDataset(torch.zeros(3)), batch_size=3)
    scored = log_marginal(model, guide, loader, num_samples=1500, chunk_size=chunk)
    assert scored.curve is not None
    assert scored.curve.num_samples.tolist() == [1, 10, 100, 1000, 1500]
    for row, count in enumerate(scored.curve.num_samples):
        np.testing.assert_allclose(scored.curve.log_px[row], logsumexp(log_w[:count], axis=0) - math.log(count), rtol=1e-12)
        w = np.exp(log_w[:count])
        if count > 1:
            expected = w.std(0, ddof=1) / w.mean(0) / math.sqrt(count)
            np.testing.assert_allclose(scored.curve.se[row], expected, rtol=1e-9)
    np.testing.assert_array_equal(scored.curve.log_px[-1], scored.log_px)
    np.testing.assert_allclose(scored.curve.mean, scored.curve.log_px.mean(1))


@pytest.mark.usefixtures("float64")
def test_the_curves_standard_error_from_one_sample_is_right_over_many_data():
    pair = LinearGaussian(spread=1.5)
    curve = log_marginal(pair.model, pair.guide, pair.sample(1).expand(3000, -1), num_samples=50, seed=0).curve
    assert curve is not None
    # The data are one datum many times, so they differ by sampling alone.
    np.testing.assert_allclose(curve.mean_se[0], curve.log_px[0].std(ddof=1) / math.sqrt(3000), rtol=0.05)
    single = log_marginal(pair.model, pair.guide, pair.sample(2), num_samples=1, seed=0).curve
    assert single is not None
    assert single.num_samples.tolist() == [1]
    assert np.isnan(single.mean_se).all()
    ax = curve.plot()
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 10, 50])


def test_a_curve_of_zero_weights_is_minus_infinity_without_warnings():
    sums = np.array([[-math.inf, 0.0], [0.0, 1.0]])
    curve = curve_of(sums, 2 * sums, np.array([-math.inf, 0.0]), 10)
    assert curve_sizes(10) == [1, 10]
    assert curve.log_px[0].tolist() == [-math.inf, 0.0]
    assert curve.mean[0] == -math.inf
    assert list(curve.plot().lines[0].get_xdata()) == [10]


def test_reliability_threshold_is_the_papers():
    assert made([-1.0], num_samples=100).khat_threshold == pytest.approx(0.5)
    assert made([-1.0], num_samples=100_000).khat_threshold == 0.7
    khat = np.array([0.69, 0.71, -math.inf, math.inf, math.nan])
    assert made(-np.ones(5), khat=khat).reliable.tolist() == [True, False, True, False, False]
    assert not made(-np.ones(5), khat=khat * math.nan, num_samples=10).reliable.any()
    assert [made([-1.0], num_samples=size).khat_threshold for size in (1, 24)] == [-math.inf] * 2
    assert made([-1.0], num_samples=25).khat_threshold == pytest.approx(1 - 1 / math.log10(25))


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
    for cure in ("draw more samples", 'proposal="auto"', "pv.ais"):
        assert cure in said
    curve = Curve(np.array([1000, 5000]), np.array([[-1.25] * 3, [-1.0] * 3]), np.zeros((2, 3)))
    said = made(-np.ones(3), khat=np.array([0.1, 0.9, 0.8]), curve=curve, log_px_psis=np.full(3, -0.5)).summary()
    assert "moved by 0.250 nats from 1,000 to 5,000 samples" in said
    assert "Pareto-smoothed: -0.500" in said
    assert "the guide is exact" in made(-np.ones(3), khat=np.full(3, -math.inf), elbo=-np.ones(3)).summary()
    # The largest weights may be equal where the others are not.
    assert "the guide is exact" not in made(-np.ones(3), khat=np.full(3, -math.inf)).summary()
    assert "Fewer" in made(-np.ones(3), num_samples=10).summary().replace("fewer", "Fewer")
    assert "Datum 0 has NaN weights" in made(np.array([math.nan, 1.0])).summary()
    assert "Datum 1 and 1 more have NaN weights" in made(np.array([1.0, math.nan, math.nan])).summary()
    assert "Datum 1 has infinite weights" in made(np.array([1.0, math.inf]), elbo=np.zeros(2)).summary()
    assert "Datum 1 has zero weight" in made(np.array([1.0, -math.inf]), elbo=np.zeros(2)).summary()


def test_a_refined_proposal_is_said_to_have_the_modes_it_found():
    method = "importance sampling from the guide refined per datum"
    for khat in (0.1, 0.9):
        assert "the modes that its steps found" in made(-np.ones(3), khat=np.full(3, khat), method=method).summary()
        assert "the modes that" not in made(-np.ones(3), khat=np.full(3, khat)).summary()


def test_exact_answers_are_called_exact(tmp_path: Path):
    log_px, zero = np.array([-8.0, -9.0, -10.0]), np.zeros(3)
    fields = {"se": zero, "ess": np.ones(3), "khat": np.full(3, -math.inf), "elbo": log_px}
    closed = made(log_px, **fields, num_samples=1, method="exact, linear-Gaussian")
    assert closed.reliable.all()
    said = closed.summary()
    assert "(exact, linear-Gaussian, in closed form); standard error 0.577 from the data, none from sampling" in said
    assert "exact to rounding" in said
    for word in ("fewer than", "ELBO", "Pareto", "guide"):
        assert word not in said
    summed = made(log_px, **fields, num_samples=12, method="exact, by enumeration")
    assert "up to 12 assignments each" in summed.summary()
    grids = made(log_px, **fields | {"se": np.array([0, 2e-7, 0])}, num_samples=66049, method="exact, by quadrature")
    assert grids.reliable.all()
    assert "up to 66,049 grid points each" in grids.summary()
    assert "two quadratures and rounding leave at most 2.0e-07 nats in doubt." in grids.summary()
    # A kink may leave the finest grid too coarse, and a model may rule a datum out.
    rough = made(log_px, **fields | {"se": np.array([0, 0.3, 0])}, num_samples=66049, method="exact, by quadrature")
    assert rough.reliable.tolist() == [True, False, True]
    assert "Datum 1 has more than 0.01 nats in doubt: check by annealing (pv.ais)." in rough.summary()
    coarse = made(log_px, **fields | {"se": np.array([0, 0.3, 0])}, num_samples=1, method="exact, linear-Gaussian")
    assert coarse.reliable.tolist() == [True, False, True]
    assert "Datum 1 has more than 0.01 nats in doubt: score in float64." in coarse.summary()
    ruled_out = made([-8.0, -math.inf], num_samples=1, method="exact, linear-Gaussian", se=zero[:2], elbo=zero[:2])
    assert ruled_out.reliable.tolist() == [True, False]
    assert "Datum 1 has no finite answer" in ruled_out.summary()
    table = str(compare({"one": grids, "two": made(log_px - 1, khat=np.full(3, 0.9))}))
    assert [line.split()[-2] for line in table.splitlines()] == ["unrel.", "0", "3"]
    grids.save(tmp_path / "evidence")
    assert Evidence.load(tmp_path / "evidence").reliable.all()


def test_a_few_annealed_chains_are_judged_by_whether_they_agree():
    ais = {"khat": np.full(3, math.nan), "method": "AIS from the prior, 1000 temperatures", "num_samples": 16}
    agree = made([-8.0, -9.0, -10.0], ess=np.array([15.0, 9.0, 8.0]), **ais)
    assert agree.reliable.all()
    said = agree.summary()
    assert "At least 8 of 16 chains are effective for all data (at worst 8.0): the chains agree" in said
    assert "pv.bdmc" in said
    assert "16 chains each" in said
    assert "fewer than 25" not in said
    differ = made([-8.0, -9.0, -math.inf], ess=np.array([15.0, 1.3, 0.0]), elbo=np.zeros(3), **ais)
    assert differ.reliable.tolist() == [True, False, False]
    assert "Datum 2 has zero weight in all chains" in differ.summary()
    differ = made([-8.0, -9.0, -10.0], ess=np.array([15.0, 1.3, 7.9]), **ais)
    assert "Fewer than 8 of 16 chains are effective for 2 of 3 data (first datum 1, at worst 1.3)" in differ.summary()
    for cure in ("num_temperatures", "num_chains", 'start="guide"', "pv.bdmc"):
        assert cure in differ.summary()
    # Three chains agree or not by chance; from 25 on there is a tail to fit.
    three = made([-8.0, -9.0, -10.0], ess=np.full(3, 3.0), **ais | {"num_samples": 3})
    assert not three.reliable.any()
    assert "Fewer than 4 chains do not show whether they agree: take num_chains=16" in three.summary()
    many = made([-8.0, -9.0, -10.0], ess=np.full(3, 20.0), **ais | {"num_samples": 100, "khat": np.array([0.1, 0.4, 0.6])})
    assert many.reliable.tolist() == [True, True, False]
    assert "num_temperatures" in many.summary()


def test_save_and_load_round_trip_and_truncation(tmp_path: Path):
    scored = made(np.array([-8.0, -12.5]), khat=np.array([-math.inf, 0.4]))
    path = tmp_path / "evidence.safetensors"
    scored.save(path)
    loaded = Evidence.load(path)
    for name in ("log_px", "se", "ess", "khat", "elbo"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scored, name))
    assert (loaded.num_samples, loaded.num_dims, loaded.method) == (5000, 4, "importance sampling")
    assert loaded.log_px_psis is None
    assert loaded.curve is None
    curve = Curve(np.array([1, 5000]), np.array([[-9.0, -13.0], [-8.0, -12.5]]), np.array([[0.3, 0.4], [0.1, 0.1]]))
    whole = made(np.array([-8.0, -12.5]), log_px_psis=np.array([-8.1, -12.4]), curve=curve)
    whole.save(path)
    loaded = Evidence.load(path)
    assert loaded.curve is not None
    for name in ("num_samples", "log_px", "se"):
        np.testing.assert_array_equal(getattr(loaded.curve, name), getattr(curve, name))
    np.testing.assert_array_equal(loaded.log_px_psis, whole.log_px_psis)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        Evidence.load(path)
    with pytest.raises(FileNotFoundError):
        Evidence.load(tmp_path / "none")
    arrays = {name: torch.zeros(2) for name in ("log_px", "se", "ess", "khat", "elbo")}
    for notes in ({"evidence": 3}, {"evidence": {"foo": 1}}, {}):
        files.write_arrays(path, arrays, notes)
        with pytest.raises(ValueError, match="holds no evidence"):
            Evidence.load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("se", torch.tensor([0.1, -0.1]), "se must not be negative, got -0.1 in row 1"),
        ("ess", torch.ones(3), r"ess must have one entry per datum, got shape \(3,\) and \(2,\)"),
        ("log_px", torch.ones(2, 2), "must have one entry per datum"),
        ("khat", torch.ones(2, dtype=torch.bool), "khat must hold real numbers, got bool"),
        ("drawn", torch.ones(2), "drawn must hold integers, got float32"),
        ("covered", torch.ones(2), "covered must hold true or false"),
        ("elbo", torch.ones(2, dtype=torch.bfloat16), "holds no evidence"),
        ("num_samples", "many", "num_samples must be an integer of at least 0, got 'many'"),
        ("num_samples", 10.5, "num_samples must be an integer"),
        ("num_dims", -1, "num_dims must be a number of at least 0, got -1"),
        ("method", 3, "method must be a str"),
        ("notes", [], "notes must be a dict"),
        ("measure", [1, "x", []], "measure must hold two numbers"),
        ("measure", 7, "measure must hold two numbers"),
        ("curve.num_samples", torch.tensor([5, 5000, 10]), "curve.num_samples must be positive and ascend"),
        ("curve.log_px", torch.ones(2, 3), r"curve.log_px must have shape \(3, 2\), got \(2, 3\)"),
    ],
)
def test_a_file_that_no_evidence_has_is_refused_by_name(tmp_path: Path, name: str, value: object, message: str):
    arrays = {each: torch.ones(2) for each in ("log_px", "se", "ess", "khat", "elbo")}
    notes: dict = {"num_samples": 5, "num_dims": 3, "method": "importance sampling", "notes": {}, "measure": [3, 0, []]}
    if name.startswith("curve"):
        sizes = torch.tensor([1, 2, 5])
        arrays |= {"curve.num_samples": sizes, "curve.log_px": torch.ones(3, 2), "curve.se": torch.ones(3, 2)}
    files.write_arrays(tmp_path / "e", arrays, {"evidence": notes})
    assert len(Evidence.load(tmp_path / "e")) == 2
    (arrays if isinstance(value, torch.Tensor) else notes)[name] = value
    files.write_arrays(tmp_path / "e", arrays, {"evidence": notes})
    with pytest.raises(ValueError, match=message) as caught:
        Evidence.load(tmp_path / "e")
    assert str(tmp_path / "e") in str(caught.value)


def test_datatree_holds_the_arrays():
    tree = made(np.array([-8.0, -12.5])).to_datatree()
    np.testing.assert_array_equal(tree["evidence"]["log_px"].values, [-8.0, -12.5])
    assert tree["evidence"].attrs["num_samples"] == 5000


def test_data_that_stopped_at_a_target_keep_their_own_number_of_samples(tmp_path: Path):
    drawn = np.array([250, 1000, 5000])
    scored = made(np.array([-8.0, -9.0, -10.0]), khat=np.array([0.6, 0.6, 0.71]), drawn=drawn, notes={"target_se": 0.05})
    np.testing.assert_allclose(scored.khat_thresholds, [1 - 1 / math.log10(250), 1 - 1 / 3, 0.7])
    assert scored.khat_threshold == 0.7
    assert scored.reliable.tolist() == [False, True, False]
    said = scored.summary()
    assert "250 to 5,000 samples each, 2,083 on average" in said
    assert "2 of 3 data (first datum 0) do not have Pareto k below 0.58 to 0.70: their estimates" in said
    assert "3 of 3 data miss the target error 0.05, 1 of them with all 5,000 samples" in said
    scored.save(tmp_path / "evidence")
    loaded = Evidence.load(tmp_path / "evidence")
    np.testing.assert_array_equal(loaded.drawn, drawn)
    assert loaded.summary() == said
    np.testing.assert_array_equal(scored.to_datatree()["evidence"]["drawn"].values, drawn)
    assert compare({"one": scored, "two": made(np.array([-9.0, -9.0, -9.0]))}).unreliable.tolist() == [2, 0]
    with pytest.raises(ValueError, match="one entry per datum"):
        made(np.array([-8.0, -12.5]), drawn=drawn)


def test_a_part_of_the_data_keeps_everything_that_is_theirs():
    curve = Curve(np.array([1, 5000]), np.arange(6.0).reshape(2, 3), np.ones((2, 3)))
    whole = made([-8.0, -9.0, -10.0], curve=curve, drawn=np.array([250, 500, 5000]))
    for part in (whole.rows(slice(1, 3)), whole.rows(np.array([1, 2]))):
        assert part.log_px.tolist() == [-9, -10]
        assert part.drawn.tolist() == [500, 5000]
        assert part.curve.log_px.tolist() == [[1, 2], [4, 5]]
        assert part.num_samples == 5000


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one entry per datum"):
        made(np.array([-8.0, -12.5]), se=np.ones(3))
    with pytest.raises(ValueError, match="one entry per datum"):
        made(np.array([-8.0, -12.5]), log_px_psis=np.ones(3))
    with pytest.raises(ValueError, match="one entry per datum"):
        made(np.array([-8.0, -12.5]), curve=Curve(np.ones(1), np.ones((1, 3)), np.ones((1, 3))))


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


def test_what_has_no_finite_mean_ranks_last():
    fine, broken = np.array([-5.0, -6.0, -4.0]), np.array([-1.0, math.nan, -1.0])
    lost = np.array([-1.0, -math.inf, -1.0])
    made_of = {"broken": made(broken, elbo=fine), "fine": made(fine), "lost": made(lost, elbo=fine)}
    with np.errstate(invalid="ignore"):
        assert compare(made_of).names[0] == "fine"


@pytest.mark.parametrize(("num_draws", "chains"), [(12, 1), (16, 4), (18, 1), (40, 4)])
def test_draws_stand_as_four_chains_where_their_number_allows(num_draws: int, chains: int):
    posterior = draws_of(3, num_draws).to_datatree()["posterior"]
    assert dict(posterior.sizes)["chain"] == chains
    assert dict(posterior.sizes)["draw"] == num_draws // chains


def test_quadrature_is_reliable_within_a_hundredth_of_a_nat():
    result = made([-3.0, -4.0, -5.0], se=np.array([0.0, 0.0099, 0.0101]), method="exact, by quadrature")
    assert result.reliable.tolist() == [True, True, False]


def test_stacking_weights_are_the_best_mixture_however_far_down():
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, size=(2, 300))
    best = minimize_scalar(lambda w: -np.log(w * np.exp(one) + (1 - w) * np.exp(other)).mean(), bounds=(0, 1), method="bounded")
    # The same far below what float64 can exponentiate, where ArviZ by itself divides zero by zero.
    for shift in (0.0, -2000.0, 2000.0):
        result = compare({"one": made(one + shift), "other": made(other + shift)})
        weight = dict(zip(result.names, result.stacking, strict=True))
        assert weight["one"] == pytest.approx(best.x, abs=2e-3)
        assert sum(weight.values()) == pytest.approx(1)
    broken = other.copy()
    broken[3] = math.nan
    assert np.isnan(compare({"one": made(one), "other": made(broken, elbo=one)}).stacking).all()


def test_stacking_weights_do_not_depend_on_how_likely_each_datum_is():
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, size=(2, 300))
    best = minimize_scalar(lambda w: -np.log(w * np.exp(one) + (1 - w) * np.exp(other)).mean(), bounds=(0, 1), method="bounded")
    # Data that differ by thousands of nats, as images of different sizes would: what they share cancels datum by datum.
    for level in (random.uniform(-3000, 0, size=300), np.linspace(-50_000, 800, 300)):
        result = compare({"one": made(one + level), "other": made(other + level)})
        assert dict(zip(result.names, result.stacking, strict=True))["one"] == pytest.approx(best.x, abs=2e-3)


def test_a_comparison_knows_the_data():
    prints = np.arange(4) + 10
    one, log_px = made(-np.arange(4.0), fingerprint=prints), -np.arange(4.0)
    assert compare({"one": one, "same": made(log_px, fingerprint=prints), "old": made(log_px)}).names
    with pytest.raises(ValueError, match=r"'other' was scored on the same data in another order than 'one' \(first at row 1\)"):
        compare({"one": one, "other": made(log_px, fingerprint=prints[[0, 2, 1, 3]])})
    with pytest.raises(ValueError, match=r"on other data \(1 of 4\) than 'one'"):
        compare({"one": one, "old": made(log_px), "other": made(log_px, fingerprint=np.array([10, 11, 99, 13]))})
    with pytest.raises(TypeError, match="mapping of names to evidence"):
        compare([one, one])


def _normal(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x)


def _poisson(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z.sum(-1, keepdim=True).exp() * torch.ones(3)).to_event(1), obs=x)


def _multinomial(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        logits = torch.cat([z, torch.zeros_like(z[..., :1])], -1)
        pyro.sample("x", dist.Multinomial(total_count=int(x.sum(-1).max()), logits=logits), obs=x)


def _guide(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


def test_numbers_by_different_measures_are_not_ranked():
    counts = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    models = {"normal": _normal, "poisson": _poisson, "multinomial": _multinomial}
    scored = {name: log_marginal(model, _guide, counts, num_samples=50, seed=0) for name, model in models.items()}
    assert scored["normal"].measure == Measure(3, 0)
    assert scored["poisson"].measure == Measure(0, 3)
    assert scored["multinomial"].measure == Measure(0, 3, ("the total",))
    said = "log p\\(x\\) of 'poisson' is a probability of 3 numbers, and that of 'normal' is a density over 3 numbers"
    with pytest.raises(ValueError, match=said):
        compare({"normal": scored["normal"], "poisson": scored["poisson"]})
    with pytest.raises(ValueError, match="'multinomial' is a probability of 3 numbers given the total"):
        compare({"poisson": scored["poisson"], "multinomial": scored["multinomial"]})
    again = log_marginal(_poisson, _guide, counts, num_samples=50, seed=1)
    by_chains = ais(_poisson, _guide, counts, num_chains=4, num_temperatures=4, seed=0)
    assert len(compare({"one": scored["poisson"], "two": again, "three": by_chains}).names) == 3
    with pytest.raises(ValueError, match="the same data in another order"):
        compare({"one": again, "turned": log_marginal(_poisson, _guide, counts.flip(0), num_samples=50)})


def _observing(change):
    """A pair that observes what ``change`` makes of the data: a law and its value."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            law, value = change(z, x)
            pyro.sample("x", law, obs=value)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return model, guide


ITSELF = {
    "lognormal": lambda z, x: (dist.LogNormal(z, 1.0), x),
    "reshaped": lambda z, x: (dist.Normal(z[..., None], 1.0).to_event(1), x[:, None]),
    "masked": lambda z, x: (dist.Gamma(z.exp(), 1.0).mask(torch.ones(len(x), dtype=torch.bool)), x),
    "double": lambda z, x: (dist.Normal(z.double(), 1.0), x.double()),
    "turned": lambda z, x: (dist.Normal(-z, 1.0), -x),
    "shifted": lambda z, x: (dist.Normal(z, 1.0), x - 2),
    "residual": lambda z, x: (dist.Normal(0.0, 1.0), x - z),
}


@pytest.mark.parametrize(
    "change",
    [
        lambda z, x: (dist.Normal(z, 1.0), x.log()),
        lambda z, x: (dist.Normal(z, 1.0), x / 255),
        lambda z, x: (dist.Gamma(z.exp(), 1.0), (x - 0.4) * 2),
        lambda z, x: (dist.Normal(z, 1.0), (x - 1.75) / 0.9),
        lambda z, x: (dist.Normal(z, 1.0), x.round()),
    ],
)
def test_a_density_of_other_values_is_not_ranked(change):
    x = torch.linspace(0.5, 3.0, 6)
    own = {name: log_marginal(*_observing(each), x, num_samples=20, seed=0) for name, each in ITSELF.items()}
    assert len(compare(own).names) == len(ITSELF)
    other = log_marginal(*_observing(change), x, num_samples=20, seed=0)
    with pytest.raises(ValueError, match=r"'other' observes other values than 'lognormal' \(first at row \d\)"):
        compare({"lognormal": own["lognormal"], "other": other})


def _with_factor(factor: Callable | None) -> tuple[Callable, Callable]:
    """x ~ N(z, 1), and a factor of z and x."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if factor is not None:
                pyro.factor("f", factor(z, x))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return model, guide


def _filled(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers of the latent in a tensor that was made without it."""
    whole = torch.zeros(z.shape)
    whole[...] = z
    return whole


@pytest.mark.parametrize(
    "factor",
    [lambda z, x: -x.log(), lambda z, x: torch.full_like(z, -3.0), lambda z, x: (x > 1).float(), lambda z, x: 0 * x + 1],
)
def test_a_factor_of_the_data_alone_is_not_ranked_against_a_model_without_it(factor):
    x = torch.linspace(0.5, 3.0, 6)
    plain, other = (log_marginal(*_with_factor(each), x, num_samples=20, seed=0) for each in (None, factor))
    assert other.measure == Measure(1, 0, ("a factor of the data alone",))
    with pytest.raises(ValueError, match=r"given a factor of the data alone.*put a change of variables into the likelihood"):
        compare({"plain": plain, "other": other})
    assert len(compare({"one": other, "same": other}).names) == 2
    changed = log_marginal(*_with_factor(lambda z, x: factor(z, x) + 1), x, num_samples=20, seed=0)
    with pytest.raises(ValueError, match="observes other values"):
        compare({"one": other, "changed": changed})


@pytest.mark.parametrize(
    "factor",
    [
        lambda z, x: dist.Normal(z, 1.0).log_prob(x.log()),
        lambda z, x: -9.0 * (z < -20),
        lambda z, x: _filled(z, x).clamp(max=-20),
        lambda z, x: torch.zeros(z.shape).add_(z).sign() * x,
        lambda z, x: torch.stack(torch.broadcast_tensors(x, z)).amax(0),
        lambda z, x: -1.0 * x if bool((z > -20).all()) else x,
    ],
)
def test_a_factor_that_a_latent_takes_part_in_belongs_to_the_model(factor):
    x = torch.linspace(0.5, 3.0, 6)
    assert log_marginal(*_with_factor(factor), x, num_samples=20, seed=0).measure == Measure(1, 0)


def test_a_probability_of_coarser_values_is_not_ranked_and_of_renamed_ones_is(tmp_path):
    x = torch.tensor([0.0, 1.0, 3.0, 1.0, 2.0])
    laws = {
        "counts": lambda z, x: (dist.Poisson(z.exp()), x),
        "from one": lambda z, x: (dist.Categorical(logits=z[..., None] * torch.arange(6.0)), x + 1),
        "one-hot": lambda z, x: (
            dist.OneHotCategorical(logits=z[..., None] * torch.arange(4.0)),
            torch.nn.functional.one_hot(x.long(), 4).float(),
        ),
        "any": lambda z, x: (dist.Bernoulli(logits=z), (x > 0).float()),
    }
    found = {name: log_marginal(*_observing(law), x, num_samples=20, seed=0) for name, law in laws.items()}
    for name in ("from one", "one-hot"):
        assert len(compare({"counts": found["counts"], name: found[name]}).names) == 2
    found["any"].save(tmp_path / "any")
    with pytest.raises(ValueError, match="'any' observes other values than 'counts'"):
        compare({"counts": found["counts"], "any": Evidence.load(tmp_path / "any")})


def test_our_likelihoods_say_what_they_condition_on():
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((5, 6), 2.0))

    def scored(likelihood: object, x: object = counts) -> Evidence:
        return pv.make_vae(6, latent_dim=2, hidden=[8], likelihood=likelihood).log_marginal(x, num_samples=40, seed=0)

    free = scored({"kind": "negative_binomial"})
    total = scored({"kind": "zero_inflated_negative_binomial", "library": "total"})
    assert (free.measure, total.measure) == (Measure(0, 6), Measure(0, 6, ("the total",)))
    assert scored({"kind": "zero_inflated_negative_binomial", "library": 10.0}).measure == free.measure
    with pytest.raises(ValueError, match="given the total"):
        compare({"free": free, "total": total})
    parts = [[[0, 1, 2], "negative_binomial"], [[3, 4, 5], {"kind": "negative_binomial", "library": "total"}]]
    assert scored({"kind": "mixed", "parts": parts}).measure == total.measure
    parts = [[[0, 1], "normal"], [[2, 3, 4, 5], "poisson"]]
    assert scored({"kind": "mixed", "parts": parts}).measure == Measure(2, 4)
    masked = scored({"kind": "negative_binomial", "library": "total"}, (counts, counts < 3))
    assert masked.measure == Measure(0, int((counts < 3).sum()) / 5, ("the total",))
    with pytest.raises(ValueError, match="is a probability of"):
        compare({"whole": total, "masked": masked})


def test_a_one_hot_vector_is_one_probability_and_a_known_label_another():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            logits = z[..., None] * torch.arange(4.0)
            if x.dim() == 2:
                pyro.sample("y", dist.OneHotCategorical(logits=logits), obs=x)
            else:
                pyro.sample("y", dist.Categorical(logits=logits), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    labels = torch.tensor([0, 3, 1])
    for y in (labels, torch.eye(4)[labels]):
        assert log_marginal(model, guide, y, num_samples=30).measure == Measure(0, 1)
    vae = pv.make_semi_supervised_vae(6, num_classes=3, latent_dim=2, hidden=[8], likelihood="normal")
    scored = vae.log_marginal((torch.zeros(4, 6), torch.tensor([0, -1, 2, -1])), num_samples=30)
    assert scored.measure == Measure(6, 0.5)
    assert scored.num_dims == 6


@pytest.mark.usefixtures("float64")
def test_bits_per_dimension_count_what_was_observed_whatever_the_method():
    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])

    def model(x: torch.Tensor, mask: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).mask(mask).to_event(1), obs=x)

    def guide(x: torch.Tensor, mask: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    data = (torch.zeros(3, 3), mask)
    every = [
        log_marginal(model, guide, data, num_samples=2000, seed=0),
        exact(model, guide, data),
        ais(model, guide, data, num_chains=30, num_temperatures=20, seed=0),
    ]
    for scored in every:
        assert scored.num_dims == 2
        assert scored.measure == Measure(2, 0)
        assert scored.bits_per_dim == pytest.approx(every[1].bits_per_dim, abs=0.05)
    assert len(compare({str(row): scored for row, scored in enumerate(every)}).names) == 3


def test_evidence_is_one_line_and_keeps_what_it_knows(tmp_path: Path):
    prints = np.array([2**62 + 1, -5, 7])
    fields = {"fingerprint": prints, "missed": np.array([0.0, 0.2, math.nan]), "rounding": np.array([0, 0.01, 0.2])}
    scored = made([-8.0, -9.0, -10.0], **fields, pilot=np.array([63, 63, 126]), measure=Measure(2.5, 1, ("the total",)))
    assert len(repr(scored)) < 120
    assert "mean=-9 +- 0.058 nats, 3 data, 2 reliable" in repr(scored)
    # Three standard errors of 0.1 are more than what the second misses.
    assert scored.reliable.tolist() == [True, True, False]
    assert made([-9.0], missed=np.array([0.31])).reliable.tolist() == [False]
    assert made([-9.0], missed=np.array([0.06]), se=np.array([0.01])).reliable.tolist() == [False]
    missed = made([-9.0], missed=np.array([0.31]))
    assert 'Score with proposal="mixture", which also draws from the prior.' in missed.summary()
    repaired = dataclasses.replace(missed, method=kinds.KINDS["auto"].method)
    assert 'Anneal these data from the prior (pv.ais with start="prior").' in repaired.summary()
    scored.save(tmp_path / "evidence")
    loaded = Evidence.load(tmp_path / "evidence")
    for name in (*fields, "pilot"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scored, name))
        np.testing.assert_array_equal(getattr(loaded.rows(np.array([2, 0])), name), getattr(scored, name)[[2, 0]])
    assert loaded.measure == scored.measure
    assert loaded.summary() == scored.summary()
    tree = scored.to_datatree()["evidence"]
    np.testing.assert_array_equal(tree["missed"].values, fields["missed"])
    assert tree.attrs["measure"] == "a density over 2.5 numbers and a probability of 1 number given the total"


def test_a_common_offset_changes_neither_k_nor_what_is_constant():
    random = np.random.default_rng(0)
    rows = np.sort(0.75 * random.standard_exponential((20, 5000)))[:, -tail_size(5000) :]
    for offset in (-1e6, 1e6):
        found = pareto_khat(rows + offset, 5000, precision=1.2e-7)
        np.testing.assert_allclose(found, pareto_khat(rows, 5000), atol=1e-6)
    # Weights that differ by rounding alone are constant there too.
    assert np.isneginf(pareto_khat(1e-3 * rows - 1e6, 5000, precision=1.2e-7)).all()


@pytest.mark.filterwarnings("ignore")  # 0.23 uses what pandas and matplotlib deprecate
def test_arviz_compare_gives_our_differences_and_errors():
    random = np.random.default_rng(0)
    base = random.normal(-90, 10, size=(3, 150))
    scored = {name: made(row) for name, row in zip("abc", base, strict=True)}
    ours = compare(scored)
    elpds = {name: psis._elpd(e.log_px, e.khat, e.num_samples, e.khat_threshold) for name, e in scored.items()}
    table = psis._comparison()[0](elpds).loc[ours.names]
    # 0.23 counts the difference from the best downwards; both divide by N where we divide by N - 1.
    np.testing.assert_allclose(np.abs(table["elpd_diff"].astype(float)), np.abs(150 * ours.difference), rtol=1e-10)
    np.testing.assert_allclose(table["dse"].astype(float), ours.difference_se * math.sqrt(150 * 149), rtol=1e-10)
    np.testing.assert_allclose(table["weight"].astype(float), ours.stacking, atol=1e-3)


def test_the_forest_plot_draws_each_model_once():
    random = np.random.default_rng(0)
    base = random.normal(-90, 10, size=50)
    result = compare({"worse": made(base, khat=np.full(50, 0.9)), "better": made(base + 1)})
    ax = result.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["better", "worse"]
    points = np.concatenate([line.get_xydata() for line in ax.lines if line.get_marker() == "o"])
    np.testing.assert_allclose(points, [[0, 0], [-1, 1]], atol=1e-12)
    assert [text.get_text() for text in ax.texts] == ["50 unreliable"]


@pytest.mark.parametrize("columns", [1, 3])
def test_the_forest_plot_fits_its_axes(columns: int):
    from matplotlib import pyplot

    random = np.random.default_rng(0)
    base = random.normal(-90, 10, size=50)
    runs = {name: [made(base + level), made(base + level + 0.3)] for name, level in (("vamp", 1.0), ("standard", 0.0))}
    figure, axes = pyplot.subplots(1, columns, figsize=(8, 2.6), layout="constrained", squeeze=False)
    drawn = [compare(runs).plot(ax) for ax in axes[0]]
    figure.draw_without_rendering()
    for ax in drawn:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes)), "ticks overprint"
        for part in (ax.xaxis.label, ax.get_legend()):
            box = part.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1, "cut off"
    pyplot.close(figure)


def draws_of(num_data: int, num_draws: int = 40) -> Draws:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=(num_draws, num_data, *shape))

    return Draws(
        posterior={"z": normal(2), "level": normal()},
        log_likelihood={"x": -np.abs(normal())},
        observed_data={"x": normal(3)[0]},
        posterior_predictive={"x": normal(3)},
        prior={"z": normal(2), "level": normal()},
        prior_predictive={"x": normal(3)},
        ess=np.full(num_data, 30.0),
        num_samples=100,
    )


@pytest.mark.filterwarnings("ignore")  # ArviZ's own, about few draws and about what its plots' libraries deprecate
def test_the_datatree_goes_into_arviz_summary_compare_and_plots():
    import arviz as az
    import matplotlib

    matplotlib.use("agg")
    draws = draws_of(6)
    scored = made(np.linspace(-9, -8, 6))
    tree = scored.to_datatree(draws)
    assert {"posterior", "log_likelihood", "observed_data", "prior", "prior_predictive", "evidence"} < set(tree.children)
    np.testing.assert_array_equal(tree["posterior"]["z"].values.reshape(40, 6, 2), draws.posterior["z"])
    np.testing.assert_array_equal(tree["evidence"]["log_px"].values, scored.log_px)
    old = az.__version__.startswith("0.")
    taken = az.InferenceData.from_datatree(tree) if old else tree
    summary = az.summary(taken, var_names=["z"], round_to=6 if old else "none")
    np.testing.assert_allclose(summary["mean"].astype(float), draws.posterior["z"].mean(0).ravel(), atol=1e-5)
    table = az.compare({"one": taken, "other": taken})
    assert np.isfinite(table["weight"].astype(float)).all()
    by_log_px = az.compare({"one": scored.to_elpd(), "other": made(np.full(6, -20.0)).to_elpd()})
    assert list(by_log_px.index) == ["one", "other"]
    (az.plot_trace if old else az.plot_trace_dist)(taken, var_names=["level"])
    (az.plot_ppc if old else az.plot_ppc_dist)(taken)
    az.plot_khat(scored.to_elpd())
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match="got draws of 5"):
        scored.to_datatree(draws_of(5))


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


def test_the_method_of_a_file_names_its_kind() -> None:
    for name, kind in kinds.KINDS.items():
        assert kinds.kind_of(kind.method) is kind, name
    assert kinds.kind_of("importance sampling from the guide refined per datum") == kinds.Refined(kinds.KINDS["refined"].method)
    annealed = kinds.kind_of("AIS from the guide, 1000 temperatures")
    assert isinstance(annealed, kinds.Annealed)
    assert annealed == kinds.Annealed.of("guide", 1000)
    # A method of one's own is judged by its weights, whatever its name begins with.
    assert type(kinds.kind_of("exact-ish refined importance sampling")) is kinds.ImportanceSampled

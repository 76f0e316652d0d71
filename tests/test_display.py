"""Results as a person sees them: short texts, tables in HTML and LaTeX, figures, and pandas' and ArviZ's objects."""

from __future__ import annotations

import html
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

import pyrovae as pv
from pyrovae.diagnostics.decomposition import Decomposition
from pyrovae.evidence import psis
from pyrovae.evidence.bdmc import Sandwich
from pyrovae.evidence.curve import Curve
from pyrovae.evidence.proposals import Refinement
from pyrovae.plots import intervals, learning_curve, log_ticks
from pyrovae.tables import Table

RANDOM = np.random.default_rng(0)
RECORDS = [
    {"epoch": e, "step": 10 * e, "bound": -150.0 + e, "validation": -151.0 + e, "lr": 1e-3, "seconds": 0.5 * e}
    for e in range(1, 41)
]


def evidence(size: int = 200, level: float = -90.0, **changes: Any) -> pv.Evidence:
    random = np.random.default_rng(1)
    log_px = random.normal(level, 5, size)
    fields = {"log_px": log_px, "se": np.full(size, 0.05), "ess": np.full(size, 900.0), "khat": random.uniform(0, 0.6, size)}
    fields |= {"elbo": log_px - random.uniform(1, 3, size)}
    return pv.Evidence(**(fields | changes), num_samples=5000, num_dims=64)


def results() -> dict[str, Any]:
    scored, zeros = evidence(), np.zeros(200)
    return {
        "evidence": scored,
        "comparison": pv.compare({"one": scored, "other": evidence(level=-91.0)}),
        "comparison of runs": pv.compare({"one": [scored, evidence(level=-90.2)], "other": [evidence(level=-91.0)] * 2}),
        "history": pv.History("IWAE", 50, RECORDS),
        "curve": Curve(np.array([1, 10, 100]), np.stack([scored.log_px] * 3), np.full((3, 200), 0.1)),
        "draws": draws(),
        "refinement": Refinement(
            RANDOM.normal(size=(200, 3, 10)), np.ones((200, 3, 10, 10)), np.full((200, 3), 1 / 3), zeros - 80, zeros + 0.1,
            zeros - 82.5, zeros + 0.1, "full",
        ),
        "sandwich": Sandwich(zeros - 91, zeros - 90, zeros + 0.1, zeros + 0.1, 16, 1000, 64, "prior", (zeros,)),
        "decomposition": Decomposition(
            evidence=scored, rate=zeros + 20, distortion=-scored.elbo - 20, rate_se=zeros, distortion_se=zeros + 0.1,
            elbo_se=zeros + 0.1, information=zeros + 4, mean_variances={"z": np.array([1.0, 0.0])}, refined=None, num_draws=9,
            closed_form=(),
        ),
        "estimators": pv.EstimatorComparison(
            names=["elbo", "iwae"], num_particles=np.array([1, 8]), bound=np.array([-92.0, -91.0]), bound_se=np.full(2, 0.1),
            norm=np.ones((2, 2)), bias=np.array([[0.0, 0.2], [0.01, 0.3]]), bias_p=np.array([[0.5, 0.001], [0.4, 0.001]]),
            variance=np.ones((2, 2)), snr=np.array([[2.0, 3.0], [2.5, 0.01]]), seconds=np.array([0.002, 0.01]),
            snr_per_second=np.array([[44.0, 67.0], [25.0, 0.1]]), reference="DReG, K = 512", num_draws=100,
        ),
    }  # fmt: skip


def draws() -> pv.Draws:
    def normal(*shape: int) -> np.ndarray:
        return RANDOM.normal(size=(20, 30, *shape))

    return pv.Draws(
        posterior={"z": normal(2), "level": normal()}, log_likelihood={"x": normal()}, observed_data={"x": normal(3)[0]},
        posterior_predictive={"x": normal(3)}, prior={"z": normal(2), "level": normal()}, prior_predictive={"x": normal(3)},
        ess=np.linspace(5, 900, 30), num_samples=1000,
    )  # fmt: skip


NAMES = list(results())


@pytest.mark.parametrize("name", NAMES)
def test_results_are_short_as_text_and_tables_in_a_notebook(name: str):
    result = results()[name]
    assert len(repr(result)) < 250
    assert "\n" not in repr(result)
    shown = result._repr_html_()
    assert len(shown) < 5000
    assert shown.startswith("<table>")
    assert len(re.findall('<th scope="row"', shown)) == len(result.table().rows)
    assert len(re.findall("<th", shown)) == len(re.findall('<th scope="(?:row|col)"', shown)) + shown.count("<thead>")
    latex = result.to_latex()
    assert latex.startswith(r"\begin{tabular}{")
    columns = len(re.fullmatch(r"\\begin{tabular}{([lr]+)}", latex.splitlines()[0])[1])
    for line in latex.splitlines():
        assert not line.endswith(r"\\") or len(re.findall(r"(?<!\\)&", line)) == columns - 1


@pytest.mark.parametrize("name", NAMES)
def test_every_result_is_drawn_on_axes_that_jupyter_shows_or_on_those_it_is_given(name: str):
    result = results()[name]
    before = plt.get_fignums()
    axes = np.atleast_1d(result.plot())
    assert len(plt.get_fignums()) == len(before) + 1
    assert axes[0].figure.number == plt.get_fignums()[-1]
    given = plt.subplots(1, len(axes), squeeze=False)[1].ravel()
    number = len(plt.get_fignums())
    again = np.atleast_1d(result.plot(given if len(given) > 1 else given[0]))
    assert list(again) == list(given)
    assert len(plt.get_fignums()) == number
    assert all(ax.lines or ax.patches or ax.collections for ax in again)


@pytest.mark.parametrize("name", NAMES)
def test_every_result_is_a_data_frame(name: str):
    frame = results()[name].to_pandas()
    assert len(frame) > 1
    assert frame.index.names[0] is not None


def test_a_data_frame_has_the_numbers():
    scored = evidence(khat=np.where(np.arange(200) == 3, 2.0, 0.1))
    frame = scored.to_pandas()
    np.testing.assert_array_equal(frame["log_px"], scored.log_px)
    assert frame.index[~frame["reliable"]].tolist() == [3]
    given = draws()
    frame = given.to_pandas()
    assert frame.loc[(4, 7), "z[1]"] == given.posterior["z"][4, 7, 1]
    assert frame.loc[(4, 7), "level"] == given.posterior["level"][4, 7]
    compared = results()["estimators"].to_pandas()
    assert compared.loc[("guide", "iwae"), "bias"] == 0.3


def test_the_evidence_table_holds_means_and_errors():
    scored = evidence()
    rows = {(row[0], row[1]): row[2:] for row in scored.table().rows}
    assert rows["log p(x)", "estimate"] == [f"{scored.mean:.3f}", f"{scored.mean_se:.3f}", f"{scored.data_se:.3f}"]
    assert rows["gap", "estimate - bound"][0] == f"{scored.gap:.3f}"
    gap = scored.log_px - scored.elbo
    assert rows["gap", "estimate - bound"][2] == f"{gap.std(ddof=1) / math.sqrt(200):.3f}"
    with pytest.raises(ValueError, match='what must be "khat" or "gap", got'):
        scored.plot(what="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='what must be "gap" for evidence without Pareto k'):
        evidence(khat=np.full(200, math.nan)).plot()


def test_html_and_latex_are_escaped():
    table = Table(["a & b"], [["<i>50 % of x_1</i>"]], notes=["1 < 2"])
    assert html.escape("<i>50 % of x_1</i>") in table.html()
    assert "<i>" not in table.html()
    assert r"a \& b" in table.latex()
    assert r"$<$i$>$50 \% of x\_1$<$/i$>$" in table.latex()


def test_errors_of_data_sampling_and_training_are_apart():
    """Runs whose means differ by a known amount, over data whose paired differences have a known spread."""
    random, size, runs = np.random.default_rng(0), 4000, 40
    base, effect = random.normal(-90, 20, size), random.normal(0, 3, size)

    def run(level: float, spread: float, sampling: float) -> pv.Evidence:
        noise = random.normal(0, sampling, size)
        log_px = base + level + spread * random.normal() + noise
        return evidence(size, log_px=log_px, elbo=log_px - 1, se=np.full(size, sampling))

    several = {"good": [run(0.0, 0.5, 10.0) for _ in range(runs)], "bad": [run(-3.0, 1.0, 10.0) for _ in range(runs)]}
    for each in several["bad"]:
        each.log_px[:] += effect
    result = pv.compare(several)
    assert result.names == ["good", "bad"]
    # 0.5 and 1 from training; the sampling noise of a mean, 10 / sqrt(4000) = 0.16, is not counted as training.
    assert result.training_se[1] == pytest.approx(math.sqrt((0.25 + 1.0) / runs), rel=0.2)
    assert result.monte_carlo_se[1] == pytest.approx(math.sqrt(2) * 10 / math.sqrt(size * runs), rel=1e-6)
    assert result.difference_se[1] == pytest.approx(math.sqrt((9 + 2 * 100 / runs) / size), rel=0.05)
    assert abs(result.difference[1] + 3) < 4 * math.hypot(result.training_se[1], result.difference_se[1])
    assert result.num_runs.tolist() == [runs, runs]
    assert "se train" in str(result)


def test_a_single_run_has_no_error_from_training():
    one, other = evidence(), evidence(level=-91.0)
    plain = pv.compare({"one": one, "other": other})
    assert plain.training_se is None
    assert "train" not in str(plain)
    same = pv.compare({"one": [one, one], "other": other})
    assert same.difference.tolist() == plain.difference.tolist()
    assert math.isnan(same.training_se[1])
    with pytest.raises(TypeError, match="mapping of names to evidence, got a dict with something else"):
        pv.compare({"one": [], "other": other})
    with pytest.raises(TypeError, match="mapping of names to evidence, got a list: pass"):
        pv.compare([one, other])
    with pytest.raises(ValueError, match=r"different numbers of data .*one\[1\].*: score all on the same rows"):
        pv.compare({"one": [one, evidence(20)], "other": other})


def test_a_history_is_saved_and_loaded(tmp_path: Path):
    history = pv.History("IWAE", 50, [*RECORDS, {**RECORDS[0], "epoch": 41, "validation": None, "bound": math.nan}], "stopped")
    history.save(tmp_path / "history.json")
    loaded = pv.History.load(tmp_path / "history.json")
    assert loaded.records[:40] == history.records[:40]
    assert math.isnan(loaded.records[40]["bound"])
    assert (loaded.stopped, loaded.bound_name) == ("stopped", "IWAE, K = 50")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must be a file that History\.save wrote"):
        pv.History.load(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="no file"):
        pv.History.load(tmp_path / "none.json")


def test_the_table_of_a_history_has_the_first_and_the_last_epoch():
    rows = pv.History("ELBO", 1, RECORDS).table().rows
    assert len(rows) == 12
    assert (rows[0][0], rows[-1][0]) == ("1", "40")
    assert pv.History("ELBO", 1, RECORDS[:1]).table().rows[0][0] == "1"
    assert pv.History("ELBO", 1).table().rows == []


def test_the_learning_curve_names_its_bound_and_the_final_numbers():
    ax = learning_curve(RECORDS, bound="IWAE, K = 50", references={"log p(x)": -109.0, "ELBO": -109.1})
    assert ax.get_ylabel() == "IWAE, K = 50 (nats per datum)"
    words = {text.get_text(): text.xy[1] for text in ax.texts}
    assert words.keys() == {"log p(x)\n−109.00", "ELBO\n−109.10"}
    levels = sorted(words.values())
    assert levels[1] - levels[0] >= 0.19 * np.ptp(ax.get_ylim())  # so that the names do not overprint
    assert {-109.0, -109.1} <= {line.get_ydata()[0] for line in ax.lines}


@pytest.mark.parametrize(("low", "high"), [(1, 5000), (2.1, 3.9), (0.0008, 0.9), (7, 7.5), (1, 1e9)])
def test_logarithmic_ticks_are_few_and_plain(low: float, high: float):
    ax = plt.subplots()[1]
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    log_ticks(ax.xaxis, low, high)
    ax.figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_xticklabels(which="both") if label.get_text()]
    assert 1 <= len(labels) <= 7
    assert all(re.fullmatch(r"[\d,.⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", label) for label in labels)
    renderer = ax.figure.canvas.get_renderer()
    boxes = sorted((label.get_window_extent(renderer) for label in ax.get_xticklabels()), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("sizes", "expected"), [([1, 10, 100, 1000, 5000], "1 10 100 1,000 5,000"), ([1, 10, 100, 110], "1 10 110")]
)
def test_a_curve_has_a_tick_at_each_number_of_samples(sizes: list[int], expected: str):
    ax = Curve(np.array(sizes), np.tile(np.arange(len(sizes), dtype=float)[:, None], 3), np.ones((len(sizes), 3))).plot()
    assert " ".join(label.get_text() for label in ax.get_xticklabels()) == expected


def test_a_forest_plot_leaves_out_what_is_not_finite():
    ax = intervals(["a", "b"], np.array([1.0, -math.inf]), [("data", np.array([0.1, math.nan]))])
    points = np.concatenate([line.get_xydata() for line in ax.lines if line.get_marker() == "o"])
    assert points.tolist() == [[1.0, 0.0]]


@pytest.fixture(params=["installed", "other"])
def line(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either line of ArviZ, where both are installed."""
    if request.param == "other":
        pytest.importorskip("arviz_base")
        monkeypatch.setattr(psis, "_comparison", psis._comparison_of_1)
    return request.param


def test_arviz_says_what_the_numbers_are(line: str):
    khat = np.where(np.arange(200) < 7, 0.9, 0.1)
    scored = evidence(khat=khat)
    elpd = scored.to_elpd()
    for text in (str(elpd), repr(elpd)):
        assert f"{scored.total:.2f} nats" in text
        assert "0.70 or more for 7 of them" in text
        assert "loo" not in text.lower()
        assert "posterior samples" not in text


def test_draws_and_evidence_become_what_arviz_works_with():
    given, scored = draws(), evidence(30)
    data = given.to_arviz()
    np.testing.assert_array_equal(data.posterior["z"].values.reshape(20, 30, 2), given.posterior["z"])
    both = scored.to_arviz(given)
    np.testing.assert_array_equal(both["evidence"]["log_px"].values, scored.log_px)
    arviz = pytest.importorskip("arviz")
    assert len(arviz.summary(data, var_names=["z"])) == 60

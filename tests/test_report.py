from __future__ import annotations

import base64
import html
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from pyrovae.cli.comparison_page import grouped, settings_that_differ, write_comparison
from pyrovae.cli.images import image_grid
from pyrovae.cli.report import write_report
from pyrovae.cli.sections import ModelSection, Run, TrainSection
from pyrovae.cli.shown import Shown, baseline, least_reliable
from pyrovae.diagnostics.decomposition import Decomposition
from pyrovae.evidence.comparison import Comparison, compare
from pyrovae.evidence.curve import Curve
from pyrovae.evidence.results import Evidence
from pyrovae.plots import learning_curve

RECORDS = [
    {"epoch": e, "bound": -150 + 3.0 * e, "validation": -152 + 2.5 * e, "lr": 1e-3, "seconds": 0.5 * e, "step": 20 * e}
    for e in range(1, 9)
]


def evidence(size: int = 50, **changes: Any) -> Evidence:
    random = np.random.default_rng(0)
    log_px = random.normal(-113.4567, 10, size)
    fields = {
        "log_px": log_px,
        "se": np.full(size, 0.05),
        "ess": random.uniform(100, 2000, size),
        "khat": random.uniform(0, 0.69, size),
        "elbo": log_px - random.uniform(3, 6, size),
    }
    return Evidence(**(fields | changes), num_samples=5000, num_dims=64)


def page_of(tmp_path: Path, scored: Evidence | None = None, **options: Any) -> str:
    arrays = {name: options.pop(name) for name in list(options) if name in Shown.__dataclass_fields__}
    given = {"title": "a run", "records": RECORDS, "settings": "seed = 0\n", "facts": {"torch": "2.13.0"}} | options
    given["shown"] = Shown(**arrays)
    write_report(tmp_path / "report.html", evidence=evidence() if scored is None else scored, **given)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    body = re.sub(r"<(svg|style).*?</\1>", " ", page[page.index("<body") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body))).replace("\N{MINUS SIGN}", "-")


def test_the_numbers_on_the_page_are_the_evidences(tmp_path: Path):
    khat = evidence().khat.copy()
    khat[:3] = 0.9
    scored = evidence(khat=khat)
    text = text_of(page_of(tmp_path, scored))
    for number in (
        f"{scored.mean:.2f}",
        f"{scored.elbo.mean():.2f}",
        f"{scored.gap:.2f}",
        f"{scored.bits_per_dim:.3f}",
        "5,000",
        "3 of 50",
        "94.0 %",
    ):
        assert number in text, number


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (0, "Reliable."),
        (1, "Mostly reliable. Of the 50 data, 1 of them (2.0 %) does not have"),
        (2, "Mostly reliable."),
        (20, "Partly reliable. Of the 50 data, 20 of them (40.0 %) do not have"),
        (40, "Not reliable."),
    ],
)
def test_the_verdict_follows_the_share_of_unreliable_data(tmp_path: Path, bad: int, word: str):
    khat = evidence().khat.copy()
    khat[:bad] = 1.2
    assert f" {word}" in text_of(page_of(tmp_path, evidence(khat=khat)))


def test_exact_and_annealed_evidence_is_judged_by_its_own_standard(tmp_path: Path):
    plain, zero = evidence(), np.zeros(50)
    exact = Evidence(plain.log_px, zero, zero + 1, zero - math.inf, plain.log_px, 1, 64, "exact, linear-Gaussian")
    text = text_of(page_of(tmp_path, exact))
    assert "Exact. Of the 50 data, every one has an exact answer" in text
    assert "Nothing was sampled" in text
    for part in ("Pareto k", "The ELBO bounds", "Gap of each datum"):
        assert part not in text
    chains = Evidence(
        plain.log_px, plain.se, zero + 12, zero + math.nan, plain.elbo, 16, 64, "AIS from the prior, 100 temperatures"
    )
    text = text_of(page_of(tmp_path, chains))
    assert "every one has 8 or more of 16 chains effective" in text
    assert "the chains agree" in text
    assert "Pareto k" not in text


def test_nothing_external_and_no_script(tmp_path: Path):
    page = page_of(tmp_path, originals=load_digits().images[:5], reconstructions=load_digits().images[5:10])
    assert "://" not in page
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "<link" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_titles_settings_and_facts_are_escaped(tmp_path: Path):
    hostile = "<img src=x onerror=alert(1)>"
    page = page_of(tmp_path, title=hostile, settings=f'name = "{hostile}"', facts={hostile: hostile})
    assert hostile not in page
    assert html.escape(hostile) in page


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (64,), (3, 8, 8)])
def test_images_of_every_layout_are_drawn(tmp_path: Path, shape: tuple[int, ...]):
    data = np.random.default_rng(0).uniform(size=(6, *shape))
    drawn = pictures(page_of(tmp_path, originals=data, reconstructions=data, samples=data))
    assert len(drawn) >= 3
    # A picture of the same data twice is the same picture, with the extremes of the data in it.
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert drawn[0][..., :3].max() == 1
    assert drawn[0][..., :3].min() == 0


def test_what_is_no_image_is_drawn_as_profiles(tmp_path: Path):
    data = np.random.default_rng(0).normal(size=(5, 7))
    page = page_of(tmp_path, originals=data, reconstructions=data, samples=data)
    assert not pictures(page)
    assert page.count("<svg") > page_of(tmp_path).count("<svg")


def test_parts_that_are_missing_are_left_out(tmp_path: Path):
    text = text_of(page_of(tmp_path, records=[]))
    for part in ("Learning curve", "Reconstructions", "Latent space"):
        assert part not in text
    full = text_of(
        page_of(tmp_path, originals=load_digits().images[:4], reconstructions=load_digits().images[:4], latents=np.eye(6, 3))
    )
    for part in ("Learning curve", "Reconstructions", "Latent space"):
        assert part in full


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan])
def test_extreme_khat_and_weights_do_not_break_the_page(tmp_path: Path, fill: float):
    ones = np.full(50, fill)
    assert "Pareto k" in text_of(page_of(tmp_path, evidence(khat=ones)))
    log_px = evidence().log_px.copy()
    log_px[0] = -math.inf
    assert "Not usable" in text_of(page_of(tmp_path, evidence(log_px=log_px, elbo=log_px, khat=ones, ess=ones)))


def test_latents_say_how_they_were_projected(tmp_path: Path):
    random = np.random.default_rng(0)
    wide = random.normal(size=(200, 5)) * [5, 2, 0.1, 0.1, 0.1]
    text = text_of(page_of(tmp_path, latents=wide, labels=random.integers(0, 10, 200)))
    variance = wide.var(0)
    assert "principal components" in text
    assert f"{100 * variance[0] / variance.sum():.0f}" in text
    assert "principal components" not in text_of(page_of(tmp_path, latents=wide[:, :2]))


def test_learning_curve_draws_the_records():
    ax = learning_curve(RECORDS, Figure().subplots())
    drawn = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    assert any(np.array_equal(y, [r["bound"] for r in RECORDS]) for y in drawn)
    assert any(np.array_equal(y, [r["validation"] for r in RECORDS]) for y in drawn)


def test_image_grid_places_each_image():
    images = np.stack([np.full((4, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = image_grid(images, columns=2)
    assert grid[0, 0, 0] < grid[0, -1, 0]
    assert grid[-1, 0, 0] == 255
    assert grid[-1, -1, 3] == 0, "the empty place is transparent"


def test_convergence_and_decomposition_are_shown_where_they_are_known(tmp_path: Path):
    plain = text_of(page_of(tmp_path))
    for part in ("Does the estimate still rise?", "Where the nats go", "Pareto-smoothed"):
        assert part not in plain
    scored = evidence()
    curve = Curve(np.array([1, 1000, 5000]), scored.log_px - np.array([[4.0], [0.125], [0.0]]), np.full((3, 50), 0.05))
    full = evidence(log_px_psis=scored.log_px + 0.25, curve=curve)
    parts = Decomposition(
        evidence=full, rate=np.full(50, 24.5), distortion=-full.log_px, rate_se=np.zeros(50), distortion_se=np.full(50, 0.07),
        elbo_se=np.full(50, 0.07), information=np.full(50, 3.5), mean_variances={"z": np.array([0.5, 0.001, 0.2])},
        refined=full.log_px - 10, num_draws=100, closed_form=("z",),
    )  # fmt: skip
    page = page_of(tmp_path, full, decomposition=parts)
    text = text_of(page)
    for part in (
        "From 1,000 to 5,000 samples it changed by 0.125 nats",
        f"log p(x), Pareto-smoothed {full.mean + 0.25:.2f} nats per datum",
        "rate KL(q(z|x) || p(z)) 24.500",
        "mutual information I_q(x; z), at most log N = 3.912 3.500",
        "aggregate KL KL(q(z) || p(z)) 21.000",
        "approximation left by the guide's family 10.000",
        "amortisation won by fitting each datum 14.500",
        "Active units: 2 of 3 in z",
    ):
        assert part in text, part
    assert 'id="convergence-' in page
    # Every colour follows dark mode.
    assert not re.findall(r"(?:fill|stroke): #(?!fff)\w+", page[page.index("Does the estimate") : page.index("Where the nats")])


def bad_evidence() -> Evidence:
    khat = evidence().khat.copy()
    khat[[7, 31]] = [1.5, 3.0]
    return evidence(khat=khat)


def test_the_least_reliable_data_are_named(tmp_path: Path):
    scored = bad_evidence()
    worst = least_reliable(scored, 10)
    assert worst[:2].tolist() == [31, 7]
    assert list(scored.khat[worst]) == sorted(scored.khat, reverse=True)[:10]
    images = load_digits().images[:50]
    labels = load_digits().target[:50]
    page = page_of(
        tmp_path, scored, worst=worst, worst_originals=images[worst], worst_reconstructions=images[worst], labels=labels,
        originals=images[:3], reconstructions=images[:3],
    )  # fmt: skip
    gap = scored.log_px - scored.elbo
    row = f"31 {labels[31]} {scored.log_px[31]:.2f} 0.050 {gap[31]:.2f} 3.00 {scored.ess[31]:,.0f} no"
    assert row in text_of(page)
    assert "The 10 least reliable data" in text_of(page)
    assert page.count('alt="Datum ') == 10


def test_unreliable_data_of_other_kinds_come_first_too():
    plain, zero = evidence(), np.zeros(50)
    exact = Evidence(plain.log_px, zero, zero + 1, zero - math.inf, plain.log_px, 1, 64, "exact, linear-Gaussian")
    assert least_reliable(exact, 3).tolist() == np.argsort(plain.log_px)[:3].tolist()
    ess = np.linspace(16, 9, 50)
    chains = Evidence(plain.log_px, plain.se, ess, zero + math.nan, plain.elbo, 16, 64, "AIS from the prior, 100 temperatures")
    assert least_reliable(chains, 2).tolist() == [49, 48]


def test_what_was_trained_and_what_to_do_stand_on_the_page(tmp_path: Path):
    trained = {"Data": "digits: 1,437 to train", "Estimator": "DReG, K = 10"}
    page = page_of(tmp_path, bad_evidence(), trained=trained, bound="DReG, K = 10")
    text = text_of(page)
    for part in (
        "Data digits: 1,437 to train",
        "Estimator DReG, K = 10",
        "What to do. Draw more samples",
        "Mean DReG, K = 10 bound",
    ):
        assert part in text, part
    assert "What to do" not in text_of(page_of(tmp_path))


def test_each_number_stands_once(tmp_path: Path):
    scored = evidence()
    text = text_of(page_of(tmp_path, scored))
    for number in (f"{scored.mean:.2f}", f"{scored.elbo.mean():.2f}", f"{scored.gap:.2f}", f"{scored.bits_per_dim:.3f}"):
        assert text.count(number) == 1, number
    assert f"{scored.mean:.2f} nats per datum; s.e. {scored.data_se:.1f} from the data" in text


def test_the_csv_in_the_page_holds_the_numbers(tmp_path: Path):
    scored = bad_evidence()
    page = page_of(tmp_path, scored)
    links = re.findall(r'download="(\S+)" href="data:text/csv;base64,(\S+)"', page)
    files = {name: base64.b64decode(data).decode() for name, data in links}
    assert files.keys() == {"evidence.csv", "training.csv"}
    rows = [line.split(",") for line in files["evidence.csv"].splitlines()]
    assert rows[0] == ["datum", "log_px", "se", "ess", "khat", "elbo", "reliable"]
    np.testing.assert_allclose([float(row[1]) for row in rows[1:]], scored.log_px, rtol=1e-6)
    assert [row[-1] for row in rows[1:]].count("False") == 2
    assert files["training.csv"].splitlines()[1].startswith("1,-147,-149.5")


def test_classes_are_averaged_apart(tmp_path: Path):
    labels = np.arange(50) % 3
    scored = evidence()
    page = page_of(tmp_path, scored, labels=labels)
    assert "log p(x) by class" in text_of(page)
    for kind in range(3):
        assert f"{scored.log_px[labels == kind].mean():.2f}".replace("-", "−") in page
    assert "by class" not in text_of(page_of(tmp_path, scored, labels=np.arange(50)))


def table_page(tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    means = np.geomspace(0.5, 40, 30)
    observed = random.poisson(means, (200, 30)).astype(float)
    predicted = random.poisson(means, (8, 200, 30)).astype(float)
    observed[:, 4] += 9
    scored = evidence(size=200)
    worst = least_reliable(scored, 10)
    return page_of(
        tmp_path, scored, observed=observed, predicted=predicted, columns=[f"gene{n}" for n in range(30)], worst=worst,
        originals=observed[:10], reconstructions=predicted[0, :10], samples=predicted[0, :12], worst_originals=observed[worst],
        worst_reconstructions=np.tile(means, (10, 1)), traversed=(1, 0), traversal=np.cumsum(predicted[:2, :9], 1),
        latents=random.normal(size=(200, 3)), prior=random.normal(size=(500, 3)), posterior=random.normal(size=(500, 3)),
        latent_kl=np.array([1.0, 0.4, 0.001]), baseline=-120.5,
    )  # fmt: skip


def test_tables_have_pictures_of_their_columns(tmp_path: Path):
    text = text_of(table_page(tmp_path))
    worst = text[text.index("Columns that fit worst") :]
    assert worst.split("off by (s.e.) ")[1].startswith("gene4 ")
    assert re.search(r"z\[1\] gene\d+ rises from", text)
    assert re.search(r"gene\d+ = \d+, fitted", text)
    for part in ("Observed and fitted means", "Observed and fitted zeros", "2 of 3 latents have", "−120.50"):
        assert part.replace("−", "-") in text, part
    assert not pictures(table_page(tmp_path))


def test_the_baseline_is_that_of_independent_dimensions():
    from pyrovae.evidence.measure import Measure

    random = np.random.default_rng(0)
    train, test = random.integers(0, 3, (4000, 2)), random.integers(0, 3, (50, 2))
    uniform = baseline(train, test, evidence(measure=Measure(0, 2)))
    assert uniform == pytest.approx(-2 * math.log(3), abs=0.02)
    normal = random.normal(3.0, 2.0, (4000, 2))
    found = baseline(normal, normal[:50], evidence(measure=Measure(2, 0)))
    assert found is not None
    expected = -0.5 * ((normal[:50] - 3) / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi)
    assert found == pytest.approx(expected.sum(1).mean(), abs=0.05)
    assert baseline(train, test, evidence(measure=Measure(0, 2, ("total",)))) is None
    assert baseline(train, test, evidence()) is None


def runs_compared() -> tuple[Comparison, dict[str, list[Evidence]]]:
    """Two models of two runs and one of one run, with unlike errors."""
    base = evidence(size=300)

    def run(level: float, seed: int) -> Evidence:
        noise = np.random.default_rng(seed).normal(level, 2.0, 300)
        return replace(base, log_px=base.log_px + noise, elbo=base.elbo + noise)

    runs = {"runs/flow (2 seeds)": [run(0.0, 1), run(0.4, 2)], "runs/normal (2 seeds)": [run(-1.0, 3), run(-1.1, 4)]}
    runs["runs/other"] = [run(-5.0, 5)]
    return compare(runs), runs


def comparison_page(tmp_path: Path) -> str:
    comparison, runs = runs_compared()
    settings = {name: Run(model=ModelSection(latent_dim=place + 2)) for place, name in enumerate(runs)}
    records = dict.fromkeys(runs, RECORDS)
    write_comparison(tmp_path / "comparison.html", comparison, runs, runs=settings, records=records)
    return (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_the_page_of_a_comparison_has_its_numbers(tmp_path: Path):
    page, (comparison, runs) = comparison_page(tmp_path), runs_compared()
    text = text_of(page)
    for place, name in enumerate(comparison.names):
        row = f"{name} {len(runs[name])} {comparison.mean[place]:.2f} {comparison.difference[place]:.2f}"
        assert row in text, row
    total = math.hypot(comparison.difference_se[1], comparison.monte_carlo_se[1], comparison.training_se[1])
    lead = f"leads runs/normal (2 seeds) by {-comparison.difference[1]:.2f} nats per datum"
    assert f"A clear lead. runs/flow (2 seeds) {lead}, with a standard error of {total:.2f}" in text
    assert "model.latent_dim 2 3 4" in text
    assert "Validation bounds" in text
    link = re.search(r"data:text/csv;base64,([^\"]+)", page)
    assert link is not None
    lines = base64.b64decode(link[1]).decode().splitlines()
    assert lines[0] == "datum," + ",".join(comparison.names)
    assert float(lines[1].split(",")[1]) == pytest.approx(np.mean([run.log_px[0] for run in runs["runs/flow (2 seeds)"]]))


def test_a_lead_within_its_errors_is_undecided(tmp_path: Path):
    base = evidence(size=100)
    near = replace(base, log_px=base.log_px + np.random.default_rng(0).normal(0, 1, 100))
    both = {"one": base, "other": near}
    write_comparison(tmp_path / "page.html", compare(both), {name: [each] for name, each in both.items()})
    text = text_of((tmp_path / "page.html").read_text())
    assert "Undecided." in text
    assert "less than twice the error from data and sampling" in text


def test_runs_that_differ_in_their_seed_are_one_model():
    one, other = Run(), Run(train=TrainSection(epochs=3))
    runs = {"a": one, "b": replace(one, seed=1, name="b"), "c": other}
    assert grouped(runs) == {"a (2 seeds)": ["a", "b"], "c": ["c"]}
    assert grouped({"a": one, "b": replace(one, seed=1)}) == {"a": ["a"], "b": ["b"]}
    assert settings_that_differ({"a": one, "c": other}) == {"train.epochs": ["60", "3"]}
    named = replace(one, model=ModelSection(prior="standard_normal"))
    table = replace(one, model=ModelSection(prior={"kind": "mixture", "components": 10}))
    expected = {"model.prior.kind": ["standard_normal", "mixture"], "model.prior.components": ["–", "10"]}
    assert settings_that_differ({"a": named, "b": table}) == expected


def test_pages_in_a_browser(tmp_path: Path):
    import chromium

    images, labels = load_digits().images[:50], load_digits().target[:50]
    scored = bad_evidence()
    worst = least_reliable(scored, 10)
    curve = Curve(np.array([1, 10, 100, 1000, 5000]), scored.log_px - np.linspace(4, 0, 5)[:, None], np.full((5, 50), 0.05))
    parts = Decomposition(
        evidence=scored, rate=np.full(50, 24.5), distortion=-scored.log_px, rate_se=np.zeros(50),
        distortion_se=np.full(50, 0.07),
        elbo_se=np.full(50, 0.07), information=np.full(50, 3.5), mean_variances={"z": np.array([0.5, 0.001, 0.2])},
        refined=scored.log_px - 10, num_draws=100, closed_form=("z",),
    )  # fmt: skip
    random = np.random.default_rng(0)
    digits = page_of(
        tmp_path, evidence(khat=scored.khat, curve=curve), labels=labels, worst=worst, worst_originals=images[worst],
        worst_reconstructions=images[worst], originals=images[:10], reconstructions=images[10:20], samples=images[:48],
        latents=random.normal(size=(50, 4)), prior=random.normal(size=(200, 4)), posterior=random.normal(size=(200, 4)),
        traversed=(0, 1), traversal=np.stack([images[:9], images[9:18]]), interpolation=np.stack([images[:10], images[5:15]]),
        latent_kl=np.array([1.0, 0.4, 0.2, 0.001]), decomposition=parts, bound="DReG, K = 10",
        trained={"Data": "digits: 1,437 to train, 360 to score", "Guide": "FullCovarianceNormal"},
    )  # fmt: skip
    found, console = chromium.measure(
        {"digits": digits, "table": table_page(tmp_path), "comparison": comparison_page(tmp_path)}, tmp_path
    )
    assert not console
    assert len(found) == 3 * len(chromium.VIEWS)
    for view, faults in found.items():
        assert faults.pop("texts") > 80, view
        assert not any(faults.values()), (view, faults)


def test_the_rung_of_evidence_is_shown_where_it_is_known(tmp_path: Path):
    scored = bad_evidence()
    worst = least_reliable(scored, 10)
    assert 'scope="col">by</th>' not in page_of(tmp_path, scored, worst=worst)
    object.__setattr__(scored, "rung", np.where(np.arange(50) == 31, 4, 1))
    text = text_of(page_of(tmp_path, scored, worst=worst))
    assert f"3.00 {scored.ess[31]:,.0f} annealed no" in text
    assert f"1.50 {scored.ess[7]:,.0f} fitted no" in text

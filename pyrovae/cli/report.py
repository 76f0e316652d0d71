"""The self-contained HTML page of a run.

The page holds every figure and image inside itself, asks the network for nothing and runs no script. Figures are drawn
with the object API of matplotlib, so no backend is chosen and no global state is left behind.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..files import write_text
from ..plots import _best, _count, _finite_epochs, _number, gap_histogram, learning_curve, pareto_k
from .figures import aggregate, kl_bars, latent_plane, svg
from .images import data_range
from .rows import by_class, columns_section, image_rows, least_reliable_rows, pairs, samples, traversal
from .shown import Shown

if TYPE_CHECKING:
    from ..diagnostics.decomposition import Decomposition
    from ..evidence.results import Evidence

__all__ = ["csv_link", "render", "verdict", "write_report"]

MOST_CSV_ROWS = 20_000
_CSV_COLUMNS = (
    "log_px", "se", "ess", "khat", "elbo", "log_px_psis", "drawn", "pilot", "missed", "covered", "rung", "reliable",
)  # fmt: skip


def write_report(
    path: str | Path,
    *,
    title: str,
    evidence: Evidence,
    quantity: str = "log p(x)",
    records: list[dict[str, Any]],
    settings: str,
    facts: Mapping[str, str],
    trained: Mapping[str, str] | None = None,
    bound: str = "bound",
    shown: Shown | None = None,
    decomposition: Decomposition | None = None,
) -> None:
    """Write the HTML page of a run: one file, nothing external, written atomically.

    Args:
        path: where the page goes.
        title: the name of the run.
        evidence: log p(x) of the N data that were scored.
        quantity: what was estimated, in symbols, such as ``"log p(x|y)"``.
        records: one per epoch, with ``epoch``, and ``bound`` and ``validation`` (may be None) in nats per datum.
        settings: the run's TOML.
        facts: versions, seed and machine, by name.
        trained: what was trained, by name: data, likelihood, prior, guide, estimator and the like.
        bound: the bound of the learning curve, such as ``"IWAE, K = 10"``.
        shown: what the model makes of the data, as :func:`pyrovae.cli.shown.gather` finds it.
        decomposition: what :func:`pyrovae.decompose` found, of these data or some of them.
    """
    shown = Shown() if shown is None else shown
    data = shown.originals if shown.originals is not None else shown.samples
    bounds, is_table = data_range(data), shown.columns is not None
    references = (
        {quantity: evidence.mean} if evidence.is_exact else {quantity: evidence.mean, "ELBO": float(evidence.elbo.mean())}
    )
    columns = columns_section(shown)
    # Lines over columns in no order tell nothing: the columns have figures of their own.
    profiled = columns is None or not (is_table or columns["counts"])
    words = f"Training and validation bound ({bound}) against the epoch"
    page = render(
        "report.html.j2",
        title=title,
        evidence=evidence,
        quantity=quantity,
        trained=dict(trained or {}),
        bound=bound,
        numbers=_numbers(evidence, shown),
        verdict=verdict(evidence),
        curve=svg("curve", lambda ax: learning_curve(records, ax, bound=bound, references=references), 3.9, words)
        if _finite_epochs(records)
        else None,
        last=records[-1] if records else None,
        best=_best(records),
        gaps=None if evidence.is_exact else svg("gaps", lambda ax: gap_histogram(_gaps(evidence), ax), 3.2, _GAP_WORDS),
        pareto=_tails(evidence),
        worst=least_reliable_rows(evidence, shown, bounds),
        pairs=pairs(shown.originals, shown.reconstructions, bounds, is_table) if profiled else None,
        samples=samples(shown.samples, bounds, is_table) if profiled else None,
        traversal=traversal(shown, bounds),
        interpolation=None if is_table else image_rows(shown.interpolation, bounds),
        latent=latent_plane(shown.latents, shown.labels),
        aggregate=_aggregate(shown),
        latent_kl=_latent_kl(shown),
        classes=by_class(evidence, shown.labels, quantity),
        columns=columns,
        convergence=_convergence(evidence),
        decomposition=_decomposition(decomposition, len(evidence)),
        settings=settings,
        facts=facts,
        files=_files(evidence, records),
    )
    write_text(path, page)


def render(template: str, **values: Any) -> str:
    """Fill in one of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyrovae.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, error=_error, count=_count, percent=_percent)
    return environment.get_template(template).render(**values)


def _numbers(evidence: Evidence, shown: Shown) -> dict[str, Any]:
    """What the page says beyond the fields of the evidence: means with their standard errors over data, quantiles."""
    gap = _gaps(evidence)
    spread = np.isfinite(evidence.ess)
    nats = max(evidence.num_dims, 1) * math.log(2)
    size = abs(float(gap.mean())) if np.isfinite(gap).all() else math.inf
    return {
        "num_data": len(evidence.log_px),
        "bound": float(evidence.elbo.mean()),
        "bound_se": _standard_error(evidence.elbo),
        "gap": float(gap.mean()),
        "gap_se": _standard_error(gap),
        # Enough decimals that bound, estimate and gap add up on the page and a small gap is not called zero.
        "decimals": 2 if size >= 0.5 else 3 if size >= 0.05 else 4,
        "bits_se": evidence.data_se / nats,
        "bits_mean_se": evidence.mean_se / nats,
        "smoothed": _smoothed(evidence),
        "baseline": shown.baseline,
        "ess": np.quantile(evidence.ess[spread], [0.05, 0.5, 0.95]).tolist() if spread.any() else [math.nan] * 3,
        "unreliable": int(np.sum(~evidence.reliable)),
    }


def _smoothed(evidence: Evidence) -> float | None:
    """The Pareto-smoothed estimate, where every datum has one."""
    if evidence.log_px_psis is None or not np.isfinite(evidence.log_px_psis).all():
        return None
    return float(evidence.log_px_psis.mean())


_GAP_WORDS = "Histogram of the gap between estimate and bound over the data"


def _tails(evidence: Evidence) -> Markup | None:
    """The figure of Pareto k, where it is what the estimates are judged by."""
    if evidence.is_exact or (evidence.is_annealed and np.isnan(evidence.khat).all()):
        return None
    words = "Pareto k of every datum in ascending order, with the threshold"
    return svg("pareto", lambda ax: pareto_k(evidence.khat, evidence.khat_thresholds, ax), 3.6, words)


def _convergence(evidence: Evidence) -> dict[str, Any] | None:
    """The figure of the estimate against the number of samples, and by how much it still rose."""
    curve = evidence.curve
    if curve is None or np.sum(np.isfinite(curve.mean)) < 2:
        return None
    rise = float(curve.mean[-1] - curve.mean[-2])
    return {
        "figure": svg("convergence", curve.plot, 3.5, "The mean estimate against the number of samples per datum"),
        "rise": rise if math.isfinite(rise) else None,
        "since": int(curve.num_samples[-2]),
    }


def _aggregate(shown: Shown) -> dict[str, Any] | None:
    """Histograms of the most active latents, drawn from the prior and given the data."""
    prior, posterior = shown.prior, shown.posterior
    if prior is None or posterior is None or prior.shape[1] != posterior.shape[1]:
        return None
    chosen = list(shown.traversed) or list(np.argsort(-posterior.std(0))[:6])
    chosen = sorted(place for place in chosen if place < prior.shape[1])
    height = 0.5 + 1.35 * math.ceil(len(chosen) / 2)
    words = "Histograms of latents: the prior as a line, the aggregate posterior as bars"
    figure = svg("aggregate", lambda ax: aggregate(prior, posterior, chosen, ax), height, words)
    return {"figure": figure, "shown": len(chosen), "all": prior.shape[1]}


def _latent_kl(shown: Shown) -> dict[str, Any] | None:
    kl = shown.latent_kl
    if kl is None or len(kl) < 2 or not np.isfinite(kl).all():
        return None
    figure = svg("kl", lambda ax: kl_bars(kl, ax), 3.2, "KL of each latent from its prior, in descending order")
    return {"figure": figure, "active": int((kl > 0.01).sum()), "all": len(kl)}


def _decomposition(decomposition: Decomposition | None, num_data: int) -> dict[str, Any] | None:
    if decomposition is None:
        return None
    active = decomposition.active_units
    rows = [
        {"name": name.strip(), "part": name.startswith(" "), "mean": mean, "se": error, "what": what}
        for name, mean, error, what in decomposition.rows()
    ]
    units = ", ".join(
        f"{active[name]} of {variances.size} in {name}" for name, variances in decomposition.mean_variances.items()
    )
    size = len(decomposition)
    return {"rows": rows, "units": units, "num_data": size, "num_draws": decomposition.num_draws,
            "of": f"all {num_data:,}" if size == num_data else f"the first {size:,} of {num_data:,}"}  # fmt: skip


def _gaps(evidence: Evidence) -> np.ndarray:
    """Estimate minus bound of each datum; not a number where both are -inf."""
    with np.errstate(invalid="ignore"):
        return evidence.log_px - evidence.elbo


def verdict(evidence: Evidence) -> dict[str, str]:
    """Whether the estimates can be believed: a level, a word, a sentence, and what to do."""
    num_data, unreliable = len(evidence.log_px), int(np.sum(~evidence.reliable))
    advice = evidence.summary().partition("What to do: ")[2]
    advice = advice[:1].upper() + advice[1:]
    if not math.isfinite(evidence.mean):
        broken = int(np.sum(~np.isfinite(evidence.log_px)))
        text = f"log p(x) is not finite for {_count(broken)} of them."
        return {"level": "bad", "word": "Not usable", "text": text, "advice": advice}
    if not unreliable:
        word = "Exact" if evidence.is_exact else "Reliable"
        return {"level": "good", "word": word, "text": f"every one has {evidence.criterion}.", "advice": ""}
    fraction = unreliable / num_data
    lack, low = ("does", "its estimate is") if unreliable == 1 else ("do", "their estimates are")
    text = (
        f"{_count(unreliable)} of them ({_percent(fraction)}) {lack} not have {evidence.criterion}, and {low} probably too low."
    )
    level, word = ("bad", "Not reliable") if fraction > 0.5 else ("fair", "Partly reliable")
    return {"level": level, "word": "Mostly reliable" if fraction <= 0.05 else word, "text": text, "advice": advice}


def _files(evidence: Evidence, records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The numbers behind the figures as CSV files that stand in the page: of each datum, and of each epoch."""
    found = []
    if len(evidence) <= MOST_CSV_ROWS:
        known = evidence._per_datum() | {"reliable": evidence.reliable}
        columns = {name: known[name] for name in _CSV_COLUMNS if name in known}
        rows = zip(range(len(evidence)), *(array.tolist() for array in columns.values()), strict=True)
        found.append({"name": "evidence.csv", "what": "every datum", "href": csv_link(["datum", *columns], rows)})
    if records:
        keys = list(records[0])
        lines = ([record.get(key) for key in keys] for record in records)
        found.append({"name": "training.csv", "what": "every epoch", "href": csv_link(keys, lines)})
    return found


def csv_link(header: list[str], rows: Any) -> str:
    """A CSV file as an address that stands in the page itself."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return "data:text/csv;base64," + base64.b64encode(file.getvalue().encode()).decode("ascii")


def _standard_error(values: np.ndarray) -> float:
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _error(value: float) -> str:
    """A standard error with two significant digits."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -5:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{max(0, 1 - exponent)}f}"


def _percent(fraction: float) -> str:
    # One unreliable datum of ten thousand must not read as none, nor 9,999 reliable ones as all.
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent in (0, 100) else f"{min(max(percent, 0.1), 99.9):.1f} %"

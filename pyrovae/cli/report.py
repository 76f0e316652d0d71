"""Plots, and the self-contained HTML page of a run.

The page holds every figure and image inside itself, asks the network for nothing and runs no script. Figures are drawn
with the object API of matplotlib, so no backend is chosen and no global state is left behind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..files import write_text
from ..plots import _best, _count, _finite_epochs, _number, learning_curve
from .figures import _gap_histogram, _latent, _pairs, _pareto, _range, _samples, _svg

if TYPE_CHECKING:
    from ..diagnostics.decomposition import Decomposition
    from ..evidence.results import Evidence

__all__ = ["write_report"]


def write_report(
    path: str | Path,
    *,
    title: str,
    evidence: Evidence,
    quantity: str = "log p(x)",
    records: list[dict[str, Any]],
    settings: str,
    facts: dict[str, str],
    originals: np.ndarray | None = None,
    reconstructions: np.ndarray | None = None,
    samples: np.ndarray | None = None,
    latents: np.ndarray | None = None,
    labels: np.ndarray | None = None,
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
        originals: data, shape (n, *data_shape).
        reconstructions: their means under the model, shape (n, *data_shape).
        samples: draws from the model, shape (m, *data_shape).
        latents: posterior means, shape (M, L).
        labels: classes or numbers that colour the latents, shape (M,).
        decomposition: what :func:`pyrovae.decompose` found, of these data or some of them.
    """
    bounds = _range(originals if originals is not None else samples)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyrovae.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, error=_error, count=_count, percent=_percent)
    page = environment.get_template("report.html.j2").render(
        title=title,
        evidence=evidence,
        quantity=quantity,
        numbers=_numbers(evidence),
        verdict=_verdict(evidence),
        curve=_svg("curve", lambda ax: learning_curve(records, ax), 3.3) if _finite_epochs(records) else None,
        last=records[-1] if records else None,
        best=_best(records),
        gaps=None if evidence.is_exact else _svg("gaps", lambda ax: _gap_histogram(_gaps(evidence), ax), 2.7, 13.0),
        pareto=_tails(evidence),
        pairs=_pairs(originals, reconstructions, bounds),
        samples=_samples(samples, bounds),
        latent=_latent(latents, labels),
        convergence=_convergence(evidence),
        decomposition=_decomposition(decomposition),
        settings=settings,
        facts=facts,
    )
    write_text(path, page)


def _numbers(evidence: Evidence) -> dict[str, Any]:
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
        "ess": np.quantile(evidence.ess[spread], [0.05, 0.5, 0.95]).tolist() if spread.any() else [math.nan] * 3,
        "unreliable": int(np.sum(~evidence.reliable)),
    }


def _smoothed(evidence: Evidence) -> float | None:
    """The Pareto-smoothed estimate, where every datum has one."""
    if evidence.log_px_psis is None or not np.isfinite(evidence.log_px_psis).all():
        return None
    return float(evidence.log_px_psis.mean())


def _tails(evidence: Evidence) -> Markup | None:
    """The figure of Pareto k, where it is what the estimates are judged by."""
    if evidence.is_exact or (evidence.is_annealed and np.isnan(evidence.khat).all()):
        return None
    return _svg("pareto", lambda ax: _pareto(evidence.khat, evidence.khat_thresholds, ax), 2.7)


def _convergence(evidence: Evidence) -> dict[str, Any] | None:
    """The figure of the estimate against the number of samples, and by how much it still rose."""
    curve = evidence.curve
    if curve is None or np.sum(np.isfinite(curve.mean)) < 2:
        return None
    rise = float(curve.mean[-1] - curve.mean[-2])
    return {
        "figure": _svg("convergence", curve.plot, 2.9),
        "rise": rise if math.isfinite(rise) else None,
        "since": int(curve.num_samples[-2]),
    }


def _decomposition(decomposition: Decomposition | None) -> dict[str, Any] | None:
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
    return {"rows": rows, "units": units, "num_data": len(decomposition), "num_draws": decomposition.num_draws}


def _gaps(evidence: Evidence) -> np.ndarray:
    """Estimate minus bound of each datum; not a number where both are -inf."""
    with np.errstate(invalid="ignore"):
        return evidence.log_px - evidence.elbo


def _verdict(evidence: Evidence) -> dict[str, str]:
    num_data, unreliable = len(evidence.log_px), int(np.sum(~evidence.reliable))
    if not math.isfinite(evidence.mean):
        broken = int(np.sum(~np.isfinite(evidence.log_px)))
        return {"level": "bad", "word": "Not usable", "text": f"log p(x) is not finite for {_count(broken)} of them."}
    if not unreliable:
        word = "Exact" if evidence.is_exact else "Reliable"
        return {"level": "good", "word": word, "text": f"every one has {evidence.criterion}."}
    share = unreliable / num_data
    text = (
        f"{_count(unreliable)} of them ({_percent(share)}) do not have {evidence.criterion}, "
        f"and their estimates are probably too low."
    )
    if share <= 0.05:
        return {"level": "fair", "word": "Mostly reliable", "text": text}
    if share <= 0.5:
        return {"level": "fair", "word": "Partly reliable", "text": text}
    return {"level": "bad", "word": "Not reliable", "text": text}


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


def _percent(share: float) -> str:
    # One unreliable datum of ten thousand must not read as none, nor 9,999 reliable ones as all.
    percent = 100 * share
    return f"{percent:.0f} %" if percent in (0, 100) else f"{min(max(percent, 0.1), 99.9):.1f} %"

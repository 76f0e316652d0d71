"""The self-contained HTML page that compares runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_text
from ..plots import _number, gap_histogram, learning_curve
from .config import COMPONENTS
from .figures import svg
from .report import csv_link, render
from .sections import Run

if TYPE_CHECKING:
    from ..evidence.comparison import Comparison
    from ..evidence.results import Evidence

__all__ = ["grouped", "settings_that_differ", "write_comparison"]


def grouped(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Runs that differ in nothing but seed and name are one model: its name, and those of its runs.

    If all runs are one model, each stands for itself.
    """
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(repr(_without_seed(run)), []).append(name)
    if len(groups) < 2:
        return {name: [name] for name in runs}
    return {names[0] if len(names) == 1 else f"{names[0]} ({len(names)} seeds)": names for names in groups.values()}


def settings_that_differ(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """The settings in which runs differ, besides seed and name: the values of each run, in order."""
    flat = [_flat(asdict(_without_seed(run))) for run in runs.values()]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [str(each.get(key, "–")) for each in flat] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def write_comparison(
    path: str | Path,
    comparison: Comparison,
    evidence: Mapping[str, Sequence[Evidence]],
    *,
    quantity: str = "log p(x)",
    runs: Mapping[str, Run] | None = None,
    records: Mapping[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Write the page: one file, nothing external, written atomically.

    Args:
        path: where the page goes.
        comparison: the ranking.
        evidence: the evidence of each model's runs.
        quantity: what was estimated, in symbols.
        runs: the settings of each model, of which those that differ are shown.
        records: of each model the epochs of its first run, with ``epoch`` and ``validation``.
    """
    names, best = comparison.names, comparison.names[0]
    log_px = {name: np.mean([run.log_px for run in evidence[name]], 0) for name in names}
    second = log_px[best] - log_px[names[1]]
    height = 1.5 + 0.42 * len(names)
    words = f"{quantity} of each model less that of the best, with 95 % intervals"
    columns = {"datum": np.arange(len(second))} | log_px
    page = render(
        "comparison.html.j2",
        title=f"{len(names)} models compared",
        quantity=quantity,
        comparison=comparison,
        rows=_rows(comparison),
        verdict=_verdict(comparison, quantity),
        forest=svg("forest", comparison.plot, height, words),
        paired=svg(
            "paired", lambda ax: _paired(second, ax), 3.2, f"Histogram of the differences between {best} and {names[1]}"
        ),
        pair=(best, names[1]),
        curves=_curves(records or {}),
        settings=settings_that_differ(runs) if runs else {},
        models=list(runs or {}),
        num_data=len(second),
        href=csv_link(list(columns), zip(*(column.tolist() for column in columns.values()), strict=True)),
    )
    write_text(path, page)


def _without_seed(run: Run) -> Run:
    from dataclasses import replace

    return replace(run, seed=0, name=None)


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        # A component given by its name alone is a table of one key.
        value = {"kind": value} if key in COMPONENTS and isinstance(value, str) else value
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    training = comparison.training_se if comparison.training_se is not None else np.full(len(comparison.names), math.nan)
    runs = comparison.num_runs if comparison.num_runs is not None else np.ones(len(comparison.names), dtype=int)
    keys = ("name", "mean", "difference", "data", "sampling", "training", "runs", "unreliable", "weight")
    columns = (
        comparison.names, comparison.mean, comparison.difference, comparison.difference_se, comparison.monte_carlo_se, training,
        runs, comparison.unreliable, comparison.stacking,
    )  # fmt: skip
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _verdict(comparison: Comparison, quantity: str) -> dict[str, str]:
    """Whether the best model leads by more than its errors, in words."""
    names = comparison.names
    lead = -float(comparison.difference[1])
    errors = [float(comparison.difference_se[1]), float(comparison.monte_carlo_se[1])]
    if comparison.training_se is not None and math.isfinite(comparison.training_se[1]):
        errors.append(float(comparison.training_se[1]))
    total = math.hypot(*errors)
    said = f"{names[0]} leads {names[1]} by {_number(lead)} nats per datum"
    kinds = "data, sampling and training" if len(errors) == 3 else "data and sampling"
    bad = int(comparison.unreliable[:2].max())
    noun, verb = ("estimate", "is") if bad == 1 else ("estimates", "are")
    doubt = f" Up to {bad:,} {noun} of a model {verb} not reliable and probably too low." if bad else ""
    if not math.isfinite(lead):
        return {"level": "bad", "word": "Not usable", "text": f"{quantity} of {names[1]} is not finite."}
    if lead < 2 * total:
        text = f"{said}, less than twice the error from {kinds}, {_number(total)}.{doubt}"
        return {"level": "fair", "word": "Undecided", "text": text}
    text = f"{said}, with a standard error of {_number(total)} from {kinds}.{doubt}"
    if comparison.training_se is None:
        text += " How much of this is the luck of one training run, runs with other seeds would show."
    return {"level": "fair" if bad else "good", "word": "A clear lead" if not bad else "A lead, with doubts", "text": text}


def _paired(differences: np.ndarray, ax: Any) -> None:
    gap_histogram(differences, ax)
    ax.set_xlabel("difference of a datum (nats)")


def _curves(records: Mapping[str, list[dict[str, Any]]]) -> Any:
    """The validation bounds of the models in one figure; ``None`` if fewer than two have one."""
    held = {
        name: [record for record in each if record.get("validation") is not None and math.isfinite(record["validation"])]
        for name, each in records.items()
    }
    held = {name: each for name, each in held.items() if each}
    if not 2 <= len(held) <= 6:
        return None

    def draw(ax: Any) -> None:
        from .figures import _CATEGORIES

        learning_curve(next(iter(held.values())), ax, bound="validation bound")
        for line in list(ax.lines):
            line.remove()
        styles = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)), (0, (8, 2)), (0, (3, 1)))
        ends = []
        for colour, style, (name, each) in zip(_CATEGORIES, styles, held.items(), strict=False):
            epochs, values = [record["epoch"] for record in each], [record["validation"] for record in each]
            ax.plot(epochs, values, color=colour, linewidth=1.8, linestyle=style, label=name.replace("$", r"\$"))
            ends += values
        low, top = float(np.quantile(ends, 0.1)), max(ends)
        ax.set_ylim(top - 2 * max(top - low, 1e-6), top + 0.1 * max(top - low, 1e-6))
        for text in list(ax.texts):
            text.remove()
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=1, handlelength=2.6)

    return svg("curves", draw, 3.4 + 0.28 * len(held), "Validation bounds of the models against the epoch")

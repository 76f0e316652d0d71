"""Figures: learning curves, Pareto k, histograms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "INK", "LINE", "MUTED", "ORANGE", "RED", "SURFACE", "learning_curve"]


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that were given, or those of a figure of its own."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


INK, MUTED, LINE, SURFACE = "#1d2433", "#667085", "#d5dae3", "#ffffff"
BLUE, ORANGE, RED = "#2c6fbb", "#d9700f", "#c0341d"


def _number(value: float, decimals: int = 2) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "−")


def _count(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:,.0f}"


def learning_curve(records: list[dict[str, Any]], ax: Axes) -> Axes:
    """Draw the training and the validation bound against the epoch.

    Args:
        records: one per epoch, with ``epoch``, and ``bound`` and ``validation`` (may be None) in nats per datum.
        ax: the axes to draw on.
    """
    from matplotlib.ticker import MaxNLocator

    drawn = []
    for key, label, colour in (("bound", "training", BLUE), ("validation", "validation", ORANGE)):
        points = [(record["epoch"], record[key]) for record in records if _is_finite(record.get(key))]
        if points:
            epochs, values = np.asarray(points, dtype=float).T
            ax.plot(epochs, values, color=colour, linewidth=1.8, label=label, marker="o" if len(points) == 1 else "")
            drawn.append(values)
    best = _best(records)
    if best is not None:
        ax.plot(best["epoch"], best["validation"], "o", color=ORANGE, markersize=6, markeredgecolor=SURFACE, zorder=3)
    if drawn:
        # The first epochs start far below the rest; an axis that contains them would flatten everything of interest.
        values = np.concatenate(drawn)
        top, low, usual = values.max(), values.min(), np.quantile(values, 0.1)
        if top - low > 3 * (top - usual) > 0:
            bottom = top - 2 * (top - usual)
            ax.set_ylim(bottom, top + 0.06 * (top - bottom))
            ax.text(0.99, 0.03, f"first epochs, from {_number(low, 0)}, lie below", transform=ax.transAxes, ha="right",
                    va="bottom", color=MUTED, fontsize="small")  # fmt: skip
        ax.legend(loc="center right", labelcolor="linecolor", handlelength=1.4)
    ax.set_xlabel("epoch")
    ax.set_ylabel("bound (nats per datum)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    ax.grid(axis="y", color=LINE, linewidth=0.6)
    return ax


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite_epochs(records: list[dict[str, Any]]) -> bool:
    return any(_is_finite(record.get("bound")) or _is_finite(record.get("validation")) for record in records)


def _best(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    validated = [record for record in records if _is_finite(record.get("validation"))]
    return max(validated, key=lambda record: record["validation"], default=None)

"""Figures that stand alone: learning curves, Pareto k, gaps, intervals.

Each function draws on the axes it is given. Without any, it opens a figure of pyplot, which Jupyter shows. Colours differ in
brightness, and lines in style, so that figures can be read in grey and with any colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "BLUE", "INK", "LINE", "MUTED", "NARROW", "ORANGE", "RED", "SURFACE", "gap_histogram", "inches_of", "intervals",
    "learning_curve", "log_ticks", "new_axes", "new_panels", "pareto_k",
]  # fmt: skip

INK, MUTED, LINE, SURFACE = "#1d2433", "#5b6475", "#d5dae3", "#ffffff"
BLUE, ORANGE, RED = "#2c6fbb", "#b85c00", "#c0341d"
_MAX_POINTS = 2000  # of a scatter: more would make a page heavy and show no more


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that were given, or those of a new figure of pyplot, which Jupyter shows at the end of the cell."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def new_panels(axes: Any, number: int, size: tuple[float, float], **options: Any) -> Any:
    """The axes that were given, an array of ``number`` of them, or those of a new figure of pyplot.

    Raises:
        ValueError: another number of axes was given.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        return np.atleast_1d(plt.subplots(1, number, figsize=size, layout="constrained", **options)[1])
    axes = np.atleast_1d(axes).ravel()
    if len(axes) != number:
        raise ValueError(f"ax must be {number} axes, got {len(axes)}: make them by plt.subplots(1, {number}).")
    return axes


def _number(value: float, decimals: int = 2) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "−")


def _count(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:,.0f}"


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:,.10g}".replace("-", "−")


def _decade(value: float, _: int | None = None) -> str:
    """A number as in the text, and a power of ten where that would be long."""
    power = round(math.log10(value))
    long = not 1e-4 <= value < 1e6 and math.isclose(value, 10.0**power, rel_tol=1e-6)
    return "10" + str(power).translate(_RAISED) if long else _tick(value)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# Inches below which a legend has one column, and the label of an axis two lines.
NARROW = 4.0


def _plain_ticks(axis: Axis, most: int = 5, integer: bool = False) -> None:
    """A few ticks, as in the text: 17,500 and not 1.75e4."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=integer))
    axis.set_major_formatter(FuncFormatter(_tick))


def log_ticks(axis: Axis, low: float, high: float, wanted: Sequence[float] | np.ndarray = ()) -> None:
    """Ticks of a logarithmic axis as plain numbers, few enough not to overprint: 1, 10, 100, or 1, 2, 5 within a decade.

    Args:
        axis: the axis.
        low: its lower end.
        high: its upper end.
        wanted: where ticks go in place of these; those too close to the last one are left out.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 5))
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if last - first <= 2:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    if len(wanted):
        apart = math.log(high / low) / 7
        ticks = [*[tick for tick in wanted[:-1] if math.log(wanted[-1] / tick) > apart][::step], wanted[-1]]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if 0.95 * low <= tick <= 1.05 * high] or [low]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_decade))


def _bare(ax: Axes, grid: Literal["x", "y"]) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(axis=grid, color=LINE, linewidth=0.6)


def learning_curve(
    records: list[dict[str, Any]],
    ax: Axes | None = None,
    *,
    bound: str = "bound",
    references: Mapping[str, float] | None = None,
) -> Axes:
    """Draw the training and the validation bound against the epoch.

    Args:
        records: one per epoch, with ``epoch``, and ``bound`` and ``validation`` (may be None) in nats per datum.
        ax: the axes to draw on; by default new ones.
        bound: the name of the bound, such as ``"IWAE, K = 10"``.
        references: values to draw beside the curve as horizontal lines, in nats per datum, by name.
    """
    ax = new_axes(ax, (6, 4))
    drawn = []
    for key, label, colour, style in (("bound", "training", BLUE, "-"), ("validation", "validation", ORANGE, (0, (5, 2)))):
        points = [(record["epoch"], record[key]) for record in records if _is_finite(record.get(key))]
        if points:
            epochs, values = np.asarray(points, dtype=float).T
            marker = "o" if len(points) == 1 else ""
            ax.plot(epochs, values, color=colour, linewidth=1.8, linestyle=style, label=label, marker=marker)
            drawn.append(values)
    best = _best(records)
    if best is not None:
        ax.plot(best["epoch"], best["validation"], "o", color=ORANGE, markersize=6, markeredgecolor=SURFACE, zorder=3)
    levels = {name: value for name, value in (references or {}).items() if math.isfinite(value)}
    if drawn:
        # The first epochs start far below the rest; an axis that contains them would flatten everything of interest.
        values = np.concatenate([*drawn, np.array(list(levels.values()))])
        top, low, usual = values.max(), values.min(), min(np.quantile(np.concatenate(drawn), 0.1), *levels.values(), np.inf)
        if top - low > 3 * (top - usual) > 0:
            bottom = top - 2 * (top - usual)
            ax.set_ylim(bottom, top + 0.1 * (top - bottom))
            ax.text(0.99, 0.03, f"first epochs, from {_number(low, 0)}, lie below", transform=ax.transAxes, ha="right",
                    va="bottom", color=MUTED)  # fmt: skip
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False, handlelength=2.2)
    _name_levels(ax, levels)
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{bound} (nats per datum)")
    _plain_ticks(ax.xaxis, 6, integer=True)
    _plain_ticks(ax.yaxis)
    _bare(ax, "y")
    return ax


def _name_levels(ax: Axes, levels: Mapping[str, float]) -> None:
    """Draw horizontal lines, each with its name and value to the right of the axes; names that would overprint are moved."""
    bottom, top = ax.get_ylim()
    room, above = 0.2 * (top - bottom), math.inf  # of two lines of text
    for name, value in sorted(levels.items(), key=lambda item: -item[1]):
        ax.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=0)
        above = min(value, above - room)
        ax.annotate(f"{name}\n{_number(value)}", (1, above), (5, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", color=INK, annotation_clip=False)  # fmt: skip


def pareto_k(khat: np.ndarray, thresholds: np.ndarray, ax: Axes | None = None) -> Axes:
    """Draw Pareto k of every datum in ascending order; infinite ones stand at the edges as triangles.

    Args:
        khat: the shape of each datum's weights, shape (N,); NaN means that no tail could be fitted, and is drawn as infinite.
        thresholds: the k below which an estimate is reliable, shape (N,).
        ax: the axes to draw on; by default new ones.
    """
    ax = new_axes(ax, (6, 3.5))
    khat = np.where(np.isnan(khat), np.inf, khat)
    order = np.argsort(khat)
    ordered, below, threshold = khat[order], (khat < thresholds)[order], float(thresholds.max())
    percent = (np.arange(len(ordered)) + 0.5) / len(ordered) * 100
    finite = ordered[np.isfinite(ordered)]
    low, high = min([0.0, *finite.tolist()]), max([1.0, threshold, *finite.tolist()])
    margin = 0.08 * (high - low)
    height = np.clip(ordered, low - margin, high + margin)
    thin = np.unique(np.linspace(0, len(ordered) - 1, _MAX_POINTS).astype(int))
    for chosen, colour, finite_marker in ((below, BLUE, "o"), (~below, RED, "D")):
        for among, marker in ((np.isfinite(ordered), finite_marker), (ordered == np.inf, "^"), (ordered == -np.inf, "v")):
            at = thin[(chosen & among)[thin]]
            ax.plot(percent[at], height[at], marker, color=colour, markersize=4, markeredgewidth=0)
    ax.axhline(threshold, color=RED, linewidth=1.1, linestyle=(0, (4, 3)))
    ax.text(1, threshold + 0.02 * (high - low), f"threshold {threshold:.2f}", color=RED, va="bottom")
    for edge, word in ((-np.inf, "k = −∞: constant weights, exact"), (np.inf, "k = ∞: no tail fitted")):
        if (number := int(np.sum(ordered == edge))) > 0:
            y, side = (low - margin, "bottom") if edge < 0 else (high + margin, "top")
            ax.text(50, y + math.copysign(0.6 * margin, -edge), f"{_count(number)} with {word}", color=MUTED, va=side,
                    ha="center")  # fmt: skip
    ax.set_xlim(-1, 101)
    ax.set_ylim(low - 1.5 * margin, high + 1.5 * margin)
    ax.set_xlabel("data, from the smallest k to the largest (%)")
    ax.set_ylabel("Pareto k")
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis)
    _bare(ax, "y")
    return ax


def gap_histogram(gap: np.ndarray, ax: Axes | None = None) -> Axes:
    """Draw how many data have which gap between estimate and bound.

    Args:
        gap: estimate minus bound of each datum, in nats, shape (N,); what is not finite is left out.
        ax: the axes to draw on; by default new ones.
    """
    ax = new_axes(ax, (6, 3))
    gap = gap[np.isfinite(gap)]
    if len(gap):
        low, high = float(gap.min()), float(gap.max())
        if high - low < 1e-6:  # an exact guide: one bar, not forty bins of rounding errors
            low, high = low - 0.5, high + 0.5
        counts, edges = np.histogram(gap, bins=min(40, max(9, round(2 * len(gap) ** 0.5))), range=(low, high))
        ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor=SURFACE, linewidth=0.8)
        mean = float(gap.mean())
        ax.axvline(mean, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        left = mean < (low + high) / 2
        ax.annotate(f"mean {_number(mean)}", (mean, 1), (4 if left else -4, 0), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="left" if left else "right", va="top")  # fmt: skip
    ax.set_xlabel("estimate − bound (nats)")
    ax.set_ylabel("data")
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis, integer=True)
    _bare(ax, "y")
    return ax


def intervals(
    names: Sequence[str],
    values: np.ndarray,
    errors: Sequence[tuple[str, np.ndarray]],
    ax: Axes | None = None,
    *,
    hollow: np.ndarray | None = None,
    notes: Sequence[str] | None = None,
) -> Axes:
    """A forest plot: a row for each name, with a point and 95 % intervals, thinner for each further kind of error.

    Args:
        names: the rows, from the top.
        values: the points, shape (R,).
        errors: standard errors by what they come from, each of shape (R,); the first is drawn thickest.
        ax: the axes to draw on; by default new ones.
        hollow: the rows whose point is not filled, shape (R,).
        notes: a few words to the right of each row.
    """
    ax = new_axes(ax, (7, 1.2 + 0.42 * len(names)))
    rows, finite = np.arange(len(names)), np.isfinite(values)
    hollow = np.zeros(len(names), dtype=bool) if hollow is None else hollow
    for order, (label, error) in enumerate(errors):
        last = order == len(errors) - 1
        width, alpha = (1.2, 1.0) if last else (6, 0.35) if order == 0 else (2.6, 0.7)
        known = finite & np.isfinite(error)
        ax.errorbar(values[known], rows[known], xerr=1.96 * error[known], fmt="none", ecolor=BLUE, elinewidth=width,
                    alpha=alpha, capsize=4 if last else 0, label=label)  # fmt: skip
    for chosen, face in ((~hollow, BLUE), (hollow, SURFACE)):
        ax.plot(values[chosen & finite], rows[chosen & finite], "o", color=BLUE, markerfacecolor=face, markersize=7)
    for row, note in enumerate(notes or []):
        if not note:
            continue
        ax.annotate(note, (1.0, row), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                    color=MUTED, annotation_clip=False)  # fmt: skip
    ax.set_yticks(rows, [name.replace("$", r"\$") for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    if len(errors) > 1:
        columns = min(len(errors), 2) if inches_of(ax) > NARROW else 1
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=columns, handlelength=1.6)
    _plain_ticks(ax.xaxis, most=min(5, max(2, int(inches_of(ax)))))
    _bare(ax, "x")
    return ax


def inches_of(ax: Axes) -> float:
    """The width of axes, which may be one of several in a figure."""
    return float(ax.get_window_extent().width / ax.figure.dpi)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _finite_epochs(records: list[dict[str, Any]]) -> bool:
    return any(_is_finite(record.get("bound")) or _is_finite(record.get("validation")) for record in records)


def _best(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    validated = [record for record in records if _is_finite(record.get("validation"))]
    return max(validated, key=lambda record: record["validation"], default=None)

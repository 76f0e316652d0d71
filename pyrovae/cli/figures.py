"""The report's figures, as SVG that stands in the page and follows its colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..plots import BLUE, INK, LINE, MUTED, ORANGE, RED, SURFACE, _bare, _plain_ticks, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["aggregate", "columns_of", "kl_bars", "latent_plane", "profiles", "svg"]

# Ten colours told apart with any colour vision, dark enough for white; the page lightens them in dark mode. Each class also has
# a marker of its own, so that the figure can be read in grey.
_CATEGORIES = (
    "#0072b2", "#c24a00", "#00805e", "#7b4fb5", "#a87400", "#b0457f", "#3a86b8", "#8c2d04", "#5f6368", "#2b2b2c",
)  # fmt: skip
_MARKERS = "os^DvPX*<>"
# Matplotlib draws in these; in the page each becomes a CSS variable, so that figures follow dark mode and print in light.
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SURFACE: "surface", BLUE: "blue", ORANGE: "orange", RED: "red"}
_VARIABLES |= {colour: f"c{place}" for place, colour in enumerate(_CATEGORIES)}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the font of the page, can be selected, and is small
    "svg.hashsalt": "pyrovae",  # the same run gives the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 13,  # of a figure of 446 units: 9 px or more on a phone of 390 px
    "axes.labelsize": 13,
    "legend.fontsize": 13,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.prop_cycle": cycler(color=(BLUE, ORANGE, RED)),
    "grid.color": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
_MAX_POINTS = 2000  # in a scatter plot: more would make the page larger and show no more
_MAX_PROFILES = 12


def svg(name: str, draw: Callable[[Axes], Any], height: float, title: str) -> Markup:
    """Draw on fresh axes and return the figure as SVG to stand inside HTML, which scales with the page.

    Args:
        name: what the names inside the figure start with, different for each figure of a page.
        draw: draws on the axes that it is given.
        height: in inches; the width is 6.2.
        title: what the figure shows, for readers who do not see it.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.2, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        # Without metadata, as that would name outside addresses.
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # HTML knows the namespaces by itself; without a size of its own the figure takes the width it is given.
    start, rest = text[: text.index(">")], text[text.index(">") :]
    start = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", start)
    text = f'{start} role="img" aria-label="{escape(title)}"{rest}'
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # two figures in one page must not share names
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)


def latent_plane(latents: np.ndarray | None, labels: np.ndarray | None) -> dict[str, Any] | None:
    """The figure of the posterior means, and the words for its caption."""
    if latents is None or len(latents) < 3:
        return None
    points = np.asarray(latents, dtype=float).reshape(len(latents), -1)
    kept = np.isfinite(points).all(axis=1)
    points, classes = points[kept], None if labels is None else np.asarray(labels)[kept]
    if len(points) < 3 or np.ptp(points, axis=0).max() == 0:
        return None
    latent_dim, explained = points.shape[1], None
    axes = ("z[0]", "z[1]") if latent_dim <= 2 else ("first principal component", "second principal component")
    if latent_dim > 2:
        from sklearn.decomposition import PCA  # here, because it takes longer to import than most reports need

        analysis = PCA(2, svd_solver="full").fit(points)
        points, explained = analysis.transform(points), analysis.explained_variance_ratio_.tolist()
    elif latent_dim == 1:
        # One coordinate has no second axis: spread the points evenly so that they do not hide each other.
        points, axes = np.column_stack([points[:, 0], np.arange(len(points)) * 0.618034 % 1]), ("z[0]", "")
    num_data = len(points)
    drawn = np.unique(np.linspace(0, num_data - 1, _MAX_POINTS).astype(int))
    points, classes = points[drawn], None if classes is None else classes[drawn]
    title = "Posterior means of the data in two dimensions" + ("" if classes is None else ", coloured by label")
    figure = svg("latent", lambda ax: _scatter(points, classes, axes, ax), 5.4, title)
    return {"figure": figure, "latent_dim": latent_dim, "explained": explained, "labelled": classes is not None,
            "num_data": num_data, "num_drawn": len(drawn)}  # fmt: skip


def _scatter(points: np.ndarray, labels: np.ndarray | None, axes: tuple[str, str], ax: Axes) -> None:
    kinds = [] if labels is None else np.unique(labels).tolist()
    if labels is None:
        ax.plot(*points.T, "o", color=BLUE, markersize=4, alpha=0.6, markeredgewidth=0)
    elif len(kinds) <= len(_CATEGORIES):
        for kind, colour, marker in zip(kinds, _CATEGORIES, _MARKERS, strict=False):
            name = f"{kind:g}" if isinstance(kind, float) else str(kind)
            ax.plot(*points[labels == kind].T, marker, color=colour, markersize=5, alpha=0.8, markeredgewidth=0,
                    label=name.replace("$", r"\$"))  # fmt: skip
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=5, handletextpad=0.1, columnspacing=1.4, markerscale=1.5
        )
    else:  # too many to name: colour by order, which for numbers is the number's rank
        order = np.searchsorted(np.asarray(kinds), labels) / (len(kinds) - 1)
        ax.scatter(points[:, 0], points[:, 1], c=order, cmap="viridis", s=16, alpha=0.8, linewidths=0)
    ax.set_xlabel(axes[0])
    ax.set_ylabel(axes[1])
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis)
    if axes[1]:
        ax.set_aspect("equal", adjustable="datalim")
    else:
        ax.set_yticks([])
    ax.grid(color=LINE, linewidth=0.5)


def profiles(groups: Sequence[np.ndarray], ax: Axes) -> None:
    """Data that are no images: a small panel for each datum, one line for each group of shape (n, D), all on one scale."""
    groups = [group.reshape(len(group), -1)[:_MAX_PROFILES].astype(float) for group in groups]
    panels = _panels(ax, len(groups[0]), 3, sharex=True, sharey=True)
    for index, panel in enumerate(panels):
        for values, colour, style in zip(groups, (BLUE, ORANGE), ("-", (0, (4, 1.5))), strict=False):
            marker = "o" if values.shape[1] <= 16 else ""
            panel.plot(
                values[index], color=colour, linewidth=1.3, linestyle=style, marker=marker, markersize=3, markeredgewidth=0
            )
        _plain_ticks(panel.xaxis, 2, integer=True)
        _plain_ticks(panel.yaxis, 3)
        _bare(panel, "y")


def _panels(ax: Axes, number: int, columns: int, **options: Any) -> list[Axes]:
    """Small panels in place of the axes."""
    figure = ax.figure
    ax.remove()
    columns = min(columns, number)
    panels = figure.subplots(math.ceil(number / columns), columns, squeeze=False, **options).ravel()
    for panel in panels[number:]:
        panel.set_axis_off()
    return list(panels[:number])


def aggregate(prior: np.ndarray, posterior: np.ndarray, chosen: Sequence[int], ax: Axes) -> None:
    """Histograms of some latents: drawn from the prior as a line, and given the data as bars; shapes (P, L) and (Q, L)."""
    panels = _panels(ax, len(chosen), 2)
    for place, panel in zip(chosen, panels, strict=True):
        ours, theirs = (each[:, place][np.isfinite(each[:, place])] for each in (posterior, prior))
        low, high = np.quantile(np.concatenate([ours, theirs]), [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 32).tolist()
        panel.hist(ours, edges, density=True, color=BLUE, alpha=0.75)
        panel.hist(theirs, edges, density=True, histtype="step", color=INK, linewidth=1.5)
        panel.set_title(f"z[{place}]", fontsize=13, color=INK, loc="left", pad=2)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        _plain_ticks(panel.xaxis, 4)


def kl_bars(values: np.ndarray, ax: Axes) -> None:
    """A bar for each latent, in descending order; at most 20 have a name."""
    order = np.argsort(-values)
    ax.bar(np.arange(len(values)), values[order], color=BLUE, edgecolor=SURFACE, linewidth=0.6)
    if len(values) <= 20:
        size = 13 if len(values) <= 10 else 12
        turn = 0 if len(values) <= 8 else 90
        ax.set_xticks(np.arange(len(values)), [f"z[{place}]" for place in order], rotation=turn, fontsize=size)
    else:
        ax.set_xlabel("latents, in descending order")
        _plain_ticks(ax.xaxis, integer=True)
    ax.set_ylabel("KL (nats)")
    _plain_ticks(ax.yaxis)
    _bare(ax, "y")


def columns_of(observed: np.ndarray, fitted: np.ndarray, words: tuple[str, str], logarithmic: bool, ax: Axes) -> None:
    """A point for each column of a table: observed against fitted, shapes (D,), with the diagonal."""
    known = np.isfinite(observed) & np.isfinite(fitted)
    if logarithmic:
        known &= (observed > 0) & (fitted > 0)
    observed, fitted = observed[known], fitted[known]
    if len(observed):
        low, high = min(observed.min(), fitted.min()), max(observed.max(), fitted.max())
        margin = 0.04 * (high - low) or 0.5
        ends = (low / 1.2, high * 1.2) if logarithmic else (low - margin, high + margin)
        ax.plot(ends, ends, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        ax.plot(observed, fitted, "o", color=BLUE, markersize=4, alpha=0.7, markeredgewidth=0)
        ax.set_xlim(ends)
        ax.set_ylim(ends)
        if logarithmic:
            ax.set_xscale("log")
            ax.set_yscale("log")
            log_ticks(ax.xaxis, *ends)
            log_ticks(ax.yaxis, *ends)
        else:
            _plain_ticks(ax.xaxis)
            _plain_ticks(ax.yaxis)
    ax.set_xlabel(words[0])
    ax.set_ylabel(words[1])
    ax.grid(color=LINE, linewidth=0.5)

"""The report's pictures."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from ..plots import BLUE, INK, LINE, MUTED, ORANGE, RED, SURFACE, _count, _number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["image_grid"]

# Matplotlib draws in these; in the page each becomes a CSS variable, so that figures follow dark mode and print in light.
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SURFACE: "surface", BLUE: "blue", ORANGE: "orange", RED: "red"}
# Ten colours told apart with any colour vision: Petroff (2021), "Accessible color sequences for data visualization".
_CATEGORIES = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the font of the page, can be selected, and is small
    "svg.hashsalt": "pyrovae",  # the same run gives the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 11,
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
}
_MAX_POINTS = 2000  # of a scatter: more would make the page heavy and show no more
_MAX_PROFILES = 12


def _pareto(khat: np.ndarray, thresholds: np.ndarray, ax: Axes) -> None:
    """Pareto k of every datum in ascending order; infinite ones stand at the edges as triangles."""
    # NaN means that no tail could be fitted, which is as hopeless as +inf.
    khat = np.where(np.isnan(khat), np.inf, khat)
    order = np.argsort(khat)
    ordered, below, threshold = khat[order], (khat < thresholds)[order], float(thresholds.max())
    share = (np.arange(len(ordered)) + 0.5) / len(ordered) * 100
    finite = ordered[np.isfinite(ordered)]
    low, high = min([0.0, *finite.tolist()]), max([1.0, threshold, *finite.tolist()])
    margin = 0.08 * (high - low)
    height = np.clip(ordered, low - margin, high + margin)
    thin = np.unique(np.linspace(0, len(ordered) - 1, _MAX_POINTS).astype(int))
    for chosen, colour in ((below, BLUE), (~below, RED)):
        for among, marker in ((np.isfinite(ordered), "o"), (ordered == np.inf, "^"), (ordered == -np.inf, "v")):
            at = thin[(chosen & among)[thin]]
            ax.plot(share[at], height[at], marker, color=colour, markersize=3 if marker == "o" else 4, markeredgewidth=0)
    ax.axhline(threshold, color=RED, linewidth=1.1, linestyle=(0, (4, 3)))
    ax.text(1, threshold + 0.02 * (high - low), f"threshold {threshold:.2f}", color=RED, fontsize="small", va="bottom")
    for edge, word in ((-np.inf, "k = −∞: constant weights, exact"), (np.inf, "k = ∞: no tail fitted")):
        if (number := int(np.sum(ordered == edge))) > 0:
            y, side = (low - margin, "bottom") if edge < 0 else (high + margin, "top")
            ax.text(50, y + math.copysign(0.6 * margin, -edge), f"{_count(number)} with {word}", color=MUTED, fontsize="small",
                    va=side, ha="center")  # fmt: skip
    ax.set_xlim(-1, 101)
    ax.set_ylim(low - 1.5 * margin, high + 1.5 * margin)
    ax.set_xlabel("data, from the easiest to the hardest (%)")
    ax.set_ylabel("Pareto k")
    ax.grid(axis="y", color=LINE, linewidth=0.6)


def _gap_histogram(gap: np.ndarray, ax: Axes) -> None:
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
                    textcoords="offset points", ha="left" if left else "right", va="top", fontsize="small")  # fmt: skip
    ax.set_xlabel("estimate − bound (nats)")
    ax.set_ylabel("data")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _latent(latents: np.ndarray | None, labels: np.ndarray | None) -> dict[str, Any] | None:
    """The figure of the posterior means, and the words for its caption."""
    if latents is None or len(latents) < 3:
        return None
    points = np.asarray(latents, dtype=float).reshape(len(latents), -1)
    kept = np.isfinite(points).all(axis=1)
    points, classes = points[kept], None if labels is None else np.asarray(labels)[kept]
    if len(points) < 3 or np.ptp(points, axis=0).max() == 0:
        return None
    latent_dim, explained = points.shape[1], None
    axes = ("$z_1$", "$z_2$") if latent_dim <= 2 else ("first principal component", "second principal component")
    if latent_dim > 2:
        from sklearn.decomposition import PCA  # here, because it takes longer to import than most reports need

        analysis = PCA(2, svd_solver="full").fit(points)
        points, explained = analysis.transform(points), analysis.explained_variance_ratio_.tolist()
    elif latent_dim == 1:
        # One coordinate has no second axis: spread the points evenly so that they do not hide each other.
        points, axes = np.column_stack([points[:, 0], np.arange(len(points)) * 0.618034 % 1]), ("$z_1$", "")
    num_data = len(points)
    drawn = np.unique(np.linspace(0, num_data - 1, _MAX_POINTS).astype(int))
    points, classes = points[drawn], None if classes is None else classes[drawn]
    figure = _svg("latent", lambda ax: _scatter(points, classes, axes, ax), 4.4)
    return {"figure": figure, "latent_dim": latent_dim, "explained": explained, "labelled": classes is not None,
            "num_data": num_data, "num_drawn": len(drawn)}  # fmt: skip


def _scatter(points: np.ndarray, labels: np.ndarray | None, axes: tuple[str, str], ax: Axes) -> None:
    kinds = [] if labels is None else np.unique(labels).tolist()
    if labels is None:
        ax.plot(*points.T, "o", color=BLUE, markersize=3.4, alpha=0.6, markeredgewidth=0)
    elif len(kinds) <= len(_CATEGORIES):
        for kind, colour in zip(kinds, _CATEGORIES, strict=False):
            ax.plot(*points[labels == kind].T, "o", color=colour, markersize=4, alpha=0.75, markeredgewidth=0)
        for kind in kinds:  # after all points, so that no name is covered
            x, y = np.median(points[labels == kind], axis=0)
            name = f"{kind:g}" if isinstance(kind, float) else str(kind)
            ax.text(x, y, name.replace("$", r"\$"), ha="center", va="center", fontsize=12, fontweight="bold",
                    bbox={"boxstyle": "round,pad=0.22", "facecolor": SURFACE, "edgecolor": LINE, "alpha": 0.85})  # fmt: skip
    else:  # too many to name: colour by order, which for numbers is the number's rank
        order = np.searchsorted(np.asarray(kinds), labels) / (len(kinds) - 1)
        ax.scatter(points[:, 0], points[:, 1], c=order, cmap="viridis", s=12, alpha=0.8, linewidths=0)
    ax.set_xlabel(axes[0])
    ax.set_ylabel(axes[1])
    if axes[1]:
        ax.set_aspect("equal", adjustable="datalim")
    else:
        ax.set_yticks([])
    ax.grid(color=LINE, linewidth=0.5)


def _profiles(groups: Sequence[np.ndarray], ax: Axes) -> None:
    """Data that are no images: a small panel per datum, one line per group of shape (n, D), all on one scale."""
    figure, number = ax.figure, len(groups[0])
    ax.remove()
    columns = min(4, number)
    panels = figure.subplots(math.ceil(number / columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in panels[number:]:
        panel.set_axis_off()
    for index, panel in enumerate(panels[:number]):
        for values, colour in zip(groups, (BLUE, ORANGE), strict=False):
            marker = "o" if values.shape[1] <= 16 else ""
            panel.plot(values[index], color=colour, linewidth=1.3, marker=marker, markersize=3, markeredgewidth=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=3))
        panel.grid(axis="y", color=LINE, linewidth=0.5)


def _svg(name: str, draw: Callable[[Axes], Any], height: float, width: float = 6.2) -> Markup:
    """Draw on fresh axes and return the figure as SVG to stand inside HTML, which scales with the page."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        # Without metadata, as that would name outside addresses.
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # HTML knows the namespaces by itself; without a size of its own the figure takes the width it is given.
    svg = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # two figures in one page must not share names
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def image_grid(images: np.ndarray, columns: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Set images side by side, with transparent gaps between them.

    Args:
        images: shape (n, H, W) for grey or (n, H, W, 3) for colour.
        columns: how many stand in a row.
        low: the value drawn black.
        high: the value drawn white.

    Returns:
        RGBA bytes, shape (height, width, 4); small images are enlarged by a whole factor, so that pixels stay sharp.
    """
    scaled = np.clip((np.nan_to_num(images.astype(float), nan=low) - low) / ((high - low) or 1.0), 0, 1)
    bytes_ = np.round(255 * scaled).astype(np.uint8)
    if bytes_.ndim == 3:
        bytes_ = np.repeat(bytes_[..., None], 3, axis=-1)
    factor = max(1, 96 // max(bytes_.shape[1:3]))
    bytes_ = bytes_.repeat(factor, axis=1).repeat(factor, axis=2)
    number, height, width, _ = bytes_.shape
    gap = max(2, width // 14)
    rows = math.ceil(number / columns)
    grid = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(bytes_):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width, :3] = image
        grid[top : top + height, left : left + width, 3] = 255
    return grid


def _as_images(data: np.ndarray) -> np.ndarray | None:
    """(n, *data_shape) as (n, H, W) or (n, H, W, 3), or None where the data are no images."""
    shape = data.shape[1:]
    if len(shape) == 3 and shape[0] == 1:
        data, shape = data[:, 0], shape[1:]
    if len(shape) == 3 and shape[0] == 3:
        return np.moveaxis(data, 1, -1)
    if len(shape) == 2 and min(shape) > 1:
        return data
    side = math.isqrt(math.prod(shape))
    # A flat datum of 4 or 9 numbers is a row of a table rather than a picture.
    if len(shape) == 1 and side >= 4 and side * side == shape[0]:
        return data.reshape(-1, side, side)
    return None


def _pairs(
    originals: np.ndarray | None, reconstructions: np.ndarray | None, bounds: tuple[float, float]
) -> dict[str, Any] | None:
    if originals is None or reconstructions is None or not len(originals):
        return None
    images, others = _as_images(originals), _as_images(reconstructions)
    if images is None or others is None:
        groups = [array.reshape(len(array), -1)[:_MAX_PROFILES].astype(float) for array in (originals, reconstructions)]
        return {"rows": [], "figure": _svg("pairs", lambda ax: _profiles(groups, ax), 3.6)}
    columns = min(len(images), 10)
    rows = [
        {"label": label, "image": _png(image_grid(chosen[start : start + columns], columns, *bounds))}
        for start in range(0, len(images), columns)
        for label, chosen in (("original", images), ("reconstruction", others))
    ]
    return {"rows": rows, "figure": None}


def _samples(samples: np.ndarray | None, bounds: tuple[float, float]) -> dict[str, Any] | None:
    if samples is None or not len(samples):
        return None
    images = _as_images(samples)
    if images is None:
        profiles = samples.reshape(len(samples), -1)[:_MAX_PROFILES].astype(float)
        return {"image": None, "figure": _svg("samples", lambda ax: _profiles([profiles], ax), 3.6)}
    return {"image": _png(image_grid(images, min(len(images), 16), *bounds)), "figure": None}


def _range(data: np.ndarray | None) -> tuple[float, float]:
    finite = np.asarray([]) if data is None else data[np.isfinite(data)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    imsave(file, image, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")

"""The report's pictures and rows of data: the least reliable, pairs, samples, traversals, classes and columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import _number, intervals
from .figures import columns_of, profiles, svg
from .images import as_images, image_grid, png
from .shown import Shown

if TYPE_CHECKING:
    from ..evidence.results import Evidence

__all__ = ["by_class", "columns_section", "image_rows", "least_reliable_rows", "pairs", "samples", "traversal"]

MOST_CLASSES, WORST_COLUMNS = 40, 10


def least_reliable_rows(evidence: Evidence, shown: Shown, bounds: tuple[float, float]) -> dict[str, Any] | None:
    """A row for each of the least reliable data: its number, picture or values, and what was estimated."""
    if shown.worst is None or not len(shown.worst):
        return None
    pictures = _pictures(shown, bounds)
    rungs = getattr(evidence, "rung", None)
    rows = []
    for place, datum in enumerate(shown.worst.tolist()):
        label = None if shown.labels is None else shown.labels[datum]
        row = {
            "datum": datum,
            "label": None if label is None else f"{label:g}" if isinstance(label, float) else str(label),
            "picture": pictures[place] if pictures is not None else None,
            "far": "" if pictures is not None else _farthest(shown, place),
            "log_px": float(evidence.log_px[datum]),
            "se": float(evidence.se[datum]),
            "gap": float(evidence.log_px[datum] - evidence.elbo[datum]) if np.isfinite(evidence.log_px[datum]) else math.nan,
            "khat": float(evidence.khat[datum]),
            "ess": float(evidence.ess[datum]),
            "rung": None if rungs is None else _rung(int(rungs[datum])),
            "reliable": bool(evidence.reliable[datum]),
        }
        rows.append(row)
    return {
        "rows": rows,
        "labelled": shown.labels is not None,
        "pictured": pictures is not None,
        "described": any(row["far"] for row in rows),
        "rungs": rungs is not None,
        "tails": not evidence.is_exact and not np.isnan(evidence.khat).all(),
        "sampled": not evidence.is_exact,
    }


def _rung(number: int) -> str:
    from ..evidence.kinds import RUNGS

    return RUNGS[number] if 0 <= number < len(RUNGS) else str(number)


def _pictures(shown: Shown, bounds: tuple[float, float]) -> list[str] | None:
    """Each of the least reliable data beside its reconstruction, if they are images."""
    if shown.columns is not None or shown.worst_originals is None or shown.worst_reconstructions is None:
        return None
    images, others = as_images(shown.worst_originals), as_images(shown.worst_reconstructions)
    if images is None or others is None:
        return None
    return [png(image_grid(np.stack(pair), 2, *bounds)) for pair in zip(images, others, strict=True)]


def _farthest(shown: Shown, place: int) -> str:
    """The columns of a datum that are farthest from their fitted means, in words."""
    if shown.worst_originals is None or shown.worst_reconstructions is None:
        return ""
    values, fitted = (each[place].ravel().astype(float) for each in (shown.worst_originals, shown.worst_reconstructions))
    scale = 1.0
    if shown.observed is not None and shown.observed.shape[1] == len(values):
        scale = np.nanstd(shown.observed, 0) + 1e-9
    distance = np.nan_to_num(np.abs(values - fitted) / scale, nan=-1.0)
    names = _names(shown, len(values))
    chosen = np.argsort(-distance)[:2]
    words = (f"{names[column]} = {values[column]:.4g}, fitted {fitted[column]:.4g}" for column in chosen)
    return "; ".join(words).replace("-", "−") if shown.columns is None else "; ".join(words)


def _names(shown: Shown, number: int) -> list[str]:
    if shown.columns is not None and len(shown.columns) == number:
        return [str(name) for name in shown.columns]
    return [f"column {place}" for place in range(number)]


def pairs(
    originals: np.ndarray | None, reconstructions: np.ndarray | None, bounds: tuple[float, float], is_table: bool
) -> dict[str, Any] | None:
    """Data above their reconstructions: as images, or as lines if they are none."""
    if originals is None or reconstructions is None or not len(originals):
        return None
    images, others = (None, None) if is_table else (as_images(originals), as_images(reconstructions))
    if images is None or others is None:
        words = "Data and their reconstructions, a panel for each datum"
        height = 0.5 + 1.1 * math.ceil(min(len(originals), 12) / 3)
        figure = svg("pairs", lambda ax: profiles([originals, reconstructions], ax), height, words)
        return {"rows": [], "figure": figure, "count": len(originals)}
    columns = min(len(images), 10)
    rows = [
        {"label": label, "image": png(image_grid(chosen[start : start + columns], columns, *bounds))}
        for start in range(0, len(images), columns)
        for label, chosen in (("original", images), ("reconstruction", others))
    ]
    return {"rows": rows, "figure": None, "count": len(images), "colour_lost": images.ndim != others.ndim}


def samples(drawn: np.ndarray | None, bounds: tuple[float, float], is_table: bool) -> dict[str, Any] | None:
    """Draws from the model, as images or as lines."""
    if drawn is None or not len(drawn):
        return None
    images = None if is_table else as_images(drawn)
    if images is None:
        height = 0.5 + 1.1 * math.ceil(min(len(drawn), 12) / 3)
        figure = svg("samples", lambda ax: profiles([drawn], ax), height, "Draws from the model, a panel for each")
        return {"image": None, "figure": figure, "count": min(len(drawn), 12)}
    return {"image": png(image_grid(images, min(len(images), 12), *bounds)), "figure": None, "count": len(images)}


def image_rows(lines: np.ndarray | None, bounds: tuple[float, float]) -> list[str] | None:
    """A picture for each line of data, shape (lines, steps, *data_shape); ``None`` if the data are no images."""
    if lines is None or not len(lines) or as_images(lines[0]) is None:
        return None
    found = []
    for line in lines:
        images = as_images(line)
        assert images is not None
        found.append(png(image_grid(images, len(images), *bounds)))
    return found


def traversal(shown: Shown, bounds: tuple[float, float]) -> dict[str, Any] | None:
    """What the data do as one latent moves: pictures, or the columns that change most."""
    if shown.traversal is None or not len(shown.traversal):
        return None
    pictures = None if shown.columns is not None else image_rows(shown.traversal, bounds)
    if pictures is not None:
        rows = [{"name": f"z[{place}]", "image": picture} for place, picture in zip(shown.traversed, pictures, strict=True)]
        return {"rows": rows, "changes": []}
    changes = []
    for place, line in zip(shown.traversed, shown.traversal, strict=True):
        ends = line.reshape(len(line), -1).astype(float)[[0, -1]]
        scale = 1.0 if shown.observed is None else np.nanstd(shown.observed, 0) + 1e-9
        change = np.nan_to_num((ends[1] - ends[0]) / scale)
        names = _names(shown, len(change))
        words = [
            f"{names[column]} {'rises' if change[column] > 0 else 'falls'} from {_number(ends[0, column])} to "
            f"{_number(ends[1, column])}"
            for column in np.argsort(-np.abs(change))[:3]
        ]
        changes.append({"name": f"z[{place}]", "words": "; ".join(words)})
    return {"rows": [], "changes": changes}


def by_class(evidence: Evidence, labels: np.ndarray | None, quantity: str) -> dict[str, Any] | None:
    """The mean log p(x) of each class, with intervals over its data."""
    if labels is None or len(labels) != len(evidence) or not np.isfinite(evidence.log_px).all():
        return None
    kinds = np.unique(labels)
    if not 2 <= len(kinds) <= MOST_CLASSES:
        return None
    groups = [evidence.log_px[labels == kind] for kind in kinds]
    means = np.array([group.mean() for group in groups])
    errors = np.array([group.std(ddof=1) / math.sqrt(len(group)) if len(group) > 1 else np.nan for group in groups])
    names = [f"{kind:g}" if isinstance(kind, float) else str(kind) for kind in kinds.tolist()]
    notes = [_number(mean) for mean in means]

    def draw(ax: Any) -> None:
        intervals(names, means, [("from the data", errors)], ax, notes=notes)
        ax.set_xlabel(f"{quantity} (nats per datum; 95 % intervals)")

    figure = svg("classes", draw, 1.1 + 0.3 * len(kinds), f"Mean {quantity} of each class, with 95 % intervals")
    return {"figure": figure, "count": len(kinds)}


def columns_section(shown: Shown) -> dict[str, Any] | None:
    """What a table of data shows: observed against fitted means and zeros, and the columns that fit worst."""
    observed, predicted = shown.observed, shown.predicted
    if observed is None or predicted is None or observed.shape[1] < 2:
        return None
    if shown.columns is None and (shown.originals is None or as_images(shown.originals) is not None):
        return None
    known = np.isfinite(observed)
    if not known.any(0).all():
        return None
    predicted = np.where(known, predicted, np.nan)
    counts, spread = known.sum(0), np.nanstd(observed, 0) + 1e-9
    means, fitted = np.nanmean(observed, 0), np.nanmean(predicted, (0, 1))
    whole = bool((observed[known] == np.round(observed[known])).all() and (observed[known] >= 0).all())
    logarithmic = whole and means.max() > 30 * max(means[means > 0].min(initial=np.inf), 1e-9)
    words = ("observed mean of a column", "fitted mean")
    found: dict[str, Any] = {
        "means": svg(
            "means", lambda ax: columns_of(means, fitted, words, logarithmic, ax), 4.6, "Observed against fitted means"
        ),
        "zeros": None,
        "counts": whole,
        "count": observed.shape[1],
        "num_data": len(observed),
    }
    zeros = np.array([np.mean(column[seen] == 0) for column, seen in zip(observed.T, known.T, strict=True)])
    if whole and zeros.max() > 0:
        fitted_zeros = np.nanmean(np.where(known, predicted == 0, np.nan), (0, 1))
        labels = ("observed zeros of a column", "fitted zeros")
        title = "Observed against fitted fractions of zeros"
        found["zeros"] = svg("zeros", lambda ax: columns_of(zeros, fitted_zeros, labels, False, ax), 4.6, title)
    misfit = (means - fitted) / (spread / np.sqrt(np.maximum(counts, 1)))
    names = _names(shown, len(means))
    worst = np.argsort(-np.nan_to_num(np.abs(misfit)))[:WORST_COLUMNS]
    fitted_spread = np.nanstd(predicted, (0, 1))
    found["worst"] = [
        {"name": names[column], "observed": means[column], "fitted": fitted[column], "sd": spread[column],
         "fitted_sd": fitted_spread[column], "misfit": misfit[column]}
        for column in worst
    ]  # fmt: skip
    return found

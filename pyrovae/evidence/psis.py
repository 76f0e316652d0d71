"""Pareto-smoothed importance sampling, by whichever line of ArviZ is installed."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import warnings
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    pass

Array = np.ndarray
# Fewer samples leave under five in the tail, too few for a Pareto fit.
FEWEST_SAMPLES = 25
# Nats by which log-weights may differ and still be called constant, whatever the rounding of their terms.
CONSTANT = 0.01


def khat_limit(num_samples: int) -> float:
    """The k below which S samples are enough: min(1 - 1/log10 S, 0.7), and none with fewer than 25."""
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples >= FEWEST_SAMPLES else -math.inf


def tail_size(num_samples: int) -> int:
    """How many of the largest of S weights Pareto k needs: five times the tail that is fitted."""
    return min(num_samples, 5 * _fitted_tail(num_samples))


def pareto_khat(largest: Array, num_samples: int, *, precision: float = 2.3e-16) -> Array:
    r"""Pareto shape of each datum's weights; the first half of :func:`pareto_smooth`.

    Example:
        >>> import numpy as np
        >>> from pyrovae.evidence import pareto_khat, tail_size
        >>> log_weights = 0.3 * np.random.default_rng(0).standard_exponential((50, 2000))  # Pareto weights of k = 0.3
        >>> largest = np.sort(log_weights)[:, -tail_size(2000):]
        >>> bool(abs(pareto_khat(largest, 2000).mean() - 0.3) < 0.05)
        True
    """
    return pareto_smooth(largest, np.full(len(largest), np.nan), num_samples, precision=precision)[0]


def pareto_smooth(largest: Array, log_px: Array, num_samples: int, *, precision: float = 2.3e-16) -> tuple[Array, Array]:
    r"""Pareto shape of each datum's weights, and log p(x) with their tail smoothed, both by ArviZ.

    The tail has :math:`M = \lceil \min(S/5, 3\sqrt S) \rceil` of S weights, and only the tail and its lower neighbours enter
    the fit. So ArviZ is given the 5 M largest, with the relative efficiency that makes it fit M of those. The smoothed mean
    is that of the smoothed tail and of all weights below, whose sum is known from the raw mean.

    Args:
        largest: the :func:`tail_size` largest log-weights of each datum, shape (N, 5 M), in nats.
        log_px: the raw estimate, the log of the mean of all S weights, shape (N,), in nats.
        num_samples: S, how many there were.
        precision: relative rounding error of the log-weights; weights that differ by no more are constant, but never those
            that differ by more than one part in a hundred, however large a factor they share.

    Returns:
        k for each datum, shape (N,): ``-inf`` where the weights of the tail are constant, ``inf`` where every weight is zero,
        ``nan`` with fewer than 25 samples, a NaN or infinite weight, or a tail that cannot be fitted. And the smoothed
        estimate, shape (N,): the raw one for a constant tail, ``-inf`` where every weight is zero, ``nan`` where k is.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, 2024.

    Example:
        >>> import numpy as np
        >>> from pyrovae.evidence import pareto_smooth, tail_size
        >>> log_weights = 0.8 * np.random.default_rng(0).standard_exponential((500, 2000))  # Pareto weights of mean 5
        >>> log_px = np.log(np.mean(np.exp(log_weights), 1))
        >>> _, smoothed = pareto_smooth(np.sort(log_weights)[:, -tail_size(2000):], log_px, 2000)
        >>> bool(np.std(smoothed) < np.std(log_px))
        True
    """
    khat, smoothed = np.full(len(largest), np.nan), np.full(len(largest), np.nan)
    if num_samples < FEWEST_SAMPLES:
        return khat, smoothed
    for datum, row in enumerate(np.asarray(largest, dtype=np.float64)):
        if np.isnan(row).any() or row.max() == np.inf:
            continue
        tail = np.sort(row)[-_fitted_tail(num_samples) - 1 :]
        if tail[-1] == -np.inf:
            khat[datum], smoothed[datum] = np.inf, -np.inf
        elif tail[-1] - tail[0] <= min(64 * precision * max(1.0, abs(tail[-1])), CONSTANT):
            khat[datum], smoothed[datum] = -np.inf, log_px[datum]
        else:
            khat[datum], before, after = _fit(row, num_samples)
            if not math.isnan(khat[datum]):
                log_sum = log_px[datum] + math.log(num_samples)
                below = max(0.0, math.exp(log_sum - tail[-1]) - before)
                smoothed[datum] = tail[-1] + math.log(below + after) - math.log(num_samples)
    return khat, smoothed


def _fitted_tail(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _fit(row: Array, num_samples: int) -> tuple[float, float, float]:
    """k of one datum's largest log-weights, and their sum before and after smoothing, as multiples of the largest."""
    psislw, negates = _psislw()
    efficiency = 44 / _fitted_tail(num_samples)
    # Far below the largest, a weight is zero in float64 whatever it is: -inf would break the fit's own arithmetic.
    row = np.maximum(row - row.max(), -1e3)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        smoothed, khat = psislw(-row, r_eff=efficiency) if negates else psislw(row.copy(), reff=efficiency)
    # Both lines normalise. The smallest weight lies below the tail, so it tells by how much.
    smallest = np.argmin(row)
    smoothed = smoothed + (row[smallest] - smoothed[smallest])
    return float(khat), float(np.sum(np.exp(row))), float(np.sum(np.exp(smoothed)))


@cache
def _psislw() -> tuple[Any, bool]:
    """ArviZ's Pareto smoothing and whether it negates its input, as the 1.x line does and 0.23 does not."""
    return _psislw_of_023() if version("arviz").startswith("0.") else _psislw_of_1()


def _psislw_of_1() -> tuple[Any, bool]:
    from arviz_stats.base import array_stats

    return array_stats.psislw, True


def _psislw_of_023() -> tuple[Any, bool]:
    return _arviz_023().psislw, False


def _arviz_023() -> Any:
    """ArviZ 0.23, which announces its successor once a day and keeps the date of that in a cache folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return importlib.import_module("arviz")
        except OSError:
            # The cache folder cannot be written, as in a container without a home: the date may as well be lost.
            before = os.environ.get("XDG_CACHE_HOME")
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = folder
                try:
                    return importlib.import_module("arviz")
                finally:
                    if before is None:
                        del os.environ["XDG_CACHE_HOME"]
                    else:
                        os.environ["XDG_CACHE_HOME"] = before


def _elpd(log_px: Array, khat: Array, num_samples: int, threshold: float) -> Any:
    """Pointwise estimates as the installed line's ELPDData, which it believes to come from leave-one-out."""
    import xarray

    size = len(log_px)
    fields = {
        "se": float(np.std(log_px) * math.sqrt(size)),
        "n_samples": num_samples,
        "n_data_points": size,
        "scale": "log",
        "warning": bool((khat >= threshold).any()),
        "good_k": threshold,
        "pareto_k": xarray.DataArray(khat, dims="datum"),
    }
    pointwise = xarray.DataArray(np.asarray(log_px), dims="datum")
    return _comparison()[1](float(np.sum(log_px)), pointwise, fields)


@cache
def _comparison() -> tuple[Any, Any]:
    """ArviZ's comparison by stacking, and what makes its ELPDData."""
    return _comparison_of_023() if version("arviz").startswith("0.") else _comparison_of_1()


def _comparison_of_1() -> tuple[Any, Any]:
    from arviz_stats import compare, utils

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        # 1.3 has a class for each kind; before there was one for all.
        if hasattr(utils, "ELPDDataLOO"):
            return utils.ELPDDataLOO(elpd=total, p=math.nan, elpd_i=pointwise, **fields)
        return utils.ELPDData(kind="loo", elpd=total, p=math.nan, elpd_i=pointwise, **fields)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return compare(elpds, method="stacking", round_to="none")

    return compare_elpds, make


def _comparison_of_023() -> tuple[Any, Any]:
    arviz = _arviz_023()

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        elpd = {"elpd_loo": total, "se": fields["se"], "p_loo": math.nan} | fields | {"loo_i": pointwise}
        order = ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "pareto_k", "scale", "good_k")
        return arviz.stats.ELPDData([elpd[name] for name in order], index=order)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return arviz.compare(elpds, method="stacking")

    return compare_elpds, make

"""Pareto-smoothed importance sampling, by whichever line of ArviZ is installed."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CONSTANT",
    "FEWEST_SAMPLES",
    "Array",
    "khat_limit",
    "pareto_khat",
    "pareto_smooth",
    "pareto_smooth_together",
    "tail_size",
    "to_inference_data",
]

Array = np.ndarray
# Fewer samples leave under five in the tail, too few for a Pareto fit.
FEWEST_SAMPLES = 25
# Nats by which log-weights may differ and still be called constant, whatever the rounding of their terms.
CONSTANT = 0.01
# Fitting all tails at once: numbers that a fit holds at a time; the fewest samples, since ArviZ's tail has another size below;
# and the lowest cutoff, in nats below the largest weight, since ArviZ moves a lower one to where float64 begins.
MOST_NUMBERS, FEWEST_TOGETHER, LOWEST_CUTOFF = 2**25, 225, -700.0
# The prior of the shape is a normal around 0.5 that counts for PRIOR_K samples; PRIOR_B and FEWEST_POINTS define the grid of
# the other parameter (Zhang and Stephens 2009).
PRIOR_K, PRIOR_B, FEWEST_POINTS = 10, 3, 30


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
    the fit. So ArviZ gets the 5 M largest, with the relative efficiency for which it fits M of them. The smoothed mean
    is that of the smoothed tail and of all weights below, whose sum is known from the raw mean.

    Args:
        largest: the :func:`tail_size` largest log-weights of each datum, shape (N, 5 M), in nats.
        log_px: the raw estimate, the log of the mean of all S weights, shape (N,), in nats.
        num_samples: S, how many there were.
        precision: relative rounding error of the log-weights. Weights that differ by no more are constant, but never those
            that differ by more than 0.01 nats, whatever their common factor.

    Returns:
        k for each datum, shape (N,): ``-inf`` if the weights of the tail are constant, ``inf`` if every weight is zero,
        ``nan`` with fewer than 25 samples, a NaN or infinite weight, or a tail that cannot be fitted. And the smoothed
        estimate, shape (N,): the raw one for a constant tail, ``-inf`` if every weight is zero, ``nan`` if k is.

    References:
        `Vehtari, Simpson, Gelman, Yao and Gabry, Pareto Smoothed Importance Sampling, 2024
        <https://arxiv.org/abs/1507.02646>`_.

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


def pareto_smooth_together(
    largest: Tensor, log_sum: Tensor, num_samples: int, *, precision: float = 2.3e-16
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Pareto smoothing of many data at once, on the device that holds their weights: :func:`pareto_smooth` to rounding.

    ArviZ fits one tail after another, which takes several times as long and keeps a GPU waiting. This is the same fit of all
    tails at once. Tails that are not ordinary are left to :func:`pareto_smooth`.

    Args:
        largest: the largest log-weights of each datum in descending order, five times the tail that is fitted, float64, shape
            (N, 5 M), in nats.
        log_sum: the logarithm of the sum of all S weights, shape (N,).
        num_samples: S.
        precision: relative rounding error of the log-weights; weights that differ by no more are constant.

    Returns:
        k, the smoothed estimate, and whether the tail is an ordinary one, each of shape (N,). One that is not has ties at its
        lower end, constant, infinite or missing weights, or too few samples; its k and estimate mean nothing.

    References:
        `Zhang and Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution, 2009
        <https://doi.org/10.1198/tech.2009.08017>`_.
        `Vehtari, Simpson, Gelman, Yao and Gabry, Pareto Smoothed Importance Sampling, 2024
        <https://arxiv.org/abs/1507.02646>`_.

    Example:
        >>> import torch
        >>> from pyrovae.evidence.psis import pareto_smooth_together
        >>> weights = 0.3 * torch.empty(4, 2000, dtype=torch.float64).exponential_()  # Pareto weights of k = 0.3
        >>> largest = weights.topk(675).values
        >>> khat, _, ordinary = pareto_smooth_together(largest, weights.logsumexp(1), 2000)
        >>> bool(ordinary.all()), bool((khat.mean() - 0.3).abs() < 0.2)
        (True, True)
    """
    size = largest.shape[1] // 5
    if num_samples < FEWEST_TOGETHER:
        unknown = torch.full_like(log_sum, math.nan)
        return unknown, unknown.clone(), torch.zeros_like(log_sum, dtype=torch.bool)
    rows = max(1, MOST_NUMBERS // (size * _grid_points(size)))
    parts = [
        _smooth_together(part, sums, num_samples, size, precision)
        for part, sums in zip(largest.split(rows), log_sum.split(rows), strict=True)
    ]
    khat, smoothed, ordinary = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return khat, smoothed, ordinary


def _smooth_together(largest: Tensor, log_sum: Tensor, num_samples: int, size: int, precision: float) -> tuple[Tensor, ...]:
    top = largest[:, 0]
    relative = largest - top[:, None]
    tail, cutoff = relative[:, :size].flip(1).exp(), relative[:, size]  # ascending, as multiples of the largest
    khat, sigma, wanted = _smooth_tail(tail, cutoff.exp())
    # The weights below the tail are not changed.
    whole = (log_sum - top).exp()
    below = (whole - tail.sum(1)).clamp(min=0.0)
    smoothed = top + torch.log(below + wanted.sum(1)) - math.log(num_samples)
    varied = -cutoff > 64 * precision * top.abs().clamp(min=1.0)
    ordinary = varied & (tail[:, 0] > cutoff.exp()) & (cutoff > LOWEST_CUTOFF) & ~largest.isnan().any(1) & top.isfinite()
    return khat, smoothed, ordinary & khat.isfinite() & smoothed.isfinite() & (sigma > 0)


def _smooth_tail(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, scale and smoothed weights (N, M) of ascending tails (N, M) above their cutoffs (N,)."""
    size = tail.shape[1]
    khat, sigma = _fit_together(tail - cutoff[:, None])
    probability = (torch.arange(size, dtype=tail.dtype, device=tail.device) + 0.5) / size
    far = -torch.log1p(-probability)  # (M,)
    shape = khat[:, None]
    quantile = torch.where(shape == 0, far, torch.expm1(shape * far) / shape)
    return khat, sigma, (cutoff[:, None] + sigma[:, None] * quantile).clamp(max=1.0)


def _grid_points(size: int) -> int:
    return FEWEST_POINTS + int(size**0.5)


def _fit_together(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of the generalised Pareto distribution of each row of ascending excesses, (N, M)."""
    size, number = excess.shape[1], _grid_points(excess.shape[1])
    place = torch.arange(1, number + 1, dtype=excess.dtype, device=excess.device) - 0.5
    b = (1 - torch.sqrt(number / place)) / (PRIOR_B * excess[:, int(size / 4 + 0.5) - 1, None]) + 1 / excess[:, -1:]
    k = torch.log1p(-b[:, :, None] * excess[:, None]).mean(-1)
    weight = torch.softmax(size * (torch.log(-b / k) - k - 1), -1)
    weight = torch.where(weight >= 10 * torch.finfo(weight.dtype).eps, weight, 0.0)
    b = (b * weight).sum(-1) / weight.sum(-1)
    k = torch.log1p(-b[:, None] * excess).mean(-1)
    return (size * k + PRIOR_K * 0.5) / (size + PRIOR_K), -k / b


def _fitted_tail(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _fit(row: Array, num_samples: int) -> tuple[float, float, float]:
    """k of one datum's largest log-weights, and their sum before and after smoothing, as multiples of the largest."""
    psislw, negates = _psislw()
    efficiency = 44 / _fitted_tail(num_samples)
    # Far below the largest, a weight is zero in float64 whatever it is: -inf would break the fit's own arithmetic.
    row = np.maximum(row - row.max(), -1e3)
    cutoff, *tail = np.sort(row)[-_fitted_tail(num_samples) - 1 :]
    if tail[0] == tail[-1]:
        # ArviZ fits a tail of ties until 1.3, which refuses it.
        weights = torch.tensor([tail], dtype=torch.float64).exp()
        khat, _, wanted = _smooth_tail(weights, torch.tensor([cutoff], dtype=torch.float64).exp())
        whole = float(np.sum(np.exp(row)))
        return float(khat), whole, whole + float(wanted.sum() - weights.sum())
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


def to_inference_data(tree: Any) -> Any:
    """A DataTree as what the installed ArviZ works with: its ``InferenceData`` in 0.23, the tree itself from 1.0 on."""
    if not version("arviz").startswith("0."):
        return tree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that our groups beside the posterior are none of ArviZ's own
        return _arviz_023().InferenceData.from_datatree(tree)


@cache
def _held_out(base: type, total: str) -> type:
    """ArviZ's ELPDData, which prints itself as the held-out log p(x) that it holds, and not as leave-one-out."""

    def text(self: Any) -> str:
        bad = int(np.sum(~(np.asarray(self["pareto_k"]) < self["good_k"])))
        return (
            f"Held-out log p(x) of {self['n_data_points']:,} data by importance sampling: {self[total]:.2f} nats in sum, "
            f"standard error {self['se']:.2f} from the data.\n"
            f"Pareto k of a datum's own importance weights is {self['good_k']:.2f} or more for {bad:,} of them."
        )

    return type("HeldOutELPD", (base,), {"__str__": text, "__repr__": text, "__doc__": base.__doc__})


@cache
def _comparison() -> tuple[Any, Any]:
    """ArviZ's comparison by stacking, and what makes its ELPDData."""
    return _comparison_of_023() if version("arviz").startswith("0.") else _comparison_of_1()


def _comparison_of_1() -> tuple[Any, Any]:
    from arviz_stats import compare, utils

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        # 1.3 has a class for each kind; before there was one for all.
        if hasattr(utils, "ELPDDataLOO"):
            return _held_out(utils.ELPDDataLOO, "elpd")(elpd=total, p=math.nan, elpd_i=pointwise, **fields)
        return _held_out(utils.ELPDData, "elpd")(kind="loo", elpd=total, p=math.nan, elpd_i=pointwise, **fields)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return compare(elpds, method="stacking", round_to="none")

    return compare_elpds, make


def _comparison_of_023() -> tuple[Any, Any]:
    arviz = _arviz_023()

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        elpd = {"elpd_loo": total, "se": fields["se"], "p_loo": math.nan} | fields | {"loo_i": pointwise}
        order = ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "pareto_k", "scale", "good_k")
        return _held_out(arviz.stats.ELPDData, "elpd_loo")([elpd[name] for name in order], index=order)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return arviz.compare(elpds, method="stacking")

    return compare_elpds, make

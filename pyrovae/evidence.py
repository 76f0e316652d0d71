"""Evidence: log p(x) with what tells whether to believe it, and comparisons of several; the only ArviZ import."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import checkpoint

if TYPE_CHECKING:
    import xarray

Array = np.ndarray

# Fewer samples leave under five in the tail, too few for a Pareto fit.
FEWEST_SAMPLES = 25


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of log p(x) over data, in nats, on the CPU.

    Attributes:
        log_px: the estimate for each datum, shape (N,).
        se: its Monte Carlo standard error, by the delta method on the logarithm, shape (N,).
        ess: effective sample size of the importance weights, shape (N,), at most ``num_samples``.
        khat: Pareto shape of the weights' tail, shape (N,). ``-inf`` says that the weights are constant, so the guide is
            exact; ``nan`` that there were too few samples to tell, or that weights were NaN.
        elbo: the mean log-weight, which estimates the evidence lower bound, shape (N,).
        num_samples: S, draws per datum.
        num_dims: D, observed numbers per datum, for bits per dimension; where a mask hides different ones, their mean.
        method: how the estimate was made.

    Example:
        >>> import numpy as np, pyrovae as pv
        >>> one = np.ones(3)
        >>> evidence = pv.Evidence(log_px=-9 * one, se=0.1 * one, ess=50 * one, khat=0.3 * one, elbo=-10 * one,
        ...                        num_samples=5000, num_dims=4)
        >>> evidence.mean, evidence.gap, bool(evidence.reliable.all())
        (-9.0, 1.0, True)
    """

    log_px: Array
    se: Array
    ess: Array
    khat: Array
    elbo: Array
    num_samples: int
    num_dims: float
    method: str = "importance sampling"
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays of different lengths."""
        shapes = {name: np.shape(getattr(self, name)) for name in _PER_DATUM}
        if len(set(shapes.values())) != 1 or len(shapes["log_px"]) != 1:
            raise ValueError(f"Evidence takes one entry per datum in every array, not shapes {shapes}.")

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.log_px)

    @property
    def mean(self) -> float:
        """The mean estimate over data, in nats per datum."""
        return float(np.mean(self.log_px))

    @property
    def total(self) -> float:
        """The summed estimate over data, in nats."""
        return float(np.sum(self.log_px))

    @property
    def mean_se(self) -> float:
        """Monte Carlo standard error of :attr:`mean`: what more samples would lower."""
        return float(np.sqrt(np.sum(self.se**2)) / len(self))

    @property
    def data_se(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population: what more data would lower."""
        if len(self) < 2 or not np.isfinite(self.log_px).all():
            return math.nan
        return float(np.std(self.log_px, ddof=1) / math.sqrt(len(self)))

    @property
    def gap(self) -> float:
        """Mean estimate minus mean bound, in nats per datum: an estimate of KL(q || p(z|x))."""
        return self.mean - float(np.mean(self.elbo))

    @property
    def bits_per_dim(self) -> float:
        """Minus the mean estimate in bits per dimension; for densities it depends on the data's units."""
        return -self.mean / (self.num_dims * math.log(2)) if self.num_dims else math.nan

    @property
    def khat_threshold(self) -> float:
        """The k below which S samples are enough: min(1 - 1/log10 S, 0.7) (Vehtari et al. 2024)."""
        return min(1 - 1 / math.log10(self.num_samples), 0.7) if self.num_samples >= FEWEST_SAMPLES else -math.inf

    @property
    def reliable(self) -> Array:
        """Whether each datum's estimate can be believed, shape (N,): k below the threshold, or constant weights."""
        with np.errstate(invalid="ignore"):
            return np.isfinite(self.log_px) & ((self.khat < self.khat_threshold) | np.isneginf(self.khat))

    def summary(self) -> str:
        """The findings in words: what was estimated, from how many samples, and what to do if it cannot be believed."""
        size, bad = len(self), np.flatnonzero(~self.reliable)
        said = (
            f"log p(x): {self.mean:.3f} nats per datum over {size} data ({self.method}, {self.num_samples} samples each); "
            f"standard error {self.mean_se:.3f} from sampling, {self.data_se:.3f} from the data. "
            f"Bound (ELBO): {np.mean(self.elbo):.3f}, so the gap is {self.gap:.3f} nats. "
        )
        if self.num_samples < FEWEST_SAMPLES:
            return said + f"With fewer than {FEWEST_SAMPLES} samples nothing tells whether to believe it: draw more."
        if np.isnan(self.log_px).any():
            return (
                said
                + f"Datum {int(np.flatnonzero(np.isnan(self.log_px))[0])} has NaN weights: the model or guide overflows there."
            )
        if np.isneginf(self.log_px).any():
            datum = int(np.flatnonzero(np.isneginf(self.log_px))[0])
            return said + f"Datum {datum} has zero weight in all samples: the guide misses all that the model allows."
        if not len(bad):
            return said + f"Pareto k is below {self.khat_threshold:.2f} for all data: the estimate can be believed."
        return said + (
            f"Pareto k is {self.khat_threshold:.2f} or more for {len(bad)} of {size} data (first datum {bad[0]}), whose "
            f"estimates are probably too low: draw more samples, or train a guide with heavier tails."
        )

    def to_datatree(self) -> xarray.DataTree:
        """The per-datum arrays as an xarray ``DataTree`` with the group ``evidence`` and the dimension ``datum``."""
        import xarray

        dataset = xarray.Dataset(
            {name: ("datum", np.asarray(getattr(self, name))) for name in (*_PER_DATUM, "reliable")},
            coords={"datum": np.arange(len(self))},
            attrs={"num_samples": self.num_samples, "num_dims": self.num_dims, "method": self.method, "units": "nats"},
        )
        return xarray.DataTree.from_dict({"/evidence": dataset})

    def save(self, path: str | Path) -> None:
        """Write the evidence as one safetensors file, atomically."""
        arrays = {name: torch.as_tensor(np.asarray(getattr(self, name))) for name in _PER_DATUM}
        notes = {name: getattr(self, name) for name in _NOTES}
        checkpoint.write_arrays(path, arrays, {"evidence": notes})

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or holds something else.
        """
        arrays, notes = checkpoint.read_arrays(path)
        kept = notes.get("evidence")
        if set(arrays) != set(_PER_DATUM) or not isinstance(kept, dict) or set(kept) != set(_NOTES):
            raise ValueError(f"{path} holds no evidence: give a file that Evidence.save wrote.")
        fields: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
        return cls(**fields, **kept)


_PER_DATUM = ("log_px", "se", "ess", "khat", "elbo")
_NOTES = ("num_samples", "num_dims", "method", "notes")


@dataclass(frozen=True)
class Comparison:
    """Several models' evidence over the same data, best first.

    Attributes:
        names: the models, by falling mean log p(x).
        mean: mean log p(x) of each, in nats per datum.
        difference: each mean minus the best one's, in nats per datum.
        difference_se: its standard error from the data, of paired differences.
        monte_carlo_se: its standard error from sampling.
        unreliable: how many data of each have a Pareto k past the threshold.
    """

    names: list[str]
    mean: Array
    difference: Array
    difference_se: Array
    monte_carlo_se: Array
    unreliable: Array

    def __str__(self) -> str:
        """A table with one line for each model."""
        width = max(5, *(len(name) for name in self.names))
        lines = [f"{'model':<{width}}  {'log p(x)':>10}  {'diff.':>8}  {'se data':>8}  {'se MC':>8}  {'k high':>6}"]
        for row in zip(
            self.names, self.mean, self.difference, self.difference_se, self.monte_carlo_se, self.unreliable, strict=True
        ):
            lines.append(f"{row[0]:<{width}}  {row[1]:>10.3f}  {row[2]:>8.3f}  {row[3]:>8.3f}  {row[4]:>8.3f}  {row[5]:>6d}")
        return "\n".join(lines)


def compare(evidence: Mapping[str, Evidence]) -> Comparison:
    r"""Compare models by their evidence over the same data.

    .. math:: \Delta = \frac1N \sum_n d_n, \quad \operatorname{se}(\Delta) = \sqrt{\operatorname{var}(d) / N}, \qquad
        d_n = \log \hat p_a(x_n) - \log \hat p_b(x_n)

    Args:
        evidence: the models' evidence by name; at least two, over the same data in the same order.

    Raises:
        ValueError: fewer than two, or different numbers of data.

    Example:
        >>> import numpy as np, pyrovae as pv
        >>> one = np.ones(4)
        >>> def made(level):
        ...     return pv.Evidence(level * one, 0.1 * one, 50 * one, 0.3 * one, level * one, num_samples=5000, num_dims=4)
        >>> pv.compare({"small": made(-9.0), "large": made(-8.0)}).names
        ['large', 'small']
    """
    if len(evidence) < 2:
        raise ValueError("A comparison takes at least two models: pass {'name': evidence, ...}.")
    sizes = {name: len(result) for name, result in evidence.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The models were scored on different numbers of data {sizes}: score all on the same.")
    if min(sizes.values()) < 2:
        raise ValueError("A comparison needs at least two data to tell differences from chance.")
    ranked = sorted(evidence, key=lambda name: -np.nan_to_num(evidence[name].mean, nan=-np.inf))
    best = evidence[ranked[0]]
    paired = [evidence[name].log_px - best.log_px for name in ranked]
    return Comparison(
        names=ranked,
        mean=np.array([evidence[name].mean for name in ranked]),
        difference=np.array([np.mean(d) for d in paired]),
        difference_se=np.array([np.std(d, ddof=1) / math.sqrt(len(d)) for d in paired]),
        monte_carlo_se=np.array([0.0] + [math.hypot(evidence[name].mean_se, best.mean_se) for name in ranked[1:]]),
        unreliable=np.array([int((~evidence[name].reliable).sum()) for name in ranked]),
    )


def tail_size(num_samples: int) -> int:
    """How many of the largest of S weights Pareto k needs: five times the tail that is fitted."""
    return min(num_samples, 5 * _fitted_tail(num_samples))


def pareto_khat(largest: Array, num_samples: int, *, precision: float = 2.3e-16) -> Array:
    r"""Pareto shape of each datum's weights, fitted by ArviZ.

    The tail has :math:`M = \lceil \min(S/5, 3\sqrt S) \rceil` of S weights, and only the tail and its lower neighbours enter
    the fit. So ArviZ is given the 5 M largest, with the relative efficiency that makes it fit M of those.

    Args:
        largest: the :func:`tail_size` largest log-weights of each datum, shape (N, 5 M), in nats.
        num_samples: S, how many there were.
        precision: relative rounding error of the log-weights; weights that differ by no more are constant.

    Returns:
        k for each datum, shape (N,); ``-inf`` for constant weights, ``inf`` where every weight is zero, ``nan`` with fewer
        than 25 samples, a NaN weight, or a tail that cannot be fitted.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, 2024.

    Example:
        >>> import numpy as np
        >>> from pyrovae.evidence import pareto_khat, tail_size
        >>> log_weights = 0.3 * np.random.default_rng(0).standard_exponential((50, 2000))  # Pareto weights of k = 0.3
        >>> largest = np.sort(log_weights)[:, -tail_size(2000):]
        >>> bool(abs(pareto_khat(largest, 2000).mean() - 0.3) < 0.05)
        True
    """
    khat = np.full(len(largest), np.nan)
    if num_samples < FEWEST_SAMPLES:
        return khat
    reach = 64 * precision * np.maximum(1.0, np.abs(largest).max(1))
    efficiency = 44 / _fitted_tail(num_samples)
    for datum, row in enumerate(np.asarray(largest, dtype=np.float64)):
        if np.isnan(row).any():
            continue
        tail = np.sort(row)[-_fitted_tail(num_samples) - 1 :]
        if tail[-1] == -np.inf:
            khat[datum] = np.inf
        elif tail[-1] - tail[0] <= reach[datum]:
            khat[datum] = -np.inf
        else:
            khat[datum] = _fit(row, efficiency)
    return khat


def _fitted_tail(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _fit(row: Array, efficiency: float) -> float:
    psislw, negates = _psislw()
    # Far below the largest, a weight is zero in float64 whatever it is: -inf would break the fit's own arithmetic.
    row = np.maximum(row - row.max(), -1e3)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if negates:
            return float(psislw(-row, r_eff=efficiency)[1])
        return float(psislw(row, reff=efficiency)[1])


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

"""The evidence of several models for the same data, compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import _axes
from ..tables import text_table
from .psis import Array, _comparison, _elpd
from .results import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Several models' evidence over the same data, best first.

    Attributes:
        names: the models, by falling mean log p(x).
        mean: mean log p(x) of each, in nats per datum.
        difference: each mean minus the best one's, in nats per datum.
        difference_se: its standard error from the data, of paired differences.
        monte_carlo_se: its standard error from sampling.
        unreliable: how many data of each are not reliable; see :attr:`pyrovae.Evidence.reliable`.
        stacking: the weight of each in the mixture of models that predicts these data best (Yao et al. 2018), by ArviZ;
            ``nan`` if an estimate is not finite.
    """

    names: list[str]
    mean: Array
    difference: Array
    difference_se: Array
    monte_carlo_se: Array
    unreliable: Array
    stacking: Array

    def __str__(self) -> str:
        """A table with one line for each model."""
        columns = zip(self.mean, self.difference, self.difference_se, self.monte_carlo_se, strict=True)
        rows = [
            [name, *(f"{number:.3f}" for number in numbers), str(bad), f"{weight:.2f}"]
            for name, numbers, bad, weight in zip(self.names, columns, self.unreliable, self.stacking, strict=True)
        ]
        return text_table(["model", "log p(x)", "diff.", "se data", "se MC", "unrel.", "weight"], rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each model's difference to the best, with 95 % intervals of the data (thin) and of sampling (thick)."""
        ax = _axes(ax, (7, 1.1 + 0.4 * len(self.names)))
        rows = np.arange(len(self.names))
        finite = np.isfinite(self.difference)

        def bars(errors: Array, **style: Any) -> None:
            ax.errorbar(self.difference[finite], rows[finite], xerr=1.96 * errors[finite], fmt="none", ecolor="C0", **style)

        bars(self.difference_se, elinewidth=1.2, capsize=4, label="from the choice of data")
        bars(self.monte_carlo_se, elinewidth=5, alpha=0.35, label="from sampling")
        # Hollow markers: some estimates are not reliable.
        for chosen, face in ((self.unreliable == 0, "C0"), (self.unreliable > 0, "white")):
            ax.plot(
                self.difference[chosen & finite], rows[chosen & finite], "o", color="C0", markerfacecolor=face, markersize=7
            )
        for row, (difference, bad) in enumerate(zip(self.difference, self.unreliable, strict=True)):
            if bad and finite[row]:
                text = f"{bad} unreliable"
                ax.annotate(text, (difference, row), (0, 7), textcoords="offset points", ha="center", fontsize="small")
        ax.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        ax.set_yticks(rows, self.names)
        ax.set_ylim(len(self.names) - 0.4, -0.6)
        ax.set_xlabel("log p(x), difference to the best (nats per datum; 95 % intervals)")
        ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
        return ax


def compare(evidence: Mapping[str, Evidence]) -> Comparison:
    r"""Compare models by their evidence over the same data.

    .. math:: \Delta = \frac1N \sum_n d_n, \quad \operatorname{se}(\Delta) = \sqrt{\operatorname{var}(d) / N}, \qquad
        d_n = \log \hat p_a(x_n) - \log \hat p_b(x_n)

    The error from sampling is separate: more samples reduce it, and more data reduce the other one.

    Args:
        evidence: the models' evidence by name; at least two, over the same data in the same order.

    Raises:
        TypeError: ``evidence`` is not a mapping of names to evidence.
        ValueError: there are fewer than two, the data or their order differ, or the measures do: a density and a
            probability, different numbers of observed values, other values (``x`` and ``x.log()``), or a likelihood that
            conditions on a part of the datum.

    References:
        `Yao, Vehtari, Simpson and Gelman, Using stacking to average Bayesian predictive distributions, 2018
        <https://doi.org/10.1214/17-BA1091>`_.

    Example:
        >>> import numpy as np, pyrovae as pv
        >>> one = np.ones(4)
        >>> def made(level):
        ...     return pv.Evidence(level * one, 0.1 * one, 50 * one, 0.3 * one, level * one, num_samples=5000, num_dims=4)
        >>> pv.compare({"small": made(-9.0), "large": made(-8.0)}).names
        ['large', 'small']
    """
    if not isinstance(evidence, Mapping) or not all(isinstance(result, Evidence) for result in evidence.values()):
        raise TypeError('evidence must be a mapping of names to evidence: pass {"one": evidence, "other": evidence}.')
    if len(evidence) < 2:
        raise ValueError("evidence must have at least two models: pass {'name': evidence, ...}.")
    sizes = {name: len(result) for name, result in evidence.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The models must be scored on the same data, got different numbers of data {sizes}.")
    if min(sizes.values()) < 2:
        raise ValueError("The models must be scored on at least two data, so that differences have an error.")
    _check_same_data(evidence)
    _check_same_measure(evidence)
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
        stacking=_stacking([evidence[name].log_px for name in ranked]),
    )


def _check_same_data(evidence: Mapping[str, Evidence]) -> None:
    """Refuse evidence for different data or in a different order, by their fingerprints."""
    known = {name: result.fingerprint for name, result in evidence.items() if result.fingerprint is not None}
    for name, prints in known.items():
        first, expected = next(iter(known.items()))
        differ = np.flatnonzero(prints != expected)
        if not len(differ):
            continue
        if np.array_equal(np.sort(prints), np.sort(expected)):
            what = "the same data in another order"
        else:
            what = f"other data ({len(differ)} of {len(prints)})"
        raise ValueError(
            f"{name!r} was scored on {what} than {first!r} (first at row {differ[0]}): score both on the same array, or by a "
            f"DataLoader with shuffle=False."
        )


def _check_same_measure(evidence: Mapping[str, Evidence]) -> None:
    """Refuse numbers with respect to different measures, if these are known."""
    known = {name: result.measure for name, result in evidence.items() if result.measure is not None}
    for name, measure in known.items():
        first, expected = next(iter(known.items()))
        if not measure.agrees(expected):
            raise ValueError(
                f"log p(x) of {name!r} is {measure}, and that of {first!r} is {expected}: their nats do not compare; compare "
                f"models whose likelihoods are of one kind."
            )
        differ = _other_values(evidence[name], evidence[first])
        if differ.any():
            raise ValueError(
                f"{name!r} observes other values than {first!r} (first at row {np.flatnonzero(differ)[0]}), such as x.log() "
                f"for x, so their nats do not compare: observe the data themselves in both, and put the change of variables "
                f"into the likelihood, as TransformedDistribution does."
            )


def _other_values(one: Evidence, other: Evidence) -> Array:
    """Which data's observed values are others in the two models, beyond rounding.

    Where all have a probability, another name for each value is no other value: the data that are equal must be equal still.
    """
    if one.squares is None or other.squares is None or one.measure is None:
        return np.zeros(len(one), bool)
    differ = ~np.isclose(one.squares, other.squares, rtol=1e-3, atol=1e-6)
    if differ.any() and not one.measure.density:
        first = [np.unique(each, return_index=True, return_inverse=True)[1:] for each in (one.squares, other.squares)]
        places = [index[inverse] for index, inverse in first]
        differ &= places[0] != places[1]
    return differ


def _stacking(log_px: list[Array]) -> Array:
    """Stacking weights of each model, in their order."""
    stacked = np.stack(log_px)
    if not np.isfinite(stacked).all():
        return np.full(len(stacked), np.nan)
    # ArviZ exponentiates log p(x), which leaves nothing of -1,000 nats. A factor common to all models cancels.
    stacked = stacked - stacked.max(0)
    compare_elpds = _comparison()[0]
    names = [str(row) for row in range(len(stacked))]
    elpds = {name: _elpd(row, np.zeros(len(row)), 1, 0.7) for name, row in zip(names, stacked, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23's about pandas, 1.x's about what leave-one-out would need
        table = compare_elpds(elpds)
    return table["weight"].loc[names].to_numpy(dtype=float)

"""The evidence of several models for the same data, compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import NARROW, inches_of, intervals
from ..programs.observed import FACTOR_OF_DATA
from ..tables import Table, Tabular
from .psis import Array, _comparison, _elpd
from .results import Evidence

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare", "sampling_error", "training_error"]


@dataclass(frozen=True)
class Comparison(Tabular):
    """Several models' evidence over the same data, best first.

    Attributes:
        names: the models, by falling mean log p(x).
        mean: mean log p(x) of each, in nats per datum; of a model with several runs the mean over its runs.
        difference: each mean minus the best one's, in nats per datum.
        difference_se: its standard error from the data, of paired differences.
        monte_carlo_se: its standard error from sampling.
        unreliable: how many data of each are not reliable in one of its runs; see :attr:`pyrovae.Evidence.reliable`.
        stacking: the weight of each in the mixture of models that predicts these data best (Yao et al. 2018), by ArviZ;
            ``nan`` if an estimate is not finite.
        training_se: the standard error of the difference from training, over runs with different seeds; ``nan`` if the model
            or the best one has a single run, and ``None`` if all have.
        num_runs: how many runs each model has; ``None`` if all have one.
    """

    names: list[str]
    mean: Array
    difference: Array
    difference_se: Array
    monte_carlo_se: Array
    unreliable: Array
    stacking: Array
    training_se: Array | None = None
    num_runs: Array | None = None

    def __repr__(self) -> str:
        """One line: the ranking."""
        return f"Comparison({', '.join(f'{name}: {mean:.4g}' for name, mean in zip(self.names, self.mean, strict=True))})"

    def __str__(self) -> str:
        """A table with one line for each model."""
        return self.table().text()

    def table(self) -> Table:
        """The ranking as a table; errors are of the difference to the best, in nats per datum."""
        header = ["model", "log p(x)", "diff.", "se data", "se MC", "unrel.", "weight"]
        numbers = [self.mean, self.difference, self.difference_se, self.monte_carlo_se]
        if self.training_se is not None:
            header.insert(5, "se train")
            numbers.append(self.training_se)
        rows = [
            [name, *("-" if math.isnan(number) else f"{number:.3f}" for number in row), str(bad), f"{weight:.2f}"]
            for name, *row, bad, weight in zip(self.names, *numbers, self.unreliable, self.stacking, strict=True)
        ]
        if self.num_runs is not None:
            header.insert(1, "runs")
            for row, number in zip(rows, self.num_runs, strict=True):
                row.insert(1, str(number))
        return Table(header, rows, caption="Held-out log p(x), nats per datum")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each model's difference to the best, with 95 % intervals for each kind of error.

        Args:
            ax: the axes to draw on; by default new ones, which Jupyter shows. A hollow point has unreliable estimates.
        """
        errors = [("from sampling", self.monte_carlo_se), ("from the choice of data", self.difference_se)]
        if self.training_se is not None:
            errors.insert(1, ("from training", self.training_se))
        bad = self.unreliable > 0
        notes = [f"{number:,} unreliable" if number else "" for number in self.unreliable]
        ax = intervals(self.names, self.difference, errors, ax, hollow=bad, notes=notes if bad.any() else None)
        ax.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        space = " " if inches_of(ax) > NARROW else "\n"
        ax.set_xlabel(f"log p(x) less the best{space}(nats per datum)")
        return ax

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each model, best first; in nats per datum."""
        import pandas

        columns = {
            "log_px": self.mean, "difference": self.difference, "difference_se": self.difference_se,
            "monte_carlo_se": self.monte_carlo_se, "training_se": self.training_se, "num_runs": self.num_runs,
            "unreliable": self.unreliable, "weight": self.stacking,
        }  # fmt: skip
        known = {name: column for name, column in columns.items() if column is not None}
        return pandas.DataFrame(known, index=pandas.Index(self.names, name="model"))

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists by name, best first, as JSON takes them; ``log_px`` is the mean, in nats per datum."""
        names = ("difference", "difference_se", "monte_carlo_se", "training_se", "num_runs", "unreliable", "stacking")
        columns = {"log_px": self.mean} | {name: getattr(self, name) for name in names}
        known = {name: column.tolist() for name, column in columns.items() if column is not None}
        return {"models": list(self.names), **known}


def compare(evidence: Mapping[str, Evidence | Sequence[Evidence]]) -> Comparison:
    r"""Compare models by their evidence over the same data.

    .. math:: \Delta = \frac1N \sum_n d_n, \quad \operatorname{se}(\Delta) = \sqrt{\operatorname{var}(d) / N}, \qquad
        d_n = \log \hat p_a(x_n) - \log \hat p_b(x_n)

    The error from sampling is separate: more samples reduce it, and more data reduce the other one. A model may have several
    runs, trained with different seeds; :math:`\log \hat p` is then the mean over its runs, and the error from training is
    separate too:

    .. math:: \operatorname{se}_\text{train}(\Delta) = \sqrt{\sigma_a^2 / R_a + \sigma_b^2 / R_b}, \qquad
        \sigma^2 = \max\Bigl(0, \operatorname{var}_r(\bar\ell_r) - \frac1R \sum_r s_r^2\Bigr)

    with the mean :math:`\bar\ell_r` of run r over the data and its Monte Carlo standard error :math:`s_r`.

    Args:
        evidence: the models' evidence by name; at least two, over the same data in the same order. A list for a model has the
            evidence of its runs.

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
        >>> pv.compare({"small": [made(-9.0), made(-9.4)], "large": [made(-8.0), made(-8.2)]}).training_se.round(3).tolist()
        [0.0, 0.218]
    """
    runs = _runs_by_name(evidence)
    if len(runs) < 2:
        raise ValueError("evidence must have at least two models: pass {'name': evidence, ...}.")
    several = any(len(each) > 1 for each in runs.values())
    flat = {f"{name}[{r}]" if several else name: run for name, each in runs.items() for r, run in enumerate(each)}
    sizes = {name: len(result) for name, result in flat.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The models must be scored on the same data, got different numbers of data {sizes}: score all on the same rows."
        )
    if min(sizes.values()) < 2:
        raise ValueError("The models must be scored on at least two data, so that differences have an error.")
    _check_same_data(flat)
    _check_same_measure(flat)
    log_px = {name: np.mean([run.log_px for run in each], 0) for name, each in runs.items()}
    sampling = {name: sampling_error(each) for name, each in runs.items()}
    ranked = sorted(runs, key=lambda name: -np.nan_to_num(float(np.mean(log_px[name])), nan=-np.inf))
    best, others = ranked[0], ranked[1:]
    paired = [log_px[name] - log_px[best] for name in ranked]
    training = {name: training_error(each) for name, each in runs.items()}
    return Comparison(
        names=ranked,
        mean=np.array([float(np.mean(log_px[name])) for name in ranked]),
        difference=np.array([np.mean(d) for d in paired]),
        difference_se=np.array([np.std(d, ddof=1) / math.sqrt(len(d)) for d in paired]),
        monte_carlo_se=np.array([0.0] + [math.hypot(sampling[name], sampling[best]) for name in others]),
        unreliable=np.array([int(np.any([~run.reliable for run in runs[name]], 0).sum()) for name in ranked]),
        stacking=_stacking([log_px[name] for name in ranked]),
        training_se=np.array([0.0] + [math.hypot(training[name], training[best]) for name in others]) if several else None,
        num_runs=np.array([len(runs[name]) for name in ranked]) if several else None,
    )


def _runs_by_name(evidence: Mapping[str, Evidence | Sequence[Evidence]]) -> dict[str, list[Evidence]]:
    """Each model's runs."""
    runs: dict[str, list[Evidence]] = {}
    for name, given in evidence.items() if isinstance(evidence, Mapping) else [("", evidence)]:
        runs[name] = [given] if isinstance(given, Evidence) else list(given) if isinstance(given, list | tuple) else []
    if not isinstance(evidence, Mapping) or not all(
        each and all(isinstance(run, Evidence) for run in each) for each in runs.values()
    ):
        got = f"a {type(evidence).__name__}" + (" with something else" if isinstance(evidence, Mapping) else "")
        cure = 'pass {"one": evidence, "other": evidence}'
        raise TypeError(f"evidence must be a mapping of names to evidence, got {got}: {cure}.")
    return runs


def sampling_error(runs: Sequence[Evidence]) -> float:
    """The standard error from sampling of the mean over runs."""
    return math.sqrt(sum(run.mean_se**2 for run in runs)) / len(runs)


def training_error(runs: Sequence[Evidence]) -> float:
    """The standard error from training of the mean over runs, without what their sampling adds; NaN for one run."""
    if len(runs) < 2:
        return math.nan
    between = float(np.var([run.mean for run in runs], ddof=1)) - float(np.mean([run.mean_se**2 for run in runs]))
    return math.sqrt(max(0.0, between) / len(runs))


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
            cure = "compare models whose likelihoods are of one kind"
            if FACTOR_OF_DATA in {*measure.given} ^ {*expected.given}:
                cure = "put a change of variables into the likelihood, as TransformedDistribution does, not into a factor"
            raise ValueError(
                f"log p(x) of {name!r} is {measure}, and that of {first!r} is {expected}: their nats do not compare; {cure}."
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

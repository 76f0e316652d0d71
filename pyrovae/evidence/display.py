"""How evidence is shown: as a table, in a notebook, as figures and as pandas' and ArviZ's objects."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..plots import gap_histogram, pareto_k
from ..tables import Table, Tabular
from .psis import Array, to_inference_data

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.axes import Axes

    from .draws import Draws

__all__ = ["EvidenceDisplay"]


class _Fields(Protocol):
    """What the methods below read of :class:`pyrovae.Evidence`."""

    def __len__(self) -> int: ...
    @property
    def log_px(self) -> Array: ...
    @property
    def elbo(self) -> Array: ...
    @property
    def khat(self) -> Array: ...
    @property
    def log_px_psis(self) -> Array | None: ...
    @property
    def method(self) -> str: ...
    @property
    def mean(self) -> float: ...
    @property
    def mean_se(self) -> float: ...
    @property
    def data_se(self) -> float: ...
    @property
    def gap(self) -> float: ...
    @property
    def bits_per_dim(self) -> float: ...
    @property
    def num_dims(self) -> float: ...
    @property
    def reliable(self) -> Array: ...
    @property
    def effort(self) -> str: ...
    @property
    def is_exact(self) -> bool: ...
    @property
    def khat_thresholds(self) -> Array: ...
    def summary(self) -> str: ...
    def to_datatree(self, draws: Draws | None = None) -> xarray.DataTree: ...
    def _per_datum(self) -> dict[str, Array]: ...


class EvidenceDisplay(Tabular):
    """The methods of :class:`pyrovae.Evidence` that show or convert it; they read its fields."""

    def table(self: _Fields) -> Table:
        """The means as a table: estimate, bound and gap, with their errors from sampling and from the data."""
        nats = self.num_dims * math.log(2) if self.num_dims else math.nan
        gap = self.log_px - self.elbo
        rows: list[list[Any]] = [["log p(x)", "exact" if self.is_exact else "estimate", self.mean, self.mean_se, self.data_se]]
        if self.log_px_psis is not None and np.isfinite(self.log_px_psis).all():
            rows.append(["log p(x)", "estimate, Pareto-smoothed", float(np.mean(self.log_px_psis)), math.nan, math.nan])
        if not self.is_exact:
            rows.append(["ELBO", "lower bound", float(np.mean(self.elbo)), math.nan, _data_error(self.elbo)])
            rows.append(["gap", "estimate - bound", self.gap, math.nan, _data_error(gap)])
        rows.append(["bits per dimension", "", self.bits_per_dim, self.mean_se / nats, self.data_se / nats])
        good = int(self.reliable.sum())
        return Table(
            header=["nats per datum", "", "mean", "se MC", "se data"],
            rows=[[*row[:2], *map(_cell, row[2:])] for row in rows],
            left=(0, 1),
            caption=f"Evidence: {len(self):,} data, {good:,} reliable; {self.method}, {self.effort}",
            notes=[self.summary()],
        )

    def plot(self: _Fields, ax: Axes | None = None, *, what: Literal["khat", "gap"] = "khat") -> Axes:
        """Draw what says whether to believe the estimates.

        Args:
            ax: the axes to draw on; by default new ones, which Jupyter shows.
            what: ``"khat"``, the Pareto shape of every datum; or ``"gap"``, a histogram of estimate minus bound.

        Raises:
            ValueError: another ``what``, or evidence without Pareto k, such as an exact answer.
        """
        if what == "gap":
            with np.errstate(invalid="ignore"):
                return gap_histogram(self.log_px - self.elbo, ax)
        if what != "khat":
            raise ValueError(f'what must be "khat" or "gap", got {what!r}: choose one.')
        if self.is_exact or np.isnan(self.khat).all():
            raise ValueError(f'what must be "gap" for evidence without Pareto k ({self.method}), got "khat".')
        return pareto_k(self.khat, self.khat_thresholds, ax)

    def to_pandas(self: _Fields) -> pandas.DataFrame:
        """One row for each datum: the fields of the evidence, and whether it is ``reliable``; log p(x) in nats.

        Example:
            >>> import numpy as np, pyrovae as pv
            >>> one = np.ones(3)
            >>> evidence = pv.Evidence(log_px=-9 * one, se=0.1 * one, ess=50 * one, khat=0.3 * one, elbo=-10 * one,
            ...                        num_samples=5000, num_dims=4)
            >>> evidence.to_pandas().loc[2, ["log_px", "khat"]].tolist()
            [-9.0, 0.3]
        """
        import pandas

        frame = pandas.DataFrame(self._per_datum() | {"reliable": self.reliable})
        frame.index.name = "datum"
        return frame

    def to_arviz(self: _Fields, draws: Draws | None = None) -> Any:
        """What the installed ArviZ works with: its ``InferenceData`` in 0.23, an xarray ``DataTree`` from 1.0 on.

        Args:
            draws: what :func:`pyrovae.posterior_draws` returned for the same data; their groups are added.

        Raises:
            ValueError: the draws are of another number of data.
        """
        return to_inference_data(self.to_datatree(draws))


def _data_error(values: Array) -> float:
    with np.errstate(invalid="ignore"):
        known = len(values) > 1 and np.isfinite(values).all()
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if known else math.nan


def _cell(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"

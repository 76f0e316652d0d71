"""The estimate of log p(x) against the number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import BLUE, _bare, _plain_ticks, log_ticks, new_axes
from ..tables import Table, Tabular
from .psis import Array
from .streaming import curve_sizes, standard_error

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Curve", "curve_of"]


@dataclass(frozen=True)
class Curve(Tabular):
    """How the estimate of log p(x) rises with the number of samples: from the first K of each datum's S, for several K.

    Attributes:
        num_samples: K, ascending up to S, shape (C,). A datum that stopped before K samples keeps its last estimate.
        log_px: the estimate of each datum from its first K samples, in nats, shape (C, N).
        se: its Monte Carlo standard error, shape (C, N). From one sample it is the distance to the datum's mean log-weight,
            which says little of one datum but has the right mean square over many.
    """

    num_samples: Array
    log_px: Array
    se: Array

    def __repr__(self) -> str:
        """One line: the numbers of samples, and the last estimate."""
        return f"Curve({len(self.num_samples)} sizes up to {self.num_samples[-1]:,} samples, mean={self.mean[-1]:.4g} nats)"

    @property
    def mean(self) -> Array:
        """The mean estimate over data for each K, in nats per datum, shape (C,)."""
        return np.mean(self.log_px, 1)

    @property
    def mean_se(self) -> Array:
        """Monte Carlo standard error of :attr:`mean`, shape (C,)."""
        return np.sqrt(np.sum(self.se**2, 1)) / self.log_px.shape[1]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean estimate against K, with two Monte Carlo standard errors on either side."""
        ax = new_axes(ax, (6.2, 3.3))
        finite = np.isfinite(self.mean)
        error = np.where(np.isfinite(self.mean_se), 2 * self.mean_se, 0.0)
        style: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.6, "capsize": 3, "color": BLUE}
        ax.errorbar(self.num_samples[finite], self.mean[finite], error[finite], **style)
        ax.set_xscale("log")
        ax.set_xlabel("samples per datum, K")
        ax.set_ylabel("log p(x), estimate (nats per datum)")
        log_ticks(ax.xaxis, self.num_samples.min(), self.num_samples.max(), self.num_samples)
        _plain_ticks(ax.yaxis)
        _bare(ax, "y")
        return ax

    def table(self) -> Table:
        """The mean estimate for each number of samples."""
        rows = [
            [f"{k:,}", f"{mean:.3f}", f"{se:.3f}"]
            for k, mean, se in zip(self.num_samples, self.mean, self.mean_se, strict=True)
        ]
        return Table(
            ["samples", "log p(x)", "se MC"], rows, caption="The mean estimate from each datum's first K samples, in nats"
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each number of samples: the mean estimate and its Monte Carlo standard error, in nats per datum."""
        import pandas

        index = pandas.Index(self.num_samples, name="num_samples")
        return pandas.DataFrame({"log_px": self.mean, "se": self.mean_se}, index=index)


def curve_of(log_sums: Array, log_squares: Array, elbo: Array, num_samples: int, drawn: Array | None = None) -> Curve:
    """A curve from running sums over each datum's first K samples, for the K of :func:`curve_sizes`.

    Args:
        log_sums: the logarithm of the summed weights, shape (C, N).
        log_squares: the logarithm of the summed squares, shape (C, N).
        elbo: the mean log-weight of all samples, shape (N,), in nats.
        num_samples: S.
        drawn: the number of samples of each datum if some took fewer, shape (N,); past it the sums stay.
    """
    sizes = np.array(curve_sizes(num_samples))
    counts = np.minimum(sizes[:, None], num_samples if drawn is None else drawn)  # (C, N or 1)
    log_px = log_sums - np.log(counts)
    with np.errstate(all="ignore"):
        se = standard_error(log_sums, log_squares, counts)
        # One sample has no spread. All S do: the squared distance of one from their mean has their variance as its mean.
        se[0] = np.abs(log_px[0] - elbo) * np.sqrt(counts[-1] / (counts[-1] - 1)) if num_samples > 1 else math.nan
    return Curve(sizes, log_px, se)

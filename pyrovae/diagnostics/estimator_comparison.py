"""The result of a comparison of estimators, as a table and a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import BLUE, ORANGE, SURFACE, _bare, _plain_ticks, log_ticks, new_panels
from ..tables import Table, Tabular
from .posterior import Array

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["GROUPS", "EstimatorComparison"]

GROUPS = ("model", "guide")
PER_GROUP = ("norm", "bias", "bias_p", "variance", "snr", "snr_per_second")


@dataclass(frozen=True)
class EstimatorComparison(Tabular):
    r"""Estimators side by side, at one set of parameters and on one batch.

    Arrays are over E estimators, those of gradients over (E, 2), for the parameters of the model and of the guide.

    Attributes:
        names: the estimators.
        num_particles: K of each.
        bound: the mean bound, in nats per datum.
        bound_se: its standard error over draws, in nats per datum.
        norm: the Euclidean norm of the mean gradient per datum, corrected for sampling noise.
        bias: the norm of the mean difference from the reference's gradient, relative to the reference's norm, corrected for
            sampling noise.
        bias_p: the p-value of a sign-flip test of no difference, on the paired draws.
        variance: the summed variance of the gradient's coordinates.
        snr: the signal-to-noise ratio, norm over the root of the variance.
        seconds: the median time of one step's loss and gradients.
        snr_per_second: the signal-to-noise ratio of the mean gradient of one second, snr / sqrt(seconds).
        reference: the estimator that the bias is relative to.
        num_draws: the number of draws of each gradient.
    """

    names: list[str]
    num_particles: Array
    bound: Array
    bound_se: Array
    norm: Array
    bias: Array
    bias_p: Array
    variance: Array
    snr: Array
    seconds: Array
    snr_per_second: Array
    reference: str
    num_draws: int

    def __repr__(self) -> str:
        """One line: the estimators and their bounds."""
        bounds = ", ".join(f"{name}: {bound:.4g}" for name, bound in zip(self.names, self.bound, strict=True))
        return f"EstimatorComparison({bounds} nats per datum)"

    def __str__(self) -> str:
        """A table of 80 columns, two lines for each estimator."""
        return self.table().text()

    def table(self) -> Table:
        """Two rows for each estimator: of the gradient for the model's parameters, and for the guide's."""
        rows = []
        for e, name in enumerate(self.names):
            left = [name, str(self.num_particles[e]), f"{self.bound[e]:.3f}", f"{self.bound_se[e]:.3f}"]
            left.append(f"{1e3 * self.seconds[e]:.2f}")
            for g, group in enumerate(GROUPS):
                bias = "-" if math.isnan(self.bias[e, g]) else f"{self.bias[e, g]:.0%}"
                p = "-" if math.isnan(self.bias_p[e, g]) else f"{self.bias_p[e, g]:.2f}"
                right = [group, bias, p, f"{self.snr[e, g]:.3g}", f"{self.snr_per_second[e, g]:.3g}"]
                rows.append([*(left if g == 0 else [""] * len(left)), *right])
        return Table(
            ["estimator", "K", "bound", "se", "ms", "of", "bias", "p", "SNR", "SNR 1s"],
            rows,
            left=(0, 5),
            notes=[
                f"bound in nats per datum; gradient bias against {self.reference}, paired test's p",
                f"SNR = |mean| / sd over {self.num_draws} gradients; SNR 1s: of a second's mean gradient",
            ],
        )

    def to_dataset(self) -> xarray.Dataset:
        """The numbers as an xarray ``Dataset`` with dimensions ``estimator`` and ``parameters``."""
        import xarray

        per_estimator = {name: ("estimator", getattr(self, name)) for name in ("num_particles", "bound", "bound_se", "seconds")}
        per_group = {name: (("estimator", "parameters"), getattr(self, name)) for name in PER_GROUP}
        return xarray.Dataset(
            per_estimator | per_group,
            coords={"estimator": self.names, "parameters": list(GROUPS)},
            attrs={"reference": self.reference, "num_draws": self.num_draws, "units": "nats per datum, seconds"},
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each estimator and group of parameters."""
        return self.to_dataset().to_dataframe().swaplevel().sort_index() if self.names else self.to_dataset().to_dataframe()

    def plot(self, ax: Any = None) -> Any:
        """Draw bounds, biases, signal-to-noise ratios and their worth per second, side by side.

        Args:
            ax: an array of four axes to draw on; by default those of a new figure, which Jupyter shows.

        Returns:
            The four axes.
        """
        panels = new_panels(ax, 4, (13, 1.6 + 0.42 * len(self.names)), sharey=True)
        rows = np.arange(len(self.names))
        panels[0].errorbar(self.bound, rows, xerr=1.96 * self.bound_se, fmt="o", color=BLUE, capsize=3)
        panels[0].set_xlabel("bound (nats per datum)")
        panels[0].set_yticks(rows, [f"{name}, K = {k}" for name, k in zip(self.names, self.num_particles, strict=True)])
        panels[0].set_ylim(len(self.names) - 0.4, -0.6)
        _plain_ticks(panels[0].xaxis, 4)
        for panel, values, label in (
            (panels[1], 100 * self.bias, "gradient's bias (%)\n▽: not significant, p > 0.05"),
            (panels[2], self.snr, "signal-to-noise ratio\nof one gradient"),
            (panels[3], self.snr_per_second, "signal-to-noise ratio of\na second's mean gradient"),
        ):
            self._draw_groups(panel, values, unsure=self.bias_p > 0.05 if panel is panels[1] else None)
            panel.set_xlabel(label)
        panels[2].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
        for panel in panels:
            _bare(panel, "y")
        return panels

    def _draw_groups(self, panel: Any, values: Array, unsure: Array | None) -> None:
        """Draw a number of each estimator for both groups of parameters, the guide's a little below the model's."""
        for g, (group, marker, colour) in enumerate(zip(GROUPS, "os", (BLUE, ORANGE), strict=True)):
            known = np.isfinite(values[:, g]) & (values[:, g] > (0 if unsure is None else -1))
            hollow = np.zeros(len(values), dtype=bool) if unsure is None else unsure[:, g]
            rows = np.arange(len(values)) + (-0.12 if g == 0 else 0.12)
            for chosen, form, face in ((known & ~hollow, marker, colour), (known & hollow, "v", SURFACE)):
                panel.plot(values[chosen, g], rows[chosen], form, color=colour, markerfacecolor=face)
            panel.plot([], [], marker, color=colour, label=f"{group}'s parameters")
        drawn = values[np.isfinite(values) & (values > 0)]
        if len(drawn) and unsure is None:
            panel.set_xscale("log")
            low, high = drawn.min() / 1.3, drawn.max() * 1.3
            panel.set_xlim(low, high)
            log_ticks(panel.xaxis, low, high)
        else:
            panel.set_xlim(left=-0.04 * max(drawn.max() if len(drawn) else 1.0, 1e-6))
            _plain_ticks(panel.xaxis, 4)

"""Posterior draws of every datum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tables import Table, Tabular
from .psis import Array, to_inference_data

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.axes import Axes

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws(Tabular):
    r"""Draws from p(z|x) by importance resampling, with the other groups that ArviZ uses.

    Arrays are over M draws and N data, under the names of the pair's sites.

    Attributes:
        posterior: the latents given the data, each (M, N, ...).
        log_likelihood: log p(x|z) of each observed site at these draws, in nats, each (M, N).
        observed_data: the observed sites' values, each (N, ...).
        posterior_predictive: observed sites drawn again given the posterior's latents, each (M, N, ...).
        prior: the latents drawn from the model alone, each (M, N, ...).
        prior_predictive: the observed sites drawn with them, each (M, N, ...).
        ess: effective size of the weights that were resampled, shape (N,). With fewer than M, draws of a datum repeat.
        num_samples: S, importance samples per datum.
    """

    posterior: dict[str, Array]
    log_likelihood: dict[str, Array]
    observed_data: dict[str, Array]
    posterior_predictive: dict[str, Array]
    prior: dict[str, Array]
    prior_predictive: dict[str, Array]
    ess: Array
    num_samples: int

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.ess)

    def __repr__(self) -> str:
        """One line: the latents, the number of draws and data, and the smallest effective sample size."""
        shapes = ", ".join(f"{name}: {array.shape}" for name, array in self.posterior.items())
        return f"Draws({shapes}; {len(self)} data, smallest ess {self.ess.min():.0f} of {self.num_samples:,})"

    def table(self) -> Table:
        """The groups and their sites, with their shapes."""
        rows = [
            [group, site, " x ".join(map(str, array.shape))]
            for group in _GROUPS
            for site, array in getattr(self, group).items()
        ]
        few = int((self.ess < len(next(iter(self.posterior.values())))).sum())
        note = (
            f"Effective sample size of weights: {self.ess.min():.0f} to {self.ess.max():.0f} of {self.num_samples:,}; below "
            f"the number of draws for {few:,} of {len(self):,} data, whose draws repeat."
        )
        return Table(["group", "site", "draws x data x ..."], rows, left=(0, 1), caption="Draws from p(z|x)", notes=[note])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the effective sample size of every datum in ascending order, against the number of draws."""
        from ..plots import BLUE, RED, _bare, _plain_ticks, log_ticks, new_axes

        ax = new_axes(ax, (6, 3.3))
        drawn = len(next(iter(self.posterior.values())))
        ess = np.sort(self.ess)
        ax.plot((np.arange(len(ess)) + 0.5) / len(ess) * 100, ess, "o", color=BLUE, markersize=4, markeredgewidth=0)
        ax.axhline(drawn, color=RED, linewidth=1.1, linestyle=(0, (4, 3)), label=f"{drawn:,} draws: below, draws repeat")
        ax.set_yscale("log")
        log_ticks(ax.yaxis, min(ess[0], drawn), max(ess[-1], drawn))
        ax.set_xlabel("data, from the smallest (%)")
        ax.set_ylabel(f"effective samples of {self.num_samples:,}")
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        _plain_ticks(ax.xaxis)
        _bare(ax, "y")
        return ax

    def to_pandas(self) -> pandas.DataFrame:
        """The posterior: one row for each draw and datum, one column for each dimension of each latent."""
        import pandas

        columns: dict[str, Array] = {}
        for site, array in self.posterior.items():
            flat = array.reshape(array.shape[0] * array.shape[1], -1)
            named = array.ndim > 2
            columns |= {f"{site}[{place}]" if named else site: flat[:, place] for place in range(flat.shape[1])}
        sizes = next(iter(self.posterior.values())).shape[:2]
        index = pandas.MultiIndex.from_product([range(sizes[0]), range(sizes[1])], names=["draw", "datum"])
        return pandas.DataFrame(columns, index=index)

    def to_arviz(self) -> Any:
        """What the installed ArviZ works with: its ``InferenceData`` in 0.23, an xarray ``DataTree`` from 1.0 on."""
        return to_inference_data(self.to_datatree())

    def to_datatree(self) -> xarray.DataTree:
        """As an xarray ``DataTree`` with ArviZ's groups, for both lines of ArviZ.

        Draws are independent. They are divided into four chains if their number allows, since ArviZ compares chains. For
        ArviZ itself call :meth:`to_arviz`. ``az.loo`` would take the harmonic mean of the likelihood for log p(x),
        since a datum's latents know nothing of it but through that datum: rank models by :func:`compare`.
        """
        import xarray

        num_draws = len(next(iter(self.posterior.values())))
        chains = 4 if num_draws % 4 == 0 and num_draws >= 16 else 1

        def dataset(arrays: dict[str, Array], drawn: bool) -> xarray.Dataset:
            variables = {}
            for name, array in arrays.items():
                inner = array.shape[2 if drawn else 1 :]
                dims = ["datum", *(f"{name}_dim_{i}" for i in range(len(inner)))]
                if drawn:
                    array, dims = array.reshape(chains, -1, *array.shape[1:]), ["chain", "draw", *dims]
                variables[name] = (dims, array)
            coords = {"datum": np.arange(len(self))}
            if drawn:
                coords |= {"chain": np.arange(chains), "draw": np.arange(num_draws // chains)}
            attrs = {"inference_library": "pyrovae", "num_samples": self.num_samples}
            return xarray.Dataset(variables, coords=coords, attrs=attrs)

        groups = {name: dataset(getattr(self, name), drawn=name != "observed_data") for name in _GROUPS}
        groups["resampling"] = xarray.Dataset({"ess": ("datum", self.ess)}, coords={"datum": np.arange(len(self))})
        return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items() if group.data_vars})


_GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive", "observed_data")

"""Posterior draws of every datum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .psis import Array

if TYPE_CHECKING:
    import xarray

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws:
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

    def to_datatree(self) -> xarray.DataTree:
        """As an xarray ``DataTree`` with ArviZ's groups, for both lines of ArviZ.

        Draws are independent, so they stand as four chains where their number allows, by which ArviZ judges them. In ArviZ 0.23
        call ``az.InferenceData.from_datatree``. ``az.loo`` would take the harmonic mean of the likelihood for log p(x), since a
        datum's latents know nothing of it but through that datum: rank models by :func:`compare`.
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

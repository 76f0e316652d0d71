"""A second opinion on some estimates, by chains that share nothing with the first, and the same chains on simulated data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..programs.inspect import open_pair
from ..programs.sites import Program
from .annealing import ais
from .bdmc import bdmc
from .results import NEGLIGIBLE, Evidence

__all__ = ["SecondOpinion", "checked"]

# The chains: from the prior, so that no draw of the guide and no fit decides where they go.
CHAINS: dict[str, Any] = {"num_chains": 16, "num_temperatures": 500, "leapfrog_steps": 5}
# Standard errors by which annealing must lie above an estimate that it refutes.
REFUTED = 4.0


class SecondOpinion:
    r"""Annealing from the prior for a sample of the data, and for as many data that the model simulates.

    Both estimates of p(x) are unbiased, so where annealing finds more by four standard errors and 0.05 nats, the first has
    missed a mode. Where it finds less, its chains may have been too short, and on simulated data bidirectional Monte Carlo
    tells by how much: log p(x) lies between the two means :math:`E \log \hat p_{\mathrm{forward}}` and
    :math:`E \log \hat p_{\mathrm{reverse}}`.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        number: how many data are annealed, evenly spaced, and how many are simulated.
        seed: of the chains.
        vectorize: whether particles run at once.

    Raises:
        ValueError: the pair cannot be annealed or simulated, or is tied to one set of data.
    """

    def __init__(self, model: Program, guide: Program, x: Any, number: int, seed: int | None, vectorize: bool):
        data, first = open_pair(model, guide, x, vectorize_particles=vectorize)
        if first.whole is not None:
            raise ValueError("second must be 0 for a pair that is tied to one set of data: leave it out.")
        if first.info.discrete:
            raise ValueError(
                f"second must be 0 for a pair with the discrete latent site {first.info.discrete[0]!r}, which cannot be "
                f"annealed: leave it out."
            )
        columns = [torch.cat(parts) for parts in zip(*data, strict=True)]
        self.rows = np.unique(np.linspace(0, len(columns[0]) - 1, min(number, len(columns[0]))).round().astype(int))
        sample = tuple(column[torch.from_numpy(self.rows).to(column.device)] for column in columns)
        options = CHAINS | {"seed": seed, "vectorize_particles": vectorize}
        self.chains = ais(model, guide, sample, **options)
        self.sandwich = bdmc(model, guide, sample, num_data=number, **options)

    def on(self, evidence: Evidence) -> Evidence:
        """The evidence with both gaps in its notes, and with what it misses by these chains."""
        own = evidence.rows(self.rows)
        above = self.chains.log_px - own.log_px
        refuted = above > np.maximum(NEGLIGIBLE, REFUTED * np.hypot(self.chains.se, own.se))
        missed = np.zeros(len(evidence)) if evidence.missed is None else evidence.missed.copy()
        missed[self.rows[refuted]] = np.fmax(missed[self.rows[refuted]], above[refuted])
        found = {
            "num_data": len(self.rows),
            "settings": CHAINS,
            "difference": float(above.mean()),
            "difference_se": float(np.hypot(self.chains.mean_se, own.mean_se)),
            "refuted": self.rows[refuted].tolist(),
            "simulated": len(self.sandwich),
            "gap": self.sandwich.gap,
            "gap_se": self.sandwich.gap_se,
        }
        return replace(evidence, missed=missed if refuted.any() else evidence.missed, notes={**evidence.notes, "second": found})


def checked(value: Any) -> int:
    """``value`` as the number of data that have a second opinion.

    Raises:
        ValueError: it is not a whole number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"second must be a whole number of data, at least 0, got {value!r}.")
    return value

"""What a fitted proposal mixes with the prior's draws, the error of such a mean, and chains that start from the proposal."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.matching import Batch
from .fitted import Fitted, slope_of
from .paths import ChainState
from .psis import Array
from .terms import PairTerms

__all__ = ["FittedField", "Strata", "prior_draws"]

# The fraction of a fitted proposal's draws that come from the prior: it bounds the weights, and shows what the fit has missed.
PRIOR_SHARE = 0.04


def prior_draws(number: int) -> int:
    """How many of a fitted proposal's draws are the prior's: at least one, but not all."""
    return min(max(1, round(PRIOR_SHARE * number)), number - 1)


class Strata:
    """Sums of the weights of the prior's draws, from which the standard error of a stratified mean follows."""

    def __init__(self, size: int, device: torch.device):
        self.log_sum = torch.full((size,), -math.inf, dtype=torch.float64, device=device)
        self.log_square = self.log_sum.clone()

    def add(self, rows: Tensor, log_w: Tensor) -> None:
        """Take in log-weights (S, rows) of some of the data."""
        if len(log_w):
            self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], torch.logsumexp(log_w, 0))
            self.log_square[rows] = torch.logaddexp(self.log_square[rows], torch.logsumexp(2 * log_w, 0))

    def standard_error(self, arrays: dict[str, Array], rows: Array, number: int) -> Array:
        r"""Of log p(x) from ``number`` draws: the variance within the two strata, but not that between them.

        .. math:: \operatorname{se}^2 = \frac{\sum_h \frac{n_h}{n_h - 1} \left( \sum_{s \in h} w_s^2
            - \frac{1}{n_h} (\sum_{s \in h} w_s)^2 \right)}{(\sum_s w_s)^2}
        """
        log_whole = arrays["log_px"][rows] + math.log(number)
        few = prior_draws(number)
        with np.errstate(all="ignore"):
            part = np.exp(self.log_sum.cpu().numpy() - log_whole)
            square = np.exp(self.log_square.cpu().numpy() - 2 * log_whole)
            squares = 1 / arrays["ess"][rows]
            total = np.zeros(len(rows))
            for own, own_square, count in ((part, square, few), (1 - part, squares - square, number - few)):
                total += count / max(count - 1, 1) * np.maximum(own_square - own**2 / count, 0.0)
            return np.sqrt(total)


class FittedField(NamedTuple):
    r"""Densities between fitted proposals and the joint, through which chains are annealed.

    The chains move in coordinates v in which the heaviest component of a proposal is round, :math:`u = \mu + C v`. Then one
    step size serves all directions. The Jacobian is constant, and leaves ratios of densities as they are.
    """

    terms: PairTerms
    args: Batch
    start: Fitted
    loc: Tensor  # (B, L)
    tril: Tensor  # (B, L, L)
    inverse: Tensor  # (B, L, L)

    @classmethod
    def of(cls, terms: PairTerms, args: Batch, start: Fitted) -> FittedField:
        """The densities for proposals to some data."""
        data, heaviest = torch.arange(len(start), device=start.loc.device), start.shares.argmax(1)
        return cls(terms, args, start, *(part[data, heaviest] for part in start[:3]))

    def draw(self, num: int) -> Tensor:
        """Draws of the proposals, (num, B, L)."""
        return ((self.start.sample(num) - self.loc).transpose(0, 1) @ self.inverse.mT).transpose(0, 1)

    def at(self, flat: Tensor) -> ChainState:
        """The chains' state at ``flat`` (K, B, L)."""
        return self.slope(flat, 1.0)[0]

    def slope(self, flat: Tensor, beta: float) -> tuple[ChainState, Tensor, Tensor]:
        """The state at ``flat``, log f there (K, B), and its gradient (K, B, L)."""
        there = self.loc + (flat.transpose(0, 1) @ self.tril.mT).transpose(0, 1)
        log_start, start_slope = slope_of(self.start, there)
        log_joint, joint_slope = self.terms.slope(self.args, there)
        state = ChainState(flat, log_start, log_joint - log_start)
        slope = (1 - beta) * start_slope + beta * joint_slope
        return state, log_start + beta * state.log_ratio, (slope.transpose(0, 1) @ self.tril).transpose(0, 1)

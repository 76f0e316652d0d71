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
    """Sums over the draws of the prior and of a fitted proposal, from which the standard error of their joint mean follows."""

    def __init__(self, size: int, device: torch.device):
        empty = torch.full((2, size), -math.inf, dtype=torch.float64, device=device)
        self.own = empty  # logarithms of the sums of w and of w^2 over the prior's draws
        self.pooled = empty.clone()  # and over all draws, each with the weight p(u) / r(u) that makes it one of the prior's

    def add(self, rows: Tensor, log_w: Tensor, log_ratio: Tensor, from_prior: int) -> None:
        """Take in draws of some of the data, of which the first come from the prior.

        Args:
            rows: the data.
            log_w: log-weights (S, rows).
            log_ratio: log p(u) - log r(u), where r is the mixture of the prior and the proposal, (S, rows).
            from_prior: how many draws come from the prior.
        """
        powers = torch.stack([log_w, 2 * log_w])
        self.pooled[:, rows] = torch.logaddexp(self.pooled[:, rows], torch.logsumexp(powers + log_ratio, 1))
        if from_prior:
            self.own[:, rows] = torch.logaddexp(self.own[:, rows], torch.logsumexp(powers[:, :from_prior], 1))

    def standard_error(self, arrays: dict[str, Array], rows: Array, number: int) -> Array:
        r"""Of log p(x) from S draws, of which n come from the prior: the variance within the two strata, not that between.

        .. math:: \operatorname{se}^2 = \frac{n V_p + (S - n) V_q}{(\sum_s w_s)^2}, \qquad
            V_p = \frac1S \sum_s \frac{p(u_s)}{r(u_s)} w_s^2 - \Bigl(\frac1S \sum_s \frac{p(u_s)}{r(u_s)} w_s\Bigr)^2

        Few of the prior's draws come near a posterior. The proposal's do, and tell what the prior's weights would be there;
        without them an estimate that none of the prior's draws came near would seem exact. :math:`V_q` is the variance of the
        proposal's own weights.
        """
        log_whole = arrays["log_px"][rows] + math.log(number)
        few = prior_draws(number)
        with np.errstate(all="ignore"):
            own, pooled = (np.exp(sums.cpu().numpy() - np.outer([1, 2], log_whole)) for sums in (self.own, self.pooled))
            many = number - few
            rest, rest_squares = 1 - own[0], 1 / arrays["ess"][rows] - own[1]
            fitted = many / max(many - 1, 1) * np.maximum(rest_squares - rest**2 / many, 0.0)
            prior = few * np.maximum(pooled[1] / number - (pooled[0] / number) ** 2, 0.0)
            return np.sqrt(fitted + prior)


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

"""Proposals fitted to the posteriors of many data at once: modes, their Gaussians, and what the weights of draws teach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.matching import Batch
from .ascent import curvature
from .fitted import Fitted, candidates, stacked, weighed
from .matching import match_gradients, match_weights, smoothed_weights
from .modes import Modes
from .terms import CALLS_OF_A_GRADIENT, PairTerms

__all__ = ["Scored", "adapted", "draws_for", "fit", "tuned"]

# Steps that match gradients, how many of the last of them share their draws, how much these count against the last Gaussian,
# and how much wider than it they are drawn, so that the fit is right beyond the middle.
MATCHES, POOLED, TRUST, WIDER = 4, 3, 1e3, 1.2
# Draws that the Gaussian before an adaptation counts for, for each latent.
SHRINKAGE = 10.0


@dataclass(frozen=True)
class Scored:
    """Draws that have been scored.

    Attributes:
        flat: the points, (S, B, L).
        log_prior: log p(u) there, (S, B).
        log_joint: log p(x, u) there, (S, B).
        proposals: what they are from, in equal parts, each with the same fraction of draws from the prior.
        from_prior: that fraction.
    """

    flat: Tensor
    log_prior: Tensor
    log_joint: Tensor
    proposals: tuple[Fitted, ...]
    from_prior: float

    @property
    def log_drawn(self) -> Tensor:
        """The log-density of the mixture of all proposals, (S, B)."""
        fitted = torch.stack([proposal.log_prob(self.flat) for proposal in self.proposals])
        fitted = torch.logsumexp(fitted, 0) - math.log(len(self.proposals))
        if self.from_prior == 0:
            return fitted
        return torch.logaddexp(self.log_prior + math.log(self.from_prior), fitted + math.log1p(-self.from_prior))

    @property
    def log_w(self) -> Tensor:
        """Log-weights, (S, B)."""
        return self.log_joint - self.log_drawn

    def rows(self, chosen: Tensor) -> Scored:
        """Those of some of the data."""
        proposals = tuple(proposal.rows(chosen) for proposal in self.proposals)
        parts = (self.flat[:, chosen], self.log_prior[:, chosen], self.log_joint[:, chosen])
        return Scored(*parts, proposals, self.from_prior)

    def joined(self, other: Scored) -> Scored:
        """With as many draws of another proposal for the same data."""
        flat, prior, joint = (
            torch.cat([getattr(self, name), getattr(other, name)]) for name in ("flat", "log_prior", "log_joint")
        )
        return Scored(flat, prior, joint, (*self.proposals, *other.proposals), self.from_prior)


def fit(terms: PairTerms, args: Batch, modes: Modes, calls: Tensor) -> Fitted:
    """A proposal for each of B data from nothing but gradients: a Gaussian matched to each of its modes.

    Args:
        terms: the pair.
        args: the data.
        modes: their modes.
        calls: decoder calls of each datum, (B,), which are added to.
    """
    # Data with several modes would otherwise multiply the work for those with one.
    several = modes.number
    parts, order = [], []
    for number in sorted(set(several.tolist())):
        rows = torch.nonzero(several == number)[:, 0]
        own = modes.rows(rows)
        which = torch.stack(own.chosen[:number])
        at = own.point.gather(0, which[..., None].expand(-1, -1, own.point.shape[-1]))
        parts.append(_gaussians(terms, tuple(array[rows] for array in args), at, own.unit, calls, rows))
        order.append(rows)
    return stacked(parts).rows(torch.argsort(torch.cat(order)))


def _gaussians(terms: PairTerms, args: Batch, at: Tensor, unit: Tensor, calls: Tensor, rows: Tensor) -> Fitted:
    """A Gaussian at each mode (M, B, L), matched to gradients around it."""

    def gradient(flat: Tensor) -> tuple[Tensor, Tensor]:
        calls[rows] += CALLS_OF_A_GRADIENT * len(flat)
        return terms.slope(args, flat)

    loc, tril = at, curvature(gradient, at, unit)
    modes, _, latents = at.shape
    half = math.ceil(0.7 * latents) + 6  # so that the draws of one step span all directions
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(MATCHES):
        noise = WIDER * torch.randn(*loc.shape[:2], half, latents, dtype=loc.dtype, device=loc.device) @ tril.mT
        draws = loc + torch.cat([noise, -noise], 2).movedim(2, 0)
        slopes = gradient(draws.flatten(0, 1))[1].reshape(draws.shape)
        kept = [*kept, (draws, slopes)][-POOLED:]
        draws, slopes = (torch.cat(columns) for columns in zip(*kept, strict=True))
        loc, tril = match_gradients(loc, tril, draws, slopes, TRUST)
    loc, tril = loc.transpose(0, 1), tril.transpose(0, 1)
    shares = torch.full(loc.shape[:2], 1 / modes, dtype=loc.dtype, device=loc.device)
    return Fitted.of(loc, tril, shares, torch.full_like(shares[:, 0], 8.0))


def adapted(fitted: Fitted, unit: Tensor, scored: Scored, rounds: int = 3) -> Fitted:
    """The proposals moved toward their own weights: means, covariances and shares by weighted draws, then width and tail.

    Args:
        fitted: the proposals.
        unit: the prior's standard deviations, (B, L).
        scored: draws of these and earlier proposals.
        rounds: steps of expectation and maximisation.
    """
    log_drawn = scored.log_drawn
    weights = smoothed_weights(scored.log_joint - log_drawn)
    shrinkage = SHRINKAGE * fitted.loc.shape[-1]
    for _ in range(rounds):
        parts = fitted.log_parts(scored.flat) + fitted.shares.log()
        divided = weights[..., None] * torch.nan_to_num(torch.softmax(parts, -1))
        loc, tril, _ = match_weights(fitted.loc, fitted.tril, scored.flat, divided, shrinkage)
        shares = weighed(fitted, scored.flat, weights)
        fitted = Fitted.of(loc, tril, shares, fitted.df)
    return candidates(fitted, unit, scored.flat, scored.log_joint, log_drawn)


def draws_for(fitted: Fitted, scored: Scored, target_se: float) -> Tensor:
    r"""How many draws of the proposals a standard error takes, with a margin of a fifth, by draws of earlier ones, (B,).

    .. math:: \sigma^2 = \hat E_r[w^2] / \hat p(x)^2 - 1, \qquad \hat E_r[w^2] = \frac1S \sum_s w_s^2 \frac{r_0(u_s)}{r(u_s)}
    """
    log_w, number = scored.log_w, math.log(len(scored.flat))
    log_r = Scored(scored.flat, scored.log_prior, scored.log_joint, (fitted,), scored.from_prior).log_drawn
    second = torch.logsumexp(log_w + scored.log_joint - log_r, 0) - number
    variance = torch.expm1(second - 2 * (torch.logsumexp(log_w, 0) - number))
    return torch.nan_to_num(1.2 * variance.clamp(min=0.0) / target_se**2, nan=math.inf, posinf=math.inf)


def tuned(fitted: Fitted, unit: Tensor, scored: Scored) -> Fitted:
    """The proposals with shares, width and tail by the weights of draws; their means and covariances stay."""
    log_drawn = scored.log_drawn
    if fitted.loc.shape[1] > 1:
        shares = weighed(fitted, scored.flat, smoothed_weights(scored.log_joint - log_drawn))
        fitted = Fitted(fitted.loc, fitted.tril, fitted.inverse, shares, fitted.df)
    return candidates(fitted, unit, scored.flat, scored.log_joint, log_drawn)

"""Proposals fitted to the posteriors of many data at once: modes, their Gaussians, and what the weights of draws teach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.matching import Batch
from .ascent import Peaks, climb, curvature, distinct
from .fitted import Fitted, candidates, weighed
from .matching import match_gradients, match_weights, smoothed_weights
from .terms import CALLS_OF_A_GRADIENT, PairTerms

__all__ = ["FEW_LATENTS", "FewOrMany", "Scored", "adapted", "fit", "how_to_fit", "tuned"]

# Posteriors over so few latents often have several modes, and draws of the prior lie near each.
FEW_LATENTS = 3
# A start is the likeliest of so many draws of the prior.
TOURNAMENT = 8
# Draws of the prior and the guide for their scales.
MOMENT_DRAWS = 64
# Steps that match gradients, how many of the last of them share their draws, how much these count against the last Gaussian,
# and how much wider than it they are drawn, so that the fit is right beyond the middle.
MATCHES, POOLED, TRUST, WIDER = 4, 3, 1e3, 1.2
# Draws that the Gaussian before an adaptation counts for, for each latent.
SHRINKAGE = 10.0


class FewOrMany(NamedTuple):
    """How proposals are fitted, which depends on the number of latents."""

    from_prior: int  # starts that are likely draws of the prior
    from_guide: int  # starts that are draws of the guide, besides its mean
    modes: int  # the most that are kept
    within: float  # the distance at which two points are one mode, in the prior's standard deviations
    steps: int  # gradients of an ascent


def how_to_fit(num_latents: int) -> FewOrMany:
    """With few latents many starts find most modes; with many, a start is rarely near another mode."""
    if num_latents <= FEW_LATENTS:
        return FewOrMany(from_prior=16, from_guide=7, modes=12, within=0.02, steps=30)
    return FewOrMany(from_prior=2, from_guide=1, modes=3, within=0.3, steps=25)


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


def fit(terms: PairTerms, args: Batch, calls: Tensor) -> tuple[Fitted, Tensor]:
    """A proposal for each of B data from nothing but gradients: its modes, and a Gaussian matched to each.

    Args:
        terms: the pair.
        args: the data.
        calls: decoder calls of each datum, (B,), which are added to.

    Returns:
        The proposals, and the prior's standard deviations (B, L).
    """
    pair = terms.pair(args)
    how = how_to_fit(pair.num_latents)

    def gradient(flat: Tensor) -> tuple[Tensor, Tensor]:
        calls.add_(CALLS_OF_A_GRADIENT * len(flat))
        return terms.slope(args, flat)

    prior = pair.prior_draws(TOURNAMENT * how.from_prior + MOMENT_DRAWS).double()
    guide = pair.draw(MOMENT_DRAWS, "guide", inside=True).double()
    calls.add_(len(prior) + len(guide))
    unit = prior.std(0).clamp(min=1e-3)
    entrants = prior[MOMENT_DRAWS:]
    height = torch.nan_to_num(gradient(entrants)[0], nan=-math.inf)
    height = height.reshape(TOURNAMENT, how.from_prior, -1)
    likely = entrants.reshape(TOURNAMENT, how.from_prior, *entrants.shape[1:])
    likely = likely.gather(0, height.argmax(0)[None, ..., None].expand_as(likely[:1]))[0]
    start = torch.cat([guide.mean(0, keepdim=True), guide[: how.from_guide], likely])
    peaks = climb(gradient, start, unit, how.steps)
    best = peaks.log_joint.max(0).values
    settled = (peaks.left < 2.0) | (peaks.log_joint >= best)
    peaks = Peaks(peaks.point, torch.where(settled, peaks.log_joint, -math.inf), peaks.slope, peaks.left)
    chosen = distinct(peaks, unit, most=how.modes, within=how.within, nats=12.0 + pair.num_latents / 2)
    # Data with several modes would otherwise multiply the work for those with one.
    several = torch.stack(chosen).ge(0).sum(0)
    parts: dict[int, Fitted] = {}
    order = []
    for number in sorted(set(several.tolist())):
        rows = torch.nonzero(several == number)[:, 0]
        which = torch.stack([points[rows] for points in chosen[:number]])
        at = peaks.point[:, rows].gather(0, which[..., None].expand(-1, -1, pair.num_latents))
        parts[number] = _gaussians(terms, tuple(array[rows] for array in args), at, unit[rows], calls, rows)
        order.append(rows)
    return _together(list(parts.values()), torch.cat(order)), unit


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
        loc, tril = match_gradients(loc, tril, *(torch.cat(columns) for columns in zip(*kept, strict=True)), TRUST)
    loc, tril = loc.transpose(0, 1), tril.transpose(0, 1)
    shares = torch.full(loc.shape[:2], 1 / modes, dtype=loc.dtype, device=loc.device)
    return Fitted.of(loc, tril, shares, torch.full_like(shares[:, 0], 8.0))


def _together(parts: list[Fitted], order: Tensor) -> Fitted:
    """Mixtures of several numbers of components as one, in the data's order."""
    most = max(part.loc.shape[1] for part in parts)
    whole = Fitted(*(torch.cat(columns) for columns in zip(*(part.padded(most) for part in parts), strict=True)))
    return whole.rows(torch.argsort(order))


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


def tuned(fitted: Fitted, unit: Tensor, scored: Scored) -> Fitted:
    """The proposals with shares, width and tail by the weights of draws; their means and covariances stay."""
    log_drawn = scored.log_drawn
    if fitted.loc.shape[1] > 1:
        shares = weighed(fitted, scored.flat, smoothed_weights(scored.log_joint - log_drawn))
        fitted = Fitted(fitted.loc, fitted.tril, fitted.inverse, shares, fitted.df)
    return candidates(fitted, unit, scored.flat, scored.log_joint, log_drawn)

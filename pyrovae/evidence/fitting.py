"""Proposals fitted to the posteriors of many data at once: modes, their Gaussians, and what the weights of draws teach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.matching import Batch
from .ascent import climb, curvature, distinct
from .fitted import Fitted, candidates, weighed
from .matching import match_gradients, match_weights, smoothed_weights
from .terms import CALLS_OF_A_GRADIENT, PairTerms

__all__ = ["FEW_LATENTS", "FewOrMany", "Modes", "Scored", "adapted", "draws_for", "fit", "how_to_fit", "search", "tuned"]

# Posteriors over so few latents often have several modes, and draws of the prior lie near each.
FEW_LATENTS = 3
# A start is the likeliest of so many draws of the prior.
TOURNAMENT = 8
# Draws of the prior and the guide for their scales.
MOMENT_DRAWS = 64
# Nats that an ascent may have left to gain where it is at a mode, and how much lower than the highest a mode may be.
SETTLED, LOWEST_MODE = 0.05, 20.0
# Steps that match gradients, how many of the last of them share their draws, how much these count against the last Gaussian,
# and how much wider than it they are drawn, so that the fit is right beyond the middle.
MATCHES, POOLED, TRUST, WIDER = 4, 3, 1e3, 1.2
# Draws that the Gaussian before an adaptation counts for, for each latent.
SHRINKAGE = 10.0


class FewOrMany(NamedTuple):
    """How proposals are fitted, which depends on the number of latents."""

    from_prior: int  # starts that are likely draws of the prior
    from_guide: int  # starts that are draws of the guide, besides its mean and the mirror image of that
    modes: int  # the most that are kept
    within: float  # the distance at which two points are one mode, in the prior's standard deviations
    steps: int  # gradients of an ascent


def how_to_fit(num_latents: int) -> FewOrMany:
    """With few latents many starts find most modes; with many, a start is rarely near another mode."""
    if num_latents <= FEW_LATENTS:
        return FewOrMany(from_prior=16, from_guide=6, modes=12, within=0.02, steps=30)
    return FewOrMany(from_prior=3, from_guide=0, modes=3, within=0.15, steps=30)


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


@dataclass(frozen=True)
class Modes:
    """What a search from several starts has found for each of B data.

    Attributes:
        point: where the starts have come to, (K, B, L).
        chosen: the points that are modes, the highest first, each (B,); -1 if a datum has no more.
        unit: the prior's standard deviations, (B, L).
        unseen: what modes that were not found, or not kept, may add to log p(x), (B,), in nats.
    """

    point: Tensor
    chosen: tuple[Tensor, ...]
    unit: Tensor
    unseen: Tensor

    @property
    def number(self) -> Tensor:
        """How many modes each datum has, (B,)."""
        return torch.stack(self.chosen).ge(0).sum(0)

    def rows(self, rows: Tensor) -> Modes:
        """Those of some of the data."""
        return Modes(self.point[:, rows], tuple(points[rows] for points in self.chosen), self.unit[rows], self.unseen[rows])


def search(terms: PairTerms, args: Batch, calls: Tensor) -> Modes:
    """Look for the modes of the posteriors of B data, by ascents from the guide, from its mirror image and from the prior.

    Args:
        terms: the pair.
        args: the data.
        calls: decoder calls of each datum, (B,), which are added to.
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
    centre = guide.mean(0, keepdim=True)
    start = torch.cat([centre, 2 * prior.mean(0) - centre, guide[: how.from_guide], likely])
    peaks = climb(gradient, start, unit, how.steps)
    settled = (peaks.left < SETTLED) | (peaks.log_joint >= peaks.log_joint.max(0).values)
    peaks = peaks._replace(log_joint=torch.where(settled, peaks.log_joint, -math.inf))
    chosen, sizes = distinct(peaks, unit, within=how.within, nats=LOWEST_MODE)
    return Modes(peaks.point, tuple(chosen[: how.modes]), unit, _unseen(sizes, how.modes))


def _unseen(sizes: Tensor, kept: int) -> Tensor:
    r"""What modes that no start came to, or that are not kept, may add to log p(x), (B,), in nats.

    The fraction of starts that are alone at their mode estimates the mass of the modes that no start has come to (Good 1953).
    With a few starts it says little, unless most of them are alone at one of three modes or more.
    """
    starts, number, alone = sizes.sum(0), (sizes > 0).sum(0), (sizes == 1).sum(0)
    unseen = torch.log((starts + 0.5) / (starts - alone + 0.5))
    unseen = torch.where((number >= 3) & (2 * alone >= starts), unseen, 0.0)
    return torch.maximum(unseen, torch.log(number / number.clamp(max=kept)))


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
    return _together(parts, torch.cat(order))


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

"""The modes of the posteriors of many data, by ascents from several starts, and what the starts say of modes not found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.matching import Batch
from .ascent import climb, distinct
from .fitted import Fitted
from .terms import CALLS_OF_A_GRADIENT, PairTerms

__all__ = ["FEW_LATENTS", "FewOrMany", "Found", "Modes", "how_to_search", "search"]

# Posteriors over so few latents often have several modes, and draws of the prior lie near each; over some more they have at
# times.
FEW_LATENTS, SOME_LATENTS = 3, 10
# A start is the likeliest of so many draws of the prior.
TOURNAMENT = 8
# Draws of the prior and the guide for their scales.
MOMENT_DRAWS = 64
# Nats that an ascent may have left to gain where it is at a mode, and how much lower than the highest a mode may be.
SETTLED, LOWEST_MODE = 0.05, 20.0
# Gradients of an ascent.
STEPS = 30
# Starts of a second, wider search besides those of the first, from the prior and from the guide, and the modes that it keeps.
WIDER_PRIOR, WIDER_GUIDE, WIDER_MODES = 24, 8, 16
# A component draws points that lie no further from it than the square root of L and so many of its standard deviations.
BEYOND = 2.0


class FewOrMany(NamedTuple):
    """How modes are looked for, which depends on the number of latents."""

    from_prior: int  # starts that are likely draws of the prior
    from_guide: int  # starts that are draws of the guide, besides its mean and the mirror image of that
    modes: int  # the most that are kept
    within: float  # the distance at which two points are one mode, in the prior's standard deviations


def how_to_search(num_latents: int) -> FewOrMany:
    """With few latents many starts find most modes; with many, a start is rarely near another mode."""
    if num_latents <= FEW_LATENTS:
        return FewOrMany(from_prior=16, from_guide=6, modes=12, within=0.02)
    if num_latents <= SOME_LATENTS:
        return FewOrMany(from_prior=12, from_guide=4, modes=8, within=0.1)
    return FewOrMany(from_prior=3, from_guide=0, modes=3, within=0.15)


@dataclass(frozen=True)
class Modes:
    """What a search from several starts has found for each of B data.

    Attributes:
        point: where the starts have come to, (K, B, L).
        chosen: the points that are modes, the highest first, each (B,); -1 if a datum has no more.
        unit: the prior's standard deviations, (B, L).
        sizes: how many starts came to each mode that was found, in the same order, kept or not, (M, B).
        height: log p(x, u) at each, (M, B); -inf if a datum has no more.
    """

    point: Tensor
    chosen: tuple[Tensor, ...]
    unit: Tensor
    sizes: Tensor
    height: Tensor

    @property
    def number(self) -> Tensor:
        """How many modes each datum has, (B,)."""
        return torch.stack(self.chosen).ge(0).sum(0)

    def rows(self, rows: Tensor) -> Modes:
        """Those of some of the data."""
        chosen = tuple(points[rows] for points in self.chosen)
        return Modes(self.point[:, rows], chosen, self.unit[rows], self.sizes[:, rows], self.height[:, rows])

    def unseen(self, fitted: Fitted | None = None) -> Tensor:
        r"""What modes that no start came to, or that are not kept, may add to log p(x), (B,), in nats.

        .. math:: \log\Bigl(1 + \frac{n - 1}{n} \sum_{\text{alone}} m_i\Bigr)

        is the jackknife's estimate from n starts (Burnham and Overton 1978, for the number of species), where the modes to
        which a single start came have the fractions :math:`m_i` of the mass that was found, by their heights.

        Args:
            fitted: the proposals with a component for each mode that is kept, by which the modes have volumes. A mode that
                the others' components draw is not alone: without it, its mass would have been seen.
        """
        starts, kept, mass = self.sizes.sum(0), len(self.chosen), self.height
        if fitted is not None:
            volume = fitted.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).mT
            mass = mass + torch.cat([volume, volume[:1].expand(len(mass), -1)])[: len(mass)]
        mass = torch.softmax(mass, 0)
        alone = torch.where((self.sizes == 1) & (starts > 1), mass, 0.0)
        if fitted is not None:
            distance = fitted.distances(fitted.loc.transpose(0, 1))  # (M, B, M), of each mode from each component
            distance = torch.where(fitted.shares > 0, distance, math.inf)
            distance.diagonal(dim1=0, dim2=2).fill_(math.inf)
            reached = distance.min(-1).values <= (math.sqrt(fitted.loc.shape[-1]) + BEYOND) ** 2
            alone[: len(reached)] = torch.where(reached, 0.0, alone[: len(reached)])
        missing = torch.log1p((starts - 1) / starts * alone.sum(0))
        return torch.maximum(missing, -torch.log(mass[:kept].sum(0)))


def search(terms: PairTerms, args: Batch, calls: Tensor, known: Modes | None = None) -> Modes:
    """Look for the modes of the posteriors of B data, by ascents from the guide, from its mirror image and from the prior.

    Args:
        terms: the pair.
        args: the data.
        calls: decoder calls of each datum, (B,), which are added to.
        known: what an earlier search of these data has found; with it this search is wider, and goes on from there.
    """
    pair = terms.pair(args)
    how = how_to_search(pair.num_latents)
    if known is not None:
        how = how._replace(from_prior=WIDER_PRIOR, from_guide=WIDER_GUIDE, modes=WIDER_MODES)

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
    first = torch.cat([centre, 2 * prior.mean(0) - centre]) if known is None else known.point
    peaks = climb(gradient, torch.cat([first, guide[: how.from_guide], likely]), unit, STEPS)
    settled = (peaks.left < SETTLED) | (peaks.log_joint >= peaks.log_joint.max(0).values)
    peaks = peaks._replace(log_joint=torch.where(settled, peaks.log_joint, -math.inf))
    chosen, sizes = distinct(peaks, unit, within=how.within, nats=LOWEST_MODE)
    every = torch.stack(chosen)
    height = torch.where(every >= 0, peaks.log_joint.gather(0, every.clamp(min=0)), -math.inf)
    return Modes(peaks.point, tuple(chosen[: how.modes]), unit, sizes, height)


class Found:
    """The modes of a group's data, which are found first by a few starts and, for those that need it, by more.

    Args:
        terms: the pair.
        size: how many data the group has.
    """

    def __init__(self, terms: PairTerms, size: int):
        self.terms = terms
        self.searches: list[tuple[Tensor, Modes]] = []
        self.which = torch.full((size,), -1)  # the last search of each datum
        self.wide = torch.zeros(size, dtype=torch.bool)
        self.unseen = torch.zeros(size, dtype=torch.float64)
        self.number = torch.zeros(size, dtype=torch.long)

    def search(self, rows: Tensor, args: Batch) -> Tensor:
        """Search some data, more widely if they were searched before; the decoder calls that this took of each.

        Args:
            rows: their numbers, ascending; all or none of them were searched before.
            args: the data in these rows.
        """
        calls = torch.zeros(len(rows), dtype=torch.long)
        if not len(rows):
            return calls
        before = int(self.which[rows[0]]) >= 0
        known = None
        if before:
            ((_, known),) = self.of(rows)
        modes = search(self.terms, args, calls, known)
        self.which[rows], self.wide[rows] = len(self.searches), before
        self.unseen[rows], self.number[rows] = modes.unseen().cpu(), modes.number.cpu()
        self.searches.append((rows, modes))
        return calls

    def of(self, rows: Tensor) -> list[tuple[Tensor, Modes]]:
        """The modes of some data, those of one search together."""
        parts = []
        for place in self.which[rows].unique().tolist():
            own = rows[self.which[rows] == place]
            searched, modes = self.searches[place]
            parts.append((own, modes.rows(torch.searchsorted(searched, own))))
        return parts

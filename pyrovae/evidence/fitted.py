"""Mixtures of Student-t distributions that are fitted to the posterior of each datum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fitted", "candidates", "slope_of", "stacked", "tempered", "weighed"]

# Degrees of freedom that are tried, and powers of the likelihood: wider than the posterior is safe, narrower is not.
TAILS, POWERS = (6.0, 30.0, 1000.0), (0.35, 0.5, 0.7, 0.85, 1.0)
# How much smaller, in nats, the second moment of the weights has to be for a lighter tail or a narrower proposal.
WORTH = 0.1
# The fraction of the weights that is even, so that a mode whose mass was underestimated is drawn from too.
EVEN_SHARE = 0.1


class Fitted(NamedTuple):
    r"""For each of B data a mixture of M Student-t distributions over L unconstrained latents, in float64.

    .. math:: u = \mu_{bm} + C_{bm} \epsilon \sqrt{\nu_b / \chi^2_{\nu_b}}, \quad m \sim \alpha_b, \quad \epsilon \sim N(0, I)

    Attributes:
        loc: the means, (B, M, L).
        tril: the lower triangular factors C, (B, M, L, L).
        inverse: their inverses, (B, M, L, L).
        shares: the weights of the components, (B, M); zero for one that a datum does not have.
        df: degrees of freedom, (B,).
    """

    loc: Tensor
    tril: Tensor
    inverse: Tensor
    shares: Tensor
    df: Tensor

    @classmethod
    def of(cls, loc: Tensor, tril: Tensor, shares: Tensor, df: Tensor) -> Fitted:
        """The mixture, with the inverses of its factors."""
        eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device).expand_as(tril)
        return cls(loc, tril, torch.linalg.solve_triangular(tril, eye, upper=False), shares, df)

    def __len__(self) -> int:
        """B, the number of data."""
        return len(self.loc)

    def rows(self, chosen: Tensor) -> Fitted:
        """The mixtures of some of the data, by their numbers."""
        return Fitted(*(part[chosen] for part in self))

    def padded(self, most: int) -> Fitted:
        """With ``most`` components, the further ones of weight zero."""
        missing = most - self.loc.shape[1]
        if missing == 0:
            return self
        loc, tril, inverse = (torch.cat([part, part[:, :1].expand(-1, missing, *part.shape[2:])], 1) for part in self[:3])
        shares = torch.cat([self.shares, torch.zeros_like(self.shares[:, :1]).expand(-1, missing)], 1)
        return Fitted(loc, tril, inverse, shares, self.df)

    def sample(self, num: int) -> Tensor:
        """Draws, (num, B, L)."""
        size, components, latents = self.loc.shape
        noise = torch.randn(size, num, latents, device=self.loc.device).to(self.loc.dtype)
        chi = torch.distributions.Chi2(self.df, validate_args=False).sample((num,)).mT
        noise = noise * (self.df[:, None] / chi).sqrt()[..., None]
        if components == 1:
            return (self.loc + noise @ self.tril[:, 0].mT).transpose(0, 1)
        which = torch.multinomial(self.shares, num, replacement=True)  # (B, num)
        drawn = torch.zeros_like(noise)
        for component in range(components):
            here = self.loc[:, component, None] + noise @ self.tril[:, component].mT
            drawn = torch.where((which == component)[..., None], here, drawn)
        return drawn.transpose(0, 1)

    def distances(self, flat: Tensor) -> Tensor:
        """Squared distance of points (S, B, L) from each component in units of its factor, (S, B, M)."""
        rows = flat.transpose(0, 1)  # (B, S, L)
        parts = []
        for component in range(self.loc.shape[1]):
            white = (rows - self.loc[:, component, None]) @ self.inverse[:, component].mT
            parts.append(white.square().sum(-1).mT)
        return torch.stack(parts, -1)

    def log_parts(self, flat: Tensor) -> Tensor:
        """Log-density of each component at points (S, B, L), without its weight, (S, B, M)."""
        return self._log_parts(self.distances(flat), flat.shape[-1])

    def _log_parts(self, distances: Tensor, latents: int) -> Tensor:
        half = (self.df / 2)[:, None]
        constant = torch.lgamma(half + latents / 2) - torch.lgamma(half) - latents / 2 * torch.log(2 * math.pi * half)
        constant = constant - self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (B, M)
        return constant - (half + latents / 2) * torch.log1p(distances / (2 * half))

    def log_prob(self, flat: Tensor) -> Tensor:
        """Log-density at points (S, B, L), shape (S, B)."""
        return torch.logsumexp(self.log_parts(flat) + self.shares.log(), -1)


def stacked(proposals: Sequence[Fitted]) -> Fitted:
    """The proposals of several data side by side, with as many components as the largest."""
    most = max(proposal.loc.shape[1] for proposal in proposals)
    padded = [proposal.padded(most) for proposal in proposals]
    return Fitted(*(torch.cat(columns) for columns in zip(*padded, strict=True)))


def slope_of(fitted: Fitted, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density at points (S, B, L) and its gradient there, (S, B, L)."""
    rows = flat.transpose(0, 1)
    parts = fitted.log_parts(flat) + fitted.shares.log()
    responsibility = torch.softmax(parts, -1)
    slope = torch.zeros_like(rows)
    for component in range(fitted.loc.shape[1]):
        inverse = fitted.inverse[:, component]
        white = (rows - fitted.loc[:, component, None]) @ inverse.mT
        df = fitted.df[:, None]
        pull = (df + flat.shape[-1]) / (df + white.square().sum(-1)) * responsibility[..., component].mT
        slope = slope - pull[..., None] * (white @ inverse)
    return torch.logsumexp(parts, -1), slope.transpose(0, 1)


def tempered(fitted: Fitted, unit: Tensor, power: float) -> Fitted:
    r"""The mixtures with the data's part of each precision times a power: wider where the data decide, and there alone.

    .. math:: \Sigma_\beta^{-1} = D^{-2} + \beta \, (\Sigma^{-1} - D^{-2})

    Args:
        fitted: the mixtures.
        unit: D, the prior's standard deviations, (B, L).
        power: beta, between 0 and 1.
    """
    if power == 1.0:
        return fitted
    precision = fitted.inverse.mT @ fitted.inverse
    prior = torch.diag_embed(1 / unit.square())[:, None]
    mixed = prior + power * (precision - prior)
    # A lower factor of the inverse by the upper one of the matrix: both matrices reversed.
    reverse = torch.linalg.cholesky(mixed.flip(-1, -2)).flip(-1, -2)
    eye = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device).expand_as(mixed)
    inverse = reverse.mT
    return Fitted(fitted.loc, torch.linalg.solve_triangular(inverse, eye, upper=False), inverse, fitted.shares, fitted.df)


def candidates(fitted: Fitted, unit: Tensor, draws: Tensor, log_joint: Tensor, log_drawn: Tensor) -> Fitted:
    r"""The widths and tails with the least estimated variance of weights, by draws that were scored before.

    .. math:: \hat E_r[w^2] = \frac1S \sum_s \frac{p(x, u_s)^2}{r(u_s) \, r_0(u_s)}, \qquad u_s \sim r_0

    Args:
        fitted: the mixtures.
        unit: the prior's standard deviations, (B, L).
        draws: (S, B, L).
        log_joint: log p(x, u) there, (S, B).
        log_drawn: the log-density of what they were drawn from, r_0, (S, B).
    """
    joint = torch.nan_to_num(log_joint, nan=-math.inf)
    # The few largest weights would decide alone.
    log_w = joint - log_drawn
    log_w = torch.minimum(log_w, torch.logsumexp(log_w, 0) - math.log(len(log_w)) / 2)
    latents = draws.shape[-1]
    least, best = torch.full_like(fitted.df, math.inf), fitted
    for power in POWERS:
        wider = tempered(fitted, unit, power)
        distances = wider.distances(draws)
        for tail in TAILS:
            trial = Fitted(*wider[:-1], torch.full_like(fitted.df, tail))
            log_r = torch.logsumexp(trial._log_parts(distances, latents) + trial.shares.log(), -1)
            second = torch.logsumexp(log_w + joint - log_r, 0)
            better = second < least - WORTH
            least = torch.where(better, second, least)
            best = Fitted(*(_where(better, new, old) for new, old in zip(trial, best, strict=True)))
    return best


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def weighed(fitted: Fitted, draws: Tensor, weights: Tensor) -> Tensor:
    """The components' weights by the posterior mass of each, (B, M); two components at one mode have half its mass each.

    Args:
        fitted: the mixtures; components of weight zero stay out.
        draws: (S, B, L).
        weights: normalised importance weights, (S, B).
    """
    parts = fitted.log_parts(draws) + fitted.shares.log()
    responsibility = torch.nan_to_num(torch.softmax(parts, -1))
    mass = (weights[..., None] * responsibility).sum(0)
    used = (fitted.shares > 0).to(mass.dtype)
    shares = EVEN_SHARE * used / used.sum(-1, keepdim=True) + (1 - EVEN_SHARE) * mass
    return shares / shares.sum(-1, keepdim=True)

"""Proposals: what importance sampling draws from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from ..data.matching import Batch
from ..programs.log_weights import log_weights, prior_weights
from ..programs.sites import Program
from ..programs.unconstrained import UnconstrainedPair
from ..tables import Table, Tabular

__all__ = [
    "Covariance",
    "Draw",
    "Kind",
    "Probe",
    "Refinement",
    "guide_draws",
    "guide_probe",
    "missed_nats",
    "mixture_draws",
    "prior_count",
    "prior_draws",
    "prior_probe",
    "refined_draws",
    "refined_probe",
]

Array = np.ndarray
Draw = Callable[[Batch, int], Tensor]
Kind = Literal["guide", "prior", "mixture", "refined", "auto"]
Covariance = Literal["diagonal", "full"]


@dataclass(frozen=True)
class Refinement(Tabular):
    r"""A mixture of Gaussians for each datum in the unconstrained latent space, each fitted to a mode of its posterior.

    .. math:: u = \mu_{nm} + C_{nm} \epsilon, \quad m \sim \alpha_n, \quad \epsilon \sim N(0, I) \text{ or } t_\nu

    Attributes:
        loc: the means, shape (N, M, L).
        scale_tril: the lower triangular factors C, shape (N, M, L, L).
        shares: the weights of the components, shape (N, M); each row sums to one.
        elbo: the ELBO of the best single Gaussian for each datum, shape (N,), in nats.
        elbo_se: its standard error over draws, shape (N,).
        guide_elbo: the ELBO of the guide, shape (N,).
        guide_elbo_se: its standard error, shape (N,).
        covariance: ``"diagonal"`` or ``"full"``.
        tail_df: degrees of freedom of the Student-t that is drawn from in place of the Gaussian; ``None`` for the Gaussian.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> refinement = pv.refine(vae.model, vae.guide, torch.zeros(5, 9), steps=20, seed=0)
        >>> refinement.amortization_gap.shape
        (5,)
    """

    loc: Array
    scale_tril: Array
    shares: Array
    elbo: Array
    elbo_se: Array
    guide_elbo: Array
    guide_elbo_se: Array
    covariance: Covariance
    tail_df: float | None = None

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.loc)

    def __repr__(self) -> str:
        """One line: what was fitted, and the mean bounds before and after."""
        data, modes, latents = self.loc.shape
        return (
            f"Refinement({data} data, {modes} {self.covariance} Gaussian{'s' if modes > 1 else ''} of {latents} dimensions, "
            f"elbo={np.mean(self.elbo):.4g}, guide_elbo={np.mean(self.guide_elbo):.4g} nats)"
        )

    def table(self) -> Table:
        """The mean bounds of the guide and of the fitted Gaussian, and their difference."""
        rows = [
            [name, f"{np.mean(values):.3f}", f"{np.sqrt(np.sum(np.square(errors))) / len(self):.3f}"]
            for name, values, errors in (
                ("ELBO of the guide", self.guide_elbo, self.guide_elbo_se),
                ("ELBO fitted to each datum", self.elbo, self.elbo_se),
                ("amortisation gap", self.amortization_gap, np.hypot(self.elbo_se, self.guide_elbo_se)),
            )
        ]
        return Table(["nats per datum", "mean", "se MC"], rows, caption=repr(self))

    def to_pandas(self) -> Any:
        """One row for each datum, as a DataFrame: both bounds and their difference, in nats."""
        import pandas

        names = ("elbo", "elbo_se", "guide_elbo", "guide_elbo_se", "amortization_gap")
        frame = pandas.DataFrame({name: getattr(self, name) for name in names})
        frame.index.name = "datum"
        return frame

    def plot(self, ax: Any = None) -> Any:
        """Draw how much each datum's bound gained by the fit: a histogram."""
        from ..plots import gap_histogram

        ax = gap_histogram(self.amortization_gap, ax)
        ax.set_xlabel("fitted bound − guide's bound (nats)")
        return ax

    @property
    def amortization_gap(self) -> Array:
        """ELBO of the refined Gaussian minus that of the guide, shape (N,), in nats.

        The cost of amortisation if the guide's family is the Gaussian that was fitted; a richer guide can make it negative
        (Cremer, Li and Duvenaud 2018).
        """
        return self.elbo - self.guide_elbo

    def rows(self, chosen: Array) -> Refinement:
        """The part for some of the data, by their numbers."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in _PER_DATUM})


_PER_DATUM = ("loc", "scale_tril", "shares", "elbo", "elbo_se", "guide_elbo", "guide_elbo_se")


def guide_draws(model: Program, guide: Program, vectorize: bool, nesting: int) -> Draw:
    """Log-weights of the guide's own draws."""

    def draw(batch: Batch, size: int) -> Tensor:
        weights = log_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        # The parts nearly cancel, so they are added in float64.
        return weights.log_likelihood.double() + weights.log_prior.double() - weights.log_guide.double()

    return draw


def prior_draws(model: Program, vectorize: bool, nesting: int) -> Draw:
    """Log-weights of the prior's draws: their log-likelihoods."""

    def draw(batch: Batch, size: int) -> Tensor:
        weights = prior_weights(
            model, None, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        return weights.log_likelihood.double()

    return draw


class Probe(NamedTuple):
    """Draws that are not the proposal's own, each (M, B), in nats.

    Attributes:
        log_likelihood: the logarithm of what each draw adds to an estimate of p(x): log p(x|z) of draws of the prior, and
            log p(x, z) - log q(z|x) of draws of the guide.
        log_weights: their log-weights under the proposal.
    """

    log_likelihood: Tensor
    log_weights: Tensor


def prior_probe(model: Program, guide: Program, vectorize: bool, nesting: int) -> Callable[[Batch, int], Probe]:
    """What scores draws of the prior under the guide: where it never draws, their log-weights are larger than its own."""

    def probe(batch: Batch, size: int) -> Probe:
        weights = prior_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        log_likelihood = weights.log_likelihood.double()
        return Probe(log_likelihood, log_likelihood + weights.log_prior.double() - weights.log_guide.double())

    return probe


def guide_probe(model: Program, guide: Program, vectorize: bool, nesting: int) -> Callable[[Batch, int], Probe]:
    """What scores draws of the guide under the prior as a proposal, which rarely comes near a narrow posterior."""

    def probe(batch: Batch, size: int) -> Probe:
        weights = log_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        log_likelihood = weights.log_likelihood.double()
        return Probe(log_likelihood + weights.log_prior.double() - weights.log_guide.double(), log_likelihood)

    return probe


def refined_probe(model: Program, guide: Program, refinement: Refinement, vectorize: bool) -> Callable[[Batch, int], Probe]:
    """The same for one batch's refinement."""

    def probe(batch: Batch, size: int) -> Probe:
        pair = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize)
        flat = pair.draw(size, "prior")
        terms = pair.terms(flat)
        log_likelihood, log_prior = terms.log_likelihood.double(), terms.log_prior.double()
        return Probe(
            log_likelihood, log_likelihood + log_prior - _refined_distribution(refinement, pair.device).log_prob(flat.double())
        )

    return probe


def missed_nats(probe: Probe, largest: Tensor, log_px: Tensor, margin: float = 0.0) -> Tensor:
    r"""What draws of the prior add to log p(x) where the weights are larger than any that was drawn, shape (B,), in nats.

    .. math:: \log \left( 1 + \frac{1}{M \hat p(x)} \sum_m p(x \mid z_m) \, 1\{ w(z_m) > \max_s w(z_s) \} \right),
        \qquad z_m \sim p(z)

    The largest term with a finite weight is left out, because a single draw may be a rare one that represents little mass. An
    infinite weight represents what the proposal cannot draw at all. If the proposal covers the posterior, almost nothing is
    beyond its largest weight.

    Args:
        probe: M draws of the prior.
        largest: the largest log-weight of each datum, shape (B,).
        log_px: the estimate, shape (B,).
        margin: nats by which equal log-weights may differ.
    """
    # NaN counts as beyond: it is neither above nor below.
    beyond, never = ~(probe.log_weights <= largest + margin), probe.log_weights == math.inf
    rare = torch.where(beyond & ~never, probe.log_likelihood, -math.inf).sort(0, descending=True).values[1:]
    found = torch.cat([rare, torch.where(never, probe.log_likelihood, -math.inf)])
    log_missed = torch.logsumexp(found, 0) - math.log(len(probe.log_weights))
    return torch.logaddexp(log_missed - log_px, torch.zeros_like(log_px))


def prior_count(num_samples: int, prior_share: float) -> int:
    """How many draws of a mixture come from the prior: at least one, and not all."""
    return min(max(round(prior_share * num_samples), 1), num_samples - 1)


def mixture_draws(
    model: Program, guide: Program, vectorize: bool, nesting: int, num_samples: int, num_prior: int, done: int = 0
) -> Draw:
    r"""Log-weights under the mixture of prior and guide, for one batch, stratified: exact numbers of draws from each.

    .. math:: w = \frac{p(x \mid z) \, p(z)}{\alpha \, p(z) + (1 - \alpha) \, q(z \mid x)} \le \frac{p(x \mid z)}{\alpha}
    """
    prior_fraction = num_prior / num_samples

    def draw(batch: Batch, size: int) -> Tensor:
        nonlocal done
        from_prior = (done + size) * num_prior // num_samples - done * num_prior // num_samples
        done += size
        options: dict[str, Any] = {"vectorize_particles": vectorize, "max_plate_nesting": nesting}
        parts = []
        if from_prior:
            parts.append(prior_weights(model, guide, *batch, num_particles=from_prior, **options))
        if size > from_prior:
            parts.append(log_weights(model, guide, *batch, num_particles=size - from_prior, **options))
        log_w = []
        for part in parts:
            log_prior, log_guide = part.log_prior.double(), part.log_guide.double()
            mixture = torch.logaddexp(log_prior + math.log(prior_fraction), log_guide + math.log1p(-prior_fraction))
            log_w.append(part.log_likelihood.double() + log_prior - mixture)
        return torch.cat(log_w)

    return draw


def refined_draws(model: Program, guide: Program, refinement: Refinement, vectorize: bool) -> Draw:
    """Log-weights of draws from one batch's refinement."""
    pair: UnconstrainedPair | None = None

    def draw(batch: Batch, size: int) -> Tensor:
        nonlocal pair
        pair = pair or UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize)
        distribution = _refined_distribution(refinement, pair.device)
        flat = distribution.sample((size,))  # (size, B, L)
        return pair.log_joint(flat.to(pair.dtype)).double() - distribution.log_prob(flat)

    return draw


def _refined_distribution(refinement: Refinement, device: torch.device) -> Any:
    """The mixture that one batch's refinement draws from, over u (B, L)."""
    fitted = (refinement.loc, refinement.scale_tril, refinement.shares)
    loc, scale_tril, shares = (torch.as_tensor(part, device=device) for part in fitted)
    parts: Any = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
    if refinement.tail_df is not None:
        parts = pyro.distributions.MultivariateStudentT(refinement.tail_df, loc, scale_tril, validate_args=False)
    which = torch.distributions.Categorical(shares, validate_args=False)
    return torch.distributions.MixtureSameFamily(which, parts, validate_args=False)

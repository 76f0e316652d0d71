"""The guide refined for each datum by gradient steps of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from .._validation import positive_integer, unknown
from ..data.matching import Batch
from ..programs.inspect import inspect_pair, open_pair
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.unconstrained import UnconstrainedPair
from .proposals import _PER_DATUM, Array, Covariance, Refinement, guide_draws, refined_draws
from .scope import seeded_evaluation

__all__ = ["RefineOptions", "joined", "refine", "refine_batch", "rows_at_once", "usual_options"]

# Refining keeps a graph of all that the decoder computed, so its chunks hold fewer numbers than a chunk that is only scored.
CHUNK_NUMBERS = 2**20
MOMENT_DRAWS = 64
# Posteriors over so few latents often have several modes, and draws of the prior lie near each.
FEW_LATENTS = 3
# Starts of further components: the likeliest of TOURNAMENT draws of the prior, CANDIDATES times; those far apart are chosen.
TOURNAMENT, CANDIDATES = 8, 32
# The fraction of the weights that is even, so that a mode whose mass was underestimated is drawn from too.
EVEN_SHARE = 0.1


class RefineOptions(NamedTuple):
    """How a refinement is fitted; see :func:`refine`."""

    steps: int = 200
    lr: float = 0.1
    covariance: Covariance = "diagonal"
    objective: Literal["elbo", "iwae"] = "elbo"
    num_particles: int = 16
    num_samples: int = 200
    tail_df: float | None = None
    num_components: int = 1

    def check(self) -> RefineOptions:
        """Refuse what an option cannot be."""
        for name in ("steps", "num_particles", "num_samples", "num_components"):
            positive_integer(getattr(self, name), name)
        if not self.lr > 0:
            raise ValueError(f"lr must be a positive number, got {self.lr!r}.")
        if self.covariance not in ("diagonal", "full"):
            raise ValueError(unknown("covariance", self.covariance, ["diagonal", "full"]))
        if self.objective not in ("elbo", "iwae"):
            raise ValueError(unknown("objective", self.objective, ["elbo", "iwae"]))
        if self.tail_df is not None and not self.tail_df > 0:
            raise ValueError(f"tail_df must be a positive number, or None for Gaussian tails, got {self.tail_df!r}.")
        return self


@in_own_scope()
def refine(
    model: Program,
    guide: Program,
    x: Any,
    *,
    steps: int = 200,
    lr: float = 0.1,
    covariance: Covariance = "diagonal",
    objective: Literal["elbo", "iwae"] = "elbo",
    num_particles: int = 16,
    num_samples: int = 200,
    tail_df: float | None = None,
    num_components: int = 1,
    batch_size: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Refinement:
    r"""Fit a Gaussian, or a mixture of several, to the posterior of each datum by gradient steps of its own.

    .. math:: \max_{\mu_n, C_n} \; E_{q_n(u)} \left[ \log p(x_n, u) - \log q_n(u) \right], \quad q_n = N(\mu_n, C_n C_n^\top)

    in the unconstrained space of the latents, for any pair of Pyro programs with continuous latents, starting from the guide.
    The parameters of the pair do not change. Path gradients are used (`Roeder et al. 2017 <https://arxiv.org/abs/1703.09194>`_),
    which vanish if the Gaussian is the posterior. Steps are Adam's with cosine decay. They are scaled by the prior's standard
    deviation at first, so that a distant start can be reached, and by the fitted Gaussian's at the end.

    A Gaussian has one mode. If the posterior has others that no draw comes near, the estimate is too low, and neither its
    standard error nor k shows that. With ``num_components``, further Gaussians are fitted, from likely draws of the prior that
    are far from each other. Nine tenths of their weights follow the posterior mass of each (Cappe et al. 2008), one tenth is
    even. With a few latents this finds the modes that matter; with many the prior's draws are rarely near one. Then compare the
    estimate with that of a ``"mixture"`` proposal, or with :func:`pyrovae.ais`.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        steps: gradient steps.
        lr: the first learning rate; 200 steps of 0.1 reach some ten of the prior's standard deviations.
        covariance: ``"diagonal"``, or ``"full"`` for L(L+1)/2 numbers per datum.
        objective: ``"elbo"``, or ``"iwae"``, whose Gaussian is wider and better to sample from (by DReG; Tucker et al. 2019).
        num_particles: draws per step, datum and component; a full covariance of many latents takes more than a few.
        num_samples: draws per datum for the ELBOs that are reported.
        tail_df: have ``log_marginal`` draw from a Student-t with these degrees of freedom about the Gaussian, which by itself
            is narrower than the posterior: weights would have infinite variance if latents are correlated. 5 is a wide tail.
        num_components: Gaussians in the mixture for each datum; the first starts from the guide, the others from the prior.
        batch_size: data fitted at once; by default as many as fill about 4 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the fit reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The Gaussians, and the ELBOs of the guide and of the best Gaussian of each datum; give it to
        ``log_marginal(..., proposal=...)`` with the same data.

    Raises:
        ValueError: bad options or data, a latent that is not continuous, or a pair that :func:`pyrovae.log_weights` refuses.

    References:
        `Kim, Wiseman, Miller, Sontag and Rush, Semi-Amortized Variational Autoencoders, 2018
        <https://arxiv.org/abs/1802.02550>`_. `Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders,
        2018 <https://arxiv.org/abs/1801.03558>`_. `Cappe, Douc, Guillin, Marin and Robert, Adaptive importance sampling in
        general mixture classes, 2008 <https://arxiv.org/abs/0710.4242>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> x = torch.zeros(5, 9)
        >>> refinement = pv.refine(vae.model, vae.guide, x, steps=50, covariance="full", seed=0)
        >>> pv.log_marginal(vae.model, vae.guide, x, num_samples=100, proposal=refinement, seed=0).method
        'importance sampling from the guide refined per datum'
    """
    options = RefineOptions(steps, lr, covariance, objective, num_particles, num_samples, tail_df, num_components).check()
    data, first = open_pair(model, guide, x, vectorize_particles=vectorize_particles)
    size = positive_integer(batch_size or rows_at_once(first.info.num_dims, options), "batch_size")
    data.batch_size = first.whole or size
    parts: list[Refinement] = []
    with (
        seeded_evaluation(model, guide, first.device, seed),
        tqdm(data, total=data.num_batches, desc="refine", unit="batch", disable=not progress) as bar,
    ):
        for batch in bar:
            inspect_pair(model, guide, *batch)
            parts.append(refine_batch(model, guide, batch, options, vectorize_particles))
    return joined(parts)


def usual_options(num_latents: int) -> RefineOptions:
    """How ``proposal="refined"`` is fitted: in few dimensions several modes are looked for, by steps of fewer draws."""
    usual = RefineOptions(covariance="full", tail_df=5.0)
    return usual._replace(num_components=8, num_particles=4) if num_latents <= FEW_LATENTS else usual


def joined(parts: list[Refinement]) -> Refinement:
    """The refinement of all data from those of consecutive ones."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_DATUM}
    return Refinement(**arrays, covariance=parts[0].covariance, tail_df=parts[0].tail_df)


def rows_at_once(num_dims: int, options: RefineOptions) -> int:
    """How many data are refined together."""
    return max(1, CHUNK_NUMBERS // (options.num_particles * options.num_components * max(num_dims, 256)))


def refine_batch(model: Program, guide: Program, batch: Batch, options: RefineOptions, vectorize: bool) -> Refinement:
    """Fit one batch and measure both ELBOs."""
    # The data have been checked; a step that goes astray must not raise, it is not taken.
    with pyro.validation_enabled(False):
        pair = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize)
        loc, scale_tril = _fit(pair, options)
        shares, best = _weighed(pair, loc, scale_tril, options)
        rows, none = np.arange(len(loc)), np.zeros(len(loc))
        fitted = Refinement(_array(loc), _array(scale_tril), _array(shares), none, none, none, none, options.covariance)
        found = {name: getattr(fitted, name)[rows, _array(best), None] for name in ("loc", "scale_tril")}
        single = replace(fitted, **found, shares=np.ones((len(loc), 1)))
        best_draw = refined_draws(model, guide, single, vectorize)
        elbos: list[Array] = []
        with torch.no_grad():
            for draw in (best_draw, guide_draws(model, guide, vectorize, pair.nesting)):
                log_w = torch.cat([draw(batch, size) for size in _split(options.num_samples, options.num_particles)])
                elbos += [_array(log_w.mean(0)), _array(log_w.std(0) / math.sqrt(len(log_w)))]
    measured: dict[str, Any] = dict(zip(("elbo", "elbo_se", "guide_elbo", "guide_elbo_se"), elbos, strict=True))
    return replace(fitted, **measured, tail_df=options.tail_df)


def _array(tensor: Tensor) -> Array:
    return tensor.cpu().numpy()


def _split(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _fit(pair: UnconstrainedPair, options: RefineOptions) -> tuple[Tensor, Tensor]:
    """Adam on the mean, log-scales and unit triangular factor of each component, C = diag(exp s) (I + B).

    Returns means (B, M, L) and factors (B, M, L, L); within, components lead.
    """
    start, prior = (
        torch.cat([pair.draw(size, distribution, inside=True) for size in _split(MOMENT_DRAWS, options.num_particles)]).double()
        for distribution in ("guide", "prior")
    )
    prior_scale = prior.std(0).clamp(min=1e-3)  # a point mass has no scale to start from
    loc = torch.stack(_spread(pair, start.mean(0), prior_scale, options.num_components - 1))  # (M, B, L)
    log_scale = start.std(0).clamp(min=1e-3).log().expand_as(loc)
    identity = torch.eye(pair.num_latents, dtype=torch.float64, device=start.device)
    below = torch.zeros(*loc.shape, pair.num_latents, dtype=torch.float64, device=start.device)
    lower = torch.ones_like(identity).tril(-1)
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in (loc, log_scale, below)]
    for step in range(options.steps):
        noise = torch.randn(options.num_particles, *loc.shape, dtype=torch.float64, device=start.device)
        mixed = noise + (below @ noise[..., None])[..., 0]  # (I + B) eps
        scale = log_scale.exp()
        flat = (loc + scale * mixed).to(pair.dtype).requires_grad_()
        with torch.enable_grad():
            log_joint = pair.log_joint(flat.flatten(0, 1)).reshape(flat.shape[:-1])
            (slope,) = torch.autograd.grad(log_joint.sum(), flat)
        # The path's gradient of log p(x, u) - log q(u) at fixed parameters of q, in units of the scale; a draw where the
        # model overflows has none.
        own = torch.linalg.solve_triangular((identity + below).mT, noise[..., None], upper=True)[..., 0]
        ascent = torch.nan_to_num(slope.double() * scale, nan=0.0, posinf=0.0, neginf=0.0) + own
        if options.objective == "iwae":
            log_w = log_joint.detach().double() + noise.square().sum(-1) / 2
            coefficient = torch.softmax(torch.nan_to_num(log_w, nan=-math.inf), 0)
            coefficient = torch.nan_to_num(coefficient).square()[..., None]
        else:
            coefficient = torch.full_like(noise[..., :1], 1 / options.num_particles)
        toward = (coefficient * ascent).sum(0)
        gradients = (
            toward + (below.mT @ toward[..., None])[..., 0],  # with respect to m in u = mu + C m
            (coefficient * ascent * mixed).sum(0),
            torch.einsum("kmbi,kmbj->mbij", coefficient * ascent, noise) * lower,
        )
        rate = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
        moves = [_adam(*pair_of, step + 1) * rate for pair_of in zip(gradients, moments, strict=True)]
        unit = prior_scale * (scale / prior_scale) ** (step / options.steps)
        loc = loc + unit * (moves[0] + (below @ moves[0][..., None])[..., 0])
        log_scale = log_scale + moves[1]
        if options.covariance == "full":
            below = below + moves[2]
    scale_tril = log_scale.exp()[..., None] * (identity + below)
    return loc.transpose(0, 1), scale_tril.transpose(0, 1)


def _spread(pair: UnconstrainedPair, first: Tensor, unit: Tensor, number: int) -> list[Tensor]:
    """Where further components start: likely draws of the prior, each as far from the starts before it as can be, (B, L)."""
    likely = []
    for _ in range(CANDIDATES if number else 0):
        some = pair.draw(TOURNAMENT, "prior")
        winner = torch.nan_to_num(pair.log_joint(some).detach(), nan=-math.inf).argmax(0)
        likely.append(_chosen(some.double(), winner))
    starts = [first]
    for _ in range(number):
        distances = [((torch.stack(likely) - start) / unit).square().sum(-1) for start in starts]
        starts.append(_chosen(torch.stack(likely), torch.stack(distances).amin(0).argmax(0)))
    return starts


def _chosen(points: Tensor, which: Tensor) -> Tensor:
    """Of points (K, B, L) the one of each datum by its number (B,)."""
    return points.gather(0, which[None, :, None].expand_as(points[:1]))[0]


def _weighed(pair: UnconstrainedPair, loc: Tensor, scale_tril: Tensor, options: RefineOptions) -> tuple[Tensor, Tensor]:
    """The components' weights (B, M), and which of them has the highest ELBO (B,).

    A weight is the posterior mass of the component, by importance weights of draws from all components, each multiplied with
    the probability that the component drew it (Cappe et al. 2008). Two components at the same mode have half its mass each.
    """
    parts = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)  # batch (B, M)
    num_data, num_components, _ = loc.shape
    log_joint, log_q = [], []
    with torch.no_grad():
        for size in _split(options.num_samples, options.num_particles):
            flat = parts.sample((size,)).transpose(1, 2)  # (size, M, B, L)
            rows = flat.flatten(0, 1).to(pair.dtype)
            log_joint.append(pair.log_joint(rows).double().reshape(size, num_components, num_data))
            log_q.append(parts.log_prob(flat[..., None, :]))  # (size, M, B, M)
    joint, dense = torch.cat(log_joint), torch.cat(log_q)
    joint = torch.nan_to_num(joint, nan=-math.inf)
    elbo = (joint - dense.diagonal(dim1=1, dim2=3).transpose(1, 2)).mean(0)  # (M, B)
    log_w = joint - torch.logsumexp(dense, -1)
    responsibility = torch.softmax(log_w.flatten(0, 1), 0)[..., None] * torch.softmax(dense, -1).flatten(0, 1)
    responsibility = torch.nan_to_num(responsibility.sum(0), nan=1 / num_components)
    return EVEN_SHARE / num_components + (1 - EVEN_SHARE) * responsibility, elbo.argmax(0)


def _adam(gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    # By hand, since steps are taken in units that change with what they move. The squares are forgotten within some thirty
    # steps: from a guide far off the first gradients are a thousand times the last.
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.03)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.97**step)).sqrt() + 1e-8)

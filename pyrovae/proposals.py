"""Proposals: what importance sampling draws from, and the guide refined for each datum by gradient steps of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from .data import Batch, Batches, arguments
from .pairs import first_run, inspect_pair
from .registry import unknown
from .traces import FlatPair, Program, evaluation_mode
from .weights import log_weights, prior_weights

Array = np.ndarray
Draw = Callable[[Batch, int], Tensor]
Kind = Literal["guide", "prior", "mixture", "refined"]
Covariance = Literal["diagonal", "full"]

METHODS = {
    "guide": "importance sampling",
    "prior": "importance sampling from the prior",
    "mixture": "importance sampling from the mixture of prior and guide",
    "refined": "importance sampling from the guide refined per datum",
}
# Refining keeps a graph of all that the decoder computed, so its chunks hold fewer numbers than a chunk that is only scored.
CHUNK_NUMBERS = 2**20
MOMENT_DRAWS = 64


@dataclass(frozen=True)
class Refinement:
    r"""A Gaussian for each datum in the unconstrained latent space, fitted to its posterior from where the guide put it.

    .. math:: u = \mu_n + C_n \epsilon, \qquad \epsilon \sim N(0, I) \text{ or } t_\nu

    Attributes:
        loc: the means, shape (N, L).
        scale_tril: the lower triangular factors C, shape (N, L, L).
        elbo: the ELBO of the Gaussian for each datum, shape (N,), in nats.
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
    elbo: Array
    elbo_se: Array
    guide_elbo: Array
    guide_elbo_se: Array
    covariance: Covariance
    tail_df: float | None = None

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.loc)

    @property
    def amortization_gap(self) -> Array:
        """ELBO of the refined Gaussian minus that of the guide, shape (N,), in nats.

        What amortisation costs, where the guide's family is the Gaussian that was fitted; a richer guide can make it negative
        (Cremer, Li and Duvenaud 2018).
        """
        return self.elbo - self.guide_elbo

    def rows(self, chosen: Array) -> Refinement:
        """The part for some of the data, by their numbers."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in _PER_DATUM})


_PER_DATUM = ("loc", "scale_tril", "elbo", "elbo_se", "guide_elbo", "guide_elbo_se")


class Options(NamedTuple):
    """How a refinement is fitted; see :func:`refine`."""

    steps: int = 200
    lr: float = 0.1
    covariance: Covariance = "diagonal"
    objective: Literal["elbo", "iwae"] = "elbo"
    num_particles: int = 16
    num_samples: int = 200
    tail_df: float | None = None

    def check(self) -> Options:
        """Refuse what cannot be meant."""
        for name in ("steps", "num_particles", "num_samples"):
            value = getattr(self, name)
            if int(value) != value or value < 1:
                raise ValueError(f"{name} is a positive integer, not {value!r}.")
        if not self.lr > 0:
            raise ValueError(f"lr is a positive number, not {self.lr!r}.")
        if self.covariance not in ("diagonal", "full"):
            raise ValueError(unknown("covariance", self.covariance, ["diagonal", "full"]))
        if self.objective not in ("elbo", "iwae"):
            raise ValueError(unknown("objective", self.objective, ["elbo", "iwae"]))
        if self.tail_df is not None and not self.tail_df > 0:
            raise ValueError(f"tail_df is a positive number, or None for Gaussian tails, not {self.tail_df!r}.")
        return self


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
    batch_size: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Refinement:
    r"""Fit a Gaussian to the posterior of each datum by gradient steps of its own, from where the guide put it.

    .. math:: \max_{\mu_n, C_n} \; E_{q_n(u)} \left[ \log p(x_n, u) - \log q_n(u) \right], \quad q_n = N(\mu_n, C_n C_n^\top)

    in the unconstrained space of the latents, for any pair of Pyro programs with continuous ones. The parameters of the pair
    stay as they are. Gradients follow the path alone (Roeder et al. 2017), so they vanish where the Gaussian is the posterior;
    steps are Adam's, with a learning rate that falls to zero along a cosine, in units of the prior's scale at first, so that a
    guide far off is no obstacle, and of the Gaussian's own in the end.

    A Gaussian has one mode. Where the posterior has others that no draw comes near, the estimate from it is too low, and
    neither its standard error nor k can show that: compare it with a ``"mixture"`` proposal or with :func:`pyrovae.ais`.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        steps: gradient steps.
        lr: the first learning rate; 200 steps of 0.1 reach some ten of the prior's standard deviations.
        covariance: ``"diagonal"``, or ``"full"`` for L(L+1)/2 numbers per datum.
        objective: ``"elbo"``, or ``"iwae"``, whose Gaussian is wider and better to sample from (by DReG; Tucker et al. 2019).
        num_particles: draws per step and datum.
        num_samples: draws per datum for the ELBOs that are reported.
        tail_df: have ``log_marginal`` draw from a Student-t with these degrees of freedom about the Gaussian, which by itself
            is narrower than the posterior: weights would have no variance where latents are correlated. 5 is a wide tail.
        batch_size: data fitted at once; by default as many as fill about 4 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the fit reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The Gaussians and both ELBOs per datum; give it to ``log_marginal(..., proposal=...)`` with the same data.

    Raises:
        ValueError: bad options or data, a latent that is not continuous, or a pair that :func:`pyrovae.log_weights` refuses.

    References:
        Kim, Wiseman, Miller, Sontag and Rush, Semi-Amortized Variational Autoencoders, 2018. Cremer, Li and Duvenaud,
        Inference Suboptimality in Variational Autoencoders, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> x = torch.zeros(5, 9)
        >>> refinement = pv.refine(vae.model, vae.guide, x, steps=50, covariance="full", seed=0)
        >>> pv.log_marginal(vae.model, vae.guide, x, num_samples=100, proposal=refinement, seed=0).method
        'importance sampling from the guide refined per datum'
    """
    options = Options(steps, lr, covariance, objective, num_particles, num_samples, tail_df).check()
    first = first_run(model, guide, *arguments(model, next(iter(Batches(x, batch_size=1)))))
    size = batch_size or rows_at_once(first.info.num_dims, options)
    data = Batches(x, batch_size=size, dtype=first.dtype, device=first.device)
    parts: list[Refinement] = []
    devices = [first.device] if first.device.type == "cuda" else []
    with evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with tqdm(data, total=data.num_batches, desc="refine", unit="batch", disable=not progress) as bar:
            for batch in bar:
                batch = arguments(model, batch)
                inspect_pair(model, guide, *batch)
                parts.append(refine_batch(model, guide, batch, options, vectorize_particles))
    return joined(parts)


def joined(parts: list[Refinement]) -> Refinement:
    """The refinement of all data from those of consecutive ones."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_DATUM}
    return Refinement(**arrays, covariance=parts[0].covariance, tail_df=parts[0].tail_df)


def rows_at_once(num_dims: int, options: Options) -> int:
    """How many data are refined together."""
    return max(1, CHUNK_NUMBERS // (options.num_particles * max(num_dims, 256)))


def refine_batch(model: Program, guide: Program, batch: Batch, options: Options, vectorize: bool) -> Refinement:
    """Fit one batch and measure both ELBOs."""
    # The data have been checked; a step that goes astray must not raise, it is not taken.
    with pyro.validation_enabled(False):
        pair = FlatPair(model, guide, batch, vectorize_particles=vectorize)
        loc, scale_tril = _fit(pair, options)
        empty = np.zeros(len(loc))
        fitted = Refinement(loc, scale_tril, empty, empty, empty, empty, options.covariance)
        refined_draw = refined_draws(model, guide, fitted, vectorize)
        elbos: list[Array] = []
        with torch.no_grad():
            for draw in (refined_draw, guide_draws(model, guide, vectorize, pair.nesting)):
                log_w = torch.cat([draw(batch, size) for size in _split(options.num_samples, options.num_particles)])
                elbos += [log_w.mean(0).cpu().numpy(), (log_w.std(0) / math.sqrt(len(log_w))).cpu().numpy()]
    elbo, elbo_se, guide_elbo, guide_elbo_se = elbos
    return Refinement(loc, scale_tril, elbo, elbo_se, guide_elbo, guide_elbo_se, options.covariance, options.tail_df)


def _split(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _fit(pair: FlatPair, options: Options) -> tuple[Array, Array]:
    """Adam on the mean, log-scales and unit triangular factor of each datum, C = diag(exp s) (I + B)."""
    start, prior = (
        torch.cat([pair.draw(size, law) for size in _split(MOMENT_DRAWS, options.num_particles)]).double()
        for law in ("guide", "prior")
    )
    num_data, num_latents = start.shape[1:]
    loc, log_scale = start.mean(0), start.std(0).clamp(min=1e-3).log()  # a point mass has no scale to start from
    prior_scale = prior.std(0).clamp(min=1e-3)
    identity = torch.eye(num_latents, dtype=torch.float64, device=start.device)
    below = torch.zeros(num_data, num_latents, num_latents, dtype=torch.float64, device=start.device)
    lower = torch.ones_like(identity).tril(-1)
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in (loc, log_scale, below)]
    for step in range(options.steps):
        noise = torch.randn(options.num_particles, num_data, num_latents, dtype=torch.float64, device=start.device)
        mixed = noise + (below @ noise[..., None])[..., 0]  # (I + B) eps
        scale = log_scale.exp()
        flat = (loc + scale * mixed).to(pair.dtype).requires_grad_()
        with torch.enable_grad():
            log_joint = pair.log_joint(flat)
            (slope,) = torch.autograd.grad(log_joint.sum(), flat)
        # The path's gradient of log p(x, u) - log q(u) at fixed parameters of q, in units of the scale; a draw where the
        # model overflows has none.
        own = torch.linalg.solve_triangular((identity + below).mT, noise[..., None], upper=True)[..., 0]
        ascent = torch.nan_to_num(slope.double() * scale, nan=0.0, posinf=0.0, neginf=0.0) + own
        if options.objective == "iwae":
            log_w = log_joint.detach().double() + noise.square().sum(-1) / 2
            share = torch.softmax(torch.nan_to_num(log_w, nan=-math.inf), 0)
            share = torch.nan_to_num(share).square()[..., None]
        else:
            share = torch.full_like(noise[..., :1], 1 / options.num_particles)
        toward = (share * ascent).sum(0)
        gradients = (
            toward + (below.mT @ toward[..., None])[..., 0],  # with respect to m in u = mu + C m
            (share * ascent * mixed).sum(0),
            torch.einsum("kbi,kbj->bij", share * ascent, noise) * lower,
        )
        rate = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
        moves = [_adam(*pair_of, step + 1) * rate for pair_of in zip(gradients, moments, strict=True)]
        unit = prior_scale * (scale / prior_scale) ** (step / options.steps)
        loc = loc + unit * (moves[0] + (below @ moves[0][..., None])[..., 0])
        log_scale = log_scale + moves[1]
        if options.covariance == "full":
            below = below + moves[2]
    scale_tril = log_scale.exp()[..., None] * (identity + below)
    return loc.cpu().numpy(), scale_tril.cpu().numpy()


def _adam(gradient: Tensor, moments: tuple[Tensor, Tensor], step: int) -> Tensor:
    # By hand, since steps are taken in units that change with what they move. The squares are forgotten within some thirty
    # steps: from a guide far off the first gradients are a thousand times the last.
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.03)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.97**step)).sqrt() + 1e-8)


def guide_draws(model: Program, guide: Program, vectorize: bool, nesting: int) -> Draw:
    """Log-weights of the guide's own draws."""

    def draw(batch: Batch, size: int) -> Tensor:
        weights = log_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        return weights.log_weights.double()

    return draw


def prior_draws(model: Program, vectorize: bool, nesting: int) -> Draw:
    """Log-weights of the prior's draws: their log-likelihoods."""

    def draw(batch: Batch, size: int) -> Tensor:
        weights = prior_weights(
            model, None, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        return weights.log_likelihood.double()

    return draw


def prior_count(num_samples: int, prior_share: float) -> int:
    """How many draws of a mixture come from the prior: at least one, and not all."""
    return min(max(round(prior_share * num_samples), 1), num_samples - 1)


def mixture_draws(
    model: Program, guide: Program, vectorize: bool, nesting: int, num_samples: int, num_prior: int, done: int = 0
) -> Draw:
    r"""Log-weights under the mixture of prior and guide, for one batch: exactly as many draws of each as its shares say.

    .. math:: w = \frac{p(x \mid z) \, p(z)}{\alpha \, p(z) + (1 - \alpha) \, q(z \mid x)} \le \frac{p(x \mid z)}{\alpha}
    """
    share = num_prior / num_samples

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
            mixture = torch.logaddexp(log_prior + math.log(share), log_guide + math.log1p(-share))
            log_w.append(part.log_likelihood.double() + log_prior - mixture)
        return torch.cat(log_w)

    return draw


def refined_draws(model: Program, guide: Program, refinement: Refinement, vectorize: bool) -> Draw:
    """Log-weights of draws from one batch's refinement."""
    pair: FlatPair | None = None

    def draw(batch: Batch, size: int) -> Tensor:
        nonlocal pair
        pair = pair or FlatPair(model, guide, batch, vectorize_particles=vectorize)
        loc, scale_tril = (torch.as_tensor(part, device=pair.device) for part in (refinement.loc, refinement.scale_tril))
        law: Any = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
        if refinement.tail_df is not None:
            law = pyro.distributions.MultivariateStudentT(refinement.tail_df, loc, scale_tril, validate_args=False)
        flat = law.sample((size,))  # (size, B, L)
        return pair.log_joint(flat.to(pair.dtype)).double() - law.log_prob(flat)

    return draw

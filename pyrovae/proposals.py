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

from .data import Batch, Batches
from .pairs import first_run, inspect_pair
from .registry import positive_integer, unknown
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
# Posteriors over so few latents often have several modes, and draws of the prior lie near each.
FEW_LATENTS = 3
# Where further components start: of so many draws of the prior the likeliest, so many times over, which then spread out.
TOURNAMENT, CANDIDATES = 8, 32
# What all components share evenly, whatever their weights: a mode that seemed small is drawn from all the same.
EVEN_SHARE = 0.1


@dataclass(frozen=True)
class Refinement:
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


_PER_DATUM = ("loc", "scale_tril", "shares", "elbo", "elbo_se", "guide_elbo", "guide_elbo_se")


class Options(NamedTuple):
    """How a refinement is fitted; see :func:`refine`."""

    steps: int = 200
    lr: float = 0.1
    covariance: Covariance = "diagonal"
    objective: Literal["elbo", "iwae"] = "elbo"
    num_particles: int = 16
    num_samples: int = 200
    tail_df: float | None = None
    num_components: int = 1

    def check(self) -> Options:
        """Refuse what cannot be meant."""
        for name in ("steps", "num_particles", "num_samples", "num_components"):
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
    num_components: int = 1,
    batch_size: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Refinement:
    r"""Fit a Gaussian, or a mixture of several, to the posterior of each datum by gradient steps of its own.

    .. math:: \max_{\mu_n, C_n} \; E_{q_n(u)} \left[ \log p(x_n, u) - \log q_n(u) \right], \quad q_n = N(\mu_n, C_n C_n^\top)

    in the unconstrained space of the latents, for any pair of Pyro programs with continuous ones, from where the guide put it.
    The parameters of the pair stay as they are. Gradients follow the path alone (Roeder et al. 2017), so they vanish where the
    Gaussian is the posterior; steps are Adam's, with a learning rate that falls to zero along a cosine, in units of the prior's
    scale at first, so that a guide far off is no obstacle, and of the Gaussian's own in the end.

    A Gaussian has one mode. Where the posterior has others that no draw comes near, the estimate from it is too low, and
    neither its standard error nor k can show that. With ``num_components`` more Gaussians are fitted, from likely draws of the
    prior that lie far apart, and weighted: nine tenths by the posterior mass that falls to each (Cappe et al. 2008), a tenth
    evenly. With a few latents this finds the modes that matter; with many the prior's draws rarely lie near one: compare the
    estimate with that from a ``"mixture"`` proposal, or with :func:`pyrovae.ais`.

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
            is narrower than the posterior: weights would have no variance where latents are correlated. 5 is a wide tail.
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
        Kim, Wiseman, Miller, Sontag and Rush, Semi-Amortized Variational Autoencoders, 2018. Cremer, Li and Duvenaud,
        Inference Suboptimality in Variational Autoencoders, 2018. Cappe, Douc, Guillin, Marin and Robert, Adaptive importance
        sampling in general mixture classes, 2008.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> x = torch.zeros(5, 9)
        >>> refinement = pv.refine(vae.model, vae.guide, x, steps=50, covariance="full", seed=0)
        >>> pv.log_marginal(vae.model, vae.guide, x, num_samples=100, proposal=refinement, seed=0).method
        'importance sampling from the guide refined per datum'
    """
    options = Options(steps, lr, covariance, objective, num_particles, num_samples, tail_df, num_components).check()
    data = Batches(x, batch_size=1, program=model, ordered=True)
    first = first_run(model, guide, *data.peek())
    data.to(first.dtype, first.device, first.floating)
    data.batch_size = positive_integer(batch_size or rows_at_once(first.info.num_dims, options), "batch_size")
    parts: list[Refinement] = []
    devices = [first.device] if first.device.type == "cuda" else []
    with evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with tqdm(data, total=data.num_batches, desc="refine", unit="batch", disable=not progress) as bar:
            for batch in bar:
                inspect_pair(model, guide, *batch)
                parts.append(refine_batch(model, guide, batch, options, vectorize_particles))
    return joined(parts)


def usual_options(num_latents: int) -> Options:
    """How ``proposal="refined"`` is fitted: in few dimensions several modes are looked for, by steps of fewer draws."""
    usual = Options(covariance="full", tail_df=5.0)
    return usual._replace(num_components=8, num_particles=4) if num_latents <= FEW_LATENTS else usual


def joined(parts: list[Refinement]) -> Refinement:
    """The refinement of all data from those of consecutive ones."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _PER_DATUM}
    return Refinement(**arrays, covariance=parts[0].covariance, tail_df=parts[0].tail_df)


def rows_at_once(num_dims: int, options: Options) -> int:
    """How many data are refined together."""
    return max(1, CHUNK_NUMBERS // (options.num_particles * options.num_components * max(num_dims, 256)))


def refine_batch(model: Program, guide: Program, batch: Batch, options: Options, vectorize: bool) -> Refinement:
    """Fit one batch and measure both ELBOs."""
    # The data have been checked; a step that goes astray must not raise, it is not taken.
    with pyro.validation_enabled(False):
        pair = FlatPair(model, guide, batch, vectorize_particles=vectorize)
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


def _fit(pair: FlatPair, options: Options) -> tuple[Tensor, Tensor]:
    """Adam on the mean, log-scales and unit triangular factor of each component, C = diag(exp s) (I + B).

    Returns means (B, M, L) and factors (B, M, L, L); within, components lead.
    """
    start, prior = (
        torch.cat([pair.draw(size, law, inside=True) for size in _split(MOMENT_DRAWS, options.num_particles)]).double()
        for law in ("guide", "prior")
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
            share = torch.softmax(torch.nan_to_num(log_w, nan=-math.inf), 0)
            share = torch.nan_to_num(share).square()[..., None]
        else:
            share = torch.full_like(noise[..., :1], 1 / options.num_particles)
        toward = (share * ascent).sum(0)
        gradients = (
            toward + (below.mT @ toward[..., None])[..., 0],  # with respect to m in u = mu + C m
            (share * ascent * mixed).sum(0),
            torch.einsum("kmbi,kmbj->mbij", share * ascent, noise) * lower,
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


def _spread(pair: FlatPair, first: Tensor, unit: Tensor, number: int) -> list[Tensor]:
    """Where further components start: likely draws of the prior, each as far from the starts before it as can be, (B, L)."""
    likely = []
    for _ in range(CANDIDATES if number else 0):
        some = pair.draw(TOURNAMENT, "prior")
        winner = torch.nan_to_num(pair.log_joint(some).detach(), nan=-math.inf).argmax(0)
        likely.append(_chosen(some.double(), winner))
    starts = [first]
    for _ in range(number):
        apart = [((torch.stack(likely) - start) / unit).square().sum(-1) for start in starts]
        starts.append(_chosen(torch.stack(likely), torch.stack(apart).amin(0).argmax(0)))
    return starts


def _chosen(points: Tensor, which: Tensor) -> Tensor:
    """Of points (K, B, L) the one of each datum by its number (B,)."""
    return points.gather(0, which[None, :, None].expand_as(points[:1]))[0]


def _weighed(pair: FlatPair, loc: Tensor, scale_tril: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The components' shares (B, M), and which of them has the highest ELBO (B,).

    A share is the posterior mass that falls to the component by importance weights of draws from all of them, each counted by
    how probably it is the component's own (Cappe et al. 2008): two that found the same mode halve it.
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
    share = torch.softmax(log_w.flatten(0, 1), 0)[..., None] * torch.softmax(dense, -1).flatten(0, 1)
    share = torch.nan_to_num(share.sum(0), nan=1 / num_components)
    return EVEN_SHARE / num_components + (1 - EVEN_SHARE) * share, elbo.argmax(0)


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
        # Parts that nearly cancel are brought together in float64.
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
    """Draws of the prior as the proposal sees them, each (M, B), in nats."""

    log_likelihood: Tensor
    log_weights: Tensor


def prior_probe(model: Program, guide: Program, vectorize: bool, nesting: int) -> Callable[[Batch, int], Probe]:
    """What scores draws of the prior under the guide: where it never goes, their log-weights are larger than any it has."""

    def probe(batch: Batch, size: int) -> Probe:
        weights = prior_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        log_likelihood = weights.log_likelihood.double()
        return Probe(log_likelihood, log_likelihood + weights.log_prior.double() - weights.log_guide.double())

    return probe


def refined_probe(model: Program, guide: Program, refinement: Refinement, vectorize: bool) -> Callable[[Batch, int], Probe]:
    """The same for one batch's refinement."""

    def probe(batch: Batch, size: int) -> Probe:
        pair = FlatPair(model, guide, batch, vectorize_particles=vectorize)
        flat = pair.draw(size, "prior")
        terms = pair.terms(flat)
        log_likelihood, log_prior = terms.log_likelihood.double(), terms.log_prior.double()
        return Probe(log_likelihood, log_likelihood + log_prior - _refined_law(refinement, pair.device).log_prob(flat.double()))

    return probe


def missed_nats(probe: Probe, largest: Tensor, log_px: Tensor, margin: float = 0.0) -> Tensor:
    r"""What draws of the prior add to log p(x) where the weights are larger than any that was drawn, shape (B,), in nats.

    .. math:: \log \left( 1 + \frac{1}{M \hat p(x)} \sum_m p(x \mid z_m) \, 1\{ w(z_m) > \max_s w(z_s) \} \right),
        \qquad z_m \sim p(z)

    The largest term of those with a finite weight is left out, since one draw alone may be a rare one that stands for little;
    an infinite weight stands for what the proposal cannot draw at all. A proposal that covers the posterior leaves next to
    nothing beyond its largest weight.

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
        law = _refined_law(refinement, pair.device)
        flat = law.sample((size,))  # (size, B, L)
        return pair.log_joint(flat.to(pair.dtype)).double() - law.log_prob(flat)

    return draw


def _refined_law(refinement: Refinement, device: torch.device) -> Any:
    """The mixture that one batch's refinement draws from, over u (B, L)."""
    fitted = (refinement.loc, refinement.scale_tril, refinement.shares)
    loc, scale_tril, shares = (torch.as_tensor(part, device=device) for part in fitted)
    parts: Any = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
    if refinement.tail_df is not None:
        parts = pyro.distributions.MultivariateStudentT(refinement.tail_df, loc, scale_tril, validate_args=False)
    which = torch.distributions.Categorical(shares, validate_args=False)
    return torch.distributions.MixtureSameFamily(which, parts, validate_args=False)

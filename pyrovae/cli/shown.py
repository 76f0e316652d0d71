"""What a report shows of a trained model and its data, as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from ..evidence.results import Evidence
    from ..models.base import PairModule

__all__ = ["Shown", "baseline", "gather", "least_reliable"]

Array = np.ndarray
NUM_PAIRS, NUM_SAMPLES, NUM_WORST = 10, 48, 10
STEPS, MOST_LATENTS = 9, 6  # images in a row, and rows, of a traversal
MOST_ROWS = 400  # the most rows whose latents are drawn
SPREAD = 2.5  # standard deviations on either side of a traversal's middle


@dataclass(frozen=True)
class Shown:
    """What a page shows beside the evidence; what is ``None`` is left out.

    Attributes:
        originals: data, shape (n, *data_shape).
        reconstructions: their means under the model, of the same shape.
        worst: the rows of the evidence whose estimates are the least reliable.
        worst_originals: these data, shape (len(worst), *data_shape).
        worst_reconstructions: their means under the model.
        samples: means of p(x|z) at draws of the prior, shape (m, *data_shape).
        latents: a point for each datum, shape (M, L).
        labels: classes or numbers of these data, shape (M,).
        prior: draws of the latents from the prior, shape (P, L).
        posterior: draws of the latents given the data, shape (Q, L).
        latent_kl: for each latent the mean KL of its q(z_l|x) from the prior, both taken as normal, in nats, shape (L,).
        traversed: the latents of ``traversal``.
        traversal: means of p(x|z) as one latent moves, shape (len(traversed), steps, *data_shape).
        interpolation: means of p(x|z) between two encodings, shape (lines, steps, *data_shape).
        observed: the data that ``predicted`` repeats, shape (N, D).
        predicted: draws of the data given their latents, shape (M, N, D).
        columns: the names of the D columns of a table; ``None`` for images and for data without names.
        baseline: mean log p(x) of the best independent dimensions, in nats per datum.
    """

    originals: Array | None = None
    reconstructions: Array | None = None
    worst: Array | None = None
    worst_originals: Array | None = None
    worst_reconstructions: Array | None = None
    samples: Array | None = None
    latents: Array | None = None
    labels: Array | None = None
    prior: Array | None = None
    posterior: Array | None = None
    latent_kl: Array | None = None
    traversed: tuple[int, ...] = ()
    traversal: Array | None = None
    interpolation: Array | None = None
    observed: Array | None = None
    predicted: Array | None = None
    columns: Sequence[str] | None = None
    baseline: float | None = None


def gather(
    vae: PairModule,
    inputs: tuple[Tensor, ...],
    evidence: Evidence,
    *,
    labels: Tensor | None = None,
    train: Tensor | None = None,
    columns: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> Shown:
    """Draw and compute what a page shows of a model.

    Args:
        vae: the trained model.
        inputs: what its programs take of the data that were scored, the first of them the data, shape (N, *data_shape).
        evidence: the scores of these data.
        labels: their labels, shape (N,).
        train: training data, shape (M, *data_shape), for the baseline.
        columns: the names of the columns of a table.
        classes: the names of the labels 0, 1, ..., if they have names.
        seed: seeds the draws.
    """
    import torch

    few = tuple(each[:NUM_PAIRS] for each in inputs)
    worst = least_reliable(evidence, NUM_WORST)
    chosen = tuple(each[torch.as_tensor(worst.copy())] for each in inputs)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        found: dict[str, Any] = {
            "originals": few[0],
            "reconstructions": vae.reconstruct(*few),
            "worst_originals": chosen[0],
            "worst_reconstructions": vae.reconstruct(*chosen),
            "samples": vae.examples(NUM_SAMPLES),
            "latents": vae.embed(*inputs),
            "labels": labels,
        }
        found |= _latent_kl(vae, inputs)
        found |= _moves(vae, inputs, found["latents"], found.get("latent_kl"))
    arrays = {name: _array(value) for name, value in found.items() if name != "traversed"}
    if classes and labels is not None and not labels.is_floating_point() and int(labels.max()) < len(classes):
        arrays["labels"] = np.asarray([str(name) for name in classes])[arrays["labels"]]
    arrays |= {"traversed": found.get("traversed", ())} | _drawn(vae, inputs, seed)
    floor = None if train is None else baseline(_array(train), _array(inputs[0]), evidence)
    return Shown(worst=worst, columns=columns, baseline=floor, **arrays)


def least_reliable(evidence: Evidence, number: int) -> Array:
    """The rows of the least reliable estimates, the worst first; of exact answers, the least probable data.

    Unreliable ones come first. Among them and among the others, a larger Pareto k is worse, or fewer effective chains.
    """
    if evidence.is_exact:
        badness = -evidence.log_px
    elif evidence.is_annealed and np.isnan(evidence.khat).all():
        badness = -evidence.ess
    else:
        badness = np.where(np.isnan(evidence.khat), np.inf, evidence.khat)
    return np.lexsort((np.nan_to_num(evidence.log_px, nan=-np.inf), -badness, evidence.reliable))[:number]


def baseline(train: Array | None, test: Array | None, evidence: Evidence) -> float | None:
    """Mean log p(x) of the scored data under independent dimensions fitted to the training data, in nats per datum.

    Whole numbers get the frequencies of their values, with half a count added to each; densities get a normal. ``None`` if the
    evidence is of another kind: of a mixture of both, given a part of the datum, or of missing values.
    """
    measure = evidence.measure
    if train is None or test is None or measure is None or measure.given:
        return None
    train, test = (each.reshape(len(each), -1).astype(float) for each in (train, test[: len(evidence)]))
    whole = measure.mass == test.shape[1] and measure.density == 0
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        return None
    if whole and (train == np.round(train)).all() and (test == np.round(test)).all():
        low = min(train.min(), test.min())
        values = int(max(train.max(), test.max()) - low) + 1
        if values > 1000:
            return None
        total = 0.0
        for seen, held in zip((train - low).astype(int).T, (test - low).astype(int).T, strict=True):
            counts = np.bincount(seen, minlength=values) + 0.5
            total += float(np.log(counts / counts.sum())[held].sum())
        return total / len(test)
    if measure.density == test.shape[1] and measure.mass == 0:
        scale = np.maximum(train.std(0), 1e-6)
        standard = (test - train.mean(0)) / scale
        return float((-0.5 * standard**2 - np.log(scale) - 0.5 * math.log(2 * math.pi)).sum(1).mean())
    return None


def _array(value: Any) -> Any:
    return None if value is None else value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _latent_kl(vae: PairModule, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """For each latent of a VAE with normal marginals, its mean KL from the prior's marginal, taken as normal."""
    from ..encoders import DiagonalNormal, FullCovarianceNormal
    from ..models.vae import VAE

    if not isinstance(vae, VAE) or not isinstance(vae.encoder, DiagonalNormal | FullCovarianceNormal):
        return {}
    q, p = vae.encode(*inputs), vae.prior().sample((4000,))
    loc, variance = p.mean(0), p.var(0)
    if type(vae.prior).__name__ == "StandardNormal":
        loc, variance = loc * 0, variance * 0 + 1
    ratio = q.variance / variance
    kl = 0.5 * (ratio + (q.mean - loc) ** 2 / variance - 1 - ratio.log())
    return {"latent_kl": kl.mean(0)}


def _moves(vae: PairModule, inputs: tuple[Tensor, ...], latents: Tensor, kl: Tensor | None) -> dict[str, Any]:
    """What the data do as one latent moves, and between two encodings, where the latents are all real vectors."""
    import torch
    from pyro.distributions import constraints

    from ..distributions import same_support
    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

    encoder = getattr(vae, "encoder", None)
    free = encoder is None or same_support(encoder.support, constraints.real_vector)
    if not isinstance(vae, VAE | HierarchicalVAE) or not free or len(latents) < 4 or not bool(latents.isfinite().all()):
        return {}
    spread = latents.std(0)
    activity = spread if kl is None or len(kl) != latents.shape[1] else kl
    order = [int(place) for place in activity.argsort(descending=True) if spread[place] > 0.1][:MOST_LATENTS]
    weight = torch.linspace(-SPREAD, SPREAD, STEPS, dtype=latents.dtype, device=latents.device)
    found: dict[str, Any] = {"traversed": tuple(order)}
    if order:
        points = latents[0].expand(len(order), STEPS, -1).clone()
        for row, place in enumerate(order):
            points[row, :, place] = latents[:, place].mean() + weight * spread[place]
        found["traversal"] = vae.decode(points).mean
    if isinstance(vae, VAE):
        ends = torch.linspace(0, 1, NUM_PAIRS, dtype=latents.dtype, device=latents.device)[:, None]
        lines = [latents[start] + ends * (latents[start + 1] - latents[start]) for start in (0, 2)]
        found["interpolation"] = vae.decode(torch.stack(lines)).mean
    return found


def _drawn(vae: PairModule, inputs: tuple[Tensor, ...], seed: int) -> dict[str, Array]:
    """Draws of the latents from the prior and given the data, and of the data given these."""
    import torch

    from ..diagnostics.posterior import posterior_draws

    some = tuple(each[:MOST_ROWS] for each in inputs)
    try:
        draws = posterior_draws(vae.model, vae.guide, some, num_draws=8, num_samples=200, seed=seed)
    except ValueError as error:  # a datum whose weights are all zero has no posterior draws
        print(f"No draws of the posterior on the report: {error}")
        return {}
    found = {
        group: np.concatenate(
            [array.reshape(array.shape[0] * array.shape[1], -1) for array in getattr(draws, group).values()], 1
        )
        for group in ("prior", "posterior")
        if getattr(draws, group).keys() == draws.posterior.keys()
    }
    for site, drawn in draws.posterior_predictive.items():
        if drawn.shape[1:] == tuple(some[0].shape) and site in draws.observed_data:
            found["predicted"] = drawn.reshape(*drawn.shape[:2], -1)
            masked = len(some) > 1 and some[1].dtype == torch.bool and some[1].shape == some[0].shape
            mask = some[1] if masked else None
            known = some[0] if mask is None else some[0].double().masked_fill(~mask, math.nan)
            found["observed"] = _array(known).reshape(len(some[0]), -1)
    return {name: array for name, array in found.items() if np.issubdtype(array.dtype, np.number)}

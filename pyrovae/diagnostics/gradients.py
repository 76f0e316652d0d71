"""Comparison of estimators: bounds, gradient noise, bias and cost on the same pair and data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import numpy as np
import pyro.infer
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.batches import Batches, as_arrays
from ..estimators.base import check_estimator, loss_and_grads, make_estimator, runs_together
from ..evidence.comparison import Comparison, compare
from ..evidence.importance import log_marginal
from ..programs.inspect import FIRST_ROWS, FirstBatch, prepare
from ..programs.log_weights import log_weights
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..training.loop import fit
from ..training.options import FitKeywords, TrainKeywords
from .estimator_comparison import GROUPS, EstimatorComparison
from .posterior import Array

__all__ = ["compare_estimators", "train_estimators"]


@in_own_scope()
def compare_estimators(
    model: Program,
    guide: Program,
    x: Any,
    estimators: Iterable[Any] | Mapping[str, Any],
    *,
    num_draws: int = 100,
    reference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> EstimatorComparison:
    r"""Compare estimators at the pair's present parameters, with common random numbers, on one batch.

    For the gradient draws :math:`g_r` of one group of parameters, the squared norm of the mean is estimated without bias,

    .. math:: \widehat{\|E g\|^2} = \frac{1}{R (R-1)} \sum_{r \ne s} g_r^\top g_s, \qquad
        \mathrm{SNR} = \sqrt{\widehat{\|E g\|^2} / \operatorname{tr} \widehat{\operatorname{Var}}(g)},

    and that of the bias likewise from the paired differences to the reference's draws. A sign-flip test of these differences
    gives the p-value. For the model, the reference is close to the gradient of log p(x). For the guide, objectives differ by
    design (the ELBO's is not IWAE's), so a non-zero bias measures a difference in objective, not an error. Parameters belong to
    the model if log p(x, z) at fixed z depends on them, to the guide if log q(z|x) does, and to both if both do.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: the batch, or a tuple for programs of several arguments.
        estimators: names, tables or instances; a mapping gives each a name for the table.
        num_draws: R, gradient draws of each, at least 10.
        reference: the estimator that the biases are relative to. The default is ``dreg`` with 512 particles, whose gradient for
            the model is close to that of log p(x), or ``vimco`` if a site is not reparameterised.
        seed: draw r of every estimator uses the seed ``seed + r``.
        progress: show bars.

    Returns:
        The comparison. The pair's parameters do not change.

    Raises:
        ValueError: an unknown estimator, one that the pair does not fit, or bad data.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, https://arxiv.org/abs/1802.04537.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> result = pv.compare_estimators(vae.model, vae.guide, torch.ones(20, 9), ["elbo", "iwae"], num_draws=10,
        ...                                reference={"kind": "iwae", "num_particles": 20})
        >>> result.names, result.snr.shape
        (['elbo', 'iwae'], (2, 2))
    """
    if num_draws < 10:
        raise ValueError(f"num_draws must be at least 10, got {num_draws}: fewer do not estimate a variance.")
    named = _make_estimators(estimators)
    ours = [*named.values(), *([] if reference is None else [make_estimator(reference)])]
    together = reference is None or any(map(runs_together, ours))
    data = Batches(as_arrays(x, program=model), batch_size=1)
    data.batch_size = len(data.arrays[0])
    start = prepare(model, guide, data, particles=together, each=False)
    data.to(start.dtype, start.device, start.floating)
    batch = data.arrays
    usual = "vimco" if start.info.not_reparameterized else "dreg"
    against = make_estimator({"kind": usual, "num_particles": 512} if reference is None else reference)
    for estimator in (*named.values(), against):
        check_estimator(estimator, start.info)
    groups = _groups(model, guide, batch, start.parameters)

    def draws(estimator: pyro.infer.ELBO) -> tuple[Array, list[Array]]:
        steps = range(seed, seed + num_draws)
        drawn = [
            _gradients(estimator, model, guide, batch, start, s, groups) for s in tqdm(steps, disable=not progress, leave=False)
        ]
        return np.array([bound for bound, _ in drawn]), [np.stack([g[i] for _, g in drawn]) for i in range(len(GROUPS))]

    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("bound", "bound_se", "norm", "bias", "bias_p", "variance", "snr")}
    with torch.random.fork_rng():
        reference_draws = draws(against)[1]
        for estimator in named.values():
            bounds, gradients = draws(estimator)
            rows["bound"].append(bounds.mean())
            rows["bound_se"].append(bounds.std(ddof=1) / math.sqrt(num_draws))
            judgements = [_judge(own, ref, random) for own, ref in zip(gradients, reference_draws, strict=True)]
            for key in ("norm", "bias", "bias_p", "variance", "snr"):
                rows[key].append([judgement[key] for judgement in judgements])
        seconds = _times(list(named.values()), model, guide, batch, start.parameters)
    arrays = {name: np.array(values) for name, values in rows.items()}
    return EstimatorComparison(
        names=list(named),
        num_particles=np.array([estimator.num_particles for estimator in named.values()]),
        **arrays,
        seconds=seconds,
        snr_per_second=arrays["snr"] / np.sqrt(seconds)[:, None],
        reference=f"{type(against).__name__}, K = {against.num_particles}",
        num_draws=num_draws,
    )


@in_own_scope()
def train_estimators(
    model: Program,
    guide: Program,
    data: Any,
    estimators: Iterable[Any] | Mapping[str, Any],
    *,
    seconds: float,
    held_out: Any,
    num_samples: int = 1000,
    seed: int = 0,
    **fit_options: Unpack[TrainKeywords],
) -> Comparison:
    """Train each estimator from the pair's present parameters for the same time, and compare held-out log p(x).

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        data: training data, as :func:`pyrovae.fit` takes them.
        estimators: names, tables or instances; a mapping gives each a name for the table.
        seconds: training time of each.
        held_out: the data that are scored, by importance sampling.
        num_samples: importance samples per held-out datum.
        seed: the seed of training and scoring, the same for every estimator.
        **fit_options: passed to :func:`pyrovae.fit`.

    Returns:
        The ranking, with paired standard errors. The pair's parameters do not change.

    Raises:
        ValueError: as :func:`pyrovae.fit`, or fewer than two estimators.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae, x = pv.make_vae(9, latent_dim=2, hidden=[16]), torch.ones(50, 9)
        >>> ranking = pv.train_estimators(vae.model, vae.guide, x, ["elbo", "iwae"], seconds=0.1, held_out=x,
        ...                               num_samples=50, progress=False)
        >>> sorted(ranking.names)
        ['elbo', 'iwae']
    """
    named = _make_estimators(estimators)
    if len(named) < 2:
        raise ValueError(f"estimators must be at least two, got {len(named)}.")
    first = prepare(model, guide, Batches(data, FIRST_ROWS, program=model), particles=False, each=False)
    parameters = first.parameters
    start = [parameter.detach().clone() for parameter in parameters]
    results = {}
    for name, estimator in named.items():
        try:
            options: FitKeywords = {
                "epochs": 10**6,
                "seed": seed,
                "estimator": estimator,
                "max_seconds": seconds,
                **fit_options,
            }
            fit(model, guide, data, **options)
            results[name] = log_marginal(model, guide, held_out, num_samples=num_samples, seed=seed)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
    return compare(results)


def _make_estimators(estimators: Iterable[Any] | Mapping[str, Any]) -> dict[str, pyro.infer.ELBO]:
    """The estimators by name, as copies, since some count their steps."""
    if isinstance(estimators, Mapping):
        return {name: copy.copy(make_estimator(spec)) for name, spec in estimators.items()}
    named: dict[str, pyro.infer.ELBO] = {}
    for spec in [estimators] if isinstance(estimators, str) else estimators:
        estimator = copy.copy(make_estimator(spec))
        name = spec if isinstance(spec, str) else spec["kind"] if isinstance(spec, Mapping) else type(estimator).__name__
        while name in named:
            name += "'"
        named[name] = estimator
    if not named:
        raise ValueError("estimators must be at least one, got none: name one.")
    return named


def _groups(model: Program, guide: Program, batch: tuple, parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters of log p(x, z) at fixed z, and those of log q(z|x)."""
    weights = log_weights(model, guide, *batch, num_particles=1, gradients="score")
    groups = []
    for term in (weights.log_likelihood + weights.log_prior, weights.log_guide):
        touched: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if term.requires_grad:
            touched = torch.autograd.grad(term.sum(), parameters, allow_unused=True, retain_graph=True)
        groups.append([parameter for parameter, gradient in zip(parameters, touched, strict=True) if gradient is not None])
    return groups


def _gradients(
    estimator: Any, model: Program, guide: Program, batch: tuple, start: FirstBatch, seed: int, groups: list[list[Tensor]]
) -> tuple[float, list[Array]]:
    """One draw: the bound per datum, and its gradient per datum for each group of parameters as one vector."""
    torch.manual_seed(seed)
    size = start.info.count(batch)
    _clear(start.parameters)
    loss = loss_and_grads(estimator, model, guide, *batch)
    vectors = [
        np.concatenate([np.zeros(0), *(_numpy(p.grad if p.grad is not None else torch.zeros_like(p)) for p in group)]) / -size
        for group in groups
    ]
    _clear(start.parameters)
    return -loss / size, vectors


def _numpy(gradient: Tensor) -> Array:
    return gradient.detach().cpu().numpy().ravel()


def _clear(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _judge(own: Array, reference: Array, random: np.random.Generator) -> dict[str, float]:
    """Signal, noise and bias of one group's draws, each (R, P)."""
    num_draws = len(own)
    signal = math.sqrt(max(0.0, _squared_mean(own @ own.T)))
    variance = float(own.var(0, ddof=1).sum())
    difference = own - reference
    gram = difference @ difference.T
    squared_bias = _squared_mean(gram)
    reference_norm = math.sqrt(max(0.0, _squared_mean(reference @ reference.T)))
    if np.any(gram):
        # Without bias a paired difference and its negative are equally likely, so random signs sample the null distribution.
        signs = random.choice([-1.0, 1.0], size=(999, num_draws))
        null = ((signs @ gram) * signs).sum(1) - np.trace(gram)
        p = (1 + np.sum(null >= gram.sum() - np.trace(gram))) / 1000
    else:
        p = 1.0
    return {
        "norm": signal,
        "bias": math.sqrt(max(0.0, squared_bias)) / reference_norm if reference_norm else math.nan,
        "bias_p": float(p),
        "variance": variance,
        "snr": signal / math.sqrt(variance) if variance else math.inf if signal else math.nan,
    }


def _squared_mean(gram: Array) -> float:
    """An unbiased estimate of the squared norm of the mean, from the draws' Gram matrix."""
    num_draws = len(gram)
    return float((gram.sum() - np.trace(gram)) / (num_draws * (num_draws - 1)))


def _times(estimators: list[Any], model: Program, guide: Program, batch: tuple, parameters: list[Tensor]) -> Array:
    """The median time of each estimator's loss and gradients, measured in turn so that drift affects all of them equally."""
    times = np.zeros((12, len(estimators)))
    for lap in times:
        for e, estimator in enumerate(estimators):
            began = time.perf_counter()
            loss_and_grads(estimator, model, guide, *batch)
            if batch[0].device.type == "cuda":
                torch.cuda.synchronize()
            lap[e] = time.perf_counter() - began
            _clear(parameters)
    return np.median(times[2:], 0)

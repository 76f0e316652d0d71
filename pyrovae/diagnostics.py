"""Diagnostics: what an estimator's gradients are worth, what the bound's gap is made of, and draws from the posterior."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from tqdm import tqdm

from .checks import refuse_no_weights
from .data import Batches, as_arrays
from .estimators import check_estimator, loss_and_grads, make_estimator
from .evidence import Comparison, Draws, Evidence, compare
from .marginal import CHUNK_NUMBERS, log_marginal
from .pairs import FirstRun, first_run, inspect_pair
from .sites import is_factor
from .traces import (
    PARTICLES,
    Program,
    data_plate,
    evaluation_mode,
    latents_of,
    log_prob_of,
    per_datum,
    plates_of,
    sites_of,
    trace_pair,
)
from .training import fit
from .weights import log_weights, read_weights

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Array = np.ndarray

GROUPS = ("model", "guide")
PER_GROUP = ("norm", "bias", "bias_p", "variance", "snr", "snr_per_second")


@dataclass(frozen=True)
class EstimatorComparison:
    r"""Estimators side by side, at one set of parameters and on one batch.

    Arrays are over E estimators, those of gradients over (E, 2), for the parameters of the model and of the guide.

    Attributes:
        names: the estimators.
        num_particles: K of each.
        bound: the mean bound, in nats per datum.
        bound_se: its standard error over draws, in nats per datum.
        norm: Euclidean norm of the mean gradient per datum, the estimate's own noise subtracted.
        bias: norm of the mean difference from the reference's gradient, relative to the reference's norm, noise subtracted.
        bias_p: p-value of no such difference: sign-flip test on the paired draws.
        variance: summed variance of the gradient's coordinates.
        snr: signal-to-noise ratio, norm over the root of the variance.
        seconds: median time of one step's loss and gradients.
        snr_per_second: signal-to-noise ratio of a second's mean gradient, snr / sqrt(seconds).
        reference: what the bias is against.
        num_draws: draws of each gradient.
    """

    names: list[str]
    num_particles: Array
    bound: Array
    bound_se: Array
    norm: Array
    bias: Array
    bias_p: Array
    variance: Array
    snr: Array
    seconds: Array
    snr_per_second: Array
    reference: str
    num_draws: int

    def __str__(self) -> str:
        """A table of 80 columns, two lines for each estimator."""
        width = max(9, *(len(name) for name in self.names))
        head = f"{'estimator':<{width}} {'K':>4} {'bound':>9} {'se':>6} {'ms':>7}"
        lines = [f"{head}  {'of':<5} {'bias':>6} {'p':>5} {'SNR':>7} {'SNR 1s':>7}"]
        for e, name in enumerate(self.names):
            left = f"{name:<{width}} {self.num_particles[e]:>4} {self.bound[e]:>9.3f} {self.bound_se[e]:>6.3f}"
            left += f" {1e3 * self.seconds[e]:>7.2f}"
            for g, group in enumerate(GROUPS):
                bias = "-" if math.isnan(self.bias[e, g]) else f"{self.bias[e, g]:.0%}"
                p = "-" if math.isnan(self.bias_p[e, g]) else f"{self.bias_p[e, g]:.2f}"
                lines.append(
                    f"{left if g == 0 else '':<{len(left)}}  {group:<5} {bias:>6} {p:>5} {self.snr[e, g]:>7.3g} "
                    f"{self.snr_per_second[e, g]:>7.3g}"
                )
        lines.append(f"bound in nats per datum; gradient bias against {self.reference}, paired test's p")
        lines.append(f"SNR = |mean| / sd over {self.num_draws} gradients; SNR 1s: of a second's mean gradient")
        return "\n".join(lines)

    def to_dataset(self) -> xarray.Dataset:
        """The numbers as an xarray ``Dataset`` with dimensions ``estimator`` and ``parameters``."""
        import xarray

        per_estimator = {name: ("estimator", getattr(self, name)) for name in ("num_particles", "bound", "bound_se", "seconds")}
        per_group = {name: (("estimator", "parameters"), getattr(self, name)) for name in PER_GROUP}
        return xarray.Dataset(
            per_estimator | per_group,
            coords={"estimator": self.names, "parameters": list(GROUPS)},
            attrs={"reference": self.reference, "num_draws": self.num_draws, "units": "nats per datum, seconds"},
        )

    def plot(self) -> Figure:
        """Bounds, signal-to-noise ratios and their worth per second, side by side."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 0.9 + 0.42 * len(self.names)), layout="constrained")
        bounds, ratios, worth = figure.subplots(1, 3, sharey=True)
        rows = np.arange(len(self.names))
        bounds.errorbar(self.bound, rows, xerr=1.96 * self.bound_se, fmt="o", color="#333333", capsize=3)
        bounds.set_xlabel("bound (nats per datum)")
        bounds.set_yticks(rows, [f"{name}, K = {k}" for name, k in zip(self.names, self.num_particles, strict=True)])
        bounds.invert_yaxis()
        for ax, values, label in (
            (ratios, self.snr, "signal-to-noise ratio of one gradient"),
            (worth, self.snr_per_second, "of a second's mean gradient"),
        ):
            for g, (group, marker, color) in enumerate(zip(GROUPS, "os", ("#0072B2", "#D55E00"), strict=True)):
                ax.plot(values[:, g], rows, marker, color=color, label=f"{group}'s parameters")
            ax.set_xscale("log")
            ax.set_xlabel(label)
        ratios.legend(frameon=False, fontsize="small")
        for ax in (bounds, ratios, worth):
            ax.grid(axis="y", alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        return figure


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

    For the gradient draws :math:`g_r` of one group of parameters, the squared signal is estimated without the draws' own noise,

    .. math:: \widehat{\|E g\|^2} = \frac{1}{R (R-1)} \sum_{r \ne s} g_r^\top g_s, \qquad
        \mathrm{SNR} = \sqrt{\widehat{\|E g\|^2} / \operatorname{tr} \widehat{\operatorname{Var}}(g)},

    and the bias likewise from the paired differences to the reference's draws; its test flips their signs. For the model the
    reference is nearly the gradient of log p(x). The guide's objectives differ by design (the ELBO's is not IWAE's), so there
    the bias says how far an estimator pulls elsewhere, not that it is wrong. Parameters belong
    to the model if log p(x, z) at fixed z depends on them, to the guide if log q(z|x) does, to both if they are shared.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: the batch, or a tuple for programs of several arguments.
        estimators: names, tables or instances; a mapping gives them names of one's own.
        num_draws: R, gradient draws of each, at least 10.
        reference: the estimator whose gradients the biases are against; by default ``dreg`` with 512 particles, whose model
            gradient is nearly that of log p(x), or ``vimco`` where a site is not reparameterised.
        seed: seeds draw r with ``seed + r`` for every estimator alike.
        progress: show bars.

    Returns:
        The comparison. The pair's parameters are as before.

    Raises:
        ValueError: an unknown estimator, one that the pair does not fit, or bad data.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> result = pv.compare_estimators(vae.model, vae.guide, torch.ones(20, 9), ["elbo", "iwae"], num_draws=10,
        ...                                reference={"kind": "iwae", "num_particles": 20})
        >>> result.names, result.snr.shape
        (['elbo', 'iwae'], (2, 2))
    """
    if num_draws < 10:
        raise ValueError(f"num_draws must be at least 10 to tell a gradient from its noise, not {num_draws}.")
    named = _named(estimators)
    data = Batches(as_arrays(x, program=model), batch_size=1)
    start = first_run(model, guide, *data.arrays)
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
            judged = [_judge(own, ref, random) for own, ref in zip(gradients, reference_draws, strict=True)]
            for key in ("norm", "bias", "bias_p", "variance", "snr"):
                rows[key].append([judgement[key] for judgement in judged])
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
    **fit_options: Any,
) -> Comparison:
    """Train each estimator from the pair's present parameters for the same time, and compare held-out log p(x).

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        data: training data, as :func:`pyrovae.fit` takes them.
        estimators: names, tables or instances; a mapping gives them names of one's own.
        seconds: training time of each.
        held_out: the data that are scored, by importance sampling.
        num_samples: importance samples per held-out datum.
        seed: seeds training and scoring of every estimator alike.
        **fit_options: passed to :func:`pyrovae.fit`.

    Returns:
        The ranking, with paired standard errors. The pair's parameters are as before.

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
    named = _named(estimators)
    if len(named) < 2:
        raise ValueError("A comparison takes at least two estimators.")
    parameters = first_run(model, guide, *Batches(data, 1, program=model).peek()).parameters
    start = [parameter.detach().clone() for parameter in parameters]
    results = {}
    for name, estimator in named.items():
        try:
            fit(model, guide, data, estimator=estimator, max_seconds=seconds, **({"epochs": 10**6, "seed": seed} | fit_options))
            results[name] = log_marginal(model, guide, held_out, num_samples=num_samples, seed=seed)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
    return compare(results)


def _named(estimators: Iterable[Any] | Mapping[str, Any]) -> dict[str, pyro.infer.ELBO]:
    # Copies, because some count their steps.
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
        raise ValueError("There is nothing to compare: name at least one estimator.")
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
    estimator: Any, model: Program, guide: Program, batch: tuple, start: FirstRun, seed: int, groups: list[list[Tensor]]
) -> tuple[float, list[Array]]:
    """One draw: the bound per datum, and the gradient per datum of each group as one vector (of the bound, upwards)."""
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
        # Under no bias a paired difference is as likely as its negative, so flipping signs draws from the null.
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
    """Median time of each estimator's loss and gradients, measured in turn so that drift hits all alike."""
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


@dataclass(frozen=True)
class Decomposition:
    r"""Where the nats between a bound and log p(x) go, and what the latents are used for.

    .. math::
        \log p(x) &= \underbrace{-\text{distortion}(x) - \text{rate}(x)}_{\text{ELBO}(x)}
            + \underbrace{\mathrm{KL}(q(z|x) \,\|\, p(z|x))}_{\text{gap}(x)} \\
        \text{gap}(x) &= \underbrace{\log p(x) - \text{ELBO}^*(x)}_{\text{approximation}}
            + \underbrace{\text{ELBO}^*(x) - \text{ELBO}(x)}_{\text{amortisation}} \\
        \frac1N \sum_n \text{rate}(x_n) &= I_q(x; z) + \mathrm{KL}(q(z) \,\|\, p(z)), \quad q(z) = \frac1N \sum_n q(z|x_n)

    Here ELBO* is that of the guide's family fitted to each datum by itself. Arrays are over N data, in nats.

    Attributes:
        evidence: log p(x), with what tells whether to believe it.
        rate: KL(q(z|x) || p(z)), shape (N,).
        distortion: minus the expected log-likelihood under q(z|x), shape (N,).
        rate_se: the rate's standard error from sampling, shape (N,); zero where the rate has a closed form.
        distortion_se: the distortion's, shape (N,).
        elbo_se: the bound's, shape (N,).
        information: each datum's part of the mutual information, shape (N,). Over these N data it cannot pass log N.
        mean_variances: by continuous site, the variance over data of each dimension's posterior mean.
        refined: ELBO* of each datum, shape (N,), where it was given.
        num_draws: draws per datum of the expectations.
        closed_form: sites whose rate has a closed form.
    """

    evidence: Evidence
    rate: Array
    distortion: Array
    rate_se: Array
    distortion_se: Array
    elbo_se: Array
    information: Array
    mean_variances: dict[str, Array]
    refined: Array | None
    num_draws: int
    closed_form: tuple[str, ...]

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.rate)

    @property
    def elbo(self) -> Array:
        """The evidence lower bound, minus rate minus distortion, shape (N,)."""
        return -self.rate - self.distortion

    @property
    def gap(self) -> Array:
        """An estimate of KL(q(z|x) || p(z|x)), shape (N,); noise may bring it below zero."""
        return self.evidence.log_px - self.elbo

    @property
    def approximation(self) -> Array | None:
        """The part of the gap that the guide's family leaves even where it is fitted to the datum, shape (N,)."""
        return None if self.refined is None else self.evidence.log_px - self.refined

    @property
    def amortisation(self) -> Array | None:
        """The part of the gap that fitting the guide to the datum closes, shape (N,)."""
        return None if self.refined is None else self.refined - self.elbo

    @property
    def mutual_information(self) -> float:
        """I_q(x; z) between these data and their latents, in nats; at most log N."""
        return float(np.mean(self.information))

    @property
    def aggregate_kl(self) -> float:
        """KL(q(z) || p(z)) of the aggregate posterior over these data, in nats: the mean rate less the information."""
        return float(np.mean(self.rate)) - self.mutual_information

    @property
    def active_units(self) -> dict[str, int]:
        """By continuous site, the dimensions whose posterior mean varies over data by more than 0.01 (Burda 2016)."""
        return {name: int((variances > ACTIVE_VARIANCE).sum()) for name, variances in self.mean_variances.items()}

    def rows(self) -> list[tuple[str, float, float, str]]:
        """The table's lines: a name, the mean in nats per datum, its standard error from sampling, and what it is."""

        def error(values: Array) -> float:
            return float(np.sqrt(np.sum(values**2)) / len(self))

        from_data = float(np.std(self.information, ddof=1) / math.sqrt(len(self))) if len(self) > 1 else math.nan
        evidence, nan = self.evidence, math.nan
        noise = math.hypot(evidence.mean_se, error(self.elbo_se))
        limit = "up to " if evidence.drawn is not None else ""
        source = f"estimate, {limit}{evidence.num_samples:,} {'chains' if evidence.is_annealed else 'samples'}"
        rows = [
            ("log p(x)", evidence.mean, evidence.mean_se, "exact" if evidence.is_exact else source),
            ("ELBO", float(np.mean(self.elbo)), error(self.elbo_se), "lower bound, -rate - distortion"),
            ("gap", float(np.mean(self.gap)), noise, "KL(q(z|x) || p(z|x))"),
        ]
        if self.approximation is not None and self.amortisation is not None:
            rows += [
                ("  approximation", float(np.mean(self.approximation)), nan, "left by the guide's family"),
                ("  amortisation", float(np.mean(self.amortisation)), nan, "won by fitting each datum"),
            ]
        most = f"I_q(x; z), at most log N = {math.log(len(self)):.3f}"
        rows += [
            ("rate", float(np.mean(self.rate)), error(self.rate_se), "KL(q(z|x) || p(z))"),
            ("  mutual information", self.mutual_information, from_data, most),
            ("  aggregate KL", self.aggregate_kl, math.hypot(from_data, error(self.rate_se)), "KL(q(z) || p(z))"),
            ("distortion", float(np.mean(self.distortion)), error(self.distortion_se), "-E log p(x|z)"),
        ]
        return rows

    def __str__(self) -> str:
        """A table of 80 columns."""
        lines = [f"{'nats per datum':<20} {'mean':>10} {'se':>7}"]
        for name, mean, error, what in self.rows():
            lines.append(f"{name:<20} {mean:>10.3f} {'-' if math.isnan(error) else f'{error:.3f}':>7}  {what}")
        for name, active in self.active_units.items():
            line = f"active units: {active} of {self.mean_variances[name].size} in {name}"
            lines.append(line if len(line) <= 80 else line[:79] + "…")
        bad = int((~self.evidence.reliable).sum())
        if bad:
            lines.append(f"{bad} of {len(self)} estimates of log p(x) are unreliable, so the gap is too small there")
        return "\n".join(lines)


# Burda's threshold: a unit whose posterior mean varies by less is switched off.
ACTIVE_VARIANCE = 0.01


def decompose(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 1000,
    num_draws: int = 100,
    mixture_draws: int = 1,
    evidence: Evidence | None = None,
    refined: Any = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Decomposition:
    r"""Split the bound's gap, and the rate, of any pair into what they are made of.

    The mutual information is :math:`\frac1N \sum_n E_{q(z|x_n)}[\log q(z|x_n) - \log q(z)]` with the exact mixture
    :math:`q(z) = \frac1N \sum_m q(z|x_m)` over all N data given, which costs N^2 densities. The rate's other part is the rest,
    so the two add up exactly. Rates take the closed form of KL(q || p) where a site has one.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: an array or tensor (N, ...), a tuple of them, a Dataset or a DataLoader; all of it is kept in memory.
        num_samples: S, importance samples per datum for log p(x).
        num_draws: draws per datum for rate, distortion and posterior means, at least 2.
        mixture_draws: draws per datum, of those, at which the mixture is evaluated.
        evidence: log p(x) of these data in this order, where it is known already, by any method.
        refined: the ELBO of a guide fitted to each datum by itself, shape (N,), in nats.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the result reproducible and leaves the global random stream untouched.
        progress: show bars.

    Returns:
        The decomposition, in nats, with arrays over the N data.

    Raises:
        ValueError: bad data, a pair that :func:`pyrovae.log_weights` refuses, or arrays of another length.

    References:
        Hoffman and Johnson, ELBO surgery, 2016. Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders,
        2018. Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. Alemi et al., Fixing a Broken ELBO, 2018.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae, x = pv.make_vae(9, latent_dim=2, hidden=[16]), torch.eye(9)
        >>> parts = pv.decompose(vae.model, vae.guide, x, num_samples=100, seed=0)
        >>> bool(abs(parts.rate.mean() - parts.mutual_information - parts.aggregate_kl) < 1e-9)
        True
    """
    for name, value, least in (("num_draws", num_draws, 2), ("mixture_draws", mixture_draws, 1)):
        if int(value) != value or value < least:
            raise ValueError(f"{name} is an integer of at least {least}, not {value!r}.")
    if mixture_draws > num_draws:
        raise ValueError(f"mixture_draws ({mixture_draws}) are some of the num_draws ({num_draws}): raise the latter.")
    pair = _Pair(model, guide, x, vectorize_particles)
    if evidence is None:
        evidence = log_marginal(
            model,
            guide,
            pair.arrays,
            num_samples=num_samples,
            seed=seed,
            vectorize_particles=vectorize_particles,
            progress=progress,
        )
    refined = None if refined is None else np.asarray(refined, dtype=float)
    for name, given in (("evidence", evidence.log_px), ("refined", refined)):
        if given is not None and np.shape(given) != (pair.num_data,):
            raise ValueError(
                f"{name} has shape {np.shape(given)}, but there are {pair.num_data} data: give one value for each."
            )
    with pair.scoring(None if seed is None else seed + 1):
        parts = [pair.expectations(batch, num_draws, mixture_draws) for batch in pair.batches(num_draws, progress)]
        sites = list(parts[0].latents)
        latents = {site: torch.cat([part.latents[site] for part in parts], 1) for site in sites}
        log_own = torch.cat([part.log_guide for part in parts], 1)
        information = (log_own - pair.log_aggregate(latents, parts[0], progress)).mean(0)
    terms = {name: torch.cat([part.terms[name] for part in parts], 1) for name in parts[0].terms}

    def array(values: Tensor) -> Array:
        return values.double().cpu().numpy()

    return Decomposition(
        evidence=evidence,
        rate=array(terms["rate"][0]),
        distortion=array(terms["distortion"][0]),
        rate_se=array(terms["rate"][1]),
        distortion_se=array(terms["distortion"][1]),
        elbo_se=array(terms["elbo"][1]),
        information=array(information),
        mean_variances={
            name: array(
                _variance(torch.cat([part.means[name] for part in parts]), torch.cat([part.spreads[name] for part in parts]))
            )
            for name in parts[0].means
        },
        refined=refined,
        num_draws=num_draws,
        closed_form=parts[0].closed_form,
    )


def _variance(means: Tensor, spreads: Tensor) -> Tensor:
    """Variance over data (N, ...) of the means, without what their own sampling noise of variance ``spreads`` adds."""
    if len(means) < 2:
        return torch.zeros_like(means[0])
    return (means.double().var(0) - spreads.double().mean(0)).clamp(min=0)


def posterior_draws(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_draws: int = 100,
    num_samples: int = 1000,
    predictive: bool = True,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Draws:
    r"""Draw latents from p(z|x) of every datum, by importance resampling, with all that ArviZ wants beside them.

    Of S samples from the guide, each of the M draws takes one with probability in proportion to its weight p(x, z) / q(z|x),
    with replacement. Samples stream by, so the memory does not grow with S. The draws are as good as the weights: read ``ess``.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: an array or tensor (N, ...), a tuple of them, a Dataset or a DataLoader. Results hold M copies of it.
        num_draws: M, draws per datum.
        num_samples: S, importance samples per datum.
        predictive: also draw the observed sites anew, and everything from the prior.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the draws reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The draws by site; ``to_datatree()`` gives them to ArviZ.

    Raises:
        ValueError: bad data, a pair that :func:`pyrovae.log_weights` refuses, or a datum all of whose weights are zero.

    References:
        Rubin, Using the SIR algorithm to simulate posterior distributions, 1988.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> draws = pv.posterior_draws(vae.model, vae.guide, torch.eye(9), num_draws=20, num_samples=50, seed=0)
        >>> draws.posterior["z"].shape, draws.posterior_predictive["x"].shape
        ((20, 9, 2), (20, 9, 9))
    """
    for name, value in (("num_draws", num_draws), ("num_samples", num_samples)):
        if int(value) != value or value < 1:
            raise ValueError(f"{name} is a positive integer, not {value!r}.")
    pair = _Pair(model, guide, x, vectorize_particles)
    groups: dict[str, dict[str, list[Tensor]]] = {}
    ess: list[Tensor] = []
    with pair.scoring(seed):
        for batch in pair.batches(max(num_draws, num_samples), progress):
            drawn, sizes = pair.resample(batch, num_draws, num_samples)
            if not bool((sizes > 0).all()):
                datum = sum(len(size) for size in ess) + int((~(sizes > 0)).nonzero()[0])
                raise ValueError(
                    f"Datum {datum} has zero weight in all samples, or NaN or infinite ones, so nothing can be resampled: "
                    f"widen the guide, or look where the model overflows."
                )
            if predictive:
                drawn |= pair.predict(batch, drawn["posterior"])
            ess.append(sizes)
            for group, values in drawn.items():
                for site, drawn_values in values.items():
                    groups.setdefault(group, {}).setdefault(site, []).append(drawn_values.cpu())
    joined = {
        group: {site: torch.cat(values, 0 if group == "observed_data" else 1).numpy() for site, values in sites.items()}
        for group, sites in groups.items()
    }
    empty: dict[str, dict[str, Array]] = {"posterior_predictive": {}, "prior": {}, "prior_predictive": {}}
    return Draws(**(empty | joined), ess=torch.cat(ess).cpu().numpy(), num_samples=num_samples)


@dataclass(frozen=True)
class _Expectations:
    """Of one batch: expectations under q(z|x) as (mean, se) over (B,), and what the mixture and active units need."""

    terms: dict[str, Tensor]  # (2, B)
    latents: dict[str, Tensor]  # some of the draws, (k, B, ...)
    log_guide: Tensor  # log q of these at their own datum, (k, B)
    means: dict[str, Tensor]  # posterior means, (B, ...)
    spreads: dict[str, Tensor]  # the variance of their sampling noise, (B, ...)
    closed_form: tuple[str, ...]
    sites: dict[str, dict]  # the guide's, as one run left them
    data: Any


class _Pair:
    """A pair and its data, as the functions above run it: particles left of everything, values of sites as (K, B, ...)."""

    def __init__(self, model: Program, guide: Program, x: Any, vectorize: bool):
        self.model, self.guide, self.vectorize = model, guide, vectorize
        data = Batches(x, batch_size=1, program=model, ordered=True)
        first = first_run(model, guide, *data.peek())
        data.to(first.dtype, first.device, first.floating)
        data.batch_size = 1000
        self.info, self.device, self.dtype = first.info, first.device, first.dtype
        if self.info.scale != 1.0:
            raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
        self.arrays = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
        self.num_data = len(self.arrays[0])
        self.chunk = max(1, CHUNK_NUMBERS // max(self.info.num_dims, 256))
        self.nesting = self.info.max_plate_nesting

    def scoring(self, seed: int | None) -> Any:
        return _scoring(self.model, self.guide, self.device, seed)

    def batches(self, num_samples: int, progress: bool) -> Iterator[tuple]:
        data = Batches(self.arrays, batch_size=max(1, self.chunk // num_samples), dtype=self.dtype, device=self.device)
        for batch in tqdm(data, total=data.num_batches, unit="batch", disable=not progress):
            refuse_no_weights(inspect_pair(self.model, self.guide, *batch).no_weights)
            yield batch

    def sizes(self, total: int, num_data: int) -> Iterator[int]:
        """How many particles run together, until all have."""
        most = max(1, self.chunk // num_data) if self.vectorize else 1
        for start in range(0, total, most):
            yield min(most, total - start)

    def expectations(self, batch: tuple, num_draws: int, mixture_draws: int) -> _Expectations:
        terms: dict[str, list[Tensor]] = {"rate": [], "distortion": [], "elbo": []}
        latents: dict[str, list[Tensor]] = {}
        means: dict[str, list[Tensor]] = {}
        log_guide = []
        for size in self.sizes(num_draws, len(batch[0])):
            traces = trace_pair(self.model, self.guide, batch, {}, size, self.nesting)
            weights = read_weights(traces, size, analytic_kl=True)
            rate = [site.log_guide - site.log_prior if site.kl is None else site.kl for site in weights.sites]
            terms["rate"].append(torch.stack(rate).sum(0).double())
            terms["distortion"].append(-weights.log_likelihood.double())
            terms["elbo"].append(-terms["rate"][-1] - terms["distortion"][-1])
            log_guide.append(weights.log_guide)
            data = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
            sites = {site["name"]: site for site in sites_of(traces.guide) if not site["is_observed"]}
            for name, site in sites.items():
                value = self.rows_of(site, site["value"], data, size)
                latents.setdefault(name, []).append(value)
                if _is_continuous(site):
                    mean = _mean_of(site)
                    means.setdefault(name, []).append(value if mean is None else self.rows_of(site, mean, data, size))
        drawn = {name: torch.cat(parts) for name, parts in terms.items()}
        centres = {name: torch.cat(parts).double() for name, parts in means.items()}
        return _Expectations(
            terms={name: torch.stack([d.mean(0), d.std(0) / math.sqrt(num_draws)]) for name, d in drawn.items()},
            latents={name: torch.cat(parts)[:mixture_draws] for name, parts in latents.items()},
            log_guide=torch.cat(log_guide)[:mixture_draws].double(),
            means={name: centre.mean(0) for name, centre in centres.items()},
            spreads={name: centre.var(0) / num_draws for name, centre in centres.items()},
            closed_form=tuple(site.name for site in weights.sites if site.kl is not None),
            sites=sites,
            data=data,
        )

    def log_aggregate(self, latents: dict[str, Tensor], like: _Expectations, progress: bool) -> Tensor:
        """Log density of every latent under the mixture of all data's guides, shape (k, N)."""
        counts = next(iter(latents.values())).shape[:2]
        flat = {name: value.flatten(0, 1) for name, value in latents.items()}  # (J, ...)
        width = max(1, sum(value[0].numel() for value in flat.values()))
        data = Batches(self.arrays, batch_size=1000, dtype=self.dtype, device=self.device)
        found = []
        together = max(1, CHUNK_NUMBERS // (width * min(1000, self.num_data))) if self.vectorize else 1
        bar = tqdm(range(0, counts.numel(), together), desc="log q(z)", unit="chunk", disable=not progress)
        for start in bar:
            some = {name: value[start : start + together] for name, value in flat.items()}
            size = len(next(iter(some.values())))
            log_sum = torch.full((size,), -math.inf, dtype=torch.float64, device=self.device)
            for batch in data:
                trace = Trace()
                for name, value in some.items():
                    spread = value.unsqueeze(1).expand(size, len(batch[0]), *value.shape[1:])
                    trace.add_node(name, **{**like.sites[name], "value": self.value_of(like.sites[name], spread, like.data)})
                scored = self.run(poutine.replay, self.guide, batch, size, trace)
                sites = latents_of(scored)
                plate = data_plate(sites)
                log_q = torch.stack([per_datum(site, log_prob_of(site), plate, size, self.nesting) for site in sites]).sum(0)
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_q.double(), 1))
            found.append(log_sum - math.log(self.num_data))
        return torch.cat(found).reshape(counts)

    def run(self, wrap: Any, program: Program, batch: tuple, size: int, trace: Trace) -> Trace:
        """A program's trace with particles on the left and some values given."""
        if size > 1:
            program = pyro.plate(PARTICLES, size, dim=-self.nesting - 1)(program)
        return prune_subsample_sites(poutine.trace(wrap(program, trace=trace)).get_trace(*batch))

    def resample(self, batch: tuple, num_draws: int, num_samples: int) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        num_data = len(batch[0])
        log_sum = torch.full((num_data,), -math.inf, dtype=torch.float64, device=self.device)
        log_square = log_sum.clone()
        kept: dict[str, dict[str, Tensor]] = {"posterior": {}, "log_likelihood": {}}
        observed: dict[str, Tensor] = {}
        rows = torch.arange(num_data, device=self.device)
        for size in self.sizes(num_samples, num_data):
            traces = trace_pair(self.model, self.guide, batch, {}, size, self.nesting)
            log_w = read_weights(traces, size).log_weights.double()
            here = torch.logsumexp(log_w, 0)
            log_sum = torch.logaddexp(log_sum, here)
            log_square = torch.logaddexp(log_square, torch.logsumexp(2 * log_w, 0))
            # A draw stays, or moves to this chunk with the chunk's share of all weight so far: at the end it is any sample with
            # its own share of the whole.
            share = torch.where(log_sum == -math.inf, 0.0, torch.exp(here - log_sum))
            moves = torch.rand(num_draws, num_data, dtype=torch.float64, device=self.device) < share
            possible = torch.where(torch.isfinite(here), log_w, torch.zeros_like(log_w))
            chosen = torch.distributions.Categorical(logits=possible.T).sample((num_draws,))  # (M, B)
            sites = [*sites_of(traces.model), *sites_of(traces.guide)]
            data = data_plate(sites)
            values = {
                site["name"]: self.rows_of(site, site["value"], data, size)
                for site in sites_of(traces.guide)
                if not site["is_observed"] and site["name"] in traces.model
            }
            scores = {}
            for site in sites_of(traces.model):
                if site["is_observed"]:
                    scores[site["name"]] = per_datum(site, log_prob_of(site), data, size, self.nesting)
                    if not is_factor(site):
                        observed[site["name"]] = self.rows_of(site, site["value"], data, 1)[0]
            for group, found in (("posterior", values), ("log_likelihood", scores)):
                for name, value in found.items():
                    new = value[chosen, rows]
                    old = kept[group].get(name, new)
                    kept[group][name] = torch.where(moves.reshape(moves.shape + (1,) * (new.dim() - 2)), new, old)
        ess = torch.where(log_sum == -math.inf, 0.0, torch.exp(2 * log_sum - log_square))
        return kept | {"observed_data": observed}, ess

    def predict(self, batch: tuple, posterior: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The observed sites drawn anew at the posterior's latents, and all sites drawn from the model alone."""
        num_draws, num_data = next(iter(posterior.values())).shape[:2]
        found: dict[str, dict[str, list[Tensor]]] = {"posterior_predictive": {}, "prior": {}, "prior_predictive": {}}
        start = 0
        for size in self.sizes(num_draws, num_data):
            like = poutine.trace(self.model).get_trace(*batch)
            data = data_plate(list(sites_of(prune_subsample_sites(like))))
            given = Trace()
            for name, value in posterior.items():
                site = like.nodes[name]
                given.add_node(name, **{**site, "value": self.value_of(site, value[start : start + size], data)})
            start += size
            for trace, after in ((given, True), (Trace(), False)):
                drawn = self.run(poutine.replay, poutine.uncondition(self.model), batch, size, trace)
                for site in sites_of(drawn):
                    seen = "was_observed" in site["infer"]
                    if is_factor(site) or (after and not seen):
                        continue
                    group = "posterior_predictive" if after else "prior_predictive" if seen else "prior"
                    value = self.rows_of(site, site["value"], data, size)
                    found[group].setdefault(site["name"], []).append(value)
        return {group: {name: torch.cat(values) for name, values in sites.items()} for group, sites in found.items()}

    def inner(self, site: dict, data: Any) -> list[int]:
        """Sizes of the plates between particles and event but the data's; 1 where the site is not in one."""
        size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized}
        return [size.get(dim, 1) for dim in range(-self.nesting, 0) if dim != data.dim]

    def rows_of(self, site: dict, value: Tensor, data: Any, size: int) -> Tensor:
        """A site's value as (K, B, ...): the plates inside a datum that hold it, then its event."""
        event = site["fn"].event_dim
        value = value.reshape((1,) * (self.nesting + 1 + event - value.dim()) + value.shape)
        value = value.movedim(data.dim - event, 1)
        inner, shape = self.inner(site, data), value.shape[value.dim() - event :]
        value = value.expand(size, data.size, *inner, *shape)
        return value.reshape(size, data.size, *(n for n in inner if n != 1), *shape)

    def value_of(self, site: dict, rows: Tensor, data: Any) -> Tensor:
        """A value as the site has it, from (K, B, ...); the inverse of :meth:`rows_of`."""
        event = site["fn"].event_dim
        shape = rows.shape[rows.dim() - event :]
        value = rows.reshape(*rows.shape[:2], *self.inner(site, data), *shape).movedim(1, data.dim - event)
        return value.squeeze(0) if len(rows) == 1 else value


@contextmanager
def _scoring(model: Program, guide: Program, device: torch.device, seed: int | None) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _mean_of(site: dict) -> Tensor | None:
    """The mean of a site's distribution in closed form, where it has one."""
    try:
        mean = site["fn"].mean
    except NotImplementedError:  # torch's word for a distribution that declares none, as a flow
        return None
    return mean.expand(site["value"].shape)


def _is_continuous(site: dict) -> bool:
    try:
        return not site["fn"].support.is_discrete
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return site["value"].is_floating_point()

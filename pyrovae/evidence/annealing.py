"""Annealing: log p(x) by annealed importance sampling, and bidirectional Monte Carlo, which brackets it on simulated data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from .._validation import unknown
from ..compile.graph import Staged
from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.checks import refuse_no_weights
from ..programs.coverage import covered_data, joined_flags
from ..programs.inspect import FIRST_ROWS, FirstBatch, inspect_pair, prepare
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.tracing import evaluation_mode
from ..programs.unconstrained import UnconstrainedPair
from ..programs.wake_sleep import simulated_args
from .measure import evidence_fields, scored_data
from .psis import pareto_khat, tail_size
from .results import Evidence

Array = np.ndarray
Start = Literal["prior", "guide"]
Schedule = Literal["sigmoid", "linear"]
# A leapfrog step keeps a graph of all that the decoder computed, so chunks hold fewer numbers than when scoring alone.
CHUNK_NUMBERS = 2**20
SMALLEST_STEP, LARGEST_STEP = 1e-4, 0.5
TUNING_CHAINS, TUNING_WARMUP = 4, 30
STEEPNESS = 4.0
GRADIENTS_TO_COMPILE = 20_000


@in_own_scope()
def ais(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    schedule: Schedule = "sigmoid",
    start: Start = "prior",
    leapfrog_steps: int = 10,
    step_size: float = 0.01,
    target_acceptance: float = 0.65,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Annealed importance sampling: log p(x) of every datum, for any pair with continuous latents.

    .. math:: f_t(u) = f_0(u)^{1 - \beta_t} \, p(x, u)^{\beta_t}, \qquad
        \log w = \sum_{t=1}^T \log \frac{f_t(u_{t-1})}{f_{t-1}(u_{t-1})}, \qquad u_t \sim \mathrm{HMC}(u_{t-1}; f_t)

    The chains go from the prior or from the guide, f_0, to p(x, u), where u are the latents in unconstrained space, through
    one Hamiltonian transition at each of T temperatures. The mean of w over chains is unbiased for p(x), so its logarithm is
    an estimate that lies below log p(x) on average, the less the more temperatures.

    Step sizes are tuned for each temperature and datum by a run of their own, with a few chains, and held in the run that is
    reported: tuned by the chains that they move, they would bias it. They are in units of the standard deviations of f_0,
    grow or shrink towards the target acceptance by 2 % a temperature (more where there are under 500), stay within 0.0001 and
    0.5, and vary at random by up to a fifth.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        num_chains: K, independent chains for every datum.
        num_temperatures: T, steps from f_0 to the joint.
        schedule: ``"sigmoid"`` spends more temperatures at both ends; ``"linear"`` is even.
        start: ``"prior"``, which needs nothing of the guide, or ``"guide"``.
        leapfrog_steps: gradients per transition.
        step_size: where tuning starts.
        target_acceptance: what tuning aims at.
        chunk_size: (chain, datum) pairs moved at once; by default as many as fill about 4 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: compile the gradient (:mod:`pyrovae.compile`); ``"auto"`` does so where there are 20,000 or more of them, and
            else only captures it without Pyro's handlers; ``False`` runs the pair as it is each time.
        seed: makes the estimate reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The evidence, in nats: ``se`` and ``ess`` are those of the K chain weights, ``elbo`` is the mean of log w, a lower bound
        on average, and ``khat`` is ``nan`` with fewer than 25 chains: then ``reliable`` goes by ``ess``, the effective chains.

    Raises:
        ValueError: bad options or data, a latent that is not continuous, or ``start="guide"`` with a flow that cannot be
            inverted.

    References:
        Neal, Annealed Importance Sampling, 2001. Wu, Burda, Salakhutdinov and Grosse, On the Quantitative Analysis of
        Decoder-Based Generative Models, 2017.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> evidence = pv.ais(vae.model, vae.guide, torch.zeros(3, 9), num_chains=8, num_temperatures=20, seed=0)
        >>> evidence.method, evidence.log_px.shape
        ('AIS from the prior, 20 temperatures', (3,))
    """
    path = _Path(start, _betas(schedule, num_temperatures), leapfrog_steps, step_size, target_acceptance)
    path.check(num_chains, compile)
    data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
    first = prepare(model, guide, data, vectorize_particles=vectorize_particles)
    if start == "guide":
        refuse_no_weights(first.info.no_weights)
    data.to(first.dtype, first.device, first.floating)
    data.batch_size = first.whole or _rows(chunk_size, num_chains, first)
    gradient = _Gradient(path.backend(compile, data.num_batches, ways=1))
    parts: list[Tensor] = []
    covered: list[Tensor | None] = []
    notes: list[dict[str, np.ndarray]] = []
    with _quietly(model, guide, first, seed), _bar(data.num_batches, path, "AIS", progress) as bar:
        for batch in data:
            notes.append(scored_data(inspect_pair(model, guide, *batch), batch))
            if start == "guide":
                covered.append(covered_data(model, guide, batch, **first.info.layout, vectorize=vectorize_particles))
            with pyro.validation_enabled(False):
                pair = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize_particles)
                field = _Field(pair, start, gradient)
                parts.append(path.forward(field, num_chains, path.tune(field, num_chains, bar), bar))
            bar.set_postfix_str(f"{float(torch.cat([_log_mean(part) for part in parts]).mean()):.2f} nats/datum")
    log_w = torch.cat(parts, 1)  # (K, N)
    estimate, se, share = _reduce(log_w)
    tail = torch.topk(log_w, tail_size(num_chains), dim=0).values.T.cpu().numpy()
    return Evidence(
        log_px=estimate.cpu().numpy(),
        se=se.cpu().numpy(),
        ess=torch.where(estimate == -math.inf, 0.0, 1 / share).cpu().numpy(),
        khat=pareto_khat(tail, num_chains, precision=torch.finfo(first.dtype).eps),
        elbo=log_w.mean(0).cpu().numpy(),
        num_samples=num_chains,
        **evidence_fields(notes, first.info.given),
        method=f"AIS from the {start}, {num_temperatures} temperatures",
        covered=joined_flags(covered),
    )


@dataclass(frozen=True)
class Sandwich:
    """Bounds on log p(x) from both sides, for data simulated from the model, in nats.

    Attributes:
        lower: by AIS forwards, below log p(x) on average, shape (N,).
        upper: by AIS backwards from the latents that made the data, above log p(x) on average, shape (N,).
        lower_se: standard error of ``lower`` over chains, shape (N,).
        upper_se: that of ``upper``, shape (N,); its chains share their start, which it does not count.
        num_chains: K.
        num_temperatures: T.
        num_dims: D, observed numbers per datum.
        start: where the forward chains start.
        data: the simulated data, one array for each argument of the programs.
    """

    lower: Array
    upper: Array
    lower_se: Array
    upper_se: Array
    num_chains: int
    num_temperatures: int
    num_dims: int
    start: str
    data: tuple[Array, ...]

    def __len__(self) -> int:
        """N, the number of simulated data."""
        return len(self.lower)

    @property
    def gap(self) -> float:
        """Mean upper minus mean lower bound, in nats per datum: no estimate in between errs by more, on average."""
        return float(np.mean(self.upper - self.lower))

    @property
    def gap_se(self) -> float:
        """Standard error of :attr:`gap` over the simulated data and their chains; ``nan`` for one datum."""
        if len(self) < 2:
            return math.nan
        return float(np.std(self.upper - self.lower, ddof=1) / math.sqrt(len(self)))

    def summary(self) -> str:
        """The findings in words, with what they mean and what they do not."""
        return (
            f"BDMC on {len(self)} data simulated from the model ({self.num_chains} chains, {self.num_temperatures} "
            f"temperatures, from the {self.start}): log p(x) lies between {np.mean(self.lower):.3f} and "
            f"{np.mean(self.upper):.3f} nats per datum on average; the gap is {self.gap:.3f} with standard error "
            f"{self.gap_se:.3f}. It bounds the error of AIS with these settings on such data; real data that the model does "
            f"not fit may be harder."
        )


@in_own_scope()
def bdmc(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_data: int = 100,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    schedule: Schedule = "sigmoid",
    start: Start = "prior",
    leapfrog_steps: int = 10,
    step_size: float = 0.01,
    target_acceptance: float = 0.65,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    progress: bool = False,
) -> Sandwich:
    r"""Bidirectional Monte Carlo: how far AIS with these settings can be from log p(x), on data simulated from the model.

    .. math:: E \log \hat p_{\mathrm{forward}}(x) \le \log p(x) \le E \log \hat p_{\mathrm{reverse}}(x), \qquad
        \hat p_{\mathrm{reverse}}(x)^{-1} = \frac1K \sum_k w_k^{-1}

    A pair (z, x) drawn from the model has z as an exact draw of p(z|x). Chains that start there and cool backwards, through the
    same transitions in reverse order, give weights whose inverse is unbiased for 1/p(x). So the mean of the upper estimate lies
    above, that of the lower one below, and the gap between them bounds both errors. Both hold on average over runs, for
    simulated data only: for real data, which no exact draw of the posterior comes with, the gap says what to expect of
    these settings if the data were the model's.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: any data that the pair takes; what the model observes is replaced by its own draws, and only the rest counts, such
            as covariates. Its rows are repeated where there are fewer than ``num_data``.
        num_data: N, how many data are simulated.
        num_chains: K, chains in each direction for every datum.
        num_temperatures: T, as all that follow: see :func:`ais`.
        schedule: how temperatures are spaced.
        start: where the forward chains start and the reverse ones end.
        leapfrog_steps: gradients per transition.
        step_size: where tuning starts.
        target_acceptance: what tuning aims at.
        chunk_size: (chain, datum) pairs moved at once.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: compile the gradient (:mod:`pyrovae.compile`); ``"auto"`` does so where there are 20,000 or more of them, and
            else only captures it without Pyro's handlers; ``False`` runs the pair as it is each time.
        seed: makes the result reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        Both bounds for each simulated datum, in nats, and the data.

    Raises:
        ValueError: as :func:`ais`; also where an observed value is not one of the programs' arguments, so that data cannot be
            simulated in its place, or where a ``pyro.factor`` makes the model one that cannot be simulated.

    References:
        Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015. Wu, Burda,
        Salakhutdinov and Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> sandwich = pv.bdmc(vae.model, vae.guide, torch.zeros(1, 9), num_data=20, num_temperatures=30, seed=0)
        >>> sandwich.data[0].shape, sandwich.gap > -3 * sandwich.gap_se
        ((20, 9), True)
    """
    path = _Path(start, _betas(schedule, num_temperatures), leapfrog_steps, step_size, target_acceptance)
    path.check(num_chains, compile)
    if int(num_data) != num_data or num_data < 1:
        raise ValueError(f"num_data must be a positive integer, got {num_data!r}.")
    data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
    first = prepare(model, guide, data, vectorize_particles=vectorize_particles)
    if start == "guide":
        refuse_no_weights(first.info.no_weights)
    data.to(first.dtype, first.device, first.floating)
    data.batch_size = num_data
    like = _rows_of(data, num_data)
    forward, backward = [], []
    simulated: list[Batch] = []
    batches = Batches(like, batch_size=_rows(chunk_size, num_chains, first), dtype=first.dtype, device=first.device)
    gradient = _Gradient(path.backend(compile, batches.num_batches, ways=2))
    with _quietly(model, guide, first, seed), _bar(batches.num_batches, path, "BDMC", progress, ways=2) as bar:
        for batch in batches:
            trace, latents = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize_particles).simulate()
            shown = simulated_args(trace, batch)
            inspect_pair(model, guide, *shown)
            with pyro.validation_enabled(False):
                pair = UnconstrainedPair(model, guide, shown, vectorize_particles=vectorize_particles)
                field = _Field(pair, start, gradient)
                steps = path.tune(field, num_chains, bar)
                forward.append(path.forward(field, num_chains, steps, bar))
                backward.append(path.backward(field, latents.expand(num_chains, -1, -1), steps, bar))
            simulated.append(shown)
    lower, lower_se, _ = _reduce(torch.cat(forward, 1))
    upper, upper_se, _ = _reduce(-torch.cat(backward, 1))
    return Sandwich(
        lower=lower.cpu().numpy(),
        upper=-upper.cpu().numpy(),
        lower_se=lower_se.cpu().numpy(),
        upper_se=upper_se.cpu().numpy(),
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        num_dims=first.info.num_dims,
        start=start,
        data=tuple(torch.cat(columns).cpu().numpy() for columns in zip(*simulated, strict=True)),
    )


class _Tuned(NamedTuple):
    """What moves the chains, settled before they run."""

    steps: list[Tensor]  # for each temperature (B,), in units of the spread
    spread: Tensor  # (B, L)


class _State(NamedTuple):
    """Chains, and what is known where they stand."""

    flat: Tensor  # (K, B, L)
    log_start: Tensor  # (K, B), log f_0
    log_ratio: Tensor  # (K, B), log p(x, u) - log f_0


class _Gradient:
    """What one leapfrog step computes, captured once for all chunks of data of one shape."""

    def __init__(self, backend: str):
        self.staged = Staged(self._run, backend)
        self.field: _Field | None = None

    def __call__(self, field: _Field, flat: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        self.field = field
        return self.staged(flat, beta, *field.pair.args)

    def _run(self, flat: Tensor, beta: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        assert self.field is not None
        field = _Field(self.field.pair.on(args), self.field.start, self)
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            state = field.at(flat)
            log_f = state.log_start + beta * state.log_ratio
            (slope,) = torch.autograd.grad(log_f.sum(), flat)
        return state.log_start.detach(), state.log_ratio.detach(), log_f.detach(), slope


class _Field(NamedTuple):
    """One chunk of data with the start's density and the joint's over its latents."""

    pair: UnconstrainedPair
    start: Start
    gradient: _Gradient

    def at(self, flat: Tensor) -> _State:
        """The chains' state at ``flat`` (K, B, L)."""
        terms = self.pair.terms(flat, guide=self.start == "guide")
        if terms.log_guide is None:
            return _State(flat, terms.log_prior.double(), terms.log_likelihood.double())
        log_start = terms.log_guide.double()
        return _State(flat, log_start, terms.log_joint.double() - log_start)

    def slope(self, flat: Tensor, beta: float) -> tuple[_State, Tensor, Tensor]:
        """The state at ``flat``, log f there (K, B), and its gradient (K, B, L)."""
        at = torch.tensor(beta, dtype=torch.float64, device=flat.device)
        log_start, log_ratio, log_f, slope = self.gradient(self, flat, at)
        return _State(flat, log_start, log_ratio), log_f, slope


@dataclass(frozen=True)
class _Path:
    """The way from the start to the joint, and the transitions along it."""

    start: Start
    betas: list[float]  # T + 1, from 0 to 1
    leapfrog_steps: int
    step_size: float
    target_acceptance: float

    def backend(self, compile: bool | str, num_batches: int | None, ways: int) -> str:
        """What the gradient is staged with."""
        gradients = (num_batches or 1) * (ways + 1) * len(self.betas) * (self.leapfrog_steps + 1)
        if compile == "auto":
            return "inductor" if gradients >= GRADIENTS_TO_COMPILE else "aten"
        return "inductor" if compile else "eager"

    def check(self, num_chains: int, compile: bool | str) -> None:
        """Refuse what cannot be meant."""
        if compile not in (True, False, "auto"):
            raise ValueError(f'compile is True, False or "auto", not {compile!r}.')
        if self.start not in ("prior", "guide"):
            raise ValueError(unknown("start", self.start, ["prior", "guide"]))
        for name, value in [("num_chains", num_chains), ("leapfrog_steps", self.leapfrog_steps)]:
            if int(value) != value or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if not SMALLEST_STEP <= self.step_size <= LARGEST_STEP:
            raise ValueError(f"step_size lies between {SMALLEST_STEP} and {LARGEST_STEP}, not {self.step_size!r}.")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance!r}.")

    def forward(self, field: _Field, num_chains: int, tuned: _Tuned, bar: tqdm) -> Tensor:
        """log w of chains from the start to the joint, (K, B)."""
        with torch.no_grad():
            state = field.at(field.pair.draw(num_chains, self.start))
        log_w = torch.zeros_like(state.log_ratio)
        for t in range(1, len(self.betas)):
            log_w = log_w + (self.betas[t] - self.betas[t - 1]) * state.log_ratio
            if t < len(self.betas) - 1:
                state, _ = self._move(field, state, self.betas[t], tuned.steps[t], tuned.spread)
            bar.update()
        return log_w

    def backward(self, field: _Field, flat: Tensor, tuned: _Tuned, bar: tqdm) -> Tensor:
        """log w of chains from draws of the posterior back to the start, by the same transitions in reverse order, (K, B)."""
        with torch.no_grad():
            state = field.at(flat)
        log_w = torch.zeros_like(state.log_ratio)
        for t in reversed(range(1, len(self.betas))):
            # The first one leaves p(z|x) as it is, and takes the chains apart.
            state, _ = self._move(field, state, self.betas[t], tuned.steps[t], tuned.spread)
            log_w = log_w + (self.betas[t] - self.betas[t - 1]) * state.log_ratio
            bar.update()
        return log_w

    def tune(self, field: _Field, num_chains: int, bar: tqdm) -> _Tuned:
        """Step sizes from chains that are then thrown away, and the spread of the start."""
        with torch.no_grad():
            draws = torch.cat([field.pair.draw(num_chains, self.start) for _ in range(math.ceil(64 / num_chains))])
            spread = draws.double().std(0).clamp(min=1e-6)
            state = field.at(draws[: min(num_chains, TUNING_CHAINS)])
        step = torch.full((field.pair.num_data,), self.step_size, dtype=torch.float64, device=field.pair.device)
        steps = [step]

        def adapt(step: Tensor, beta: float, change: float) -> tuple[_State, Tensor]:
            moved, acceptance = self._move(field, state, beta, step, spread)
            step = torch.where(acceptance > self.target_acceptance, step * (1 + change), step * (1 - change))
            return moved, step.clamp(SMALLEST_STEP, LARGEST_STEP)

        # By 2 % it would take 200 temperatures from where they start to where they belong, and few temperatures fall fast.
        change = min(0.2, max(0.02, 10 / (len(self.betas) - 1)))
        for _ in range(TUNING_WARMUP):
            state, step = adapt(step, self.betas[1], 0.2)
        for beta in self.betas[1:]:
            state, step = adapt(step, beta, change)
            steps.append(step)
            bar.update()
        return _Tuned(steps, spread)

    def _move(self, field: _Field, state: _State, beta: float, step: Tensor, spread: Tensor) -> tuple[_State, Tensor]:
        """One Hamiltonian transition that leaves f at ``beta`` as it is; and the mean acceptance of each datum (B,)."""
        stride = (step[:, None] * spread).to(state.flat.dtype)
        # Trajectories of one length could come back to where they started, for ever.
        stride = stride * (0.8 + 0.4 * torch.rand_like(state.flat[..., :1]))
        _, log_f, slope = field.slope(state.flat, beta)
        momentum = torch.randn_like(state.flat)
        before = log_f - momentum.double().square().sum(-1) / 2
        flat, new = state.flat, state
        for _ in range(self.leapfrog_steps):
            momentum = momentum + stride / 2 * slope
            flat = flat + stride * momentum
            new, log_f, slope = field.slope(flat, beta)
            momentum = momentum + stride / 2 * slope
        after = log_f - momentum.double().square().sum(-1) / 2
        # Where the trajectory left for infinity, it is not taken.
        acceptance = torch.nan_to_num((after - before).clamp(max=0).exp(), nan=0.0)
        taken = torch.rand_like(acceptance) < acceptance
        kept = [torch.where(taken, there, here) for there, here in zip(new[1:], state[1:], strict=True)]
        return _State(torch.where(taken[..., None], new.flat, state.flat), *kept), acceptance.mean(0)


def _betas(schedule: str, num_temperatures: int) -> list[float]:
    if int(num_temperatures) != num_temperatures or num_temperatures < 1:
        raise ValueError(f"num_temperatures must be a positive integer, got {num_temperatures!r}.")
    even = np.linspace(0, 1, int(num_temperatures) + 1)
    if schedule == "linear":
        return even.tolist()
    if schedule != "sigmoid":
        raise ValueError(unknown("schedule", schedule, ["linear", "sigmoid"]))
    curve = np.tanh(STEEPNESS * (2 * even - 1) / 2)  # a sigmoid, moved so that it is odd about the middle
    return ((curve / curve[-1] + 1) / 2).tolist()


def _reduce(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log of the mean weight, its standard error by the delta method, and the sum of squared normalised weights, each (N,)."""
    num = len(log_w)
    log_sum = torch.logsumexp(log_w, 0)
    share = torch.exp(torch.logsumexp(2 * log_w, 0) - 2 * log_sum)
    variance = (share - 1 / num).clamp(min=0) * num / (num - 1) if num > 1 else share * math.nan
    return log_sum - math.log(num), variance.sqrt(), share


def _log_mean(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def _rows(chunk_size: int | None, num_chains: int, first: FirstBatch) -> int:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}.")
    return max(1, (chunk_size or CHUNK_NUMBERS // max(first.info.num_dims, 256)) // num_chains)


def _rows_of(data: Batches, num: int) -> Batch:
    """The first rows of any data, again from the first where there are fewer."""
    kept: list[Batch] = []
    for batch in data:
        kept.append(batch)
        if sum(len(part[0]) for part in kept) >= num:
            break
    columns = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    order = torch.arange(num, device=columns[0].device) % len(columns[0])
    return tuple(column[order] for column in columns)


@contextmanager
def _quietly(model: Program, guide: Program, first: FirstBatch, seed: int | None) -> Iterator[None]:
    devices = [first.device] if first.device.type == "cuda" else []
    with evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _bar(num_batches: int | None, path: _Path, what: str, progress: bool, ways: int = 1) -> tqdm:
    total = None if num_batches is None else num_batches * (ways + 1) * (len(path.betas) - 1)
    return tqdm(total=total, desc=what, unit="temperature", disable=not progress)

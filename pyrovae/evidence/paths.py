"""Chains of Hamiltonian transitions through densities between a start and the joint p(x, u)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..compile.graph import Staged
from ..data.batches import Batches
from ..programs.checks import refuse_no_weights
from ..programs.inspect import FirstBatch, open_pair
from ..programs.sites import Program
from ..programs.unconstrained import UnconstrainedPair
from .annealing_options import LARGEST_STEP, SMALLEST_STEP, AnnealingOptions, Start
from .scope import seeded_evaluation

__all__ = ["AnnealingPath", "AnyField", "ChainState", "Field", "FieldGradient", "TunedSteps", "annealing", "prepare_annealing"]

# Chains that tune the step sizes, and transitions before the first temperature.
TUNING_CHAINS, TUNING_WARMUP = 4, 30


class TunedSteps(NamedTuple):
    """How far the chains move, which is decided before they run."""

    steps: list[Tensor]  # for each temperature (B,), in units of ``scale``
    scale: Tensor  # (B, L), standard deviations of the start


class ChainState(NamedTuple):
    """The chains' positions, and the log-densities there."""

    flat: Tensor  # (K, B, L)
    log_start: Tensor  # (K, B), log f_0
    log_ratio: Tensor  # (K, B), log p(x, u) - log f_0


class FieldGradient:
    """The gradient that a leapfrog step takes, captured once for all chunks of data of one shape."""

    def __init__(self, backend: str):
        self.staged = Staged(self._run, backend)
        self.field: Field | None = None

    def __call__(self, field: Field, flat: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """Log f_0 and the log-ratio, log f at ``beta``, and its gradient, at ``flat`` (K, B, L)."""
        self.field = field
        return self.staged(flat, beta, *field.pair.args)

    def _run(self, flat: Tensor, beta: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        assert self.field is not None
        field = Field(self.field.pair.on(args), self.field.start, self)
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            state = field.at(flat)
            log_f = state.log_start + beta * state.log_ratio
            (slope,) = torch.autograd.grad(log_f.sum(), flat)
        return state.log_start.detach(), state.log_ratio.detach(), log_f.detach(), slope


class Field(NamedTuple):
    """One chunk of data with the start's density and the joint's over its latents."""

    pair: UnconstrainedPair
    start: Start
    gradient: FieldGradient

    def draw(self, num: int) -> Tensor:
        """Draws of the start, (num, B, L)."""
        return self.pair.draw(num, self.start)

    def at(self, flat: Tensor) -> ChainState:
        """The chains' state at ``flat`` (K, B, L)."""
        terms = self.pair.terms(flat, guide=self.start == "guide")
        if terms.log_guide is None:
            return ChainState(flat, terms.log_prior.double(), terms.log_likelihood.double())
        log_start = terms.log_guide.double()
        return ChainState(flat, log_start, terms.log_joint.double() - log_start)

    def slope(self, flat: Tensor, beta: float) -> tuple[ChainState, Tensor, Tensor]:
        """The state at ``flat``, log f there (K, B), and its gradient (K, B, L)."""
        at = torch.tensor(beta, dtype=torch.float64, device=flat.device)
        log_start, log_ratio, log_f, slope = self.gradient(self, flat, at)
        return ChainState(flat, log_start, log_ratio), log_f, slope


class AnyField(Protocol):
    """What chains move in: a start and the joint."""

    def draw(self, num: int) -> Tensor:
        """Draws of the start, (num, B, L)."""

    def at(self, flat: Tensor) -> ChainState:
        """The chains' state at ``flat`` (K, B, L)."""

    def slope(self, flat: Tensor, beta: float) -> tuple[ChainState, Tensor, Tensor]:
        """The state at ``flat``, log f there (K, B), and its gradient (K, B, L)."""


@dataclass(frozen=True)
class AnnealingPath:
    """The densities between the start and the joint, and the transitions along them."""

    options: AnnealingOptions
    betas: list[float]  # T + 1, from 0 to 1

    @property
    def num_gradients(self) -> int:
        """Gradients of all chains of a datum, with those that tune the steps."""
        each = self.options.leapfrog_steps + 1
        tuning = min(self.options.num_chains, TUNING_CHAINS) * (TUNING_WARMUP + len(self.betas) - 1)
        return each * (tuning + self.options.num_chains * (len(self.betas) - 2))

    def forward(self, field: AnyField, tuned: TunedSteps, bar: tqdm) -> Tensor:
        """log w of chains from the start to the joint, (K, B)."""
        with torch.no_grad():
            state = field.at(field.draw(self.options.num_chains))
        log_w = torch.zeros_like(state.log_ratio)
        for t in range(1, len(self.betas)):
            log_w = log_w + (self.betas[t] - self.betas[t - 1]) * state.log_ratio
            if t < len(self.betas) - 1:
                state, _ = self._move(field, state, self.betas[t], tuned.steps[t], tuned.scale)
            bar.update()
        return log_w

    def backward(self, field: AnyField, flat: Tensor, tuned: TunedSteps, bar: tqdm) -> Tensor:
        """log w of chains from draws of the posterior back to the start, by the same transitions in reverse order, (K, B)."""
        with torch.no_grad():
            state = field.at(flat)
        log_w = torch.zeros_like(state.log_ratio)
        for t in reversed(range(1, len(self.betas))):
            # The first transition leaves p(z|x) invariant, and separates the chains, which start at one point.
            state, _ = self._move(field, state, self.betas[t], tuned.steps[t], tuned.scale)
            log_w = log_w + (self.betas[t] - self.betas[t - 1]) * state.log_ratio
            bar.update()
        return log_w

    def tune(self, field: AnyField, bar: tqdm) -> TunedSteps:
        """Step sizes from chains of their own, which are discarded, and the scale of the start."""
        num_chains = self.options.num_chains
        with torch.no_grad():
            draws = torch.cat([field.draw(num_chains) for _ in range(math.ceil(64 / num_chains))])
            scale = draws.double().std(0).clamp(min=1e-6)
            state = field.at(draws[: min(num_chains, TUNING_CHAINS)])
        step = torch.full((draws.shape[1],), self.options.step_size, dtype=torch.float64, device=draws.device)
        steps = [step]

        def adapt(step: Tensor, beta: float, change: float) -> tuple[ChainState, Tensor]:
            moved, acceptance = self._move(field, state, beta, step, scale)
            step = torch.where(acceptance > self.options.target_acceptance, step * (1 + change), step * (1 - change))
            return moved, step.clamp(SMALLEST_STEP, LARGEST_STEP)

        # At 2 % a temperature it takes about 200 temperatures to reach a good step size, so with few temperatures it is more.
        change = min(0.2, max(0.02, 10 / (len(self.betas) - 1)))
        for _ in range(TUNING_WARMUP):
            state, step = adapt(step, self.betas[1], 0.2)
        for beta in self.betas[1:]:
            state, step = adapt(step, beta, change)
            steps.append(step)
            bar.update()
        return TunedSteps(steps, scale)

    def _move(self, field: AnyField, state: ChainState, beta: float, step: Tensor, scale: Tensor) -> tuple[ChainState, Tensor]:
        """One Hamiltonian transition that leaves f at ``beta`` invariant, and the mean acceptance of each datum (B,)."""
        stride = (step[:, None] * scale).to(state.flat.dtype)
        # Trajectories of a fixed length could return to their starting point each time.
        stride = stride * (0.8 + 0.4 * torch.rand_like(state.flat[..., :1]))
        _, log_f, slope = field.slope(state.flat, beta)
        momentum = torch.randn_like(state.flat)
        before = log_f - momentum.double().square().sum(-1) / 2
        flat, new = state.flat, state
        for _ in range(self.options.leapfrog_steps):
            momentum = momentum + stride / 2 * slope
            flat = flat + stride * momentum
            new, log_f, slope = field.slope(flat, beta)
            momentum = momentum + stride / 2 * slope
        after = log_f - momentum.double().square().sum(-1) / 2
        # A trajectory that diverged is rejected.
        acceptance = torch.nan_to_num((after - before).clamp(max=0).exp(), nan=0.0)
        taken = torch.rand_like(acceptance) < acceptance
        kept = [torch.where(taken, there, here) for there, here in zip(new[1:], state[1:], strict=True)]
        return ChainState(torch.where(taken[..., None], new.flat, state.flat), *kept), acceptance.mean(0)


def prepare_annealing(model: Program, guide: Program, x: Any, options: AnnealingOptions) -> tuple[Batches, FirstBatch]:
    """The data, and what the first run of the pair settled.

    Raises:
        ValueError: the data, or a guide without a density that chains shall start from.
    """
    data, first = open_pair(model, guide, x, vectorize_particles=options.vectorize_particles)
    if options.start == "guide":
        refuse_no_weights(first.info.no_weights)
    return data, first


@contextmanager
def annealing(
    model: Program, guide: Program, first: FirstBatch, num_batches: int | None, options: AnnealingOptions, directions: int
) -> Iterator[tqdm]:
    """Evaluation mode, the seed's random stream, and a progress bar over temperatures."""
    total = None if num_batches is None else num_batches * (directions + 1) * options.num_temperatures
    name = "AIS" if directions == 1 else "BDMC"
    with (
        seeded_evaluation(model, guide, first.device, options.seed),
        tqdm(total=total, desc=name, unit="temperature", disable=not options.progress) as bar,
    ):
        yield bar

"""Bidirectional Monte Carlo, which brackets log p(x) on data simulated from the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyro
import torch

from .._validation import positive_integer
from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.inspect import inspect_pair
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.unconstrained import UnconstrainedPair
from ..programs.wake_sleep import simulated_args
from ..tables import Table, Tabular
from .annealing_options import AnnealingOptions, Schedule, Start
from .paths import AnnealingPath, Field, FieldGradient, annealing, prepare_annealing
from .psis import Array
from .streaming import Estimate, LogMoments

__all__ = ["Sandwich", "bdmc"]


@dataclass(frozen=True)
class Sandwich(Tabular):
    """Bounds on log p(x) from both sides, for data simulated from the model, in nats.

    Attributes:
        lower: by AIS forwards, below log p(x) on average, shape (N,).
        upper: by AIS backwards from the latents that made the data, above log p(x) on average, shape (N,).
        lower_se: standard error of ``lower`` over chains, shape (N,).
        upper_se: that of ``upper``, shape (N,); it ignores that all chains of a datum start at one point.
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

    def __repr__(self) -> str:
        """One line: the mean bounds and their gap."""
        return (
            f"Sandwich(lower={np.mean(self.lower):.4g}, upper={np.mean(self.upper):.4g} nats, {len(self)} simulated data, "
            f"{self.num_chains} chains, {self.num_temperatures} temperatures)"
        )

    def table(self) -> Table:
        """The mean bounds and their gap."""
        rows = [
            [name, f"{np.mean(values):.3f}", f"{error:.3f}"]
            for name, values, error in (
                ("upper bound", self.upper, np.sqrt(np.sum(self.upper_se**2)) / len(self)),
                ("lower bound", self.lower, np.sqrt(np.sum(self.lower_se**2)) / len(self)),
                ("gap", self.upper - self.lower, self.gap_se),
            )
        ]
        return Table(["nats per datum", "mean", "se"], rows, caption="BDMC on simulated data", notes=[self.summary()])

    def to_pandas(self) -> Any:
        """One row for each simulated datum, as a DataFrame: both bounds with their standard errors, in nats."""
        import pandas

        names = ("lower", "lower_se", "upper", "upper_se")
        frame = pandas.DataFrame({name: getattr(self, name) for name in names})
        frame.index.name = "datum"
        return frame

    def plot(self, ax: Any = None) -> Any:
        """Draw the upper minus the lower bound of each simulated datum: a histogram."""
        from ..plots import gap_histogram

        ax = gap_histogram(self.upper - self.lower, ax)
        ax.set_xlabel("upper − lower bound (nats)")
        return ax

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

    If (z, x) is drawn from the model, z is an exact draw from p(z|x). Chains that start there and go back to f_0, through the
    same transitions in reverse order, give weights whose inverse is unbiased for 1/p(x). So the upper estimate lies above
    log p(x) on average, the lower one below, and the gap between them bounds both errors. This holds for simulated data only.
    For real data there is no exact draw from the posterior, and the gap says what to expect of these settings if the model were
    true.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`. What the model observes is replaced by its own draws; only the rest is
            used, such as covariates. Rows are repeated if there are fewer than ``num_data``.
        num_data: N, how many data are simulated.
        num_chains: K, chains in each direction for every datum.
        num_temperatures: T; this and all that follow as in :func:`pyrovae.ais`.
        schedule: how temperatures are spaced.
        start: where the forward chains start and the reverse ones end.
        leapfrog_steps: gradients per transition.
        step_size: initial value of the tuning.
        target_acceptance: acceptance probability that tuning aims at.
        chunk_size: (chain, datum) pairs moved at once.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: compile the gradient (:mod:`pyrovae.compile`). ``"auto"`` compiles if there are 20,000 or more gradients, and
            otherwise only captures it without Pyro's handlers; ``False`` runs the programs each time.
        seed: makes the result reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        Both bounds for each simulated datum, in nats, and the data.

    Raises:
        ValueError: as :func:`pyrovae.ais`; also if an observed value is not one of the programs' arguments, so that data cannot
            replace it, or if the model has a ``pyro.factor``, so that it cannot be simulated.

    References:
        `Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo, 2015
        <https://arxiv.org/abs/1511.02543>`_. `Wu, Burda, Salakhutdinov and Grosse, On the
        Quantitative Analysis of Decoder-Based Generative Models, 2017 <https://arxiv.org/abs/1611.04273>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> sandwich = pv.bdmc(vae.model, vae.guide, torch.zeros(1, 9), num_data=20, num_temperatures=30, seed=0)
        >>> sandwich.data[0].shape, sandwich.gap > -3 * sandwich.gap_se
        ((20, 9), True)
    """
    options = AnnealingOptions(
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        schedule=schedule,
        start=start,
        leapfrog_steps=leapfrog_steps,
        step_size=step_size,
        target_acceptance=target_acceptance,
        chunk_size=chunk_size,
        vectorize_particles=vectorize_particles,
        compile=compile,
        seed=seed,
        progress=progress,
    )
    return _bracket(model, guide, x, positive_integer(num_data, "num_data"), options)


def _bracket(model: Program, guide: Program, x: Any, num_data: int, options: AnnealingOptions) -> Sandwich:
    """Both bounds of :func:`bdmc`."""
    data, first = prepare_annealing(model, guide, x, options)
    data.batch_size = num_data
    size = options.rows(first.info.num_dims)
    batches = Batches(_first_rows(data, num_data), batch_size=size, dtype=first.dtype, device=first.device)
    path, gradient = AnnealingPath(options, options.betas), FieldGradient(options.backend(batches.num_batches, directions=2))
    lower: list[Estimate] = []
    upper: list[Estimate] = []
    simulated: list[Batch] = []
    with annealing(model, guide, first, batches.num_batches, options, directions=2) as bar:
        for batch in batches:
            trace, latents = UnconstrainedPair(model, guide, batch, vectorize_particles=options.vectorize_particles).simulate()
            args = simulated_args(trace, batch)
            inspect_pair(model, guide, *args)
            with pyro.validation_enabled(False):
                pair = UnconstrainedPair(model, guide, args, vectorize_particles=options.vectorize_particles)
                field = Field(pair, options.start, gradient)
                steps = path.tune(field, bar)
                lower.append(LogMoments.of(path.forward(field, steps, bar)).finish())
                reverse = path.backward(field, latents.expand(options.num_chains, -1, -1), steps, bar)
                upper.append(LogMoments.of(-reverse).finish())
            simulated.append(args)
    return Sandwich(
        lower=np.concatenate([part.log_px for part in lower]),
        upper=-np.concatenate([part.log_px for part in upper]),
        lower_se=np.concatenate([part.se for part in lower]),
        upper_se=np.concatenate([part.se for part in upper]),
        num_chains=options.num_chains,
        num_temperatures=options.num_temperatures,
        num_dims=first.info.num_dims,
        start=options.start,
        data=tuple(torch.cat(columns).cpu().numpy() for columns in zip(*simulated, strict=True)),
    )


def _first_rows(data: Batches, num: int) -> Batch:
    """The first rows of the data, repeated from the first if there are fewer."""
    parts: list[Batch] = []
    for batch in data:
        parts.append(batch)
        if sum(len(part[0]) for part in parts) >= num:
            break
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = torch.arange(num, device=columns[0].device) % len(columns[0])
    return tuple(column[order] for column in columns)

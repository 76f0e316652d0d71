"""Evidence: log p(x) with what tells whether to believe it, and comparisons of several; the only ArviZ import."""

from __future__ import annotations

import importlib
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import checkpoint

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

Array = np.ndarray

# Fewer samples leave under five in the tail, too few for a Pareto fit.
FEWEST_SAMPLES = 25
# Effective chains of an annealing, below which nothing agrees with anything.
LEAST_CHAINS = 4
# Nats that rounding, and two quadratures, may leave in doubt.
GRIDS_AGREE = 0.01
# Nats by which log-weights may differ and still be called constant, whatever the rounding of their terms.
CONSTANT = 0.01
# Nats by which rounding, or what the proposal missed, may move an estimate that can be believed.
NEGLIGIBLE = 0.05


class Measure(NamedTuple):
    """What log p(x) is with respect to: only numbers that share it can be compared.

    Attributes:
        density: observed numbers per datum that have a density.
        mass: observed numbers per datum that have a probability.
        given: what of the datum itself the likelihood conditions on, such as its total.
    """

    density: float
    mass: float
    given: tuple[str, ...] = ()

    def agrees(self, other: Measure) -> bool:
        """Whether numbers by this and the other can be compared."""
        return self.given == other.given and all(
            math.isclose(own, its, rel_tol=1e-9) for own, its in zip(self[:2], other[:2], strict=True)
        )

    def __str__(self) -> str:
        """In words, as "a density over 784 numbers given the total"."""
        named = {"a density over": self.density, "a probability of": self.mass}
        parts = [f"{words} {number:g} number{'' if number == 1 else 's'}" for words, number in named.items() if number]
        return (" and ".join(parts) or "of no numbers") + (f" given {' and '.join(self.given)}" if self.given else "")


@dataclass(frozen=True)
class Curve:
    """How the estimate of log p(x) rises with the number of samples: the first K of each datum's S, for several K.

    Attributes:
        num_samples: K, ascending up to S, shape (C,). A datum that stopped before K samples stays where it stopped.
        log_px: the estimate of each datum from its first K samples, in nats, shape (C, N).
        se: its Monte Carlo standard error, shape (C, N). From one sample it is the distance to the datum's mean log-weight,
            which says little of one datum but has the right mean square over many.
    """

    num_samples: Array
    log_px: Array
    se: Array

    @property
    def mean(self) -> Array:
        """The mean estimate over data for each K, in nats per datum, shape (C,)."""
        return np.mean(self.log_px, 1)

    @property
    def mean_se(self) -> Array:
        """Monte Carlo standard error of :attr:`mean`, shape (C,)."""
        return np.sqrt(np.sum(self.se**2, 1)) / self.log_px.shape[1]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean estimate against K, with two Monte Carlo standard errors to either side."""
        ax = _axes(ax, (6.2, 3.3))
        shown = np.isfinite(self.mean)
        error = np.where(np.isfinite(self.mean_se), 2 * self.mean_se, 0.0)
        ax.errorbar(self.num_samples[shown], self.mean[shown], error[shown], marker="o", markersize=4, linewidth=1.6, capsize=3)
        ax.set_xscale("log")
        ax.set_xlabel("samples per datum, K")
        ax.set_ylabel("log p(x), estimate (nats per datum)")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
        return ax


def curve_sizes(num_samples: int) -> list[int]:
    """The K of a :class:`Curve`: the powers of ten below S, and S.

    Example:
        >>> from pyrovae.evidence import curve_sizes
        >>> curve_sizes(5000)
        [1, 10, 100, 1000, 5000]
    """
    return [10**power for power in range(20) if 10**power < num_samples] + [num_samples]


def curve_of(log_sums: Array, log_squares: Array, elbo: Array, num_samples: int, drawn: Array | None = None) -> Curve:
    """A curve from running sums over each datum's first K samples, for the K of :func:`curve_sizes`.

    Args:
        log_sums: logarithm of the summed weights, shape (C, N).
        log_squares: logarithm of the summed squares, shape (C, N).
        elbo: the mean log-weight of all samples, shape (N,).
        num_samples: S.
        drawn: how many each datum took where some took fewer, shape (N,); past them its sums stay.
    """
    sizes = np.array(curve_sizes(num_samples))
    counts = np.minimum(sizes[:, None], num_samples if drawn is None else drawn)  # (C, N or 1)
    log_px = log_sums - np.log(counts)
    with np.errstate(all="ignore"):
        share = np.exp(log_squares - 2 * log_sums)  # the sum of squared normalised weights
        se = np.sqrt(np.maximum(share - 1 / counts, 0.0) * (counts / (counts - 1)))
        # One sample has no spread of its own. All S do: what one lies off their mean, squared, has its variance as mean.
        se[0] = np.abs(log_px[0] - elbo) * np.sqrt(counts[-1] / (counts[-1] - 1)) if num_samples > 1 else math.nan
    return Curve(sizes, log_px, se)


@dataclass(frozen=True)
class Evidence:
    r"""Estimates of log p(x) over data, in nats, on the CPU.

    Attributes:
        log_px: the estimate for each datum, shape (N,).
        se: its Monte Carlo standard error, by the delta method on the logarithm, shape (N,).
        ess: effective sample size of the importance weights, shape (N,), at most what the datum drew.
        khat: Pareto shape of the weights' tail, shape (N,). ``-inf`` says that the weights are constant, so the guide, or the
            answer, is exact, or that all the largest are equal; ``nan`` that there were too few samples to tell, or that
            weights were NaN.
        elbo: the mean log-weight, which estimates the evidence lower bound, shape (N,).
        num_samples: S, draws per datum; the most that one got where ``drawn`` says that some got fewer.
        num_dims: D, observed numbers per datum, for bits per dimension; where a mask hides different ones, their mean.
        method: how the estimate was made; ``"exact..."`` and ``"AIS..."`` are judged by standards of their own.
        notes: what else the method says of itself, such as its ``target_se``.
        log_px_psis: the Pareto-smoothed estimate, shape (N,): steadier than ``log_px`` where the tail is heavy, at some bias.
            ``nan`` where there were too few samples to smooth. ``None`` where the method has no importance weights.
        curve: the estimate against the number of samples, where it was recorded.
        drawn: how many samples each datum's estimate is from, shape (N,), where a target decided; ``None`` where all took S.
        pilot: how many more it took to decide on that number, shape (N,); they are no part of the estimate.
        missed: what draws of the prior add to log p(x) where the weights are larger than any that was drawn, shape (N,), in
            nats; ``None`` where the prior was not asked.
        rounding: what one rounding of the largest term of the log-weights comes to, shape (N,), in nats.
        fingerprint: a 64-bit hash of each datum's first array, shape (N,), by which :func:`compare` knows the data.
        measure: what the numbers are with respect to; ``None`` where it is not known.

    Example:
        >>> import numpy as np, pyrovae as pv
        >>> one = np.ones(3)
        >>> evidence = pv.Evidence(log_px=-9 * one, se=0.1 * one, ess=50 * one, khat=0.3 * one, elbo=-10 * one,
        ...                        num_samples=5000, num_dims=4)
        >>> evidence.mean, evidence.gap, bool(evidence.reliable.all())
        (-9.0, 1.0, True)
    """

    log_px: Array
    se: Array
    ess: Array
    khat: Array
    elbo: Array
    num_samples: int
    num_dims: float
    method: str = "importance sampling"
    notes: dict[str, Any] = field(default_factory=dict)
    log_px_psis: Array | None = None
    curve: Curve | None = None
    drawn: Array | None = None
    pilot: Array | None = None
    missed: Array | None = None
    rounding: Array | None = None
    fingerprint: Array | None = None
    measure: Measure | None = None

    def __repr__(self) -> str:
        """One line: the mean, its errors, and how many data can be believed."""
        good = int(self.reliable.sum())
        return (
            f"Evidence(mean={self.mean:.4g} +- {self.mean_se:.2g} nats, {len(self)} data, {good} reliable, "
            f"method={self.method!r}, num_samples={self.num_samples})"
        )

    def __post_init__(self) -> None:
        """Refuse arrays of different lengths."""
        shapes = {name: np.shape(array) for name, array in self._per_datum().items()}
        if self.curve is not None:
            shapes["curve"] = np.shape(self.curve.log_px)[1:]
        if len(set(shapes.values())) != 1 or len(shapes["log_px"]) != 1:
            raise ValueError(f"Evidence takes one entry per datum in every array, not shapes {shapes}.")

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.log_px)

    @property
    def mean(self) -> float:
        """The mean estimate over data, in nats per datum."""
        return float(np.mean(self.log_px))

    @property
    def total(self) -> float:
        """The summed estimate over data, in nats."""
        return float(np.sum(self.log_px))

    @property
    def mean_se(self) -> float:
        """Monte Carlo standard error of :attr:`mean`: what more samples would lower."""
        return float(np.sqrt(np.sum(self.se**2)) / len(self))

    @property
    def data_se(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population: what more data would lower."""
        if len(self) < 2 or not np.isfinite(self.log_px).all():
            return math.nan
        return float(np.std(self.log_px, ddof=1) / math.sqrt(len(self)))

    @property
    def gap(self) -> float:
        """Mean estimate minus mean bound, in nats per datum: an estimate of KL(q || p(z|x))."""
        return self.mean - float(np.mean(self.elbo))

    @property
    def bits_per_dim(self) -> float:
        """Minus the mean estimate in bits per dimension; for densities it depends on the data's units."""
        return -self.mean / (self.num_dims * math.log(2)) if self.num_dims else math.nan

    @property
    def is_exact(self) -> bool:
        """Whether nothing was sampled: summed, in closed form, or by quadrature."""
        return self.method.startswith("exact")

    @property
    def is_annealed(self) -> bool:
        """Whether the weights are those of annealed chains."""
        return self.method.startswith("AIS")

    @property
    def khat_threshold(self) -> float:
        """The k below which S samples are enough: min(1 - 1/log10 S, 0.7) (Vehtari et al. 2024)."""
        return khat_limit(self.num_samples)

    @property
    def khat_thresholds(self) -> Array:
        """The k below which the samples of each datum are enough, shape (N,); lower where it drew fewer."""
        return np.array([khat_limit(int(size)) for size in self._drawn()])

    @property
    def reliable(self) -> Array:
        """Whether each datum's estimate can be believed, shape (N,).

        By importance sampling, or annealing with 25 chains or more: Pareto k below the threshold, or constant weights. By
        annealing with fewer chains, to which no tail can be fitted: an effective number of chains of at least half of them, and
        of four. Chains that do not keep up with the temperatures have weights that a few of them dominate; at half, log-weights
        of normal law have a variance of log 2, and the estimate lies 1/(2 K) nats too low. Below, it asks for the chain that
        did not come. That is less than Pareto k says, as so few chains can agree by chance, and all can miss the same mode:
        :func:`pyrovae.bdmc` shows what to expect. Exact answers: finite, with a standard error, which is what rounding and two
        independent grids leave in doubt, of at most 0.01 nats. Estimates besides: ``rounding`` of no more than 0.05 nats, and
        ``missed`` of no more than that or three standard errors.
        """
        return np.isfinite(self.log_px) & self._consistent & ~self._rounded & ~self._blind

    @property
    def _consistent(self) -> Array:
        """Whether what was computed agrees with itself, by the method's own standard."""
        with np.errstate(invalid="ignore"):
            if self.is_exact:
                return self.se <= GRIDS_AGREE
            if self._few_chains:
                return self.ess >= self._enough_chains
            return (self.khat < self.khat_thresholds) | np.isneginf(self.khat)

    @property
    def _rounded(self) -> Array:
        """Whether the terms are too large for their floating type; exact answers have it in their standard error."""
        return np.zeros(len(self), bool) if self.rounding is None or self.is_exact else self.rounding > NEGLIGIBLE

    @property
    def _blind(self) -> Array:
        """Whether draws of the prior find more than the proposal's own can account for."""
        if self.missed is None:
            return np.zeros(len(self), bool)
        return self.missed > np.fmax(NEGLIGIBLE, 3 * self.se)

    @property
    def effort(self) -> str:
        """How many samples there were, in words."""
        if self.is_exact:
            unit = {"by enumeration": "assignments", "by quadrature": "grid points"}.get(self.method.removeprefix("exact, "))
            return "in closed form" if unit is None else f"up to {self.num_samples:,} {unit} each"
        unit, drawn = "chain" if self.is_annealed else "sample", self._drawn()
        pilot = "" if self.pilot is None or not self.pilot.any() else f", after a pilot of {self.pilot.mean():,.0f}"
        if drawn.min() == drawn.max():
            return f"{drawn[0]:,} {unit}{'s' if drawn[0] > 1 else ''} each{pilot}"
        return f"{drawn.min():,} to {drawn.max():,} {unit}s each, {drawn.mean():,.0f} on average{pilot}"

    @property
    def criterion(self) -> str:
        """What makes an estimate reliable, in words; a range where data drew different numbers of samples."""
        if self.is_exact:
            return "an exact answer"
        if self._few_chains:
            return f"{self._enough_chains:g} or more of {self.num_samples} chains effective"
        low, high = self.khat_thresholds.min(), self.khat_thresholds.max()
        return f"Pareto k below {low:.2f}" + (f" to {high:.2f}" if high > low else "")

    def summary(self) -> str:
        """The findings in words: what was estimated, from how many samples, and what to do if it cannot be believed."""
        size = len(self)
        said = f"log p(x): {self.mean:.3f} nats per datum over {size} data ({self.method}, {self.effort}); standard error "
        if self.is_exact:
            return f"{said}{self.data_se:.3f} from the data, none from sampling. {self._exactness()}"
        said += f"{self.mean_se:.3f} from sampling, {self.data_se:.3f} from the data. "
        if self.log_px_psis is not None and np.isfinite(self.log_px_psis).all():
            said += f"Pareto-smoothed: {np.mean(self.log_px_psis):.3f}. "
        bound = "Mean log-weight of a chain, a bound" if self.is_annealed else "Bound (ELBO)"
        said += f"{bound}: {np.mean(self.elbo):.3f}, so the gap is {self.gap:.3f} nats. "
        target = self.notes.get("target_se")
        if target is not None and (missed := int(np.sum(~(self.se <= target)))):
            most = int(np.sum(~(self.se <= target) & (self._drawn() == self.num_samples)))
            said += f"{missed} of {size} data miss the target error {target:g}, {most} of them with all {self.num_samples:,} "
            said += "samples. "
        for broken, word in ((np.isnan(self.log_px), "NaN"), (np.isposinf(self.log_px), "infinite")):
            if broken.any():
                return said + f"{_first(broken)} {word} weights: the model or guide overflows there."
        if np.isneginf(self.log_px).any():
            units, who = ("chains", "they miss") if self.is_annealed else ("samples", "the guide misses")
            return said + f"{_first(np.isneginf(self.log_px))} zero weight in all {units}: {who} all that the model allows."
        return said + (self._agreement() if self._few_chains else self._tails()) + self._doubts()

    def _doubts(self) -> str:
        """What no weight shows: terms that the floating type cannot resolve, and what only draws of the prior find."""
        said = ""
        if self._rounded.any():
            assert self.rounding is not None
            said += (
                f" {_first(self._rounded)} terms so large that rounding moves them by up to {self.rounding.max():.2g} nats: "
                f"score in float64, by calling double() on the modules and giving float64 data."
            )
        if self._blind.any():
            assert self.missed is not None
            worst = float(self.missed[self._blind].max())
            said += (
                f" {_first(self._blind)} an estimate that is too low: draws of the prior find up to {worst:.3g} nats more "
                f'where the proposal draws next to nothing. Score with proposal="mixture", which also draws from the prior.'
            )
        return said

    def _exactness(self) -> str:
        """What there is to say of exact answers."""
        lost = ~np.isfinite(self.log_px)
        if lost.any():
            return f"{_first(lost)} no finite answer: the model overflows there, or rules it out."
        quadrature = self.method.endswith("quadrature")
        doubt = "two quadratures and rounding leave" if quadrature else "exact to rounding, which leaves"
        said = f"Nothing was sampled; {doubt} at most {self.se.max():.1e} nats in doubt."
        bad = ~self.reliable
        if not bad.any():
            return said
        cure = "check by annealing (pv.ais)" if quadrature else "score in float64"
        return f"{said} {_first(bad)} more than {GRIDS_AGREE:g} nats in doubt: {cure}."

    def _agreement(self) -> str:
        """What a few annealed chains say of their estimate."""
        chains, enough, bad = self.num_samples, self._enough_chains, np.flatnonzero(~self.reliable)
        check = "pv.bdmc with the same settings shows, on data that the model simulates, how far off they can be."
        if enough > chains:
            return f"Fewer than {LEAST_CHAINS} chains do not show whether they agree: take num_chains=16. And {check}"
        if not len(bad):
            return (
                f"At least {enough:g} of {chains} chains are effective for all data (at worst {self.ess.min():.1f}): the "
                f"chains agree. All may yet miss the same mode: {check}"
            )
        return (
            f"Fewer than {enough:g} of {chains} chains are effective for {len(bad)} of {len(self)} data (first datum {bad[0]}, "
            f"at worst {self.ess.min():.1f}): a few chains carry those estimates, which are probably too low. What to do: more "
            f'num_temperatures first, then more num_chains, or start="guide"; and {check}'
        )

    def _tails(self) -> str:
        """What Pareto k says of importance weights."""
        size, bad = len(self), np.flatnonzero(~self._consistent)
        if self.num_samples < FEWEST_SAMPLES:
            return f"With fewer than {FEWEST_SAMPLES} samples nothing tells whether to believe it: draw more."
        if not len(bad):
            if not self.reliable.all():
                return f"{self.criterion} for all data, and yet {int((~self.reliable).sum())} of {size} cannot be believed."
            # The largest may be equal where others are not.
            equal = np.isneginf(self.khat).all() and np.all(self.log_px - self.elbo <= CONSTANT)
            constant = " (the weights are constant: the guide is exact)" if equal else ""
            return f"{self.criterion} for all data: the estimate can be believed{constant}.{self._other_modes()}"
        unfitted = " (for some of them no k can be fitted)" if np.isnan(self.khat[bad]).any() else ""
        said = (
            f"{len(bad)} of {size} data (first datum {bad[0]}) do not have {self.criterion}{unfitted}: their estimates are "
            f"probably too low. "
        )
        if self.is_annealed:
            return said + 'What to do: more num_temperatures first, then more num_chains, or start="guide".'
        if self.curve is not None and len(self.curve.num_samples) > 1 and np.isfinite(self.curve.mean[-2]):
            rise = self.curve.mean[-1] - self.curve.mean[-2]
            said += f"The mean moved by {rise:.3f} nats from {self.curve.num_samples[-2]:,} to {self.num_samples:,} samples. "
        other = (
            '"mixture", which also draws from the prior'
            if "refined" in self.method
            else '"refined", which fits the guide to each datum'
        )
        return said + (
            f"What to do: draw more samples; score with proposal={other}; or check these "
            f"data by annealing (pv.ais), which needs no good guide.{self._other_modes()}"
        )

    def _other_modes(self) -> str:
        """What no weight can show of a proposal that was fitted to modes."""
        if "refined" not in self.method:
            return ""
        return (
            " A refined proposal has the modes that its steps found, and no weight shows another that it never visits: where "
            "the guide's own estimate lies higher by more than its error, believe that one."
        )

    @property
    def _few_chains(self) -> bool:
        return self.is_annealed and self.num_samples < FEWEST_SAMPLES

    @property
    def _enough_chains(self) -> float:
        return max(self.num_samples / 2, LEAST_CHAINS)

    def rows(self, chosen: slice | Array) -> Evidence:
        """The part for some of the data, by a slice or their numbers."""
        fields: dict[str, Any] = {name: array[chosen] for name, array in self._per_datum().items()}
        if self.curve is not None:
            fields["curve"] = replace(self.curve, log_px=self.curve.log_px[:, chosen], se=self.curve.se[:, chosen])
        return replace(self, **fields)

    def to_elpd(self) -> Any:
        """The estimates as ArviZ's ``ELPDData``, for ``az.compare`` and ``az.plot_khat`` of the installed line.

        Here the pointwise values are held-out log p(x), and k is that of their own importance weights. ArviZ exponentiates
        them to stack, so data beyond some 700 nats give no weights there; :func:`compare` has no such limit.
        """
        return _elpd(self.log_px, self.khat, self.num_samples, float(self.khat_thresholds.min()))

    def to_datatree(self, draws: Draws | None = None) -> xarray.DataTree:
        """The arrays over data as an xarray ``DataTree`` with the group ``evidence`` and the dimension ``datum``.

        Args:
            draws: what :func:`pyrovae.posterior_draws` returned for the same data; their groups stand beside it.

        Raises:
            ValueError: the draws are of another number of data.
        """
        import xarray

        if draws is not None and len(draws) != len(self):
            raise ValueError(
                f"The draws are of {len(draws)} data and the evidence of {len(self)}: pass draws for the same data."
            )
        arrays: dict[str, Any] = {name: ("datum", array) for name, array in self._per_datum().items()}
        arrays["reliable"] = ("datum", self.reliable)
        coords = {"datum": np.arange(len(self))}
        if self.curve is not None:
            arrays["curve"] = (("curve_samples", "datum"), self.curve.log_px)
            arrays["curve_se"] = (("curve_samples", "datum"), self.curve.se)
            coords["curve_samples"] = self.curve.num_samples
        attrs = {"num_samples": self.num_samples, "num_dims": self.num_dims, "method": self.method, "units": "nats"}
        attrs |= {} if self.measure is None else {"measure": str(self.measure)}
        tree = draws.to_datatree() if draws is not None else xarray.DataTree()
        tree["evidence"] = xarray.DataTree(xarray.Dataset(arrays, coords=coords, attrs=attrs))
        return tree

    def save(self, path: str | Path) -> None:
        """Write the evidence as one safetensors file, atomically."""
        arrays = {name: torch.as_tensor(array) for name, array in self._per_datum().items()}
        if self.curve is not None:
            arrays |= {f"curve.{name}": torch.as_tensor(getattr(self.curve, name)) for name in _CURVE}
        notes = {name: getattr(self, name) for name in _NOTES}
        notes |= {} if self.measure is None else {"measure": self.measure}
        checkpoint.write_arrays(path, arrays, {"evidence": notes})

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or holds something else.
        """
        arrays, notes = checkpoint.read_arrays(path)
        kept = notes.get("evidence")
        fields: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
        curve = {name: fields.pop(f"curve.{name}") for name in _CURVE if f"curve.{name}" in fields}
        complete = set(fields) - set(_OPTIONAL) == set(_PER_DATUM) and len(curve) in (0, len(_CURVE))
        if not complete or not isinstance(kept, dict) or set(kept) - {"measure"} != set(_NOTES):
            raise ValueError(f"{path} holds no evidence: give a file that Evidence.save wrote.")
        if "measure" in kept:
            density, mass, given = kept["measure"]
            kept["measure"] = Measure(density, mass, tuple(given))
        return cls(**fields, **kept, curve=Curve(**curve) if curve else None)

    def _per_datum(self) -> dict[str, Array]:
        names = [*_PER_DATUM, *(name for name in _OPTIONAL if getattr(self, name) is not None)]
        return {name: np.asarray(getattr(self, name)) for name in names}

    def _drawn(self) -> Array:
        return np.full(len(self), self.num_samples) if self.drawn is None else self.drawn


def khat_limit(num_samples: int) -> float:
    """The k below which S samples are enough: min(1 - 1/log10 S, 0.7), and none with fewer than 25."""
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples >= FEWEST_SAMPLES else -math.inf


def _first(bad: Array) -> str:
    """Who they are, to stand before what they have."""
    found = np.flatnonzero(bad)
    return f"Datum {found[0]} has" if len(found) == 1 else f"Datum {found[0]} and {len(found) - 1} more have"


_PER_DATUM = ("log_px", "se", "ess", "khat", "elbo")
_OPTIONAL = ("log_px_psis", "drawn", "pilot", "missed", "rounding", "fingerprint")
_NOTES = ("num_samples", "num_dims", "method", "notes")
_CURVE = ("num_samples", "log_px", "se")


@dataclass(frozen=True)
class Draws:
    r"""Draws from p(z|x), by importance resampling, and what ArviZ wants beside them.

    Arrays are over M draws and N data, under the names of the pair's sites.

    Attributes:
        posterior: the latents given the data, each (M, N, ...).
        log_likelihood: log p(x|z) of each observed site at these draws, in nats, each (M, N).
        observed_data: the observed sites' values, each (N, ...).
        posterior_predictive: observed sites drawn again given the posterior's latents, each (M, N, ...).
        prior: the latents drawn from the model alone, each (M, N, ...).
        prior_predictive: the observed sites drawn with them, each (M, N, ...).
        ess: effective size of the weights that were resampled, shape (N,). With fewer than M, draws of a datum repeat.
        num_samples: S, importance samples per datum.
    """

    posterior: dict[str, Array]
    log_likelihood: dict[str, Array]
    observed_data: dict[str, Array]
    posterior_predictive: dict[str, Array]
    prior: dict[str, Array]
    prior_predictive: dict[str, Array]
    ess: Array
    num_samples: int

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.ess)

    def to_datatree(self) -> xarray.DataTree:
        """As an xarray ``DataTree`` with ArviZ's groups, for both lines of ArviZ.

        Draws are independent, so they stand as four chains where their number allows, by which ArviZ judges them. In ArviZ 0.23
        call ``az.InferenceData.from_datatree``. ``az.loo`` would take the harmonic mean of the likelihood for log p(x), since a
        datum's latents know nothing of it but through that datum: rank models by :func:`compare`.
        """
        import xarray

        num_draws = len(next(iter(self.posterior.values())))
        chains = 4 if num_draws % 4 == 0 and num_draws >= 16 else 1

        def dataset(arrays: dict[str, Array], drawn: bool) -> xarray.Dataset:
            variables = {}
            for name, array in arrays.items():
                inner = array.shape[2 if drawn else 1 :]
                dims = ["datum", *(f"{name}_dim_{i}" for i in range(len(inner)))]
                if drawn:
                    array, dims = array.reshape(chains, -1, *array.shape[1:]), ["chain", "draw", *dims]
                variables[name] = (dims, array)
            coords = {"datum": np.arange(len(self))}
            if drawn:
                coords |= {"chain": np.arange(chains), "draw": np.arange(num_draws // chains)}
            attrs = {"inference_library": "pyrovae", "num_samples": self.num_samples}
            return xarray.Dataset(variables, coords=coords, attrs=attrs)

        groups = {name: dataset(getattr(self, name), drawn=name != "observed_data") for name in _GROUPS}
        groups["resampling"] = xarray.Dataset({"ess": ("datum", self.ess)}, coords={"datum": np.arange(len(self))})
        return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items() if group.data_vars})


_GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive", "observed_data")


@dataclass(frozen=True)
class Comparison:
    """Several models' evidence over the same data, best first.

    Attributes:
        names: the models, by falling mean log p(x).
        mean: mean log p(x) of each, in nats per datum.
        difference: each mean minus the best one's, in nats per datum.
        difference_se: its standard error from the data, of paired differences.
        monte_carlo_se: its standard error from sampling.
        unreliable: how many data of each cannot be believed; see :attr:`Evidence.reliable`.
        stacking: the weight of each in the mixture of models that predicts these data best (Yao et al. 2018), by ArviZ;
            ``nan`` where an estimate is not finite.
    """

    names: list[str]
    mean: Array
    difference: Array
    difference_se: Array
    monte_carlo_se: Array
    unreliable: Array
    stacking: Array

    def __str__(self) -> str:
        """A table with one line for each model."""
        width = max(5, *(len(name) for name in self.names))
        head = f"{'model':<{width}}  {'log p(x)':>10}  {'diff.':>8}  {'se data':>8}  {'se MC':>8}  {'unrel.':>6}  {'weight':>6}"
        lines = [head]
        for name, mean, *errors, bad, weight in zip(
            self.names,
            self.mean,
            self.difference,
            self.difference_se,
            self.monte_carlo_se,
            self.unreliable,
            self.stacking,
            strict=True,
        ):
            numbers = "  ".join(f"{number:>8.3f}" for number in errors)
            lines.append(f"{name:<{width}}  {mean:>10.3f}  {numbers}  {bad:>6d}  {weight:>6.2f}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each model's difference to the best, with 95 % intervals of the data (thin) and of sampling (thick)."""
        ax = _axes(ax, (7, 1.1 + 0.4 * len(self.names)))
        rows = np.arange(len(self.names))
        shown = np.isfinite(self.difference)

        def bars(errors: Array, **style: Any) -> None:
            ax.errorbar(self.difference[shown], rows[shown], xerr=1.96 * errors[shown], fmt="none", ecolor="C0", **style)

        bars(self.difference_se, elinewidth=1.2, capsize=4, label="from the choice of data")
        bars(self.monte_carlo_se, elinewidth=5, alpha=0.35, label="from sampling")
        # Hollow where some estimates cannot be believed.
        for chosen, face in ((self.unreliable == 0, "C0"), (self.unreliable > 0, "white")):
            ax.plot(self.difference[chosen & shown], rows[chosen & shown], "o", color="C0", markerfacecolor=face, markersize=7)
        for row, (difference, bad) in enumerate(zip(self.difference, self.unreliable, strict=True)):
            if bad and shown[row]:
                text = f"{bad} unreliable"
                ax.annotate(text, (difference, row), (0, 7), textcoords="offset points", ha="center", fontsize="small")
        ax.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        ax.set_yticks(rows, self.names)
        ax.set_ylim(len(self.names) - 0.4, -0.6)
        ax.set_xlabel("log p(x), difference to the best (nats per datum; 95 % intervals)")
        ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.3)
        return ax


def compare(evidence: Mapping[str, Evidence]) -> Comparison:
    r"""Compare models by their evidence over the same data.

    .. math:: \Delta = \frac1N \sum_n d_n, \quad \operatorname{se}(\Delta) = \sqrt{\operatorname{var}(d) / N}, \qquad
        d_n = \log \hat p_a(x_n) - \log \hat p_b(x_n)

    The error from sampling is kept apart: it is what more samples would lower, the other what more data would.

    Args:
        evidence: the models' evidence by name; at least two, over the same data in the same order.

    Raises:
        TypeError: it is no mapping of names to evidence.
        ValueError: fewer than two, other data or the same in another order, or numbers by different measures: a density and a
            probability, other numbers of observed values, or a likelihood that is given a part of the datum.

    References:
        Yao, Vehtari, Simpson and Gelman, Using stacking to average Bayesian predictive distributions, 2018.

    Example:
        >>> import numpy as np, pyrovae as pv
        >>> one = np.ones(4)
        >>> def made(level):
        ...     return pv.Evidence(level * one, 0.1 * one, 50 * one, 0.3 * one, level * one, num_samples=5000, num_dims=4)
        >>> pv.compare({"small": made(-9.0), "large": made(-8.0)}).names
        ['large', 'small']
    """
    if not isinstance(evidence, Mapping) or not all(isinstance(result, Evidence) for result in evidence.values()):
        raise TypeError('compare takes evidence by name: pass {"one": evidence, "other": evidence}, not a list.')
    if len(evidence) < 2:
        raise ValueError("A comparison takes at least two models: pass {'name': evidence, ...}.")
    sizes = {name: len(result) for name, result in evidence.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The models were scored on different numbers of data {sizes}: score all on the same.")
    if min(sizes.values()) < 2:
        raise ValueError("A comparison needs at least two data to tell differences from chance.")
    _check_same_data(evidence)
    _check_same_measure(evidence)
    ranked = sorted(evidence, key=lambda name: -np.nan_to_num(evidence[name].mean, nan=-np.inf))
    best = evidence[ranked[0]]
    paired = [evidence[name].log_px - best.log_px for name in ranked]
    return Comparison(
        names=ranked,
        mean=np.array([evidence[name].mean for name in ranked]),
        difference=np.array([np.mean(d) for d in paired]),
        difference_se=np.array([np.std(d, ddof=1) / math.sqrt(len(d)) for d in paired]),
        monte_carlo_se=np.array([0.0] + [math.hypot(evidence[name].mean_se, best.mean_se) for name in ranked[1:]]),
        unreliable=np.array([int((~evidence[name].reliable).sum()) for name in ranked]),
        stacking=_stacking([evidence[name].log_px for name in ranked]),
    )


def _check_same_data(evidence: Mapping[str, Evidence]) -> None:
    """Refuse evidence over other data, or the same in another order, as far as fingerprints tell."""
    known = {name: result.fingerprint for name, result in evidence.items() if result.fingerprint is not None}
    for name, prints in known.items():
        first, expected = next(iter(known.items()))
        differ = np.flatnonzero(prints != expected)
        if not len(differ):
            continue
        if np.array_equal(np.sort(prints), np.sort(expected)):
            what = "the same data in another order"
        else:
            what = f"other data ({len(differ)} of {len(prints)})"
        raise ValueError(
            f"{name!r} was scored on {what} than {first!r} (first at row {differ[0]}): score both on the same array, or by a "
            f"DataLoader with shuffle=False."
        )


def _check_same_measure(evidence: Mapping[str, Evidence]) -> None:
    """Refuse numbers that are not with respect to the same thing, as far as it is known."""
    known = {name: result.measure for name, result in evidence.items() if result.measure is not None}
    for name, measure in known.items():
        first, expected = next(iter(known.items()))
        if not measure.agrees(expected):
            raise ValueError(
                f"log p(x) of {name!r} is {measure}, and that of {first!r} is {expected}: their nats do not compare; compare "
                f"models whose likelihoods are of one kind."
            )


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that were given, or those of a figure of its own."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def tail_size(num_samples: int) -> int:
    """How many of the largest of S weights Pareto k needs: five times the tail that is fitted."""
    return min(num_samples, 5 * _fitted_tail(num_samples))


def pareto_khat(largest: Array, num_samples: int, *, precision: float = 2.3e-16) -> Array:
    r"""Pareto shape of each datum's weights; the first half of :func:`pareto_smooth`.

    Example:
        >>> import numpy as np
        >>> from pyrovae.evidence import pareto_khat, tail_size
        >>> log_weights = 0.3 * np.random.default_rng(0).standard_exponential((50, 2000))  # Pareto weights of k = 0.3
        >>> largest = np.sort(log_weights)[:, -tail_size(2000):]
        >>> bool(abs(pareto_khat(largest, 2000).mean() - 0.3) < 0.05)
        True
    """
    return pareto_smooth(largest, np.full(len(largest), np.nan), num_samples, precision=precision)[0]


def pareto_smooth(largest: Array, log_px: Array, num_samples: int, *, precision: float = 2.3e-16) -> tuple[Array, Array]:
    r"""Pareto shape of each datum's weights, and log p(x) with their tail smoothed, both by ArviZ.

    The tail has :math:`M = \lceil \min(S/5, 3\sqrt S) \rceil` of S weights, and only the tail and its lower neighbours enter
    the fit. So ArviZ is given the 5 M largest, with the relative efficiency that makes it fit M of those. The smoothed mean
    is that of the smoothed tail and of all weights below, whose sum is known from the raw mean.

    Args:
        largest: the :func:`tail_size` largest log-weights of each datum, shape (N, 5 M), in nats.
        log_px: the raw estimate, the log of the mean of all S weights, shape (N,), in nats.
        num_samples: S, how many there were.
        precision: relative rounding error of the log-weights; weights that differ by no more are constant, but never those
            that differ by more than one part in a hundred, however large a factor they share.

    Returns:
        k for each datum, shape (N,): ``-inf`` where the weights of the tail are constant, ``inf`` where every weight is zero,
        ``nan`` with fewer than 25 samples, a NaN or infinite weight, or a tail that cannot be fitted. And the smoothed
        estimate, shape (N,): the raw one for a constant tail, ``-inf`` where every weight is zero, ``nan`` where k is.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, 2024.

    Example:
        >>> import numpy as np
        >>> from pyrovae.evidence import pareto_smooth, tail_size
        >>> log_weights = 0.8 * np.random.default_rng(0).standard_exponential((500, 2000))  # Pareto weights of mean 5
        >>> log_px = np.log(np.mean(np.exp(log_weights), 1))
        >>> _, smoothed = pareto_smooth(np.sort(log_weights)[:, -tail_size(2000):], log_px, 2000)
        >>> bool(np.std(smoothed) < np.std(log_px))
        True
    """
    khat, smoothed = np.full(len(largest), np.nan), np.full(len(largest), np.nan)
    if num_samples < FEWEST_SAMPLES:
        return khat, smoothed
    for datum, row in enumerate(np.asarray(largest, dtype=np.float64)):
        if np.isnan(row).any() or row.max() == np.inf:
            continue
        tail = np.sort(row)[-_fitted_tail(num_samples) - 1 :]
        if tail[-1] == -np.inf:
            khat[datum], smoothed[datum] = np.inf, -np.inf
        elif tail[-1] - tail[0] <= min(64 * precision * max(1.0, abs(tail[-1])), CONSTANT):
            khat[datum], smoothed[datum] = -np.inf, log_px[datum]
        else:
            khat[datum], before, after = _fit(row, num_samples)
            if not math.isnan(khat[datum]):
                log_sum = log_px[datum] + math.log(num_samples)
                below = max(0.0, math.exp(log_sum - tail[-1]) - before)
                smoothed[datum] = tail[-1] + math.log(below + after) - math.log(num_samples)
    return khat, smoothed


def _fitted_tail(num_samples: int) -> int:
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def _fit(row: Array, num_samples: int) -> tuple[float, float, float]:
    """k of one datum's largest log-weights, and their sum before and after smoothing, as multiples of the largest."""
    psislw, negates = _psislw()
    efficiency = 44 / _fitted_tail(num_samples)
    # Far below the largest, a weight is zero in float64 whatever it is: -inf would break the fit's own arithmetic.
    row = np.maximum(row - row.max(), -1e3)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        smoothed, khat = psislw(-row, r_eff=efficiency) if negates else psislw(row.copy(), reff=efficiency)
    # Both lines normalise. The smallest weight lies below the tail, so it tells by how much.
    smallest = np.argmin(row)
    smoothed = smoothed + (row[smallest] - smoothed[smallest])
    return float(khat), float(np.sum(np.exp(row))), float(np.sum(np.exp(smoothed)))


@cache
def _psislw() -> tuple[Any, bool]:
    """ArviZ's Pareto smoothing and whether it negates its input, as the 1.x line does and 0.23 does not."""
    return _psislw_of_023() if version("arviz").startswith("0.") else _psislw_of_1()


def _psislw_of_1() -> tuple[Any, bool]:
    from arviz_stats.base import array_stats

    return array_stats.psislw, True


def _psislw_of_023() -> tuple[Any, bool]:
    return _arviz_023().psislw, False


def _arviz_023() -> Any:
    """ArviZ 0.23, which announces its successor once a day and keeps the date of that in a cache folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return importlib.import_module("arviz")
        except OSError:
            # The cache folder cannot be written, as in a container without a home: the date may as well be lost.
            before = os.environ.get("XDG_CACHE_HOME")
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = folder
                try:
                    return importlib.import_module("arviz")
                finally:
                    if before is None:
                        del os.environ["XDG_CACHE_HOME"]
                    else:
                        os.environ["XDG_CACHE_HOME"] = before


def _elpd(log_px: Array, khat: Array, num_samples: int, threshold: float) -> Any:
    """Pointwise estimates as the installed line's ELPDData, which it believes to come from leave-one-out."""
    import xarray

    size = len(log_px)
    fields = {
        "se": float(np.std(log_px) * math.sqrt(size)),
        "n_samples": num_samples,
        "n_data_points": size,
        "scale": "log",
        "warning": bool((khat >= threshold).any()),
        "good_k": threshold,
        "pareto_k": xarray.DataArray(khat, dims="datum"),
    }
    pointwise = xarray.DataArray(np.asarray(log_px), dims="datum")
    return _comparison()[1](float(np.sum(log_px)), pointwise, fields)


def _stacking(log_px: list[Array]) -> Array:
    """Stacking weights of each model, in their order."""
    stacked = np.stack(log_px)
    if not np.isfinite(stacked).all():
        return np.full(len(stacked), np.nan)
    # ArviZ exponentiates log p(x), which leaves nothing of -1,000 nats. A factor common to all models cancels.
    stacked = stacked - stacked.max(0)
    compare_elpds = _comparison()[0]
    names = [str(row) for row in range(len(stacked))]
    elpds = {name: _elpd(row, np.zeros(len(row)), 1, 0.7) for name, row in zip(names, stacked, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23's about pandas, 1.x's about what leave-one-out would need
        table = compare_elpds(elpds)
    return table["weight"].loc[names].to_numpy(dtype=float)


@cache
def _comparison() -> tuple[Any, Any]:
    """ArviZ's comparison by stacking, and what makes its ELPDData."""
    return _comparison_of_023() if version("arviz").startswith("0.") else _comparison_of_1()


def _comparison_of_1() -> tuple[Any, Any]:
    from arviz_stats import compare, utils

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        # 1.3 has a class for each kind; before there was one for all.
        if hasattr(utils, "ELPDDataLOO"):
            return utils.ELPDDataLOO(elpd=total, p=math.nan, elpd_i=pointwise, **fields)
        return utils.ELPDData(kind="loo", elpd=total, p=math.nan, elpd_i=pointwise, **fields)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return compare(elpds, method="stacking", round_to="none")

    return compare_elpds, make


def _comparison_of_023() -> tuple[Any, Any]:
    arviz = _arviz_023()

    def make(total: float, pointwise: Any, fields: dict[str, Any]) -> Any:
        elpd = {"elpd_loo": total, "se": fields["se"], "p_loo": math.nan} | fields | {"loo_i": pointwise}
        order = ("elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "pareto_k", "scale", "good_k")
        return arviz.stats.ELPDData([elpd[name] for name in order], index=order)

    def compare_elpds(elpds: dict[str, Any]) -> Any:
        return arviz.compare(elpds, method="stacking")

    return compare_elpds, make

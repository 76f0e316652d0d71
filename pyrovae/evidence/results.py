"""Evidence: log p(x) of each datum, with diagnostics of its reliability."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import files
from .curve import Curve
from .display import EvidenceDisplay
from .draws import Draws
from .kinds import Annealed, EvidenceKind, Exact, ImportanceSampled, data_have, kind_of, rungs_in_words
from .measure import Measure
from .psis import Array, _elpd, khat_limit
from .saved import check_arrays, check_notes

if TYPE_CHECKING:
    import xarray

__all__ = ["Evidence"]

# Nats by which rounding, or what the proposal missed, may move an estimate that can be believed.
NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class Evidence(EvidenceDisplay):
    r"""Estimates of log p(x) over data, in nats, on the CPU.

    Attributes:
        log_px: the estimate for each datum, shape (N,).
        se: its Monte Carlo standard error, by the delta method on the logarithm, shape (N,).
        ess: effective sample size of the importance weights, shape (N,), at most what the datum drew.
        khat: Pareto shape of the weights' tail, shape (N,). ``-inf`` says that the weights are constant, so the guide, or the
            answer, is exact, or that all the largest are equal; ``nan`` that there were too few samples to tell, or that
            weights were NaN.
        elbo: the mean log-weight, which estimates the evidence lower bound, shape (N,).
        num_samples: S, draws per datum; the largest number if ``drawn`` says that some took fewer.
        num_dims: D, observed numbers per datum, for bits per dimension; their mean if masks differ.
        method: how the estimate was made, for display; it names the :attr:`kind`, by whose standard it is judged.
        notes: further settings and findings of the method, such as its ``target_se``.
        log_px_psis: the Pareto-smoothed estimate, shape (N,): less variable than ``log_px`` if the tail is heavy, with some
            bias. ``nan`` if there were too few samples to smooth, ``None`` if the method has no importance weights.
        curve: the estimate against the number of samples, if it was recorded.
        drawn: samples of each datum's estimate, shape (N,), if a target decided; ``None`` if all took S.
        pilot: further samples that decided on that number, shape (N,); they are not part of the estimate.
        missed: what draws of the prior (of the guide, if the prior is the proposal) add to log p(x) where their weights are
            larger than any that was drawn, shape (N,), in nats; ``None`` if no other draws were made.
        rounding: the rounding error of the largest term of the log-weights, shape (N,), in nats.
        fingerprint: a 64-bit hash of each datum's first array, shape (N,), by which :func:`pyrovae.compare` identifies data.
        squares: the sum of squares of each datum's observed values, shape (N,), by which :func:`pyrovae.compare` tells a
            model of ``x`` from one of ``x.log()``.
        measure: the measure that p(x) is a density with respect to; ``None`` if it is not known.
        covered: false if the guide rules out values that the prior and p(x, z) allow, by a test at some points, shape (N,);
            ``None`` if the proposal always covers them, or if this cannot be tested.
        rung: under ``proposal="auto"``, which of the proposals ``pyrovae.evidence.RUNGS`` the estimate is from, shape (N,).
        calls: decoder calls that each datum took in all, shape (N,), pilots and fits included; a gradient counts as two.

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
    squares: Array | None = None
    measure: Measure | None = None
    covered: Array | None = None
    rung: Array | None = None
    calls: Array | None = None

    def __repr__(self) -> str:
        """One line: the mean, its error, and how many data are reliable."""
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
            raise ValueError(f"Arrays of Evidence must have one entry per datum, got shapes {shapes}.")

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
        """Monte Carlo standard error of :attr:`mean`, which more samples reduce."""
        return float(np.sqrt(np.sum(self.se**2)) / len(self))

    @property
    def data_se(self) -> float:
        """Standard error of :attr:`mean` as an estimate for the population, which more data reduce."""
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
    def kind(self) -> EvidenceKind:
        """The kind of evidence that ``method`` names: what makes it reliable, and in which words."""
        return kind_of(self.method)

    @property
    def is_exact(self) -> bool:
        """Whether nothing was sampled: summed, in closed form, or by quadrature."""
        return isinstance(self.kind, Exact)

    @property
    def is_annealed(self) -> bool:
        """Whether the weights are those of annealed chains."""
        return isinstance(self.kind, Annealed)

    @property
    def khat_threshold(self) -> float:
        """The k below which S samples are enough: min(1 - 1/log10 S, 0.7) (Vehtari et al. 2024)."""
        return khat_limit(self.num_samples)

    @property
    def khat_thresholds(self) -> Array:
        """The k below which the samples of each datum are enough, shape (N,); lower for a datum that drew fewer."""
        return np.array([khat_limit(int(size)) for size in self.samples_drawn])

    @property
    def reliable(self) -> Array:
        """Whether each datum's estimate can be believed, shape (N,).

        For importance sampling, and for annealing with 25 chains or more: Pareto k is below the threshold, or the weights are
        constant. For annealing with fewer chains, to which no tail can be fitted: the effective number of chains is at least
        half of them, and at least four. If the chains are far from equilibrium, a few of them dominate; at half, normal
        log-weights have a variance of log 2, and the estimate lies 1/(2 K) nats too low. Fewer effective chains suggest that a
        heavier-weighted chain was missed. This check is weaker than Pareto k: few chains can agree by chance, and all can miss
        the same mode; :func:`pyrovae.bdmc` shows what to expect. For exact answers: they are finite, and their standard error,
        which is the doubt that rounding and two independent grids leave, is at most 0.01 nats. Estimates also need a
        ``rounding`` of at most 0.05 nats, a ``missed`` of at most that or two standard errors, and ``covered`` if known.
        """
        return np.isfinite(self.log_px) & self.kind.consistent(self) & ~self._rounded & ~self._blind & self._covers

    @property
    def _rounded(self) -> Array:
        """Whether the terms are too large for their floating type; the standard error of exact answers includes rounding."""
        return np.zeros(len(self), bool) if self.rounding is None or self.is_exact else self.rounding > NEGLIGIBLE

    @property
    def _covers(self) -> Array:
        """Whether the guide can draw what p(x, z) allows, if this is known."""
        return np.ones(len(self), bool) if self.covered is None else self.covered

    @property
    def _blind(self) -> Array:
        """Whether draws of the prior find more mass than the error of the estimate explains."""
        if self.missed is None:
            return np.zeros(len(self), bool)
        return self.missed > np.fmax(NEGLIGIBLE, 2 * self.se)

    @property
    def samples_drawn(self) -> Array:
        """How many samples each datum's estimate is from, shape (N,)."""
        return np.full(len(self), self.num_samples) if self.drawn is None else self.drawn

    @property
    def effort(self) -> str:
        """How many samples there were, in words."""
        return self.kind.effort(self)

    @property
    def rungs(self) -> str:
        """How many estimates are from each proposal of ``proposal="auto"``, in words; empty for other methods."""
        return "" if self.rung is None else rungs_in_words(self.rung)

    @property
    def criterion(self) -> str:
        """What makes an estimate reliable, in words; a range if data drew different numbers of samples."""
        return self.kind.criterion(self)

    def summary(self) -> str:
        """The findings in words: what was estimated, from how many samples, and what to do if it cannot be believed."""
        kind, size = self.kind, len(self)
        words = f"log p(x): {self.mean:.3f} nats per datum over {size} data ({self.method}, {self.effort}); standard error "
        if not isinstance(kind, ImportanceSampled):
            return f"{words}{self.data_se:.3f} from the data, none from sampling. {kind.findings(self)}"
        words += f"{self.mean_se:.3f} from sampling, {self.data_se:.3f} from the data. "
        if self.log_px_psis is not None and np.isfinite(self.log_px_psis).all():
            words += f"Pareto-smoothed: {np.mean(self.log_px_psis):.3f}. "
        words += f"{kind.bound}: {np.mean(self.elbo):.3f}, so the gap is {self.gap:.3f} nats. {self._missed_target()}"
        for broken, word in ((np.isnan(self.log_px), "NaN"), (np.isposinf(self.log_px), "infinite")):
            if broken.any():
                return f"{words}{data_have(broken)} {word} weights: the model or guide overflows there."
        zero = np.isneginf(self.log_px)
        if zero.any():
            return f"{words}{data_have(zero)} zero weight in all {kind.unit}s: {kind.who_misses} all that the model allows."
        uncovered = np.zeros(size, dtype=bool) if self.covered is None else ~self.covered
        if uncovered.any():
            words += (
                f"The guide rules out values that the prior allows for {uncovered.sum()} of {size} data (first datum "
                f"{np.flatnonzero(uncovered)[0]}), so that their estimates are probably too low whatever else they show: use "
                f"{kind.cover_cure}. "
            )
            if (self.reliable | uncovered).all():
                return words.rstrip() + self._doubts()
        return words + kind.findings(self) + self._doubts()

    def _missed_target(self) -> str:
        """How many data miss the target error, if there was one."""
        target = self.notes.get("target_se")
        missed = np.zeros(len(self), bool) if target is None else ~(self.se <= target)
        if not missed.any():
            return ""
        most = int(np.sum(missed & (self.samples_drawn == self.num_samples)))
        return (
            f"{missed.sum()} of {len(self)} data miss the target error {target:g}, {most} of them with all "
            f"{self.num_samples:,} samples. "
        )

    def _doubts(self) -> str:
        """What no weight shows: terms that the floating type cannot resolve, and what only other draws find."""
        words = ""
        if self._rounded.any():
            assert self.rounding is not None
            words += (
                f" {data_have(self._rounded)} terms so large that rounding moves them by up to {self.rounding.max():.2g} nats: "
                f"score in float64, by calling double() on the modules and giving float64 data."
            )
        if self._blind.any():
            assert self.missed is not None
            assert isinstance(self.kind, ImportanceSampled)
            worst = float(self.missed[self._blind].max())
            words += (
                f" {data_have(self._blind)} an estimate that is too low: other draws find up to {worst:.3g} nats more "
                f"where the proposal draws next to nothing. {self.kind.missed_cure}"
            )
        return words + self._second_opinion()

    def _second_opinion(self) -> str:
        """What chains from the prior say of a sample of the data, if they were asked for."""
        found = self.notes.get("second")
        if found is None:
            return ""
        refuted, number = found["refuted"], found["num_data"]
        verdict = f"refutes {len(refuted)} of them (first datum {refuted[0]})" if refuted else "refutes none of them"
        return (
            f" A second opinion on {number} data, by annealing from the prior, {verdict}: it lies {found['difference']:+.3f} "
            f"nats from these estimates on average, with standard error {found['difference_se']:.3f}. On {found['simulated']} "
            f"simulated data the same chains have log p(x) between two bounds that are {found['gap']:.3f} nats apart, with "
            f"standard error {found['gap_se']:.3f}."
        )

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
            draws: what :func:`pyrovae.posterior_draws` returned for the same data; their groups are added.

        Raises:
            ValueError: the draws are of another number of data.
        """
        import xarray

        if draws is not None and len(draws) != len(self):
            raise ValueError(
                f"draws must be of the evidence's {len(self)} data, got draws of {len(draws)}: pass draws for the same data."
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
        files.write_arrays(path, arrays, {"evidence": notes})

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated or damaged, or holds something else.
        """
        arrays, notes = files.read_arrays(path)
        record = notes.get("evidence") if isinstance(notes, dict) else None
        # NumPy lacks bfloat16, which no array of evidence has.
        fields: dict[str, Any] = {name: each.numpy() for name, each in arrays.items() if each.dtype != torch.bfloat16}
        curve = {f"curve.{name}" for name in _CURVE} & set(fields)
        complete = set(fields) - curve - set(_OPTIONAL) == set(_PER_DATUM) and len(curve) in (0, len(_CURVE))
        if not complete or not isinstance(record, dict) or set(record) - {"measure"} != set(_NOTES):
            raise ValueError(f"{path} must be a file that Evidence.save wrote, got one that holds no evidence.")
        check_arrays(path, fields)
        curves = {name: fields.pop(f"curve.{name}") for name in _CURVE} if curve else None
        return cls(**fields, **check_notes(path, record), curve=None if curves is None else Curve(**curves))

    def _per_datum(self) -> dict[str, Array]:
        names = [*_PER_DATUM, *(name for name in _OPTIONAL if getattr(self, name) is not None)]
        return {name: np.asarray(getattr(self, name)) for name in names}


_PER_DATUM = ("log_px", "se", "ess", "khat", "elbo")
_OPTIONAL = ("log_px_psis", "drawn", "pilot", "missed", "rounding", "fingerprint", "squares", "covered", "rung", "calls")
_NOTES = ("num_samples", "num_dims", "method", "notes")
_CURVE = ("num_samples", "log_px", "se")

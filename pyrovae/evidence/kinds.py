"""Kinds of evidence: what makes an estimate of each kind reliable, and in which words."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .psis import CONSTANT, FEWEST_SAMPLES, Array

__all__ = [
    "EXACT_METHODS",
    "KINDS",
    "PROPOSALS",
    "RUNGS",
    "Annealed",
    "Enumerated",
    "EvidenceKind",
    "Exact",
    "ImportanceSampled",
    "Integrated",
    "LinearGaussian",
    "Refined",
    "Repaired",
    "data_have",
    "kind_of",
    "rungs_in_words",
]

# The fewest effective chains of an annealing; fewer cannot be said to agree.
LEAST_CHAINS = 4
# Nats that rounding, and two quadratures, may leave in doubt.
GRIDS_AGREE = 0.01
_BDMC = "pv.bdmc with the same settings shows, on data that the model simulates, how far off they can be."


class _Scores(Protocol):
    """What a kind reads of :class:`pyrovae.Evidence`."""

    def __len__(self) -> int: ...
    @property
    def log_px(self) -> Array: ...
    @property
    def se(self) -> Array: ...
    @property
    def ess(self) -> Array: ...
    @property
    def khat(self) -> Array: ...
    @property
    def elbo(self) -> Array: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def pilot(self) -> Array | None: ...
    @property
    def covered(self) -> Array | None: ...
    @property
    def curve(self) -> Any: ...
    @property
    def samples_drawn(self) -> Array: ...
    @property
    def khat_thresholds(self) -> Array: ...
    @property
    def reliable(self) -> Array: ...
    @property
    def rung(self) -> Array | None: ...
    @property
    def calls(self) -> Array | None: ...


@dataclass(frozen=True)
class EvidenceKind(ABC):
    """One kind of evidence.

    Attributes:
        method: how the estimates were made, for display; files keep it, and :func:`kind_of` finds the kind by it.
    """

    method: str

    @abstractmethod
    def consistent(self, scores: _Scores) -> Array:
        """Whether the computation of each datum agrees with itself by this kind's standard, shape (N,)."""

    @abstractmethod
    def criterion(self, scores: _Scores) -> str:
        """What makes an estimate reliable, in words."""

    @abstractmethod
    def effort(self, scores: _Scores) -> str:
        """How much was computed, in words."""

    @abstractmethod
    def findings(self, scores: _Scores) -> str:
        """Which estimates can be believed, and what to do about the others, in words."""


@dataclass(frozen=True)
class ImportanceSampled(EvidenceKind):
    """Importance sampling, which is reliable if Pareto k is below the threshold or the weights are constant."""

    unit = "sample"
    bound = "Bound (ELBO)"
    who_misses = "the guide misses"
    cover_cure = 'proposal="mixture"'
    missed_cure = 'Score with proposal="mixture", which also draws from the prior.'
    other_proposal = '"auto", which repairs the estimates where the guide fails'
    other_modes = ""

    def consistent(self, scores: _Scores) -> Array:
        """Whether k is below the threshold, or the weights are constant."""
        with np.errstate(invalid="ignore"):
            return (scores.khat < scores.khat_thresholds) | np.isneginf(scores.khat)

    def criterion(self, scores: _Scores) -> str:
        """The threshold of k; a range if data drew different numbers of samples."""
        low, high = scores.khat_thresholds.min(), scores.khat_thresholds.max()
        covers = "" if scores.covered is None or scores.covered.all() else " and a guide that covers the prior"
        return f"Pareto k below {low:.2f}" + (f" to {high:.2f}" if high > low else "") + covers

    def effort(self, scores: _Scores) -> str:
        """How many samples there were."""
        drawn, unit = scores.samples_drawn, self.unit
        pilot = "" if scores.pilot is None or not scores.pilot.any() else f", after a pilot of {scores.pilot.mean():,.0f}"
        if drawn.min() == drawn.max():
            return f"{drawn[0]:,} {unit}{'s' if drawn[0] > 1 else ''} each{pilot}"
        return f"{drawn.min():,} to {drawn.max():,} {unit}s each, {drawn.mean():,.0f} on average{pilot}"

    def findings(self, scores: _Scores) -> str:
        """What Pareto k says of the weights."""
        size, bad = len(scores), np.flatnonzero(~self.consistent(scores))
        if scores.num_samples < FEWEST_SAMPLES:
            return f"With fewer than {FEWEST_SAMPLES} samples nothing tells whether to believe it: draw more."
        criterion = self.criterion(scores)
        if not len(bad):
            if not scores.reliable.all():
                return f"{criterion} for all data, and yet {int((~scores.reliable).sum())} of {size} cannot be believed."
            # The largest weights may be equal although others are not.
            equal = np.isneginf(scores.khat).all() and np.all(scores.log_px - scores.elbo <= CONSTANT)
            constant = " (the weights are constant: the guide is exact)" if equal else ""
            return f"{criterion} for all data: the estimate can be believed{constant}.{self.other_modes}"
        unfitted = " (for some of them no k can be fitted)" if np.isnan(scores.khat[bad]).any() else ""
        return (
            f"{len(bad)} of {size} data (first datum {bad[0]}) do not have {criterion}{unfitted}: their estimates are "
            f"probably too low. {self._cure(scores)}"
        )

    def _cure(self, scores: _Scores) -> str:
        """What to do about weights with a heavy tail."""
        words, curve = "", scores.curve
        if curve is not None and len(curve.num_samples) > 1 and np.isfinite(curve.mean[-2]):
            rise = curve.mean[-1] - curve.mean[-2]
            words = f"The mean moved by {rise:.3f} nats from {curve.num_samples[-2]:,} to {scores.num_samples:,} samples. "
        return (
            f"{words}What to do: draw more samples; score with proposal={self.other_proposal}; or check these data by "
            f"annealing (pv.ais), which needs no good guide.{self.other_modes}"
        )


@dataclass(frozen=True)
class Refined(ImportanceSampled):
    """Importance sampling from a proposal that was fitted to each datum, which has the modes that the fit found."""

    other_proposal = '"mixture", which also draws from the prior'
    other_modes = (
        " A refined proposal has the modes that its steps found, and no weight shows another that it never visits: where "
        "the guide's own estimate lies higher by more than its error, believe that one."
    )


@dataclass(frozen=True)
class Repaired(ImportanceSampled):
    """Importance sampling by the cheapest proposal that is good enough for each datum; annealed chains are its last resort.

    Draws are judged by Pareto k at the number that the datum took. Chains are judged by how many are effective, as few chains
    are in annealing: at least half.
    """

    who_misses = "every proposal misses"
    cover_cure = 'proposal="mixture"'
    missed_cure = 'Anneal these data from the prior (pv.ais with start="prior").'

    def consistent(self, scores: _Scores) -> Array:
        """Whether k is below the threshold, or half of the chains are effective."""
        light = super().consistent(scores)
        if scores.rung is None:
            return light
        with np.errstate(invalid="ignore"):
            agree = scores.ess >= np.maximum(scores.samples_drawn / 2, LEAST_CHAINS)
        return np.where(scores.rung == _ANNEALED_RUNG, agree, light)

    def criterion(self, scores: _Scores) -> str:
        """The threshold of k, and how many chains must be effective if some were annealed."""
        rung = np.zeros(len(scores), int) if scores.rung is None else scores.rung
        if (rung == _EXACT_RUNG).all():
            return "an exact answer"
        draws = rung < _ANNEALED_RUNG
        limits = scores.khat_thresholds[draws] if draws.any() else scores.khat_thresholds
        low, high = limits.min(), limits.max()
        words = f"Pareto k below {low:.2f}" + (f" to {high:.2f}" if high > low else "")
        return f"{words}, or half of the chains effective" if (rung == _ANNEALED_RUNG).any() else words

    def effort(self, scores: _Scores) -> str:
        """How many samples there were, and decoder calls in all."""
        calls = "" if scores.calls is None else f"; {scores.calls.mean():,.0f} decoder calls each in all"
        return super().effort(scores) + calls

    def findings(self, scores: _Scores) -> str:
        """How many data stand on each rung, and what Pareto k says."""
        if scores.rung is None or scores.num_samples < FEWEST_SAMPLES:
            return super().findings(scores)
        bad = np.flatnonzero(~scores.reliable)
        words = f"Of {len(scores):,} data, {rungs_in_words(scores.rung)}; "
        if not len(bad):
            unseen = "" if (scores.rung == _EXACT_RUNG).all() else " A mode that no draw came near would not show."
            return f"{words}all reliable.{unseen}"
        return (
            f"{words}{len(scores) - len(bad):,} reliable. {len(bad)} (first datum {bad[0]}) are flagged, and their estimates "
            f"probably too low, although everything was tried. What to do: draw more samples, or anneal them for longer "
            f"(pv.ais with more num_temperatures)."
        )


@dataclass(frozen=True)
class Annealed(ImportanceSampled):
    """Annealed importance sampling. With 25 chains or more it is judged by Pareto k, with fewer by the effective chains."""

    unit = "chain"
    bound = "Mean log-weight of a chain, a bound"
    who_misses = "they miss"
    cover_cure = 'start="prior"'

    @classmethod
    def of(cls, start: str, num_temperatures: int) -> Annealed:
        """The kind of chains from the prior or the guide through ``num_temperatures`` temperatures."""
        return cls(f"AIS from the {start}, {num_temperatures} temperatures")

    def consistent(self, scores: _Scores) -> Array:
        """Whether enough chains are effective, or k is below the threshold."""
        if not self._few_chains(scores):
            return super().consistent(scores)
        with np.errstate(invalid="ignore"):
            return scores.ess >= self._enough_chains(scores)

    def criterion(self, scores: _Scores) -> str:
        """How many chains must be effective, or the threshold of k."""
        if not self._few_chains(scores):
            return super().criterion(scores)
        return f"{self._enough_chains(scores):g} or more of {scores.num_samples} chains effective"

    def findings(self, scores: _Scores) -> str:
        """Whether the chains agree, or what Pareto k says of their weights."""
        if not self._few_chains(scores):
            return super().findings(scores)
        chains, enough, worst = scores.num_samples, self._enough_chains(scores), scores.ess.min()
        bad = np.flatnonzero(~scores.reliable)
        if enough > chains:
            return f"Fewer than {LEAST_CHAINS} chains do not show whether they agree: take num_chains=16. And {_BDMC}"
        if not len(bad):
            return (
                f"At least {enough:g} of {chains} chains are effective for all data (at worst {worst:.1f}): the chains "
                f"agree. All may yet miss the same mode: {_BDMC}"
            )
        return (
            f"Fewer than {enough:g} of {chains} chains are effective for {len(bad)} of {len(scores)} data (first datum "
            f"{bad[0]}, at worst {worst:.1f}): a few chains carry those estimates, which are probably too low. "
            f"{self._cure(scores).rstrip('.')}; and {_BDMC}"
        )

    def _cure(self, scores: _Scores) -> str:
        return 'What to do: more num_temperatures first, then more num_chains, or start="guide".'

    @staticmethod
    def _few_chains(scores: _Scores) -> bool:
        """Whether no tail can be fitted to the chains' weights."""
        return scores.num_samples < FEWEST_SAMPLES

    @staticmethod
    def _enough_chains(scores: _Scores) -> float:
        return max(scores.num_samples / 2, LEAST_CHAINS)


@dataclass(frozen=True)
class Exact(EvidenceKind):
    """Evidence that was not sampled, which is reliable if little is left in doubt: here a closed form.

    Attributes:
        unit: what was summed over, in the plural; ``None`` for a closed form.
    """

    unit: str | None = None

    doubt = "exact to rounding, which leaves"
    cure = "score in float64"

    def consistent(self, scores: _Scores) -> Array:
        """Whether what is in doubt is small."""
        with np.errstate(invalid="ignore"):
            return scores.se <= GRIDS_AGREE

    def criterion(self, scores: _Scores) -> str:
        """That the answer is exact."""
        return "an exact answer"

    def effort(self, scores: _Scores) -> str:
        """How many terms were summed."""
        return "in closed form" if self.unit is None else f"up to {scores.num_samples:,} {self.unit} each"

    def findings(self, scores: _Scores) -> str:
        """How much is in doubt."""
        lost = ~np.isfinite(scores.log_px)
        if lost.any():
            return f"{data_have(lost)} no finite answer: the model overflows there, or rules it out."
        words = f"Nothing was sampled; {self.doubt} at most {scores.se.max():.1e} nats in doubt."
        bad = ~scores.reliable
        return words if not bad.any() else f"{words} {data_have(bad)} more than {GRIDS_AGREE:g} nats in doubt: {self.cure}."


@dataclass(frozen=True)
class Enumerated(Exact):
    """A sum over all assignments of discrete latents."""


@dataclass(frozen=True)
class LinearGaussian(Exact):
    """The closed form of a linear-Gaussian pair."""


@dataclass(frozen=True)
class Integrated(Exact):
    """Quadrature, which two grids confirm."""

    doubt = "two quadratures and rounding leave"
    cure = "check by annealing (pv.ais)"


def data_have(bad: Array) -> str:
    """The first of the data that a mask marks, and how many more, as the beginning of a sentence: "Datum 3 has"."""
    found = np.flatnonzero(bad)
    return f"Datum {found[0]} has" if len(found) == 1 else f"Datum {found[0]} and {len(found) - 1} more have"


# What a datum's estimate is from under proposal="auto", from the cheapest to the dearest, and in words.
RUNGS = ("guide", "fitted", "adapted", "mixture", "annealed", "exact")
_RUNG_WORDS = (
    "by the guide",
    "refined",
    "refined and adapted",
    "by the mixture of guide and prior",
    "annealed",
    "summed",
)
_ANNEALED_RUNG, _EXACT_RUNG = RUNGS.index("annealed"), RUNGS.index("exact")


def rungs_in_words(rung: Array) -> str:
    """How many data's estimates are from each rung, such as "236 by the guide, 124 refined"."""
    counts = [(int((rung == place).sum()), words) for place, words in enumerate(_RUNG_WORDS)]
    return ", ".join(f"{number:,} {words}" for number, words in counts if number)


# The kinds whose method is one fixed string, by the name of the proposal or of the exact method.
KINDS: dict[str, EvidenceKind] = {
    "guide": ImportanceSampled("importance sampling"),
    "prior": ImportanceSampled("importance sampling from the prior"),
    "mixture": ImportanceSampled("importance sampling from the mixture of prior and guide"),
    "refined": Refined("importance sampling from the guide refined per datum"),
    "auto": Repaired("importance sampling, repaired per datum"),
    "enumerate": Enumerated("exact, by enumeration", "assignments"),
    "quadrature": Integrated("exact, by quadrature", "grid points"),
    "linear_gaussian": LinearGaussian("exact, linear-Gaussian"),
}
# The names of proposals of importance sampling, and of exact methods.
PROPOSALS = tuple(name for name, kind in KINDS.items() if isinstance(kind, ImportanceSampled))
EXACT_METHODS = tuple(name for name, kind in KINDS.items() if isinstance(kind, Exact))
_BY_METHOD = {kind.method: kind for kind in KINDS.values()}
_ANNEALED = re.compile(r"AIS from the (prior|guide), (\d+) temperatures")


def kind_of(method: str) -> EvidenceKind:
    """The kind of the evidence that names its method; importance sampling for a method that no kind has.

    Example:
        >>> from pyrovae.evidence.kinds import kind_of
        >>> kind_of("exact, by quadrature").unit
        'grid points'
    """
    if method in _BY_METHOD:
        return _BY_METHOD[method]
    annealed = _ANNEALED.fullmatch(method)
    return ImportanceSampled(method) if annealed is None else Annealed.of(annealed[1], int(annealed[2]))

"""The measure that p(x) is a density with respect to, and the data that it is of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..data.batches import fingerprints
from ..data.matching import Batch
from ..programs.inspect import PairInfo

__all__ = ["SCORED_DATA", "Measure", "evidence_fields", "scored_data"]


def scored_data(info: PairInfo, batch: Batch) -> dict[str, np.ndarray]:
    """What :func:`evidence_fields` needs of one batch, as arrays over its data."""
    size, rounding = info.num_data, info.rounding
    counts = {"observed": info.num_observed, "density": info.num_densities, "mass": info.num_probabilities}
    arrays = {name: np.full(size, number / size) for name, number in counts.items()}
    arrays["rounding"] = np.zeros(size) if rounding is None else rounding.cpu().numpy()
    arrays["squares"] = np.zeros(size) if info.squares is None else info.squares.cpu().numpy()
    # If the data are along another dimension than the first, their rows cannot be identified.
    return arrays | {"fingerprint": fingerprints(batch) if len(batch[0]) == size else np.zeros(size, np.int64)}


SCORED_DATA = ("observed", "density", "mass", "rounding", "squares", "fingerprint")


def evidence_fields(parts: list[dict[str, np.ndarray]], given: tuple[str, ...]) -> dict[str, Any]:
    """The fields of evidence that describe the data, from :func:`scored_data` of consecutive batches."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in SCORED_DATA}
    num_dims, density, mass = (_round_integer(float(whole[name].mean())) for name in ("observed", "density", "mass"))
    fingerprint = whole["fingerprint"] if whole["fingerprint"].any() else None
    return {
        "num_dims": num_dims,
        "measure": Measure(density, mass, given),
        "rounding": whole["rounding"],
        "squares": whole["squares"],
        "fingerprint": fingerprint,
    }


def _round_integer(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


class Measure(NamedTuple):
    """The measure that p(x) is a density with respect to: only numbers with the same measure can be compared.

    Attributes:
        density: observed numbers per datum that have a density.
        mass: observed numbers per datum that have a probability.
        given: the parts of a datum that its likelihood conditions on, such as its total.
    """

    density: float
    mass: float
    given: tuple[str, ...] = ()

    def agrees(self, other: Measure) -> bool:
        """Whether numbers with this measure and the other can be compared."""
        return self.given == other.given and all(
            math.isclose(own, its, rel_tol=1e-9) for own, its in zip(self[:2], other[:2], strict=True)
        )

    def __str__(self) -> str:
        """In words, as "a density over 784 numbers given the total"."""
        named = {"a density over": self.density, "a probability of": self.mass}
        parts = [f"{words} {number:g} number{'' if number == 1 else 's'}" for words, number in named.items() if number]
        return (" and ".join(parts) or "of no numbers") + (f" given {' and '.join(self.given)}" if self.given else "")

"""Checks of what is read from an evidence file: the types, shapes and values of its arrays and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .measure import Measure
from .psis import Array

__all__ = ["check_arrays", "check_notes"]

# The numbers that each array holds, as NumPy's kinds; the others hold real numbers.
_REAL, _WHOLE, _TRUTH = "fiu", "iu", "b"
_KINDS = {"drawn": _WHOLE, "pilot": _WHOLE, "fingerprint": _WHOLE, "covered": _TRUTH, "curve.num_samples": _WHOLE}
_NOT_NEGATIVE = ("se", "ess", "rounding", "squares", "drawn", "pilot", "curve.se")
_WORDS = {_REAL: "real numbers", _WHOLE: "integers", _TRUTH: "true or false"}


def check_arrays(path: str | Path, arrays: Mapping[str, Array]) -> None:
    """Refuse arrays that no evidence has.

    Raises:
        ValueError: an array has another shape, type or sign than it can have; the file and the array are named.
    """
    size = np.shape(arrays["log_px"])
    for name, array in arrays.items():
        kind = _KINDS.get(name, _REAL)
        if array.dtype.kind not in kind:
            raise ValueError(f"{path}: {name} must hold {_WORDS[kind]}, got {array.dtype}.")
        if name.startswith("curve."):
            sizes = np.shape(arrays["curve.num_samples"])
            wanted = sizes if name == "curve.num_samples" else sizes + size
            if len(sizes) != 1 or sizes[0] == 0 or array.shape != wanted:
                raise ValueError(f"{path}: {name} must have shape {wanted}, got {array.shape}.")
        elif len(size) != 1 or size[0] == 0 or array.shape != size:
            raise ValueError(f"{path}: {name} must have one entry per datum, got shape {array.shape} and {size} of log_px.")
        if name in _NOT_NEGATIVE and (array < 0).any():
            row = tuple(int(place) for place in np.argwhere(array < 0)[0])
            raise ValueError(f"{path}: {name} must not be negative, got {array[row]:g} in row {row[-1]}.")
    if "curve.num_samples" in arrays and not (np.diff(arrays["curve.num_samples"], prepend=0) > 0).all():
        raise ValueError(f"{path}: curve.num_samples must be positive and ascend, got {arrays['curve.num_samples'].tolist()}.")


def check_notes(path: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of an evidence file, with its measure as one.

    Raises:
        ValueError: a note has another type or value than it can have; the file and the note are named.
    """
    number, dims = record["num_samples"], record["num_dims"]
    if type(number) is not int or number < 0:
        raise ValueError(f"{path}: num_samples must be an integer of at least 0, got {number!r}.")
    if not _is_number(dims):
        raise ValueError(f"{path}: num_dims must be a number of at least 0, got {dims!r}.")
    for name, kind in (("method", str), ("notes", dict)):
        if not isinstance(record[name], kind):
            raise ValueError(f"{path}: {name} must be a {kind.__name__}, got {record[name]!r}.")
    if "measure" not in record:
        return dict(record)
    match record["measure"]:
        case [density, mass, [*given]] if (
            _is_number(density) and _is_number(mass) and all(isinstance(part, str) for part in given)
        ):
            return {**record, "measure": Measure(density, mass, tuple(given))}
    raise ValueError(f"{path}: measure must hold two numbers and the names of what is given, got {record['measure']!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0

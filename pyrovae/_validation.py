"""Arguments checked: a sentence that says what must be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

__all__ = ["positive_integer", "positive_number", "unknown"]

# Names as similar as this (difflib's ratio) are taken for each other's misspellings; shorter beginnings say too little.
NEAR, SHORTEST_BEGINNING = 0.7, 3


def positive_integer(value: Any, what: str) -> int:
    """``value`` as a plain integer.

    Raises:
        ValueError: it is not a positive whole number; the message calls it ``what``.

    Example:
        >>> from pyrovae._validation import positive_integer
        >>> positive_integer(5e3, "num_samples")
        5000
    """
    if not (isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())) or value < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}.")
    return int(value)


def positive_number(value: Any, what: str) -> float:
    """``value`` as a plain float.

    Raises:
        ValueError: it is not a positive, finite number; the message calls it ``what``.

    Example:
        >>> from pyrovae._validation import positive_number
        >>> positive_number(2, "scale")
        2.0
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{what} must be a positive number, got {value!r}.")
    return float(value)


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist: the nearest one that does, or all of them if none is near."""
    known = sorted(known)
    cure = f"choose one of {', '.join(known)}." if known else "leave it out, as there are none."
    nearest = _nearest(str(name).casefold(), known)
    if nearest is not None:
        cure = f"did you mean {nearest!r}?"
    return f"There is no {what} {name!r}; {cure}"


def _nearest(name: str, known: list[str]) -> str | None:
    """A known name that differs by a slip or two, or of which one is the beginning of the other."""
    if len(name) >= SHORTEST_BEGINNING:
        for other in known:
            if other.startswith(name) or (len(other) >= SHORTEST_BEGINNING and name.startswith(other)):
                return other
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=NEAR)), None)

"""Arguments checked: a sentence that says what must be."""

from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Any


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


def unknown(what: str, name: str, known: Any) -> str:
    """One sentence for a name that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}."
    return f"There is no {what} {name!r}; {cure}"

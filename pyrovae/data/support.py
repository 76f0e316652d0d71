"""The likelihood for an array of numbers, chosen by the set that contains its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .rows import Rows

__all__ = ["Values", "choose_likelihood", "is_whole", "summarize"]

LEVELS = 256  # of an 8-bit pixel


@dataclass(frozen=True)
class Values:
    """A summary of the values of a data set.

    Attributes:
        low: the smallest.
        high: the largest.
        whole: whether all are integers, in any type.
        image: whether a datum has more than one dimension.
        byte: whether they are stored as 8-bit integers.
        size: the number of values, missing ones included.
        num_missing: the number of missing values, which the other attributes ignore.
    """

    low: float
    high: float
    whole: bool
    image: bool
    byte: bool
    size: int
    num_missing: int

    def likelihood(self) -> tuple[dict[str, Any], str]:
        """A likelihood whose support contains all values, as a registry table, and the reason for it."""
        low, high = self.low, self.high
        if self.whole and low >= 0:
            if high <= 1:
                return {"kind": "bernoulli"}, "all values are 0 or 1"
            # Pixels have two of three properties: an image, 8-bit integers, and values above half the range.
            if high < LEVELS and self.image + self.byte + (high >= LEVELS / 2) >= 2:
                return {"kind": "discretized_logistic"}, (
                    "the values are 8-bit levels 0..255; for a density of grey values in [0, 1] divide them by 255 "
                    '(data.binarize = "none"), or add noise to them (data.binarize = "dequantized")'
                )
            return {"kind": "negative_binomial"}, f"the values are counts {low:g}..{high:g}"
        if self.image and low >= 0 and high <= 1:
            return {"kind": "continuous_bernoulli"}, "the values are grey values in [0, 1]"
        which = "integers, some below zero," if self.whole else "real numbers"
        far = "; standardise them if the training diverges" if max(-low, high) > 100 else ""
        return {"kind": "normal", "scale": "shared"}, f"the values are {which} from {low:.4g} to {high:.4g}{far}"


def summarize(array: np.ndarray | Rows, mask: np.ndarray | Rows | None = None) -> Values:
    """Summarise all values in one pass.

    Args:
        array: data of shape (N, ...).
        mask: true where a value was observed; the others are ignored.

    Raises:
        ValueError: no value was observed, or some are NaN or infinite.
    """
    arrays = array.chunks() if isinstance(array, Rows) else iter([array])
    masks = mask.chunks() if isinstance(mask, Rows) else None
    low, high, whole, missing, first_row = np.inf, -np.inf, True, 0, 0
    for part in arrays:
        if mask is not None:
            seen = next(masks) if masks is not None else np.asarray(mask)[first_row : first_row + len(part)]
            missing += int(seen.size - seen.sum())
            values = part[seen]
        else:
            values = part
        if values.size:
            low, high, whole = min(low, float(values.min())), max(high, float(values.max())), whole and is_whole(values)
        if not np.isfinite([low, high]).all() and values.size:
            bad = ~np.isfinite(part).reshape(len(part), -1).all(1)
            raise ValueError(
                f"The data must be finite, got NaN or infinite values, first row {first_row + int(bad.argmax())}: drop or "
                f"repair them, or read NaN as missing values (missing)."
            )
        first_row += len(part)
    if high < low:
        raise ValueError("The data must have at least one observed value, got none: all are missing.")
    size = int(np.prod(array.shape))
    return Values(low, high, whole, len(array.shape) > 2, array.dtype == np.uint8, size, missing)


def choose_likelihood(array: np.ndarray | Rows, mask: np.ndarray | Rows | None = None) -> tuple[dict[str, Any], str]:
    """A likelihood whose support contains all values, as a registry table, and the reason for it.

    Args:
        array: data of shape (N, ...); more than one dimension in a datum makes it an image.
        mask: true where a value was observed; the others are ignored.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data.support import choose_likelihood
        >>> choose_likelihood(np.array([[0, 3], [12, 1]]))
        ({'kind': 'negative_binomial'}, 'the values are counts 0..12')
    """
    return summarize(array, mask).likelihood()


def is_whole(array: np.ndarray) -> bool:
    """Whether all values are integers, in any type."""
    return array.dtype.kind in "biu" or bool((array == np.floor(array)).all())

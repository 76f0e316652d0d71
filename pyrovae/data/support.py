"""The likelihood for an array of numbers, chosen by the set that contains its values."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["choose_likelihood", "is_whole"]

LEVELS = 256  # of an 8-bit pixel


def choose_likelihood(array: np.ndarray) -> tuple[dict[str, Any], str]:
    """A likelihood whose support contains all values, as a registry table, and the reason for it.

    Args:
        array: data of shape (N, ...); more than one dimension in a datum makes it an image.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data.support import choose_likelihood
        >>> choose_likelihood(np.array([[0, 3], [12, 1]]))
        ({'kind': 'negative_binomial'}, 'the values are counts 0..12')
    """
    low, high = float(array.min()), float(array.max())
    image = array.ndim > 2
    if is_whole(array) and low >= 0:
        if high <= 1:
            return {"kind": "bernoulli"}, "all values are 0 or 1"
        # Pixels have two of three properties: an image, 8-bit integers, and values above half the range.
        if high < LEVELS and image + (array.dtype == np.uint8) + (high >= LEVELS / 2) >= 2:
            return {"kind": "discretized_logistic"}, (
                "the values are 8-bit levels 0..255; for a density of grey values in [0, 1] divide them by 255 "
                '(data.binarize = "none"), or add noise to them (data.binarize = "dequantized")'
            )
        return {"kind": "negative_binomial"}, f"the values are counts {low:g}..{high:g}"
    if image and low >= 0 and high <= 1:
        return {"kind": "continuous_bernoulli"}, "the values are grey values in [0, 1]"
    which = "integers, some below zero," if is_whole(array) else "real numbers"
    far = "; standardise them if the training diverges" if max(-low, high) > 100 else ""
    return {"kind": "normal", "scale": "shared"}, f"the values are {which} from {low:.4g} to {high:.4g}{far}"


def is_whole(array: np.ndarray) -> bool:
    """Whether all values are integers, in any type."""
    return array.dtype.kind in "biu" or bool((array == np.floor(array)).all())

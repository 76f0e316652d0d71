"""What the methods without sampling return."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Answer"]


class Answer(NamedTuple):
    """log p(x) of B data without sampling, in nats."""

    log_px: np.ndarray  # (B,)
    error: np.ndarray  # (B,), the error that remains, from rounding and discretisation
    num_points: int  # terms that were summed

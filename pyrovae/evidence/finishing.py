"""What is known of some data once all of their weights have been summed."""

from __future__ import annotations

import numpy as np

from .psis import Array, pareto_smooth, pareto_smooth_together, tail_size
from .streaming import LogMoments

__all__ = ["finished"]


def finished(moments: LogMoments, precision: float) -> dict[str, Array]:
    """The answer for some data from their sums, by the names of the store's files.

    Args:
        moments: the sums.
        precision: relative rounding error of the log-weights.
    """
    drawn, sums, estimate = moments.num_drawn, moments.arrays(), moments.finish()
    size = len(estimate.log_px)
    largest = moments.tail[:, : tail_size(drawn)]
    fitted = pareto_smooth_together(largest, moments.log_sum, drawn, precision=precision)
    khat, smoothed, ordinary = (part.cpu().numpy() for part in fitted)
    rest = ~ordinary
    if rest.any():
        tail = sums["tail"][rest, : tail_size(drawn)]
        khat[rest], smoothed[rest] = pareto_smooth(tail, estimate.log_px[rest], drawn, precision=precision)
    # If a datum stopped before K draws, its curve stays at what it had.
    reached = np.array(moments.recorded) <= drawn
    curves = {
        name: np.column_stack([np.where(reached, sums[name], sums[whole][:, None]), sums[whole]])
        for name, whole in (("curve_sum", "log_sum"), ("curve_square", "log_square"))
    }
    counts = np.full(size, drawn, dtype=np.int64)
    own = {"khat": khat, "log_px_psis": smoothed, "drawn": counts, "largest": sums["tail"][:, 0]}
    return estimate._asdict() | own | curves

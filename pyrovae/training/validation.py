"""The bound of data that are held out."""

from __future__ import annotations

from typing import Any

import torch

from ..data.batches import Batches
from ..programs.inspect import PairInfo
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode
from .values import SupportCheck

__all__ = ["bound_of"]


@torch.no_grad()
def bound_of(
    estimator: Any, model: Program, guide: Program, batches: Batches, info: PairInfo, check: SupportCheck | None = None
) -> float:
    """The mean bound of data, in nats per datum."""
    with evaluation_mode(model, guide):
        total, num_data = 0.0, 0.0
        for number, batch in enumerate(batches, 1):
            if check is not None:
                check(batch, f"batch {number} of the validation data")
            total, num_data = total - estimator.loss(model, guide, *batch), num_data + info.count(batch)
    return total / num_data

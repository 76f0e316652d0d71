"""The bound of data that are held out, and what follows it: the best tensors and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..data.batches import Batches
from ..evidence.importance import log_marginal
from ..programs.inspect import PairInfo
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode
from .options import FitOptions
from .processes import Ranks
from .schedules import follow_bound
from .state import RunState
from .values import SupportCheck

__all__ = ["averaged", "bound_of", "validate"]


def validate(state: RunState, options: FitOptions, ranks: Ranks) -> float | None:
    """The bound of the validation data, or their log p(x), at the end of an epoch in which it is due; in nats per datum.

    If it is the best so far, the tensors are kept. A schedule that depends on it takes a step.
    """
    setup, at = state.setup, state.position
    if setup.held_out is None or at.epoch % options.validate_every:
        return None
    with averaged(state):
        if options.validation_samples is None:
            check = setup.check if at.checks_held_out else None
            value = bound_of(setup.estimator, setup.model, setup.guide, setup.held_out, setup.first.info, ranks, check)
            # By runs of the pair, the validation data are checked once.
            at.checks_held_out = at.checks_held_out and setup.check.direct
        else:
            data: Any = setup.held_out.loader or setup.held_out.arrays
            # The same draws in each epoch, so that epochs are compared on the same random numbers.
            evidence = log_marginal(setup.model, setup.guide, data, num_samples=options.validation_samples, seed=0)
            value = evidence.mean
        state.best.update(at.epoch, value, state.tensors)
    if math.isfinite(value):
        follow_bound(setup.scheduler, value)
    return value


@contextmanager
def averaged(state: RunState) -> Iterator[None]:
    """A context in which the parameters have their averaged values, if an average is kept."""
    average = state.setup.step.average
    if average is None:
        yield
        return
    before = [parameter.detach().clone() for parameter in average.parameters]
    average.load_into_parameters()
    try:
        yield
    finally:
        average.restore(before)


@torch.no_grad()
def bound_of(
    estimator: Any,
    model: Program,
    guide: Program,
    batches: Batches,
    info: PairInfo,
    ranks: Ranks,
    check: SupportCheck | None = None,
) -> float:
    """The mean bound of data, in nats per datum."""
    with evaluation_mode(model, guide):
        total, num_data = 0.0, 0.0
        for number, inputs in enumerate(ranks.shares(batches.inputs(), batches), 1):
            if ranks.idle:
                continue
            batch = batches.load(*inputs)
            if check is not None:
                check(batch, f"batch {number} of the validation data")
            total, num_data = total - estimator.loss(model, guide, *batch), num_data + info.count(batch)
    total, num_data = ranks.sum(total, num_data)
    return total / num_data

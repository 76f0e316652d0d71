"""Steps whose loss or gradient is not finite: they are skipped and counted, and the data that caused them are named."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import pyro
import torch

from ..data.matching import Batch
from ..programs.tracing import evaluation_mode, same_random_stream
from .options import FitOptions
from .setup import Setup
from .state import Position
from .values import cause_in_data

__all__ = ["Skips", "Taken", "bad_rows", "batch_of"]

# Rows that a message lists.
MOST_ROWS = 5


class Taken(NamedTuple):
    """A step that was taken, and whose loss has not been read yet.

    Attributes:
        number: its number in the run.
        batch: the number of its batch in the epoch.
        num_data: the number of data of the batch.
        inputs: of ``Batches.load``; ``None`` if they are not kept.
    """

    number: int
    batch: int
    num_data: float
    inputs: Batch | None


class Skips:
    """Counts skipped steps, and says what caused them.

    Args:
        setup: the pair and its data.
        options: of the run.
        position: where the counts are kept.
    """

    def __init__(self, setup: Setup, options: FitOptions, position: Position):
        self.setup, self.options, self.position = setup, options, position

    def note(self, loss: float, norm: float, step: Taken) -> None:
        """Count a skipped step; the first of a run, and the last of too many, are looked into.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        at = self.position
        at.skipped, at.in_a_row = at.skipped + 1, at.in_a_row + 1
        if at.in_a_row >= self.options.max_skips:
            row = at.in_a_row
            before = f" and in the {row - 1} before it" if row > 1 else ""
            raise FloatingPointError(
                f"The {_what(loss, norm)} in epoch {at.epoch}, step {step.number}{before}: {self._cure(step)}"
            )
        if at.skipped == 1:
            where = f"epoch {at.epoch}, step {step.number}"
            warnings.warn(
                f"The {_what(loss, norm)} in {where}, which is skipped: {self._cure(step)} Further ones are counted in "
                f"history.skipped, and {self.options.max_skips} in a row end the run.",
                stacklevel=6,
            )

    def warn_of_infinite_loss(self, step: Taken, inputs: Batch | None) -> None:
        """Name the cause in the data, if there is one, once in a run."""
        self.position.warned_of_infinite_loss = True
        setup = self.setup
        cause = None if inputs is None else cause_in_data(setup.model, setup.guide, batch_of(setup, inputs))
        if cause is not None:
            warnings.warn(f"The loss is infinite in epoch {self.position.epoch}, step {step.number}: {cause}", stacklevel=7)

    def _cure(self, step: Taken) -> str:
        """The data that caused it, and what to do."""
        clip = "set clip_norm" if self.options.clip_norm is None else "clip_norm"
        cure = f"lower the learning rate ({self.options.lr:g}), or {clip}."
        if step.inputs is None:
            return cure
        batch = batch_of(self.setup, step.inputs)
        cause = cause_in_data(self.setup.model, self.setup.guide, batch)
        rows = bad_rows(self.setup, batch)
        if cause is None and not rows:
            return cure
        return (cause or "repair or drop them, or " + cure) if not rows else self._with_rows(rows, step, cause, cure)

    def _with_rows(self, rows: list[int], step: Taken, cause: str | None, cure: str) -> str:
        places, whose = self._places(rows, step)
        more = ", ..." if len(rows) == MOST_ROWS else ""
        cause_it, them = ("causes it", "it") if len(rows) == 1 else ("cause it", "them")
        listed = f"{'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, places))}{more} of {whose} (counted from 0)"
        return f"{cause[:-1]} ({listed})." if cause else f"{listed} {cause_it}: repair or drop {them}, or {cure}"

    def _places(self, rows: list[int], step: Taken) -> tuple[list[int], str]:
        """The rows of a batch as rows of the data that were given."""
        train, inputs = self.setup.train, step.inputs
        if train.loader is not None or inputs is None:
            return rows, f"batch {step.batch}"
        places = inputs[0][rows].tolist() if train.shuffle else [(step.batch - 1) * train.batch_size + row for row in rows]
        return (places if self.setup.rows is None else self.setup.rows[places].tolist()), "the data"


def batch_of(setup: Setup, inputs: Batch) -> Batch:
    """The batch that a step makes of its inputs; the random stream does not notice."""
    with same_random_stream(inputs):
        return setup.train.load(*inputs)


def bad_rows(setup: Setup, batch: Batch) -> list[int]:
    """The first rows of a batch that make a loss NaN or a gradient not finite; none if all rows or only some draws do."""
    size, found = len(batch[0]), list[int]()
    if size > 3 and all(_is_bad(setup, batch, [row]) for row in (0, size // 2, size - 1)):
        return []
    waiting = [list(range(size))]
    while waiting and len(found) < MOST_ROWS:
        rows = waiting.pop()
        if not _is_bad(setup, batch, rows):
            continue
        if len(rows) == 1:
            found += rows
        else:
            middle = len(rows) // 2
            waiting += [rows[middle:], rows[:middle]]
    return found


def _is_bad(setup: Setup, batch: Batch, rows: list[int]) -> bool:
    part = tuple(each[rows] for each in batch)
    estimator, parameters = setup.estimator, setup.first.parameters
    try:
        with same_random_stream(part), evaluation_mode(setup.model, setup.guide), pyro.validation_enabled(False):
            if not hasattr(estimator, "differentiable_loss"):
                with torch.no_grad():
                    return math.isnan(estimator.loss(setup.model, setup.guide, *part))
            beta = getattr(estimator, "current_beta", None)
            if beta is None:
                loss = estimator.differentiable_loss(setup.model, setup.guide, *part)
            else:
                loss = estimator.loss_at(beta, setup.model, setup.guide, *part)
            if math.isnan(float(loss.detach())) or not loss.requires_grad:
                return math.isnan(float(loss.detach()))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except (RuntimeError, ValueError):  # the pair does not run on these rows alone, or on such values
        return False
    return not all(bool(torch.isfinite(each).all()) for each in gradients if each is not None)


def _what(loss: float, norm: float) -> str:
    return f"loss became {loss}" if math.isnan(loss) else f"gradient became {norm}"

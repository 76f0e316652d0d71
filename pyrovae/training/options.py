"""The options of :func:`pyrovae.fit`: their types and their checks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from .._validation import positive_integer
from .callbacks import Callback
from .schedules import MakeOptimizer, MakeSchedule

__all__ = ["FitKeywords", "FitOptions", "TrainKeywords"]

# Inductor takes 5 to 20 seconds, and saves 3 to 15 milliseconds a step on two cores.
STEPS_TO_COMPILE = 3000


class TrainKeywords(TypedDict, total=False):
    """The keyword arguments of :func:`pyrovae.fit`, but for what a comparison of estimators sets itself."""

    epochs: int
    batch_size: int
    shuffle: bool
    lr: float
    optimizer: str | Mapping[str, Any] | MakeOptimizer
    schedule: str | Mapping[str, Any] | MakeSchedule
    clip_norm: float | None
    accumulate: int
    ema: float | None
    validation: Any
    validation_samples: int | None
    validate_every: int
    patience: int | None
    max_steps: int | None
    max_skips: int
    compile: bool | Literal["auto"]
    precision: Literal["float32", "tf32", "bfloat16"]
    transform: Callable[[Tensor], Tensor] | None
    progress: bool
    on_epoch: Callable[[dict[str, Any]], None] | None
    callbacks: Sequence[Callback]


class FitKeywords(TrainKeywords, total=False):
    """The keyword arguments of :func:`pyrovae.fit`; ``tests/test_training.py`` holds them to its signature."""

    estimator: Any
    max_seconds: float | None
    seed: int | None
    checkpoint: str | Path | None
    every: int | Literal["auto", "epoch"]
    resume: str | Path | None


@dataclass(frozen=True)
class FitOptions:
    """The keyword arguments of one call of :func:`pyrovae.fit`, which documents them and has their defaults."""

    estimator: Any
    epochs: int
    batch_size: int
    shuffle: bool
    lr: float
    optimizer: str | Mapping[str, Any] | MakeOptimizer
    schedule: str | Mapping[str, Any] | MakeSchedule
    clip_norm: float | None
    accumulate: int
    ema: float | None
    validation: Any
    validation_samples: int | None
    validate_every: int
    patience: int | None
    max_seconds: float | None
    max_steps: int | None
    max_skips: int
    compile: bool | Literal["auto"]
    precision: Literal["float32", "tf32", "bfloat16"]
    transform: Callable[[Tensor], Tensor] | None
    progress: bool
    seed: int | None
    on_epoch: Callable[[dict[str, Any]], None] | None
    callbacks: Sequence[Callback]
    checkpoint: str | Path | None
    every: int | Literal["auto", "epoch"]
    resume: str | Path | None

    def checked(self) -> FitOptions:
        """The options, with ``epochs`` as a plain integer.

        Raises:
            ValueError: an option is out of range, or needs another one.
        """
        epochs = positive_integer(self.epochs, "epochs")
        if not (isinstance(self.lr, numbers.Real) and 0 < self.lr < math.inf):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be a positive number, got {self.clip_norm!r}.")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto", got {self.compile!r}.')
        if self.patience is not None and self.validation is None:
            raise ValueError(f"patience={self.patience} needs a validation bound: pass validation=0.1, for example.")
        if self.patience is not None and self.patience < self.validate_every:
            raise ValueError(f"patience must be at least validate_every = {self.validate_every}, got {self.patience!r}.")
        if self.validation_samples is not None and self.validation is None:
            raise ValueError("validation_samples needs validation data: pass validation=0.1, for example.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be a decay between 0 and 1, such as 0.999, got {self.ema!r}.")
        accumulate = positive_integer(self.accumulate, "accumulate")
        positive_integer(self.validate_every, "validate_every")
        if self.validation_samples is not None:
            positive_integer(self.validation_samples, "validation_samples")
        if self.every not in ("auto", "epoch"):
            positive_integer(self.every, "every")
        if self.resume == "auto" and self.checkpoint is None:
            raise ValueError(
                'resume="auto" must have a folder of checkpoints: pass checkpoint=, or the path of one as resume=.'
            )
        positive_integer(self.max_skips, "max_skips")
        max_steps = None if self.max_steps is None else positive_integer(self.max_steps, "max_steps")
        return replace(self, epochs=epochs, max_steps=max_steps, accumulate=accumulate)

    def total_steps(self, num_batches: int | None) -> int | None:
        """How many steps the run takes at most, given the number of batches of an epoch; ``None`` if that is not known."""
        by_epochs = None if num_batches is None else self.epochs * num_batches
        return min((each for each in (by_epochs, self.max_steps) if each is not None), default=None)

    def depends_on_length(self) -> bool:
        """Whether the learning rate depends on the number of steps of the whole run."""
        kind = self.schedule if isinstance(self.schedule, str) else None
        kind = self.schedule.get("kind") if isinstance(self.schedule, Mapping) else kind
        return str(kind).casefold() == "cosine"

    def compiles(self, total_steps: int | None) -> bool:
        """Whether steps are compiled."""
        if self.compile == "auto":
            return self.precision == "bfloat16" or (total_steps is not None and total_steps >= STEPS_TO_COMPILE)
        return self.compile

"""The options of :func:`pyrovae.fit`: their types, their checks, and the optimizers and schedules that have names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from .._validation import positive_integer, unknown

__all__ = ["OPTIMIZERS", "FitKeywords", "FitOptions", "MakeOptimizer", "MakeSchedule", "TrainKeywords"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": torch.optim.Adamax,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
# Inductor takes 5 to 20 seconds, and saves 3 to 15 milliseconds a step on two cores.
STEPS_TO_COMPILE = 3000


class TrainKeywords(TypedDict, total=False):
    """The keyword arguments of :func:`pyrovae.fit`, but for what a comparison of estimators sets itself."""

    epochs: int
    batch_size: int
    shuffle: bool
    lr: float
    optimizer: str | MakeOptimizer
    schedule: str | MakeSchedule
    clip_norm: float | None
    validation: Any
    patience: int | None
    max_steps: int | None
    max_skips: int
    compile: bool | Literal["auto"]
    precision: Literal["float32", "tf32", "bfloat16"]
    transform: Callable[[Tensor], Tensor] | None
    progress: bool
    on_epoch: Callable[[dict[str, Any]], None] | None


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
    optimizer: str | MakeOptimizer
    schedule: str | MakeSchedule
    clip_norm: float | None
    validation: Any
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
        if self.every not in ("auto", "epoch"):
            positive_integer(self.every, "every")
        if self.resume == "auto" and self.checkpoint is None:
            raise ValueError(
                'resume="auto" must have a folder of checkpoints: pass checkpoint=, or the path of one as resume=.'
            )
        positive_integer(self.max_skips, "max_skips")
        max_steps = None if self.max_steps is None else positive_integer(self.max_steps, "max_steps")
        return replace(self, epochs=epochs, max_steps=max_steps)

    def make_optimizer(self) -> MakeOptimizer:
        """The optimizer as a callable of the parameters.

        Raises:
            ValueError: an unknown name.
        """
        return _by_name(self.optimizer, "optimizer", OPTIMIZERS)

    def make_schedule(self, total_steps: int | None) -> Callable[..., Any]:
        """The schedule as a callable of the optimizer.

        Args:
            total_steps: how many steps the run will take at most; ``None`` if the data do not know their length.

        Raises:
            ValueError: an unknown name; or, when it is called, a cosine schedule without a number of steps.
        """

        def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            if total_steps is None:
                raise ValueError("A cosine schedule needs data that know their length: choose schedule='constant'.")
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)

        return _by_name(self.schedule, "schedule", {"constant": lambda optimizer: None, "cosine": cosine})

    def total_steps(self, num_batches: int | None) -> int | None:
        """How many steps the run takes at most, given the number of batches of an epoch; ``None`` if that is not known."""
        by_epochs = None if num_batches is None else self.epochs * num_batches
        return min((each for each in (by_epochs, self.max_steps) if each is not None), default=None)

    def depends_on_length(self) -> bool:
        """Whether the learning rate depends on the number of steps of the whole run."""
        return self.schedule == "cosine"

    def compiles(self, total_steps: int | None) -> bool:
        """Whether steps are compiled."""
        if self.compile == "auto":
            return self.precision == "bfloat16" or (total_steps is not None and total_steps >= STEPS_TO_COMPILE)
        return self.compile


def _by_name(choice: Any, what: str, choices: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if not isinstance(choice, str):
        return choice
    name = choice.casefold()
    if name not in choices:
        raise ValueError(unknown(what, choice, choices))
    return choices[name]

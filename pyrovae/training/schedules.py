"""Optimizers and schedules of the learning rate, by name or as tables with options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .._validation import unknown

__all__ = [
    "OPTIMIZERS", "SCHEDULES", "MakeOptimizer", "MakeSchedule", "Schedule", "constant", "cosine", "follow_bound",
    "is_schedule_free", "named_optimizer", "named_schedule", "plateau", "step",
]  # fmt: skip

MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], Any]


def _of_schedule_free(name: str) -> MakeOptimizer:
    """An optimizer of the library ``schedulefree``, which is imported when one is made."""

    def make(params: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
        try:
            import schedulefree
        except ImportError as error:
            raise ValueError('The optimizer is one of a library that is not installed: pip install "schedulefree".') from error
        cls = getattr(schedulefree, name)
        _check_options("optimizer", {"kind": name}, options, set(inspect.signature(cls).parameters) - {"params", "lr"})
        return cls(params, lr=lr, **options)

    return make


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": torch.optim.Adamax,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "schedule_free": _of_schedule_free("AdamWScheduleFree"),
    "schedule_free_radam": _of_schedule_free("RAdamScheduleFree"),
    "schedule_free_sgd": _of_schedule_free("SGDScheduleFree"),
    "sgd": torch.optim.SGD,
}


class Schedule:
    r"""The learning rate as a function of the step t, counted from 0.

    .. math:: \eta_t = \eta \cdot \min\Bigl(1, \frac{t + 1}{W + 1}\Bigr) \cdot s(t - W)

    Args:
        optimizer: whose learning rates it sets.
        shape: s, of the steps after the warm-up.
        warm_up: W, the number of steps in which the rate rises linearly.
        patience: epochs without a better validation bound after which the rate is multiplied by ``factor``; ``None``: never.
        factor: see ``patience``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: Callable[[int], float],
        *,
        warm_up: int = 0,
        patience: int | None = None,
        factor: float = 1.0,
    ):
        self.optimizer, self.shape, self.warm_up, self.patience, self.factor = optimizer, shape, warm_up, patience, factor
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps, self.scale, self.best, self.waited = 0, 1.0, -math.inf, 0
        self._set()

    def step(self) -> None:
        """Set the rates of the next step."""
        self.steps += 1
        self._set()

    def follow_bound(self, bound: float) -> None:
        """Take the validation bound of an epoch into account."""
        if self.patience is None:
            return
        self.waited = 0 if bound > self.best else self.waited + 1
        self.best = max(bound, self.best)
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.factor, 0
            self._set()

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step."""
        return {name: getattr(self, name) for name in ("rates", "steps", "scale", "best", "waited")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state."""
        vars(self).update(state)

    def _set(self) -> None:
        warm = min(1.0, (self.steps + 1) / (self.warm_up + 1))
        now = warm * self.shape(max(0, self.steps - self.warm_up)) * self.scale
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * now


def constant(optimizer: torch.optim.Optimizer, total: int | None, epoch: int | None, *, warm_up: int = 0) -> Schedule | None:
    """The same rate at all steps, after a warm-up of so many steps."""
    return Schedule(optimizer, lambda step: 1.0, warm_up=warm_up) if warm_up else None


def cosine(
    optimizer: torch.optim.Optimizer, total: int | None, epoch: int | None, *, warm_up: int = 0, final: float = 0.0
) -> Schedule:
    """Half a cosine over all steps, down to the fraction ``final`` of the rate."""
    if total is None:
        raise ValueError("A cosine schedule needs data that know their length: choose schedule='constant'.")
    steps = max(1, total - warm_up)

    def shape(step: int) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2

    return Schedule(optimizer, shape, warm_up=warm_up)


def step(
    optimizer: torch.optim.Optimizer, total: int | None, epoch: int | None, *, every: int, factor: float = 0.1, warm_up: int = 0
) -> Schedule:
    """Multiply the rate by ``factor`` after every so many epochs."""
    if epoch is None:
        raise ValueError("A step schedule needs data that know their length: choose schedule='constant'.")
    return Schedule(optimizer, lambda step: factor ** ((step + warm_up) // (every * epoch)), warm_up=warm_up)


def plateau(
    optimizer: torch.optim.Optimizer,
    total: int | None,
    epoch: int | None,
    *,
    patience: int = 5,
    factor: float = 0.5,
    warm_up: int = 0,
) -> Schedule:
    """Multiply the rate by ``factor`` after more than so many epochs without a better validation bound."""
    return Schedule(optimizer, lambda step: 1.0, warm_up=warm_up, patience=patience, factor=factor)


SCHEDULES: dict[str, Callable[..., Schedule | None]] = {
    "constant": constant, "cosine": cosine, "plateau": plateau, "step": step,
}  # fmt: skip


def named_optimizer(choice: Any) -> MakeOptimizer:
    """An optimizer as a callable ``(parameters, lr=...)``, from a name, a table or such a callable.

    Raises:
        ValueError: an unknown name or option.

    Example:
        >>> from pyrovae.training.schedules import named_optimizer
        >>> named_optimizer({"kind": "sgd", "momentum": 0.9}).keywords
        {'momentum': 0.9}
    """
    if not isinstance(choice, str | Mapping):
        return choice
    make, options = _chosen(choice, "optimizer", OPTIMIZERS)
    if "options" not in inspect.signature(make).parameters:  # else it looks at them itself
        _check_options("optimizer", choice, options, set(inspect.signature(make).parameters) - {"params", "lr"})
    return partial(make, **options) if options else make


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is of the library ``schedulefree``, whose parameters are no average while it trains."""
    return type(optimizer).__module__.partition(".")[0] == "schedulefree"


def named_schedule(choice: Any, total: int | None, epoch: int | None) -> MakeSchedule:
    """A schedule as a callable of the optimizer, from a name, a table or such a callable.

    Args:
        choice: what was asked for.
        total: how many steps the run takes at most, or ``None``.
        epoch: how many steps an epoch has, or ``None``.

    Raises:
        ValueError: an unknown name or option.
    """
    if not isinstance(choice, str | Mapping):
        return choice
    make, options = _chosen(choice, "schedule", SCHEDULES)
    known = {name for name, each in inspect.signature(make).parameters.items() if each.kind is each.KEYWORD_ONLY}
    _check_options("schedule", choice, options, known)
    if make is step and "every" not in options:
        raise ValueError('A step schedule must say after how many epochs: pass schedule={"kind": "step", "every": 30}, say.')
    for name in {"warm_up", "every", "patience"} & set(options):
        least = 1 if name == "every" else 0
        if not isinstance(options[name], int) or options[name] < least:
            raise ValueError(f"{name} of a schedule must be a whole number from {least} on, got {options[name]!r}.")
    return lambda optimizer: make(optimizer, total, epoch, **options)


def follow_bound(schedule: Any, bound: float | None) -> None:
    """Let a schedule that depends on the validation bound follow that of an epoch."""
    if bound is None:
        return
    if isinstance(schedule, Schedule):
        schedule.follow_bound(bound)
    elif isinstance(schedule, ReduceLROnPlateau):
        schedule.step(bound if schedule.mode == "max" else -bound)


def _chosen(choice: str | Mapping[str, Any], what: str, choices: Mapping[str, Callable]) -> tuple[Callable, dict[str, Any]]:
    table = {"kind": choice} if isinstance(choice, str) else dict(choice)
    name = str(table.pop("kind", None)).casefold().replace("-", "_")
    if name not in choices:
        raise ValueError(unknown(what, choice if isinstance(choice, str) else choice.get("kind"), choices))
    return choices[name], table


def _check_options(what: str, choice: Any, options: Mapping[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(unknown(f"{what} {choice['kind']!r} option", name, known))

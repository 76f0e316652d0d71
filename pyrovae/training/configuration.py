"""What a run depends on, as plain values: a checkpoint is taken up by a run of the same configuration only."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ..data.batches import Batches, content_hash
from ..registry import describe
from .options import FitOptions
from .setup import Setup
from .tensors import PairTensors

__all__ = ["configuration", "differences", "machine"]

# Options that may change: how long to train, what is shown and kept. The others decide what a step computes.
FREE = {
    "epochs", "max_steps", "max_seconds", "progress", "on_epoch", "callbacks", "checkpoint", "every", "resume", "compile",
    "estimator", "validation", "max_skips",
}  # fmt: skip
# Rows of which one hash is taken, so that hashing needs no copy of the data.
ROWS_AT_ONCE = 8192


def configuration(setup: Setup, options: FitOptions, tensors: PairTensors) -> dict[str, Any]:
    """What the steps of a run depend on, besides its state: data, the pair's tensors, the estimator and the options."""
    found: dict[str, Any] = {
        "data": _fingerprint(setup.train),
        "validation": None if setup.held_out is None else _fingerprint(setup.held_out),
        "estimator": _described(setup.estimator),
        "device": setup.first.device.type,
    }
    found |= {name: _plain(value) for name, value in vars(options).items() if name not in FREE}
    found["compile"] = options.compiles(setup.total_steps)
    if setup.depends_on_length:
        found["steps of the schedule"] = setup.total_steps
    for name, tensor in tensors.now().items():
        found[f"tensor {name}"] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ, each with both values."""
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key} was {before.get(key, 'missing')!s}, is {now.get(key, 'missing')!s}"
        for key in keys
        if before.get(key, "missing") != now.get(key, "missing")
    ]


def machine() -> dict[str, Any]:
    """What rounding depends on: with other versions or numbers of threads, a resumed run can differ in the last digits."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}


def _fingerprint(batches: Batches) -> str:
    """A hash of data in memory or read by rows, in their order; of a loader's, their number and that of batches."""
    if batches.changes:
        source = getattr(batches.source, "dataset", batches.source)
        return f"a {type(source).__name__} of {batches.num_data} data in {batches.num_batches} batches"
    return f"{batches.num_data} data {content_hash(each for part in batches.in_order(ROWS_AT_ONCE) for each in part)}"


def _described(estimator: Any) -> Any:
    try:
        return _plain(describe(estimator, "estimator"))
    except ValueError:  # the user's own class
        return f"{type(estimator).__qualname__} of {estimator.num_particles} particles"


def _plain(value: Any) -> Any:
    """A value as JSON keeps it; functions and classes by name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, partial):
        return f"{_plain(value.func)} {[_plain(each) for each in value.args]} {_plain(value.keywords)}"
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return type(value).__qualname__

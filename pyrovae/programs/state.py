"""A pair's part of Pyro's parameter store, and the buffers of its modules.

Parameters of modules live in the modules; only bare ``pyro.param`` values live in the store. So each call works in a copy of
the store without the parameters of other modules, and two models with the same names do not share parameters.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from torch import nn

from .reachable import modules_of, parameters_of

__all__ = ["buffers_kept", "in_own_scope", "one_thread", "own_scope"]

Function = TypeVar("Function", bound=Callable[..., Any])
_turn = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """A context that one thread at a time is in; others wait.

    Pyro's handlers and parameter store, and torch's random stream, belong to the process and not to a thread.
    """
    with _turn:
        yield


@contextmanager
def own_scope(
    model: Any, guide: Any, *, keep: bool = False, undo: tuple[type[BaseException], ...] = (ValueError, TypeError)
) -> Iterator[None]:
    """Work in a copy of Pyro's parameter store, without the parameters of other modules.

    Args:
        model: a Pyro program.
        guide: a Pyro program.
        keep: keep the bare parameters that were made and the submodules that modules built. Otherwise the store and the modules
            are restored.
        undo: the exceptions after which nothing is kept.
    """
    with one_thread(), _own_scope(model, guide, keep, undo):
        yield


@contextmanager
def _own_scope(model: Any, guide: Any, keep: bool, undo: tuple[type[BaseException], ...]) -> Iterator[None]:
    store = pyro.get_param_store()
    outside = store.get_state()
    inside = _without_foreign(outside, parameters_of(model, guide))
    built = [_Built(module) for module in modules_of(model, guide)]
    _set_state(inside)
    keeping = keep
    try:
        yield
    except undo:
        keeping = False
        raise
    finally:
        found = store.get_state()
        _set_state(outside)
        if keeping:
            _write_back(found, set(inside["params"]), _module_parameters(model, guide))
        else:
            for module in built:
                module.restore()


@contextmanager
def buffers_kept(model: Any, guide: Any) -> Iterator[None]:
    """Restore the buffers of a pair's modules afterwards, such as running statistics."""
    built = [_Built(module) for module in modules_of(model, guide)]
    try:
        yield
    finally:
        for module in built:
            module.restore_buffers()


def in_own_scope(keep: bool = False) -> Callable[[Function], Function]:
    """Decorate a function of a model and a guide, so that it runs in :func:`own_scope`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def scoped(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
            with own_scope(model, guide, keep=keep):
                return function(model, guide, *args, **kwargs)

        return scoped  # type: ignore[return-value]

    return decorate


def _module_parameters(*programs: Any) -> set[int]:
    """The ids of the parameters that the programs' modules own."""
    return {id(value) for module in modules_of(*programs) for value in module._parameters.values() if value is not None}


def _set_state(state: Any) -> None:
    store = pyro.get_param_store()
    store.clear()
    store.set_state(state)


def _without_foreign(state: Any, own: dict[int, nn.Parameter]) -> Any:
    """A store's state without the parameters that live in modules of other pairs."""
    others = {id(p): p for p in state["params"].values() if isinstance(p, nn.Parameter) and id(p) not in own}
    foreign = _in_living_modules(others) if others else set()
    kept = {name for name, parameter in state["params"].items() if id(parameter) not in foreign}
    return {part: {name: value for name, value in entries.items() if name in kept} for part, entries in state.items()}


def _in_living_modules(parameters: dict[int, nn.Parameter]) -> set[int]:
    """The ids of the parameters that some module owns; the others came from a file, or were made for the store."""
    found: set[int] = set()
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module):
            found.update(id(value) for value in each.__dict__.get("_parameters", {}).values() if id(value) in parameters)
    return found


def _write_back(found: Any, known: set[str], in_modules: set[int]) -> None:
    """Put into the store the parameters that a call made there, except those of modules, unless the store had their names."""
    store = pyro.get_param_store()
    kept = {name for name, parameter in found["params"].items() if name in known or id(parameter) not in in_modules}
    for name in (known | kept) & set(store):
        del store[name]
    store.set_state({part: {name: entries[name] for name in entries if name in kept} for part, entries in found.items()})


class _Built:
    """A module's parts and its buffers' values, to be restored after a run that built more, as autoguides do."""

    _PARTS = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")

    def __init__(self, module: nn.Module):
        self.module, self.attributes = module, dict(vars(module))
        self.parts = {part: dict(vars(module)[part]) for part in self._PARTS if part in vars(module)}
        self.buffers = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and not isinstance(buffer, nn.parameter.UninitializedBuffer)
        }

    def restore(self) -> None:
        """Restore the parts and the buffers."""
        now = vars(self.module)
        if any(now[part].keys() != before.keys() for part, before in self.parts.items()):
            now.clear()
            now.update(self.attributes)
            for part, before in self.parts.items():
                now[part].clear()
                now[part].update(before)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Restore the buffers' values."""
        with torch.no_grad():
            for buffer, value in self.buffers.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

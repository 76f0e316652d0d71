"""What a pair leaves behind: the modules its programs use, and its part of Pyro's parameter store.

Parameters of modules live in the modules; only bare ``pyro.param`` values live in the store. So each call works in a copy of
the store without the entries that belong to other modules, and two models of the same names never meet.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor, nn

# What a search for modules goes through, at most: a closure may hold anything.
MOST_VISITED, MOST_ITEMS = 20_000, 1000
# Packages whose own globals hold no user's network.
_LIBRARIES = ("torch", "pyro", "pyrovae", "numpy", "functools", "contextlib", "zuko")
Door = TypeVar("Door", bound=Callable[..., Any])


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs use, each once: their own, and those in partials, closures, globals and attributes."""
    return [thing for thing in _reachable(programs) if isinstance(thing, nn.Module)]


def parameters_held(*programs: Any) -> dict[int, nn.Parameter]:
    """The ``nn.Parameter`` objects that live in the programs' modules or closures, by their ids."""
    held = {id(thing): thing for thing in _reachable(programs) if isinstance(thing, nn.Parameter)}
    return held | _of_modules(modules_of(*programs))


def _of_modules(modules: list[nn.Module]) -> dict[int, nn.Parameter]:
    parameters = [value for module in modules for value in module._parameters.values() if value is not None]
    return {id(parameter): parameter for parameter in parameters}


def _reachable(programs: tuple[Any, ...]) -> Iterator[Any]:
    waiting, seen = list(reversed(programs)), dict[int, Any]()
    while waiting and len(seen) < MOST_VISITED:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing  # kept alive, so that no other takes its id
        yield thing
        waiting.extend(_held_by(thing))


def _held_by(thing: Any) -> list[Any]:
    """What a thing holds that a program which uses it may use."""
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, types.FunctionType):
        return _held_by_function(thing)
    if isinstance(thing, nn.Module):
        public = [value for name, value in vars(thing).items() if not name.startswith("_")]
        return [*thing.children(), *filter(_may_hold, public)]
    if isinstance(thing, list | tuple | set | frozenset | dict):
        items = list(thing.values() if isinstance(thing, dict) else thing) if len(thing) <= MOST_ITEMS else []
        return list(filter(_may_hold, items))
    return list(filter(_may_hold, getattr(thing, "__dict__", {}).values())) if _may_hold(thing) else []


def _held_by_function(function: types.FunctionType) -> list[Any]:
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    if (function.__module__ or "").split(".")[0] not in _LIBRARIES:
        names = set(_names(function.__code__))
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                inside = [vars(value)[attribute] for attribute in names & vars(value).keys()]
                held += [item for item in inside if isinstance(item, nn.Module)]
            else:
                held.append(value)
    return list(filter(_may_hold, held))


def _names(code: types.CodeType) -> Iterator[str]:
    """The global and attribute names in a function and in those that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _may_hold(thing: Any) -> bool:
    if isinstance(thing, nn.Module | nn.Parameter | types.FunctionType | types.MethodType | functools.partial):
        return True
    if isinstance(thing, Tensor | type | types.ModuleType | str | bytes | int | float | complex | None):
        return False
    if isinstance(thing, list | tuple | set | frozenset | dict):
        return bool(thing)
    return type(thing).__module__.split(".")[0] not in ("torch", "numpy") and hasattr(thing, "__dict__")


@contextmanager
def own_scope(
    model: Any, guide: Any, *, keep: bool = False, undo: tuple[type[BaseException], ...] = (ValueError, TypeError)
) -> Iterator[None]:
    """Work in a copy of Pyro's parameter store, without the parameters of other modules.

    Args:
        model: a Pyro program.
        guide: another.
        keep: afterwards the store has the bare parameters that were made, and modules what they built of themselves. Else both
            are as they were.
        undo: what makes it not keep.
    """
    store = pyro.get_param_store()
    outside = store.get_state()
    inside = _without_foreign(outside, parameters_held(model, guide))
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
            _write_back(found, set(inside["params"]), _of_modules(modules_of(model, guide)))
        else:
            for module in built:
                module.restore()


@contextmanager
def buffers_kept(model: Any, guide: Any) -> Iterator[None]:
    """Running statistics and the like of a pair's modules are afterwards what they were."""
    built = [_Built(module) for module in modules_of(model, guide)]
    try:
        yield
    finally:
        for module in built:
            module.restore_buffers()


def in_own_scope(keep: bool = False) -> Callable[[Door], Door]:
    """Decorate a function of a model and a guide, so that it runs in :func:`own_scope`."""

    def decorate(door: Door) -> Door:
        @functools.wraps(door)
        def scoped(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
            with own_scope(model, guide, keep=keep):
                return door(model, guide, *args, **kwargs)

        return scoped  # type: ignore[return-value]

    return decorate


def _set_state(state: Any) -> None:
    store = pyro.get_param_store()
    store.clear()
    store.set_state(state)


def _without_foreign(state: Any, held: dict[int, nn.Parameter]) -> Any:
    """A store's state without the parameters that live in modules of other pairs."""
    others = {id(p): p for p in state["params"].values() if isinstance(p, nn.Parameter) and id(p) not in held}
    foreign = _in_living_modules(others) if others else set()
    kept = {name for name, parameter in state["params"].items() if id(parameter) not in foreign}
    return {part: {name: value for name, value in entries.items() if name in kept} for part, entries in state.items()}


def _in_living_modules(parameters: dict[int, nn.Parameter]) -> set[int]:
    """The ids of those parameters that some module holds; the rest came from a file, or were made for the store."""
    found: set[int] = set()
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            found.update(id(value) for value in thing.__dict__.get("_parameters", {}).values() if id(value) in parameters)
    return found


def _write_back(found: Any, known: set[str], in_modules: dict[int, nn.Parameter]) -> None:
    """Put into the store what a call made there; what modules hold stays with them, unless its name has always been here."""
    store = pyro.get_param_store()
    kept = {name for name, parameter in found["params"].items() if name in known or id(parameter) not in in_modules}
    for name in (known | kept) & set(store):
        del store[name]
    store.set_state({part: {name: entries[name] for name in entries if name in kept} for part, entries in found.items()})


class _Built:
    """What a module is made of, and its buffers' values, to be put back where a run has built more, as autoguides do."""

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
        """Put it back."""
        now = vars(self.module)
        if any(now[part].keys() != before.keys() for part, before in self.parts.items()):
            now.clear()
            now.update(self.attributes)
            for part, before in self.parts.items():
                now[part].clear()
                now[part].update(before)
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Put its buffers' values back."""
        with torch.no_grad():
            for buffer, value in self.buffers.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

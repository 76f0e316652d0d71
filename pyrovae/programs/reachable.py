"""What a program can reach: the objects that its code refers to by closure, global name, attribute or item.

A captured graph follows the tensors that a program reads, but not its Python state: an attribute, a list, a counter. This walk
finds that state, so that a change of it is noticed, and the networks that a program calls, so that they can be named.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyro.infer
from torch import Tensor, nn

SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Packages whose own functions and objects keep no state of a user's program; networks are looked into whoever wrote them.
LIBRARIES = {"torch", "pyro", "numpy", "scipy", "tqdm", "pyrovae"} | set(sys.stdlib_module_names)
# A walk ends there: a program that holds more objects keeps data, not settings.
MOST_OBJECTS = 20_000


def reachable(*programs: Any) -> Iterator[tuple[str, Any]]:
    """Each object that the programs can reach, once, with a name for it such as ``"decoder.weight"``; numbers each time.

    Example:
        >>> from torch import nn
        >>> from pyrovae.programs.reachable import reachable
        >>> def program(net, beta):
        ...     return lambda x: beta * net(x)
        >>> [name for name, value in reachable(program(nn.Linear(1, 2), 0.5)) if isinstance(value, float | nn.Parameter)]
        ['beta', 'net.weight', 'net.bias']
    """
    seen: dict[int, Any] = {}  # kept alive, so that no other object takes an id
    waiting: deque[tuple[str, Any]] = deque(("", program) for program in programs)
    while waiting and len(seen) < MOST_OBJECTS:
        name, value = waiting.popleft()
        if isinstance(value, SCALARS):
            yield name, value
        elif id(value) not in seen:
            seen[id(value)] = value
            yield name, value
            waiting.extend((f"{name}.{part}".strip(".") if part else name, each) for part, each in _parts(value))


def modules_of(*programs: Any) -> dict[str, nn.Module]:
    """The networks that programs can reach, by name, those within others left out."""
    found = {name or type(value).__name__: value for name, value in reachable(*programs) if isinstance(value, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return {name: module for name, module in found.items() if id(module) not in inner}


def python_state(*programs: Any) -> dict[str, list[Any]]:
    """Everything reachable by name, as what tells whether it has changed: a value, an identity, a tensor's version."""
    state: dict[str, list[Any]] = {}
    for name, value in reachable(*programs):
        state.setdefault(name, []).append(_token(value))
    return state


def changed(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """The names of what differs."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def changed_numbers(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """The names of plain values that differ: a counter, say. Objects that a run puts in another's place do not count."""
    return sorted(
        name
        for name in before.keys() & after.keys()
        if before[name] != after[name] and all(isinstance(each, SCALARS) for each in (*before[name], *after[name]))
    )


def _token(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Tensor):
        return (id(value), value.requires_grad, -1 if value.is_inference() else value._version)
    if isinstance(value, np.ndarray):
        return (id(value), value.tobytes() if value.size <= MOST_OBJECTS else None)
    return (id(value),)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object refers to, each with the name that it goes by there."""
    if isinstance(value, MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, partial):
        return [("", value.func), *_by_place(value.args), *value.keywords.items()]
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, Mapping):
        return [(str(key) if isinstance(key, SCALARS) else "", each) for key, each in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return _by_place(value)
    if isinstance(value, property):
        return [("", value.fget)]
    if isinstance(value, staticmethod | classmethod):
        return [("", value.__func__)]
    if isinstance(value, type):
        return [] if _is_library(value) else [*vars(value).items(), *(("", base) for base in value.__bases__)]
    if isinstance(value, nn.Module) and not type(value).__module__.startswith("torch.fx"):
        return _of_module(value)
    if isinstance(value, Tensor | np.ndarray | ModuleType):
        return []
    if _is_library(type(value)) and not isinstance(value, SimpleNamespace | Namespace | pyro.infer.ELBO):
        return []
    slots = [name for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *((name, getattr(value, name)) for name in slots), ("", type(value))]


def _by_place(values: Iterable[Any]) -> list[tuple[str, Any]]:
    """Items named by their places."""
    return [(str(place), each) for place, each in enumerate(values)]


def _of_module(module: nn.Module) -> list[tuple[str, Any]]:
    inner = [item for group in _GROUPS for item in getattr(module, group).items()]
    own = [(name, each) for name, each in vars(module).items() if name not in _USUAL or (each and name not in _GROUPS)]
    return [*inner, *own, ("", type(module))]


def _of_function(function: FunctionType) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            parts.append((name, cell.cell_contents))
        except ValueError:  # not set yet
            continue
    parts += _by_place(function.__defaults__ or ()) + list((function.__kwdefaults__ or {}).items())
    parts += list(vars(function).items())
    if not _is_library(function):
        names = set(_names(function.__code__))
        for name in sorted(names & function.__globals__.keys()):
            found = function.__globals__[name]
            if not isinstance(found, ModuleType):
                parts.append((name, found))
            elif found.__name__.partition(".")[0] not in LIBRARIES:
                parts += [(f"{name}.{each}", vars(found)[each]) for each in sorted(names & vars(found).keys())]
    return parts


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that code and the functions within it mention."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_library(value: Callable[..., Any]) -> bool:
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


# What every network has; of the rest, hooks above all, only what is not empty says anything.
_GROUPS = ("_modules", "_parameters", "_buffers")
_USUAL = set(vars(nn.Module())) - {"training"}

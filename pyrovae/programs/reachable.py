"""What a program can reach: the objects that its code refers to by closure, global name, attribute or item.

A captured graph follows the tensors that a program reads, but not its Python state: an attribute, a list, a counter. This walk
finds that state, so that a change is noticed. It also finds the networks and parameters that a program uses.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyro.infer
from torch import Tensor, nn

__all__ = [
    "changed", "changed_numbers", "modules_of", "outermost_modules", "parameters_of", "python_state", "reachable",
]  # fmt: skip

SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Packages whose functions and objects keep no state of a user's program. The walk enters their networks all the same.
# pytest puts its own functions into whatever asserts.
LIBRARIES = {"torch", "pyro", "numpy", "scipy", "tqdm", "pyrovae", "pytest", "_pytest"} | set(sys.stdlib_module_names)
# The walk stops after this many objects: a program that holds more keeps data, not settings.
MOST_OBJECTS = 20_000
# A search for modules skips collections with more items than this: they hold data.
MOST_ITEMS = 1000
# What to look for: all state that the programs' numbers may depend on, or only what may hold a network or a parameter.
Scope = Literal["state", "modules"]


def reachable(*programs: Any, scope: Scope = "state") -> Iterator[tuple[str, Any]]:
    """Yield each object that the programs can reach, once, with a name such as ``"decoder.weight"``; plain values each time.

    Args:
        *programs: Pyro programs, or any other objects.
        scope: ``"state"`` follows classes and all collections, and skips instances of library classes. ``"modules"`` skips
            classes, plain values, tensors other than parameters, and long collections, and follows instances of library
            classes: a distribution may hold a parameter.

    Example:
        >>> from torch import nn
        >>> from pyrovae.programs.reachable import reachable
        >>> def program(net, beta):
        ...     return lambda x: beta * net(x)
        >>> [name for name, value in reachable(program(nn.Linear(1, 2), 0.5)) if isinstance(value, float | nn.Parameter)]
        ['beta', 'net.weight', 'net.bias']
    """
    visited: dict[int, Any] = {}  # keeps the objects alive, so that no new object gets the id of an old one
    waiting: deque[tuple[str, Any]] = deque(("", program) for program in programs)
    while waiting and len(visited) < MOST_OBJECTS:
        name, value = waiting.popleft()
        if isinstance(value, SCALARS):
            yield name, value
        elif id(value) not in visited:
            visited[id(value)] = value
            yield name, value
            for part, each in _parts(value, scope):
                if scope == "state" or _may_hold_modules(each):
                    waiting.append((f"{name}.{part}".strip(".") if part else name, each))


def modules_of(*programs: Any) -> list[nn.Module]:
    """The networks that the programs can reach, each once, with the networks inside them."""
    return [value for _, value in reachable(*programs, scope="modules") if isinstance(value, nn.Module)]


def parameters_of(*programs: Any) -> dict[int, nn.Parameter]:
    """The ``nn.Parameter`` objects that the programs can reach, by their ids: those of modules, and those in closures."""
    return {id(value): value for _, value in reachable(*programs, scope="modules") if isinstance(value, nn.Parameter)}


def outermost_modules(*programs: Any) -> dict[str, nn.Module]:
    """The networks that the programs can reach, by name, without those inside other networks."""
    found = {name or type(value).__name__: value for name, value in reachable(*programs) if isinstance(value, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return {name: module for name, module in found.items() if id(module) not in inner}


def python_state(*programs: Any) -> dict[str, list[Any]]:
    """Every reachable object by name, as a token that changes when the object does: value, identity, or tensor version."""
    state: dict[str, list[Any]] = {}
    for name, value in reachable(*programs):
        state.setdefault(name, []).append(_token(value))
    return state


def changed(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """The names of the objects that differ."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def changed_numbers(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """The names of plain values that differ, such as a counter. An object that was replaced by another one does not count."""
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


def _may_hold_modules(value: Any) -> bool:
    """Whether a search for modules follows a value."""
    if type(value) in SCALARS:  # most values, and faster than isinstance of a Parameter
        return False
    if isinstance(value, nn.Module | nn.Parameter | FunctionType | MethodType | partial):
        return True
    if isinstance(value, (*SCALARS, Tensor, type, ModuleType)):
        return False
    if isinstance(value, list | tuple | set | frozenset | Mapping | deque):
        return 0 < len(value) <= MOST_ITEMS
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy") and hasattr(value, "__dict__")


def _parts(value: Any, scope: Scope) -> Iterable[tuple[str, Any]]:
    """The objects that an object refers to, each with its name there."""
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
    if isinstance(value, nn.Module) and (scope == "modules" or not type(value).__module__.startswith("torch.fx")):
        return _of_module(value)
    if isinstance(value, Tensor | np.ndarray | ModuleType):
        return []
    keeps_state = isinstance(value, SimpleNamespace | Namespace | pyro.infer.ELBO)
    if scope == "state" and _is_library(type(value)) and not keeps_state:
        return []
    slots = [name for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *((name, getattr(value, name)) for name in slots), ("", type(value))]


def _by_place(values: Iterable[Any]) -> list[tuple[str, Any]]:
    """Items, each named by its place."""
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
        except ValueError:  # the variable has no value yet
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
    """The global names and attributes that code mentions, with those of the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_library(value: Callable[..., Any]) -> bool:
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0] in LIBRARIES


# The attributes that every network has. The others, mostly hooks, are followed where they are not empty.
_GROUPS = ("_modules", "_parameters", "_buffers")
_USUAL = set(vars(nn.Module())) - {"training"}

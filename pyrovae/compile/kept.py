"""Graphs that outlive a call: they are kept while their programs live, for the next call of the same structure."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ..programs.reachable import python_state, reachable
from .captured import Captured
from .settings import cxx_flags, native_level

__all__ = ["MOST_KEPT", "put", "take"]

# Sets of graphs, of all programs of the process together; the set that was used least recently goes first.
MOST_KEPT = 16

Graphs = dict[tuple, Captured]


class _Entry(NamedTuple):
    """Graphs, the objects that their programs belong to, and what the programs could reach."""

    owners: tuple[weakref.ref, ...]
    structure: tuple[dict[str, list[Any]], list[tuple[str, int]]]
    graphs: Graphs


_KEPT: OrderedDict[Hashable, _Entry] = OrderedDict()


def take(programs: tuple[Any, ...], name: Hashable) -> Graphs:
    """The graphs that an earlier call kept for these programs under this name; none if there are none.

    There are none if a plain value that the programs can reach has changed, or an object was replaced. The parameters may have
    other values, which graphs read anew. Each graph is compared with the programs at its next use all the same. A set is taken
    by one call at a time.

    Args:
        programs: the functions, bound methods or modules that the graphs record.
        name: what else a graph depends on: which function of the programs it is, and its options.
    """
    owners = [_owner(program) for program in programs]
    entry = _KEPT.pop(_key(programs, name), None)
    if entry is None or not all(ref() is owner for ref, owner in zip(entry.owners, owners, strict=True)):
        return {}
    if entry.structure != _structure(programs):
        return {}
    for graph in entry.graphs.values():
        graph.kept = True
    return entry.graphs


def put(programs: tuple[Any, ...], name: Hashable, graphs: Graphs) -> None:
    """Keep graphs for the next call, until one of the objects that the programs belong to is gone.

    Graphs that were not compared, and programs to which there is no weak reference, are not kept.
    """
    key = _key(programs, name)
    ready = {shapes: graph for shapes, graph in graphs.items() if graph.run is not None and not graph.due}

    def forget(_: weakref.ref) -> None:
        _KEPT.pop(key, None)

    try:
        owners = tuple([weakref.ref(_owner(program), forget) for program in programs])
    except TypeError:  # an object with __slots__, say
        return
    if ready:
        _KEPT[key] = _Entry(owners, _structure(programs), ready)
        while len(_KEPT) > MOST_KEPT:
            _KEPT.popitem(last=False)


def _owner(program: Any) -> Any:
    """The object that a bound method belongs to, or the function itself."""
    return getattr(program, "__self__", program)


def _structure(programs: tuple[Any, ...]) -> tuple[dict[str, list[Any]], list[tuple[str, int]]]:
    """What the programs can reach, by name: plain values, and objects and the memory of tensors by their identities."""
    # A bound method is a new object each time that it is asked for.
    owners = [part for program in programs for part in (_owner(program), getattr(program, "__func__", None))]
    state = {name: tokens for name, tokens in python_state(*owners).items() if name.rpartition(".")[2] != "training"}
    tensors = [(name, value) for name, value in reachable(*owners) if isinstance(value, Tensor)]
    tensors += pyro.get_param_store().named_parameters()
    # Training gives a tensor other numbers, and another version with them, in the same memory.
    trained = {id(value) for _, value in tensors}
    state = {name: [_without_version(token, trained) for token in tokens] for name, tokens in state.items()}
    return state, [(name, value.data_ptr()) for name, value in tensors if value.layout is torch.strided]


def _without_version(token: Any, tensors: set[int]) -> Any:
    return token[0] if isinstance(token, tuple) and token[0] in tensors else token


def _key(programs: tuple[Any, ...], name: Hashable) -> Hashable:
    """Programs by their identity, so that the key keeps no object alive, with the settings of the process."""
    settings = (torch.get_num_threads(), torch.get_default_dtype(), native_level(), cxx_flags())
    return name, settings, *((id(_owner(program)), getattr(program, "__func__", None)) for program in programs)

"""The parameters of a pair, as Pyro's SVI finds them."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .reachable import modules_of, parameters_of
from .sites import Program
from .tracing import inspection, trace_pair

__all__ = ["all_parameters", "find_parameters", "own_parameters", "refuse_uninitialized"]


def find_parameters(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The unconstrained leaf parameters of a pair, as Pyro's SVI finds them, each once.

    If a program is a bound method of an ``nn.Module``, its parameters are included, even without ``pyro.module``. If Pyro's
    store has another module's parameter of the same name, the pair's own parameter is returned.
    """
    return _leaves(model, guide, _parameter_sites(model, guide, args, kwargs))


def _leaves(model: Program, guide: Program, sites: list[tuple[str, Tensor, Tensor]]) -> list[Tensor]:
    """The leaf parameters of a pair, with those of the modules whose bound methods are its programs."""
    found = {id(own): own for _, own, _ in sites}
    for program in (model, guide):
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                found.setdefault(id(parameter), parameter)
    return [parameter for parameter in found.values() if parameter.requires_grad and parameter.is_leaf]


def _parameter_sites(model: Program, guide: Program, args: tuple, kwargs: dict) -> list[tuple[str, Tensor, Tensor]]:
    """The name of each parameter statement, the parameter that the pair uses, and the one in Pyro's store."""
    own = parameters_of(model, guide)
    with inspection(model, guide, args), _ParameterRecorder() as recorder:
        trace_pair(model, guide, args, kwargs, 1, None)
    return [(name, given if id(given) in own else live, live) for name, given, live in recorder.sites]


class _ParameterRecorder(Messenger):
    """Record each parameter statement. In a trace, a second module of the same name would hide the first."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[tuple[str, Any, Tensor]] = []

    def _pyro_post_param(self, msg: Any) -> None:
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        value = msg["value"]
        self.sites.append((msg["name"], given, value.unconstrained() if hasattr(value, "unconstrained") else value))


def own_parameters(model: Program, guide: Program, args: tuple) -> list[Tensor]:
    """As :func:`find_parameters`, and remove from the store others' parameters with the name of one of the pair's."""
    store, sites = pyro.get_param_store(), _parameter_sites(model, guide, args, {})
    others = {name for name, own, live in sites if own is not live and name in store}
    for name in others:
        del store[name]
    return _leaves(model, guide, _parameter_sites(model, guide, args, {}) if others else sites)


def all_parameters(model: Program, guide: Program) -> list[Tensor]:
    """The parameters of the pair's modules and of Pyro's store."""
    return [*parameters_of(model, guide).values(), *(value for _, value in pyro.get_param_store().named_parameters())]


def refuse_uninitialized(model: Program, guide: Program) -> None:
    """Refuse lazy modules that have not run, whose parameters have no shape yet.

    Raises:
        ValueError: a module of the pair is such a one.
    """
    for module in modules_of(model, guide):
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(
                f"The parameters of {type(module).__name__} must have a shape before a pair is trained or scored, got a lazy "
                f"module that has not run: call its network once on a batch, or state the number of inputs, as nn.Linear does."
            )

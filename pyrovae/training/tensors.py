"""The tensors of a pair by name, the best of them so far, and the random streams: what a run has to keep."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..programs.reachable import reachable
from ..programs.sites import Program

__all__ = ["Best", "PairTensors", "generators_of", "random_states", "set_random_states"]


class PairTensors:
    """Parameters and buffers of a pair by name, as they are now.

    If the pair has one outermost network, the names are those of its ``state_dict``.

    Args:
        model: p(x, z).
        guide: q(z|x).
        parameters: those that are trained; the ones outside networks have the names of Pyro's store.
    """

    def __init__(self, model: Program, guide: Program, parameters: list[Tensor]):
        self._live: dict[str, Callable[[], Tensor]] = {}
        self.names: dict[int, str] = {}
        for prefix, module in _outermost(model, guide):
            for name, parameter in module.named_parameters():
                self._add(prefix + name, parameter)
            for name in dict(module.named_buffers()):  # the tensor may be another one later
                self._live[prefix + name] = partial(module.get_buffer, name)
        stored = {id(value): name for name, value in pyro.get_param_store().named_parameters()}
        for place, each in enumerate(parameters):
            self._add(stored.get(id(each), f"parameter {place}"), each)

    def _add(self, name: str, parameter: Tensor) -> None:
        if id(parameter) not in self.names:
            self.names[id(parameter)] = name
            self._live[name] = partial(_itself, parameter)

    def now(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {name: live() for name, live in self._live.items()}

    def copies(self) -> dict[str, Tensor]:
        """Copies of the tensors."""
        return {name: live().detach().clone() for name, live in self._live.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Write values into the tensors."""
        for name, value in values.items():
            self._live[name]().copy_(value)

    def others(self) -> dict[str, Tensor]:
        """Further tensors in Pyro's store, such as the baselines that some of Pyro's estimators keep there."""
        known = {id(tensor) for tensor in self.now().values()}
        stored = pyro.get_param_store().get_state()["params"]
        return {name: value for name, value in stored.items() if id(value) not in known}

    @torch.no_grad()
    def load_others(self, values: Mapping[str, Tensor]) -> None:
        """Write values into Pyro's store."""
        store = pyro.get_param_store()
        stored = store.get_state()["params"]
        for name, value in values.items():
            if name in stored:
                stored[name].copy_(value)
            else:
                store[name] = value


class Best:
    """The tensors of the epoch with the best validation bound."""

    def __init__(self) -> None:
        self.bound, self.epoch = -math.inf, 0
        self.values: dict[str, Tensor] = {}

    def update(self, epoch: int, bound: float, tensors: PairTensors) -> None:
        """Take an epoch into account."""
        if bound > self.bound:
            self.bound, self.epoch, self.values = bound, epoch, tensors.copies()


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the random streams of torch, of the device, of NumPy and of Python."""
    states = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002  (transforms and data sets draw from it)
        "python": random.getstate(),
    }
    return states | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Go back to what :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "device" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


def generators_of(loader: DataLoader[Any] | None) -> list[torch.Generator]:
    """The generators of its own that a loader and its samplers draw from."""
    if loader is None:
        return []
    batches = loader.batch_sampler
    holders = (loader, loader.sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _outermost(*programs: Program) -> Iterator[tuple[str, nn.Module]]:
    """The networks that are not inside others, each with the beginning of its tensors' names."""
    found = [(name or type(value).__name__, value) for name, value in reachable(*programs) if isinstance(value, nn.Module)]
    inner = {id(part) for _, module in found for part in module.modules() if part is not module}
    outer = [(name, module) for name, module in found if id(module) not in inner]
    if len(outer) == 1:
        yield "", outer[0][1]
        return
    taken: dict[str, int] = {}
    for name, module in outer:
        taken[name] = taken.get(name, 0) + 1
        yield f"{name}." if taken[name] == 1 else f"{name}_{taken[name]}.", module


def _itself(tensor: Tensor) -> Tensor:
    return tensor

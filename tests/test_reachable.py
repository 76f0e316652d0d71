"""The walk finds what a program's numbers may depend on, and names it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pyrovae.programs.reachable import changed, changed_numbers, outermost_modules, parameters_of, python_state, reachable

LEVEL = 1.0


@dataclass(slots=True)
class Slotted:
    beta: float = 1.0


class Classy:
    shared = 1.0

    def __call__(self, x: float) -> float:
        return self.shared * x


def cases() -> dict[str, tuple[Any, Callable[[], None]]]:
    """A program, and a change of something that its numbers depend on."""
    cell, items, table, space = [1.0], [[1.0]], {"a": {"b": 1.0}}, SimpleNamespace(beta=1.0)
    options, slotted, array, net = argparse.Namespace(beta=1.0), Slotted(), np.ones(3), nn.Sequential(nn.Tanh())
    buffer, owner = torch.ones(2), nn.Module()
    owner.scale = 1.0

    def method(self: Any, x: float) -> float:
        return self.scale * x

    def assign_global() -> None:
        global LEVEL
        LEVEL += 1.0

    return {
        "closure": (lambda x: cell[0] * x, lambda: cell.__setitem__(0, 2.0)),
        "nested list": (lambda x: items[0][0] * x, lambda: items[0].append(2.0)),
        "nested table": (lambda x: table["a"]["b"] * x, lambda: table["a"].update(b=2.0)),
        "namespace": (lambda x: space.beta * x, lambda: setattr(space, "beta", 2.0)),
        "arguments": (lambda x: options.beta * x, lambda: setattr(options, "beta", 2.0)),
        "slots": (lambda x: slotted.beta * x, lambda: setattr(slotted, "beta", 2.0)),
        "numpy": (lambda x: array.sum() * x, lambda: array.fill(2.0)),
        "tensor in place": (lambda x: buffer.sum().item() * x, lambda: buffer.fill_(2.0)),
        "global": (lambda x: LEVEL * x, assign_global),
        "class": (Classy(), lambda: setattr(Classy, "shared", Classy.shared + 1)),
        "partial": (functools.partial(lambda c, x: c[0] * x, cell), lambda: cell.__setitem__(0, 3.0)),
        "module's part": (lambda x: net(x), lambda: net.__setitem__(0, nn.ReLU())),
        "module's mode": (lambda x: net(x), lambda: net.train(not net.training) and None),
        "attribute of a method's owner": (method.__get__(owner), lambda: setattr(owner, "scale", 2.0)),
    }


@pytest.mark.parametrize("kind", cases())
def test_a_change_shows(kind: str) -> None:
    program, change = cases()[kind]
    before = python_state(program)
    assert not changed(before, python_state(program))
    change()
    assert changed(before, python_state(program))


def test_only_plain_values_count_as_counted() -> None:
    state = SimpleNamespace(calls=0, last=torch.ones(1), seen=[])

    def program() -> None:
        state.calls += 1
        state.last = torch.ones(1)
        state.seen.append(1.0)

    before = python_state(program)
    program()
    assert changed_numbers(before, python_state(program)) == ["state.calls"]


def test_networks_are_found_whole_and_by_name() -> None:
    encoder, decoders = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), {"x": nn.Linear(1, 1)}

    def program(x: torch.Tensor) -> torch.Tensor:
        return decoders["x"](encoder(x))

    assert outermost_modules(program) == {"encoder": encoder, "decoders.x": decoders["x"]}
    assert outermost_modules(encoder) == {"Sequential": encoder}


def test_a_walk_ends() -> None:
    loop: list[Any] = list(range(10))
    loop.append(loop)
    assert len(list(reachable(lambda: loop))) == 12


def test_a_tensor_of_inference_mode_has_no_version_and_is_known_by_itself() -> None:
    with torch.inference_mode():
        held = {"weight": torch.ones(2)}

    def program(x: torch.Tensor) -> torch.Tensor:
        return held["weight"] * x

    before = python_state(program)
    assert not changed(before, python_state(program))
    with torch.inference_mode():
        held["weight"] = torch.ones(2)
    assert changed(before, python_state(program)) == ["held.weight"]


def test_what_an_optimizer_holds_is_not_the_programs() -> None:
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    def program(x: torch.Tensor) -> torch.Tensor:
        assert optimizer is not None  # rewritten by pytest, whose own objects are not followed
        return net(x)

    assert set(parameters_of(program)) == {id(net.weight), id(net.bias)}

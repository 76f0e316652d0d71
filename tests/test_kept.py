"""Graphs that are kept between calls: the same numbers as new ones, whatever changed in between."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pyrovae as pv
from pyrovae.compile import graph as compile_graph
from pyrovae.compile import kept
from pyrovae.compile.graph import Staged
from pyrovae.evidence import planning

X = torch.bernoulli(torch.full((8, 6), 0.3), generator=torch.Generator().manual_seed(0))


def a_vae() -> Any:
    torch.manual_seed(0)
    return pv.make_vae(6, latent_dim=2, hidden=[8])


class Scaled(torch.nn.Module):
    """A program with parameters, a plain value and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.power, self.shift = torch.nn.Linear(3, 2), 1.0, torch.zeros(2)
        self.levels = np.zeros(2)
        self.law = torch.distributions.Normal(torch.zeros(2), 1.0)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.power * self.layer(x) + self.shift + torch.tensor(self.levels) + self.law.loc + torch.randn(len(x), 2),)


def _kept_run(program: Scaled, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What a call returns that has graphs kept, at the third chunk."""
    torch.manual_seed(seed)
    with torch.no_grad(), contextlib.closing(Staged(program.run, "aten", programs=(program.run,), keep="run")) as staged:
        chunks = [staged.submit(x + chunk)()[0] for chunk in range(3)]
        assert staged.captured
        assert staged.reason is None
    return chunks[-1]


def _plain_run(program: Scaled, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return [program.run(x + chunk)[0] for chunk in range(3)][-1]


def _no_change(program: Scaled) -> None:
    pass


def _trained_on(program: Scaled) -> None:
    with torch.no_grad():
        program.layer.weight.mul_(1.5)


def _to_evaluation(program: Scaled) -> None:
    program.eval()


def _another_value(program: Scaled) -> None:
    program.power = 1.0 + 1e-7  # too near for a comparison of numbers


def _other_numbers_in_an_array(program: Scaled) -> None:
    program.levels += 1e-7


def _another_tensor(program: Scaled) -> None:
    program.shift = torch.ones(2)


def _another_layer(program: Scaled) -> None:
    program.layer = torch.nn.Linear(3, 2)


def _other_memory(program: Scaled) -> None:
    program.layer.weight.data = program.layer.weight.data * (1.0 + 1e-7)


def _inside_an_object_of_torch(program: Scaled) -> None:
    program.law.loc = torch.ones(2)  # where no walk goes: the comparison of numbers finds it


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        (_no_change, 0),
        (_trained_on, 0),
        (_to_evaluation, 0),
        (_another_value, 1),
        (_other_numbers_in_an_array, 1),
        (_another_tensor, 1),
        (_another_layer, 1),
        (_other_memory, 1),
        (_inside_an_object_of_torch, 1),
    ],
)
def test_a_later_call_takes_the_graphs_of_an_earlier_one(
    change: Callable[[Scaled], None], captures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    program, x, traced = Scaled(), torch.randn(5, 3), []
    trace = compile_graph.trace
    monkeypatch.setattr(compile_graph, "trace", lambda *args: traced.append(args) or trace(*args))
    assert torch.allclose(_kept_run(program, x), _plain_run(program, x))
    assert len(traced) == 1
    change(program)
    assert torch.allclose(_kept_run(program, x, seed=1), _plain_run(program, x, seed=1), atol=1e-6)
    assert len(traced) == 1 + captures
    assert torch.allclose(_kept_run(program, x[:4], seed=1), _plain_run(program, x[:4], seed=1), atol=1e-6)
    assert len(traced) == 2 + captures, "another shape has a graph of its own, whatever was kept"


def test_graphs_go_with_their_programs() -> None:
    gc.collect()
    before = len(kept._KEPT)
    for _ in range(3):
        _kept_run(Scaled(), torch.ones(5, 3))
    gc.collect()
    assert len(kept._KEPT) == before
    programs = [Scaled() for _ in range(kept.MOST_KEPT + 3)]
    for program in programs:
        _kept_run(program, torch.ones(5, 3))
    assert len(kept._KEPT) == kept.MOST_KEPT


def test_a_call_within_a_call_has_graphs_of_its_own() -> None:
    program = Scaled()
    _kept_run(program, torch.ones(5, 3))
    with contextlib.closing(Staged(program.run, "aten", programs=(program.run,), keep="run")) as outer:
        assert torch.allclose(_kept_run(program, torch.ones(5, 3)), _plain_run(program, torch.ones(5, 3)))
        assert len(outer._earlier) == 1
        assert not kept.take((program.run,), ("other", "aten", "float32", 1))


def test_scoring_again_captures_nothing_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_graph, "_inductor", lambda module, *args: module)
    monkeypatch.setattr(planning, "PROBES_TO_CAPTURE", 1)
    traced: list[Any] = []
    trace = compile_graph.trace
    monkeypatch.setattr(compile_graph, "trace", lambda *args: traced.append(args) or trace(*args))
    vae = a_vae()
    first, again = (vae.log_marginal(X, num_samples=300, compile=True, seed=0) for _ in range(2))
    sizing = 1  # of each call
    assert len(traced) == 3 + sizing
    np.testing.assert_array_equal(first.log_px, again.log_px)
    np.testing.assert_array_equal(first.missed, again.missed)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.9)
    changed = vae.log_marginal(X, num_samples=300, compile=True, seed=0)
    anew = a_vae()
    anew.load_state_dict(vae.state_dict())
    np.testing.assert_array_equal(changed.log_px, anew.log_marginal(X, num_samples=300, compile=True, seed=0).log_px)

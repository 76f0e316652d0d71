"""A captured function: its graph, the random numbers that it draws, and the state that a comparison puts back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .rewrites import draws_as_inputs

__all__ = ["Captured", "State", "random_state", "set_random_state"]

Tensors = tuple[Tensor, ...]


class Captured:
    """A captured function: a module whose inputs are the function's, then the tensors that it closes over.

    The latter are inputs too, so that no compiler takes a parameter for a constant.
    """

    def __init__(self, module: fx.GraphModule):
        graph = module.graph
        self.outside: list[Tensor] = []
        self.draws: list[partial[Tensor]] = []
        self.run: Callable[..., Any] | None = None
        self.due = "at its second call"  # compare with the function at the next call; how to name this moment, or ""
        self.captured_on: Tensors | None = None
        self.kept = False  # whether an earlier call captured it, of programs that may have changed since
        placed: dict[int, fx.Node] = {}
        last = list(graph.find_nodes(op="placeholder"))[-1]
        for node in list(graph.find_nodes(op="get_attr")):
            tensor = getattr(module, node.target)
            if id(tensor) not in placed:
                with graph.inserting_after(last):
                    last = placed[id(tensor)] = graph.placeholder(f"outside_{len(self.outside)}")
                self.outside.append(tensor.detach())  # shares the storage, so it follows an optimizer's updates
                last.meta["val"] = self.outside[-1]
            node.replace_all_uses_with(placed[id(tensor)])
            graph.erase_node(node)
        self.module = fx.GraphModule(nn.Module(), graph)

    def __call__(self, inputs: Tensors, drawn: Tensors) -> Tensors:
        """The function's value, from the random numbers that are inputs."""
        assert self.run is not None
        return tuple(self.run(*inputs, *self.outside, *drawn))

    def draw_first(self) -> bool:
        """Make random numbers inputs of the graph; whether it draws any, and all can be drawn before the rest."""
        self.draws = draws_as_inputs(self.module)
        return bool(self.draws)

    def drawn(self) -> Tensors:
        """Draw the random numbers that are inputs."""
        return tuple(draw() for draw in self.draws)

    def value_of(self, run: Callable[..., Any], inputs: Tensors) -> Tensors:
        """The values of a form of the graph on the inputs, as copies."""
        with torch.no_grad():
            return tuple(tensor.clone() for tensor in run(*inputs, *self.outside, *self.drawn()))

    def close(self, staged: Tensors, eager: Tensors, inputs: Tensors, *, exactly: bool) -> bool:
        """Whether values agree, up to the rounding of the same kernels (``exactly``) or of a compiler's."""
        tensors = [tensor for tensor in (*self.outside, *inputs, *eager) if tensor.is_floating_point()]
        coarsest = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
        return _close(staged, eager, tolerance=min(3 * coarsest ** (0.75 if exactly else 0.5), 0.1))


class State:
    """The random stream and the tensors that a graph closes over, to be restored: a run draws numbers and moves buffers."""

    def __init__(self, graph: Captured, inputs: Tensors):
        self.outside, self.random = graph.outside, random_state(inputs)
        self.values = [tensor.clone() for tensor in graph.outside]

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore both."""
        set_random_state(self.random)
        for tensor, value in zip(self.outside, self.values, strict=True):
            tensor.copy_(value)


def random_state(inputs: Tensors) -> list[tuple[torch.device, Tensor]]:
    """The states of the random streams of the CPU and of the devices of the inputs."""
    gpus = {tensor.device for tensor in inputs if tensor.is_cuda}
    return [(torch.device("cpu"), torch.get_rng_state())] + [(gpu, torch.cuda.get_rng_state(gpu)) for gpu in gpus]


def set_random_state(states: list[tuple[torch.device, Tensor]]) -> None:
    """Set random streams to states that :func:`random_state` returned."""
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _close(staged: Tensors, eager: Tensors, tolerance: float) -> bool:
    if len(staged) != len(eager):
        return False
    largest = max(float(torch.nan_to_num(tensor, 0.0, 0.0, 0.0).double().norm()) for tensor in eager)
    for have, want in zip(staged, eager, strict=True):
        if have.shape != want.shape or not torch.equal(torch.isfinite(have), torch.isfinite(want)):
            return False
        finite = torch.isfinite(want)
        error = float((have[finite].double() - want[finite].double()).norm())
        if error > tolerance * (float(want[finite].double().norm()) + 1e-2 * largest) + 1e-12:
            return False
    return True

"""A step's graphs described, and made again in another process, so that a resumed run computes the same bits.

A compiled graph rounds otherwise than its program, so a run that goes on must take each step from the same kind of graph as the
run that was interrupted: captured, compiled, recorded for CUDA, or none. Graphs themselves are not kept on disk: they are code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cuda import products_in
from .inductor import Tensors
from .step import Step

__all__ = ["capture_again", "graphs_of", "record_again"]

# A shape and a type of each input.
Shapes = list[tuple[list[int], str]]


def graphs_of(step: Step) -> dict[str, Any]:
    """Which graphs a step has, as JSON can hold it."""
    staged = step._staged
    return {
        "backend": staged.backend,
        "uses": [[_shapes(key), uses] for key, uses in staged._uses.items()],
        "graphs": [[_shapes(key), graph.run is not None, graph.due] for key, graph in staged._graphs.items()],
        "single": step.asynchronous and step.recorder is None,
        "recorded_uses": [[_shapes(key), uses] for key, uses in step._uses.items()],
        "recorded": [_shapes(key[0]) for key in step._graphs],
    }


def capture_again(step: Step, known: dict[str, Any], example: Tensors) -> None:
    """Capture and compile the graphs that a step had. It runs the pair, so random streams and buffers are restored after it.

    Args:
        step: a new step of the same pair.
        known: what :func:`graphs_of` returned.
        example: the inputs of a step.
    """
    staged = step._staged
    if staged.backend == "eager":
        return
    if known["backend"] == "eager":
        staged._fall_back("eager", "the run that it resumes found that its graph gives other numbers")
        return
    device = step.parameters[0].device
    inputs = step._with_beta(example, getattr(step.estimator, "current_beta", None))
    with products_in(step.precision, device):
        for shapes, compiled, due in known["graphs"]:
            like = _like(inputs, shapes)
            key = tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in like])
            staged._first(key, like)
            if key not in staged._graphs:  # it could not be captured, and a warning has said so
                return
            if known["recorded"]:
                staged.leave_uncompiled()
            if compiled:
                staged(*like)
            if key in staged._graphs:
                staged._graphs[key].due = due
    staged._uses = {_key(shapes, device): uses for shapes, uses in known["uses"]}


def record_again(step: Step, known: dict[str, Any], example: Tensors) -> None:
    """Record the CUDA graphs that a step had, once the optimizer has its state. Nothing changes by it.

    Args:
        step: as in :func:`capture_again`, which has been called.
        known: what :func:`graphs_of` returned.
        example: the inputs of a step.
    """
    if not step.asynchronous:
        return
    if known["single"]:
        step.recorder = None
        return
    step._settings = step._update.settings() if known["graphs"] else None
    moving = len(example) if step._moving is None else step._moving
    beta = getattr(step.estimator, "current_beta", None)
    for shapes in known["recorded"]:
        inputs = (*_like(example[:moving], shapes), *example[moving:])
        shape_key = tuple([(each.shape, each.dtype, each.device) for each in inputs[:moving]])
        if step.recorder is not None:
            step._graph((shape_key, tuple(map(id, inputs[moving:]))), inputs, moving, beta)
    step._uses = {_key(shapes, step.parameters[0].device): uses for shapes, uses in known["recorded_uses"]}


def _shapes(key: Any) -> Shapes:
    return [(list(shape), str(dtype).removeprefix("torch.")) for shape, dtype, _ in key]


def _key(shapes: Shapes, device: torch.device) -> tuple:
    return tuple([(torch.Size(shape), getattr(torch, dtype), device) for shape, dtype in shapes])


def _like(example: Tensors, shapes: Shapes) -> Tensors:
    """The example with other sizes: its rows cut or repeated."""
    made = []
    for tensor, (shape, _) in zip(example, shapes, strict=True):
        like: Tensor = tensor
        for dim, size in enumerate(shape):
            if like.shape[dim] != size:
                like = like.index_select(dim, torch.arange(size, device=like.device) % like.shape[dim])
        made.append(like)
    return tuple(made)

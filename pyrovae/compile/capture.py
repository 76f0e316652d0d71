"""Capture: one run of a function recorded as a graph of torch's operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode

from ..programs.tracing import ReadError

__all__ = ["trace"]

Tensors = tuple[Tensor, ...]
# Reads of a tensor's values into Python, most of which the tracer does not see.
READS = {"numpy", "tolist", "item", "__array__", "__dlpack__", "__float__", "__int__", "__index__", "__bool__", "__complex__"}
# Functions by which Pyro's own losses read values, to report them and to warn; they decide nothing by them.
PYRO_REPORTS = {("pyro.infer.util", "torch_item"), ("pyro.util", "warn_if_nan")}
PYRO_LOSSES = {"pyro.infer.trace_elbo", "pyro.infer.trace_mean_field_elbo"}


def trace(function: Callable[..., Tensors], inputs: Tensors) -> tuple[fx.GraphModule, Tensors]:
    """Record one run as a graph; return it, and what that run returned.

    Raises:
        RuntimeError: the function reads a value that depends on inputs or parameters into Python.
        Exception: whatever else stops the tracer or the function.
    """
    returned: list[Tensors] = []

    def run(*traced: Tensor) -> Tensors:
        outputs = function(*traced)
        returned.append(tuple(tensor.detach() for tensor in outputs))
        return outputs

    with _RefuseReads():
        module = make_fx(run)(*inputs)
    return module, returned[-1]


class _RefuseReads(TorchFunctionMode):
    """Refuses to read values that depend on inputs or parameters: the graph would keep those of the first run for ever.

    The tracer itself refuses reads that are operations, and does not see ``.numpy()``, ``.tolist()`` and the like. Pyro's
    losses read values in two of their functions only to report them: there an item stays a tensor, and nothing is NaN.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in REPORTED and args and isinstance(args[0], Tensor):
            reporting = _reporting_function(sys._getframe(1))
            if reporting == "torch_item" and name == "item":
                return args[0].detach()
            if reporting == "warn_if_nan":
                return {"register_hook": None, "isnan": args[0], "any": args[0], "__bool__": False}[name]
        if name in READS and args and isinstance(args[0], Tensor):
            mode, tensor = get_proxy_mode(), args[0]
            if tensor.requires_grad or (mode is not None and has_proxy_slot(tensor, mode.tracer)):
                raise ReadError(f"it reads a tensor's values into Python, by {name}")
        return func(*args, **(kwargs or {}))


# What those two functions of Pyro call.
REPORTED = {"item", "register_hook", "isnan", "any", "__bool__"}


def _reporting_function(frame: FrameType | None) -> str | None:
    """Which of Pyro's reporting functions makes a call, if one of its losses called that function; else ``None``."""
    for _ in range(MOST_FRAMES):
        if frame is None:
            return None
        name = frame.f_code.co_name
        if (frame.f_globals.get("__name__"), name) in PYRO_REPORTS:
            caller = frame.f_back
            return name if caller is not None and caller.f_globals.get("__name__") in PYRO_LOSSES else None
        frame = frame.f_back
    return None


# Frames between a mode and the function of Pyro that calls torch: torch's own, and Pyro's torch_isnan.
MOST_FRAMES = 6

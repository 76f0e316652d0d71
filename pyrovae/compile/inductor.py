"""Inductor: compile a captured graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from .kernels import SHIMS
from .matmul import round_products, select_matmul_backend
from .notes import note
from .rewrites import join_decoders, rewrite

__all__ = ["MOST_POOLED", "Tensors", "computed_values", "scalars_on", "without_wrappers"]

Tensors = tuple[Tensor, ...]
# The values of a graph share one allocation if the largest has at most this many bytes.
MOST_POOLED = 2**22


def computed_values(module: fx.GraphModule) -> list[Tensor]:
    """The values of a graph that take memory: those that are not views of others."""
    values = []
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)  # operator.getitem has none
        if node.op == "call_function" and (schema is None or all(value.alias_info is None for value in schema.returns)):
            values.append(node.meta.get("val"))
    return [value for value in values if isinstance(value, Tensor)]


def _inductor(module: fx.GraphModule, inputs: Tensors, rounded: bool, single_threaded: bool) -> Callable[..., Any]:
    """Compile a graph; with rounded products if asked, and for a single thread if calls run side by side."""
    on_gpu = any(tensor.is_cuda for tensor in inputs)
    # Not torch.compile: its guards read every parameter at each call, a tenth of a small step, and can only find other shapes.
    # Nor the checks of sizes and strides, a twentieth: graphs are kept by shape, and their inputs made contiguous.
    # Nor Inductor's own CUDA graphs, which copy all parameters at each call: pyrovae.compile.cuda captures whole steps.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    if single_threaded:
        options["cpp.threads"] = 1
    if on_gpu:
        module = scalars_on(module, next(tensor.device for tensor in inputs if tensor.is_cuda))
    else:
        module = join_decoders(module, rounded)
    threads = 1 if single_threaded else torch.get_num_threads()
    if rounded:
        module = round_products(module, None if on_gpu else threads)
    if not on_gpu:
        module = select_matmul_backend(rewrite(module), threads)
    # One allocation in place of fifty, unless it reaches the 32 MB from which malloc maps fresh memory each time.
    pooled = max((value.numel() * value.element_size() for value in computed_values(module)), default=0) <= MOST_POOLED
    for node in module.graph.nodes:
        node.meta.clear()  # the tracer's shapes have another form than the C++ wrapper accepts
    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch's own, about torch
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # precision="tf32" asks for them
        if on_gpu:
            return _compile_fx(module, inputs, options)
        pools = {"memory_planning": True, "memory_pool": "outputs"} if pooled else {}
        try:
            # A C++ wrapper calls the kernels without Python, which saves a tenth of a small step.
            compiled = _compile_fx(module, inputs, options | pools | {"cpp_wrapper": True} | _shims(module))
        except Exception as error:  # whatever Inductor or the C++ compiler says; Python can still call the kernels
            reason = error
        else:
            return without_wrappers(compiled)
        compiled = _compile_fx(module, inputs, options)
    # Outside the filters above, and only if the second way succeeds: if it fails as well, its own error says why.
    line = next(iter(str(reason).strip().splitlines()), "")[:200]
    note(
        "C++ wrapper",
        f"Compiled steps run a little slower, since Inductor cannot call this graph's kernels from C++ "
        f"({type(reason).__name__}: {line}) and calls them from Python.",
    )
    return compiled


def scalars_on(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The same graph with its scalar constants on a device.

    ``torch.where(mask, 0.0, x)`` records a scalar tensor on the CPU, which Inductor may copy at each call. A CUDA graph
    must not.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.scalar_tensor.default):
        node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    return module


def _compile_fx(module: fx.GraphModule, inputs: Tensors, options: dict[str, Any]) -> Callable[..., Any]:
    from torch import _inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class StaticMode(FakeTensorMode):
        """A mode whose sizes are numbers: torch 2.14 asks for symbols whatever the mode's own setting is."""

        def from_tensor(self, tensor: Tensor, *, static_shapes: bool | None = None, **options: Any) -> Any:
            options["symbolic_context"] = None
            return super().from_tensor(tensor, static_shapes=True, **options)

    # Inductor's cache on disk takes only graphs with an environment of symbolic sizes, even if it has none.
    sizes = StaticMode(shape_env=ShapeEnv(), static_shapes=True)
    lowering = logging.getLogger("torch._inductor.ir")
    lowering.addFilter(_says_more_than_slow_calls)
    try:
        with tracing(TracingContext(sizes)):
            return _inductor.compile(module, list(inputs), options=options)
    finally:
        lowering.removeFilter(_says_more_than_slow_calls)


def _says_more_than_slow_calls(record: logging.LogRecord) -> bool:
    """False of Inductor's notes that it calls an operator by a slower way, which a user can do nothing about."""
    return "missing a c-shim implementation" not in record.getMessage()


def _shims(module: fx.GraphModule) -> dict[str, Any]:
    """The option by which a graph calls our products without the dispatcher, if it has any and this torch has the option."""
    from torch._inductor import config

    usable = hasattr(config.aot_inductor, "custom_ops_to_c_shims") and any(node.target in SHIMS for node in module.graph.nodes)
    return {"aot_inductor.custom_ops_to_c_shims": SHIMS} if usable else {}


def without_wrappers(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled graph without the Python functions that torch wraps around it, if they do nothing.

    Between two small steps the processor's caches lose Python's code, so that a hundred lines of it cost a tenth of a step. The
    first call shows whether the wrappers do anything: not if the graph inside gets the very tensors that they got, and they
    return the very tensors that it returns.
    """
    graph = _graph_inside(compiled)
    if graph is None:
        note("wrappers", "torch's Python wrappers stay around compiled graphs: the graph inside is not found.", warn=False)
        return compiled
    direct: Callable[[list[Tensor]], Sequence[Tensor]] = graph.current_callable
    checked = skip = False

    def run(*args: Tensor) -> Sequence[Tensor]:
        nonlocal checked, skip
        if skip:
            return direct(list(args))
        if checked:
            return compiled(*args)
        calls: list[tuple[list[Any], Any]] = []

        def recorded(inputs: list[Any]) -> Any:
            received = list(inputs)  # the graph empties the list
            returned = direct(inputs)
            calls.append((received, returned))
            return returned

        graph.current_callable = recorded
        try:
            outputs = compiled(*args)
        finally:
            graph.current_callable = direct
        checked = True
        skip = len(calls) == 1 and _identical(calls[0][0], args) and _identical(calls[0][1], outputs)
        return outputs

    return run


def _graph_inside(compiled: Callable[..., Any]) -> Any | None:
    """The compiled graph that torch's wrapper functions hold, or ``None`` unless they hold exactly one."""
    from torch._inductor.output_code import CompiledFxGraph

    waiting: list[Any] = [compiled]
    found: dict[int, CompiledFxGraph] = {}
    visited: set[int] = set()
    while waiting and len(visited) < MOST_WRAPPERS:
        wrapper = waiting.pop()
        if id(wrapper) in visited:
            continue
        visited.add(id(wrapper))
        if isinstance(wrapper, CompiledFxGraph) and wrapper.current_callable is not None:
            found[id(wrapper)] = wrapper
        else:
            waiting.append(getattr(wrapper, "__wrapped__", None))
            waiting += _closed_over(wrapper)
    return next(iter(found.values())) if len(found) == 1 else None


def _closed_over(function: Any) -> list[Any]:
    """The values that a Python function closes over; none for anything else."""
    values = []
    for cell in (function.__closure__ or ()) if isinstance(function, FunctionType) else ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            continue
    return values


# Wrapper functions and values that they hold; torch 2.13 has eleven.
MOST_WRAPPERS = 100


def _identical(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))

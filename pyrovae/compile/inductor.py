"""Inductor: compile a captured graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from .kernels import SHIMS
from .matmul import round_products, select_matmul_backend
from .rewrites import join_decoders, rewrite

Tensors = tuple[Tensor, ...]
# Bytes of the largest value of a graph whose values share one allocation.
MOST_POOLED = 2**22


def _computed(module: fx.GraphModule) -> list[Tensor]:
    """The values that take memory: not those that view another."""
    values = []
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)  # which picking one of several values has not
        if node.op == "call_function" and (schema is None or all(value.alias_info is None for value in schema.returns)):
            values.append(node.meta.get("val"))
    return [value for value in values if isinstance(value, Tensor)]


def _inductor(module: fx.GraphModule, inputs: Tensors, rounded: bool, single_threaded: bool) -> Callable[..., Any]:
    """Compile; with rounded products, and for one thread each time where calls run side by side."""
    from torch import _inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    on_gpu = any(tensor.is_cuda for tensor in inputs)
    # Not torch.compile: its guards read every parameter at each call, a tenth of a small step, and shapes are all they find.
    # Nor its own checks of sizes and strides, a twentieth: graphs are kept by shape, and their inputs made contiguous.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    # Not Inductor's own CUDA graphs, which copy all parameters at each call: see pyrovae.cuda.
    options |= {"cpp.threads": 1} if single_threaded else {}
    if on_gpu:
        module = scalars_on(module, next(tensor.device for tensor in inputs if tensor.is_cuda))
    else:
        module = join_decoders(module, rounded)
    threads = 1 if single_threaded else torch.get_num_threads()
    if rounded:
        module = round_products(module, None if on_gpu else threads)
    if not on_gpu:
        module = select_matmul_backend(rewrite(module), threads)
    # One allocation where there were fifty, as long as it stays below the 32 MB from which each is a fresh mapping.
    pooled = max((value.numel() * value.element_size() for value in _computed(module)), default=0) <= MOST_POOLED
    for node in module.graph.nodes:
        node.meta.clear()  # the shapes that the tracer noted are in its own terms, which the C++ wrapper refuses

    def compiled(wrapper: dict[str, Any]) -> Callable[..., Any]:
        # Inductor keeps what it made on disk for the next process, but only of graphs whose sizes could have been symbols.
        sizes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        with tracing(TracingContext(sizes)):
            return _inductor.compile(module, list(inputs), options=options | wrapper)

    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch's own, about torch
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # precision="tf32" asks for them
        if not on_gpu:
            # Kernels that call each other in C++ save a tenth of a small step; some operations have no such form.
            with contextlib.suppress(Exception):
                pools = {"memory_planning": True, "memory_pool": "outputs"} if pooled else {}
                return _unwrapped(compiled({"cpp_wrapper": True} | pools | _past_the_dispatcher(module)))
        return compiled({})


def scalars_on(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The same graph with its scalar constants on a device.

    ``torch.where(mask, 0.0, x)`` records a scalar tensor on the CPU, which Inductor may copy at each call. A CUDA graph
    must not.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.scalar_tensor.default):
        node.kwargs = {**node.kwargs, "device": device}
    module.recompile()
    return module


def _past_the_dispatcher(module: fx.GraphModule) -> dict[str, Any]:
    """The option by which a graph calls our products straight, where it has any and this torch knows how."""
    from torch._inductor import config

    known = hasattr(config.aot_inductor, "custom_ops_to_c_shims") and any(node.target in SHIMS for node in module.graph.nodes)
    return {"aot_inductor.custom_ops_to_c_shims": SHIMS} if known else {}


def _unwrapped(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled graph without what torch has around it in Python, where that does nothing.

    Between two small steps the processor's caches forget Python's code, so a hundred lines of it cost a tenth of a step. On the
    first call it shows what the wrappers do: nothing, if the graph within gets the very tensors that they got, and returns the
    very ones that they return.
    """
    from torch._inductor.output_code import CompiledFxGraph

    within: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
    called = False

    def run(*args: Tensor) -> Sequence[Tensor]:
        nonlocal within, called
        if within is not None:
            return within(list(args))
        if called:
            return compiled(*args)
        called = True
        seen: list[tuple[CompiledFxGraph, list[Any], Any]] = []

        def watch(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
            given = list(inputs)  # which the graph empties
            outputs = original(graph, inputs)
            seen.append((graph, given, outputs))
            return outputs

        original = CompiledFxGraph.__call__
        with mock.patch.object(CompiledFxGraph, "__call__", watch):
            outputs = compiled(*args)
        if len(seen) == 1:
            graph, given, returned = seen[0]
            if _same(given, args) and _same(returned, outputs):
                within = graph.current_callable
        return outputs

    return run


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))

"""Which library multiplies the matrices of a graph: MKL, oneDNN or our own products; and products rounded to bfloat16."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import partial
from timeit import timeit

import torch
from torch import Tensor, fx

from . import kernels
from .choices import measured_once
from .notes import note
from .patterns import FEWEST_MULTIPLICATIONS, VIEWS, _replace, _split_addmm, aten

__all__ = ["NATIVE_CLEARLY_FASTER", "native_is_faster", "round_products", "select_matmul_backend"]


def round_products(module: fx.GraphModule, threads: int | None = None) -> fx.GraphModule:
    """Round the factors of every float32 product and convolution to bfloat16; all else stays in float32.

    bfloat16 instructions multiply exactly and add in float32. Libraries then round the sum to bfloat16; our own products, which
    are used if they are clearly faster, do not, and leave the factors of few rows unrounded, since rounding those takes longer
    than it saves. A linear layer's bias is added after that.

    Args:
        module: what ``make_fx`` captured, changed in place; each node's ``meta["val"]`` has its dtype.
        threads: number of CPU threads that the products will use; ``None`` leaves all products to a library.

    Returns:
        The module.
    """
    graph = module.graph
    rounded: dict[fx.Node, fx.Node] = {}
    last_placeholder = list(graph.find_nodes(op="placeholder"))[-1]

    def factor(value: object) -> object:
        if not (isinstance(value, fx.Node) and value.meta["val"].dtype is torch.float32):
            return value
        if value not in rounded:
            with graph.inserting_after(last_placeholder if value.op == "placeholder" else value):
                rounded[value] = graph.call_function(aten._to_copy.default, (value,), {"dtype": torch.bfloat16})
        return rounded[value]

    def in_float32(node: fx.Node) -> None:
        with graph.inserting_after(node):
            wide = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
        wide.meta = dict(node.meta)
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)

    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.addmm.default and not node.kwargs:
            _split_addmm(graph, node)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        # A convolution's gradients that are not used have no value.
        outputs = [user for user in node.users if "val" in user.meta] if isinstance(node.meta["val"], tuple) else [node]
        if any(output.meta["val"].dtype is not torch.float32 for output in outputs):
            continue
        if threads is not None and node.target is aten.mm.default and _use_native(graph, node, threads, rounded=True):
            continue
        node.args = tuple(factor(value) for value in node.args)
        for output in outputs:
            in_float32(output)
    module.recompile()
    return module


PRODUCTS = (aten.mm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default)


def select_matmul_backend(module: fx.GraphModule, threads: int) -> fx.GraphModule:
    """Let our own products compute a graph's float32 products if they are clearly faster here than MKL, else oneDNN if that is.

    torch multiplies by MKL, which is slow on processors that Intel did not make. The alternatives are timed once for each
    machine (:mod:`pyrovae.compile.choices`) and used only if clearly faster, so that noise decides little.
    ``PYROVAE_NATIVE=decoder`` leaves our own out.

    Args:
        module: what ``make_fx`` captured on the CPU, changed in place; each node's ``meta["val"]`` has its shape and dtype.
        threads: number of threads that the products will use.

    Returns:
        The module.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = (factor.meta.get("val") for factor in node.args)
        if left is None or right is None or left.dtype is not torch.float32 or left.device.type != "cpu":
            continue  # rounded factors, which have no value noted, and other dtypes
        (rows, depth), columns = left.shape, right.shape[1]
        if _use_native(module.graph, node, threads, rounded=False):
            continue
        if rows * depth * columns >= FEWEST_MULTIPLICATIONS:
            order = _onednn_order(rows, depth, columns, (left.is_contiguous(), right.is_contiguous()), threads)
            if order is not None:
                node.target, node.args = torch.ops.pyrovae.mm.default, (*node.args, order == "transposed")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


# Of MKL's time. On Intel's processors oneDNN takes as long or longer, on others half; timing noise is a tenth.
CLEARLY_FASTER = 0.75
# Fewer rows or columns do not repay a copy of the other factor; deeper panels leave the second-level cache.
THINNEST_NATIVE, DEEPEST_NATIVE = 16, 3072
# Fewer rows take less time unrounded.
FEWEST_ROWS_TO_ROUND = 48
# Of MKL's time, on average over products of small and large steps: on a Zen 4 ours take 0.7.
NATIVE_CLEARLY_FASTER = 0.9


def _use_native(graph: fx.Graph, node: fx.Node, threads: int, rounded: bool) -> bool:
    """Replace a product of float32 matrices by our own if that is faster; whether it was replaced."""
    left, _ = node.args
    assert isinstance(left, fx.Node)
    (rows, depth), columns = left.meta["val"].shape, node.meta["val"].shape[1]
    if min(rows, columns) < THINNEST_NATIVE or depth > DEEPEST_NATIVE or not native_is_faster(threads, rounded):
        return False
    node.target = torch.ops.pyrovae.product.default
    node.args = (*node.args, threads, rounded and rows >= FEWEST_ROWS_TO_ROUND)
    _with_squares(graph, node)
    return True


def native_is_faster(threads: int, rounded: bool) -> bool:
    """Whether our products are clearly faster than the library's: one answer for all shapes, so that noise decides little."""
    if not kernels.register_products():
        return False
    question = f"our products, {'bfloat16' if rounded else 'float32'}, threads {threads}"
    return measured_once(question, partial(_native_time_ratio, threads, rounded))["native"] <= NATIVE_CLEARLY_FASTER


def _native_time_ratio(threads: int, rounded: bool) -> dict[str, float]:
    """The mean ratio of our time to the library's over products forward, to the weights and to the inputs of a layer."""
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    batches = (100, 1000) if rounded else (20, 100, 1000)
    pairs = [(ones(rows, 784), ones(200, 784).t()) for rows in batches]
    pairs += [(ones(rows, 784).t(), ones(rows, 200)) for rows in batches]
    pairs += [(ones(rows, 784), ones(784, 200)) for rows in batches]
    library = _rounded_by_a_library if rounded else torch.mm
    native = partial(torch.ops.pyrovae.product, threads=threads, rounded=rounded)
    contenders: dict[str, Callable[[], Tensor]] = {}
    for place, pair in enumerate(pairs):
        contenders |= {f"library{place}": partial(library, *pair), f"native{place}": partial(native, *pair)}
    with _on(threads):
        seconds = _seconds(contenders, laps=12)
    ratios = [seconds[f"native{place}"] / seconds[f"library{place}"] for place in range(len(pairs))]
    return {"native": sum(ratios) / len(ratios)}


def _rounded_by_a_library(left: Tensor, right: Tensor) -> Tensor:
    return (left.bfloat16() @ right.bfloat16()).float()


def _onednn_order(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> str | None:
    """``"straight"`` or ``"transposed"`` if oneDNN is clearly faster than MKL so, else ``None``.

    A large product is asked first: on a processor where that gains nothing, no other is measured.
    """
    if min(_onednn_time_ratio(1024, 784, 256, (True, False), 1).values(), default=1.0) > CLEARLY_FASTER:
        return None
    ratios = _onednn_time_ratio(rows, depth, columns, contiguous, threads)
    best = min(ratios, key=lambda order: ratios[order], default=None)
    return best if best is not None and ratios[best] <= CLEARLY_FASTER else None


def _onednn_time_ratio(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> dict[str, float]:
    """The ratio of oneDNN's time to MKL's, for the product as it is and for its transpose; empty without oneDNN."""
    layouts = ", ".join("rows" if each else "columns" for each in contiguous)
    question = f"oneDNN, {rows} x {depth} x {columns}, contiguous {layouts}, threads {threads}"
    return measured_once(question, partial(_time_onednn, rows, depth, columns, contiguous, threads))


def _time_onednn(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> dict[str, float]:
    if not torch.backends.mkldnn.is_available():
        return {}
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    left = ones(rows, depth) if contiguous[0] else ones(depth, rows).t()
    right = ones(depth, columns) if contiguous[1] else ones(columns, depth).t()
    orders = {order: partial(torch.ops.pyrovae.mm, left, right, order == "transposed") for order in ("straight", "transposed")}
    try:
        with _on(threads):
            seconds = _seconds({"mkl": partial(torch.mm, left, right), **orders})
    except RuntimeError as error:  # a build whose oneDNN has no such product
        note(
            "oneDNN",
            f"This torch's oneDNN does not multiply float32 matrices ({str(error).splitlines()[0][:200]}).",
            warn=False,
        )
        return {}
    return {order: seconds[order] / seconds["mkl"] for order in orders}


def _with_squares(graph: fx.Graph, product: fx.Node) -> None:
    """Compute a product's sum of squares, if a gradient's norm needs it, while the product is in registers."""
    views = [product]
    for node in views:
        views += [user for user in node.users if user.target in (aten.t.default, *VIEWS)]
    squared = [user for node in views for user in node.users if user.target is aten.pow.Tensor_Scalar and user.args[1] == 2]
    sums = [user for node in squared for user in node.users if user.target is aten.sum.default and not user.kwargs]
    # No operation in between may write in place: it might write to a view of the product.
    order = {node: place for place, node in enumerate(graph.nodes)}
    last = max((order[node] for node in sums), default=-1)
    if not sums or any(_writes(node) for node in list(order)[order[product] : last]):
        return
    with graph.inserting_before(product):
        both = graph.call_function(torch.ops.pyrovae.product_and_squares.default, product.args)
    with graph.inserting_after(product):
        found = [graph.call_function(operator.getitem, (both, place)) for place in (1, 0)]
    for node in sums:
        _replace(node, found[0])
    _replace(product, found[1])


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


@contextlib.contextmanager
def _on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(before)


def _seconds(contenders: dict[str, Callable[[], Tensor]], laps: int = 6) -> dict[str, float]:
    """The shortest time of each, run in turn: other load on the machine only adds to it."""
    times = [{name: timeit(run, number=1) for name, run in contenders.items()} for _ in range(laps)]
    return {name: min(lap[name] for lap in times) for name in contenders}

"""Which library multiplies the matrices of a graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import cache, partial
from timeit import timeit

import torch
from torch import Tensor, fx

from . import kernels
from .patterns import FEWEST_MULTIPLICATIONS, VIEWS, _replace, _split_addmm, aten


def round_products(module: fx.GraphModule, threads: int | None = None) -> fx.GraphModule:
    """In place, every float32 product and convolution, of its factors in bfloat16; all else stays in float32.

    A processor's bfloat16 units multiply exactly and add up in float32. Libraries round the sum once more; our own tiles, where
    they are clearly faster, leave it as it is, and of few rows the factors too, as rounding those takes longer than it saves. A
    linear layer's bias is added after that.

    Args:
        module: what ``make_fx`` captured; each node's ``meta["val"]`` says its type.
        threads: on how many of a CPU the products will run; without them all are a library's.

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
        # Gradients that nobody asked for have no value.
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
    """In place, float32 products by our own tiles where these are clearly faster than MKL on this processor, else by oneDNN.

    torch multiplies by MKL, which is slow on processors that Intel did not make. The others are timed once in a process, and
    MKL stays unless they are clearly faster, so that noise decides little: where it does, another process gives the same
    numbers but for rounding.

    Args:
        module: what ``make_fx`` captured on the CPU; each node's ``meta["val"]`` says its shape, strides and type.
        threads: on how many the products will run.

    Returns:
        The module.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.mm.default):
        left, right = (factor.meta.get("val") for factor in node.args)
        if left is None or right is None or left.dtype is not torch.float32 or left.device.type != "cpu":
            continue  # rounded factors, which have no value noted, and other types
        (rows, depth), columns = left.shape, right.shape[1]
        if _use_native(module.graph, node, threads, rounded=False):
            continue
        if rows * depth * columns >= FEWEST_MULTIPLICATIONS:
            way = _faster_way(rows, depth, columns, (left.is_contiguous(), right.is_contiguous()), threads)
            if way is not None:
                node.target, node.args = torch.ops.pyrovae.mm.default, (*node.args, way == "flipped")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


# Of MKL's time: on Intel's processors oneDNN takes as long or longer, on others half, and noise is a tenth.
CLEARLY_FASTER = 0.75
# Fewer rows or columns do not repay a copy of the other factor, and a panel of more rows no longer fits a second-level cache.
THINNEST_FOR_TILES, DEEPEST_FOR_TILES = 16, 3072
# Fewer take less time as they are.
FEWEST_ROWS_TO_ROUND = 48
# Of MKL's time, in the mean over the products of small and large steps: on a Zen 4 they take 0.7.
TILES_CLEARLY_FASTER = 0.9


def _use_native(graph: fx.Graph, node: fx.Node, threads: int, rounded: bool) -> bool:
    """Make a product of float32 matrices our tiles', where they are faster; say whether."""
    left, _ = node.args
    assert isinstance(left, fx.Node)
    (rows, depth), columns = left.meta["val"].shape, node.meta["val"].shape[1]
    if min(rows, columns) < THINNEST_FOR_TILES or depth > DEEPEST_FOR_TILES or not _native_is_faster(threads, rounded):
        return False
    node.target = torch.ops.pyrovae.product.default
    node.args = (*node.args, threads, rounded and rows >= FEWEST_ROWS_TO_ROUND)
    _with_squares(graph, node)
    return True


@cache
def _native_is_faster(threads: int, rounded: bool) -> bool:
    """One answer for all shapes, so that few are chosen by noise: products forward, to the weights and to the input."""
    if not kernels.products():
        return False
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    several = (100, 1000) if rounded else (20, 100, 1000)
    pairs = [(ones(rows, 784), ones(200, 784).t()) for rows in several]
    pairs += [(ones(rows, 784).t(), ones(rows, 200)) for rows in several]
    pairs += [(ones(rows, 784), ones(784, 200)) for rows in several]
    library = _rounded_by_a_library if rounded else torch.mm
    contenders: dict[str, Callable[[], Tensor]] = {
        f"{way}{place}": partial(multiply, *pair)
        for place, pair in enumerate(pairs)
        for way, multiply in (
            ("library", library),
            ("tiles", partial(torch.ops.pyrovae.product, threads=threads, rounded=rounded)),
        )
    }
    with _on(threads):
        seconds = _seconds(contenders, laps=12)
    shares = [seconds[f"tiles{place}"] / seconds[f"library{place}"] for place in range(len(pairs))]
    return sum(shares) / len(shares) <= TILES_CLEARLY_FASTER


def _rounded_by_a_library(left: Tensor, right: Tensor) -> Tensor:
    return (left.bfloat16() @ right.bfloat16()).float()


def _faster_way(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> str | None:
    """``"straight"`` or ``"flipped"`` where oneDNN is clearly faster so than MKL, else ``None``.

    First by a large product: a processor where that gains nothing is left alone.
    """
    if min(_onednn_time_ratio(1024, 784, 256, (True, False), 1).values(), default=1.0) > CLEARLY_FASTER:
        return None
    shares = _onednn_time_ratio(rows, depth, columns, contiguous, threads)
    best = min(shares, key=lambda way: shares[way])
    return best if shares[best] <= CLEARLY_FASTER else None


@cache
def _onednn_time_ratio(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> dict[str, float]:
    """The time of oneDNN's product as a share of MKL's, for either way to take it; nothing without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return {}
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    left = ones(rows, depth) if contiguous[0] else ones(depth, rows).t()
    right = ones(depth, columns) if contiguous[1] else ones(columns, depth).t()
    ways = {way: partial(torch.ops.pyrovae.mm, left, right, way == "flipped") for way in ("straight", "flipped")}
    try:
        with _on(threads):
            seconds = _seconds({"mkl": partial(torch.mm, left, right), **ways})
    except RuntimeError:  # a build whose oneDNN has no such product
        return {}
    return {way: seconds[way] / seconds["mkl"] for way in ways}


def _with_squares(graph: fx.Graph, product: fx.Node) -> None:
    """A gradient's norm wants the sum of its squares, which tiles take while the product is in registers."""
    seen = [product]
    for node in seen:
        seen += [user for user in node.users if user.target in (aten.t.default, *VIEWS)]
    squared = [user for node in seen for user in node.users if user.target is aten.pow.Tensor_Scalar and user.args[1] == 2]
    sums = [user for node in squared for user in node.users if user.target is aten.sum.default and not user.kwargs]
    # Between the two nothing may be written to, as it might be the product under another name.
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
    """The least time of each, run in turn: what else the machine does only adds to it."""
    times = [{name: timeit(run, number=1) for name, run in contenders.items()} for _ in range(laps)]
    return {name: min(lap[name] for lap in times) for name in contenders}

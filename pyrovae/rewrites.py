"""Rewrites of a captured graph that a compiler does not make by itself: the same numbers to rounding, in fewer instructions.

Each was measured (``experiments/benchmarks/NOTES.md``), and each is tested against float64. They serve training and scoring
alike, whoever wrote the programs, as they look for what Pyro's and torch's distributions become once captured. One of them
trades accuracy for speed, and is asked for by name: products in bfloat16.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import cache, partial
from timeit import timeit

import torch
from torch import Tensor, fx

from . import kernels

aten = torch.ops.aten

# As many factors of 1 to 2 as a float32 multiplies without overflow, with room to spare.
MOST_FACTORS = 64
# A vector register of float32 numbers: groups of factors are multiplied side by side.
LANES = 16


def rewrite(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, in place: products without a bias, tanh as a rational function, fewer logarithms and copies.

    Args:
        module: what ``make_fx`` captured on the CPU; each node's ``meta["val"]`` says its shape.

    Returns:
        The module.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.addmm.default and not node.kwargs:
            _split_addmm(graph, node)
        elif node.target is aten.add.Tensor and not node.kwargs:
            _split_sum(graph, node)
        elif node.target is aten.tanh.default and node.meta["val"].dtype is torch.float32:
            _rational_tanh(graph, node)
        elif node.target is aten.log.default:
            _log_of_repeated(graph, node)
        elif node.target is aten.sum.dim_IntList:
            _bernoulli_sum(graph, node)
        elif node.target is aten.normal_.default:
            _standard_normal(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def join_decoders(module: fx.GraphModule, rounded: bool = False) -> fx.GraphModule:
    """In place, one operation for a Bernoulli likelihood and the linear layers before it, where nothing else reads any of them.

    Before :func:`rewrite` and :func:`round_products`, which take the same things apart where they are not joined.

    Args:
        module: what ``make_fx`` captured on the CPU; each node's ``meta["val"]`` says its shape, strides and type.
        rounded: whether their products are of factors in bfloat16, added up in float32.

    Returns:
        The module.
    """
    graph = module.graph
    for node in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        found = _summed_cross_entropy(node)
        if found is None:
            continue
        logits, x, shape = found
        data, layers = _data(x, shape), [_layer(logits)]
        if data is None or layers[0] is None or kernels.compiled() is None:
            continue
        depth = layers[0][1].meta["val"].shape[0]
        if depth * logits.meta["val"].numel() < FEWEST_MULTIPLICATIONS:
            continue
        activations: list[int] = []
        while (hidden := _activated(layers[0][0])) is not None:
            activation, layer = hidden
            layers.insert(0, layer)
            activations.insert(0, activation)
        _, weights, biases = zip(*layers, strict=True)
        with graph.inserting_before(node):
            rows = graph.call_function(aten.view.default, (data, [-1, shape[-1]]))
            operands = (layers[0][0], list(weights), list(biases), activations, rows, rounded)
            joined = graph.call_function(torch.ops.pyrovae.bernoulli_decoder.default, operands)
            _replace(node, graph.call_function(aten.view.default, (joined, list(node.meta["val"].shape))))
    graph.eliminate_dead_code()
    module.recompile()
    return module


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
        if threads is not None and node.target is aten.mm.default and _by_tiles(graph, node, threads, rounded=True):
            continue
        node.args = tuple(factor(value) for value in node.args)
        for output in outputs:
            in_float32(output)
    module.recompile()
    return module


PRODUCTS = (aten.mm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default)


def fastest_products(module: fx.GraphModule, threads: int) -> fx.GraphModule:
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
        if _by_tiles(module.graph, node, threads, rounded=False):
            continue
        if rows * depth * columns >= FEWEST_MULTIPLICATIONS:
            way = _faster_way(rows, depth, columns, (left.is_contiguous(), right.is_contiguous()), threads)
            if way is not None:
                node.target, node.args = torch.ops.pyrovae.mm.default, (*node.args, way == "flipped")
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


# Below, dispatch through Python costs more than any library gains.
FEWEST_MULTIPLICATIONS = 2_000_000
# Of MKL's time: on Intel's processors oneDNN takes as long or longer, on others half, and noise is a tenth.
CLEARLY_FASTER = 0.75
# Fewer rows or columns do not repay a copy of the other factor, and a panel of more rows no longer fits a second-level cache.
THINNEST_FOR_TILES, DEEPEST_FOR_TILES = 16, 3072
# Fewer take less time as they are.
FEWEST_ROWS_TO_ROUND = 48
# Of MKL's time, in the mean over the products of small and large steps: on a Zen 4 they take 0.7.
TILES_CLEARLY_FASTER = 0.9


def _by_tiles(graph: fx.Graph, node: fx.Node, threads: int, rounded: bool) -> bool:
    """Make a product of float32 matrices our tiles', where they are faster; say whether."""
    left, _ = node.args
    assert isinstance(left, fx.Node)
    (rows, depth), columns = left.meta["val"].shape, node.meta["val"].shape[1]
    if min(rows, columns) < THINNEST_FOR_TILES or depth > DEEPEST_FOR_TILES or not _tiles_are_faster(threads, rounded):
        return False
    node.target = torch.ops.pyrovae.product.default
    node.args = (*node.args, threads, rounded and rows >= FEWEST_ROWS_TO_ROUND)
    _with_squares(graph, node)
    return True


@cache
def _tiles_are_faster(threads: int, rounded: bool) -> bool:
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
    if min(_shares(1024, 784, 256, (True, False), 1).values(), default=1.0) > CLEARLY_FASTER:
        return None
    shares = _shares(rows, depth, columns, contiguous, threads)
    best = min(shares, key=lambda way: shares[way])
    return best if shares[best] <= CLEARLY_FASTER else None


@cache
def _shares(rows: int, depth: int, columns: int, contiguous: tuple[bool, bool], threads: int) -> dict[str, float]:
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


def draws_as_inputs(module: fx.GraphModule) -> list[partial[Tensor]]:
    """Let the graph take its random numbers as inputs after all others, so that runs side by side draw in a fixed order.

    Args:
        module: what ``make_fx`` captured on the CPU, changed in place.

    Returns:
        What draws each of them, in order; nothing, and the module as it was, where some law depends on other values.
    """
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.normal_.default):
        _standard_normal(graph, node)
    random = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    if not all(node.target in FREE_DRAWS for node in random):
        return []
    last = list(graph.find_nodes(op="placeholder"))[-1]
    for place, node in enumerate(random):
        with graph.inserting_after(last):
            last = graph.placeholder(f"drawn_{place}")
        _replace(node, last)
    module.recompile()
    return [partial(node.target, *node.args, **node.kwargs) for node in random]


# Random numbers whose law depends on nothing.
FREE_DRAWS = (aten.randn.default, aten.rand.default)


def _split_addmm(graph: fx.Graph, node: fx.Node) -> None:
    """A product, and then its bias: Inductor adds that for nothing in the next kernel, where MKL first copies it to each row.

    Under a view, as Inductor joins the two again where it sees them side by side.
    """
    bias, left, right = node.args
    shape = list(node.meta["val"].shape)
    with graph.inserting_before(node):
        product = graph.call_function(aten.mm.default, (left, right))
        product.meta = dict(node.meta)
        flat = graph.call_function(aten.view.default, (product, [1, *shape]))
        added = graph.call_function(aten.add.Tensor, (flat, bias))
        _replace(node, graph.call_function(aten.view.default, (added, shape)))


def _split_sum(graph: fx.Graph, node: fx.Node) -> None:
    """A product and another value, added under a view as well: Inductor would have MKL copy that value first."""
    if "val" not in node.meta:  # added by a rewrite before, under a view already
        return
    shape = list(node.meta["val"].shape)
    for product in node.args:
        if isinstance(product, fx.Node) and product.target is aten.mm.default and list(product.meta["val"].shape) == shape:
            with graph.inserting_before(node):
                flat = graph.call_function(aten.view.default, (product, [1, *shape]))
                node.replace_input_with(product, flat)
                added = graph.call_function(aten.add.Tensor, node.args)
                _replace(node, graph.call_function(aten.view.default, (added, shape)))
            return


def _rational_tanh(graph: fx.Graph, node: fx.Node) -> None:
    r""":math:`\tanh x = x \, P(x^2) / Q(x^2)` within 4e-7 of its value; the vector library's takes five times as long."""

    def polynomial(coefficients: tuple[float, ...], square: fx.Node) -> fx.Node:
        value: fx.Node | float = coefficients[-1]
        for coefficient in coefficients[-2::-1]:
            product = graph.call_function(aten.mul.Tensor, (square, value))
            value = graph.call_function(aten.add.Tensor, (product, coefficient))
        assert isinstance(value, fx.Node)
        return value

    with graph.inserting_before(node):
        x = graph.call_function(aten.clamp.default, (node.args[0], -TANH_REACH, TANH_REACH))
        square = graph.call_function(aten.mul.Tensor, (x, x))
        above = graph.call_function(aten.mul.Tensor, (x, polynomial(TANH_ABOVE, square)))
        _replace(node, graph.call_function(aten.div.Tensor, (above, polynomial(TANH_BELOW, square))))


# Minimax in the relative error on [0, 8], beyond which a float32 tanh is 1 within two units in the last place
# (experiments/minimax.py).
TANH_REACH = 8.0
TANH_ABOVE = (0.9999999935788794, 0.1344450501004544, 0.003571606367429252, 2.1894799482147274e-05, 1.523061009625666e-08)
TANH_BELOW = (1.0, 0.46777832332818475, 0.026164474688748766, 0.00034113056644328934, 8.522524893850866e-07)


def _log_of_repeated(graph: fx.Graph, node: fx.Node) -> None:
    """The logarithm of few numbers, repeated, for that of the many that they are repeated to, as scales are over draws."""
    repeated = node.args[0]
    if not (isinstance(repeated, fx.Node) and repeated.target is aten.expand.default):
        return
    few, shape = repeated.args
    assert isinstance(few, fx.Node)
    if node.meta["val"].numel() < max(MANY_LOGARITHMS, 16 * few.meta["val"].numel()) or node.meta["val"].device.type != "cpu":
        return
    with graph.inserting_before(node):
        log = graph.call_function(torch.ops.pyrovae.once.default, (graph.call_function(aten.log.default, (few,)),))
        _replace(node, graph.call_function(aten.expand.default, (log, shape)))


# So many take longer than a call through Python.
MANY_LOGARITHMS = 2**16


def _standard_normal(graph: fx.Graph, node: fx.Node) -> None:
    """The same draws as a new tensor's own: filling an empty one in place makes the compiler copy it first."""
    empty = node.args[0]
    if node.kwargs or node.args[1:] not in ((), (0,), (0, 1)):
        return
    if not (isinstance(empty, fx.Node) and empty.target is aten.empty.memory_format and len(empty.users) == 1):
        return
    value = node.meta["val"]
    with graph.inserting_before(node):
        drawn = graph.call_function(
            aten.randn.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        )
        _replace(node, drawn)


def _bernoulli_sum(graph: fx.Graph, node: fx.Node) -> None:
    r"""A Bernoulli's log-likelihood, summed over an event, with one logarithm for many of its terms.

    .. math:: \sum_d \log \mathrm{Bernoulli}(x_d \mid l_d) = \sum_d \big[\min(l_d, 0) - (1 - x_d) \, l_d\big]
        - \sum_g \log \prod_{d \in g} \big(1 + e^{-|l_d|}\big)
    """
    found = _summed_cross_entropy(node)
    if found is None:
        return
    logits, x, shape = found
    size = shape[-1]
    factors = max((n for n in range(1, MOST_FACTORS + 1) if size % n == 0 and size // n >= LANES), default=1)
    if factors == 1:
        return

    def call(target: object, *args: object) -> fx.Node:
        return graph.call_function(target, args)  # type: ignore[arg-type]

    with graph.inserting_before(node):
        grouped = [*shape[:-1], factors, size // factors]
        missed = call(aten.mul.Tensor, call(aten.rsub.Scalar, x, 1.0), logits)
        plain = call(aten.sub.Tensor, call(aten.clamp_max.default, logits, 0.0), missed)
        plain = call(aten.sum.dim_IntList, call(aten.view.default, plain, grouped), [-2])
        term = call(aten.add.Tensor, call(aten.exp.default, call(aten.neg.default, call(aten.abs.default, logits))), 1.0)
        product = call(aten.prod.dim_int, call(aten.view.default, term, grouped), -2)
        each = call(aten.sub.Tensor, plain, call(aten.log.default, product))
        _replace(node, call(aten.sum.dim_IntList, each, [-1]))


def _layer(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Inputs, weights and bias of a linear layer whose value is wanted for nothing but this one use."""
    node = _under_views(node)
    if node.target is not aten.addmm.default or len(node.users) != 1 or node.kwargs:
        return None
    found = [value.meta.get("val") for value in node.args if isinstance(value, fx.Node)]
    values = [value for value in found if isinstance(value, Tensor) and value.dtype is torch.float32]
    if len(values) < 3:
        return None
    bias, left, right = values
    if bias.shape != right.shape[1:] or not (bias.is_contiguous() and left.is_contiguous()) or len(right) > kernels.DEEPEST:
        return None
    return node.args[1], node.args[2], node.args[0]  # type: ignore[return-value]


def _activated(node: fx.Node) -> tuple[int, tuple[fx.Node, fx.Node, fx.Node]] | None:
    """The activation and the layer whose value this is, where it is wanted for nothing but this one use."""
    node = _under_views(node)
    if node.target not in kernels.ACTIVATIONS or len(node.users) != 1:
        return None
    layer = _layer(node.args[0])  # type: ignore[arg-type]
    return None if layer is None else (kernels.ACTIVATIONS.index(node.target), layer)


def _under_views(node: fx.Node) -> fx.Node:
    """What lies under views that keep the last dimension and are each wanted for one use."""
    while node.target in (*VIEWS, aten.expand.default) and len(node.users) == 1:
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or "val" not in inner.meta or "val" not in node.meta:
            break
        seen, under = node.meta["val"].shape, inner.meta["val"].shape
        if under[-1:] != seen[-1:] or under.numel() != seen.numel():
            break
        node = inner
    return node


# A linear layer's value is under the second from torch 2.15 on.
VIEWS = (aten.view.default, aten._unsafe_view.default)


def _data(x: fx.Node, shape: list[int]) -> fx.Node | None:
    """What lies under an expansion of data over draws, where their other dimensions are those of the shape's end."""
    if x.target is aten.expand.default:
        x = x.args[0]  # type: ignore[assignment]
    value = x.meta["val"]
    own = list(value.shape)
    while len(own) > 1 and own[0] == 1:
        own.pop(0)
    if value.dtype is not torch.float32 or not value.is_contiguous() or own != shape[len(shape) - len(own) :]:
        return None
    return x


def _summed_cross_entropy(node: fx.Node) -> tuple[fx.Node, fx.Node, list[int]] | None:
    """Logits, data and the shape whose last dimension is summed, where the node is such a sum and alone reads its terms."""
    if len(node.args) != 2 or node.kwargs or node.args[1] != [-1]:
        return None
    view = node.args[0]
    chain: list[fx.Node] = []
    for targets in (VIEWS, (aten.neg.default,), (aten.binary_cross_entropy_with_logits.default,)):
        if not isinstance(view, fx.Node) or view.target not in targets or len(view.users) != 1:
            return None
        chain.append(view)
        view = view.args[0]
    logits, x, *weights = chain[-1].args
    if weights != [None, None, 0] or not (isinstance(logits, fx.Node) and isinstance(x, fx.Node)):
        return None
    return logits, x, list(chain[0].meta["val"].shape)


def _replace(node: fx.Node, other: fx.Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)

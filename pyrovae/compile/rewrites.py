"""Rewrites of a captured graph that the compiler does not make: the same numbers up to rounding, in fewer instructions.

The gain of each was measured (``experiments/benchmarks/NOTES.md``), and each is tested against float64. They look for the
operations that Pyro's and torch's distributions become when captured, and so apply to training and scoring of any program.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from . import kernels
from .patterns import FEWEST_MULTIPLICATIONS, VIEWS, _data, _replace, _split_addmm, _under_views, aten

__all__ = ["draws_as_inputs", "join_decoders", "rewrite"]

# The product of this many factors between 1 and 2 does not overflow a float32.
MOST_FACTORS = 64
# float32 numbers in a vector register: groups of factors are multiplied in parallel.
LANES = 16


def rewrite(module: fx.GraphModule) -> fx.GraphModule:
    """Separate biases from products, make tanh a rational function, and save logarithms and copies.

    Args:
        module: what ``make_fx`` captured on the CPU, changed in place; each node's ``meta["val"]`` has its shape.

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
    """Replace a Bernoulli likelihood and the linear layers before it by one operation, if nothing else reads any of them.

    Call it before :func:`rewrite` and :func:`pyrovae.compile.matmul.round_products`, which take the same patterns apart.

    Args:
        module: what ``make_fx`` captured on the CPU, changed in place; each node's ``meta["val"]`` has its shape and dtype.
        rounded: whether the factors of their products are rounded to bfloat16; sums stay in float32.

    Returns:
        The module.
    """
    graph = module.graph
    for node in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        found = _summed_cross_entropy(node)
        if found is None:
            continue
        logits, x, shape = found
        data, layers = _data(x, shape[-1]), [_layer(logits, shape[-1])]
        if data is None or layers[0] is None or kernels.load_library() is None:
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


def draws_as_inputs(module: fx.GraphModule) -> list[partial[Tensor]]:
    """Make a graph's random numbers its last inputs, so that concurrent runs draw in a fixed order.

    Args:
        module: what ``make_fx`` captured on the CPU, changed in place.

    Returns:
        A function for each of them that draws it, in order; an empty list, and the module unchanged, if a draw depends on other
        values of the graph.
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


# Draws that depend on nothing but their shape.
FREE_DRAWS = (aten.randn.default, aten.rand.default)


def _split_sum(graph: fx.Graph, node: fx.Node) -> None:
    """Add a product and another value through a view, as for a bias: otherwise Inductor lets MKL copy the value first."""
    if "val" not in node.meta:  # another rewrite added this node, with a view
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
    r""":math:`\tanh x = x \, P(x^2) / Q(x^2)` within 4e-7 relative error; the vector library takes five times as long."""

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


# Minimax in the relative error on [0, 8]; beyond, tanh is 1 within two units in the last place of a float32
# (experiments/minimax.py; native/decoder.cpp has the same coefficients).
TANH_REACH = 8.0
TANH_ABOVE = (0.9999999935788794, 0.1344450501004544, 0.003571606367429252, 2.1894799482147274e-05, 1.523061009625666e-08)
TANH_BELOW = (1.0, 0.46777832332818475, 0.026164474688748766, 0.00034113056644328934, 8.522524893850866e-07)


def _log_of_repeated(graph: fx.Graph, node: fx.Node) -> None:
    """Take the logarithm before an expansion, not after it: scales are few, and expanded over many draws."""
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


# This many logarithms take longer than a call through Python.
MANY_LOGARITHMS = 2**16


def _standard_normal(graph: fx.Graph, node: fx.Node) -> None:
    """Draw into a new tensor: the compiler copies an empty one before it fills it in place. The numbers are the same."""
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
    r"""Sum a Bernoulli log-likelihood over an event with one logarithm for many terms.

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


def _layer(node: fx.Node, size: int | None = None) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Inputs, weights and bias of a linear layer whose value has only this use, and ``size`` columns."""
    node = _under_views(node, size)
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
    """The activation and the layer that make this value, if it has only this use."""
    node = _under_views(node)
    if node.target not in kernels.ACTIVATIONS or len(node.users) != 1:
        return None
    layer = _layer(node.args[0])  # type: ignore[arg-type]
    return None if layer is None else (kernels.ACTIVATIONS.index(node.target), layer)


def _summed_cross_entropy(node: fx.Node) -> tuple[fx.Node, fx.Node, list[int]] | None:
    """Logits, data and the shape before the sum, if the node sums a Bernoulli log-likelihood and alone reads its terms."""
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

"""Helpers that rewrites of a graph share: nodes below views, and nodes replaced."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["FEWEST_MULTIPLICATIONS", "VIEWS", "aten"]

aten = torch.ops.aten
# With fewer multiplications, dispatch through Python costs more than any library gains.
FEWEST_MULTIPLICATIONS = 2_000_000


def _split_addmm(graph: fx.Graph, node: fx.Node) -> None:
    """Separate a product from its bias: Inductor adds the bias in the next kernel at no cost; MKL first copies it to each row.

    A view keeps the two apart, since Inductor would join them again.
    """
    bias, left, right = node.args
    shape = list(node.meta["val"].shape)
    with graph.inserting_before(node):
        product = graph.call_function(aten.mm.default, (left, right))
        product.meta = dict(node.meta)
        flat = graph.call_function(aten.view.default, (product, [1, *shape]))
        added = graph.call_function(aten.add.Tensor, (flat, bias))
        _replace(node, graph.call_function(aten.view.default, (added, shape)))


def _under_views(node: fx.Node, size: int | None = None) -> fx.Node:
    """The node below views that have one use each, whose last dimension has ``size``; by default that of ``node``.

    Views, and expansions that repeat nothing, keep the order of the numbers, whatever shapes lie in between.
    """
    found = node
    size = node.meta["val"].shape[-1] if size is None and "val" in node.meta else size
    while node.target in (*VIEWS, aten.expand.default) and len(node.users) == 1:
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or "val" not in inner.meta or "val" not in node.meta:
            break
        if inner.meta["val"].numel() != node.meta["val"].numel():
            break
        node = inner
        if node.meta["val"].shape[-1:] == (size,):
            found = node
    return found


# From torch 2.15 on, linear layers are captured with the second.
VIEWS = (aten.view.default, aten._unsafe_view.default)


def _data(x: fx.Node, size: int) -> fx.Node | None:
    """The data below an expansion over draws, if rows of ``size`` numbers repeat in order; else ``None``."""
    expanded = list(x.meta["val"].shape)
    if x.target is aten.expand.default:
        x = x.args[0]  # type: ignore[assignment]
    value = x.meta["val"]
    own = list(value.shape)
    while len(own) > 1 and own[0] == 1:
        own.pop(0)
    if value.dtype is not torch.float32 or not value.is_contiguous():
        return None
    return x if own == expanded[len(expanded) - len(own) :] and value.numel() % size == 0 else None


def _replace(node: fx.Node, other: fx.Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)

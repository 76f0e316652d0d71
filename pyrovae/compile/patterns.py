"""What rewrites of a graph share: nodes found behind views, and nodes replaced."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
# Below, dispatch through Python costs more than any library gains.
FEWEST_MULTIPLICATIONS = 2_000_000


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


def _replace(node: fx.Node, other: fx.Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)

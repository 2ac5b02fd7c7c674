"""Which weights Inductor hands to the backward in another layout, and so in memory of their own."""

from collections.abc import Collection

import torch
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.passes.kinds import is_tensor

aten = torch.ops.aten


def relaid_weights(forward: GraphModule, weights: Collection[str]) -> set[str]:
    """Names of the weights that the backward reads as a copy with channels last.

    Where Inductor optimises layouts (on CPU in every graph with a convolution), it brings all four-dimensional tensors that
    a convolution depends on into this layout. Such a tensor that is saved is saved as the copy, so that autograd holds the
    bytes of a parameter once more. (A batch's copy takes the place of the batch, which counts the same.)

    Args:
        forward: a partitioned forward.
        weights: names of its placeholders that are parameters or buffers.
    """
    convolutions = forward.graph.find_nodes(op="call_function", target=aten.convolution.default)
    if not convolutions or not _changes_layouts(forward):
        return set()
    needed = _ancestors(forward.graph, convolutions)
    return {n.name for n in needed if n.name in weights and is_tensor(n) and _is_copied(n.meta["val"])}


def _changes_layouts(forward: GraphModule) -> bool:
    """Inductor's own decision."""
    from torch._inductor.graph import GraphLowering

    return GraphLowering.decide_layout_opt(forward, is_inference=False)


def _is_copied(value: torch.Tensor) -> bool:
    return value.dim() == 4 and not value.is_contiguous(memory_format=torch.channels_last)


def _ancestors(graph: Graph, nodes: Collection[Node]) -> set[Node]:
    """All that the nodes are computed from, as far as Inductor follows layouts: not through a batched product."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node.target is not aten.bmm.default and any(user in found for user in node.users):
            found.add(node)
    return found

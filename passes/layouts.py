"""Which weights Inductor hands to the backward in another layout, and so in memory of their own."""

from collections.abc import Collection

import torch
from torch.fx import GraphModule

from wtacrs_fx.passes.kinds import ancestors, is_tensor

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
    # (Inductor does not follow layouts through a batched product)
    needed = ancestors(convolutions, through=lambda n: n.target is not aten.bmm.default)
    return {n.name for n in needed if n.name in weights and is_tensor(n) and _is_copied(n.meta["val"])}


def _changes_layouts(forward: GraphModule) -> bool:
    """Inductor's own decision."""
    from wtacrs_fx.private import GraphLowering

    return GraphLowering.decide_layout_opt(forward, is_inference=False)


def _is_copied(value: torch.Tensor) -> bool:
    return value.dim() == 4 and not value.is_contiguous(memory_format=torch.channels_last)

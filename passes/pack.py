"""Act: hand masks to the backward as one bit an element instead of one byte, without loss.

Forward::

    gt: "b8[16, 128, 768]" = ...                      gt: "b8[16, 128, 768]" = ...
    return (..., gt)                           ->     packed: "u8[256, 768]" = (gt in 8 parts, a byte from each)
                                                      return (..., packed)

Backward::

    gt: "b8[16, 128, 768]"  (placeholder)      ->     packed: "u8[256, 768]"  (placeholder)
                                                      ne: "b8[16, 128, 768]" = (packed & bit) != 0

Inductor computes the unpacking inside of the kernels that read the mask: no mask is in memory in the backward.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.passes.emit import Emitter, memory_order
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import graph_outputs
from wtacrs_fx.rounding import pack, unpack

prims = torch.ops.prims


@dataclass(frozen=True)
class Packed:
    """A mask of the forward, and what the backward is given in its place."""

    mask: Node
    packed: Node
    readers: tuple[Node, ...]
    """Of the backward."""


def pack_masks(forward: GraphModule, backward: GraphModule, num_fwd_outputs: int, min_bytes: int) -> list[Packed]:
    """Pack every mask that a partitioned forward hands to its backward.

    Left alone are masks that are in memory anyway (inputs and outputs of the forward, and views of them), that are smaller
    than ``min_bytes``, of symbolic size, or expanded or cut from another tensor.

    Returns: one entry per mask. Without any, the graphs are as they were.
    """
    outputs = graph_outputs(forward.graph)
    returned = {view_base(v) for v in outputs[:num_fwd_outputs] if isinstance(v, Node)}
    bases = [view_base(v) for v in outputs[num_fwd_outputs:] if isinstance(v, Node)]
    placeholders = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    position = {n: i for i, n in enumerate(forward.graph.nodes)}
    done = []
    for i, mask in enumerate(outputs):
        if i < num_fwd_outputs or not isinstance(mask, Node) or not _is_dense_mask(mask, min_bytes):
            continue
        base = view_base(mask)
        if base.op != "placeholder" and base not in returned and bases.count(base) == 1 and mask.name in placeholders:
            hoist(mask, position)
            outputs[i] = _pack(forward.graph, mask)
            given = placeholders[mask.name]
            done.append(Packed(mask, outputs[i], tuple(given.users)))
            _unpack(backward.graph, given, mask, outputs[i])
    if done:
        forward.graph.output_node().args = (tuple(outputs),)
        for module in (forward, backward):
            module.graph.lint()
    return done


def _is_dense_mask(node: Node, min_bytes: int) -> bool:
    if not is_tensor(node) or node.meta["val"].dtype is not torch.bool:
        return False
    numel, stored = node.meta["val"].numel(), node.meta["val"].untyped_storage().nbytes()
    return isinstance(numel, int) and isinstance(stored, int) and numel == stored >= max(1, min_bytes)


def hoist(mask: Node, position: Mapping[Node, int]) -> None:
    """Compute a mask as soon as what it is computed from is there. One that only the backward reads is traced with the
    backward, and the partitioner puts it at the end of the forward: all that it is computed from would be in memory until
    then (of ReLU behind a LoRA layer two tensors four times as large)."""
    last = max((n for n in mask.all_input_nodes if n.op == "call_function"), key=position.__getitem__, default=None)
    if last is not None:
        while last.next.target is operator.getitem:
            last = last.next
        if position[last] < position[mask]:
            last.append(mask)


def _pack(graph: Graph, mask: Node) -> Node:
    order, stride = memory_order(mask.meta["val"]), list(mask.meta["val"].stride())

    def function(mask: Tensor) -> Tensor:
        # The mask becomes a buffer where it is made. A dropout mask would otherwise be computed in this kernel too, from
        # random numbers that would have to be in memory, 4 bytes each.
        return pack(prims.inductor_force_stride_order(mask, stride).permute(order), 1)

    with graph.inserting_before(mask.next):
        packed = Emitter(graph, mask).inline(function, mask)
    packed.name = f"{mask.name}_packed"
    return packed


def _unpack(graph: Graph, placeholder: Node, mask: Node, packed: Node) -> None:
    order = memory_order(mask.meta["val"])
    shape = [mask.meta["val"].shape[d] for d in order]
    inverse = [order.index(d) for d in range(len(order))]

    def function(packed: Tensor) -> Tensor:
        return unpack(packed, shape, 1).permute(inverse)

    with graph.inserting_before(placeholder):
        given = graph.placeholder(packed.name)
    given.meta.update({**placeholder.meta, "val": packed.meta["val"]})
    first = next(n for n in graph.nodes if n in placeholder.users)
    with graph.inserting_before(first):
        placeholder.replace_all_uses_with(Emitter(graph, placeholder).inline(function, given))
    graph.erase_node(placeholder)

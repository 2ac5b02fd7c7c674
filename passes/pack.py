"""Act: hand masks to the backward as one bit an element instead of one byte, without loss.

Forward::

    gt: "b8[16, 128, 768]" = ...                      gt: "b8[16, 128, 768]" = ...
    return (..., gt)                           ->     packed: "u8[256, 768]" = (gt in 8 parts, a byte from each)
                                                      return (..., packed)

Backward::

    gt: "b8[16, 128, 768]"  (placeholder)      ->     packed: "u8[256, 768]"  (placeholder)
                                                      ne: "b8[16, 128, 768]" = (packed & bit) != 0

Inductor computes the unpacking inside of the kernels that read the mask: no mask is in memory in the backward. In the forward
it writes the mask once, in bytes that are numbers: its code for writing vectors of bools on CPU takes 8 ns an element, and
3 ns for reading them, against 0.2 ns.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.packing import pack, unpack
from wtacrs_fx.passes.emit import Emitter, has_whole_rows, memory_order
from wtacrs_fx.passes.kernels import buffer_bytes
from wtacrs_fx.passes.kinds import is_drawn_mask, is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import graph_outputs
from wtacrs_fx.passes.sizes import hint, is_symbolic

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
    than ``min_bytes``, of symbolic sizes where rows are no whole bytes, or expanded or cut from another tensor.

    Returns: one entry per mask. Without any, the graphs are as they were.
    """
    outputs, done = graph_outputs(forward.graph), []
    for mask, given in find_masks((forward, backward), num_fwd_outputs, min_bytes):
        hoist(mask)
        packed = _pack(forward.graph, mask)
        outputs[outputs.index(mask)] = packed
        done.append(Packed(mask, packed, tuple(given.users)))
        _unpack(backward.graph, given, mask, packed)
    if done:
        forward.graph.output_node().args = (tuple(outputs),)
        for module in (forward, backward):
            module.graph.lint()
    return done


def find_masks(
    partition: tuple[GraphModule, GraphModule], num_fwd_outputs: int, min_bytes: int
) -> list[tuple[Node, Node]]:
    """Decide: the masks of a partition that are packed, each in the forward and in the backward."""
    forward, backward = (g.graph for g in partition)
    outputs = graph_outputs(forward)
    returned = {view_base(v) for v in outputs[:num_fwd_outputs] if isinstance(v, Node)}
    bases = [view_base(v) for v in outputs[num_fwd_outputs:] if isinstance(v, Node)]
    placeholders = {n.name: n for n in backward.find_nodes(op="placeholder")}

    def alone(mask: Node) -> bool:
        base = view_base(mask)
        return base.op != "placeholder" and base not in returned and bases.count(base) == 1

    masks = [v for v in outputs[num_fwd_outputs:] if isinstance(v, Node) and _is_dense_mask(v, min_bytes)]
    return [(m, placeholders[m.name]) for m in masks if m.name in placeholders and alone(m)]


def packed_bytes(mask: Node) -> int:
    """Of a mask in bits."""
    return -(-hint(mask.meta["val"].numel()) // 8)


def held_bytes(node: Node, packs: int | None) -> int:
    """Of a tensor between forward and backward, where masks of at least ``packs`` bytes are packed (None: none is)."""
    return packed_bytes(node) if packs is not None and _is_dense_mask(node, packs) else buffer_bytes(node)


def saved_by_packing(partition: tuple[GraphModule, GraphModule], num_fwd_outputs: int, packs: int | None) -> int:
    """Bytes that packing will save of what a partition holds."""
    masks = find_masks(partition, num_fwd_outputs, packs) if packs is not None else ()
    return sum(buffer_bytes(m) - packed_bytes(m) for m, _ in masks)


def _is_dense_mask(node: Node, min_bytes: int) -> bool:
    """Whether the node is a mask that can be packed: of at least so many bytes, with all of its storage its own."""
    if not is_tensor(node) or node.meta["val"].dtype is not torch.bool:
        return False
    value = node.meta["val"]
    if is_symbolic(value.shape) and not has_whole_rows(value, 8):
        return False
    numel, stored = hint(value.numel()), hint(value.untyped_storage().nbytes())
    return numel == stored >= max(1, min_bytes)


def hoist(mask: Node) -> None:
    """Compute a mask as soon as what it is computed from is there. One that only the backward reads is traced with the
    backward, and the partitioner puts it at the end of the forward: all that it is computed from would be in memory until
    then (of ReLU behind a LoRA layer two tensors four times as large)."""
    last = max((n for n in mask.all_input_nodes if n.op == "call_function"), default=None)
    if last is not None:
        while last.next.target is operator.getitem:
            last = last.next
        if last < mask:
            last.append(mask)


def _pack(graph: Graph, mask: Node) -> Node:
    name = mask.name
    order, by_row = memory_order(mask.meta["val"]), is_symbolic(mask.meta["val"].shape)
    mask = write_bytes(graph, mask)

    def function(mask: Tensor) -> Tensor:
        return pack(mask.permute(order), 1, by_row=by_row)

    with graph.inserting_before(mask.next):
        packed = Emitter(graph, mask).inline(function, mask)
    packed.name = f"{name}_packed"
    return packed


def write_bytes(graph: Graph, mask: Node) -> Node:
    """A buffer of bytes with the mask, written where it is made. A drawn mask is read from there by all its readers (else it
    would be computed in every one of them, from random numbers that would have to be in memory, 4 bytes each); others are left
    to compute it. Returns the mask as it is read from the buffer."""

    def write(mask: Tensor) -> Tensor:
        return prims.inductor_force_stride_order(as_byte(mask), list(mask.stride()))

    readers = list(mask.users) if is_drawn_mask(mask) else []
    with graph.inserting_before(mask.next):
        emit = Emitter(graph, mask)
        given: Node = emit.inline(as_bool, emit.inline(write, mask))
    for reader in readers:
        reader.replace_input_with(mask, given)
    return given


def as_byte(mask: Tensor) -> Tensor:
    """By way of int32, from where Inductor has vector operations to bytes."""
    return mask.to(torch.int32).to(torch.uint8)


def as_bool(byte: Tensor) -> Tensor:
    return byte.to(torch.int32) != 0


def _unpack(graph: Graph, placeholder: Node, mask: Node, packed: Node) -> None:
    order = memory_order(mask.meta["val"])
    sizes = [mask.meta["val"].shape[d] for d in order]
    by_row = is_symbolic(sizes)
    inverse = [order.index(d) for d in range(len(order))]

    def function(packed: Tensor) -> Tensor:
        shape = [*packed.shape[:-1], sizes[-1]] if by_row else sizes
        return unpack(packed, shape, 1, by_row=by_row).permute(inverse)

    with graph.inserting_before(placeholder):
        given = graph.placeholder(packed.name)
    given.meta.update({**placeholder.meta, "val": packed.meta["val"]})
    first = next(n for n in graph.nodes if n in placeholder.users)
    with graph.inserting_before(first):
        placeholder.replace_all_uses_with(Emitter(graph, placeholder).inline(function, given))
    graph.erase_node(placeholder)

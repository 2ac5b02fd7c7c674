"""Predict which buffers a graph will have when Inductor has compiled it, and which of its kernels run as one.

Inductor computes pointwise operations inside the kernels that read them. A node gets memory of its own if it is computed by
a library call (matrix product, fused attention, scatter), is a reduction, is returned, is read by a library call, or is
reused and reads more than a few buffers itself (Inductor's thresholds). Everything else lives in registers, and keeps what
it reads alive until its reader has run.
"""

import copy
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch._inductor import config as inductor_config
from torch.fx import Node

from wtacrs_fx.passes.cost import Roofline, flops, launches
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import hint, is_view, view_base

aten, prims = torch.ops.aten, torch.ops.prims

REDUCTIONS = frozenset((
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default,
    aten.var_mean.correction, aten.var.correction, aten.argmax.default, aten.any.default, aten.any.dim, aten.prod.dim_int,
    prims.var.default,
))  # fmt: skip
_POINTWISE = frozenset((
    aten.index.Tensor, aten.gather.default, aten.embedding.default, aten.full.default, aten.full_like.default,
    aten.arange.start_step, aten.zeros_like.default, aten.ones_like.default, aten.scalar_tensor.default, prims.iota.default,
    aten.clone.default, aten.copy.default, aten._to_copy.default, prims.convert_element_type.default, aten.where.self,
    aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default,
    prims.inductor_random.default, prims.inductor_lookup_seed.default,
))  # fmt: skip

_COSTLY = (aten.exp.default, aten.sigmoid.default)
"""What Inductor does not compute again on CPU for every reader."""


@dataclass(frozen=True)
class Kernel:
    """A node with memory of its own, and the buffers it reads."""

    node: Node
    reads: frozenset[Node]
    size: int
    library: bool
    """Whether it runs alone; others may be fused with their neighbours."""
    internal: bool = False
    """Whether all its readers are in the same fused kernel: Inductor plans memory for it and then drops it."""


class Facts:
    """What simulations ask of every node again and again, computed once. For one graph that is not changed meanwhile."""

    def __init__(self) -> None:
        self.base = functools.cache(view_base)
        self.bytes = functools.cache(buffer_bytes)
        self.library = functools.cache(is_library_call)
        self.flops = functools.cache(flops)
        self.inputs = functools.cache(self._inputs)

    def _inputs(self, node: Node) -> tuple[Node, ...]:
        """View bases of the node's inputs, each once."""
        return tuple(dict.fromkeys(map(self.base, node.all_input_nodes)))

    def resized(self, sizes: Mapping[Node, int]) -> "Facts":
        """The same, but for tensors that take other bytes than their type says (codes of few bits)."""
        other = copy.copy(self)
        other.bytes = lambda node: sizes[node] if node in sizes else self.bytes(node)  # type: ignore[assignment]
        return other

    def seconds(self, kernel: Kernel, roofline: Roofline) -> float:
        """Predicted run time of a kernel."""
        moved = kernel.size + sum(map(self.bytes, kernel.reads))
        return roofline.seconds(self.flops(kernel.node), moved, launches(kernel.node))


def is_library_call(node: Node) -> bool:
    """Whether Inductor computes the node outside of its own kernels, from and to memory."""
    if node.op != "call_function" or node.target is operator.getitem or is_view(node):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int, float, bool))
    if node.target in REDUCTIONS or node.target in _POINTWISE:
        return False
    return torch.Tag.pointwise not in node.target.tags


def buffer_bytes(node: Node) -> int:
    """Bytes of a tensor's storage; 0 for anything else."""
    return hint(node.meta["val"].untyped_storage().nbytes()) if is_tensor(node) else 0


def find_kernels(
    nodes: Sequence[Node], given: Collection[Node], returned: Collection[Node], facts: Facts
) -> list[Kernel]:
    """The kernels of a graph in the order in which they run, each with one result.

    Args:
        nodes, given, returned: as for :func:`wtacrs_fx.passes.liveness.timeline`.
        facts: about the graph's nodes.
    """
    calls = _in_lowering_order([n for n in nodes if facts.base(n) is n])
    epoch, count, many = {}, 0, inductor_config.realize_reads_threshold
    users: dict[Node, list[Node]] = {}
    for node in calls:
        epoch[node] = count
        count += facts.library(node)
        for base in facts.inputs(node):
            users.setdefault(base, []).append(node)
    inside = set(calls)
    gathered = _gathered(calls, users, facts)
    inlined: dict[Node, frozenset[Node]] = {}
    kernels: list[Kernel] = []
    optional: set[Node] = set()
    for node in calls:
        found: set[Node] = set()
        for base in facts.inputs(node):
            if base in inlined:
                found |= inlined[base]
            elif base in inside or base in given:
                found.add(base)
        reads, readers, size = frozenset(found), users.get(node, []), facts.bytes(node)
        if node.target is operator.getitem:
            kernels.append(Kernel(node, frozenset(), size, library=True))
        elif facts.library(node):
            kernels.append(Kernel(node, reads, size, library=True))
        elif node.target in REDUCTIONS or node in returned or node in gathered or any(map(facts.library, readers)):
            kernels.append(Kernel(node, reads, size, library=False))
        elif _is_realized(node, readers, reads, many):
            kernels.append(Kernel(node, reads, size, library=False))
            optional.add(node)
        else:
            inlined[node] = reads
    read_at: dict[Node, set[int]] = {}
    for kernel in kernels:
        for node in kernel.reads:
            read_at.setdefault(node, set()).add(epoch[kernel.node])
    return [replace(k, internal=k.node in optional and read_at.get(k.node) == {epoch[k.node]}) for k in kernels]


def fuse(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Kernels that run as one: neighbours that are no library calls. (With :class:`wtacrs_fx.order.GraphOrder`; else Inductor
    may fuse across library calls too.)"""
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        if groups and not kernel.library and not groups[-1][-1].library:
            groups[-1].append(kernel)
        else:
            groups.append([kernel])
    return groups


def _in_lowering_order(calls: Sequence[Node]) -> list[Node]:
    """The calls with the results of an operation that has several right behind it, where Inductor makes them all."""
    inside = set(calls)
    ordered = []
    for node in calls:
        if node.target is not operator.getitem:
            ordered.append(node)
            ordered += [u for u in node.users if u.target is operator.getitem and u in inside]
    return ordered


def _gathered(nodes: Sequence[Node], users: Mapping[Node, Sequence[Node]], facts: Facts) -> set[Node]:
    """Values that Inductor writes to memory on CPU because they are costly and have several readers, and that stay there
    because one reader gathers rows of them: exp and sigmoid, and what is computed from them and gathered."""
    result: set[Node] = set()
    for node in nodes:
        if node.target in _COSTLY and node.meta["val"].device.type == "cpu" and len(users.get(node, ())) > 1:
            stack, seen = [node], {node}
            while stack:
                for reader in users.get(stack.pop(), ()):
                    if reader.target is aten.index.Tensor:
                        result.add(node)
                    elif reader not in seen and not facts.library(reader) and reader.target not in REDUCTIONS:
                        seen.add(reader)
                        stack.append(reader)
    return result


def _is_realized(node: Node, readers: Sequence[Node], reads: Collection[Node], many: int) -> bool:
    """Inductor's rule for values that it might as well compute again in every reader; ``many`` is its threshold."""
    if node.target is prims.inductor_random.default:
        return True
    costly = node.target in _COSTLY and node.meta["val"].device.type == "cpu"
    return (len(readers) > 1 and (costly or len(reads) > many)) or len(reads) > 2 * many

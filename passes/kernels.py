"""Predict which buffers a graph will have when Inductor has compiled it, and which of its kernels run as one.

Inductor computes pointwise operations inside the kernels that read them. A node gets memory of its own if it is computed by
a library call (matrix product, fused attention, scatter), is a reduction, is returned, is read by a library call, or is
reused and reads more than a few buffers itself (Inductor's thresholds) or takes long to compute (on CPU an exponential, a
logarithm, a sigmoid or a hyperbolic tangent). Everything else lives in registers, and keeps what it reads alive until its
reader has run.
"""

import copy
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

import wtacrs_fx.ops  # noqa: F401  (registers the custom ops)
from wtacrs_fx.passes.cost import Roofline, flops, launches
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import is_view, view_base
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.private import OpOverload, inductor_config

aten, prims = torch.ops.aten, torch.ops.prims
DRAWN = (prims.inductor_random.default, torch.ops.wtacrs.drawn_mask.default)

DRAW_BYTES = 8
"""To draw a random number takes as long as to move so many bytes: 1.3 ns on a core in all (in vectors, see
:mod:`wtacrs_fx.drawn`)."""

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
    *DRAWN, prims.inductor_lookup_seed.default,
))  # fmt: skip

COSTLY = (
    aten.exp.default, aten.log.default, aten.log10.default, aten.log1p.default, aten.log2.default, aten.sigmoid.default,
    aten.tanh.default,
)  # fmt: skip
"""What Inductor does not compute again on CPU for every reader, nor anything that is computed from it in the same kernel.
(Torch 2.13; 2.11 does so for exponentials and sigmoids alone.)"""


class Kernel(NamedTuple):
    """A node with memory of its own, and the buffers it reads."""

    node: Node
    reads: frozenset[Node]
    size: int
    library: bool
    """Whether it runs alone; others may be fused with their neighbours."""
    internal: bool = False
    """Whether all its readers are in the same fused kernel: Inductor plans memory for it and then drops it."""


@dataclass(frozen=True)
class Layout:
    """What a sequence of nodes says about kernels whatever the graph is given and returns."""

    calls: tuple[Node, ...]
    """The nodes with values of their own (no views), in the order in which Inductor lowers them."""
    users: Mapping[Node, Sequence[Node]]
    """Readers of each value, and of views of it."""
    epoch: Mapping[Node, int]
    """How many library calls run before each of ``calls``."""
    written: Collection[Node]
    """Values that are in memory because library calls read them."""


class Facts:
    """What simulations ask of every node again and again, computed once. For one graph that is not changed meanwhile.

    Args:
        same: inputs that lie in the memory of others, and these.
    """

    def __init__(self, same: Mapping[Node, Node] | None = None) -> None:
        self._same = same or {}
        self.base = functools.cache(self._base)
        self.bytes = functools.cache(buffer_bytes)
        self.library = functools.cache(is_library_call)
        self.reduction = functools.cache(is_reduction)
        self.costly = functools.cache(is_costly)
        self.flops = functools.cache(flops)
        self.inputs = functools.cache(self._inputs)
        # A plan's forward and backward are simulated in turn, and every plan of a graph has the same forward.
        self.layout = functools.lru_cache(maxsize=2)(self._layout)

    def _base(self, node: Node) -> Node:
        base = view_base(node)
        return self._same.get(base, base)

    def _inputs(self, node: Node) -> tuple[Node, ...]:
        """View bases of the node's inputs, each once."""
        return tuple(dict.fromkeys(map(self.base, node.all_input_nodes)))

    def _layout(self, nodes: tuple[Node, ...]) -> Layout:
        calls = _in_lowering_order([n for n in nodes if self.base(n) is n])
        users: dict[Node, list[Node]] = {}
        epoch, count = {}, 0
        written: set[Node] = set()
        for node in calls:
            epoch[node] = count
            inputs = self.inputs(node)
            if self.library(node):
                count += 1
                written.update(inputs)
            for base in inputs:
                users.setdefault(base, []).append(node)
        return Layout(tuple(calls), users, epoch, written)

    def resized(self, sizes: Mapping[Node, int]) -> "Facts":
        """The same, but for tensors that take other bytes than their type says (codes of few bits)."""
        other = copy.copy(self)
        other.bytes = lambda node: sizes[node] if node in sizes else self.bytes(node)  # type: ignore[assignment]
        return other

    def sharing(self, same: Mapping[Node, Node]) -> "Facts":
        """The same, but for inputs that lie in the memory of others."""
        other = Facts(same)
        other.bytes = self.bytes
        return other

    def nothing_costly(self) -> "Facts":
        """The same, as if Inductor computed everything again for every reader."""
        other = copy.copy(self)
        other.costly = lambda node: False  # type: ignore[assignment]
        return other

    def seconds(self, kernel: Kernel, roofline: Roofline) -> float:
        """Predicted run time of a kernel."""
        moved = kernel.size + sum(map(self.bytes, kernel.reads))
        if kernel.node.target in DRAWN:
            moved += DRAW_BYTES * hint(kernel.node.meta["val"].numel())
        return roofline.seconds(self.flops(kernel.node), moved, launches(kernel.node))


def is_reduction(node: Node) -> bool:
    """Whether Inductor computes the node by a loop over what it sums. Below its threshold (the codes of one byte) it writes the
    sum out, as a pointwise operation."""
    if node.target not in REDUCTIONS:
        return False
    source, value = node.args[0], node.meta["val"]
    if not isinstance(source, Node) or not isinstance(value, torch.Tensor):
        return True
    results = hint(value.numel())
    of_each = hint(source.meta["val"].numel()) / max(1, results)
    return results == 1 or of_each >= inductor_config.unroll_reductions_threshold


def is_library_call(node: Node) -> bool:
    """Whether Inductor computes the node outside of its own kernels, from and to memory."""
    if node.op != "call_function" or node.target is operator.getitem or is_view(node):
        return False
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int, float, bool)):
        return False  # (a size)
    if not isinstance(node.target, OpOverload):
        return True
    if node.target in REDUCTIONS or node.target in _POINTWISE:
        return False
    return torch.Tag.pointwise not in node.target.tags


def is_costly(node: Node) -> bool:
    """Whether Inductor rather writes the value to memory than computes it in several kernels."""
    return node.target in COSTLY and _written_if_reused(node.target, node.meta["val"].device.type)


@functools.cache
def _written_if_reused(target: Any, device: str) -> bool:
    """Inductor's own answer for an operation of one argument. Which ones it counts as heavy changed between versions."""
    from wtacrs_fx.private import inductor_ir as ir
    from wtacrs_fx.private import inductor_ops as ops

    def result(_: Any) -> Any:
        return getattr(ops, target.overloadpacket.__name__)(ops.constant(1.0, torch.float32))

    value = ir.Pointwise.create(device=torch.device(device), dtype=torch.float32, inner_fn=result, ranges=[1])
    return bool(value.data.should_realize_on_reuse(2))


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
    layout, many = facts.layout(tuple(nodes)), inductor_config.realize_reads_threshold
    inlined: dict[Node, frozenset[Node]] = {}
    costly: set[Node] = set()  # of those: what a costly operation is part of
    kernels: list[Kernel] = []
    optional: set[Node] = set()
    gathered: set[Node] = set()
    for node in layout.calls:
        if node.target is operator.getitem:
            kernels.append(Kernel(node, frozenset(), facts.bytes(node), library=True))
            continue
        inputs = facts.inputs(node)
        reads = frozenset().union(*(_read(base, inlined, layout, given) for base in inputs))
        if node.target is aten.index.Tensor:
            gathered |= _read(inputs[0], inlined, layout, given)
        heavy = facts.costly(node) or not costly.isdisjoint(inputs)
        if facts.library(node):
            kernels.append(Kernel(node, reads, facts.bytes(node), library=True))
        elif facts.reduction(node) or node in returned or node in layout.written:
            kernels.append(Kernel(node, reads, facts.bytes(node), library=False))
        elif _is_realized(node, len(layout.users.get(node, ())), len(reads), many, heavy):
            kernels.append(Kernel(node, reads, facts.bytes(node), library=False))
            optional.add(node)
        else:
            inlined[node] = reads
            if heavy:
                costly.add(node)
    read_at: dict[Node, set[int]] = {}
    for kernel in kernels:
        for node in kernel.reads & optional:
            read_at.setdefault(node, set()).add(layout.epoch[kernel.node])
    # (A kernel that gathers rows of a value cannot be the one that makes it.)
    internal = {node for node, epochs in read_at.items() if epochs == {layout.epoch[node]} and node not in gathered}
    return [k._replace(internal=True) if k.node in internal else k for k in kernels]


def _read(
    base: Node, inlined: Mapping[Node, frozenset[Node]], layout: Layout, given: Collection[Node]
) -> frozenset[Node]:
    """The buffers that a reader of this value reads."""
    if base in inlined:
        return inlined[base]
    return frozenset((base,)) if base in layout.epoch or base in given else frozenset()


def fuse(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Kernels that run as one: neighbours that are no library calls (with :class:`wtacrs_fx.order.GraphOrder`; else Inductor
    may fuse across library calls too), and the several results of one library call, all made while it has its inputs."""
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        result = kernel.node.target is operator.getitem and groups and groups[-1][0].node is kernel.node.args[0]
        if result or (groups and not kernel.library and not groups[-1][-1].library):
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


def _is_realized(node: Node, readers: int, reads: int, many: int, costly: bool) -> bool:
    """Inductor's rule for values that it might as well compute again in every reader; ``many`` is its threshold."""
    if node.target in DRAWN:
        return True
    return reads > 2 * many or (readers > 1 and (reads > many or costly))

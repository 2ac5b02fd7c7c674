"""Predict which buffers a graph will have when Inductor has compiled it, when each is alive, and how long it runs.

Inductor computes pointwise operations inside the kernels that read them. A node gets memory of its own if it is computed by
a library call (matrix product, fused attention, scatter), is a reduction, is returned, is read by a library call, or is
reused and reads more than a few buffers itself (Inductor's thresholds). Everything else lives in registers, and keeps what
it reads alive until its reader has run.
"""

import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch._inductor import config as inductor_config
from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import Roofline, flops, launches
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import hint, is_view, view_base
from wtacrs_fx.passes.sites import graph_outputs

aten, prims = torch.ops.aten, torch.ops.prims

_REDUCTIONS = frozenset((
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


@dataclass
class Timeline:
    """Live bytes over the kernels of a graph. ``resident`` are those that stay (gradients of parameters)."""

    kernels: list[Kernel] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    """While each kernel runs: everything that the graph was given or allocates."""
    resident: list[int] = field(default_factory=list)
    """Part of ``live``: finished gradients of parameters."""

    @property
    def peak(self) -> int:
        return max(self.live, default=0)

    @property
    def activation_peak(self) -> int:
        """Peak of what is not a gradient of a parameter."""
        return max((a - b for a, b in zip(self.live, self.resident)), default=0)

    def seconds(self, roofline: Roofline, facts: "Facts") -> float:
        """Predicted run time."""
        return sum(facts.seconds(k, roofline) for k in self.kernels)


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
    if node.target in _REDUCTIONS or node.target in _POINTWISE:
        return False
    return torch.Tag.pointwise not in node.target.tags


def buffer_bytes(node: Node) -> int:
    """Bytes of a tensor's storage; 0 for anything else."""
    return hint(node.meta["val"].untyped_storage().nbytes()) if is_tensor(node) else 0


def timeline(
    nodes: Sequence[Node],
    given: Collection[Node],
    returned: Collection[Node],
    stays: Collection[Node] = (),
    facts: Facts | None = None,
    *,
    reuse: bool = True,
) -> Timeline:
    """Simulate a graph.

    Args:
        nodes: calls in the order in which they run.
        given: view bases in memory at the start that are freed behind their last reader. Other inputs count nothing.
        returned: view bases that are alive at the end.
        stays: those of ``returned`` that are gradients of parameters.
        facts: about the graph's nodes, from earlier simulations.
        reuse: whether dead buffers are kept for later ones (Inductor's ``allow_buffer_reuse``) or freed at once.
    """
    facts = facts or Facts()
    kernels = _kernels(nodes, given, returned, facts)
    groups = _fused(kernels)
    last: dict[Node, int] = {}
    for i, group in enumerate(groups):
        for kernel in group:
            last.update(dict.fromkeys(kernel.reads, i))
            last.setdefault(kernel.node, i)
    real = [[k for k in group if not k.internal] for group in groups]
    dies: list[list[Node]] = [[] for _ in groups]
    alive = set(given) | {k.node for group in real for k in group}
    for node, i in last.items():
        if node in alive and node not in returned:
            dies[i].append(node)
    takes = [{} if reuse else _taken_over(g, d, facts) for g, d in zip(groups, dies)]
    early = {taken for t in takes for new, taken in t.items() if new in stays}
    live = sum(map(facts.bytes, given))
    resident = 0
    lives, residents = [], []
    for group, dying, take in zip(real, dies, takes):
        fresh = [k for k in group if k.node not in take]
        live += sum(k.size for k in fresh)
        resident += sum(k.size for k in fresh if k.node in stays or k.node in early)
        lives.append(live)
        residents.append(resident)
        live -= sum(facts.bytes(n) for n in dying if n not in take.values())
    estimate = [a + sum(k.size for k in g if k.internal) for a, g in zip(lives, groups)]
    held = _held_for_reuse(real, dies, estimate, facts) if reuse else [0] * len(groups)
    result = Timeline()
    for group, a, b, c in zip(real, lives, residents, held):
        for kernel in group:
            result.kernels.append(kernel)
            result.live.append(a + c)
            result.resident.append(b)
    return result


def _taken_over(group: Sequence[Kernel], dying: Collection[Node], facts: Facts) -> dict[Node, Node]:
    """Output of the kernel -> the buffer whose memory it takes over: of the same size and type, computed in this graph, and
    read by nothing else then or later. (What the graph was given may belong to somebody else.)"""
    readers: dict[Node, list[Kernel]] = {}
    for kernel in group:
        for node in kernel.reads:
            readers.setdefault(node, []).append(kernel)
    taken: dict[Node, Node] = {}
    for kernel in group:
        if kernel.library or kernel.internal or kernel.node.target in _REDUCTIONS:
            continue
        for node in dying:
            alone = node.op == "call_function" and readers.get(node) == [kernel] and node not in taken.values()
            if alone and _key(node, facts) == _key(kernel.node, facts):
                taken[kernel.node] = node
                break
    return taken


def _held_for_reuse(
    groups: Sequence[Sequence[Kernel]], dies: Sequence[Sequence[Node]], estimate: list[int], facts: Facts
) -> list[int]:
    """Bytes of dead buffers that Inductor keeps for a later buffer of the same size, while each group runs.

    It does so as long as its own estimate of the peak does not rise, which includes the buffers that it drops in the end.
    """
    top = max(estimate, default=0)
    held = [0] * len(groups)
    pool: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, (group, dying) in enumerate(zip(groups, dies)):
        for kernel in group:
            waiting = pool.get(_key(kernel.node, facts)) if kernel.size else None
            if waiting and (waiting[-1] + 1 >= i or kernel.size + max(estimate[waiting[-1] + 1 : i]) <= top):
                for j in range(waiting.pop() + 1, i):
                    held[j] += kernel.size
                    estimate[j] += kernel.size
        for node in dying:
            if facts.bytes(node) and node.op == "call_function":
                pool.setdefault(_key(node, facts), []).append(i)
    return held


def _key(node: Node, facts: Facts) -> tuple[int, torch.dtype]:
    return facts.bytes(node), node.meta["val"].dtype


def _fused(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """Kernels that run as one: neighbours that are no library calls. None of their outputs counts as taking the memory of
    an input: where Inductor does that, it keeps other dead buffers for reuse up to the peak that it estimates without, and
    without reuse it fuses with more than neighbours, which keeps about as much alive."""
    groups: list[list[Kernel]] = []
    for kernel in kernels:
        if groups and not kernel.library and not groups[-1][-1].library:
            groups[-1].append(kernel)
        else:
            groups.append([kernel])
    return groups


def _kernels(nodes: Sequence[Node], given: Collection[Node], returned: Collection[Node], facts: Facts) -> list[Kernel]:
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
        elif node.target in _REDUCTIONS or node in returned or node in gathered or any(map(facts.library, readers)):
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
                    elif reader not in seen and not facts.library(reader) and reader.target not in _REDUCTIONS:
                        seen.add(reader)
                        stack.append(reader)
    return result


def _is_realized(node: Node, readers: Sequence[Node], reads: Collection[Node], many: int) -> bool:
    """Inductor's rule for values that it might as well compute again in every reader; ``many`` is its threshold."""
    if node.target is prims.inductor_random.default:
        return True
    costly = node.target in _COSTLY and node.meta["val"].device.type == "cpu"
    return (len(readers) > 1 and (costly or len(reads) > many)) or len(reads) > 2 * many


def module_timeline(
    graph: Graph, weights: Collection[str], *, backward: bool, facts: Facts, reuse: bool = True
) -> Timeline:
    """Timeline of a partitioned graph. The batch and the parameters count nothing; what a backward is given counts."""
    outputs = [v for v in graph_outputs(graph) if isinstance(v, Node)]
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    given = {n for n in graph.find_nodes(op="placeholder") if backward and n.name not in weights}
    returned = {view_base(n) for n in outputs}
    return timeline(nodes, given, returned, returned if backward else (), facts, reuse=reuse)

"""Predict when each buffer of a graph is alive once Inductor has compiled it, and how long the graph runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import Roofline
from wtacrs_fx.passes.kernels import Facts, Kernel, find_kernels, fuse
from wtacrs_fx.passes.kinds import is_tangent, is_tensor
from wtacrs_fx.passes.reorder import reordered
from wtacrs_fx.passes.saved import storage
from wtacrs_fx.passes.sites import graph_outputs


class MemoryOptions(NamedTuple):
    """What Inductor does about memory."""

    reuse: bool
    """Whether dead buffers are kept for later ones (``allow_buffer_reuse``)."""
    reorder: bool
    """Whether kernels run in an order of its own (``reorder_for_peak_memory``)."""


DEFAULT, AT_ONCE = MemoryOptions(reuse=True, reorder=True), MemoryOptions(reuse=False, reorder=False)


FREES_TANGENTS = hasattr(torch.autograd.Function, "boxed_grads_call")
"""Whether autograd lets go of the gradients that a backward was called with while it runs, and of saved outputs of the forward
(since torch 2.13; 2.11 keeps them to the end)."""


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

    def seconds(self, roofline: Roofline, facts: Facts) -> float:
        """Predicted run time."""
        return sum(facts.seconds(k, roofline) for k in self.kernels)


def timeline(
    nodes: Sequence[Node],
    given: Collection[Node],
    returned: Collection[Node],
    stays: Collection[Node] = (),
    facts: Facts | None = None,
    options: MemoryOptions = DEFAULT,
    donated: Collection[Node] = (),
    visible: Collection[Node] = (),
) -> Timeline:
    """Simulate a graph.

    Args:
        nodes: calls in the order in which they run.
        given: view bases in memory at the start that are freed behind their last reader. Other inputs count nothing.
        returned: view bases that are alive at the end.
        stays: those of ``returned`` that are gradients of parameters.
        facts: about the graph's nodes, from earlier simulations.
        options: whether dead buffers are freed at once, and kernels run in the given order.
        donated: those of ``given`` that nobody else has, so that a kernel may write over them.
        visible: those of ``given`` that the forward returned to its caller.
    """
    facts = facts or Facts()
    kernels = find_kernels(nodes, given, returned, facts)
    groups = fuse(reordered(kernels, given, returned, facts) if options.reorder else kernels)
    last: dict[Node, int] = {}
    for i, group in enumerate(groups):
        for kernel in group:
            last.update(dict.fromkeys(kernel.reads, i))
            last.setdefault(kernel.node, i)
    real = [[k for k in group if not k.internal] for group in groups]
    lent = set(given) - set(donated)
    lasting = () if FREES_TANGENTS else {n for n in lent if is_tangent(n) or n in visible}
    dies: list[list[Node]] = [[] for _ in groups]
    alive = set(given) | {k.node for group in real for k in group}
    for node, i in last.items():
        if node in alive and node not in returned and node not in lasting:
            dies[i].append(node)
    takes = [_taken_over(g, [n for n in d if n not in lent], facts) for g, d in zip(groups, dies)]
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
    held = [0] * len(groups)
    if options.reuse:
        new = [[k for k in group if k.node not in take] for group, take in zip(real, takes)]
        freed = [[n for n in d if n not in take.values() and n not in given] for d, take in zip(dies, takes)]
        held = _held_for_reuse(new, freed, estimate, facts)
    result = Timeline()
    for group, a, b, c in zip(real, lives, residents, held):
        result.kernels += group
        result.live += [a + c] * len(group)
        result.resident += [b] * len(group)
    return result


def _taken_over(group: Sequence[Kernel], dying: Collection[Node], facts: Facts) -> dict[Node, Node]:
    """Output of the kernel -> the buffer whose memory it takes over: of the same size and type, computed in this graph or
    donated to it, and read by nothing else then or later, in the order in which it is written (a copy is for another order)."""
    if not dying or group[0].library:
        return {}
    readers: dict[Node, list[Kernel]] = {}
    for kernel in group:
        for node in kernel.reads:
            readers.setdefault(node, []).append(kernel)
    taken: dict[Node, Node] = {}
    above: dict[Node, frozenset[Node]] = {}
    for kernel in group:
        above[kernel.node] = kernel.reads.union(*(above.get(n, frozenset()) for n in kernel.reads))
        copied = kernel.node.target is torch.ops.aten.clone.default
        if kernel.library or kernel.internal or copied or not kernel.size or facts.reduction(kernel.node):
            continue
        for node in dying:
            ours = facts.bytes(node) == kernel.size and node not in taken.values()
            if (
                ours
                and _reads_last(kernel, readers.get(node, ()), above)
                and _key(node, facts) == _key(kernel.node, facts)
            ):
                taken[kernel.node] = node
                break
    return taken


def _reads_last(kernel: Kernel, readers: Sequence[Kernel], above: Mapping[Node, frozenset[Node]]) -> bool:
    """Whether no other reader is left when the kernel writes. Those do not count whose results it needs (the largest value and
    the sum of a softmax), nor on CPU earlier ones of another number of results, which have loops of their own."""
    if kernel not in readers:
        return False
    value = kernel.node.meta["val"]
    earlier = readers[: readers.index(kernel)] if value.device.type == "cpu" else ()
    done = {r.node for r in earlier if r.node.meta["val"].numel() != value.numel()} | above[kernel.node]
    return all(r is kernel or r.node in done for r in readers)


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
            if facts.bytes(node):
                pool.setdefault(_key(node, facts), []).append(i)
    return held


def _key(node: Node, facts: Facts) -> tuple[int, torch.dtype]:
    return facts.bytes(node), node.meta["val"].dtype


def module_timeline(
    graph: Graph,
    weights: Collection[str],
    *,
    backward: bool,
    facts: Facts,
    options: MemoryOptions,
    donated: Collection[str] = (),
    visible: Collection[str] = (),
) -> Timeline:
    """Timeline of a partitioned graph. The batch and the parameters count nothing; what a backward is given counts, several
    views of one tensor (queries, keys and values of one product) once. Those of its inputs that are ``donated`` it may write
    over; those that are ``visible`` the forward returned."""
    outputs = [v for v in graph_outputs(graph) if isinstance(v, Node)]
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    inputs = [n for n in graph.find_nodes(op="placeholder") if backward and n.name not in weights]
    first: dict[int, Node] = {}
    same = {n: first.setdefault(storage(n), n) for n in inputs if is_tensor(n)}
    given = {same.get(n, n) for n in inputs}
    if len(given) < len(inputs):
        facts = facts.sharing(same)
    returned = {facts.base(n) for n in outputs}
    ours, theirs = ({n for n in given if n.name in names} for names in (donated, visible))
    return timeline(nodes, given, returned, returned if backward else (), facts, options, ours, theirs)

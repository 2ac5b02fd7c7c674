"""Predict in which order Inductor runs the kernels of a graph (``reorder_for_peak_memory``, on by default).

Behind fusion Inductor makes three more orders of its kernels beside that of the graph, estimates the peak of each, and takes
the first one with the least peak: greedily by least memory, breadth first and depth first. Its estimate frees a buffer as
soon as the kernel that reads it last has run. In C++ that is too low: kernels between two library calls are one function,
whose results are all allocated before it is called, so that a breadth-first order, which runs early what depends on little
(the zeros into which an embedding's gradient is added), can have a higher peak than the graph's own.
"""

import heapq
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from wtacrs_fx.passes.kernels import Facts, Kernel
from wtacrs_fx.passes.kinds import is_tangent

aten = torch.ops.aten

_SCATTERED = (aten.index_put.default, aten._unsafe_index_put.default)
"""Operations that add to zeros, which a kernel of their own writes first."""


class Step(NamedTuple):
    """What is ordered as one: a kernel, or a library call with all its results."""

    kernels: tuple[Kernel, ...]
    reads: frozenset[Node]
    size: int


@dataclass(frozen=True)
class Dependencies:
    """What Inductor's orders are made from. Steps are numbered in the order of the graph."""

    steps: Sequence[Step]
    before: Sequence[Collection[int]]
    """Per step those that it waits for."""
    after: Sequence[Collection[int]]
    """Per step those that wait for it."""
    buffers: dict[Node, int]
    """Bytes of what can be freed: made here, or given (tangents are not, to Inductor)."""
    readers: dict[Node, set[int]]
    """Of the buffers."""
    reads: Sequence[Collection[Node]]
    """Per step the buffers among what it reads."""
    made: dict[Node, int]
    """Buffer -> step that allocates it."""
    returned: Collection[Node]

    @classmethod
    def of(
        cls, steps: Sequence[Step], given: Collection[Node], returned: Collection[Node], facts: Facts
    ) -> "Dependencies":
        makers: dict[Node, list[int]] = {}
        for i, step in enumerate(steps):
            for node in dict.fromkeys(k.node for k in step.kernels):
                makers.setdefault(node, []).append(i)
        before = [{j for n in s.reads for j in makers.get(n, ()) if j < i} for i, s in enumerate(steps)]
        after: list[list[int]] = [[] for _ in steps]
        for i, earlier in enumerate(before):
            for j in sorted(earlier):
                after[j].append(i)
        read = set().union(*(s.reads for s in steps))
        freed = (g for g in given if g in read and not is_tangent(g))
        buffers = {n: facts.bytes(n) for n in (*freed, *makers)}
        reads = [[n for n in s.reads if n in buffers] for s in steps]
        readers: dict[Node, set[int]] = {n: set() for n in buffers}
        for i, found in enumerate(reads):
            for node in found:
                readers[node].add(i)
        made = {node: found[0] for node, found in makers.items()}
        return cls(steps, before, after, buffers, readers, reads, made, returned)

    def peak(self, order: Sequence[int]) -> int:
        """Inductor's estimate."""
        place = {step: i for i, step in enumerate(order)}
        change = [0] * (len(order) + 1)
        for node, size in self.buffers.items():
            start = place[self.made[node]] if node in self.made else 0
            change[start] += size
            if node not in self.returned:
                last = max((place[i] for i in self.readers[node]), default=start)
                change[last + 1] -= size
        live = top = 0
        for difference in change:
            live += difference
            top = max(top, live)
        return top


def reordered(
    kernels: Sequence[Kernel], given: Collection[Node], returned: Collection[Node], facts: Facts
) -> list[Kernel]:
    """The kernels in the order in which Inductor will run them. The arguments are those of
    :func:`wtacrs_fx.passes.liveness.timeline`."""
    steps = _steps(kernels)
    known = Dependencies.of(steps, given, returned, facts)
    orders = [list(range(len(steps))), *(make(known) for make in METHODS)]
    best = min(orders, key=known.peak)
    return list(kernels) if best is orders[0] else [k for i in best for k in steps[i].kernels]


def _steps(kernels: Sequence[Kernel]) -> list[Step]:
    steps: list[Step] = []
    for kernel in kernels:
        node = kernel.node
        if node.target is operator.getitem and steps:
            last = steps[-1]
            steps[-1] = Step((*last.kernels, kernel), last.reads, last.size + kernel.size)
        elif node.target in _SCATTERED and kernel.size:
            zeros = Kernel(node, frozenset(), kernel.size, library=False)
            scatter = kernel._replace(reads=kernel.reads | {node}, size=0)
            steps += [Step((k,), k.reads, k.size) for k in (zeros, scatter)]
        else:
            steps.append(Step((kernel,), kernel.reads, kernel.size))
    return steps


def least_memory_first(known: Dependencies) -> list[int]:
    """Of what can run next, what needs no new peak and leaves least memory; else what allocates least."""
    waits = [len(b) for b in known.before]
    left = {n: len(r) + (n in known.returned) for n, r in known.readers.items()}
    freed = [sum(known.buffers[n] for n in reads if left[n] == 1) for reads in known.reads]
    for node, i in known.made.items():
        if not left[node]:
            freed[i] += known.buffers[node]
    live = sum(size for n, size in known.buffers.items() if n not in known.made)
    top = max(live, sum(size for n, size in known.buffers.items() if n in known.returned))
    ready = {i for i, count in enumerate(waits) if not count}
    order: list[int] = []
    while ready:
        room = top - live

        def cost(i: int, room: int = room) -> tuple[int, int, int]:
            size = known.steps[i].size
            return (size if size > room else 0), size - freed[i], i

        step = min(ready, key=cost)
        ready.remove(step)
        order.append(step)
        live += known.steps[step].size
        top = max(top, live)
        live -= freed[step]
        for later in known.after[step]:
            waits[later] -= 1
            if not waits[later]:
                ready.add(later)
        for node in known.reads[step]:
            left[node] -= 1
            if left[node] == 1:
                for reader in known.readers[node]:
                    freed[reader] += known.buffers[node]
    return order


def breadth_first(known: Dependencies) -> list[int]:
    """What waits for the earliest steps first."""
    waits = [len(b) for b in known.before]
    place: dict[int, int] = {}
    ready: list[tuple[list[int], int]] = [([], i) for i, count in enumerate(waits) if not count]
    while ready:
        _, step = heapq.heappop(ready)
        place[step] = len(place)
        for later in known.after[step]:
            waits[later] -= 1
            if not waits[later]:
                heapq.heappush(ready, (sorted(place[j] for j in known.before[later]), later))
    return list(place)


def depth_first(known: Dependencies) -> list[int]:
    """The smallest steps first, each behind what it waits for."""
    weight = [
        (step.size + sum(known.buffers[n] for n in reads), i)
        for i, (step, reads) in enumerate(zip(known.steps, known.reads))
    ]
    seen: set[int] = set()
    order: list[int] = []
    for _, root in sorted(weight):
        stack = [(root, False)]
        while stack:
            step, ready = stack.pop()
            if ready:
                order.append(step)
            elif step not in seen:
                seen.add(step)
                stack.append((step, True))
                stack += [(j, False) for j in sorted(known.before[step], key=weight.__getitem__, reverse=True)]
    return order


METHODS: Sequence[Callable[[Dependencies], list[int]]] = (least_memory_first, breadth_first, depth_first)
"""In the order in which Inductor tries them."""

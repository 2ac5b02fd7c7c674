"""The orders that Inductor chooses from: those of its own functions, on random graphs; and what the choice does to a peak."""

import random

import pytest
import torch
from torch._inductor import memory
from torch.fx import Graph, Node
from torch.utils._ordered_set import OrderedSet

from wtacrs_fx.passes.kernels import Facts, Kernel
from wtacrs_fx.passes.liveness import AT_ONCE, DEFAULT, timeline
from wtacrs_fx.passes.reorder import METHODS, Dependencies, Step, reordered

aten = torch.ops.aten
UNIT = 1024
"""Bytes."""


class Buffer:
    """What Inductor's functions ask of a buffer."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.readers = name, OrderedSet([])
        self.mpi_buffer = memory.MemoryPlanningInfoForBuffer(size_free=size, size_alloc=size, succ_nodes=self.readers)

    def get_name(self) -> str:
        return self.name


class Scheduled:
    """What Inductor's functions ask of a kernel."""

    def __init__(self, index: int, output: Buffer, reads: list[Buffer], makers: list["Scheduled"]) -> None:
        self.output, self.unmet_dependencies = output, [torch._inductor.dependencies.StarDep(b.name) for b in reads]
        self.mpi_node = memory.MemoryPlanningInfoForNode(
            index=index,
            size=output.mpi_buffer.size_alloc,
            pred_buffers=OrderedSet(reads),
            pred_nodes=OrderedSet(makers),
            succ_nodes=OrderedSet([]),
        )
        for buffer in reads:
            buffer.readers.add(self)
        for maker in makers:
            maker.mpi_node.succ_nodes.add(self)

    def get_outputs(self) -> list[Buffer]:
        return [self.output]

    def get_buffer_names(self) -> OrderedSet[str]:
        return OrderedSet([self.output.name])


def tensor(node: Node, units: int) -> Node:
    node.meta["val"] = torch.empty(units * UNIT // 4, device="meta")
    return node


def random_graph(seed: int) -> tuple[list[Node], list[Node], list[Node]]:
    """Inputs, calls and what is returned; every call reads up to three tensors, mostly recent ones."""
    choose, graph = random.Random(seed), Graph()
    given = [tensor(graph.placeholder(f"saved_{i}"), choose.choice((1, 2, 8))) for i in range(4)]
    nodes: list[Node] = []
    for _ in range(25):
        near = (given + nodes)[-8:]
        reads = tuple(dict.fromkeys(choose.choice(near) for _ in range(choose.randint(0, 3))))
        nodes.append(tensor(graph.call_function(aten.cat.default, (reads,)), choose.choice((1, 2, 4, 8))))
    returned = [n for n in nodes if not n.users or choose.random() < 0.1]
    graph.output(tuple(returned))
    return given, nodes, returned


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor's estimates were others before")
@pytest.mark.parametrize("seed", range(20))
def test_orders_are_inductors(seed):
    given, nodes, returned = random_graph(seed)
    steps = [Step((Kernel(n, frozenset(n.all_input_nodes), 0, False),), frozenset(n.all_input_nodes), 0) for n in nodes]
    facts = Facts()
    steps = [s._replace(size=facts.bytes(n)) for s, n in zip(steps, nodes)]
    known = Dependencies.of(steps, given, returned, facts)

    buffers = {n: Buffer(n.name, facts.bytes(n)) for n in (*given, *nodes)}
    kernels: dict[Node, Scheduled] = {}
    for i, n in enumerate(nodes):
        makers = [kernels[s] for s in n.all_input_nodes if s in kernels]
        kernels[n] = Scheduled(i, buffers[n], [buffers[s] for s in n.all_input_nodes], makers)
    inputs = {n.name: buffers[n] for n in given if n.users}
    outputs = OrderedSet([n.name for n in returned])
    every = list(kernels.values())
    made = {n.name: buffers[n] for n in nodes}
    theirs = [
        memory.topological_sort_lpmf(every, inputs, made, outputs),
        memory.topological_sort_bfs(every),
        memory.topological_sort_dfs(every),
    ]
    for make, order in zip(METHODS, theirs):
        mine = make(known)
        assert mine == [k.mpi_node.index for k in order], make.__name__
        assert known.peak(mine) == memory.estimate_peak_memory(order, inputs, outputs)[0]


def branch(early: bool) -> tuple[Graph, list[Node], list[Node], list[Node]]:
    """A chain of products that starts from a large tensor, which is read once more behind it; or at once."""
    graph = Graph()
    x, w = tensor(graph.placeholder("x"), 8), graph.placeholder("w")
    chain = [x]

    def product(source: Node, units: int) -> Node:
        return tensor(graph.call_function(aten.mm.default, (source, w)), units)

    side = product(x, 1) if early else None
    for units in (4, 4, 4):
        chain.append(product(chain[-1], units))
    side = side or product(x, 1)
    returned = [side, chain[-1]]
    graph.output(tuple(returned))
    return graph, [n for n in graph.nodes if n.op == "call_function"], [x], returned


def test_what_lowers_the_peak_is_taken():
    _, nodes, given, returned = branch(early=False)
    kernels = [Kernel(n, frozenset(n.all_input_nodes[:1]), Facts().bytes(n), True) for n in nodes]
    order = [k.node for k in reordered(kernels, given, returned, Facts())]
    assert order == [nodes[3], *nodes[:3]]
    facts = Facts()
    peaks = [timeline(nodes, given, returned, facts=facts, options=o).peak // UNIT for o in (DEFAULT, AT_ONCE)]
    assert peaks == [8 + 1 + 4, 8 + 4 + 4]


def test_the_graphs_own_order_is_kept_where_none_is_better():
    _, nodes, given, returned = branch(early=True)
    kernels = [Kernel(n, frozenset(n.all_input_nodes[:1]), Facts().bytes(n), True) for n in nodes]
    assert reordered(kernels, given, returned, Facts()) == kernels


def test_zeros_that_run_early_are_in_memory_with_the_kernels_around_them():
    """An embedding's gradient is added to zeros. Inductor may write them before a product that they do not need; its estimate
    then frees what the kernel beside them has read, the C++ function of both does not."""
    graph = Graph()
    tangent, saved, ids = (graph.placeholder(n) for n in ("tangents_1", "saved", "ids"))
    w = graph.placeholder("w")
    for node, units in ((tangent, 1), (saved, 16), (ids, 1), (w, 1)):
        tensor(node, units)
    a = tensor(graph.call_function(aten.mul.Tensor, (saved, tangent)), 16)
    b = tensor(graph.call_function(aten.mm.default, (a, w)), 1)
    zeros = tensor(graph.call_function(aten.full.default, ([1], 0)), 12)
    put = tensor(graph.call_function(aten.index_put.default, (zeros, [ids], b, True)), 12)
    graph.output((put,))
    facts = Facts()
    zero, scatter = (
        Kernel(put, frozenset(), facts.bytes(put), library=False),
        Kernel(put, frozenset((b, ids, put)), 0, library=True),
    )
    kernels = [
        Kernel(a, frozenset((saved,)), facts.bytes(a), library=False),
        Kernel(b, frozenset((a,)), facts.bytes(b), library=True),
        Kernel(put, frozenset((b, ids)), facts.bytes(put), library=True),
    ]
    steps = [
        *(Step((k,), k.reads, k.size) for k in kernels[:2]),
        *(Step((k,), k.reads, k.size) for k in (zero, scatter)),
    ]
    known = Dependencies.of(steps, [saved, ids], [put], facts)
    assert known.made[put] == 2
    assert set(known.before[3]) == {1, 2}
    assert known.peak([2, 0, 1, 3]) > known.peak([0, 1, 2, 3])
    assert [k.node for k in reordered(kernels, [saved, ids], [put], facts)] == [a, b, put]

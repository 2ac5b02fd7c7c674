"""The order in which a joint graph's forward and backward will run, for a given set of saved tensors."""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from wtacrs_fx.passes.kinds import draws, is_tangent
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import graph_outputs


@dataclass(frozen=True)
class Backward:
    """What runs in the backward, in order, and the view bases that it reads from memory."""

    nodes: tuple[Node, ...]
    reads: frozenset[Node]


def schedule_backward(graph: Graph, num_fwd_outputs: int, saved: Collection[Node]) -> Backward:
    """The backward for these saved view bases: everything else that it reads is computed again from them, just in time.

    Placeholders are in memory. The order is the partitioner's, which follows autograd: the joint graph's own order from
    the first reader of a tangent on, with what has to be recomputed right in front of its first reader.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    outputs = [v for v in graph_outputs(graph)[num_fwd_outputs:] if isinstance(v, Node)]
    needed, reads = _closure(outputs, saved)
    ordered = sorted(needed, key=position.__getitem__)
    start = min(
        (position[u] for t in graph.find_nodes(op="placeholder") if is_tangent(t) for u in t.users if u in needed),
        default=0,
    )
    done: set[Node] = set()
    result: list[Node] = []
    for node in ordered:
        if position[node] >= start and node not in done:
            for wanted in (*pending(node, needed, done, position), node):
                done.add(wanted)
                result.append(wanted)
    return Backward(tuple(result), frozenset(reads))


def _closure(outputs: Sequence[Node], saved: Collection[Node]) -> tuple[set[Node], set[Node]]:
    """Calls to run for the outputs, and the tensors that are read from memory for it."""
    needed: set[Node] = set()
    reads: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node.op != "call_function" or node in saved or _drawn(node):
            reads.add(node)
        elif node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed, {view_base(n) for n in reads}


def _drawn(node: Node) -> bool:
    """Whether the node is a random number, or one of several results of an operation that draws: never computed twice."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and draws(source)


def pending(node: Node, among: Collection[Node], done: Collection[Node], position: Mapping[Node, int]) -> list[Node]:
    """What must run before the node and has not: those ``among`` its inputs, and theirs, that are not ``done``, in order."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in among and source not in done and source not in found:
                found.add(source)
                stack.append(source)
    return sorted(found, key=position.__getitem__)

"""The order in which a joint graph's forward and backward will run, for a given set of saved tensors."""

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from wtacrs_fx.passes.kinds import draws, is_tangent, runs_once
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import graph_outputs
from wtacrs_fx.passes.unfold import find_late_sums


@dataclass(frozen=True)
class Backward:
    """What runs in the backward, in order, and the view bases that it reads from memory."""

    nodes: tuple[Node, ...]
    reads: frozenset[Node]


class JointOrder:
    """Answers for many sets of saved tensors what the backward of one joint graph runs, and in which order.

    Args:
        graph: joint graph, not changed meanwhile.
        num_fwd_outputs: its forward outputs.
    """

    def __init__(self, graph: Graph, num_fwd_outputs: int) -> None:
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.outputs = [v for v in graph_outputs(graph)[num_fwd_outputs:] if isinstance(v, Node)]
        self.after_tangents = [u for t in graph.find_nodes(op="placeholder") if is_tangent(t) for u in t.users]
        self._inputs = {n: n.all_input_nodes for n in graph.nodes}
        self._in_memory = {n for n in graph.nodes if n.op != "call_function" or _once(n)}
        self._late = {n for late in find_late_sums(graph) if not late.shrinks for n in late.chain}

    def backward(self, saved: Collection[Node]) -> Backward:
        """The backward for these saved view bases: everything else that it reads is computed again from them, just in time.

        Placeholders are in memory. The order is the partitioner's, which follows autograd: the joint graph's own order from
        the first reader of a tangent on, with what has to be recomputed right in front of its first reader (and products that
        run where they are added to something, see :mod:`wtacrs_fx.passes.unfold`).
        """
        needed, reads = self._closure(saved)
        start = min((self.position[u] for u in self.after_tangents if u in needed), default=0)
        done: set[Node] = set()
        result: list[Node] = []
        for node in sorted(needed, key=self.position.__getitem__):
            if self.position[node] >= start and node not in done and node not in self._late:
                if not needed.intersection(self._inputs[node]) <= done:
                    recomputed = pending(node, needed, done, self.position)
                    done.update(recomputed)
                    result += recomputed
                done.add(node)
                result.append(node)
        return Backward(tuple(result), frozenset(view_base(n) for n in reads))

    def _closure(self, saved: Collection[Node]) -> tuple[set[Node], set[Node]]:
        """Calls to run for the outputs, and what is read from memory for it."""
        needed: set[Node] = set()
        reads: set[Node] = set()
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if node in saved or node in self._in_memory:
                reads.add(node)
            elif node not in needed:
                needed.add(node)
                stack += self._inputs[node]
        return needed, reads


def _once(node: Node) -> bool:
    """Whether the node is never computed twice: a random number, or what is marked; or one of several results of such."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, Node) and (draws(source) or runs_once(source))


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

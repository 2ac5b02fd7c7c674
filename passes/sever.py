"""Tie a tensor to the forward so that no cut can compute it again in the backward.

Nodes that neither a forward output nor a tangent needs may be placed by PyTorch's partitioner where it likes, even twice,
also when they draw random rows. So the joint graph is cut open by hand at the tensors of a draw: in the forward they
become extra outputs, in the backward they are read from new placeholders, which the partitioner can only save. After the
partition the two ends are joined again and the extra outputs are gone.
"""

from typing import Protocol

from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.sites import graph_outputs

_NAME = "wtacrs_saved_"


class Cuts(Protocol):
    """How a tensor comes from the forward to the backward."""

    def cut(self, node: Node) -> Node:
        """The node from which the backward reads ``node``'s value."""


class NoCuts:
    """Cuts of a joint graph that stays one graph: there are none."""

    def cut(self, node: Node) -> Node:
        return node


class Severed:
    """The cuts made in one joint graph.

    Usage: ``cut`` each tensor while rewriting, ``extend_outputs`` before the partition, ``join`` the forward after it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._ends: list[tuple[Node, Node]] = []

    def __len__(self) -> int:
        return len(self._ends)

    def cut(self, node: Node) -> Node:
        """The placeholder from which the backward reads ``node``'s value."""
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            # The partitioner takes every placeholder that is not a tangent for an input of the forward.
            placeholder = self.graph.placeholder(f"{_NAME}{len(self._ends)}")
        placeholder.meta["val"] = node.meta["val"]
        self._ends.append((node, placeholder))
        return placeholder

    def extend_outputs(self, num_fwd_outputs: int) -> int:
        """Make the cut tensors forward outputs, after the real ones. Returns the new number of forward outputs."""
        output = self.graph.output_node()
        values = graph_outputs(self.graph)
        values[num_fwd_outputs:num_fwd_outputs] = [node for node, _ in self._ends]
        output.args = (tuple(values),)
        if "desc" in output.meta:
            descs = list(output.meta["desc"])
            descs[num_fwd_outputs:num_fwd_outputs] = [None] * len(self._ends)
            output.meta["desc"] = descs
        return num_fwd_outputs + len(self._ends)

    def join(self, forward: GraphModule, num_fwd_outputs: int) -> None:
        """In the partitioned forward, save the tensors themselves and drop the extra outputs and placeholders.

        Args:
            forward: forward graph of a partition made with the extended outputs.
            num_fwd_outputs: the number of the real ones.
        """
        graph = forward.graph
        output = graph.output_node()
        start, stop = num_fwd_outputs, num_fwd_outputs + len(self._ends)
        values = graph_outputs(graph)
        placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
        producer = {
            placeholders[end.name]: value
            for (_, end), value in zip(self._ends, values[start:stop])
            if end.name in placeholders
        }
        output.args = (tuple([*values[:start], *(producer.get(v, v) for v in values[stop:])]),)
        for key in ("desc", "output_stack_traces"):
            if key in output.meta:
                output.meta[key] = [*output.meta[key][:start], *output.meta[key][stop:]]
        graph.eliminate_dead_code()
        for placeholder in producer:
            graph.erase_node(placeholder)
        graph.lint()
        forward.recompile()


def saved_tensors(forward: GraphModule, num_fwd_outputs: int) -> list[Node]:
    """The tensors that a partitioned forward hands to its backward."""
    values = graph_outputs(forward.graph)[num_fwd_outputs:]
    return [v for v in values if isinstance(v, Node) and is_tensor(v)]


def is_saved(node: Node) -> bool:
    """Whether a node of a partitioned backward is the placeholder of a saved tensor; they are in the order of
    :func:`saved_tensors`."""
    special = ("tangents", "bwd_seed", "bwd_base", "bwd_rng_state")
    return node.op == "placeholder" and is_tensor(node) and not any(s in str(node.target) for s in special)

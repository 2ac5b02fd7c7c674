"""Act: compute parts of the forward again in the backward.

    add: f32[B, T, D]       (the boundary: saved)         add: f32[B, T, D]
    mm: f32[M, 4D] = mm(add, w)                           mm: f32[M, 4D] = mm(add, w)
    gelu: f32[M, 4D] = gelu(mm)                           gelu: f32[M, 4D] = gelu(mm)
    ...                                             ->    ...
                                                          mm_1: f32[M, 4D] = mm(add, w)          must_be_in_backward
    mul: f32[M, 4D] = gelu_backward(grad, mm)             mul: f32[M, 4D] = gelu_backward(grad, mm_1)

The copies are nodes of their own, so that no cut can decide otherwise, and PyTorch's recomputation tags, which wrap every
operation marked as random in a higher-order operation that Inductor cannot always compile (fused attention on CPU, even
without dropout), are not needed. Operations that draw from the generator are never copied; Inductor's random numbers are
functions of a seed, and the same when computed again.
"""

import operator
from collections.abc import Collection, Mapping

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from wtacrs_fx.passes.kinds import draws, is_drawn_mask, runs_once
from wtacrs_fx.passes.policy import is_view
from wtacrs_fx.passes.schedule import pending
from wtacrs_fx.passes.segments import forward_nodes
from wtacrs_fx.passes.sites import primals

_RECOMPUTE = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def recompute(graph: Graph, num_fwd_outputs: int, nodes: Collection[Node], saved: Collection[Node] = ()) -> int:
    """Let whatever is not needed by the forward read copies of ``nodes``. A copy reads copies where there are some.

    Args:
        graph: joint graph.
        num_fwd_outputs: its forward outputs.
        nodes: of the forward.
        saved: tensors from which the copies start. Without this the partitioner may save other tensors of equal size, such
            as what each block adds to the residual stream, and then computes the stream itself, for all blocks, in one
            chain at the start of the backward.

    Returns: how many nodes were copied; those that the backward does not ask for are not.
    """
    forward = set(forward_nodes(graph, num_fwd_outputs))
    position = {n: i for i, n in enumerate(graph.nodes)}
    wanted = {n for n in nodes if n in forward and not draws(n) and not runs_once(n)}
    for node in saved:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    wanted -= {n for n in wanted if n.target is operator.getitem and n.args[0] not in wanted}
    copier = _Copier(graph, wanted, position)
    for reader in list(graph.nodes):
        if reader.op == "call_function" and reader not in forward:
            copier.serve(reader)
    return len(copier.copies)


class _Copier:
    """Puts copies right in front of their first readers. They depend on nothing but saved tensors, so it takes
    :class:`wtacrs_fx.order.GraphOrder` that Inductor runs them there and not when the backward begins."""

    def __init__(self, graph: Graph, wanted: Collection[Node], position: Mapping[Node, int]) -> None:
        self.graph, self.wanted, self.position = graph, wanted, position
        self.copies: dict[Node, Node] = {}

    def serve(self, reader: Node) -> None:
        """Let a node of the backward read copies."""
        for node in pending(reader, self.wanted, self.copies, self.position):
            with self.graph.inserting_before(reader):
                copy = self.graph.node_copy(node, lambda n: self.copies.get(n, n))
            copy.meta["partitioner_tag"] = "must_be_in_backward"
            self.copies[node] = copy
        for source in reader.all_input_nodes:
            if source in self.copies:
                reader.replace_input_with(source, self.copies[source])


def protect_draws(graph: Graph) -> int:
    """Forbid PyTorch's partitioner to run an operation that draws random numbers a second time. Returns how many there are.

    Its memory budget would do so: dropout is then drawn afresh in the backward and gradients are wrong without a word.
    (In checkpoint regions of the user it replays the generator instead.)
    """
    drawing = [n for n in graph.nodes if draws(n) and "recompute" not in n.meta]
    for node in drawing:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(drawing)


def protect_readers_of_mutated(graph: Graph, num_fwd_outputs: int) -> int:
    """Forbid to run again what reads an input that the forward changes in place (a buffer): in the backward it would read what
    the input was changed to. Returns how many nodes there are.

    Inductor's graphs change inputs by a ``copy_`` at their end; else AOTAutograd does it behind the forward, and describes
    the new value among the outputs.
    """
    changed = {n.args[0] for n in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)}
    descriptions = graph.output_node().meta.get("desc") or ()
    described = [d.mutated_input for d in descriptions if hasattr(d, "mutated_input")]
    stack = [n for n in primals(graph) if n in changed or n.meta.get("desc") in described]
    forward, readers = set(forward_nodes(graph, num_fwd_outputs)) if stack else set(), set[Node]()
    while stack:
        for user in stack.pop().users:
            if user in forward and user not in readers:
                if is_view(user):
                    stack.append(user)
                else:
                    readers.add(user)
    for node in readers:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(readers)


def take_user_regions(graph: Graph) -> set[Node]:
    """Nodes that ``torch.utils.checkpoint`` regions of the user ask to recompute. Their tags are removed.

    What one region hands to a later one is saved, and what a backward hook needs; as PyTorch does it. Random masks that do
    not come from Inductor's seeds are saved too, where PyTorch would replay the generator.
    """
    found = set()
    for node in graph.nodes:
        if node.meta.get("recompute") not in _RECOMPUTE:
            continue
        region = node.meta.get("ac_graph_id", 0)
        marked = [u for u in node.users if u.meta.get("recompute") in _RECOMPUTE]
        hooked = node.meta.get("has_backward_hook", False) and not marked
        if not hooked and not is_drawn_mask(node) and not any(u.meta.get("ac_graph_id", 0) > region for u in marked):
            found.add(node)
    for node in graph.nodes:
        if node.meta.get("recompute") in _RECOMPUTE:
            del node.meta["recompute"]
    protect_draws(graph)
    return found

"""Check a sampled partition: a draw is one unit, made in the forward, read in the backward."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.errors import InvariantError
from wtacrs_fx.passes.kinds import ancestors, draws
from wtacrs_fx.passes.policy import Action, Decision
from wtacrs_fx.passes.sample import Sampled
from wtacrs_fx.passes.sever import is_saved, saved_tensors
from wtacrs_fx.private import OpOverload

wtacrs = torch.ops.wtacrs


def check_partition(
    forward: GraphModule, backward: GraphModule, plan: Sequence[Decision], done: Sampled, num_fwd_outputs: int
) -> None:
    """Raise unless the two graphs agree about every draw.

    - the random op runs in the forward and never in the backward;
    - no ``select_rows`` runs in both graphs;
    - for every early draw the tensors saved are the kept rows (k of them) and their indices, each produced by the forward;
    - every early product of the backward reads those rows, or computes them from nothing but their codes and scales, so that
      it does not need the source [M, D].

    Raises:
        InvariantError: naming the node and the module. A wrong graph is never returned.
    """
    draws_forward, draws_backward = (_calls(g.graph, wtacrs.select_rows.default) for g in (forward, backward))
    if _calls(backward.graph, wtacrs.draw_seed.default):
        raise InvariantError("wtacrs: draw_seed is in the backward graph; the two graphs would draw different rows.")
    if both := draws_forward & draws_backward:
        raise InvariantError(f"wtacrs: {sorted(both)} would run in the forward and again in the backward.")
    saved = saved_tensors(forward, num_fwd_outputs)
    placeholders = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    nodes = {n.name: n for n in backward.graph.nodes}
    if any(n.op == "placeholder" and n.name.startswith("wtacrs_saved_") for n in forward.graph.nodes):
        raise InvariantError("wtacrs: a cut tensor was not joined to the forward graph.")
    for decision in plan:
        if decision.action is not Action.EARLY:
            continue
        module = decision.site.module
        kept = done.draws[decision.group]
        for end in (*kept.stored, kept.index):
            if end.name not in placeholders:
                raise InvariantError(f"wtacrs: {end.name} of {module} is not among the tensors saved for the backward.")
        operand = decision.site.activation
        dim = operand.dim - operand.value.dim()
        shape = kept.rows.meta["val"].shape
        if shape[dim] != decision.k or kept.index.meta["val"].shape[-1] != decision.k:
            raise InvariantError(f"wtacrs: {module} keeps {shape}, expected {decision.k} rows.")
        product = nodes.get(done.products[decision.site.node].name)
        operands = {n.name: n for a in product.args for n in (a, _through_transpose(a))} if product else {}
        rows = operands.get(kept.rows.name)
        if rows is None:
            raise InvariantError(f"wtacrs: the weight gradient of {module} does not read its kept rows.")
        if rows.op != "placeholder":
            sources = {n.name for n in ancestors([rows]) if n.op == "placeholder"}
            if sources != {n.name for n in kept.stored}:
                raise InvariantError(f"wtacrs: the kept rows of {module} are computed from {sorted(sources)}.")
    if len(saved) != len([n for n in placeholders.values() if is_saved(n)]):
        raise InvariantError("wtacrs: the forward and the backward disagree about the number of saved tensors.")


def check_draws(joint: GraphModule, forward: GraphModule, backward: GraphModule) -> None:
    """Raise unless every operation that draws random numbers (dropout's masks, above all) runs as often as in the joint graph,
    and in one of the two graphs: else the gradients would be those of other masks.

    Raises:
        InvariantError: naming the operation.
    """
    known, first, again = (
        {n.name: str(n.target) for n in g.graph.nodes if draws(n) and n.target.namespace != "wtacrs"}
        for g in (joint, forward, backward)
    )
    counts = Counter(first.values())
    counts.update(again.values())
    more = {n for n, op in (first | again).items() if counts[op] > Counter(known.values())[op]}
    if both := sorted(again.keys() & (first.keys() | more)):
        raise InvariantError(f"wtacrs: {both} of the backward would be drawn anew, other than in the forward.")


def _calls(graph: Graph, target: OpOverload) -> set[str]:
    return {n.name for n in graph.find_nodes(op="call_function", target=target)}


def _through_transpose(node: Node) -> Node:
    return node.all_input_nodes[0] if node.target is torch.ops.aten.permute.default else node

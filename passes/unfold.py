"""Let a product run where it is, not where its result is added to a later one.

Inductor turns ``add(mm(A, B), X)`` into one ``addmm(X, A, B)``, which runs once X is there. For a weight that is used twice
(an embedding tied to the output head) X is the last gradient of the backward, and A, the gradient of the logits, would stay
in memory through all of it.

Before::

    mm: "f32[V, D]" = aten.mm(A, B)
    ...
    add: "f32[V, D]" = aten.add(mm, X)

After (equal to the bit, since -(-x) = x)::

    mm: "f32[V, D]" = aten.mm(A, B)
    ...
    neg: "f32[V, D]" = aten.neg(mm)
    sub: "f32[V, D]" = aten.sub(X, neg)
"""

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import flops
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.kernels import buffer_bytes
from wtacrs_fx.passes.policy import view_base

aten = torch.ops.aten


def unfold_late_sums(graph: Graph) -> int:
    """Rewrite sums of a product and something that is known much later: another node with FLOPs runs in between, and the
    product's result is smaller than what it reads. Returns how many."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    busy = [position[n] for n in graph.nodes if flops(n)]
    count = 0
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if add.kwargs:  # a factor
            continue
        early = next((a for a in add.args if isinstance(a, Node) and _is_waiting(a, add, position, busy)), None)
        if early is None:
            continue
        other = add.args[1] if add.args[0] is early else add.args[0]
        with graph.inserting_before(add):
            emit = Emitter(graph, add)
            result = emit(aten.sub.Tensor, other, emit(aten.neg.default, early))
        add.replace_all_uses_with(result)
        graph.erase_node(add)
        count += 1
    return count


def _is_waiting(operand: Node, add: Node, position: dict[Node, int], busy: list[int]) -> bool:
    """Whether the operand is a product, or a view of one, that nothing else reads."""
    product = view_base(operand)
    if product.target is not aten.mm.default or not all(isinstance(a, Node) for a in add.args):
        return False
    while operand is not product and len(operand.users) == 1:
        operand = operand.all_input_nodes[0]
    if operand is not product or len(product.users) != 1:
        return False
    if not any(position[product] < i < position[add] for i in busy):
        return False
    return buffer_bytes(product) < sum(buffer_bytes(view_base(n)) for n in product.all_input_nodes)

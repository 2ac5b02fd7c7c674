"""Let a product run where it is, not where its result is added to a later one; or keep the little that it reads until then.

Inductor turns ``add(mm(A, B), X)`` into one ``addmm(X, A, B)``, which runs once X is there. For a weight that is used twice
(an embedding tied to the output head) X is the last gradient of the backward, and A, the gradient of the logits, would stay
in memory through all of it.

Before::

    mm: "f32[V, D]" = aten.mm(A, B)
    ...
    add: "f32[V, D]" = aten.add(mm, X)

After, where the product is smaller than A and B (equal to the bit, since -(-x) = x)::

    mm: "f32[V, D]" = aten.mm(A, B)
    ...
    neg: "f32[V, D]" = aten.neg(mm)
    sub: "f32[V, D]" = aten.sub(X, neg)

After, where A and B are smaller, such as rows of a sampled head: the product moves to its sum, where Inductor runs it anyway.
And since Inductor computes what a library call reads no earlier than the call, and would keep all rows until then, the chosen
rows are written to memory where the graph chooses them (``inductor_force_stride_order`` asks for the strides that they have)::

    A = aten.index(grad_logits, [rows])
    pin: "f32[k, V]" = prims.inductor_force_stride_order(A, [V, 1])
    ...
    mm: "f32[V, D]" = aten.mm(pin.T, B)
    add: "f32[V, D]" = aten.add(mm, X)
"""

from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import flops
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.kernels import buffer_bytes, is_library_call
from wtacrs_fx.passes.kinds import PINNED
from wtacrs_fx.passes.policy import view_base

aten, prims = torch.ops.aten, torch.ops.prims


class LateSum(NamedTuple):
    """A sum of a product and something that is known much later: another node with FLOPs runs in between."""

    add: Node
    operand: Node
    """The product, or a view of it, as the sum reads it."""
    chain: tuple[Node, ...]
    """From the product to ``operand``."""

    @property
    def product(self) -> Node:
        return self.chain[0]

    @property
    def reads(self) -> list[Node]:
        """View bases of the product's factors."""
        return [view_base(n) for n in self.product.all_input_nodes]

    @property
    def shrinks(self) -> bool:
        """Whether the product takes less memory than its factors."""
        return buffer_bytes(self.product) < sum(map(buffer_bytes, self.reads))


def find_late_sums(graph: Graph) -> list[LateSum]:
    """In graph order. Nothing else reads the products."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    busy = [position[n] for n in graph.nodes if flops(n)]
    found = []
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if add.kwargs or not all(isinstance(a, Node) for a in add.args):  # a factor, or a number
            continue
        sums = (LateSum(add, a, chain) for a in add.args if (chain := _chain(a)))
        late = (s for s in sums if any(position[s.product] < i < position[add] for i in busy))
        found += [s for s in [next(late, None)] if s is not None]
    return found


def unfold_late_sums(graph: Graph) -> int:
    """Rewrite late sums. Returns how many of them were unfolded; products of others have moved to their sums."""
    sums = find_late_sums(graph)
    unfolded = 0
    for late in sums:
        if late.shrinks:
            _unfold(graph, late)
            unfolded += 1
        else:
            for factor in dict.fromkeys(late.reads):
                _write_in_place(graph, factor)
            for node in late.chain:
                late.add.prepend(node)
    return unfolded


def _unfold(graph: Graph, late: LateSum) -> None:
    add = late.add
    other = add.args[1] if add.args[0] is late.operand else add.args[0]
    with graph.inserting_before(add):
        emit = Emitter(graph, add)
        result = emit(aten.sub.Tensor, other, emit(aten.neg.default, late.operand))
    add.replace_all_uses_with(result)
    graph.erase_node(add)


def _write_in_place(graph: Graph, factor: Node) -> None:
    """Let Inductor write a value to memory where the graph computes it."""
    if factor.op != "call_function" or is_library_call(factor):
        return  # it is there
    strides = factor.meta["val"].stride()
    if not all(isinstance(s, int) for s in strides):
        return
    with graph.inserting_after(factor):
        pin = Emitter(graph, factor)(prims.inductor_force_stride_order.default, factor, list(strides))
    pin.meta[PINNED] = True
    factor.replace_all_uses_with(pin, delete_user_cb=lambda user: user is not pin)


def _chain(operand: Node) -> tuple[Node, ...]:
    """From a product that nothing else reads to the operand, which is the product or a view of it; else empty."""
    product, chain = view_base(operand), [operand]
    if product.target is not aten.mm.default:
        return ()
    while chain[0] is not product and len(chain[0].users) == 1:
        chain.insert(0, chain[0].all_input_nodes[0])
    alone = chain[0] is product and len(product.users) == 1
    return tuple(chain) if alone else ()

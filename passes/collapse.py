"""Let the activations between a gradient and the next one meet first, so that one tensor is held for them and not one each.

Before (a gated unit)::

    mul: f32 = g * up                                     up, sigmoid and add held, or what they are computed from
    mul_1: f32 = mul * sigmoid
    mul_2: f32 = mul_1 * add

After (the same up to rounding of floating point)::

    mul_3: f32 = up * sigmoid
    mul_4: f32 = mul_3 * add                              mul_4 held
    mul_2: f32 = g * mul_4

So for a derivative that is written out as a sum over several ways: ``g * a + (g * b) * c`` becomes ``g * (a + b * c)``; and
as a choice of one (softplus): ``where(mask, g, (g * b) / c)`` becomes ``g * where(mask, 1, b / c)``. Conversions in between
(in a bfloat16 model every derivative is computed in float32) are left out: ``g`` is converted once, before or after.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.factors import NARROW, is_cheap, is_rounded
from wtacrs_fx.passes.kinds import Kind
from wtacrs_fx.passes.sizes import hint, same_sizes

aten, prims = torch.ops.aten, torch.ops.prims

Expression: TypeAlias = "Node | float | tuple[Any, Expression, Expression]"
"""An activation, a number, or (operation, left, right); a mask as the operation chooses."""


_PRODUCTS: Mapping[Any, Any] = {
    aten.mul.Tensor: aten.mul.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}

_NUMBERS: Mapping[Any, Any] = {
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
}


@dataclass(frozen=True)
class Scaled:
    """A gradient as ``root * coefficient``, elementwise; ``factors`` counts the tensors in the coefficient."""

    root: Node
    coefficient: Expression = 1.0
    factors: int = 0


def collapse(
    graph: Graph,
    kinds: dict[Node, Kind],
    types: Sequence[torch.dtype] = NARROW,
    admitted: Collection[Node] | None = None,
) -> int:
    """Rewrite every gradient that is another one times several large activations, and that is read by something else than
    such a product.

    Args:
        graph: joint graph.
        kinds: of its nodes; kept up to date.
        types: tensors of others are left alone.
        admitted: gradients that may be rewritten, since what they are products with is to be rounded; None: all.

    Returns: how many were rewritten.
    """
    scaled: dict[Node, Scaled] = {}
    for node in graph.nodes:
        if kinds.get(node) is Kind.GRADIENT:
            ours = admitted is None or node in admitted
            scaled[node] = _scaled(node, scaled, kinds, types) if ours else Scaled(node)
    count = 0
    for node, form in scaled.items():
        inside = [u for u in node.users if u in scaled and scaled[u].root is form.root]
        if form.factors < 2 or len(inside) == len(node.users):
            continue
        with graph.inserting_before(node):
            product = _product(Emitter(graph, node), form, node.meta["val"].dtype, kinds)
        node.replace_all_uses_with(product)
        count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _product(emit: Emitter, form: Scaled, dtype: torch.dtype, kinds: dict[Node, Kind]) -> Node:
    """The gradient in its own type: no step in between is of a narrower one than the wider of its ends."""

    def converted(gradient: Node) -> Node:
        return emit(prims.convert_element_type.default, gradient, dtype)

    root = form.root
    wider = torch.promote_types(root.meta["val"].dtype, dtype) != root.meta["val"].dtype
    made = [converted(root)] if wider else []
    made.append(emit(aten.mul.Tensor, made[0] if made else root, _emit(emit, form.coefficient, kinds)))
    if made[-1].meta["val"].dtype != dtype:
        made.append(converted(made[-1]))
    kinds.update(dict.fromkeys(made, Kind.GRADIENT))
    return made[-1]


def _scaled(
    node: Node, scaled: Mapping[Node, Scaled], kinds: Mapping[Node, Kind], types: Sequence[torch.dtype]
) -> Scaled:
    """The node in terms of an earlier gradient of its shape; of itself if it is no such product."""
    itself = Scaled(node)
    if node.op != "call_function" or node.kwargs or not is_rounded(node, types):
        return itself
    shape = node.meta["val"].shape
    gradients = [a for a in node.args if isinstance(a, Node) and kinds[a] is Kind.GRADIENT]
    if not gradients or any(not is_rounded(g, types) or not same_sizes(g.meta["val"].shape, shape) for g in gradients):
        return itself
    first = scaled[gradients[0]]
    if node.target is prims.convert_element_type.default:
        return first
    if any(g.meta["val"].dtype != node.meta["val"].dtype for g in gradients):
        return itself
    if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.where.self) and len(gradients) == 2:
        second = scaled[gradients[1]]
        if first.root is not second.root:
            return itself
        factors = first.factors + second.factors
        if node.target is aten.where.self:  # (of numbers alone the mask is the smaller thing to hold)
            return Scaled(first.root, (node.args[0], first.coefficient, second.coefficient), factors + bool(factors))
        return Scaled(first.root, (node.target, first.coefficient, second.coefficient), factors)
    if node.target is aten.neg.default:
        return Scaled(first.root, (aten.mul.Tensor, first.coefficient, -1.0), first.factors)
    operation = _PRODUCTS.get(node.target)
    if operation is None or len(gradients) != 1 or (operation is aten.div.Tensor and node.args[0] is not gradients[0]):
        return itself
    other: Any = node.args[1] if node.args[0] is gradients[0] else node.args[0]
    if isinstance(other, (int, float)):
        return Scaled(first.root, (operation, first.coefficient, float(other)), first.factors)
    if not is_rounded(other, types) or not same_sizes(other.meta["val"].shape, shape):
        return itself
    if not is_cheap(other, hint(node.meta["val"].numel())):
        return Scaled(first.root, (operation, first.coefficient, other), first.factors + 1)
    return itself


def _emit(emit: Emitter, expression: Expression, kinds: dict[Node, Kind]) -> Any:
    """Operations that compute an expression; numbers are computed right away."""
    if not isinstance(expression, tuple):
        return expression
    operation, left, right = expression
    left, right = _emit(emit, left, kinds), _emit(emit, right, kinds)

    def make(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = emit(target, *args, **kwargs)
        kinds[node] = Kind.ACTIVATION
        return node

    numbers = [x for x in (left, right) if not isinstance(x, Node)]
    if isinstance(operation, Node):
        like = emit.like.meta["val"]
        left, right = (
            x if isinstance(x, Node) else make(aten.full.default, [], x, dtype=like.dtype, device=like.device)
            for x in (left, right)
        )
        return make(aten.where.self, operation, left, right)
    if operation is aten.mul.Tensor and 1.0 in numbers:
        return right if left == 1.0 else left
    if len(numbers) == 2:
        return _NUMBERS[operation](left, right)
    if not isinstance(left, Node):  # (an operation's first argument is a tensor)
        if operation is aten.sub.Tensor:
            return make(aten.add.Tensor, make(aten.neg.default, right), left)
        if operation is aten.div.Tensor:
            return make(aten.mul.Tensor, make(aten.reciprocal.default, right), left)
        left, right = right, left
    return make(operation, left, right)

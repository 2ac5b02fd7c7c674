"""Find the gradient side of a joint graph that somebody else traced, where no placeholder is called a tangent.

``make_fx`` over a forward and ``torch.autograd.grad`` (or ``torch.func.grad``) leaves one graph, in which the backward begins
with ``ones_like(loss)`` and ends in outputs that are gradients of inputs or attributes, in an order of the user's.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.kinds import Kind, ancestors, is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.products import behind_transposes
from wtacrs_fx.passes.sites import CONTRACTIONS
from wtacrs_fx.private import tree_leaves

aten = torch.ops.aten


def find_tangents(graph: Graph) -> list[Node]:
    """Nodes with which the backward begins: ``ones_like`` of a value with one element, the implicit gradient of a loss.

    One that another of them depends on is left out: it belongs to the forward of that one, as such a constant in a model
    does, or an inner gradient (a gradient penalty), which a loss need not be linear in.
    """
    ones = [*graph.find_nodes(op="call_function", target=aten.ones_like.default)]
    ones += [n for n in graph.find_nodes(op="call_function", target=aten.full_like.default) if n.args[1] == 1]
    found = [n for n in ones if is_tensor(n) and n.meta["val"].numel() == 1]
    inner = {n for one in found for n in ancestors([one])}
    return [n for n in found if n not in inner]


def match_gradients(graph: Graph, kinds: Mapping[Node, Kind]) -> dict[Node, Node]:
    """Output of the gradient kind -> the placeholder or attribute whose gradient it is.

    The gradient ``G^T H`` of a weight is known by H, which the forward multiplies by that weight; where there are several
    losses, so are all of its gradients. The others (biases, norms) go by shape and type, in order. An input of equal shape
    may be taken for a parameter, and products with it stay exact.

    Args: kinds, with every placeholder an activation.
    """
    outputs = [v for v in tree_leaves(graph.output_node().args) if isinstance(v, Node)]
    gradients = [v for v in dict.fromkeys(outputs) if kinds[v] is Kind.GRADIENT and is_tensor(v)]
    inputs = [
        n for n in graph.nodes if n.op in ("placeholder", "get_attr") and is_tensor(n) and kinds[n] is not Kind.GRADIENT
    ]
    left = dict.fromkeys(inputs)
    found: dict[Node, Node] = {}
    for choose in (lambda g: _factors(g, kinds), lambda g: [*left]):
        for gradient in gradients:
            same = [n for n in choose(gradient) if n in inputs and _form(n) == _form(gradient)]
            if gradient not in found and same:
                found[gradient] = next((n for n in same if n in left), same[0])
                left.pop(found[gradient], None)
    return found


def handed_over(graph: Graph, kinds: Mapping[Node, Kind]) -> list[Node]:
    """What the forward makes or is given and the backward reads: tensors that are in memory between the two. Attributes of
    the module are not among them."""
    forward = [n for n in graph.nodes if n.op != "output" and kinds[n] is not Kind.GRADIENT and is_tensor(n)]
    read = [n for n in forward if any(u.op != "output" and kinds[u] is Kind.GRADIENT for u in n.users)]
    return [n for n in read if view_base(n).op != "get_attr"]


def _form(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape), node.meta["val"].dtype


def _factors(gradient: Node, kinds: Mapping[Node, Kind]) -> Sequence[Node]:
    """What the forward multiplies the activation of a weight gradient by, in order."""
    product = view_base(gradient)
    if product.target not in CONTRACTIONS:
        return []
    sources = {view_base(n) for n in product.all_input_nodes if kinds[n] is not Kind.GRADIENT}
    found = [(s, behind_transposes(o)) for s in sources for p in _forward_products(s, kinds) for o in p.all_input_nodes]
    return [other for source, other in found if other is not source]


def _forward_products(source: Node, kinds: Mapping[Node, Kind]) -> Collection[Node]:
    """Products of the forward that read a tensor or a view of it, in order of the graph's edges."""
    found: dict[Node, None] = {}
    stack = [source]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or kinds[user] is Kind.GRADIENT:
                continue
            if user.target in CONTRACTIONS:
                found[user] = None
            elif view_base(user) is view_base(source):
                stack.append(user)
    return found

"""Let the activations of a chain of products meet first, so that one tensor is held for them and not one each.

Before::

    mul: f32 = g * up                                     up, silu'(gate) held
    mul_1: f32 = mul * silu_grad

After (the same up to rounding of floating point)::

    both: f32 = up * silu_grad                            both held
    mul_1: f32 = g * both
"""

from collections.abc import Mapping

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.factors import is_cheap, is_rounded
from wtacrs_fx.passes.kinds import Kind

aten = torch.ops.aten


def reassociate(graph: Graph, kinds: dict[Node, Kind]) -> int:
    """Rewrite ``(g * a) * b`` where nothing else reads ``g * a``, and neither a nor b comes from a mask or from something
    smaller. Returns how many; ``kinds`` is kept up to date."""
    count = 0
    for outer in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        inner, b = _split(outer, kinds)
        if inner is None or inner.target is not aten.mul.Tensor or len(inner.users) != 1:
            continue
        g, a = _split(inner, kinds)
        if g is None or a is None or b is None or not (_is_large(a, outer) and _is_large(b, outer)):
            continue
        with graph.inserting_before(outer):
            both = Emitter(graph, outer)(aten.mul.Tensor, a, b)
        kinds[both] = Kind.ACTIVATION
        outer.args = (g, both)
        graph.erase_node(inner)
        count += 1
    return count


def _split(node: Node, kinds: Mapping[Node, Kind]) -> tuple[Node | None, Node | None]:
    """(gradient, activation) of a product of the two."""
    nodes = [a for a in node.args if isinstance(a, Node)]
    found = {kinds[n]: n for n in nodes}
    if len(nodes) != 2 or kinds.get(node) is not Kind.GRADIENT:
        return None, None
    return found.get(Kind.GRADIENT), found.get(Kind.ACTIVATION)


def _is_large(node: Node, product: Node) -> bool:
    return is_rounded(node) and not is_cheap(node, product.meta["val"].numel())

"""In-place operations of forward graphs, which are not functionalised: when do two nodes hold the same numbers?"""

import operator
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from wtacrs_fx.passes.policy import is_view
from wtacrs_fx.private import OpOverload

_IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_IN_PLACE |= {operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.setitem}
_REPEATABLE = {
    *("view", "reshape", "flatten", "transpose", "t", "permute", "contiguous", "squeeze", "unsqueeze", "size", "dim"),
    *(getattr, operator.getitem, operator.mul, operator.floordiv, operator.add, operator.sub),
}
"""Methods and functions that give the same numbers whenever they are called on the same numbers, so that a second call is
the same tensor: what stands between an input and the linear layers that share it."""


def mutates(node: Node, gm: GraphModule) -> bool:
    """Whether running the node may change a tensor in place. Modules from outside of torch may do anything."""
    if "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        inside = type(module).__module__.startswith(("torch.nn.", "transformers.pytorch_utils"))
        return bool(getattr(module, "inplace", False)) or not inside
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def count_mutations(gm: GraphModule) -> dict[Node, int]:
    """For every node: how many nodes before it may change something in place."""
    result, count = {}, 0
    for node in gm.graph.nodes:
        result[node] = count
        count += node.op.startswith("call") and mutates(node, gm)
    return result


def value_key(node: Node, mutations: Mapping[Node, int]) -> Any:
    """Equal for nodes that hold the same numbers: the same node, or the same views of it taken at one state of memory.

    Args: mutations, from :func:`count_mutations`.
    """
    repeatable = node.target in _REPEATABLE or (isinstance(node.target, OpOverload) and is_view(node))
    if not (node.op in ("call_method", "call_function") and repeatable):
        return node
    sources = node.all_input_nodes
    arguments = map_arg((node.args, node.kwargs), lambda n: f"source {sources.index(n)}")
    return (node.target, mutations[node], repr(arguments), *(value_key(n, mutations) for n in sources))

"""Find the sites: products ``G^T H`` of a gradient and an activation in a joint graph, above all weight gradients.

Before and after functionalisation every way of writing a linear layer (``nn.Linear``, ``Conv1D``, ``matmul``, ``@``,
``einsum``, adapters) leaves the same thing in the backward: a two-dimensional product of a gradient and an activation,
contracted over tokens, whose result goes to a parameter's gradient and meets no other activation on its way.

The products of attention are sites too if the user wants them: with S = Q K^T, P = softmax(S), O = P V they are
``grad_Q = grad_S K`` (contracted over keys), ``grad_K = grad_S^T Q`` and ``grad_V = P^T grad_O`` (over queries), and
``grad_P = grad_O V^T`` (over the features of a head). Their results flow on, so that noise in them reaches earlier layers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.kinds import Kind

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default)
CONTRACTIONS = (*PRODUCTS, aten.addmm.default, aten.baddbmm.default, aten.convolution_backward.default)
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int, aten.numpy_T.default)


@dataclass(frozen=True)
class Operand:
    """A factor of a product: the tensor behind its transposes, and the dimension that holds the rows (tokens)."""

    source: Node
    dim: int

    @property
    def value(self) -> torch.Tensor:
        return self.source.meta["val"]

    @property
    def rows(self) -> "int | torch.SymInt":
        return self.value.shape[self.dim]

    @property
    def batched(self) -> bool:
        """Whether the source is a matrix per attention head; a leading dimension of 1 (einsum writes those) is none."""
        batch = self.value.shape[0] if self.value.dim() == 3 else 1
        return not (isinstance(batch, int) and batch == 1)

    @property
    def width(self) -> "int | torch.SymInt":
        """Features per row. The source is [M, D], [D, M], or one of these with a leading dimension."""
        return self.value.shape[-2 if self.dim % self.value.dim() == self.value.dim() - 1 else -1]


@dataclass(frozen=True)
class Site:
    """``node`` computes ``G^T H`` or ``H^T G`` (``activation`` is H [M, D], ``gradient`` is G [M, O]), or does so for every
    attention head (then both have a leading dimension)."""

    node: Node
    activation: Operand
    gradient: Operand
    activation_first: bool
    module: str
    is_attention: bool = False
    """Whether the result flows on to earlier layers, and is no parameter's gradient."""


def find_sites(
    graph: Graph,
    kinds: Mapping[Node, Kind],
    grads: Mapping[Node, Node],
    names: Mapping[Node, str],
    attention: bool = False,
) -> list[Site]:
    """All weight-gradient products, in graph order; with ``attention`` batched products of two activations too.

    Args:
        graph: joint graph, with ``meta["val"]`` on its nodes.
        kinds: from :func:`wtacrs_fx.passes.kinds.classify`.
        grads: gradient output node -> the parameter placeholder it belongs to.
        names: parameter placeholder -> name such as ``encoder.0.query.weight``, where known.
    """
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        first, second = node.args
        pair = {kinds[first], kinds[second]}
        if pair != {Kind.ACTIVATION, Kind.GRADIENT} or not node.meta["val"].dtype.is_floating_point:
            continue
        activation_first = kinds[first] is Kind.ACTIVATION
        left, right = _operand(first, -1), _operand(second, -2)
        activation, gradient = (left, right) if activation_first else (right, left)
        parameter = _parameter_of(node, kinds, grads)
        is_attention = attention and parameter is None and node.target is aten.bmm.default
        if is_attention or (parameter is not None and not activation.batched):
            module = site_name(node, "" if parameter is None else names.get(parameter, ""))
            found.append(Site(node, activation, gradient, activation_first, module, is_attention))
    return found


def fused_attention(graph: Graph, kinds: Mapping[Node, Kind]) -> list[Node]:
    """Backward ops of fused attention: the products are inside of one kernel, which recomputes P and keeps Q, K and V."""
    return [n for n in graph.nodes if kinds.get(n) is Kind.GRADIENT and "scaled_dot_product" in str(n.target)]


def _operand(node: Node, dim: int) -> Operand:
    """Strip transposes of the last two dimensions; ``dim`` (-1 or -2) is the contracted one."""
    while node.target in TRANSPOSES and isinstance(source := node.args[0], Node):
        order = _permutation(node)
        rank = len(order)
        if order == list(range(rank)):
            node = source
        elif order == [*range(rank - 2), rank - 1, rank - 2]:
            node, dim = source, -3 - dim
        else:
            break
    return Operand(node, node.meta["val"].dim() + dim)


def _permutation(node: Node) -> list[int]:
    rank = node.meta["val"].dim()
    order = list(range(rank))
    args: Any = node.args
    if node.target is aten.permute.default:
        return [d % rank for d in args[1]]
    if node.target is aten.transpose.int:
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = order[b], order[a]
        return order
    return order[::-1]


def _parameter_of(node: Node, kinds: Mapping[Node, Kind], grads: Mapping[Node, Node]) -> Node | None:
    """The parameter whose gradient the product is, or None.

    Everything computed from a weight gradient meets weights and other gradients only, and ends in gradients of
    parameters: noise put there stays there. Anything else is a gradient that flows on through the model.
    """
    parameter = None
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current in grads:
            parameter = grads[current]
        for user in current.users:
            if user.op == "output":
                if current not in grads:
                    return None
            elif user not in seen:
                if any(kinds[n] is Kind.ACTIVATION for n in user.all_input_nodes):
                    return None
                seen.add(user)
                stack.append(user)
    return parameter


def site_name(node: Node, parameter: str) -> str:
    """Module name of a site: where the product was written, or the parameter itself if that is not a ``weight``."""
    module = module_of(node)
    owner, _, member = parameter.rpartition(".")
    if module and (member == "weight" or owner != module):
        return module
    return owner if member == "weight" and owner else parameter or module or node.name


def module_of(node: Node) -> str:
    """Path of the module whose forward made the node, or whose backward it belongs to; empty if unknown."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
    return clean_module_path(next(reversed(stack.values()))[0]) if stack else ""


def clean_module_path(path: str) -> str:
    """``L['self'].encoder.layer.0`` -> ``encoder.layer.0``; a bare root becomes the empty string. Where a module has a
    ``__getattr__`` of its own (those of peft), Dynamo writes ``.__dict__['_modules']['encoder']``, and in
    ``torch.func.functional_call`` ``getattr(L['self'].layer, '0')``."""
    while call := re.search(r"getattr\(([^(),]+), '([^']*)'\)", path):  # (the innermost; they nest)
        path = path.replace(call[0], f"{call[1]}.{call[2]}")
    path = re.sub(r"^[LG](\[[^\]]*\])+", "", path)
    path = path.replace(".__dict__['_modules']", "")
    return path.replace("._modules", "").replace("['", ".").replace("']", "").lstrip(".")


def gradient_outputs(graph: Graph, num_fwd_outputs: int, weights: Sequence[Node]) -> dict[Node, Node]:
    """Gradient output node -> parameter placeholder. AOTAutograd returns one gradient per primal, in order, after the
    forward's outputs."""
    return {
        g: p
        for p, g in zip(primals(graph), graph_outputs(graph)[num_fwd_outputs:])
        if isinstance(g, Node) and p in weights
    }


def graph_outputs(graph: Graph) -> list[Any]:
    """What the graph returns: nodes and None."""
    values: Any = graph.output_node().args[0]
    return list(values)


def primals(graph: Graph) -> list[Node]:
    """The placeholders that are inputs of the forward, in order."""
    other = ("tangents", "fwd_seed", "fwd_base", "bwd_seed", "bwd_base")
    return [n for n in graph.find_nodes(op="placeholder") if not any(tag in str(n.target) for tag in other)]

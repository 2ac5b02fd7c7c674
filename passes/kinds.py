"""Classify every value of a joint forward-backward graph: weight, activation or gradient."""

from collections.abc import Callable, Collection, Iterable
from enum import IntEnum

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from wtacrs_fx.private import OpOverload, inductor_prims  # noqa: F401  (registers torch.ops.prims.inductor_random and its seeds)

PINNED = "wtacrs_pinned"
"""Key in ``meta`` of a node that asks for the strides that a tensor has, and so returns that tensor."""


class Kind(IntEnum):
    """What a value depends on. A node has the largest kind among its inputs."""

    WEIGHT = 0
    """Parameters, buffers and constants only."""
    ACTIVATION = 1
    """The batch or random numbers, but no tangent."""
    GRADIENT = 2
    """A tangent: the value is linear in the gradients that enter the backward."""


def is_tangent(node: Node) -> bool:
    """Whether the node is a placeholder for a gradient of a forward output (AOTAutograd's naming)."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def classify(graph: Graph, weights: Collection[Node], tangents: Collection[Node] = ()) -> dict[Node, Kind]:
    """Kind of every node except the output.

    Args:
        graph: joint graph; placeholders whose target contains "tangents" are gradients.
        weights: the placeholders that are parameters or buffers. Every other placeholder is an activation.
        tangents: more nodes with which the backward begins, where they have other names.
    """
    kinds: dict[Node, Kind] = {}
    for node in graph.nodes:
        if node in tangents:
            kinds[node] = Kind.GRADIENT
        elif node.op == "placeholder":
            kinds[node] = Kind.GRADIENT if is_tangent(node) else Kind.WEIGHT if node in weights else Kind.ACTIVATION
        elif node.op != "output":
            own = Kind.ACTIVATION if draws(node) else Kind.WEIGHT
            kinds[node] = max((kinds[n] for n in node.all_input_nodes), default=own)
    return kinds


def is_tensor(node: Node) -> bool:
    """Whether the node's value is one tensor (not several, a size or a number)."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def draws(node: Node) -> bool:
    """Whether running the node twice gives two results. Fused attention without dropout bears the tag and draws nothing."""
    if node.target is torch.ops.prims.inductor_seeds.default:
        return True
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if "scaled_dot_product" not in node.target.name():
        return True
    names = [a.name for a in node.target._schema.arguments]
    values = {**dict(zip(names, node.args)), **node.kwargs}
    return bool(values.get("dropout_p", 0.0))


def is_drawn_mask(node: Node) -> bool:
    """Whether the node compares numbers that were drawn on the spot: the mask is smaller to keep than they are."""
    if getattr(node.meta.get("val"), "dtype", None) is not torch.bool:
        return False
    return any(draws(n) and is_tensor(n) and n.meta["val"].is_floating_point() for n in node.all_input_nodes)


def runs_once(node: Node) -> bool:
    """Whether the node is marked as one that nothing may run a second time (torch's mark, which its partitioner heeds)."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE


def ancestors(nodes: Iterable[Node], through: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """All that the nodes depend on, followed as far as ``through`` is true of it."""
    stack, found = [source for node in nodes for source in node.all_input_nodes], set[Node]()
    while stack:
        if (node := stack.pop()) not in found and through(node):
            found.add(node)
            stack += node.all_input_nodes
    return found

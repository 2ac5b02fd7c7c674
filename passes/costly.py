"""Act: compute costly values again in every kernel that reads them, where tensors are rounded from them.

On CPU Inductor writes an exponential, a sigmoid or a hyperbolic tangent to memory where it, or what is computed from it, has
several readers. The codes of a rounded tensor are three readers at once: two for the range of a group and one for the codes. So
the softmax behind a loss would be in memory beside the logits, in float32; and the sigmoid of a gated unit beside both of its
matrix products: at the peak of the forward, and as large as what is rounded to save memory. (A plan of Llama-like layers in
bfloat16 at 4 bits: peak 0.49 of Inductor's without this pass and 0.39 with it.)

Before::

    e = exp(x); total = sum(e); low = amin(e); high = amax(e); codes = (e - low) / (high - low) * 15 + u

After (in two kernels, and none of the exponentials in memory)::

    total = sum(exp(x)); low = amin(exp(x)); high = amax(exp(x)); codes = (exp(x) - low) / (high - low) * 15 + u
"""

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.kernels import COSTLY, Facts, find_kernels
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import graph_outputs

LARGEST = 64
"""Operations that a reader has of its own at most; beyond that the value is left to be written."""


def spread_costly(graph: Graph) -> int:
    """Give every kernel that reads a costly value its own copy of it and of what lies between, if codes are made from the
    value. What it is computed from takes no more bytes. Returns how many readers were changed.

    Args:
        graph: a partitioned forward whose kernels will run in the order of the graph.
    """
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    facts = Facts()
    returned = {view_base(v) for v in graph_outputs(graph) if isinstance(v, Node)}
    pinned = returned | {facts.base(a) for n in nodes if facts.library(n) for a in n.all_input_nodes}
    made = {k.node for k in find_kernels(nodes, (), returned, facts.nothing_costly())}
    written = {n for n in made if n in pinned or n.target not in COSTLY} | pinned
    codes = [n for n in returned if n.op == "call_function" and is_tensor(n) and n.meta["val"].dtype is torch.uint8]
    light = {n for n in _above(codes, written) if n.target in COSTLY and _is_no_smaller(n, written, facts)}
    readers = []
    for node in nodes:
        if any(a in light for a in node.all_input_nodes):
            if node in written:
                readers.append(node)
            else:
                light.add(node)
    changed = sum(_copy_inputs(graph, reader, light) for reader in readers)
    graph.eliminate_dead_code()
    return changed


def _above(nodes: Collection[Node], written: Collection[Node]) -> set[Node]:
    """What the nodes are computed from without a step in memory."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        above = {a for a in stack.pop().all_input_nodes if a.op == "call_function" and a not in written} - found
        found |= above
        stack += above
    return found


def _is_no_smaller(node: Node, written: Collection[Node], facts: Facts) -> bool:
    """Whether a value on CPU takes at least the bytes that it is computed from. (A maximum per row is a little more.)"""
    inside = _above([node], written)
    given = {facts.base(a) for n in (node, *inside) for a in n.all_input_nodes if a not in inside}
    on_cpu = node.meta["val"].device.type == "cpu"
    return on_cpu and sum(map(facts.bytes, given)) <= 1.1 * facts.bytes(node)


def _copy_inputs(graph: Graph, reader: Node, light: Collection[Node]) -> bool:
    """A copy for every use, since Inductor counts uses; False if that would be too many operations."""

    def size(node: Node) -> int:
        return 1 + sum(size(a) for a in node.all_input_nodes if a in light)

    def copy(node: Node) -> Node:
        return graph.node_copy(node, copy) if node in light else node

    if sum(size(a) for a in reader.all_input_nodes if a in light) > LARGEST:
        return False
    with graph.inserting_before(reader):
        for node in reader.all_input_nodes:
            if node in light:
                reader.replace_input_with(node, copy(node))
    return True

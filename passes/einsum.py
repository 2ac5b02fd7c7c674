"""``einsum`` of a linear layer becomes a matrix product, as ``make_fx`` writes it, so that the standalone pass sees a site.

Before, in a graph from ``symbolic_trace`` (``torch.export`` writes ``aten.einsum``)::

    einsum = torch.einsum("btd,dhe->bthe", x, w)

After::

    einsum_1 = torch.einsum("dhe->dhe", w)
    reshape = einsum_1.reshape(d, h * e)
    matmul = torch.matmul(x, reshape)
    unflatten = matmul.unflatten(-1, (h, e))

Only labels of the weight are reshaped, whose sizes are known; operands are permuted by an ``einsum`` of their own, which is a
view, and only where their labels need it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.kinds import Kind
from wtacrs_fx.passes.policy import excluded
from wtacrs_fx.passes.products import behind_transposes, tensor_of, unusual
from wtacrs_fx.passes.sites import site_name

aten = torch.ops.aten


@dataclass(frozen=True)
class _Linear:
    """``node`` sums an activation and a weight over the labels ``summed``: all that they share."""

    node: Node
    x: Node
    weight: Node
    x_labels: str
    weight_labels: str
    summed: str
    rows: str
    """Labels of the activation alone, with the ellipsis."""
    features: str
    """Labels of the weight alone."""
    output: str


def split_einsums(gm: GraphModule, kinds: Mapping[Node, Kind], config: Config) -> int:
    """Rewrite every einsum of an activation and a weight that trains and that the options admit. Others stay: those of two
    activations, with a label of both operands in the result (a batch of weights), with repeated labels, and in sublist form.

    Args: kinds, from :func:`wtacrs_fx.passes.kinds.classify`.

    Returns: how many were rewritten.
    """
    found = [_as_linear(n, gm, kinds) for n in gm.graph.nodes if n.target in (torch.einsum, aten.einsum.default)]
    chosen = [one for one in found if one is not None and not _why_exact(one, gm, config)]
    for one in chosen:
        _split(gm, one)
    return len(chosen)


def _as_linear(node: Node, gm: GraphModule, kinds: Mapping[Node, Kind]) -> _Linear | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = [*operands[0]]
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(n, Node) for n in operands):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    pairs = [(n, text) for n, text in zip(operands, labels) if isinstance(n, Node)]
    pairs.sort(key=lambda pair: kinds[pair[0]])
    (weight, weight_labels), (x, x_labels) = pairs
    if not arrow or (kinds[weight], kinds[x]) != (Kind.WEIGHT, Kind.ACTIVATION) or "." in weight_labels:
        return None
    value = tensor_of(gm, weight)
    plain = all(len(set(s)) == len(s) for s in (weight_labels, x_labels.replace("...", ""), output.replace("...", "")))
    summed = "".join(c for c in weight_labels if c in x_labels and c not in output)
    features = "".join(c for c in weight_labels if c not in summed)
    rows = "".join(c for c in x_labels if c not in summed)
    if not plain or value is None or len(value.shape) != len(weight_labels) or not summed:
        return None
    if {*features} & {*x_labels} or sorted(rows + features) != sorted(output):
        return None  # a batch of weights, or a label summed on one side only
    return _Linear(node, x, weight, x_labels, weight_labels, summed, rows, features, output)


def _why_exact(one: _Linear, gm: GraphModule, config: Config) -> str:
    root = behind_transposes(one.weight)
    known = root.op in ("get_attr", "placeholder")
    name = site_name(one.node, str(root.target) if known else "")
    return (unusual(tensor_of(gm, root)) if root.op == "get_attr" else "") or excluded(name, config)


def _split(gm: GraphModule, one: _Linear) -> None:
    graph, node = gm.graph, one.node
    weight_value = tensor_of(gm, one.weight)
    assert isinstance(weight_value, Tensor)
    size = dict(zip(one.weight_labels, weight_value.shape))
    before = set(graph.nodes)

    def permuted(source: Node, labels: str, to: str) -> Node:
        return source if labels == to else graph.call_function(torch.einsum, (f"{labels}->{to}", source))

    with graph.inserting_before(node):
        x = permuted(one.x, one.x_labels, one.rows + one.summed)
        if len(one.summed) > 1:
            x = graph.call_method("flatten", (x, -len(one.summed)))
        weight = permuted(one.weight, one.weight_labels, one.summed + one.features)
        if len(one.weight_labels) != 2 or len(one.features) != 1:
            shape = [math.prod(size[c] for c in part) for part in (one.summed, one.features)]
            weight = graph.call_method("reshape", (weight, shape))
        result = graph.call_function(torch.matmul, (x, weight))
        if len(one.features) != 1:
            sizes = [size[c] for c in one.features]
            method, args = ("unflatten", (result, -1, sizes)) if sizes else ("squeeze", (result, -1))
            result = graph.call_method(method, args)
        result = permuted(result, one.rows + one.features, one.output)
    for new in graph.nodes:
        if new not in before:
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    if "val" in node.meta:
        result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)

"""Look at graphs: every node with its kind, site, decision and bytes."""

import sys
from typing import Any, TextIO

from tabulate import tabulate
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.ledger import format_bytes
from wtacrs_fx.passes.kinds import Kind, classify, is_tangent
from wtacrs_fx.passes.policy import is_view
from wtacrs_fx.passes.products import linear_weights
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.passes.tangents import find_tangents, match_gradients
from wtacrs_fx.passes.watch import op_name


def print_graph(gm: GraphModule, file: TextIO | None = None) -> None:
    """Print a table of a graph's nodes.

    For every node its shape, dtype and bytes (of memory of its own: a view has none; "?" where the tracer left no shape),
    its kind (weight, activation or gradient), and at products that :func:`wtacrs_fx.rewrite` or
    :func:`wtacrs_fx.rewrite_joint` has decided about, the site's name, the decision and the reason.

    Args:
        gm: a forward or joint graph, before or after a rewrite.
        file: where to; standard output by default.

    Raises: TypeError if ``gm`` has no graph.
    """
    if not isinstance(getattr(gm, "graph", None), Graph):
        raise TypeError(f"print_graph() takes a torch.fx.GraphModule, not {type(gm).__name__}.")
    print(format_graph(gm), file=file or sys.stdout)


def format_graph(gm: GraphModule) -> str:
    """The table of :func:`print_graph` as text."""
    kinds = _kinds(gm)
    rows = [_row(node, kinds[node]) for node in gm.graph.nodes if node.op != "output"]
    headers = ("node", "op", "shape", "dtype", "bytes", "kind", "site", "decision")
    return tabulate(rows, headers, disable_numparse=True)


def _kinds(gm: GraphModule) -> dict[Node, Kind]:
    graph = gm.graph
    tangents = [n for n in graph.nodes if is_tangent(n)] + find_tangents(graph)
    if not tangents:
        return classify(graph, linear_weights(gm))
    return classify(graph, list(match_gradients(graph, classify(graph, (), tangents)).values()), tangents)


def _row(node: Node, kind: Kind) -> tuple[Any, ...]:
    value, decision = node.meta.get("val"), node.meta.get("wtacrs", {})
    shape = dtype = size = "?" if value is None else ""
    if isinstance(value, Tensor):
        shape, dtype = "x".join(map(str, value.shape)), str(value.dtype).removeprefix("torch.")
        size = "view" if is_view(node) else format_bytes(hint(value.numel()) * value.element_size())
    why = f" ({decision['reason']})" if decision.get("reason") else ""
    return (
        node.name,
        op_name(node),
        shape,
        dtype,
        size,
        kind.name.lower(),
        decision.get("site", ""),
        decision.get("decision", "") + why,
    )

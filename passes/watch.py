"""See what passes do: the structural difference of a graph before and after, as ``verbose=2`` prints it."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

from torch.fx import Graph, Node

from wtacrs_fx.private import OpOverload


def structural_diff(before: Counter[str], after: Counter[str]) -> str:
    """Nodes per op where their number has changed: ``aten.mm.default 12 -> 4``; empty if none has."""
    changed = [op for op in sorted(before | after) if before[op] != after[op]]
    lines = [f"  {op} {before[op]} -> {after[op]}" for op in changed]
    return "\n".join([f"nodes {before.total()} -> {after.total()}", *lines]) if lines else ""


def count_ops(graph: Graph) -> Counter[str]:
    """How many nodes a graph has of every op."""
    return Counter(op_name(n) for n in graph.nodes)


@contextlib.contextmanager
def watch(name: str, graph: Graph, verbose: bool | int) -> Iterator[None]:
    """Run a pass inside; with ``verbose=2`` say what it did to the graph, on standard error."""
    if isinstance(verbose, bool) or verbose < 2:
        yield
        return
    before = count_ops(graph)
    yield
    print(f"wtacrs pass {name}: {structural_diff(before, count_ops(graph)) or 'nothing changed'}", file=sys.stderr)


def op_name(node: Node) -> str:
    """What a node calls, or what it is."""
    if node.op in ("placeholder", "output", "get_attr", "call_module"):
        return node.op
    return (
        str(node.target)
        if isinstance(node.target, OpOverload | str)
        else getattr(node.target, "__name__", str(node.target))
    )

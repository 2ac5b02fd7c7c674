"""Find segments of the forward: stretches between the places where least is handed on.

In a transformer these places are the residual stream after each attention and each feed-forward part, whatever the code
calls them: nothing is read from module names but the segment's own name.
"""

import itertools
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import flops, nbytes
from wtacrs_fx.passes.kinds import Kind, classify, is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.sites import clean_module_path, graph_outputs

MAX_WIDTH = 2.0
"""A boundary hands on at most this many times the bytes of the median boundary."""


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of the forward."""

    name: str
    nodes: tuple[Node, ...]
    handed_on: Mapping[Node, int]
    """Tensors (view bases) made in this segment that later ones read, and the number of the last one that does."""


def forward_nodes(graph: Graph, num_fwd_outputs: int) -> list[Node]:
    """The calls that the forward outputs depend on, in graph order."""
    needed: set[Node] = set()
    stack = [v for v in graph_outputs(graph)[:num_fwd_outputs] if isinstance(v, Node)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in graph.nodes if n in needed and n.op == "call_function"]


def find_segments(graph: Graph, num_fwd_outputs: int, weights: Collection[Node] = ()) -> list[Segment]:
    """Cut the forward where least is handed on.

    Bytes handed on are counted after every node: distinct storages made before it (placeholders left out) and read by the
    forward behind it. Between two matrix products the first place with the fewest bytes stands for the stretch; of these,
    the local minima are the boundaries. A forward without such places is one segment. Functions of ``weights`` and constants
    count nothing.

    Returns: the segments in order; together they hold every node of the forward once.
    """
    nodes = forward_nodes(graph, num_fwd_outputs)
    if not nodes:
        return []
    position = {n: i for i, n in enumerate(nodes)}
    last_read = _last_reads(nodes, position)
    kinds = classify(graph, weights)
    last_read = {n: i for n, i in last_read.items() if kinds[n] is not Kind.WEIGHT}
    widths = _widths(nodes, last_read, [n for n in graph.find_nodes(op="placeholder") if weights and n not in weights])
    places = _narrow_places(widths, _stretches(nodes))
    stops = [*places, len(nodes) - 1]
    segments, start = [], 0
    for stop in stops:
        part = tuple(nodes[start : stop + 1])
        bases = [b for b in map(view_base, part) if last_read.get(b, -1) > stop and is_tensor(b)]
        segments.append(Segment(_name(part), part, {b: bisect_left(stops, last_read[b]) for b in bases}))
        start = stop + 1
    return segments


def merge(segments: Sequence[Segment], size: int) -> list[Segment]:
    """``size`` neighbours at a time as one segment; what is handed on inside is handed on no longer."""
    if size == 1:
        return list(segments)
    number = {i: i // size for i in range(len(segments))}
    merged = []
    for group in range(number[len(segments) - 1] + 1):
        parts = segments[group * size : (group + 1) * size]
        names = list(dict.fromkeys(s.name for s in parts))
        handed_on = {b: number[last] for s in parts for b, last in s.handed_on.items() if number[last] > group}
        name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        merged.append(Segment(name, tuple(n for s in parts for n in s.nodes), handed_on))
    return merged


def _last_reads(nodes: Sequence[Node], position: dict[Node, int]) -> dict[Node, int]:
    """View base -> position of the last node of the forward that reads it or a view of it."""
    return {view_base(source): position[node] for node in nodes for source in node.all_input_nodes}


def _widths(nodes: Sequence[Node], last_read: dict[Node, int], batch: Sequence[Node]) -> list[int]:
    """Bytes handed on after each node."""
    change = [0] * (len(nodes) + 1)
    made = [*((0, n) for n in batch), *((i, n) for i, n in enumerate(nodes) if view_base(n) is n)]
    for i, node in made:
        if last_read.get(node, i) > i:
            change[i] += nbytes(node)  # of a node with several results all, until each has been taken
            change[last_read[node]] -= nbytes(node)
    return list(itertools.accumulate(change[:-1]))


def _stretches(nodes: Sequence[Node]) -> list[range]:
    """Positions from one node with FLOPs up to the next."""
    starts = [i for i, n in enumerate(nodes) if flops(n)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(nodes)])]


def _narrow_places(widths: Sequence[int], stretches: Sequence[range]) -> list[int]:
    """First narrowest position of every stretch that is a local minimum, the last stretch left out."""
    best = [min(s, key=lambda i: widths[i]) for s in stretches[:-1]]
    runs: list[list[int]] = []  # neighbours of equal width
    for i in best:
        if runs and widths[runs[-1][0]] == widths[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    level = [widths[r[0]] for r in runs]
    minima = [
        i
        for j, run in enumerate(runs)
        if (j == 0 or level[j - 1] > level[j]) and (j == len(runs) - 1 or level[j + 1] > level[j])
        for i in run
    ]
    if not minima:
        return []
    limit = MAX_WIDTH * median(widths[i] for i in minima)
    return [i for i in minima if widths[i] <= limit]


def _name(nodes: Sequence[Node]) -> str:
    """Longest common module path of the nodes with FLOPs (of all nodes if none has any)."""
    paths = []
    for node in [n for n in nodes if flops(n)] or nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths.append(clean_module_path(next(reversed(stack.values()))[0]).split("."))
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return ".".join(parts[0] for parts in common)

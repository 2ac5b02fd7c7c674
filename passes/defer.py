"""Act: make the codes of a tensor where it is computed anyway, and compute an exponential once.

A gated unit, ``silu(gate) * up``, is computed when both products are there. Codes of ``silu(gate)`` that are made behind the
first product take a kernel more, which reads ``gate`` and computes the exponential, twice as every rounding does. Behind the
second one they share both with the unit itself and with the codes of its derivative.

Before::

    gate = mm(...); t = silu(gate); codes = t - amin(t) ...; up = mm(...); unit = t * up; more = up * sigmoid(gate) ...

After (``codes``, ``unit`` and ``more`` in one kernel)::

    gate = mm(...); t = silu(gate); up = mm(...); codes = t - amin(t) ...; unit = t * up; more = up * (1 / (1 + exp(-gate))) ...
"""

import bisect
from collections.abc import Collection, Iterable

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.kernels import Facts, find_kernels
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.round import CODES, ROUNDED
from wtacrs_fx.passes.sites import graph_outputs

aten = torch.ops.aten

NUMBERS = torch.ops.wtacrs.short_uniform.default


def defer_codes(graph: Graph, together: bool = False) -> int:
    """Move the codes of every tensor that is in no memory of its own in front of the tensor's next reader, where a library call
    lies in between. Nothing is in memory for longer: that reader is computed from what the tensor is computed from. Random
    numbers are calls too, and keep Inductor from fusing what is before and behind them: where codes have moved, those of such
    tensors are drawn right behind the library call before.

    Args:
        graph: a partitioned forward whose kernels will run in the order of the graph.
        together: where codes have moved, make also those of tensors in memory in the same kernel. (In one of their own they
            need less memory, and read the tensor twice: in a Llama-like model at 4 bits 5 % of a step.)

    Returns: of how many tensors.
    """
    rounded, moves = _decide(graph)
    for r, reader in moves:
        for node in r.nodes:
            reader.prepend(node)
    places = {r.place for r, _ in moves}
    for r in rounded:
        if r.place in places and (together or not r.in_memory):
            for numbers in r.numbers:
                if not any(r.call < n for n in numbers.all_input_nodes):  # (a size may be known later)
                    r.call.append(numbers)
    return len(moves)


def _decide(graph: Graph) -> tuple[list["_Making"], list[tuple["_Making", Node]]]:
    """What is rounded, with the places where its codes will be; and which codes move in front of which node."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    facts, position = Facts(), {n: i for i, n in enumerate(nodes)}
    returned = {view_base(v) for v in graph_outputs(graph) if isinstance(v, Node)}
    written = {k.node for k in find_kernels(nodes, (), returned, facts.nothing_costly())}
    calls = [n for n in nodes if facts.library(n) and n.target is not NUMBERS]  # (the first draws the seed)
    places = [position[n] for n in calls]
    codes: dict[str, list[Node]] = {}
    for node in nodes:
        if CODES in node.meta:
            codes.setdefault(node.meta[CODES].tensor, []).append(node)
    found = [_Making(n, codes.get(n.meta[ROUNDED], ())) for n in nodes if ROUNDED in n.meta]
    rounded = [r for r in found if r.nodes]
    moves = []
    for r in rounded:
        r.place = bisect.bisect(places, position[r.nodes[0]])
        r.in_memory = facts.base(r.tensor) in written
        readers = set() if r.in_memory else _read_into_memory(r.tensor, written, r.nodes)
        if not readers:
            continue
        reader = min(readers, key=position.__getitem__)
        place = bisect.bisect(places, position[reader])
        if r.place < place and position[r.nodes[-1]] < position[reader] and r.is_read_by_nothing_else():
            r.place = place
            moves.append((r, reader))
    for r in rounded:
        r.call = calls[max(0, r.place - 1)]
    return rounded, moves


class _Making:
    """What is computed for the codes of a tensor: ``nodes``, in order, and the random ``numbers`` that they read.
    ``place`` is how many library calls run before and ``call`` the last of them; ``in_memory``, whether the tensor is."""

    def __init__(self, tensor: Node, codes: Iterable[Node]) -> None:
        self.tensor, self.place, self.call, self.in_memory = tensor, 0, tensor, False
        found: set[Node] = set()
        stack = list(codes)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                if node is not tensor and node.target is not NUMBERS:
                    stack += [n for n in node.all_input_nodes if n.op == "call_function"]
        if tensor not in found:  # (codes of a copy)
            found = set()
        self.numbers = [n for n in found if n.target is NUMBERS]
        self.nodes = sorted(found - {tensor, *self.numbers})

    def is_read_by_nothing_else(self) -> bool:
        inside = set(self.nodes)
        return all(u in inside or u.op == "output" for n in self.nodes for u in n.users)


def share_exponentials(graph: Graph) -> int:
    """Write ``sigmoid(x)`` as ``1 / (1 + exp(-x))`` where that sum is there, of ``silu(x)`` as Inductor decomposes it, and only
    codes are made from the sigmoid. Returns how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        sums = _one_plus_exp(node.args[0])
        narrow = node.meta["val"].dtype in (torch.bfloat16, torch.float16)  # (where every step rounds)
        if not sums or narrow or not _is_for_codes(node):
            continue
        for step in sums:
            if node < step:
                node.prepend(step)
        with graph.inserting_before(node):
            inverse = graph.call_function(aten.reciprocal.default, (sums[-1],))
        inverse.meta = dict(node.meta)
        node.replace_all_uses_with(inverse)
        graph.erase_node(node)
        count += 1
    return count


def _read_into_memory(tensor: Node, written: Collection[Node], making: Collection[Node]) -> set[Node]:
    """What is in memory and computed from the tensor without a step in memory, besides its codes."""
    found, seen, stack = set(), {tensor, *making}, [tensor]
    while stack:
        new = {u for u in stack.pop().users if u.op == "call_function"} - seen
        seen |= new
        found |= {u for u in new if u in written}
        stack += [u for u in new if u not in written]
    return found


def _one_plus_exp(x: object) -> tuple[Node, ...]:
    """``-x``, ``exp(-x)`` and ``1 + exp(-x)``, if the graph has them."""
    found = [(n, e, s) for n in _users(x, aten.neg) for e in _users(n, aten.exp) for s in _users(e, aten.add)]
    return next(((n, e, s) for n, e, s in found if s.args in ((e, 1), (1, e)) and not s.kwargs), ())


def _users(node: object, packet: object) -> list[Node]:
    users = list(node.users) if isinstance(node, Node) else []
    return [u for u in users if getattr(u.target, "overloadpacket", None) is packet]


def _is_for_codes(node: Node) -> bool:
    """Whether all that is computed from a node ends in codes."""
    seen, stack = {node}, [node]
    while stack:
        at = stack.pop()
        if CODES in at.meta:
            continue
        if any(u.op == "output" for u in at.users):
            return False
        new = set(at.users) - seen
        seen |= new
        stack += new
    return True

"""What a plan may do about one segment of the forward: keep, round, draw again, recompute."""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

import wtacrs_fx.private  # noqa: F401  (registers torch.ops.prims.inductor_random and its seeds)
from wtacrs_fx.passes.bits import Substitute
from wtacrs_fx.passes.kernels import Facts, is_library_call
from wtacrs_fx.passes.kinds import draws, is_drawn_mask, runs_once
from wtacrs_fx.passes.plans import Choice, results_of
from wtacrs_fx.passes.segments import Segment

prims = torch.ops.prims


def keep_or_recompute(segment: Segment, parts: Sequence[Segment], facts: Facts) -> list[Choice]:
    """Keep; recompute all; recompute all but the tensors that save most time per byte, one kind more at a time.

    Args:
        segment: one of ``parts``, or several neighbours of them merged.
        parts: the segments of the forward.
        facts: about its nodes.
    """
    inside = frozenset(
        n
        for n in segment.nodes
        if n not in segment.handed_on and not draws(n) and not is_drawn_mask(n) and not runs_once(n)
    )
    result = [Choice(segment), Choice(segment, inside)]
    kept: tuple[Node, ...] = ()
    for tensors in _worth_keeping(segment, parts, facts):
        kept += tensors
        inside -= {n for t in tensors for n in (t, *t.args[:1]) if n is t or t.target is operator.getitem}
        result.append(Choice(segment, inside, kept))
    return result


def _worth_keeping(segment: Segment, parts: Sequence[Segment], facts: Facts) -> list[tuple[Node, ...]]:
    """What matrix products of the segment return, those with equal value (repeated layers) together. In place of the
    last one before an inner boundary the boundary itself: the same bytes, and nothing behind it has to be computed
    again from farther back."""
    inside = set(segment.nodes)
    found: dict[float, tuple[Node, ...]] = {}
    for part in parts:
        products = [n for n in part.nodes if n in inside and facts.flops(n)]
        for product in products:
            tensors = tuple(part.handed_on) if product is products[-1] else results_of(product)
            tensors = tuple(t for t in tensors if t not in segment.handed_on and not draws(t))
            size = sum(map(facts.bytes, tensors))
            if size:
                value = round(facts.flops(product) / size, 3)
                found[value] = found.get(value, ()) + tensors
    return [found[value] for value in sorted(found, reverse=True)]


def in_few_bits(keep: Choice, substitutes: Mapping[Node, Sequence[Substitute]]) -> Choice:
    """What is kept in few bits, where it can be; the same choice where nothing can.

    Args:
        keep: the choice to keep the segment.
        substitutes: node -> what can be rounded once it has run.
    """
    found = tuple(s for n in keep.segment.nodes for s in substitutes.get(n, ()))
    return replace(keep, rounded=found) if found else keep


def draw_again(keep: Choice, drawn: Mapping[Node, frozenset[Node]], saved: Collection[Node]) -> Choice:
    """The same choice, but what is saved of the segment's random numbers is drawn again in the backward, and all that is
    computed from them alone. The same choice where nothing is.

    Args:
        keep: the choice to keep the segment, rounded or not.
        drawn: of :func:`drawn_from_seeds`.
        saved: tensors that the partition without recomputation saves, and nobody else has.
    """
    found = {n for n in keep.segment.nodes if n in saved and n in drawn}
    stack = list(found)
    while stack:
        after = [u for u in stack.pop().users if u in drawn and u not in found]
        found.update(after)
        stack += after
    return replace(keep, redrawn=frozenset().union(*(drawn[n] for n in found))) if found else keep


def drawn_from_seeds(nodes: Sequence[Node]) -> dict[Node, frozenset[Node]]:
    """Values that are computed from Inductor's seeds and nothing else: run a second time they are the same.

    Args:
        nodes: calls in graph order.

    Returns: such a value -> what it is computed from, itself included, the seeds left out. Constants are none of them.
    """
    found: dict[Node, frozenset[Node]] = {}
    constants: dict[Node, frozenset[Node]] = {}
    for node in nodes:
        if node.target is prims.inductor_seeds.default or draws(node) or runs_once(node) or is_library_call(node):
            continue
        sources = [n for n in node.all_input_nodes if n.target is not prims.inductor_seeds.default]
        if all(n in found or n in constants for n in sources):
            closure = frozenset((node,)).union(*(found.get(n) or constants[n] for n in sources))
            drawn = node.target is prims.inductor_random.default or any(n in found for n in sources)
            (found if drawn else constants)[node] = closure
    return found

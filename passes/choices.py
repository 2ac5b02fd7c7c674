"""What a plan may do about one segment of the forward: keep, round, draw again, recompute."""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

import wtacrs_fx.private  # noqa: F401  (registers torch.ops.prims.inductor_random and its seeds)
from wtacrs_fx.passes.bits import Substitute
from wtacrs_fx.passes.kernels import Facts, is_library_call
from wtacrs_fx.passes.kinds import ancestors, draws, is_drawn_mask, runs_once
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


def draw_again(keep: Choice, saved: Collection[Node]) -> Choice:
    """The same choice, but what is saved of the segment's random numbers is drawn again in the backward. The same choice where
    there are none."""
    found = frozenset().union(*(drawn_from_seeds(n) for n in keep.segment.nodes if n in saved))
    return replace(keep, redrawn=found) if found else keep


def drawn_from_seeds(node: Node) -> frozenset[Node]:
    """A value that is computed from Inductor's seeds and nothing else, with all that it is computed from but the seeds: run a
    second time it is the same. Empty for any other value, and for constants."""
    seeds = prims.inductor_seeds.default
    found = {node, *ancestors([node], lambda n: n.target is not seeds)}
    again = all(n.op == "call_function" and not draws(n) and not runs_once(n) and not is_library_call(n) for n in found)
    drawn = any(n.target is prims.inductor_random.default for n in found)
    return frozenset(found) if again and drawn else frozenset()

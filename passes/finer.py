"""Decide: where a memory budget leaves room, give rounded tensors more bits, or keep them as they are.

A plan rounds whole segments to the bits of the option ``round_bits``. For a peak it does not matter what is not alive then, and
the last tensor that is rounded seldom fits exactly. What is left of the budget is spent where it lowers noise most per byte.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from wtacrs_fx.noise import lower_hull
from wtacrs_fx.passes.bits import Substitute
from wtacrs_fx.passes.kernels import buffer_bytes
from wtacrs_fx.passes.plans import Choice, Plan

SEARCHES = 4
"""How often the search goes on behind a step that does not fit. Each takes as many simulations as its number of steps has
binary digits."""


@dataclass(frozen=True)
class Step:
    """From what a plan has for some tensors that only together relieve the backward of others, to something less noisy."""

    group: int
    level: int
    to: tuple[Substitute, ...]
    """None is left where they are kept as they are."""
    worth: float
    """Noise saved per byte."""


def finer(plan: Plan, fits: Callable[[Plan], bool], simulate: Callable[[Sequence[Choice]], Plan]) -> Plan:
    """A less noisy plan that fits; the plan itself if none was found.

    Steps are taken in the order of noise saved per byte, as many as fit (found by bisection); then that goes on behind the
    first one that does not.

    Args:
        plan: with the fewest bits.
        fits: whether a plan is good enough but for its noise.
        simulate: of the planner.
    """
    groups = _groups([s for c in plan.choices for s in c.rounded])
    rest = sorted((s for i, group in enumerate(groups) for s in _steps(i, group)), key=lambda s: -s.worth)
    taken: list[Step] = []
    best = plan
    for _ in range(SEARCHES):
        low, high = 0, len(rest) + 1  # rest[:low] fits, rest[:high] does not
        middle = len(rest)
        while high - low > 1:
            found = simulate(_taken(plan, groups, taken + rest[:middle]))
            if fits(found):
                low, best = middle, found
            else:
                high = middle
            middle = (low + high) // 2
        taken += rest[:low]
        if low == len(rest):
            break
        rest = [s for s in rest[low + 1 :] if s.group != rest[low].group]
    return best


def _groups(found: Sequence[Substitute]) -> list[tuple[Substitute, ...]]:
    """Roundings that relieve the backward of the same tensors together."""
    groups: list[tuple[Substitute, ...]] = []
    for s in found:
        same = [g for g in groups if any(s.sources & other.sources for other in g)]
        groups = [g for g in groups if g not in same]
        groups.append((*(other for g in same for other in g), s))
    return groups


def _steps(index: int, group: tuple[Substitute, ...]) -> list[Step]:
    """Along the lower hull of noise over bytes: in more bits, and as they are."""
    whole = sum(map(buffer_bytes, frozenset().union(*(s.sources for s in group))))
    levels = [group]
    while any(s.finer for s in levels[-1]):
        levels.append(tuple(s.finer or s for s in levels[-1]))
    levels = [level for level in levels if sum(s.bytes for s in level) < whole]
    sizes = [*(sum(s.bytes for s in level) for level in levels), whole]
    levels.append(())
    noises = [sum(s.noise for s in level) for level in levels]
    hull = lower_hull(sizes, noises)
    return [
        Step(index, level=b, to=levels[b], worth=(noises[a] - noises[b]) / max(1, sizes[b] - sizes[a]))
        for a, b in itertools.pairwise(hull)
    ]


def _taken(plan: Plan, groups: Sequence[Sequence[Substitute]], steps: Sequence[Step]) -> list[Choice]:
    """The plan's choices after these steps."""
    changed: dict[Node, Substitute | None] = {}
    for step in sorted(steps, key=lambda s: s.level):
        changed |= {s.tensor: None for s in groups[step.group]}
        changed |= {s.tensor: s for s in step.to}
    result = []
    for choice in plan.choices:
        rounded = (changed.get(s.tensor, s) for s in choice.rounded)
        result.append(replace(choice, rounded=tuple(s for s in rounded if s is not None)))
    return result

"""A plan of what the backward computes again: a choice per segment, and how choices are combined."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.fx import Node

from wtacrs_fx.passes.bits import Substitute
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.segments import Segment

T = TypeVar("T")

CLOSE = 1.01
"""Plans within this factor of the best one count as equally good, and of those the one of least noise is taken: predictions
are not better than that, and noise is what training pays for."""

STATES = 256
"""Distinct values of bytes held that the dynamic program tells apart per segment."""


@dataclass(frozen=True)
class Choice:
    """What one segment does."""

    segment: Segment
    recomputed: frozenset[Node] = frozenset()
    """Nodes that the backward computes again; empty: keep."""
    kept: tuple[Node, ...] = ()
    """Tensors inside a recomputed segment that are saved all the same."""
    rounded: tuple[Substitute, ...] = ()
    """What is kept in few bits."""
    redrawn: frozenset[Node] = frozenset()
    """Random numbers, and what is computed from nothing else, that the backward draws again from their seeds."""

    @property
    def changes(self) -> bool:
        """Whether anything is done but to keep what the cut saves."""
        return bool(self.recomputed or self.rounded or self.redrawn)


@dataclass(frozen=True)
class Costs:
    """Of one choice in one segment."""

    held: int
    working: int
    seconds: float


Table = list[list[tuple[Choice, Costs]]]
"""Per segment its choices and their costs."""


@dataclass
class Plan:
    """One choice per segment, and what a simulation says about them."""

    choices: tuple[Choice, ...]
    peak: int
    """Bytes of activations at most alive at once (gradients of parameters left out)."""
    seconds: float
    held: int
    again: frozenset[Node]
    """Nodes that the backward runs again: those of ``recomputed`` that it asks for, and cheap others."""

    @property
    def recomputed(self) -> frozenset[Node]:
        """Nodes that the backward computes again."""
        return frozenset().union(*(c.recomputed | c.redrawn for c in self.choices))

    @property
    def rounded(self) -> dict[Node, int]:
        """Tensors that are kept in few bits, and in how many."""
        return {s.tensor: s.bits for c in self.choices for s in c.rounded}

    @property
    def noise(self) -> float:
        """Of what is rounded, summed; 0 if nothing is."""
        return sum(s.noise for c in self.choices for s in c.rounded)

    @property
    def starts(self) -> dict[Node, str]:
        """Tensors from which recomputation starts -> what for."""
        kept = {view_base(n): "recomputation" for c in self.choices for n in c.kept}
        return kept | dict.fromkeys(handed_on(self.choices), "recomputation of the next segment")


def quietest(found: Iterable[T], rank: Callable[[T], tuple[float, ...]], noise: Callable[[T], float]) -> T | None:
    """Of what is nearly as good as the best in the first component of its rank (:data:`CLOSE`), the one of least noise, and
    of these the one of least rank. None if nothing was found."""
    known = [(rank(f), noise(f), i, f) for i, f in enumerate(found)]
    if not known:
        return None
    limit = CLOSE * min(ranked[0] for ranked, *_ in known)
    return min((k for k in known if k[0][0] <= limit), key=lambda k: (k[1], k[0], k[2]))[-1]


def combine(table: Table, peak: int) -> tuple[float, list[Choice]] | None:
    """Added seconds and choices of the fastest combination that fits ``peak``, by the sums of the planner."""
    step = max(1, peak // STATES)
    states: dict[int, tuple[float, int, tuple[Choice, ...]]] = {0: (0.0, 0, ())}
    for options in table:
        new: dict[int, tuple[float, int, tuple[Choice, ...]]] = {}
        for seconds, held, chosen in states.values():
            for choice, costs in options:
                total, after = seconds + costs.seconds, held + costs.held
                old = new.get(after // step)
                if held + costs.working <= peak and (old is None or (total, after) < old[:2]):
                    new[after // step] = (total, after, (*chosen, choice))
        states, fastest = {}, float("inf")
        for key in sorted(new):  # states that no other beats in both bytes and seconds
            if new[key][0] < fastest:
                states[key], fastest = new[key], new[key][0]
    if not states:
        return None
    seconds, _, chosen = min(states.values(), key=lambda s: s[:2])
    return seconds, list(chosen)


def handed_on(choices: Sequence[Choice]) -> set[Node]:
    """Tensors that a recomputed segment reads of an earlier one."""
    return {
        b
        for i, c in enumerate(choices)
        for b, last in c.segment.handed_on.items()
        if any(later.recomputed for later in choices[i + 1 : last + 1])
    }


def results_of(product: Node) -> tuple[Node, ...]:
    """What a product returns: itself, or the parts of its tuple."""
    if is_tensor(product):
        return (product,)
    return tuple(u for u in product.users if u.target is operator.getitem)

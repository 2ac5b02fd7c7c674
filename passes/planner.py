"""Decide which parts of the forward the backward computes again: least predicted time under a peak, or least peak under a
time.

Choices per segment: keep what the partition without recomputation saves; or save only what the segment before hands on,
and perhaps the results of some of its own matrix products, and compute the rest again just in time. The backward of
segment s runs while the tensors of all segments before it are held, so a choice o_s fits a peak B if

    sum over j < s of held(j, o_j) + working(s, o_s) <= B    for every s,

where ``working`` is what segment s has in memory at most while its own gradients are computed. Held bytes, working bytes
and seconds of every choice come from simulations in which all segments choose alike; a dynamic program over
(segment, bytes held) then combines them, and the combination is simulated again. Neighbouring segments may be treated as
one (the boundary between them is then not saved); every such granularity is planned and the best one wins.
"""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from wtacrs_fx.passes.cost import Roofline, flops
from wtacrs_fx.passes.kinds import draws
from wtacrs_fx.passes.liveness import Timeline, buffer_bytes, timeline
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.schedule import schedule_backward
from wtacrs_fx.passes.segments import Segment, forward_nodes, is_tensor, merge
from wtacrs_fx.passes.sites import graph_outputs

STATES = 256
"""Distinct values of bytes held that the dynamic program tells apart per segment."""


@dataclass(frozen=True)
class Choice:
    """What one segment does."""

    segment: Segment
    recomputed: frozenset[Node] = frozenset()
    """Nodes that the backward computes again; empty: keep."""
    kept: tuple[Node, ...] = ()
    """Results of matrix products inside a recomputed segment that are saved all the same."""


@dataclass(frozen=True)
class Costs:
    """Of one choice in one segment."""

    held: int
    working: int
    seconds: float


@dataclass
class Plan:
    """One choice per segment, and what a simulation says about them."""

    choices: tuple[Choice, ...]
    peak: int
    """Bytes of activations at most alive at once (gradients of parameters left out)."""
    seconds: float
    held: int
    added_flops: int
    optimum: float | None = None

    @property
    def recomputed(self) -> frozenset[Node]:
        return frozenset().union(*(c.recomputed for c in self.choices))


@dataclass
class Planner:
    """Plans for one joint graph.

    Args:
        graph: joint graph, with sampled sites as they will run.
        num_fwd_outputs: its forward outputs, those of severed tensors included.
        segments: of its forward.
        saved: tensors that the partition without recomputation saves.
        weights: placeholders that are in memory anyway.
        roofline: of the device.
        fixed: nodes that are recomputed in every plan (regions that the user marked).
    """

    graph: Graph
    num_fwd_outputs: int
    segments: Sequence[Segment]
    saved: Collection[Node]
    weights: Collection[Node]
    roofline: Roofline
    fixed: Collection[Node] = ()
    _curves: dict[int, tuple[list[Segment], list[list[tuple[Choice, Costs]]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forward = forward_nodes(self.graph, self.num_fwd_outputs)
        outputs = graph_outputs(self.graph)
        self.outputs = {view_base(v) for v in outputs[: self.num_fwd_outputs] if isinstance(v, Node)}
        self.gradients = {view_base(v) for v in outputs[self.num_fwd_outputs :] if isinstance(v, Node)}
        self.saved = {view_base(n) for n in self.saved}

    # ---- what a combination of choices costs

    def simulate(self, choices: Sequence[Choice]) -> Plan:
        """Predicted peak, time, held bytes and added FLOPs of a combination."""
        recomputed, saved = self._sets(choices)
        line, forward_line, reads, again = self._run(saved)
        held = sum(buffer_bytes(b) for b in reads - set(self.weights))
        return Plan(
            tuple(choices),
            max(line.activation_peak, forward_line.peak),
            line.seconds(self.roofline) + forward_line.seconds(self.roofline),
            held,
            sum(map(flops, again)),
        )

    def _sets(self, choices: Sequence[Choice]) -> tuple[set[Node], set[Node]]:
        recomputed = set(self.fixed).union(*(c.recomputed for c in choices))
        kept = {view_base(n) for c in choices for n in c.kept}
        handed_on = {
            b
            for i, c in enumerate(choices)
            for b, last in c.segment.handed_on.items()
            if any(later.recomputed for later in choices[i + 1 : last + 1])
        }
        saved = {n for n in self.saved if n not in recomputed} | handed_on | kept
        return recomputed, saved

    def _run(self, saved: set[Node]) -> tuple[Timeline, Timeline, set[Node], list[Node]]:
        backward = schedule_backward(self.graph, self.num_fwd_outputs, saved)
        given = backward.reads - set(self.weights)
        line = timeline(backward.nodes, given, self.gradients, self.gradients)
        forward_line = timeline(self.forward, (), self.outputs | given)
        forward = set(self.forward)
        return line, forward_line, set(backward.reads), [n for n in backward.nodes if n in forward]

    # ---- choices

    def choices(self, segment: Segment) -> list[Choice]:
        """Keep; recompute all; recompute all but the tensors that save most time per byte, one more at a time."""
        inside = frozenset(n for n in segment.nodes if n not in segment.handed_on and not draws(n))
        result = [Choice(segment), Choice(segment, inside)]
        kept: tuple[Node, ...] = ()
        for tensors in self._worth_keeping(segment):
            kept += tensors
            inside -= {n for t in tensors for n in (t, t.args[0]) if n is t or t.target is operator.getitem}
            result.append(Choice(segment, inside, kept))
        return result

    def _worth_keeping(self, segment: Segment) -> list[tuple[Node, ...]]:
        """What matrix products of the segment return. For the last one in front of an inner boundary the boundary itself:
        the same bytes, and nothing behind it has to be computed again from farther back."""
        inside = set(segment.nodes)
        found = []
        for part in self.segments:
            products = [n for n in part.nodes if n in inside and flops(n)]
            for product in products:
                tensors = _tensors(product)
                if product is products[-1]:
                    tensors = tuple(b for b in part.handed_on if flops(product) and not draws(b))
                tensors = tuple(t for t in tensors if t not in segment.handed_on)
                size = sum(map(buffer_bytes, tensors))
                if size:
                    found.append((self.roofline.seconds(flops(product), 0) / size, tensors))
        return [tensors for _, tensors in sorted(found, key=lambda f: -f[0])]

    def curves(self, size: int) -> tuple[list[Segment], list[list[tuple[Choice, Costs]]]]:
        """Per merged segment its choices with their costs, from simulations in which every segment chooses alike."""
        if size not in self._curves:
            segments = merge(self.segments, size)
            options = [self.choices(s) for s in segments]
            table: list[list[tuple[Choice, Costs]]] = [[] for _ in segments]
            for level in range(max(map(len, options))):
                uniform = [o[min(level, len(o) - 1)] for o in options]
                for i, costs in enumerate(self._costs(uniform)):
                    if level < len(options[i]):
                        table[i].append((uniform[i], costs))
            self._curves[size] = segments, table
        return self._curves[size]

    def _costs(self, choices: Sequence[Choice]) -> list[Costs]:
        _, saved = self._sets(choices)
        line, _, reads, again = self._run(saved)
        owner = {n: i for i, c in enumerate(choices) for n in c.segment.nodes}
        handed_on = {b for c in choices for b in c.segment.handed_on}
        held, working, seconds = ([0] * len(choices) for _ in range(3))
        for base in reads - set(self.weights):
            held[owner.get(base, 0)] += buffer_bytes(base)
        before = [sum(held[:i]) for i in range(len(choices))]
        recomputed = set(again)
        current = len(choices) - 1
        for kernel, live, resident in zip(line.kernels, line.live, line.resident):
            touched = [owner[n] for n in (kernel.node, *kernel.reads) if n in owner and n not in handed_on]
            current = min([current, *touched])
            working[current] = max(working[current], live - resident - before[current])
            if kernel.node in recomputed:
                cost = self.roofline.seconds(flops(kernel.node), kernel.size + sum(map(buffer_bytes, kernel.reads)))
                seconds[owner.get(kernel.node, current)] += cost
        return [Costs(h, max(w, h), s) for h, w, s in zip(held, working, seconds)]

    # ---- combine

    def fastest(self, peak: int, sizes: Sequence[int] = (1, 2, 3, 4, 6, 8)) -> Plan | None:
        """The plan of least predicted time whose predicted peak is at most ``peak`` bytes; None if there is none."""
        best: Plan | None = None
        for size in sizes:
            if size > 1 and size >= len(self.segments):
                break
            target = peak
            for _ in range(3):  # the program's sums are not the simulation: aim lower by what it was wrong
                choices = self._combine(self.curves(size)[1], target)
                if choices is None:
                    break
                plan = self.simulate(choices)
                if plan.peak <= peak:
                    if best is None or plan.seconds < best.seconds:
                        best = plan
                    break
                target -= plan.peak - peak
        return best

    def least_peak(self, seconds: float, tolerance: float = 0.01) -> Plan:
        """The plan of least predicted peak whose predicted time is at most ``seconds`` (nothing recomputed if none is)."""
        first = self.simulate([Choice(s) for s in self.segments])
        best, low, high = first, 0, first.peak
        while high - low > tolerance * first.peak:
            middle = (low + high) // 2
            plan = self.fastest(middle)
            if plan is not None and plan.seconds <= seconds:
                best, high = plan, min(middle, plan.peak)
            else:
                low = middle
        return best

    def _combine(self, table: Sequence[Sequence[tuple[Choice, Costs]]], peak: int) -> list[Choice] | None:
        step = max(1, peak // STATES)
        states: dict[int, tuple[float, int, tuple[Choice, ...]]] = {0: (0.0, 0, ())}
        for options in table:
            new: dict[int, tuple[float, int, tuple[Choice, ...]]] = {}
            for seconds, held, chosen in states.values():
                for choice, costs in options:
                    if held + costs.working > peak:
                        continue
                    total, after = seconds + costs.seconds, held + costs.held
                    old = new.get(after // step)
                    if old is None or (total, after) < old[:2]:
                        new[after // step] = (total, after, (*chosen, choice))
            states = _pareto(new)
        if not states:
            return None
        return list(min(states.values(), key=lambda s: s[:2])[2])


def _pareto(states: dict[int, tuple[float, int, tuple[Choice, ...]]]) -> dict[int, tuple[float, int, tuple[Choice, ...]]]:
    """States that no other beats in both bytes and seconds."""
    result: dict[int, tuple[float, int, tuple[Choice, ...]]] = {}
    fastest = float("inf")
    for key in sorted(states):
        if states[key][0] < fastest:
            fastest = states[key][0]
            result[key] = states[key]
    return result


def _tensors(product: Node) -> tuple[Node, ...]:
    """What a product returns: itself, or the parts of its tuple."""
    if is_tensor(product):
        return (product,)
    return tuple(u for u in product.users if u.target is operator.getitem)

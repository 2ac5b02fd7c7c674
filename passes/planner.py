"""Decide which parts of the forward the backward computes again: least predicted time under a peak, or least peak under a
time.

Choices per segment: keep what the partition without recomputation saves; or keep it in few bits, where it can be rounded;
in both cases hold random numbers (dropout masks, as bits), or draw them again from their seeds; or save only what the segment
before hands on, and perhaps the results of some of its own matrix products, and compute the rest again just in time. The
backward of segment s runs while the tensors of all segments before it are held, so choices o_s fit a peak B if

    sum over j < s of held(j, o_j) + working(s, o_s) <= B    for every s,

where ``working`` is what segment s has in memory at most while its own gradients are computed. Held bytes, working bytes
and seconds of every choice come from simulations in which all segments choose alike; a dynamic program over
(segment, bytes held) combines them, and the combination is simulated again. Neighbouring segments may be treated as one
(the boundary between them is then not saved). Whatever was simulated is a plan, and the best one wins.

PyTorch's knapsack solvers do not fit: they bound the sum of all bytes held, not the peak.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.bits import Substitute, paying
from wtacrs_fx.passes.choices import draw_again, drawn_from_seeds, in_few_bits, keep_or_recompute
from wtacrs_fx.passes.cost import Roofline
from wtacrs_fx.passes.kernels import Facts
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.liveness import AT_ONCE, DEFAULT, MemoryOptions, Timeline, timeline
from wtacrs_fx.passes.pack import held_bytes
from wtacrs_fx.passes.plans import Choice, Costs, Plan, Table, combine, handed_on, quietest
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.schedule import JointOrder
from wtacrs_fx.passes.segments import Segment, forward_nodes, merge
from wtacrs_fx.passes.sites import graph_outputs

SIZES = (1, 2, 3, 4, 6, 8)
"""How many neighbouring segments may be treated as one."""

SIMULATIONS = 6
"""Combinations that are simulated at most for one target. The dynamic program's sums are not the simulation: where a
combination misses the target, the next one aims lower by as much."""

SLACK = 1.03
"""Where the search for a target begins, above it: the dynamic program's sums are a little higher than the simulation."""

TARGETS = 20
"""How many peaks, evenly spaced below that of keeping everything, are planned for."""


Run = tuple[Timeline, set[Node], set[Node], Facts]
"""Timeline of the backward, tensors held for it, nodes that it computes again, and what is known about the nodes."""


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
        options: what the compiler does about memory, in plans that do more than keep (True) and in others.
        packs: masks of at least so many bytes are held as bits; None: as they are.
    """

    def __init__(
        self,
        graph: Graph,
        num_fwd_outputs: int,
        segments: Sequence[Segment],
        saved: Collection[Node],
        weights: Collection[Node],
        roofline: Roofline,
        fixed: Collection[Node] = (),
        options: Callable[[bool], MemoryOptions] = lambda ordered: AT_ONCE if ordered else DEFAULT,
        packs: int | None = None,
    ) -> None:
        self.packs = packs
        self.graph, self.num_fwd_outputs, self.segments, self.roofline = graph, num_fwd_outputs, segments, roofline
        self.weights, self.fixed, self.options = set(weights), set(fixed), options
        self.saved = {view_base(n) for n in saved}
        self.forward = forward_nodes(graph, num_fwd_outputs)
        outputs = graph_outputs(graph)
        self.outputs = {view_base(v) for v in outputs[:num_fwd_outputs] if isinstance(v, Node)}
        self.gradients = {view_base(v) for v in outputs[num_fwd_outputs:] if isinstance(v, Node)}
        self.position = {n: i for i, n in enumerate(self.forward)}
        self.drawn = drawn_from_seeds(self.forward)
        self.facts, self.order = Facts(), JointOrder(graph, num_fwd_outputs)
        self.substitutes: dict[Node, list[Substitute]] = {}
        self._tables: dict[int, Table] = {}
        self._pool: list[Plan] = []
        self._kept: dict[frozenset[object], Run] = {}
        self._open: list[int] = []

    def rounding(self, substitutes: Iterable[Substitute]) -> "Planner":
        """The same planner with one choice more: a segment's tensors in few bits. Nothing that it recomputes is rounded, and
        nothing whose codes would be held beside what it is computed from, because something else needs that."""
        tried = list(substitutes)
        replaced = {n for s in tried for n in s.replaced}
        reads = self.order.backward((self.saved - replaced) | {s.tensor for s in tried}).reads
        whole = {n.name for n in reads - {view_base(s.tensor) for s in tried}}
        size = functools.partial(held_bytes, packs=self.packs)
        pay = paying([(s.tensor, s.bytes, s.sources) for s in tried], whole, size)
        other = copy.copy(self)
        other.substitutes, other._tables, other._pool = {}, {}, []
        for s in tried:
            places = [n for n in (s.tensor, *s.sources) if n in self.position]
            if places and s.tensor in pay:
                other.substitutes.setdefault(max(places, key=self.position.__getitem__), []).append(s)
        return other

    def simulate(self, choices: Sequence[Choice]) -> Plan:
        """Predicted peak, time and held bytes of a combination."""
        return self._judge(choices, self._run(choices, self._options(choices)))

    def _judge(self, choices: Sequence[Choice], run: Run) -> Plan:
        line, given, again, facts = run
        forward, forward_peak = self._forward(choices, given)
        seconds = line.seconds(self.roofline, facts) + forward.seconds(self.roofline, self.facts)
        seconds += sum(map(self._rounding_seconds, choices))
        held = sum(map(facts.bytes, given))
        return Plan(tuple(choices), max(line.activation_peak, forward_peak), seconds, held, frozenset(again))

    def _forward(self, choices: Sequence[Choice], given: Collection[Node]) -> tuple[Timeline, int]:
        """The forward's timeline, and its peak: with the codes of each rounded tensor from where it is made, and the tensor
        itself until its last reader there."""
        codes = {s.tensor: self.position[n] for n, found in self.substitutes.items() for s in found}
        made = [(codes[s.tensor], s.bytes) for c in choices for s in c.rounded]
        whole = handed_on(choices) | {view_base(n) for c in choices for n in c.kept}
        gone = {view_base(s.tensor) for c in choices for s in c.rounded} - whole
        returned = self.outputs | (set(given) - gone)
        line = timeline(self.forward, (), returned, facts=self._in_bits(given), options=self._options(choices))
        live = [
            live + sum(size for place, size in made if place <= self.position[kernel.node])
            for kernel, live in zip(line.kernels, line.live)
        ]
        return line, max(live, default=0)

    @functools.cached_property
    def keep(self) -> Plan:
        """The plan that recomputes nothing."""
        return self.simulate([Choice(s) for s in self.segments])

    def fastest(self, peak: int) -> Plan | None:
        """The plan of least predicted time whose predicted peak is at most ``peak`` bytes; None if none was found."""
        while self._targets() and self._open[-1] <= peak:  # a plan for a tighter target may be the fastest for this one
            self._search(self._open.pop())
        self._search(peak)
        return self._best((p for p in self._pool if p.peak <= peak), lambda p: (p.seconds, p.peak))

    def least_peak(self, seconds: float) -> Plan:
        """The plan of least predicted peak whose predicted time is at most ``seconds`` (nothing recomputed if none is)."""
        while self._targets():
            best = min((p.peak for p in self._pool if p.seconds <= seconds), default=math.inf)
            if best <= self._open[-1]:
                break  # what was not searched yet is for higher peaks
            self._search(self._open.pop())
        return self._best((p for p in self._pool if p.seconds <= seconds), lambda p: (p.peak, p.seconds)) or self.keep

    def _best(self, plans: Iterable[Plan], rank: Callable[[Plan], tuple[float, ...]]) -> Plan | None:
        """Of least rank; where some plans round and others do as well without, the quieter one."""
        return quietest(plans, rank, operator.attrgetter("noise"))

    def _targets(self) -> list[int]:
        """Peaks that were not searched yet, the lowest one last. Whatever was simulated is in the pool."""
        if not any(p is self.keep for p in self._pool):
            self._pool.append(self.keep)
            self._open = [int(self.keep.peak * (1 - i / TARGETS)) for i in range(1, TARGETS)]
        return self._open

    def _search(self, peak: int) -> None:
        """Simulate the fastest combinations for a peak, of every granularity, and add them to the pool. First those that draw
        nothing again: of the many that differ little the sums do not tell which is the best, and the simulations run out."""
        tables = {size: self.table(size) for size in SIZES if size == 1 or size < len(self.segments)}
        holding = {size: [[o for o in row if not o[0].redrawn] for row in table] for size, table in tables.items()}
        self._search_in(holding, peak)
        if holding != tables:
            self._search_in(tables, peak)

    def _search_in(self, tables: Mapping[int, Table], peak: int) -> None:
        targets = {size: int(SLACK * peak) for size in tables}
        found = {size: combine(tables[size], target) for size, target in targets.items()}
        best = math.inf
        for _ in range(SIMULATIONS):
            open_ = {s: f for s, f in found.items() if f is not None and self.keep.seconds + f[0] < best}
            if not open_:
                break
            size = min(open_, key=lambda s: open_[s][0])
            plan = self.simulate(open_[size][1])
            self._pool.append(plan)
            if plan.peak <= peak:
                best = min(best, plan.seconds)
                found[size] = None
            else:
                targets[size] -= plan.peak - peak
                found[size] = combine(tables[size], targets[size])

    def table(self, size: int) -> Table:
        """Per segment of ``size`` merged ones its choices with their costs, from simulations in which all choose alike. These
        are plans too."""
        if size not in self._tables:
            options = [keep_or_recompute(s, self.segments, self.facts) for s in merge(self.segments, size)]
            alike = [[o[min(level, len(o) - 1)] for o in options] for level in range(max(map(len, options)))]
            rounded = [in_few_bits(kept, self.substitutes) for kept in alike[0]]
            for kept in (alike[0], rounded)[: 1 + (rounded != alike[0])]:
                alike += [kept] * (kept is rounded)
                redrawn = [draw_again(c, self.drawn, self.saved - self.outputs) for c in kept]
                alike += [redrawn] * (redrawn != kept)
            table: Table = [[] for _ in options]
            for uniform in alike:
                run = self._uniform(uniform)
                if uniform is not alike[0] and self._options(uniform) == AT_ONCE:
                    self._pool.append(self._judge(uniform, run))
                for row, choice, costs in zip(table, uniform, self._costs(uniform, run)):
                    if all(choice is not known for known, _ in row):
                        row.append((choice, costs))
            self._tables[size] = table
        return self._tables[size]

    def _uniform(self, choices: Sequence[Choice]) -> Run:
        """A simulation in which all segments choose alike. (What is kept for reuse fills up room that there is.) Where nothing
        is recomputed it is the same for every granularity."""
        if any(c.recomputed for c in choices):
            return self._run(choices, AT_ONCE)
        key = frozenset(x for c in choices for x in (*c.rounded, *c.redrawn))
        if key not in self._kept:
            self._kept[key] = self._run(choices, AT_ONCE)
        return self._kept[key]

    def _rounding_seconds(self, choice: Choice) -> float:
        """Time of rounding: each tensor is read for its range and once more for its codes."""
        moved = sum(2 * self.facts.bytes(view_base(s.tensor)) + s.bytes for s in choice.rounded)
        return self.roofline.seconds(0, moved)

    def _options(self, choices: Iterable[Choice]) -> MemoryOptions:
        return self.options(bool(self.fixed) or any(c.changes for c in choices))

    def _run(self, choices: Sequence[Choice], options: MemoryOptions) -> Run:
        recomputed = self.fixed.union(*(c.recomputed | c.redrawn for c in choices))
        kept = {view_base(n) for c in choices for n in c.kept}
        whole = handed_on(choices) | kept
        rounded = [s for c in choices for s in c.rounded]
        replaced = recomputed.union(*(s.replaced for s in rounded))
        backward = self.order.backward((self.saved - replaced) | whole | {s.tensor for s in rounded})
        given = set(backward.reads - self.weights)
        facts = self._in_bits(given)
        if rounded:
            bases = {view_base(s.tensor): s.bytes for s in rounded}
            facts = facts.resized({n: size + facts.bytes(n) * (n in whole) for n, size in bases.items()})
        visible = given.intersection(self.outputs)
        donated = {n for n in given if n.op == "call_function"} - visible
        line = timeline(backward.nodes, given, self.gradients, self.gradients, facts, options, donated, visible)
        return line, given, set(backward.nodes).intersection(self.forward), facts

    def _in_bits(self, held: Iterable[Node]) -> Facts:
        """About the nodes, with those masks of what is held that will be packed as bits."""
        made = {n for n in held if n.op == "call_function"} - self.outputs
        sizes = {n: held_bytes(n, self.packs) for n in made if is_tensor(n) and n.meta["val"].dtype is torch.bool}
        return self.facts.resized(sizes) if sizes else self.facts

    def _costs(self, choices: Sequence[Choice], run: Run) -> list[Costs]:
        line, given, again, facts = run
        owner = {n: i for i, c in enumerate(choices) for n in (*c.segment.nodes, *(s.tensor for s in c.rounded))}
        handed_on = {b for c in choices for b in c.segment.handed_on}
        held, working = [0] * len(choices), [0] * len(choices)
        seconds = [*map(self._rounding_seconds, choices)]
        for base in given:
            held[owner.get(base, 0)] += facts.bytes(base)
        before = [sum(held[:i]) for i in range(len(choices))]
        current = len(choices) - 1
        for kernel, live, resident in zip(line.kernels, line.live, line.resident):
            touched = [owner[n] for n in (kernel.node, *kernel.reads) if n in owner and n not in handed_on]
            current = min([current, *touched])
            working[current] = max(working[current], live - resident - before[current])
            if kernel.node in again:
                seconds[owner.get(kernel.node, current)] += facts.seconds(kernel, self.roofline)
        return [Costs(h, max(w, h), s) for h, w, s in zip(held, working, seconds)]

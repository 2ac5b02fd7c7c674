"""From the option ``memory_budget`` to nodes that the backward computes again."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, WtacrsWarning
from wtacrs_fx.inductor import options_for
from wtacrs_fx.ledger import Part, Prediction
from wtacrs_fx.passes.cost import Roofline, flops, roofline
from wtacrs_fx.passes.kernels import Facts
from wtacrs_fx.passes.liveness import MemoryOptions, Timeline, module_timeline
from wtacrs_fx.passes.pack import find_masks, packed_bytes
from wtacrs_fx.passes.planner import Planner
from wtacrs_fx.passes.plans import CLOSE, Plan, quietest
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.saved import storage
from wtacrs_fx.passes.segments import find_segments
from wtacrs_fx.passes.sever import is_saved, saved_tensors
from wtacrs_fx.passes.sites import graph_outputs, module_of, primals
from wtacrs_fx.private import functorch_config, inductor_config, tree_leaves
from wtacrs_fx.units import format_bytes, parse_bytes

Partition = tuple[GraphModule, GraphModule]
T = TypeVar("T")

_REGION = getattr(torch.fx.traceback, "MEMORY_BUDGET_ANNOTATION_KEY", "_region_activation_memory_budget")

NO_GAIN = "every plan takes more memory than exact training; memory_budget=None samples for time"
"""Why sites stay exact with ``memory_budget="auto"``."""

MIN_SHARE = 1e-6
"""For a share of 0, which means as little as there can be."""


@dataclass(frozen=True)
class Uncut:
    """A joint graph as it is given to the partitioner, and how many forward outputs it has then."""

    graph: Graph
    num_fwd_outputs: int


def memory_options(config: Config, *, ordered: bool = False, sampled: bool = False) -> MemoryOptions:
    """Of Inductor: those of the user, then those that such graphs are compiled with, then its own."""
    options = {**options_for(ordered=ordered, sampled=sampled), **config.inductor}
    names = ("allow_buffer_reuse", "reorder_for_peak_memory")
    return MemoryOptions(*(bool(options.get(n, getattr(inductor_config, n))) for n in names))


def predict(
    partition: Partition,
    num_fwd_outputs: int,
    weights: Collection[str],
    options: MemoryOptions,
    device: Roofline,
    packs: int | None = None,
) -> Prediction:
    """Peak, time and FLOPs of a partition, from its two graphs. ``packs``: masks of at least so many bytes will be packed."""
    facts = _facts_of(partition, num_fwd_outputs, packs)
    forward, backward = _timelines(partition, num_fwd_outputs, weights, options, facts)
    return Prediction(
        peak=max(forward.peak, backward.activation_peak),
        allocated=max(forward.peak, backward.peak),
        seconds=forward.seconds(device, facts) + backward.seconds(device, facts),
        flops=sum(facts.flops(n) for g in partition for n in g.graph.nodes),
    )


def _facts_of(partition: Partition, num_fwd_outputs: int, packs: int | None) -> Facts:
    """About the nodes of both graphs, with masks of at least ``packs`` bytes in bits."""
    masks = find_masks(partition, num_fwd_outputs, packs) if packs is not None else ()
    sizes = {view_base(n): packed_bytes(mask) for mask, given in masks for n in (mask, given)}
    return Facts().resized(sizes) if sizes else Facts()


def peak_place(
    partition: Partition,
    num_fwd_outputs: int,
    weights: Collection[str],
    options: MemoryOptions,
    packs: int | None = None,
) -> str:
    """Where the peak of :func:`predict` is, in words: "in the backward of blocks.1.up"."""
    places = []
    facts = _facts_of(partition, num_fwd_outputs, packs)
    for line, half in zip(_timelines(partition, num_fwd_outputs, weights, options, facts), ("forward", "backward")):
        for kernel, live, gradients in zip(line.kernels, line.live, line.resident):
            places.append((live - gradients, module_of(kernel.node), half))
    _, name, half = max(places, key=lambda place: place[0], default=(0, "", "forward"))
    return f"in the {half}{' of ' * bool(name)}{name}"


def _timelines(
    partition: Partition, num_fwd_outputs: int, weights: Collection[str], options: MemoryOptions, facts: Facts
) -> tuple[Timeline, Timeline]:
    """Of forward and backward."""
    forward, backward = (g.graph for g in partition)
    visible = _in_memory_of(_returned(forward, num_fwd_outputs), partition, num_fwd_outputs)
    donated = donated_tensors(partition, num_fwd_outputs)
    return (
        module_timeline(forward, weights, backward=False, facts=facts, options=options),
        module_timeline(
            backward, weights, backward=True, facts=facts, options=options, donated=donated, visible=visible
        ),
    )


def donated_tensors(partition: Partition, num_fwd_outputs: int) -> set[str]:
    """Names of the backward's inputs that are its own: saved tensors that share no memory with what the forward was given or
    returns to its caller. AOTAutograd donates these, and Inductor may write over them."""
    if not getattr(functorch_config, "donated_buffer", False):
        return set()
    forward, backward = (g.graph for g in partition)
    others = [*forward.find_nodes(op="placeholder"), *_returned(forward, num_fwd_outputs)]
    return {n.name for n in backward.nodes if is_saved(n)} - _in_memory_of(others, partition, num_fwd_outputs)


def _returned(forward: Graph, num_fwd_outputs: int) -> list[Node]:
    """What the forward gives its caller."""
    return [v for v in graph_outputs(forward)[:num_fwd_outputs] if isinstance(v, Node)]


def _in_memory_of(nodes: Iterable[Node], partition: Partition, num_fwd_outputs: int) -> set[str]:
    """Names of the backward's inputs that share memory with nodes of the forward."""
    forward, backward = partition
    taken = set(map(storage, nodes))
    pairs = zip(saved_tensors(forward, num_fwd_outputs), filter(is_saved, backward.graph.nodes))
    return {placeholder.name for node, placeholder in pairs if storage(node) in taken}


def roofline_of(graph: Graph) -> Roofline:
    """Of the device and precision in which the graph's largest product runs."""
    products = [n for n in graph.nodes if flops(n)]
    if not products:
        return roofline(torch.device("cpu"), torch.float32)
    # (a convolution's backward has several results, None for those that nobody asks for)
    value = next(t for t in tree_leaves(max(products, key=flops).meta["val"]) if isinstance(t, torch.Tensor))
    return roofline(value.device, value.dtype)


def make_planner(
    uncut: Uncut,
    saved: Collection[str],
    weights: Collection[str],
    fixed: Collection[str],
    device: Roofline,
    options: Callable[[bool], MemoryOptions],
    relaid: Collection[str] = (),
    packs: int | None = None,
) -> Planner:
    """A planner for a joint graph.

    Args:
        uncut: joint graph with its sampled sites late.
        saved: names of the tensors that a cut of it saves.
        weights: names of the parameters and buffers.
        fixed: names of the nodes that are recomputed in any case.
        device: for predicting times.
        options, packs: as for :class:`Planner`.
        relaid: names of those weights that the backward reads as copies.
    """
    weight_nodes = [n for n in primals(uncut.graph) if n.name in weights]
    return Planner(
        uncut.graph,
        uncut.num_fwd_outputs,
        find_segments(uncut.graph, uncut.num_fwd_outputs, weight_nodes),
        [n for n in uncut.graph.nodes if n.name in saved],
        [n for n in weight_nodes if n.name not in relaid],
        device,
        [n for n in uncut.graph.nodes if n.name in fixed],
        options,
        packs,
    )


@dataclass(frozen=True)
class Goal:
    """What ``memory_budget`` asks for: the fastest plan under a peak (bytes), or the least peak within a time (seconds)."""

    peak: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, config: Config, exact: Prediction) -> "Goal":
        """Shares are of the exact partition's peak; "auto" is within the exact partition's time."""
        budget = config.memory_budget
        assert budget is not None
        if budget == "auto":
            return cls(seconds=exact.seconds)
        return cls(peak=max(1, int(budget * exact.peak)) if isinstance(budget, float) else parse_bytes(budget))

    def plan(self, planner: Planner) -> Plan | None:
        """The plan asked for; None if there is none."""
        if self.peak == math.inf:
            return planner.least_peak(self.seconds)
        return planner.keep if planner.keep.peak <= self.peak else planner.fastest(int(self.peak))

    def best(self, found: Iterable[T], reached: Callable[[T], Prediction], noise: Callable[[T], float]) -> T:
        """The one of least rank; of those that serve the goal nearly as well, the one of least rounding noise."""
        ranks = [(self.rank(reached(f)), f) for f in found]
        least = min(rank[0] for rank, _ in ranks)
        met = [(rank, f) for rank, f in ranks if rank[0] == least]
        best = quietest(met, lambda ranked: ranked[0][1:], lambda ranked: noise(ranked[1]))
        assert best is not None
        return best[1]

    def rank(self, reached: "Prediction | Plan") -> tuple[float, float, float]:
        """What is better has a lower rank: by what the goal is missed; then what it asks to be least, and the other one."""
        peak, seconds = float(reached.peak), reached.seconds
        return max(0.0, self.missed_by(reached)), *((peak, seconds) if self.peak == math.inf else (seconds, peak))

    def missed_by(self, reached: "Prediction | Plan") -> float:
        """By which share of the goal something is above it; not positive where it is met."""
        return max(reached.peak / self.peak, reached.seconds / self.seconds) - 1

    def after(self, planned: Plan, reached: Prediction) -> "Goal":
        """What to plan for so that this goal is met, if results differ from plans by the factor by which ``reached`` differs
        from ``planned``. (A plan whose result has missed this goal misses the new one.)"""
        return Goal(self.peak * planned.peak / reached.peak, self.seconds * planned.seconds / reached.seconds)


def no_larger(reached: Prediction, exact: Prediction) -> bool:
    """Whether a partition takes no more memory than the exact one, as far as predictions can tell: at the peak of
    activations, and at that of all that the step allocates."""
    return reached.peak <= CLOSE * exact.peak and reached.allocated <= CLOSE * exact.allocated


def take_region_budget(graph: Graph, config: Config) -> Config:
    """Honour ``torch.autograd.graph.region_activation_memory_budget``: its share takes the place of ``memory_budget`` for a
    graph that was traced under it, and is planned for the peak. The annotations are removed: PyTorch's partitioner would
    follow them too, and refuses graphs in which not every node has one.

    Raises:
        ValueError: regions of one graph ask for different shares.
    """
    annotated = [n for n in graph.nodes if _REGION in (n.meta.get("custom") or {})]
    shares = sorted({n.meta["custom"][_REGION] for n in annotated})
    if len(shares) > 1:
        raise ValueError(
            f"region_activation_memory_budget: one graph has regions with {shares}, expected one value; separate them by a "
            "graph break (torch._dynamo.graph_break())."
        )
    for node in annotated:
        node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != _REGION}
    if not shares:
        return config
    if config.memory_budget not in (None, "auto"):
        warnings.warn(
            f"wtacrs: region_activation_memory_budget({shares[0]}) takes the place of memory_budget={config.memory_budget!r} "
            "for this graph; remove one of the two.",
            WtacrsWarning,
            stacklevel=2,
        )
    return replace(config, memory_budget=max(shares[0], MIN_SHARE))


def report_miss(reached: Prediction, held: int, place: str, exact: Prediction, config: Config, fixed: bool) -> None:
    """Say that the budget cannot be met, and what holds the memory.

    Args:
        reached: the least peak.
        held: bytes held between forward and backward then.
        place: where it is, as :func:`peak_place` says.
        exact: prediction for the exact partition.
        config: with the budget.
        fixed: whether regions that the user marked leave less to choose; then a plan above the budget is not an error.

    Raises:
        BudgetError: the budget is in bytes, and nothing but the budget is to blame.
    """
    budget = config.memory_budget
    message = (
        f"memory_budget={budget!r}: the least peak of activations that this graph can have is {format_bytes(reached.peak)} "
        f"({reached.peak / exact.peak:.2f} of the exact partition's {format_bytes(exact.peak)}), {place}; {format_bytes(held)} "
        "are held between forward and backward, the rest is what is computed there"
        + (", and regions of torch.utils.checkpoint leave less to choose." if fixed else ".")
    )
    if not isinstance(budget, float) and not fixed:
        raise BudgetError(f"{message} Raise the budget, or make the batch smaller.")
    warnings.warn(f"wtacrs: {message} This least peak is used.", WtacrsWarning, stacklevel=2)


def parts(plan: Plan, reasons: Sequence[str]) -> list[Part]:
    """The plan's choices for the ledger, each with its reason."""
    result = []
    for choice, reason in zip(plan.choices, reasons, strict=True):
        result.append(
            Part(
                name=choice.segment.name,
                decision="recompute" if choice.recomputed else "keep",
                kept=tuple(n.name for n in choice.kept),
                flops_added=sum(flops(n) for n in choice.recomputed & plan.again),
                reason=reason,
            )
        )
    return result

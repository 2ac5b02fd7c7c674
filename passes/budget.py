"""From the option ``memory_budget`` to nodes that the backward computes again."""

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.config import Config, parse_bytes
from wtacrs_fx.errors import BudgetError, WtacrsWarning
from wtacrs_fx.ledger import Part, Prediction, format_bytes
from wtacrs_fx.passes.cost import Roofline, flops, roofline
from wtacrs_fx.passes.liveness import Timeline, module_timeline
from wtacrs_fx.passes.planner import Choice, Plan, Planner
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.segments import find_segments
from wtacrs_fx.passes.sites import graph_outputs, primals

Partition = tuple[GraphModule, GraphModule]


@dataclass(frozen=True)
class Uncut:
    """A joint graph as it is given to the partitioner, and how many forward outputs it has then."""

    graph: Graph
    num_fwd_outputs: int


def predict(partition: Partition, num_fwd_outputs: int, weights: Collection[str], device: Roofline) -> Prediction:
    """Peak, time and FLOPs of a partition, from its two graphs."""
    forward, backward = timelines(partition, num_fwd_outputs, weights)
    return Prediction(
        peak=max(forward.peak, backward.activation_peak),
        allocated=max(forward.peak, backward.peak),
        seconds=forward.seconds(device) + backward.seconds(device),
        flops=sum(flops(n) for g in partition for n in g.graph.nodes),
    )


def timelines(
    partition: Partition, num_fwd_outputs: int, weights: Collection[str]
) -> tuple[Timeline, Timeline]:
    """Live bytes over the kernels of the forward and of the backward."""
    forward, backward = (p.graph for p in partition)
    outputs = [v for v in graph_outputs(forward) if isinstance(v, Node)]
    gradients = [v for v in graph_outputs(backward) if isinstance(v, Node)]
    return (
        module_timeline(forward, weights, outputs, backward=False),
        module_timeline(backward, weights, gradients, backward=True),
    )


def roofline_of(graph: Graph) -> Roofline:
    """Of the device and precision in which the graph's largest product runs."""
    products = [n for n in graph.nodes if flops(n)]
    if not products:
        return roofline(torch.device("cpu"), torch.float32)
    value = max(products, key=flops).meta["val"]
    value = value if isinstance(value, torch.Tensor) else value[0]
    return roofline(value.device, value.dtype)


def plan_recomputation(
    uncut: Uncut,
    saved: Collection[str],
    weights: Collection[str],
    exact: Prediction,
    fixed: Collection[str],
    config: Config,
    device: Roofline,
) -> Plan:
    """What to recompute so that the budget is met.

    Args:
        uncut: joint graph with its sampled sites late.
        saved: names of the tensors that a cut of it saves.
        weights: names of the parameters and buffers.
        exact: prediction for the exact partition.
        fixed: names of the nodes that are recomputed in any case.
        config: ``memory_budget``.
        device: for predicting times.

    Raises:
        BudgetError: the budget is in bytes, and no plan stays below it.
    """
    weight_nodes = [n for n in primals(uncut.graph) if n.name in weights]
    planner = Planner(
        uncut.graph,
        uncut.num_fwd_outputs,
        find_segments(uncut.graph, uncut.num_fwd_outputs, weight_nodes),
        [n for n in uncut.graph.nodes if n.name in saved],
        weight_nodes,
        device,
        [n for n in uncut.graph.nodes if n.name in fixed],
    )
    budget = config.memory_budget
    if budget == "auto":
        return planner.least_peak(exact.seconds)
    share = isinstance(budget, float)
    target = int(budget * exact.peak) if share else parse_bytes(budget)
    keep = planner.simulate([Choice(s) for s in planner.segments])
    if keep.peak <= target:
        return keep
    plan = planner.fastest(target)
    if plan is not None:
        return plan
    least = planner.least_peak(math.inf)
    message = (
        f"memory_budget={budget!r}: the least peak of activations that this graph can have is {format_bytes(least.peak)} "
        f"({least.peak / exact.peak:.2f} of the exact partition's {format_bytes(exact.peak)}); {format_bytes(least.held)} of it "
        f"are held between forward and backward, the rest is the working memory of one segment"
        + (", and regions of torch.utils.checkpoint leave less to choose." if fixed else ".")
    )
    if not share:
        raise BudgetError(f"{message} Raise the budget, or make the batch smaller.")
    warnings.warn(f"wtacrs: {message} This least peak is used.", WtacrsWarning, stacklevel=2)
    return least


def parts(plan: Plan) -> list[Part]:
    """The plan's choices for the ledger."""
    result = []
    for choice in plan.choices:
        segment = choice.segment
        result.append(
            Part(
                name=segment.name,
                decision="recompute" if choice.recomputed else "keep",
                kept=tuple(n.name for n in choice.kept),
                flops_added=sum(flops(n) for n in choice.recomputed),
                nodes=len(segment.nodes),
            )
        )
    return result


def handed_on(plan: Plan) -> dict[str, str]:
    """Names of the tensors that recomputation reads from memory -> why they are there."""
    kept = {view_base(n).name: "recomputation (kept)" for c in plan.choices for n in c.kept}
    between = {
        b.name: "recomputation of the next segment"
        for i, c in enumerate(plan.choices)
        for b, last in c.segment.handed_on.items()
        if any(later.recomputed for later in plan.choices[i + 1 : last + 1])
    }
    return {**kept, **between}


def names(nodes: Sequence[Node] | Collection[Node]) -> set[str]:
    return {n.name for n in nodes}

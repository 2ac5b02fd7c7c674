"""From the option ``memory_budget`` to nodes that the backward computes again."""

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule

from wtacrs_fx.config import Config, parse_bytes
from wtacrs_fx.errors import BudgetError, WtacrsWarning
from wtacrs_fx.ledger import Part, Prediction, format_bytes
from wtacrs_fx.passes.cost import Roofline, flops, roofline
from wtacrs_fx.passes.liveness import Facts, module_timeline
from wtacrs_fx.passes.planner import Plan, Planner
from wtacrs_fx.passes.segments import find_segments
from wtacrs_fx.passes.sites import primals

Partition = tuple[GraphModule, GraphModule]


@dataclass(frozen=True)
class Uncut:
    """A joint graph as it is given to the partitioner, and how many forward outputs it has then."""

    graph: Graph
    num_fwd_outputs: int


def predict(partition: Partition, weights: Collection[str], device: Roofline) -> Prediction:
    """Peak, time and FLOPs of a partition, from its two graphs."""
    facts = Facts()
    forward, backward = (
        module_timeline(g.graph, weights, backward=b, facts=facts) for g, b in zip(partition, (False, True))
    )
    return Prediction(
        peak=max(forward.peak, backward.activation_peak),
        allocated=max(forward.peak, backward.peak),
        seconds=forward.seconds(device, facts) + backward.seconds(device, facts),
        flops=sum(facts.flops(n) for g in partition for n in g.graph.nodes),
    )


def roofline_of(graph: Graph) -> Roofline:
    """Of the device and precision in which the graph's largest product runs."""
    products = [n for n in graph.nodes if flops(n)]
    if not products:
        return roofline(torch.device("cpu"), torch.float32)
    value = max(products, key=flops).meta["val"]
    value = value if isinstance(value, torch.Tensor) else value[0]
    return roofline(value.device, value.dtype)


def make_planner(
    uncut: Uncut, saved: Collection[str], weights: Collection[str], fixed: Collection[str], device: Roofline
) -> Planner:
    """A planner for a joint graph.

    Args:
        uncut: joint graph with its sampled sites late.
        saved: names of the tensors that a cut of it saves.
        weights: names of the parameters and buffers.
        fixed: names of the nodes that are recomputed in any case.
        device: for predicting times.
    """
    weight_nodes = [n for n in primals(uncut.graph) if n.name in weights]
    return Planner(
        uncut.graph,
        uncut.num_fwd_outputs,
        find_segments(uncut.graph, uncut.num_fwd_outputs, weight_nodes),
        [n for n in uncut.graph.nodes if n.name in saved],
        weight_nodes,
        device,
        [n for n in uncut.graph.nodes if n.name in fixed],
    )


def meet_budget(planner: Planner, exact: Prediction, config: Config) -> Plan:
    """What to recompute so that ``config.memory_budget`` is met.

    Raises:
        BudgetError: the budget is in bytes, and no plan stays below it.
    """
    budget = config.memory_budget
    if budget == "auto":
        return planner.least_peak(exact.seconds)
    assert budget is not None
    target = int(budget * exact.peak) if isinstance(budget, float) else parse_bytes(budget)
    plan = planner.keep if planner.keep.peak <= target else planner.fastest(target)
    if plan is not None:
        return plan
    least = planner.least_peak(math.inf)
    if least.peak <= target:
        return least
    message = (
        f"memory_budget={budget!r}: the least peak of activations that this graph can have is {format_bytes(least.peak)} "
        f"({least.peak / exact.peak:.2f} of the exact partition's {format_bytes(exact.peak)}); {format_bytes(least.held)} of "
        f"it are held between forward and backward, the rest is the working memory of one segment"
        + (", and regions of torch.utils.checkpoint leave less to choose." if planner.fixed else ".")
    )
    if not isinstance(budget, float):
        raise BudgetError(f"{message} Raise the budget, or make the batch smaller.")
    warnings.warn(f"wtacrs: {message} This least peak is used.", WtacrsWarning, stacklevel=2)
    return least


def parts(plan: Plan) -> list[Part]:
    """The plan's choices for the ledger."""
    result = []
    for choice in plan.choices:
        result.append(
            Part(
                name=choice.segment.name,
                decision="recompute" if choice.recomputed else "keep",
                kept=tuple(n.name for n in choice.kept),
                flops_added=sum(flops(n) for n in choice.recomputed & plan.again),
            )
        )
    return result

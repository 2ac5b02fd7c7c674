"""Rewrite a joint graph, cut it with torch's min-cut partitioner, keep what paid, and account for it."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, WtacrsWarning
from wtacrs_fx.ledger import Ledger, Prediction
from wtacrs_fx.passes.budget import Goal, take_region_budget
from wtacrs_fx.passes.joint_graph import copy_joint, cutter
from wtacrs_fx.passes.kinds import is_tangent
from wtacrs_fx.passes.meet_budget import meet_budget
from wtacrs_fx.passes.plans import Plan
from wtacrs_fx.passes.policy import decide
from wtacrs_fx.passes.summary import ledger_of
from wtacrs_fx.passes.work import Work
from wtacrs_fx.private import use_lazy_graph_module
from wtacrs_fx.roomy import collector_paused, roomy


@roomy
def partition(
    joint: GraphModule,
    joint_inputs: Any,
    *,
    config: Config,
    names: Sequence[str | None] = (),
    num_fwd_outputs: int,
    static_lifetime_input_indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[GraphModule, GraphModule, Ledger | None]:
    """Forward graph, backward graph and ledger of a joint graph.

    The exact partition is made for comparison. Then every admitted site is sampled late and the graph is cut: the backward
    now needs inputs at their kept rows only, and most can be computed from tensors saved for something else. Then it is
    decided what is recomputed (``memory_budget``, and the user's own checkpoint regions). Inputs that the cut saves for
    nothing but their own site become early sites, whose kept rows are smaller, and the graph is cut again. (A last cut
    is needed only if the backward turns out to hold such an input all the same.) Where nothing is rounded in the end, all
    this is done again without ``round_bits``, on a graph in which no products were formed for it.

    Args:
        joint, joint_inputs, num_fwd_outputs, static_lifetime_input_indices, kwargs: as AOTAutograd gives them to
            ``min_cut_rematerialization_partition``, to which they go on.
        config: what to sample, and the memory budget.
        names: per primal its parameter's name, where known.

    Returns:
        (forward, backward, ledger). A graph without tangents is partitioned exactly and has no ledger; nor has one whose
        backward has no matrix product at all, such as a loss behind a graph break.

    Raises:
        BudgetError: the memory budget is in bytes and cannot be met.
        ValueError: regions of one graph ask for different budgets.
    """
    config = take_region_budget(joint.graph, config)
    cut = cutter(joint_inputs, config, static_lifetime_input_indices, kwargs)
    if not any(is_tangent(n) for n in joint.graph.nodes):
        exact = cut(joint, num_fwd_outputs)
        for module in exact:
            module.recompile()
        return (*exact, None)
    with many_graphs():
        untouched = copy_joint(joint)[0] if config.round_bits else joint
        work = Work.prepare(joint, num_fwd_outputs, cut, config, names, static_lifetime_input_indices)
        work.run()
        if work.collapsed and not work.roundings:
            work = not_rounded(work, untouched, names, static_lifetime_input_indices)
    if not work.sites and not work.has_products:
        return (*work.best, None)
    return (*work.best, ledger_of(work))


def not_rounded(work: Work, joint: GraphModule, names: Sequence[str | None], static: Sequence[int] | None) -> Work:
    """In place of work that has rounded nothing: the same without ``round_bits``, so without products in another order. The
    same work if its budget is met with those only. What there is to warn of, it has warned of."""
    config = replace(work.config, round_bits=None)
    with warnings.catch_warnings(), contextlib.suppress(BudgetError):
        warnings.simplefilter("ignore", WtacrsWarning)
        exact = Work.prepare(joint, work.num_fwd_outputs, work.cut, config, names, static)
        exact.run()
        return exact
    return work


@contextlib.contextmanager
def many_graphs() -> Iterator[None]:
    """Make no code for modules that are never run, and pause Python's garbage collector."""
    with collector_paused(), use_lazy_graph_module(True):
        yield


@many_graphs()
def explore(
    joint: GraphModule,
    config: Config,
    points: int,
    *,
    joint_inputs: Any,
    names: Sequence[str | None] = (),
    num_fwd_outputs: int,
    static_lifetime_input_indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Prediction, list[tuple[str, Plan, bool]]]:
    """Plans of least predicted time for a range of peaks: (prediction of the exact partition, [(arm, plan, chosen)]). The plan
    that the options lead to is among them. Without a budget all that can be rounded is, which is none of them: none is
    chosen then. With "auto" the exact partition is, where finished ones need no less memory."""
    config = take_region_budget(joint.graph, config)
    planned = config.memory_budget is not None
    config = config if planned else replace(config, memory_budget=1.0)  # torch's own budget is off, nothing more
    cut = cutter(joint_inputs, config, static_lifetime_input_indices, kwargs)
    sampled = Work.prepare(joint, num_fwd_outputs, cut, config, names, static_lifetime_input_indices)
    exact = replace(sampled, plan=decide(sampled.sites, replace(config, ratio=1.0, row_bits=None)))
    sampled.cut_as_planned()
    exact.cut_as_planned()
    taken = meet_budget(sampled) if config.memory_budget == "auto" else None
    stays_exact = taken is not None and taken.recomputation is None
    result: list[tuple[str, Plan, bool]] = []
    for arm, work in (("exact", exact), ("sampled", sampled)):
        planner = work.planners()[0 if work is exact else -1]  # (the last one rounds)
        keep, least = planner.keep, planner.least_peak(math.inf)
        step = (keep.peak - least.peak) / max(1, points - 1)
        plans = [keep, *(planner.fastest(int(keep.peak - i * step)) for i in range(1, points - 1)), least]
        if work is exact:
            chosen = keep if stays_exact else None
        elif taken is not None:
            chosen = taken.recomputation
        elif planned:
            chosen = Goal.of(config, work.prediction).plan(planner) or least
        else:
            chosen = None if config.rounds else keep
        distinct = {p.peak: p for p in (*plans, chosen) if p is not None}
        result += [(arm, distinct[p], distinct[p] is chosen) for p in sorted(distinct, reverse=True)]
    return sampled.prediction, result

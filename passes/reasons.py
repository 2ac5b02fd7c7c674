"""Why a plan keeps or recomputes each segment of the forward, in words for the ledger."""

import math
from collections.abc import Sequence

from wtacrs_fx.passes.budget import Goal
from wtacrs_fx.passes.planner import SIZES, Planner
from wtacrs_fx.passes.plans import Choice, Costs, Plan, Table
from wtacrs_fx.units import format_bytes


def part_reasons(planner: Planner, plan: Plan, goal: Goal) -> list[str]:
    """One reason per choice of the plan, from what the planner knows of the segment's other choices. Times are given as shares
    of the predicted step: only ratios of predicted times mean anything."""
    if plan is planner.keep:
        if goal.peak == math.inf:
            reason = "no plan that recomputes something has a lower peak and is as fast as exact training"
        else:
            reason = "the budget is met without more" if plan.peak <= goal.peak else "no plan has a lower peak"
        return [reason] * len(plan.choices)
    table = _table_of(planner, plan)
    return [_reason(choice, row, plan, goal) for choice, row in zip(plan.choices, table)]


def reasons_for_more_bits(reasons: Sequence[str], plan: Plan, finer: Plan) -> list[str]:
    """The reasons of a plan for one with the same segments in which some tensors have more bits, or are kept as they are."""
    result = []
    for reason, before, after in zip(reasons, plan.choices, finer.choices):
        room = f"the budget has room for {'more bits' if after.rounded else 'all bits'}"
        if before.rounded != after.rounded:
            reason = f"{reason}; {room}" if before.recomputed or before.redrawn else room
        result.append(reason)
    return result


def _table_of(planner: Planner, plan: Plan) -> Table:
    """The table that the plan's choices come from: that with the same segments."""
    ends = [c.segment.nodes[-1] for c in plan.choices]
    tables = (planner.table(size) for size in SIZES if math.ceil(len(planner.segments) / size) == len(ends))
    return next(t for t in tables if [row[0][0].segment.nodes[-1] for row in t] == ends)


def _reason(choice: Choice, row: list[tuple[Choice, Costs]], plan: Plan, goal: Goal) -> str:
    costs = next(c for known, c in row if known == choice)  # (plans are made of the choices in the tables)
    kept = row[0][1]
    if choice.changes:
        share = _percent(max(0.0, costs.seconds - kept.seconds) / plan.seconds)
        ways = [
            "in few bits" * bool(choice.rounded),
            "random numbers drawn again" * bool(choice.redrawn),
            f"for {share} of the time" * bool(choice.recomputed or choice.redrawn),
        ]
        return (
            f"holds {format_bytes(costs.held)} in place of {format_bytes(kept.held)}, {', '.join(filter(None, ways))}"
        )
    least, other = min(
        ((c.held, c) for known, c in row if known.recomputed), key=lambda x: x[0], default=(kept.held, kept)
    )
    if least >= kept.held:
        return "recomputing it would free nothing"
    extra = max(0.0, other.seconds - kept.seconds)
    would = (
        f"recomputing it would free {format_bytes(kept.held - least)} for {_percent(extra / plan.seconds)} of the time"
    )
    if goal.peak < math.inf:
        return f"{would}; not needed for the budget"
    return f"{would}; " + ("more than is left" if plan.seconds + extra > goal.seconds else "the peak is elsewhere")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

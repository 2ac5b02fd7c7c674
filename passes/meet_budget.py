"""Find the partition that serves a memory budget: plan, cut, look at the result, and plan again where it misses."""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wtacrs_fx.passes.budget import NO_GAIN, Goal, no_larger, report_miss
from wtacrs_fx.passes.finer import finer
from wtacrs_fx.passes.planner import Planner
from wtacrs_fx.passes.plans import CLOSE, Plan
from wtacrs_fx.passes.policy import Action
from wtacrs_fx.passes.reasons import part_reasons, reasons_for_more_bits
from wtacrs_fx.passes.sample import Sampled

if TYPE_CHECKING:
    from wtacrs_fx.passes.work import Work

REPLANS = 3
"""How often the recomputation is planned at most where a finished partition misses the budget."""


def meet_budget(work: "Work") -> "Work":
    """Decide what is recomputed, and what is rounded.

    Returns: of the finished partitions, with rounding and without, the one that serves the budget best.

    Raises: BudgetError: the budget is in bytes and cannot be met. (A share that cannot be met is a warning.)
    """
    goal = Goal.of(work.config, work.prediction)
    planners = work.planners()
    plans = [goal.plan(p) for p in planners]
    able = [(p, plan) for p, plan in zip(planners, plans) if plan is not None]
    able = able or [(p, p.least_peak(math.inf)) for p in planners]
    # (what the second planner does not round, the first one has planned too)
    found = [finish(work, p, plan, goal) for i, (p, plan) in enumerate(able) if i == 0 or plan.rounded]
    lower = goal.peak == math.inf or goal.missed_by(found[0].predicted()) > 0
    if lower and work.config.rounds and not found[0].roundings:
        found.append(copy.copy(found[0]))  # what its plan leaves to save can still be rounded
        found[-1].round_saved()
    if goal.peak == math.inf and not any(no_larger(w.predicted(), work.prediction) for w in found):
        if planners[0].keep is not plans[0]:
            found.append(finish(work, planners[0], planners[0].keep, goal))
        found = [w for w in found if no_larger(w.predicted(), work.prediction)] or [exactly(work)]
    best = goal.best(found, lambda w: w.predicted(), lambda w: w.noise())
    if goal.missed_by(best.predicted()) > 0 and goal.peak < math.inf:
        report_miss(
            best.predicted(), best.held_bytes(), best.peak_place(), work.prediction, work.config, bool(work.users)
        )
    return best


def finish(work: "Work", planner: Planner, plan: Plan, goal: Goal) -> "Work":
    """Do as planned, cut, and look at the result, to which settled sites and the cut itself have added. Where it misses
    the budget, plan again for less, by as much as the result differs from its plan. Where it does not, see whether the budget
    leaves room for more bits."""
    least = planner.least_peak(math.inf)
    tried: list[tuple[float, Work]] = []
    for _ in range(REPLANS):
        attempt = carry_out(work, plan, part_reasons(planner, plan, goal))
        reached = attempt.predicted()
        tried.append((goal.missed_by(reached), attempt))
        if tried[-1][0] <= 0:
            return with_more_bits(work, planner, plan, attempt, goal)
        if plan is least:
            break
        plan = goal.after(plan, reached).plan(planner) or least
    return min(tried, key=lambda t: t[0])[1]


def carry_out(work: "Work", plan: Plan, reasons: Sequence[str]) -> "Work":
    """Cut as planned, for one reason per choice."""
    attempt = copy.copy(work)
    attempt.recompute_as(plan, reasons)
    attempt.settle_sites()
    if plan.rounded:
        attempt.round_saved({n.name: bits for n, bits in plan.rounded.items()})
    return attempt


def with_more_bits(work: "Work", planner: Planner, plan: Plan, attempt: "Work", goal: Goal) -> "Work":
    """The attempt at a plan that meets the budget; or one in which some tensors have more bits or are kept as they are, if
    that meets it too and is less noisy. What a budget asks to be least may become larger by :data:`CLOSE`."""
    if not plan.rounded:
        return attempt
    reached = attempt.predicted()
    limit = Goal(
        peak=goal.peak if goal.peak < math.inf else CLOSE * reached.peak,
        seconds=goal.seconds if goal.seconds < math.inf else CLOSE * reached.seconds,
    )
    planned = limit.after(plan, reached)
    quieter = finer(plan, lambda p: planned.missed_by(p) <= 0, planner.simulate)
    if quieter is plan:
        return attempt
    other = carry_out(work, quieter, reasons_for_more_bits(attempt.reasons, plan, quieter))
    before, after = ({r.tensor: r.form.bits for r in w.roundings} for w in (attempt, other))
    other.spared = sum(bits > before.get(t, bits) for t, bits in after.items()), len(before.keys() - after.keys())
    return other if limit.missed_by(other.predicted()) <= 0 and other.noise() < attempt.noise() else attempt


def exactly(work: "Work") -> "Work":
    """The exact partition, where every other one takes more."""
    exact = copy.copy(work)
    exact.plan = [d if d.action is Action.EXACT else d.to(Action.EXACT, NO_GAIN) for d in work.plan]
    if work.users:  # (torch's own partition would draw their dropout again, from a saved state of the generator)
        exact.cut_as_planned()
    else:
        exact.best, exact.known, exact.done = work.exact, (work.exact, work.prediction), Sampled()
    return exact

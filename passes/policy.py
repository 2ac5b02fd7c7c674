"""Decide: which sites are sampled, when, and how many rows they keep. Writes a plan and touches no graph."""

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch.fx import Node

from wtacrs_fx.config import Config
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.passes.sites import Site

MIN_LATE_WIDTH = 128
"""A late site reads H and G once more for their norms (2 FLOPs an element) to save ``1 - ratio`` of a product with
2 * width FLOPs an element. Products narrower than this on either side, such as LoRA's, stay exact when late."""

RATIO_STEPS = 1 << 20


class Action(Enum):
    """What happens at a site."""

    EARLY = "early"
    """Rows are chosen in the forward from activation norms; only they are saved. Saves bytes and FLOPs."""
    LATE = "late"
    """The input is in memory in the backward anyway; rows are chosen there by the true gradient. Saves FLOPs."""
    EXACT = "exact"


@dataclass(frozen=True)
class Decision:
    site: Site
    action: Action
    reason: str
    k: "int | torch.SymInt" = 0
    """Rows kept; 0 if exact."""
    group: tuple = ()
    """Sites of equal group read the same tensor; early ones share one draw."""


def decide(sites: Sequence[Site], config: Config) -> list[Decision]:
    """First plan: every site that the options admit is sampled early."""
    _warn_unmatched(sites, config)
    plan = []
    for site in sites:
        group = draw_group(site)
        reason = _why_exact(site, config)
        if reason:
            plan.append(Decision(site, Action.EXACT, reason, group=group))
        else:
            plan.append(Decision(site, Action.EARLY, "", rows_kept(site.activation.rows, config.ratio), group))
    return plan


def demote(
    plan: Sequence[Decision], when: Callable[[Decision], bool], reason: str, config: Config
) -> tuple[list[Decision], int]:
    """Early decisions for which ``when`` holds become late ones, or exact ones where late does not pay.

    Returns the new plan and how many decisions changed.
    """
    new, changed = [], 0
    for decision in plan:
        if decision.action is Action.EARLY and when(decision):
            changed += 1
            width = min(hint(decision.site.activation.width), hint(decision.site.gradient.width))
            if config.late == "exact":
                decision = replace(decision, action=Action.EXACT, k=0, reason=f"{reason}; late='exact'")
            elif width < MIN_LATE_WIDTH:
                narrow = f"{reason}; product narrower than {MIN_LATE_WIDTH}"
                decision = replace(decision, action=Action.EXACT, k=0, reason=narrow)
            else:
                decision = replace(decision, action=Action.LATE, reason=reason)
        new.append(decision)
    return new, changed


def rows_kept(rows: "int | torch.SymInt", ratio: float) -> "int | torch.SymInt":
    """``ceil(ratio * rows)``, for symbolic sizes too (the ratio is rounded to a multiple of 2^-20)."""
    return (rows * ratio_numerator(ratio) + (RATIO_STEPS - 1)) // RATIO_STEPS


def ratio_numerator(ratio: float) -> int:
    """``ratio`` in units of ``1 / RATIO_STEPS``, at least 1."""
    return max(1, round(ratio * RATIO_STEPS))


def draw_group(site: Site) -> tuple:
    """Key of the matrix whose rows are kept: the tensor behind views, and how it is read."""
    value, dim = site.activation.value, site.activation.dim
    return (view_base(site.activation.source), tuple(value.shape), tuple(value.stride()), dim)


def view_base(node: Node) -> Node:
    """The tensor that a node is a view of (the node itself if it is none)."""
    while node.op == "call_function" and _is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def hint(size: "int | torch.SymInt") -> int:
    """A size as an int, without a guard: the example's value where the size is symbolic."""
    if isinstance(size, torch.SymInt):
        example = size.node.hint
        return 4096 if example is None else int(example)
    return int(size)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    info = schema.arguments[0].alias_info
    return (info is not None and not info.is_write) or node.target is torch.ops.aten._unsafe_view.default


def _why_exact(site: Site, config: Config) -> str:
    rows, value = site.activation.rows, site.activation.value
    nbytes = hint(value.numel()) * value.dtype.itemsize
    matches = [p for p in config.exclude if fnmatch.fnmatchcase(site.module, p)]
    if matches:
        return f"excluded by {matches[0]!r}"
    if not any(fnmatch.fnmatchcase(site.module, p) for p in config.include):
        return "not in include"
    if config.ratio == 1:
        return "ratio 1 keeps every row"
    if hint(rows) < config.min_rows:
        return f"below min_rows ({hint(rows)} < {config.min_rows})"
    if nbytes < config.min_bytes:
        return f"below min_bytes ({nbytes} < {config.min_bytes})"
    if value.device.type == "meta":
        return "meta tensor"
    return ""


def _warn_unmatched(sites: Sequence[Site], config: Config) -> None:
    names = sorted({site.module for site in sites})
    unmatched = [p for p in config.include if not fnmatch.filter(names, p)]
    if names and unmatched:
        shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
        warnings.warn(
            f"wtacrs: include={unmatched!r} matches no linear layer of this graph, so nothing is sampled for it. "
            f"Available names: {shown}.",
            WtacrsWarning,
            stacklevel=2,
        )

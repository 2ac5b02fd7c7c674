"""Decide: which sites are sampled, when, and how many rows they keep. Writes a plan and touches no graph."""

import fnmatch
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.kinds import PINNED, Kind
from wtacrs_fx.passes.sites import Site
from wtacrs_fx.passes.sizes import hint, is_symbolic, is_unbacked
from wtacrs_fx.rounding import Format, written_bytes

aten, prims = torch.ops.aten, torch.ops.prims

MIN_LATE_WIDTH = 128
"""A late site reads H and G once more for their norms (2 FLOPs an element) to save ``1 - ratio`` of a product with
2 * width FLOPs an element. Where it saves no bytes either, a product narrower than this on one side (LoRA's) stays exact."""


ALL_ROWS = "ratio 1 keeps every row"
NO_RATIO = "ratio has no pattern for it"

REARRANGED = "wtacrs_rearranged"
"""Key in ``meta`` of a tensor that holds the numbers of another one in another order; the value is that node."""


class Action(Enum):
    """What happens at a site."""

    EARLY = "early"
    """Rows are chosen in the forward by activation norms; only they are saved. Saves bytes and FLOPs."""
    LATE = "late"
    """The input is in memory in the backward anyway, or computed there from what is: rows are chosen in the backward by
    the true gradient. Saves FLOPs, and the input's bytes where it is recomputed at the kept rows only."""
    EXACT = "exact"


@dataclass(frozen=True)
class Decision:
    """What to do at one site, and why."""

    site: Site
    action: Action
    reason: str = ""
    k: "int | torch.SymInt" = 0
    """Rows kept; 0 if exact."""
    group: tuple = ()
    """Sites of equal group read the same tensor; early ones share one draw."""
    ratio: float = 1.0
    """Share of rows kept."""
    form: Format | None = None
    """How kept rows are stored if they are chosen in the forward; None: as they are."""

    @property
    def base(self) -> Node:
        """The tensor that the input is a view of, or that it holds the numbers of in another order."""
        base = view_base(self.site.activation.source)
        return view_base(base.meta.get(REARRANGED, base))

    def to(self, action: Action, reason: str) -> "Decision":
        return replace(self, action=action, reason=reason, k=0 if action is Action.EXACT else self.k)


def decide(sites: Sequence[Site], config: Config) -> list[Decision]:
    """First plan: every site that the options admit is sampled, late if that is allowed, because a late site has the least
    noise and may cost no bytes at all; :func:`settle` turns those that do cost bytes into early ones. Attention's are early:
    a head is mostly too narrow for a late site, and what its operands are computed from is as large as they are."""
    plan = []
    for site in sites:
        first = Action.LATE if config.late == "sample" and not site.is_attention else Action.EARLY
        reason, group = _why_exact(site, config), draw_group(site)
        ratio = 1.0 if reason else config.ratio_of(site.module) or 1.0
        action = Action.EXACT if reason else first
        if action is Action.EARLY and not site.is_attention:
            reason = _early_reason(config)
        plan.append(Decision(site, action, reason, 0, group, ratio))
    return share_ratios(plan, config)


def share_ratios(plan: Sequence[Decision], config: Config) -> list[Decision]:
    """Rows kept. Sites of one group share one draw: its ratio is the largest of theirs; where that is 1 they stay exact."""
    ratios: dict[tuple, float] = {}
    for d in plan:
        if d.action is not Action.EXACT:
            ratios[d.group] = max(ratios.get(d.group, 0.0), d.ratio)
    new = []
    for d in plan:
        if d.action is not Action.EXACT and (ratio := ratios[d.group]) < 1:
            k, form = _rows_and_format(d.site, rows_kept(d.site.activation.rows, ratio), config)
            d = replace(d, ratio=ratio, k=k, form=form)
        elif d.action is not Action.EXACT:
            d = d.to(Action.EXACT, ALL_ROWS)
        new.append(d)
    return new


def _rows_and_format(site: Site, k: Any, config: Config) -> "tuple[int | torch.SymInt, Format | None]":
    form = row_format(site, k, config)
    if form is not None and not form.by_row:  # rows come out even on bytes
        missing = -k % (8 // form.bits)
        k += missing if k + missing <= site.activation.rows else 0
    return k, form


def row_format(site: Site, k: "int | torch.SymInt", config: Config) -> Format | None:
    """How k kept rows of a site are stored: in ``row_bits``, of attention's operands (small differences of large numbers) in
    twice as many; None, as they are, where that would take no fewer bytes or the sizes or the type are not fit for it."""
    value = site.activation.value
    narrow = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    width = site.activation.width
    if config.row_bits is None or not hint(k) or not narrow or any(map(is_unbacked, value.shape)):
        return None
    bits, by_row = min(8, 2 * config.row_bits) if site.is_attention else config.row_bits, is_symbolic((k, *value.shape))
    if not isinstance(width, int) or (by_row and width * bits % 8):
        return None
    form = Format(bits, scale_bits=16, by_row=by_row)
    shape = (hint(k), width)
    return form if written_bytes(shape, form) < shape[0] * shape[1] * value.dtype.itemsize else None


def settle(
    plan: Sequence[Decision],
    saved: Collection[str],
    needed: Mapping[Node, str],
    config: Config,
    recomputed: Collection[Node] = (),
) -> tuple[list[Decision], int]:
    """Late decisions after a cut with them, in the light of what that cut saves.

    An input that is not saved is computed again at the kept rows from tensors that are. One that is saved only for its
    own site becomes early: its kept rows are fewer bytes. One that something else needs stays late, or becomes exact where
    the product is too narrow to be worth a draw. So does one that is recomputed whole.

    Args:
        plan: decisions of the cut.
        saved: names of the tensors (view bases) it saves.
        needed: tensor -> the op of the backward that needs it whole, from :func:`needed_whole`.
        config: whether inputs that are in memory anyway are sampled.
        recomputed: nodes that the backward computes again.

    Returns: the new plan, and how many actions changed.
    """
    new = []
    for decision in plan:
        if decision.action is not Action.EXACT and decision.base in recomputed:
            decision = _in_memory(decision, "input recomputed with its segment", config)
        elif decision.action is Action.LATE:
            op = needed.get(decision.base)
            if decision.base.name not in saved:
                decision = decision.to(Action.LATE, "input recomputed at the kept rows")
            elif op is None:
                decision = decision.to(Action.EARLY, _early_reason(config))
            else:
                decision = _in_memory(decision, f"input also needed by {op}", config)
        new.append(decision)
    return new, sum(a.action is not b.action for a, b in zip(plan, new))


def retreat(plan: Sequence[Decision], in_backward: Collection[str], config: Config) -> tuple[list[Decision], int]:
    """Early decisions whose input the backward holds all the same: their rows are bytes for nothing. They become late,
    or exact if ``config.late`` says so or the product is narrow. Returns the new plan and how many actions changed."""
    new = []
    for decision in plan:
        if decision.action is Action.EARLY and decision.base.name in in_backward:
            decision = _in_memory(decision, "input saved anyway", config)
        new.append(decision)
    return new, sum(a.action is not b.action for a, b in zip(plan, new))


def _in_memory(decision: Decision, why: str, config: Config) -> Decision:
    """A site whose input the backward has in memory whole, so that sampling saves FLOPs only."""
    if config.late == "exact":
        return decision.to(Action.EXACT, f"{why}; late='exact'")
    if _is_narrow(decision.site):
        return decision.to(Action.EXACT, f"{why}; product narrower than {MIN_LATE_WIDTH}")
    return decision.to(Action.LATE, why)


def needed_whole(plan: Sequence[Decision], kinds: Mapping[Node, Kind]) -> dict[Node, str]:
    """Tensors behind sampled inputs that some other op of the backward reads directly -> that op's name."""
    products = {d.site.node for d in plan if d.action is not Action.EXACT}
    result = {}
    for base in {d.base for d in plan}:
        stack = [base]
        while stack:
            for user in stack.pop().users:
                if user.op == "output" or user in products:
                    continue
                if kinds[user] is Kind.GRADIENT:
                    result[base] = str(user.target)
                elif is_view(user):
                    stack.append(user)
    return result


def _is_narrow(site: Site) -> bool:
    return min(hint(site.activation.width), hint(site.gradient.width)) < MIN_LATE_WIDTH


def rows_kept(rows: "int | torch.SymInt", ratio: float) -> "int | torch.SymInt":
    """``ceil(ratio * rows)``, for symbolic sizes too."""
    return ceil_share(rows, ratio_fraction(ratio).as_integer_ratio())


def ceil_share(rows: "int | torch.SymInt", share: tuple[int, int]) -> "int | torch.SymInt":
    """``ceil(rows * a / b)`` for ``share = (a, b)``, in whole numbers."""
    return (rows * share[0] + share[1] - 1) // share[1]


def ratio_fraction(ratio: float) -> Fraction:
    """``ratio`` as a fraction of whole numbers (0.3 is 3/10) to one in a million; never 0."""
    return Fraction(ratio).limit_denominator(10**6) or Fraction(1, 10**6)


def draw_group(site: Site) -> tuple:
    """Key of the matrix whose rows are kept: the tensor behind views, and how it is read.

    Attention's sites have a draw each: the gradient of one may go into another, and an estimate used twice in a chain of
    products would be biased. Weight gradients end where they are.
    """
    value, dim = site.activation.value, site.activation.dim
    own = (site.node,) if site.is_attention else ()
    return (view_base(site.activation.source), tuple(map(str, value.shape)), tuple(map(str, value.stride())), dim, *own)


def view_base(node: Node) -> Node:
    """The tensor that a node is a view of (the node itself if it is none); also of one of several views (split)."""
    while node.op == "call_function" and isinstance(source := node.args[0] if node.args else None, Node):
        if not is_view(source if node.target is operator.getitem else node):
            break
        node = source
    return node


def is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    info = schema.arguments[0].alias_info
    return (info is not None and not info.is_write) or node.target is aten._unsafe_view.default or PINNED in node.meta


def _early_reason(config: Config) -> str:
    """What an early site's importance comes from, where that is not the input's norms alone."""
    return "" if config.norms == "activation" else f"norms: {config.norms_kind}"


def _why_exact(site: Site, config: Config) -> str:
    value = site.activation.value
    nbytes = hint(value.numel()) * value.dtype.itemsize
    if "wtacrs.keep_rows" in str(_producer(view_base(site.activation.source)).target):
        return "rows kept by rewrite()"
    if is_unbacked(site.activation.rows):  # as many rows as a router sends to an expert, perhaps none
        return "number of rows depends on data"
    reason = excluded(site.module, config) or too_small(hint(site.activation.rows), nbytes, config)
    return reason or ("meta tensor" if value.device.type == "meta" else "")


def _producer(node: Node) -> Node:
    """The op with several results that the node is one of, also behind a cast; else the node itself."""
    while node.target in (operator.getitem, prims.convert_element_type.default, aten._to_copy.default):
        node = node.all_input_nodes[0]
    return node


def excluded(module: str, config: Config) -> str:
    """Why the options leave a module exact whatever its size; empty if they do not."""
    matches = [p for p in config.exclude if fnmatch.fnmatchcase(module, p)]
    if matches:
        return f"excluded by {matches[0]!r}"
    if not any(fnmatch.fnmatchcase(module, p) for p in config.include):
        return "not in include"
    ratio = config.ratio_of(module)
    return NO_RATIO if ratio is None else ALL_ROWS if ratio == 1 else ""


def too_small(rows: int, nbytes: int, config: Config) -> str:
    """Why an input of so many rows and bytes stays exact; empty if it is sampled."""
    if rows < config.min_rows:
        return f"below min_rows ({rows} < {config.min_rows})"
    if nbytes < config.min_bytes:
        return f"below min_bytes ({nbytes} < {config.min_bytes})"
    return ""

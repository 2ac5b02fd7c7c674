"""What a ledger says beside its figures: what the bytes hold for, and what a user could change."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from wtacrs_fx.passes.account import size_notes
from wtacrs_fx.passes.policy import Decision
from wtacrs_fx.passes.sites import gradient_outputs, primals
from wtacrs_fx.passes.work import Work

CASTS = (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)
SHOWN = 6


def notes_of(work: Work) -> tuple[str, ...]:
    """The notes on a finished partition."""
    graph = work.joint.graph
    handed = set(gradient_outputs(graph, work.num_fwd_outputs, primals(graph)).values())
    measured = ("noise is measured in this version of the graph; the ledger of the next one has the ratios chosen",)
    first = measured if work.config.measures else ()
    crossed = crossing(work.plan, {n.name for n in handed})
    return (*first, *size_notes(graph), *crossed, *wasted_casts(work.plan), *spared(work))


def spared(work: Work) -> tuple[str, ...]:
    """Tensors for which the memory budget leaves more than the bits that were asked for."""
    more, whole = work.spared
    if not more and not whole:
        return ()
    return (
        f"the memory budget has room for more bits than {work.config.bits_asked} asks for: {more} rounded tensors have more, "
        f"{whole} are kept as they are",
    )


def crossing(plan: Sequence[Decision], with_gradient: set[str]) -> tuple[str, ...]:
    """Sites whose input is handed to the graph, and gets a gradient, by other code: over a graph break, or by a module that is
    compiled by itself. That code may hold the whole tensor for its own backward, and kept rows are then no bytes saved. (A
    batch has no gradient.)"""
    found = [d.site.module for d in plan if d.base.op == "placeholder" and d.base.name in with_gradient]
    if not found:
        return ()
    return (
        f"{_count(found, 'input')} made in front of this graph (over a graph break, or by another compiled module), where the "
        f"whole tensor may be held too: {_names(found)}",
    )


def wasted_casts(plan: Sequence[Decision]) -> tuple[str, ...]:
    """Sites that read a copy in more bytes of a tensor in a narrower type, as float32 adapters in a bfloat16 model do."""
    found: dict[tuple[str, str], list[str]] = {}
    for decision in plan:
        if types := _widened(decision.base):
            found.setdefault(types, []).append(decision.site.module)
    return tuple(
        f"{_count(modules, 'input')} copied from {narrow} to {wide}, twice the bytes: {_names(modules)}. Give these layers the "
        f"type of what they read (peft: autocast_adapter_dtype=False)"
        for (narrow, wide), modules in found.items()
    )


def _widened(base: Node) -> tuple[str, str] | None:
    if base.target not in CASTS:
        return None
    source, value = base.all_input_nodes[0].meta["val"], base.meta["val"]
    if not source.dtype.is_floating_point or source.dtype.itemsize >= value.dtype.itemsize:
        return None
    return str(source.dtype).removeprefix("torch."), str(value.dtype).removeprefix("torch.")


def _count(modules: Sequence[str], what: str) -> str:
    return f"{len(modules)} {what}{'s are' if len(modules) > 1 else ' is'}"


def _names(modules: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(modules))
    return ", ".join(distinct[:SHOWN]) + (f", ... ({len(distinct)} in all)" if len(distinct) > SHOWN else "")

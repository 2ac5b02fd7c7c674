"""Account for a partition: which storages are held between forward and backward, and what each site has to do with it."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from wtacrs_fx.ledger import Compressed, Entry, Ledger
from wtacrs_fx.passes.kernels import buffer_bytes
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.pack import Packed
from wtacrs_fx.passes.policy import Action, Decision, view_base
from wtacrs_fx.passes.round import Rounded, Rounding
from wtacrs_fx.passes.sample import Sampled
from wtacrs_fx.passes.saved import storage
from wtacrs_fx.passes.sever import saved_tensors
from wtacrs_fx.passes.sites import module_of, primals
from wtacrs_fx.passes.sizes import hint


def build_ledger(
    plan: Sequence[Decision],
    done: Sampled,
    exact: Sequence[Node],
    now: Sequence[Node],
    weights: Collection[str],
) -> Ledger:
    """The ledger of a plan. ``exact`` and ``now`` are the tensors that the forward hands to the backward without and with
    sampling."""
    exact_bytes, now_bytes = (_bytes_by_source(tensors, weights) for tensors in (exact, now))
    first_of: dict[tuple, str] = {}
    entries = []
    for decision in plan:
        site = decision.site
        source = decision.base.name
        taken_out = done.taken_out.get(decision.group, ())
        before, after, reason = exact_bytes.get(source, 0), now_bytes.get(source, 0), decision.reason
        if decision.group in first_of:  # bytes are counted once, at the first site
            before = after = 0
            shared = f"shared with {first_of[decision.group]}"
            reason = f"{shared}; {reason}" if reason.startswith("norms: ") else reason or shared
        elif decision.action is Action.LATE:
            after += sum(storages([done.norms[decision.group], *taken_out]).values())
        elif decision.action is Action.EARLY:
            kept = done.draws[decision.group]
            after = sum(storages((*kept.stored, kept.index, *taken_out)).values())
        first_of.setdefault(decision.group, site.module)
        rows = _size(site.activation.rows)
        entries.append(
            Entry(
                module=site.module,
                op=str(site.node.target),
                shape=tuple(_size(s) for s in site.activation.value.shape),
                dtype=str(site.activation.value.dtype).removeprefix("torch."),
                rows=rows,
                kept=rows if decision.action is Action.EXACT else _size(decision.k),
                bytes_exact=before,
                bytes_now=after,
                decision=decision.action.value,
                reason=reason,
                bits=decision.form.bits if decision.form and decision.action is Action.EARLY else None,
                flops_saved=_flops_saved(decision),
            )
        )
    return Ledger(tuple(entries), sum(storages(exact, weights).values()), sum(storages(now, weights).values()))


def _flops_saved(decision: Decision) -> int:
    """Of a product that is contracted over ``k`` rows only: two for every row left out and element of the result."""
    if decision.action is Action.EXACT:
        return 0
    left_out = hint(decision.site.activation.rows) - hint(decision.k)
    return 2 * left_out * math.prod(hint(s) for s in decision.site.node.meta["val"].shape)


def fused_entry(node: Node) -> Entry:
    """A line for fused attention, which has no products that could be sampled."""
    query = next((n for n in node.all_input_nodes if is_tensor(n)), node).meta["val"]
    return Entry(
        module=module_of(node),
        op=str(node.target),
        shape=tuple(_size(s) for s in query.shape),
        dtype=str(query.dtype).removeprefix("torch."),
        rows=_size(query.shape[-2]),
        kept=_size(query.shape[-2]),
        bytes_exact=0,
        bytes_now=0,
        decision="exact",
        reason="fused attention has no separate products",
    )


def packed_entries(packed: Iterable[Packed]) -> list[Compressed]:
    """Ledger lines of packed masks."""
    return [compressed_entry(p.mask, (p.packed,), 1, p.readers) for p in packed]


def rounded_entries(roundings: Iterable[Rounding], done: Rounded) -> list[Compressed]:
    """Ledger lines of rounded tensors."""
    return [
        compressed_entry(r.tensor, done.written[r.tensor], r.form.bits, [f.reader for f in r.factors])
        for r in roundings
    ]


def compressed_entry(tensor: Node, written: Iterable[Node], bits: int, readers: Iterable[Node]) -> Compressed:
    """Ledger line of a tensor that is handed on as ``written``."""
    value = tensor.meta["val"]
    return Compressed(
        tensor=tensor.name,
        module=module_of(tensor),
        op=operation_of(tensor),
        shape=tuple(_size(s) for s in value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        bits=bits,
        bytes_exact=buffer_bytes(tensor),
        bytes_now=sum(storages(written).values()),
        readers=tuple(dict.fromkeys(map(operation_of, readers))),
    )


def size_notes(graph: Graph) -> tuple[str, ...]:
    """For which values of symbolic sizes bytes are given, where a graph has any."""
    sizes = [n.meta["val"] for n in primals(graph) if isinstance(n.meta.get("val"), torch.SymInt)]
    values = {str(s): hint(s) for s in sizes if not str(s).isdigit()}
    return (f"bytes are those of {', '.join(f'{k}={v}' for k, v in values.items())}",) if values else ()


def operation_of(node: Node) -> str:
    """The operation that the user's code or autograd called, before it was decomposed."""
    return str(node.meta.get("original_aten") or node.target).removeprefix("aten.").partition(".")[0]


def saved_bytes(forward: GraphModule, num_fwd_outputs: int, weights: Collection[str]) -> int:
    """Bytes that autograd holds between forward and backward: distinct storages of saved tensors, weights left out."""
    return sum(storages(saved_tensors(forward, num_fwd_outputs), weights).values())


def storages(tensors: Iterable[Node], weights: Collection[str] = ()) -> dict[int, int]:
    """Distinct storages behind tensors: key -> bytes. Tensors that share memory with a placeholder named in ``weights``
    are left out, since parameters and buffers are in memory anyway. Symbolic sizes count at the example's value."""
    tensors = list(tensors)
    graph = tensors[0].graph if tensors else None
    skip = {storage(n) for n in graph.find_nodes(op="placeholder") if n.name in weights} if graph else set()
    return {storage(n): buffer_bytes(n) for n in tensors if storage(n) not in skip}


def _bytes_by_source(tensors: Sequence[Node], weights: Collection[str]) -> dict[str, int]:
    return {view_base(n).name: sum(storages([n], weights).values()) for n in tensors}


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)

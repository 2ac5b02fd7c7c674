"""List what two partitions of one graph hold for the backward, tensor by tensor, in the terms of the model's code."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from wtacrs_fx.ledger import Handed, Saved
from wtacrs_fx.passes.kernels import buffer_bytes
from wtacrs_fx.passes.kinds import is_tensor
from wtacrs_fx.passes.policy import Action, Decision, is_view, view_base
from wtacrs_fx.passes.sample import Sampled
from wtacrs_fx.passes.sever import is_saved, saved_tensors
from wtacrs_fx.passes.sites import clean_module_path

Partition = tuple[GraphModule, GraphModule]

draw_seed = torch.ops.wtacrs.draw_seed.default


@dataclass(frozen=True)
class Held:
    """A tensor in fewer bits: ``written`` is what the backward is given in its place."""

    tensor: Node
    bits: int
    written: Sequence[Node]
    readers: Sequence[Node]
    """Operations of the backward that read it, where they are known by their function in the forward."""


def saved_list(
    plan: Sequence[Decision],
    done: Sampled,
    exact: Partition,
    partition: Partition,
    num_fwd_outputs: int,
    weights: Collection[str],
    compressed: Sequence[Held],
    relieved: Collection[str] = (),
) -> tuple[list[Saved], list[Handed]]:
    """Everything that either partition holds, in the order of the forward; and what ``partition`` hands to its backward, in the
    order in which it does. The kept rows of a tensor count as the tensor, and so do its codes and scales, or packed bits.
    Tensors named in ``relieved`` are not needed because others, computed from them, are ``compressed``.

    A storage counts once, at the first of the tensors that share it, so that the sums are those of
    :func:`wtacrs_fx.passes.account.saved_bytes`.
    """
    fewer = {view_base(c.tensor).name: c for c in compressed}
    whole = {name: view_base(c.tensor) for name, c in fewer.items()} | {d.base.name: d.base for d in plan}
    owner = {n.name: view_base(c.tensor).name for c in compressed for n in c.written}  # (of one tensor several views)
    owner |= {n.name: base for n, base in _stand_ins(plan, done)}
    sampled = set(owner.values())
    products = {d.site.node.name for d in plan}
    rows: dict[str, Saved] = {}
    names = dict.fromkeys(n.name for forward, _ in (exact, partition) for n in forward.graph.nodes)
    order = {name: i for i, name in enumerate(names)}
    handed: list[tuple[Node, str, int]] = []
    for (forward, backward), field in ((exact, "bytes_exact"), (partition, "bytes_now")):
        handed.clear()  # (what the second one, the partition itself, hands over is left)
        for node, placeholder, nbytes in _storages(forward, backward, num_fwd_outputs, weights):
            base = view_base(node)
            name = owner.get(placeholder.name, base.name)
            handed.append((node, "" if nbytes is None else name, nbytes or 0))
            if nbytes is None:
                continue
            order.setdefault(name, order[node.name])  # (a derivative has another name in the forward)
            row = rows.get(name) or _describe(whole.get(name, base))
            if field == "bytes_exact" or not row.bytes_exact:
                needed = dict.fromkeys((*row.needed_by, *_readers(placeholder, products)))
                row = replace(row, needed_by=() if name in sampled and field == "bytes_now" else tuple(needed))
            rows[name] = replace(row, **{field: getattr(row, field) + nbytes})
    decisions = {d.base.name: d for d in sorted(plan, key=lambda d: d.action is not Action.EXACT)}
    named = sorted(rows.items(), key=lambda item: order[item[0]])
    listed = {
        name: _judge(row, decisions.get(name), fewer.get(name), name in relieved)
        for name, row in named
        if row.bytes_exact or row.bytes_now
    }
    lines = {name: i for i, name in enumerate(listed)}
    sites = {d.base.name: d.site.module for d in reversed(plan)}
    return [*listed.values()], [
        Handed(lines.get(name, -1), sites.get(name, ""), _shape(node), _dtype(node), nbytes)
        for node, name, nbytes in handed
    ]


def _stand_ins(plan: Sequence[Decision], done: Sampled) -> Iterator[tuple[Node, str]]:
    """What is held in place of a sampled input or for it -> the input's name."""
    for d in plan:
        if d.action is Action.EARLY:
            kept = done.draws[d.group]
            yield from ((n, d.base.name) for n in (*kept.stored, kept.index))
        elif d.action is Action.LATE:
            yield done.norms[d.group], d.base.name
        if d.action is not Action.EXACT:
            yield from ((n, d.base.name) for n in done.taken_out.get(d.group, ()))


def _storages(
    forward: GraphModule, backward: GraphModule, num_fwd_outputs: int, weights: Collection[str]
) -> Iterator[tuple[Node, Node, int | None]]:
    """Saved tensors: in the forward, in the backward, and the bytes of their storages, 0 where an earlier one shares it, None
    where it is a weight's."""
    seen = {storage(n) for n in forward.graph.find_nodes(op="placeholder") if n.name in weights}
    skip = frozenset(seen)
    for node, placeholder in zip(saved_tensors(forward, num_fwd_outputs), filter(is_saved, backward.graph.nodes)):
        if storage(node) in skip:
            yield node, placeholder, None
        else:
            yield node, placeholder, 0 if storage(node) in seen else buffer_bytes(node)
            seen.add(storage(node))


def storage(node: Node) -> int:
    """Which memory the node's tensor is in; -1 if it is no tensor."""
    return node.meta["val"].untyped_storage()._cdata if is_tensor(node) else -1


def _describe(node: Node) -> Saved:
    return Saved(
        module="" if node.op == "placeholder" or node.target is draw_seed else _module(node),
        op="batch" if node.op == "placeholder" else "draw_seed" if node.target is draw_seed else _function(node),
        shape=_shape(node),
        dtype=_dtype(node),
    )


def _shape(node: Node) -> tuple[int | str, ...]:
    return tuple(s if isinstance(s, int) else str(s) for s in node.meta["val"].shape)


def _dtype(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _judge(row: Saved, decision: Decision | None, held: Held | None, relieved: bool) -> Saved:
    """The row with what was decided about it, or what the partition has made of it."""
    if held is not None:
        row = replace(row, needed_by=tuple(dict.fromkeys(map(_function, held.readers))) or row.needed_by)
    if decision is None or decision.action is Action.EXACT:
        reason = decision.reason if decision else ""
        if row.op == "draw_seed":
            reason = "what the rows' draws start from"
        elif held is not None:
            reason = f"held in {held.bits} bit{'s' * (held.bits > 1)}"
        elif not row.bytes_now and relieved:
            reason = "what is computed from it is held in fewer bits"
        elif not row.bytes_now:
            reason = "computed again in the backward"
        elif not row.bytes_exact:
            reason = "saved to compute others again"
        return replace(row, decision="exact" if decision else "", reason=reason)
    rows = decision.site.activation.rows
    bits = f", in {decision.form.bits} bits" if decision.action is Action.EARLY and decision.form else ""
    reason = decision.reason or f"chosen in the forward, only these rows are kept{bits}"
    return replace(row, kept=f"{decision.k}/{rows}", decision=decision.action.value, reason=reason)


def _readers(placeholder: Node, products: Collection[str]) -> list[str]:
    """Functions of the forward whose backward reads a tensor, weight-gradient products left out."""
    found, stack = [], [placeholder]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and is_view(user):
                stack.append(user)
            elif user.op == "call_function" and user.name not in products:
                found.append(_function(user))
    return found


def _function(node: Node) -> str:
    """The function or module type of the user's code that a node is part of: "gelu", "LayerNorm"."""
    stack = node.meta.get("fwd_source_fn_stack") or node.meta.get("source_fn_stack")
    target = stack[-1][1] if stack else node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _module(node: Node) -> str:
    """Path of the module whose forward computes a node (empty for the root); that of its first input where a pass has made
    the node."""
    found: Node | None = node
    while found is not None:
        stack = found.meta.get("nn_module_stack") or found.meta.get("fwd_nn_module_stack")
        if stack:
            return clean_module_path(next(reversed(stack.values()))[0])
        if found.meta.get("source_fn_stack"):
            return ""
        found = next((n for n in found.all_input_nodes if n.op == "call_function"), None)
    return ""

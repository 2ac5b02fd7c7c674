"""Decide: which tensors are rounded, to how many bits, and which roundings were worth it. Touches no graph."""

import fnmatch
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.factors import Factor, Shared, ancestry, is_cheap
from wtacrs_fx.passes.kernels import buffer_bytes, is_library_call
from wtacrs_fx.passes.kinds import Kind, draws
from wtacrs_fx.passes.policy import ALL_ROWS, Action, Decision, view_base
from wtacrs_fx.passes.round import Rounding
from wtacrs_fx.passes.sites import module_of
from wtacrs_fx.passes.sizes import hint, is_symbolic
from wtacrs_fx.private import OpOverload
from wtacrs_fx.rounding import BITS, GROUP, Format

aten = torch.ops.aten

_RANGES: Mapping[OpOverload, tuple[float, float]] = {
    aten.gelu_backward.default: (-0.1291, 1.1291),
    aten.tanh_backward.default: (0.0, 1.0),
    aten.sigmoid_backward.default: (0.0, 0.25),
}
"""Ranges of derivatives, rounded outwards. (gelu'(x) is largest at sqrt 2: 1.12890.)"""


@dataclass(frozen=True)
class Substitute:
    """A tensor that can be held in few bits, in the place of what the backward computes it from."""

    tensor: Node
    bytes: int
    """Of codes and scales."""
    replaced: frozenset[Node]
    """Linear functions of the tensor that the backward then computes from the codes."""
    sources: frozenset[Node]
    """Saved tensors that the backward computes its factors from without."""
    noise: float = 0.0
    """As of :class:`wtacrs_fx.passes.round.Rounding`."""
    bits: int = 8
    finer: "Substitute | None" = None
    """The same in twice the bits, if those are possible and take less than the tensor."""


def substitutes(
    roundings: Iterable[Rounding], saved: Collection[str], kinds: Mapping[Node, Kind], nodes: Mapping[str, Node]
) -> list[Substitute]:
    """Roundings as a planner of the memory sees them.

    Args:
        roundings, saved: as for :func:`worthwhile`.
        kinds: of the roundings' graph.
        nodes: of the planner's graph, by name.
    """
    result = []
    for r in roundings:
        lineages = [ancestry(f.operand, kinds) for f in r.factors]
        replaced = {n for lineage in lineages for n in lineage[: lineage.index(r.tensor)]}
        here, before = (
            frozenset(nodes[n.name] for n in found if n.name in nodes) for found in (replaced, sources(r, saved))
        )
        if r.tensor.name in nodes:
            result.append(_substitute(r, nodes[r.tensor.name], here, before))
    return result


def _substitute(rounding: Rounding, tensor: Node, replaced: frozenset[Node], before: frozenset[Node]) -> Substitute:
    bits, finer = rounding.form.bits, None
    if 2 * bits in BITS and rounding.at(2 * bits).bytes < buffer_bytes(tensor):
        finer = _substitute(rounding.at(2 * bits), tensor, replaced, before)
    return Substitute(tensor, rounding.bytes, replaced, before, rounding.noise, bits, finer)


def rows_or_bits(plan: Sequence[Decision], config: Config) -> list[Decision]:
    """Early sites whose kept rows take more bytes than all rows in few bits become late ones, which read all rows rounded
    and choose by the true gradient. The others stay early."""
    new = []
    for d in plan:
        kept = (d.form.bits if d.form else 8 * d.site.activation.value.dtype.itemsize) * d.ratio
        rounded = bits_asked(d.site.module, config)
        cheaper = d.action is Action.EARLY and rounded is not None and rounded < kept and config.late == "sample"
        new.append(d.to(Action.LATE, "") if cheaper else d)
    return new


def decide_roundings(
    shared: Iterable[Shared], plan: Iterable[Decision], saved: Collection[str], exact: Collection[Node], config: Config
) -> list[Rounding]:
    """Every tensor that the options admit and that would relieve the backward of a saved one.

    Args:
        shared: from :func:`wtacrs_fx.passes.factors.share`.
        plan: early sites keep rows, and their products read nothing else.
        saved: names of the tensors (view bases) that the partition without rounding saves.
        exact: nodes that stay exact (recomputed ones).
        config: bits, patterns, smallest size. Where readers of one tensor ask for different bits, it gets the most.
    """
    plan = list(plan)
    early = {d.site.node for d in plan if d.action is Action.EARLY}
    whole = {d.site.node for d in plan if d.reason == ALL_ROWS and hint(d.site.activation.rows) >= config.min_rows}
    rows = dict.fromkeys(whole, config.row_bits) if config.all_rows_in_bits else {}
    result = []
    for s in shared:
        asked = {
            f: rows.get(f.reader) or bits_asked(module_of(f.reader), config) for f in s.factors if f.reader not in early
        }
        bits = {f: b for f, b in asked.items() if b}
        if not bits:
            continue
        read = replace(s, factors=tuple(bits))  # (the other factors stay as they are)
        form = replace(_form(read, max(bits.values())), by_row=is_symbolic(s.tensor.meta["val"].shape))
        rounding = Rounding(s.tensor, read.factors, form)
        value, before = s.tensor.meta["val"], buffer_bytes(s.tensor)
        if s.tensor in exact or before < config.min_bytes or rounding.bytes > before:
            continue
        if value.device.type != "meta" and not is_cheap(s.tensor, hint(value.numel())) and sources(rounding, saved):
            result.append(rounding)
    return result


def worthwhile(
    roundings: Sequence[Rounding],
    before: Collection[str],
    after: Collection[str],
    size: Callable[[Node], int] = buffer_bytes,
) -> list[Rounding]:
    """Those that relieve the backward of more bytes than they add. Roundings that relieve it of the same tensor are judged
    together.

    Args:
        roundings: what was tried.
        before, after: names of the tensors (view bases) saved without them and with them.
        size: of a saved tensor in bytes.
    """
    kept = paying([(r.tensor, r.bytes, sources(r, before)) for r in roundings], after, size)
    return [r for r in roundings if r.tensor in kept]


def paying(
    tried: Iterable[tuple[Node, int, Collection[Node]]],
    after: Collection[str],
    size: Callable[[Node], int] = buffer_bytes,
) -> set[Node]:
    """As :func:`worthwhile`, for (tensor, bytes added, tensors that it may relieve the backward of)."""
    groups: list[tuple[list[tuple[Node, int]], set[Node]]] = []
    for tensor, added, relieved in tried:
        members, found = [(tensor, added)], set(relieved)
        for group in [g for g in groups if g[1] & found]:
            groups.remove(group)
            members, found = group[0] + members, group[1] | found
        groups.append((members, found))
    kept: set[Node] = set()
    for members, found in groups:
        if sum(added for _, added in members) < sum(size(n) for n in found if n.name not in after):
            kept |= {tensor for tensor, _ in members}
    return kept


def sources(rounding: Rounding, saved: Collection[str]) -> set[Node]:
    """The saved tensors that the backward computes the factors from without rounding, inputs of the graph left out."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [f.operand for f in rounding.factors]
    while stack:
        base = view_base(stack.pop())
        if base in seen or base.op != "call_function":
            continue
        seen.add(base)
        if base.name in saved:
            found.add(base)
        elif not draws(base) and not is_library_call(base):
            stack += base.all_input_nodes
    return found


def name_bits(plan: Sequence[Decision], roundings: Sequence[Rounding]) -> list[Decision]:
    """The plan with its reasons: which sites read rounded inputs."""
    bits = {f.reader: r.form.bits for r in roundings for f in r.factors}
    return [replace(d, reason=f"input kept in {bits[d.site.node]} bits") if d.site.node in bits else d for d in plan]


def rounds_for(reader: Node, config: Config) -> bool:
    """Whether what the node reads in the backward is to be rounded."""
    return bits_asked(module_of(reader), config) is not None


def bits_asked(module: str, config: Config) -> int | None:
    """That the options ask for where a module's backward reads. None: what it reads stays exact."""
    if any(fnmatch.fnmatchcase(module, p) for p in config.round_exclude):
        return None
    return config.bits_of(module) if any(fnmatch.fnmatchcase(module, p) for p in config.round_include) else None


def _form(shared: Shared, bits: int) -> Format:
    """Twice the bits for attention's operands and its result, whose gradients are small differences of large numbers, and for
    what is normalised: two D-wide tensors of a transformer's layer, of twelve or more, which every gradient before it passes.
    (At 4 bits that costs 0.015 of exact training's bytes in a BERT of two layers, and the squared error of its gradients falls
    to an eighth.) Scales have 16 bits: at 8 bits that is 3 % less to hold than with 32, and 2 % more noise. They are of half as
    many neighbours where few bits are asked for: the noise of a gated unit's product falls by a third, since its outliers spoil
    fewer values, of normal numbers by a sixth; at 8 bits only for what is normalised. Of known range where the tensor is a bare
    derivative: the factor of a product of the same operation's backward."""
    group = GROUP if bits == 8 else GROUP // 2
    normalised = any(map(_is_normalised, shared.factors))
    if normalised or _is_attention(shared.root) or any(_is_attention(f.reader) for f in shared.factors):
        group = GROUP // 2 if normalised else group
        return Format(min(8, 2 * bits), scale_bits=16, group=group)
    form = Format(bits, scale_bits=16, group=group)
    operation = shared.tensor.meta.get("original_aten")
    limits = _RANGES.get(operation) if operation else None
    if limits is None or shared.tensor.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        return form
    for factor in shared.factors:
        whole = factor.operand is shared.tensor and factor.reader.target is aten.mul.Tensor
        if not whole or factor.reader.meta.get("original_aten") is not operation:
            return form
    return Format(form.bits, *limits)


def _is_normalised(factor: Factor) -> bool:
    """Whether the product with the gradient is summed along the row: the gradient of a statistic of it, as LayerNorm and
    RMSNorm have it. (GroupNorm's sum is over a view, and what it reads is not normalised yet.)"""
    last = factor.operand.meta["val"].dim() - 1

    def sums_the_row(node: Node) -> bool:
        dims: Any = node.args[1] if node.target is aten.sum.dim_IntList else ()
        return any(dim in (-1, last) for dim in dims or ())

    return factor.reader.target is aten.mul.Tensor and any(map(sums_the_row, factor.reader.users))


def _is_attention(node: Node) -> bool:
    """Whether the node is a product or the backward of attention, or a result of fused attention."""
    source = node.args[0] if node.target is operator.getitem else node
    target = source.target if isinstance(source, Node) else None
    return target is aten.bmm.default or "scaled_dot_product" in str(target)

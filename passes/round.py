"""Act: let the backward read rounded tensors.

Before (gelu_grad is computed in the backward from x, which is saved)::

    mul: f32[B, T, D] = g * gelu_grad

After::

    (forward)   codes: u8[B T, D], low: f32[B, T, 1], step: f32[B, T, 1] = quantise(gelu_grad, numbers)
    (backward)  mul: f32[B, T, D] = g * (low + step * codes)

The rounded tensors are computed in the forward and handed to the backward by construction (``sever``), so that a draw is never
made twice. What the tensor is computed from is then not needed any more, and the partitioner does not save it.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Graph, Node

from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.emit import Emitter, memory_order
from wtacrs_fx.passes.factors import Factor, linear_source
from wtacrs_fx.passes.kinds import Kind, is_tangent
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.rounding import Format, dequantise, number_count, quantise, written_bytes

wtacrs = torch.ops.wtacrs

ROUNDED, CODES = "wtacrs_rounded", "wtacrs_codes"
"""Marks (in ``meta``) of a forward's nodes: of a tensor that is rounded, its name; of what is made of it, a :class:`Codes`."""


@dataclass(frozen=True)
class Codes:
    """What a node is one part of: the codes and scales of a rounded tensor."""

    tensor: str
    part: int
    parts: int
    order: list[int]
    form: Format

    def decode(self, written: Sequence[Tensor], like: Tensor) -> Tensor:
        """The rounded tensor, of the shape and type of ``like``."""
        return decode(written, like, self.order, self.form)


@dataclass(frozen=True)
class Rounding:
    """A tensor that is rounded, and the factors that are computed from it in the backward."""

    tensor: Node
    factors: tuple[Factor, ...]
    form: Format

    @property
    def order(self) -> list[int]:
        """Dimensions in the order in which they are written."""
        return memory_order(self.tensor.meta["val"])

    @property
    def shape(self) -> list[int]:
        """Sizes in this order, of the example where they are symbolic."""
        return [hint(self.tensor.meta["val"].shape[d]) for d in self.order]

    @property
    def bytes(self) -> int:
        """Of codes and scales."""
        return written_bytes(self.shape, self.form)

    @property
    def noise(self) -> float:
        """Mean squared error of the tensor, summed over its elements, in squares of its range."""
        return math.prod(self.shape) * self.form.noise

    def at(self, bits: int) -> "Rounding":
        """The same in other bits."""
        return replace(self, form=replace(self.form, bits=bits))

    def without(self, readers: Collection[Node]) -> "Rounding":
        """The same for other readers only."""
        return replace(self, factors=tuple(f for f in self.factors if f.reader not in readers))


@dataclass
class Rounded:
    """What :func:`round_factors` did."""

    written: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    """Rounded tensor of the original graph -> placeholders (codes, scales) that the backward reads."""
    stands_for: dict[Node, Node] = field(default_factory=dict)
    """Tensor of the rewritten graph -> what the backward has in its place."""


def round_factors(
    graph: Graph, roundings: Iterable[Rounding], env: Mapping[Node, Node], kinds: Mapping[Node, Kind], draws: Draws
) -> Rounded:
    """Rewrite the factors of every rounding; without any the graph stays as it is.

    Args:
        graph: joint graph to change.
        roundings: of tensors of the original graph.
        env: node of the original graph -> node of ``graph``.
        kinds: of the original graph.
        draws: seed and severed tensors of ``graph``.
    """
    done = Rounded()
    for rounding in roundings:
        tensor = _compute_early(graph, env[rounding.tensor], draws)
        written = _write(graph, tensor, rounding, draws)
        done.written[rounding.tensor] = written
        stands_for = {rounding.tensor: _read(graph, env, rounding, written)}
        for factor in rounding.factors:
            reader = env[factor.reader]
            with graph.inserting_before(reader):
                reader.replace_input_with(env[factor.operand], _replay(graph, factor.operand, stands_for, env, kinds))
        done.stands_for |= {env[n]: stand_in for n, stand_in in stands_for.items()}
    return done


def _compute_early(graph: Graph, tensor: Node, draws: Draws) -> Node:
    """The tensor, computed as soon as its inputs are there. (A derivative stands in the backward's part of the joint graph;
    what it is computed from would be in memory until the forward has finished.)"""
    position = {n: i for i, n in enumerate(graph.nodes)}
    first_gradient = min(position[u] for n in graph.find_nodes(op="placeholder") if is_tangent(n) for u in n.users)
    late: set[Node] = set()
    stack = [tensor]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and position[node] > first_gradient and node not in late:
            late.add(node)
            stack += node.all_input_nodes
    copies: dict[Node, Node] = {}
    for node in sorted(late, key=position.__getitem__):
        inputs = [copies.get(n, n) for n in node.all_input_nodes]
        last = max((n for n in inputs if n.op != "placeholder"), default=None)
        with graph.inserting_before(draws.start) if last is None else graph.inserting_after(last):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node].meta["partitioner_tag"] = "must_be_in_forward"
    return copies.get(tensor, tensor)


def _write(graph: Graph, tensor: Node, rounding: Rounding, draws: Draws) -> tuple[Node, ...]:
    """Codes and scales, made in the forward; returns the backward's."""

    with draws.behind(tensor):
        emit = Emitter(graph, tensor, tag="must_be_in_forward")
        written = codes(emit, tensor, rounding.order, rounding.form, draws)
    tensor.meta[ROUNDED] = rounding.tensor.name
    for i, node in enumerate(written):
        node.meta[CODES] = Codes(rounding.tensor.name, i, len(written), rounding.order, rounding.form)
    return tuple(draws.severed.cut(w) for w in written)


def _read(graph: Graph, env: Mapping[Node, Node], rounding: Rounding, written: Sequence[Node]) -> Node:
    """The rounded tensor, computed in the backward in front of its first reader."""
    with graph.inserting_before(min(env[f.reader] for f in rounding.factors)):
        emit = Emitter(graph, env[rounding.tensor], tag="must_be_in_backward")
        return read(emit, written, rounding.tensor.meta["val"], rounding.order, rounding.form)


def write(emit: Emitter, tensor: Node, order: list[int], form: Format, draws: Draws) -> tuple[Node, ...]:
    """Codes and scales of a tensor whose dimensions are written in this order, computed in the forward with numbers of
    their own; returns the backward's."""
    return tuple(draws.severed.cut(w) for w in codes(emit, tensor, order, form, draws))


def codes(emit: Emitter, tensor: Node, order: list[int], form: Format, draws: Draws) -> tuple[Node, ...]:
    """The same; returns the forward's."""

    stream = draws.stream()

    def function(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        x = x.permute(order)
        n = number_count(x.shape, by_row=form.by_row)
        return quantise(x, wtacrs.short_uniform(seed, stream, n), form)

    written: Sequence[Node] = emit.inline(function, tensor, draws.seed(tensor)[0])
    return tuple(written)


def read(emit: Emitter, written: Sequence[Node], like: Tensor, order: list[int], form: Format) -> Node:
    """The tensor that :func:`write` has written, with the shape and type of ``like``."""
    result: Node = emit.inline(lambda *written: decode(written, like, order, form), *written)
    return result


def decode(written: Sequence[Tensor], like: Tensor, order: Sequence[int], form: Format) -> Tensor:
    """The same, computed."""
    inverse = [order.index(d) for d in range(len(order))]
    return dequantise(written, [like.shape[d] for d in order], like.dtype, form).permute(inverse)


def _replay(
    graph: Graph, node: Node, stands_for: dict[Node, Node], env: Mapping[Node, Node], kinds: Mapping[Node, Kind]
) -> Node:
    """A linear function of a rounded tensor, computed from what stands for it."""
    if node not in stands_for:
        source = linear_source(node, kinds)
        assert source is not None, f"{node} is no linear function of a rounded tensor"
        replayed = _replay(graph, source, stands_for, env, kinds)
        copy = graph.node_copy(env[node], lambda n: replayed if n is env[source] else n)
        copy.meta["partitioner_tag"] = "must_be_in_backward"
        stands_for[node] = copy
    return stands_for[node]

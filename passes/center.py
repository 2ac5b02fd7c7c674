"""Act: take out of a layer's input what its rows have in common, so that only the rest is sampled.

The mean, with ``center_rows``::

                                                    mean: f32[1, D] = view.mean(0)
    sum_1: f32[M] = norms(view)              ->     sum_1: f32[M] = norms(view - mean)
    rows: f32[k, D] = view[index] * scale    ->     rows: f32[k, D] = (view[index] - mean) * scale
    mm: f32[O, D] = mm(g[index].T, rows)     ->     mm: f32[O, D] = mm(g[index].T, rows) + g.sum(0)[:, None] * mean

and r principal directions besides, with ``directions`` (:mod:`wtacrs_fx.directions`)::

    (forward)    basis: f32[r, D] = wtacrs.principal_directions(view, mean, mask, r)
                 codes: u8[r, M], scales = quantise(((view - mean) @ basis.T).T)
                 c: f32[M, r] = dequantise(codes, scales).T
                 rows: f32[k, D] = (view[index] - mean - c[index] @ basis) * scale
    (backward)   mm: f32[O, D] = mm(g[index].T, rows) + g.sum(0)[:, None] * mean + (g.T @ c) @ basis
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from wtacrs_fx.config import Config
from wtacrs_fx.directions import limit
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.norms import KnownRows
from wtacrs_fx.passes.policy import Decision
from wtacrs_fx.passes.round import codes, read
from wtacrs_fx.passes.rows import as_float32, center, contract, gather, like, other_dim, row_norms
from wtacrs_fx.rounding import Format

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs

FORM = Format(8, scale_bits=16)
"""Of coefficients: whatever rounding does to them is left to the rows that are sampled."""

LEAST_REST = 0.01
"""Share of a row's square that its rest counts for at least, since the difference of two squares is not exact: a row without
importance is never kept."""


@dataclass(frozen=True)
class Half:
    """What is taken out of one input, as the forward or the backward has it."""

    mean: Node
    """[1, D] or [D, 1], float32, as the input lies."""
    basis: Node | None = None
    """[r, D], float32."""
    written: tuple[Node, ...] = ()
    """Coefficients [r, M], in few bits or as they are."""
    value: Tensor | None = None
    """Shape of the coefficients, and the type in which they are read, that of the input."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of it."""
        return (self.mean, *(() if self.basis is None else (self.basis,)), *self.written)

    def coefficients(self, emit: Emitter) -> Node:
        """[M, r]."""
        assert self.value is not None
        rounded = len(self.written) > 1
        stored = read(emit, self.written, self.value, [0, 1], FORM) if rounded else self.written[0]
        return emit(aten.permute.default, stored, [1, 0])

    def rest(self, emit: Emitter, taken: Node, dim: int, rows: Node) -> Node:
        """Of gathered rows, float32."""
        rest = center(emit, taken, self.mean)
        if self.basis is None:
            return rest
        part = as_float32(emit, gather(emit, self.coefficients(emit), 0, rows))
        part = emit(aten.mm.default, part, self.basis)
        return emit(aten.sub.Tensor, rest, contract(emit, part, 0, to=dim))

    def exact(self, emit: Emitter, g: Node, g_dim: int, dim: int, activation_first: bool) -> Node:
        """``(sum_i g_i) mean^T + (sum_i g_i a_i) B``, [O, D], or [D, O] where the activation comes first; float32."""
        total = emit(aten.sum.dim_IntList, as_float32(emit, g), [g_dim], True)
        first = int(activation_first)  # [D, O]: the mean is a column
        mean, total = contract(emit, self.mean, dim, to=first), contract(emit, total, g_dim, to=1 - first)
        part = emit(aten.mul.Tensor, mean, total)
        if self.basis is None:
            return part
        sums = emit(aten.mm.default, contract(emit, g, g_dim, to=1), like(emit, self.coefficients(emit), g))
        more = emit(aten.mm.default, as_float32(emit, sums), self.basis)
        return emit(aten.add.Tensor, part, contract(emit, more, 0, to=first))


@dataclass(frozen=True)
class Part:
    """What is taken out of one input."""

    forward: Half
    backward: Half
    norms: Node
    """Of the rest of every row [M], in the forward, the last node of all this."""


class Center:
    """The inputs of one joint graph.

    Args:
        draws, config: of the graph.
        known: what is known of its rows.
    """

    def __init__(self, draws: Draws, config: Config, known: KnownRows) -> None:
        self.draws, self.config, self.known = draws, config, known
        self.parts: dict[tuple, Part] = {}
        """Draw group -> what is taken out."""

    def part(self, decision: Decision, h: Node, dim: int) -> Part | None:
        """Of the input ``h``, with rows along ``dim``; None where the options ask for nothing, and of attention."""
        if decision.site.is_attention or not (self.config.center_rows or self.config.directions):
            return None
        if decision.group not in self.parts:
            with self.draws.behind(h):
                emit = Emitter(self.draws.graph, h, tag="must_be_in_forward")
                self.parts[decision.group] = self._part(emit, decision, h, dim)
        return self.parts[decision.group]

    def _part(self, emit: Emitter, decision: Decision, h: Node, dim: int) -> Part:
        cut = self.draws.severed.cut
        mean = self.known.mean(emit, as_float32(emit, h), dim, decision)
        norms = row_norms(emit, center(emit, h, mean), dim)
        width = decision.site.activation.width
        directions = limit(self.config.directions, width) if isinstance(width, int) else 0
        if not directions:
            return Part(Half(mean), Half(cut(mean)), norms)
        rows, row = contract(emit, h, dim, to=0), contract(emit, mean, dim, to=0)
        weight = self.known.weight(emit, decision)
        basis = like(emit, emit(wtacrs.principal_directions.default, rows, row, weight, directions), row)
        exact = self._coefficients(emit, rows, row, basis)
        written: Sequence[Node] = (exact,)
        if all(isinstance(n, int) for n in exact.meta["val"].shape):
            written = codes(emit, exact, [0, 1], FORM, self.draws)
        forward = Half(mean, basis, tuple(written), exact.meta["val"])
        backward = Half(cut(mean), cut(basis), tuple(cut(w) for w in written), exact.meta["val"])
        return Part(forward, backward, _rest_norms(emit, norms, exact))

    def _coefficients(self, emit: Emitter, rows: Node, mean: Node, basis: Node) -> Node:
        """``a_i = (h_i - mean) B^T``, [r, M], in the type of the rows."""
        turned = emit(aten.mm.default, like(emit, basis, rows), emit(aten.permute.default, rows, [1, 0]))
        shift = emit(aten.mm.default, basis, emit(aten.permute.default, mean, [1, 0]))
        return like(emit, emit(aten.sub.Tensor, as_float32(emit, turned), shift), rows)


def _rest_norms(emit: Emitter, norms: Node, coefficients: Node) -> Node:
    """``sqrt(|h_i - m|^2 - |a_i|^2)``: what is left of every row, but for rounding."""
    a = as_float32(emit, coefficients)
    whole = emit(aten.mul.Tensor, norms, norms)
    rest = emit(aten.sub.Tensor, whole, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, a, a), [0]))
    return emit(aten.sqrt.default, emit(aten.maximum.default, rest, emit(aten.mul.Tensor, whole, LEAST_REST)))


def gather_scaled(emit: Emitter, matrix: Node, dim: int, rows: Node, scale: Node, half: Half | None = None) -> Node:
    """``scale * matrix[rows]``, without what is taken out, in float32: a scale rounded to bfloat16 would bias every row
    alike."""
    taken = gather(emit, matrix, dim, rows)
    taken = as_float32(emit, taken) if half is None else half.rest(emit, taken, dim, rows)
    return emit(aten.mul.Tensor, taken, emit(aten.unsqueeze.default, scale, other_dim(matrix, dim)))

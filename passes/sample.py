"""Act: replace exact weight-gradient products by products of sampled rows.

Early (rows chosen in the forward, before the cut into forward and backward)::

    view: f32[M, D]                                 view: f32[M, D]
                                                    sum_1: f32[M] = (view * view).sum(1).sqrt()
                                                    select_rows = wtacrs.select_rows(sum_1, seed, stream, k, estimator)
                                                    rows: f32[k, D] = view[select_rows.0] * select_rows.1[:, None]
    ...                                      ->     ...
    permute: f32[O, M] = permute(grad, [1, 0])      index: f32[k, O] = grad[select_rows.0]
    mm: f32[O, D] = mm(permute, view)               mm: f32[O, D] = mm(index.T, rows)

Late: the same in the backward, with ``|view_i| |grad_i|`` as the importance; only the norms of ``view`` come from the
forward, and ``view[rows]`` is computed from whatever the cut saves.

Attention's products are the same with a leading dimension, and with rows [B, k] of every head.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.norms import KnownRows
from wtacrs_fx.passes.policy import Action, Decision, ratio_fraction
from wtacrs_fx.passes.round import Rounded
from wtacrs_fx.passes.sites import Operand, Site

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs


@dataclass
class Sampled:
    """What :func:`sample` did."""

    early: int = 0
    late: int = 0
    draws: dict[tuple, tuple[Node, Node]] = field(default_factory=dict)
    """Draw group of early sites -> placeholders (rows, row index) that the backward reads."""
    norms: dict[tuple, Node] = field(default_factory=dict)
    """Draw group of late sites -> placeholder of the row norms that the backward reads."""
    products: dict[Node, Node] = field(default_factory=dict)
    """Site's product in the original graph -> its replacement."""
    rounded: Rounded = field(default_factory=Rounded)
    """What was rounded before."""


def sample(
    graph: Graph,
    plan: Iterable[Decision],
    env: Mapping[Node, Node],
    draws: Draws,
    config: Config,
    rounded: Rounded | None = None,
    padding: Node | None = None,
) -> Sampled:
    """Rewrite every early and late site of the plan; exact ones, and a graph without any, stay as they are.

    Args:
        graph: joint graph to change.
        plan: decisions on sites of the original graph.
        env: node of the original graph -> node of ``graph``.
        draws: the graph's seed and its ``severed``, which receives the tensors that must be computed in the forward and
            handed to the backward.
        config: estimator.
        rounded: what was rounded before: late sites read what stands for it.
        padding: placeholder of the original graph whose zeros mark rows without a gradient.
    """
    done = Sampled(rounded=rounded or Rounded())
    plan = list(plan)
    known = KnownRows(draws, plan, env, config, padding)
    rewriter = _Rewriter(graph, env, draws, config, done.rounded.stands_for, known)
    for decision in plan:
        if decision.action is Action.EARLY:
            if decision.group not in done.draws:
                done.draws[decision.group] = rewriter.keep_rows(decision)
            done.products[decision.site.node] = rewriter.early(decision, *done.draws[decision.group])
            done.early += 1
        elif decision.action is Action.LATE:
            done.products[decision.site.node] = rewriter.late(decision)
            done.late += 1
    done.norms = rewriter.norms
    return done


class _Rewriter:
    def __init__(
        self,
        graph: Graph,
        env: Mapping[Node, Node],
        draws: Draws,
        config: Config,
        rounded: Mapping[Node, Node],
        known: KnownRows,
    ) -> None:
        self.graph, self.env, self.draws, self.config, self.rounded = graph, dict(env), draws, config, rounded
        self.severed, self.known = draws.severed, known
        self.norms: dict[tuple, Node] = {}
        self.matrices: dict[Node, Node] = {}

    def keep_rows(self, decision: Decision) -> tuple[Node, Node]:
        """Choose and gather rows of H right behind it, in the forward; returns the backward's (rows, row index)."""
        source = self.env[decision.site.activation.source]
        seed, _ = self.draws.seed(source)
        h, dim = self._matrix(decision.site.activation)
        with self.draws.behind(h):
            emit = Emitter(self.graph, source, tag="must_be_in_forward")
            rows, scale = self._select(
                emit, self.known.importance(emit, _norms(emit, h, dim), decision), seed, decision
            )
            kept = _gather_scaled(emit, h, dim, rows, scale)
        return self.severed.cut(kept), self.severed.cut(rows)

    def early(self, decision: Decision, kept: Node, rows: Node) -> Node:
        """``G^T H`` becomes ``G[rows]^T (scale * H[rows])``."""
        site = decision.site
        node = self.env[site.node]
        with self.graph.inserting_before(node):
            emit = Emitter(self.graph, node, tag="must_be_in_backward")
            g, g_dim = self._matrix(site.gradient)
            _, dim = self._matrix(site.activation)
            rows = self.known.record(emit, decision, g, _other(g, g_dim), rows)
            return self._replace(emit, site, node, (kept, dim), (_gather(emit, g, g_dim, rows), g_dim))

    def late(self, decision: Decision) -> Node:
        """The same with rows chosen in the backward by ``|h_i| |g_i|``, the importance of least variance."""
        site = decision.site
        node = self.env[site.node]
        _, seed = self.draws.seed(self.env[site.activation.source])
        h_norms = self._norms_from_forward(decision)
        with self.graph.inserting_before(node):
            emit = Emitter(self.graph, node, tag="must_be_in_backward")
            source = self.env[site.activation.source]
            h, h_dim = self._view(self.rounded.get(source, source), site.activation)
            g, g_dim = self._matrix(site.gradient)
            importance = emit(aten.mul.Tensor, h_norms, _norms(emit, g, g_dim))
            rows, scale = self._select(emit, importance, seed, decision)
            kept = _gather_scaled(emit, h, h_dim, rows, scale)
            return self._replace(emit, site, node, (kept, h_dim), (_gather(emit, g, g_dim, rows), g_dim))

    def _matrix(self, operand: Operand) -> tuple[Node, int]:
        """The operand without a leading dimension of 1: one view per tensor, on whichever side of the cut it is read."""
        return self._view(self.env[operand.source], operand)

    def _view(self, source: Node, operand: Operand) -> tuple[Node, int]:
        if operand.value.dim() == 2 or operand.batched:
            return source, operand.dim
        if source not in self.matrices:
            with self.draws.behind(source):
                self.matrices[source] = Emitter(self.graph, source)(aten.squeeze.dim, source, 0)
        return self.matrices[source], operand.dim - 1

    def _norms_from_forward(self, decision: Decision) -> Node:
        """Row norms of H [M], taken where H is made: the backward then computes H again at the kept rows only."""
        if decision.group not in self.norms:
            h, dim = self._matrix(decision.site.activation)
            with self.draws.behind(h):
                norms = _norms(Emitter(self.graph, h, tag="must_be_in_forward"), h, dim)
            self.norms[decision.group] = self.severed.cut(norms)
        return self.norms[decision.group]

    def _select(self, emit: Emitter, importance: Node, seed: Node, decision: Decision) -> tuple[Node, Node]:
        k = self._size(emit, importance, decision)
        both = emit(wtacrs.select_rows.default, importance, seed, self.draws.stream(), k, self.config.estimator)
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def _size(self, emit: Emitter, importance: Node, decision: Decision) -> "int | Node":
        if isinstance(decision.k, int):
            return decision.k
        rows = emit(aten.sym_size.int, importance, importance.meta["val"].dim() - 1)
        share = ratio_fraction(self.config.ratio)
        scaled = emit(operator.mul, rows, share.numerator)
        return emit(operator.floordiv, emit(operator.add, scaled, share.denominator - 1), share.denominator)

    def _replace(self, emit: Emitter, site: Site, node: Node, h: tuple[Node, int], g: tuple[Node, int]) -> Node:
        left, right = (h, g) if site.activation_first else (g, h)
        rank = left[0].meta["val"].dim()
        target = aten.mm.default if rank == 2 else aten.bmm.default
        product = emit(target, _contract(emit, *left, to=rank - 1), _contract(emit, *right, to=rank - 2))
        result = product
        if node.target is aten.bmm.default and rank == 2:
            result = emit(aten.unsqueeze.default, product, 0)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        self.env[site.node] = result  # which may be the gradient of the next site, in attention
        return product


def _norms(emit: Emitter, matrix: Node, dim: int) -> Node:
    """Euclidean norm of each row, [M] or [B, M], at least float32 inside whatever the matrix is stored in."""
    x = _as_float32(emit, matrix)
    return emit(aten.sqrt.default, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, x, x), [_other(matrix, dim)]))


def _other(matrix: Node, dim: int) -> int:
    """The dimension of a matrix, or of many, that is not its rows ``dim``."""
    return 2 * matrix.meta["val"].dim() - 3 - dim


def _as_float32(emit: Emitter, node: Node) -> Node:
    if node.meta["val"].dtype in (torch.float32, torch.float64):
        return node
    return emit(prims.convert_element_type.default, node, torch.float32)


def _gather(emit: Emitter, matrix: Node, dim: int, rows: Node) -> Node:
    if matrix.meta["val"].dim() == 2:
        return emit(aten.index.Tensor, matrix, [rows] if dim == 0 else [None, rows])
    features = _other(matrix, dim)
    width: Any = matrix.meta["val"].shape[features]
    width = width if isinstance(width, int) else emit(aten.sym_size.int, matrix, features)
    index = emit(aten.unsqueeze.default, rows, features)
    index = emit(aten.expand.default, index, [width if d == features else -1 for d in range(3)])
    return emit(aten.gather.default, matrix, dim, index)


def _gather_scaled(emit: Emitter, matrix: Node, dim: int, rows: Node, scale: Node) -> Node:
    """``scale * matrix[rows]``, multiplied in float32: a scale rounded to bfloat16 would bias every row alike."""
    dtype = matrix.meta["val"].dtype
    column = emit(aten.unsqueeze.default, scale, _other(matrix, dim))
    kept = emit(aten.mul.Tensor, _as_float32(emit, _gather(emit, matrix, dim, rows)), column)
    return kept if kept.meta["val"].dtype == dtype else emit(prims.convert_element_type.default, kept, dtype)


def _contract(emit: Emitter, matrix: Node, dim: int, to: int) -> Node:
    """Transpose if needed so that the contracted dimension ``dim`` becomes dimension ``to``."""
    rank = matrix.meta["val"].dim()
    return matrix if dim == to else emit(aten.permute.default, matrix, [*range(rank - 2), rank - 1, rank - 2])

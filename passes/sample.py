"""Act: replace exact weight-gradient products by products of sampled rows.

Early (rows chosen in the forward, before the cut into forward and backward)::

    view: f32[M, D]                                 view: f32[M, D]
                                                    sum_1: f32[M] = (view * view).sum(1).sqrt()
                                                    select_rows = wtacrs.select_rows(sum_1, seed, stream, k, estimator)
                                                    rows: f32[k, D] = view[select_rows.0] * select_rows.1[:, None]
    ...                                      ->     ...
    permute: f32[O, M] = permute(grad, [1, 0])      index: f32[k, O] = grad[select_rows.0]
    mm: f32[O, D] = mm(permute, view)               mm: f32[O, D] = mm(index.T, rows)

With ``row_bits`` the rows are rounded where they are gathered, and the backward computes them from their codes::

                                                    (forward)   codes, scales = quantise(rows, key)
                                                    (backward)  rows: f32[k, D] = dequantise(codes, scales)

What rows have in common may be taken out before, and added exactly: :mod:`wtacrs_fx.passes.center`.

Late: the same in the backward, with ``|view_i| |grad_i|`` as the importance; only the norms of ``view`` come from the
forward, and ``view[rows]`` is computed from whatever the cut saves.

Attention's products are the same with a leading dimension, and with rows [B, k] of every head.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.center import Center, gather_scaled
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.norms import ChosenBy, KnownRows
from wtacrs_fx.passes.policy import Action, Decision, ratio_fraction
from wtacrs_fx.passes.round import Rounded, read, write
from wtacrs_fx.passes.rows import contract, gather, like, other_dim, row_norms
from wtacrs_fx.passes.sites import Operand, Site
from wtacrs_fx.rounding import Format

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs


@dataclass(frozen=True)
class Kept:
    """A draw of the forward as the backward has it."""

    stored: tuple[Node, ...]
    """Placeholders: the scaled rows, or their codes and scales."""
    index: Node
    """Placeholder: which rows they are."""
    rows: Node
    """What products read: the scaled rows."""
    dim: int
    """Of ``rows``, along which they are counted."""
    chosen_by: ChosenBy | None = None
    """In graphs that measure."""


@dataclass
class Sampled:
    """What :func:`sample` did."""

    early: int = 0
    late: int = 0
    draws: dict[tuple, Kept] = field(default_factory=dict)
    """Draw group of early sites -> what is kept of it."""
    norms: dict[tuple, Node] = field(default_factory=dict)
    """Draw group of late sites -> placeholder of the row norms that the backward reads."""
    taken_out: dict[tuple, tuple[Node, ...]] = field(default_factory=dict)
    """Draw group -> placeholders of what was taken out of the rows and the backward adds, with ``center_rows``."""
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
    done, plan = Sampled(rounded=rounded or Rounded()), list(plan)
    readers: dict[tuple, list[Node]] = {}
    for decision in plan:
        if decision.action is Action.EARLY:
            readers.setdefault(decision.group, []).append(env[decision.site.node])
    known = KnownRows(draws, plan, env, config, padding)
    rewriter = _Rewriter(graph, env, draws, config, done.rounded.stands_for, known)
    for decision in plan:
        if decision.action is Action.EARLY:
            if decision.group not in done.draws:
                done.draws[decision.group] = rewriter.keep_rows(decision, min(readers[decision.group]))
            done.products[decision.site.node] = rewriter.early(decision, done.draws[decision.group])
            done.early += 1
        elif decision.action is Action.LATE:
            done.products[decision.site.node] = rewriter.late(decision)
            done.late += 1
    done.norms = rewriter.norms
    done.taken_out = {group: part.backward.nodes for group, part in rewriter.center.parts.items()}
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
        self.center = Center(draws, config, known)
        self.matrices: dict[Node, Node] = {}

    def keep_rows(self, decision: Decision, first: Node) -> Kept:
        """Choose and gather rows of H right behind it, in the forward, for products of the backward from ``first`` on."""
        source = self.env[decision.site.activation.source]
        seed, _ = self.draws.seed(source)
        h, dim = self._matrix(decision.site.activation)
        part = self.center.part(decision, h, dim)
        with self.draws.behind(h if part is None else part.norms):
            emit = Emitter(self.graph, source, tag="must_be_in_forward")
            norms = row_norms(emit, h, dim) if part is None else part.norms
            importance = self.known.importance(emit, norms, decision)
            rows, scale = self._select(emit, importance, seed, decision)
            kept = gather_scaled(emit, h, dim, rows, scale, None if part is None else part.forward)
            stored: tuple[Node, ...]
            if decision.form is None:
                again = self.severed.cut(_as_type(emit, kept, decision))
                stored = (again,)
            else:
                stored, again = self._rounded(emit, kept, dim, decision.form, first)
            index = self.severed.cut(rows)
            return Kept(stored, index, again, dim, self._chosen_by(norms, importance, index))

    def _chosen_by(self, norms: Node, importance: Node, index: Node) -> ChosenBy | None:
        """Of an early draw, in graphs that measure: two vectors more are held there."""
        if not self.config.measures:
            return None
        cut = self.severed.cut(norms)
        return ChosenBy(cut, cut if importance is norms else self.severed.cut(importance), index)

    def _rounded(self, emit: Emitter, kept: Node, dim: int, form: Format, first: Node) -> tuple[tuple[Node, ...], Node]:
        """Kept rows in few bits, with groups along the features of each; and computed from them in front of ``first``."""
        features = other_dim(kept, dim)
        order = [d for d in range(kept.meta["val"].dim()) if d not in (dim, features)] + [dim, features]
        written = write(emit, kept, order, form, self.draws)
        value = kept.meta["val"].to(emit.like.meta["val"].dtype)
        with self.graph.inserting_before(first):
            again = read(Emitter(self.graph, emit.like, tag="must_be_in_backward"), written, value, order, form)
        return written, again

    def early(self, decision: Decision, kept: Kept) -> Node:
        """``G^T H`` becomes ``G[rows]^T (scale * H[rows])``."""
        site = decision.site
        node = self.env[site.node]
        with self.graph.inserting_before(node):
            emit = Emitter(self.graph, node, tag="must_be_in_backward")
            g, g_dim = self._matrix(site.gradient)
            rows = self.known.record(emit, decision, g, other_dim(g, g_dim), kept.index)
            taken = gather(emit, g, g_dim, rows)
            if kept.chosen_by is not None:
                taken = self.known.measure(emit, decision, kept.chosen_by, g, (kept.rows, kept.dim), (taken, g_dim))
            part = self._exact_part(emit, decision, kept.dim, g, g_dim)
            return self._replace(emit, site, node, (kept.rows, kept.dim), (taken, g_dim), part)

    def _exact_part(self, emit: Emitter, decision: Decision, dim: int, g: Node, g_dim: int) -> Node | None:
        """What was taken out of the rows contributes this, in the product's orientation."""
        part = self.center.parts.get(decision.group)
        if part is None:
            return None
        return part.backward.exact(emit, g, g_dim, dim, decision.site.activation_first)

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
            importance = emit(aten.mul.Tensor, h_norms, row_norms(emit, g, g_dim))
            rows, scale = self._select(emit, importance, seed, decision)
            part = self.center.parts.get(decision.group)
            kept = _as_type(
                emit, gather_scaled(emit, h, h_dim, rows, scale, None if part is None else part.backward), decision
            )
            taken = gather(emit, g, g_dim, rows)
            if self.config.measures:
                chosen_by = ChosenBy(h_norms, importance, rows)
                taken = self.known.measure(emit, decision, chosen_by, g, (kept, h_dim), (taken, g_dim))
            more = self._exact_part(emit, decision, h_dim, g, g_dim)
            return self._replace(emit, site, node, (kept, h_dim), (taken, g_dim), more)

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
            part = self.center.part(decision, h, dim)
            with self.draws.behind(h if part is None else part.norms):
                emit = Emitter(self.graph, h, tag="must_be_in_forward")
                norms = row_norms(emit, h, dim) if part is None else part.norms
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
        share = ratio_fraction(decision.ratio)
        scaled = emit(operator.mul, rows, share.numerator)
        return emit(operator.floordiv, emit(operator.add, scaled, share.denominator - 1), share.denominator)

    def _replace(
        self,
        emit: Emitter,
        site: Site,
        node: Node,
        h: tuple[Node, int],
        g: tuple[Node, int],
        part: Node | None = None,
    ) -> Node:
        left, right = (h, g) if site.activation_first else (g, h)
        rank = left[0].meta["val"].dim()
        target = aten.mm.default if rank == 2 else aten.bmm.default
        product = emit(target, contract(emit, *left, to=rank - 1), contract(emit, *right, to=rank - 2))
        result = product if part is None else like(emit, emit(aten.add.Tensor, part, product), product)
        if node.target is aten.bmm.default and rank == 2:
            result = emit(aten.unsqueeze.default, result, 0)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        self.env[site.node] = result  # which may be the gradient of the next site, in attention
        return product


def _as_type(emit: Emitter, rows: Node, decision: Decision) -> Node:
    return like(emit, rows, decision.site.activation.source)

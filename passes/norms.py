"""Act: let early draws use what is known of the gradient rows, and let the backward report them.

    norms: f32[M]                                    begin_rows: i64[1] = wtacrs.begin_rows("up:64x256\\n...", cpu)
                                                     norms: f32[M]
    select_rows(norms, ...)                    ->    w: f64[M] = wtacrs.known_importance(begin_rows, norms, mask, "up...", T)
                                                     select_rows(w, ...)
    ...                                              ...
                                                     sum: f32[M] = (grad * grad).sum(1)
                                                     rows_1: i64[k] = wtacrs.record_rows(begin_rows, sum, mask, rows, "up...")
    index: f32[k, O] = grad[rows]                    index: f32[k, O] = grad[rows_1]

In a graph that measures (``Config.measures``) every sampled product reports its rows besides::

    mm(index.T, rows)                          ->    measured = wtacrs.measure_rows(begin_rows, norms, w, sum, rows, index, ...)
                                                     mm(measured.T, rows)

The state behind these ops is that of :mod:`wtacrs_fx.norm_state`.
"""

import fnmatch
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from wtacrs_fx.config import Config
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.policy import Action, Decision
from wtacrs_fx.passes.rows import as_float32, other_dim
from wtacrs_fx.passes.sites import Site

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs

_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    prims.convert_element_type.default,
)


Rows = tuple[Node, int]
"""Rows of a matrix, and the dimension along which they are counted."""


@dataclass(frozen=True)
class ChosenBy:
    """A draw as the backward has it: ``|h_i|`` [M], importance [M], and the rows [k]."""

    norms: Node
    importance: Node
    rows: Node


class KnownRows:
    """Norms and padding in one joint graph that is being rewritten.

    Args:
        draws: of the graph.
        plan: decisions on sites of the original graph.
        env: node of the original graph -> node of the rewritten one.
        config: ``norms``, ``padding_exclude``.
        padding: the original graph's placeholder of the mask, None without the option ``padding``.
    """

    def __init__(
        self, draws: Draws, plan: Sequence[Decision], env: Mapping[Node, Node], config: Config, padding: Node | None
    ) -> None:
        self.draws, self.env, self.config = draws, env, config
        self.padding = None if padding is None else env[padding]
        keys = site_keys([d.site for d in plan])
        self.keys = {d.site.node: key for d, key in zip(plan, keys)}
        self.early = [d for d in plan if d.action is Action.EARLY and not d.site.is_attention]
        self.modules: dict[tuple, dict[str, None]] = {}
        """Draw group -> its sampled modules, in the order of the plan."""
        for d in plan:
            if d.action is not Action.EXACT:
                self.modules.setdefault(d.group, {})[d.site.module] = None
        self._token: tuple[Node, Node] | None = None
        self._mask: tuple[Node, Node] | None = None

    def knows(self, decision: Decision) -> bool:
        """Whether anything can be known of a site's gradient rows. Heads of attention have rows of their own kind."""
        known = self.config.norms != "activation" or self._masked(decision)
        return known and not decision.site.is_attention

    def importance(self, emit: Emitter, norms: Node, decision: Decision) -> Node:
        """Importance of the rows of an early draw, from the norms of H."""
        if not self.knows(decision):
            return norms
        members = [self.keys[d.site.node] for d in self._members(decision)]
        mask = self._padding_mask()[0] if self._masked(decision) else None
        return emit(
            wtacrs.known_importance.default,
            self._forward_token()[0],
            norms,
            mask,
            "\n".join(members),
            self._length(emit, decision),
        )

    def mean(self, emit: Emitter, matrix: Node, dim: int, decision: Decision) -> Node:
        """The mean row [1, D] or [D, 1] of a float32 input, rows that the mask calls padding left out. (Any row would do for
        :mod:`center_rows <wtacrs_fx.passes.sample>`: gradients stay unbiased where the mask is wrong.)"""
        weight = self.weight(emit, decision)
        if weight is None:
            return emit(aten.mean.dim, matrix, [dim], True)
        count = emit(aten.clamp_min.default, emit(aten.sum.default, weight), 1.0)
        column = emit(aten.unsqueeze.default, weight, other_dim(matrix, dim))
        total = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, matrix, column), [dim], True)
        return emit(aten.div.Tensor, total, count)

    def weight(self, emit: Emitter, decision: Decision) -> Node | None:
        """Float32 [M], 0 for rows that the mask calls padding, 1 for others; None without a mask."""
        if not self._masked(decision):
            return None
        result: Node = emit(prims.convert_element_type.default, self._padding_mask()[0], torch.float32)
        return result

    def record(self, emit: Emitter, decision: Decision, gradient: Node, features: int, rows: Node) -> Node:
        """Report the gradient rows of a site; ``features`` is the dimension of G that is not its rows. Returns the row index by
        which G is gathered."""
        if not self.knows(decision):
            return rows
        squared = _squared_norms(emit, gradient, features)
        mask = self._padding_mask()[1] if self._masked(decision) else None
        key = self.keys[decision.site.node]
        return emit(wtacrs.record_rows.default, self._forward_token()[1], squared, mask, rows, key)

    def measure(
        self, emit: Emitter, decision: Decision, chosen_by: "ChosenBy", g: Node, kept: Rows, taken: Rows
    ) -> Node:
        """The gathered rows of the gradient; in a graph that measures, reported together with what they are multiplied by.

        Args: chosen_by, of the draw, as the backward has it; g, the gradient; kept, taken: (rows, their dimension) of H and g.
        """
        if not self.config.measures or decision.site.is_attention:
            return taken[0]
        return emit(
            wtacrs.measure_rows.default,
            self._forward_token()[1],
            chosen_by.norms,
            chosen_by.importance,
            _squared_norms(emit, g, other_dim(g, taken[1])),
            *kept,
            *taken,
            chosen_by.rows,
            "\n".join(self.modules[decision.group]),
            self.keys[decision.site.node],
            self._length(emit, decision),
            decision.action is Action.LATE,
        )

    def _masked(self, decision: Decision) -> bool:
        """Whether the mask is about the rows of a draw: it has one element per row (a pooled input has fewer), and no site of
        the draw is excluded."""
        if self.padding is None:
            return False
        names = self.modules[decision.group]
        if any(fnmatch.fnmatchcase(n, p) for n in names for p in self.config.padding_exclude):
            return False
        return bool(statically_known_true(self.padding.meta["val"].numel() == decision.site.activation.rows))

    def _members(self, decision: Decision) -> list[Decision]:
        """The early sites that share a draw."""
        return [d for d in self.early if d.group == decision.group]

    def _forward_token(self) -> tuple[Node, Node]:
        """(number of the forward, its copy for the backward)."""
        if self._token is None:
            known = [self.keys[d.site.node] for d in self.early if self.knows(d)]
            like = next(n for n in self.env if isinstance(n.meta.get("val"), torch.Tensor))
            emit = Emitter(self.draws.graph, like, tag="must_be_in_forward")
            with self.draws.graph.inserting_before(self.draws.start):
                token = emit(wtacrs.begin_rows.default, "\n".join(known), torch.device("cpu"))
            self._token = token, self.draws.severed.cut(token)
        return self._token

    def _padding_mask(self) -> tuple[Node, Node]:
        """(bool [M], its copy for the backward): True where a row is no padding."""
        if self._mask is None:
            assert self.padding is not None
            emit = Emitter(self.draws.graph, self.padding, tag="must_be_in_forward")
            with self.draws.graph.inserting_before(self.draws.start):
                mask = emit(aten.reshape.default, emit(aten.ne.Scalar, self.padding, 0), [-1])
            self._mask = mask, self.draws.severed.cut(mask)
        return self._mask

    def _length(self, emit: Emitter, decision: Decision) -> "int | Node":
        """Rows per sequence, 0 if the graph shows none."""
        shown = shows_sequences(decision.site)
        if shown is None:
            return 0
        node, dims = shown
        shape = node.meta["val"].shape
        if all(isinstance(shape[d], int) for d in dims):
            return math.prod(shape[d] for d in dims)
        length: Any = emit(aten.sym_size.int, self.env[node], dims[0])
        for d in dims[1:]:
            length = emit(operator.mul, length, emit(aten.sym_size.int, self.env[node], d))
        return length


def _squared_norms(emit: Emitter, gradient: Node, features: int) -> Node:
    """Of the gradient's rows, [M], at least float32 inside."""
    g = as_float32(emit, gradient)
    return emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, g, g), [features])


def shows_sequences(site: Site) -> tuple[Node, tuple[int, ...]] | None:
    """A tensor [B, T, ...] or [B, T1, T2, D] that the rows of a site's input, or of its gradient, are a view of, and the
    dimensions whose product is the rows per sequence. None if there is none: the model works on matrices."""
    for operand in (site.activation, site.gradient):
        node, seen = operand.source, 0
        while seen < 8:
            shape = node.meta["val"].shape
            if len(shape) >= 3:
                for last in (2, len(shape) - 1):
                    if statically_known_true(math.prod(shape[:last]) == operand.rows):
                        return node, tuple(range(1, last))
            if node.target not in _RESHAPES:
                break
            node, seen = node.all_input_nodes[0], seen + 1
    return None


def site_keys(sites: Sequence[Site]) -> list[str]:
    """Names of sites in the state of a norm source: module, widths, and "#2" for the second call of a module."""
    found: Counter[str] = Counter()
    keys = []
    for site in sites:
        key = f"{site.module}:{site.activation.width}x{site.gradient.width}"
        found[key] += 1
        keys.append(key if found[key] == 1 else f"{key}#{found[key]}")
    return keys

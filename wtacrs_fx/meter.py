"""Run a model's exact backward on real batches, and measure at every site how noisy an estimate would be."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from wtacrs_fx.backend import Partitioner, compile_eager
from wtacrs_fx.choose import GRID, Draw
from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.guess import Guess
from wtacrs_fx.names import dynamo_names
from wtacrs_fx.noise import batch_variance, sequence_squares, variance
from wtacrs_fx.passes.joint_graph import copy_joint, cutter
from wtacrs_fx.passes.kinds import is_tangent
from wtacrs_fx.passes.norms import site_keys
from wtacrs_fx.passes.policy import Action, Decision, rows_kept
from wtacrs_fx.passes.work import Work
from wtacrs_fx.private import FakeTensor, dynamo_config, functorch_config, tree_leaves
from wtacrs_fx.tracing import NO_TRAINING_GRAPH, Batch, call, compile_apart, starts


@dataclass
class _Products:
    """The products of one draw in one backward; their noise is known when all are there, since they share their rows."""

    draw: Draw
    keys: tuple[str, ...]
    """Of the sites, in the state of a norm source."""
    found: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Squared norms of the gradient's rows, and what is known of them beforehand (None: nothing)."""

    def add(self, key: str, h: Tensor, g: Tensor, grad: Tensor, guess: Guess, config: Config) -> None:
        """One product: input [M, D], gradient [M, O], and the weight gradient."""
        draw, rows = self.draw, len(h)
        g_squares = g.float().square().sum(1, dtype=torch.float64)
        total = grad.float().square().sum(dtype=torch.float64)
        draw.norm += float(total)
        draw.batch_noise += float(batch_variance(sequence_squares(h, g, guess.sequences), total))
        draw.bytes += (not self.found) * h.numel() * h.element_size()
        draw.flops += 2 * h.numel() * g.shape[1]
        self.found.append((g_squares, guess.squared_norms(key, g_squares, draw.modules)))
        if len(self.found) < len(self.keys):
            return
        h = guess.rest(h.float(), draw.modules)
        h_squares = h.square().sum(1, dtype=torch.float64)
        early = guess.importance(h_squares.sqrt(), self.found, draw.modules)
        for known, _ in self.found:
            squares = h_squares * known
            for curve, importance in ((draw.early, early), (draw.true, squares.sqrt())):
                noise = [variance(config.estimator, importance, squares, int(rows_kept(rows, r))) for r in GRID]
                curve[:] = map(operator.add, curve, torch.stack(noise).tolist())
        self.found.clear()


class Meter:
    """Measures the draws of a model, batch by batch.

    Args: model, in training mode; config: what is sampled, by which estimator, and what is known of rows.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.guess = model, Guess(config)
        off: dict[str, Any] = {"memory_budget": None, "round_bits": None, "norms": "activation", "padding": None}
        self.config = dataclasses.replace(config, **off)
        self._draws: dict[tuple[str, ...], Draw] = {}
        self._graphs = 0
        self._compiled = compile_apart(model, self._backend)

    @property
    def draws(self) -> list[Draw]:
        """In the order of the backward."""
        return list(self._draws.values())

    def add(self, batch: Batch) -> None:
        """Run one step, exactly. Gradients in ``.grad`` and the state of the random generators stay as they are.

        Raises: ReportError: fewer than two sequences, or no training graph.
        """
        self.guess.begin(self.model, batch, _sequences(batch))
        grads = {p: p.grad for p in self.model.parameters()}
        self.model.zero_grad(set_to_none=True)
        try:
            with (
                torch.random.fork_rng(),
                functorch_config.patch(enable_autograd_cache=False),
                dynamo_config.patch(recompile_limit=1000),
            ):
                roots = starts(call(self._compiled, batch))
                torch.autograd.backward(roots, [torch.ones_like(r) for r in roots])
        finally:
            for parameter, grad in grads.items():
                parameter.grad = grad
        if not self._graphs:
            raise ReportError(NO_TRAINING_GRAPH)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        self._graphs += 1
        return compile_eager(gm, inputs, _Metered(self.config, dynamo_names(gm), self), None)

    def recorders(self, plan: Sequence[Decision]) -> Mapping[str, Callable[..., None]]:
        """Name of a site's product -> what measures it, given the two factors and the product."""
        chosen = [d for d in plan if d.action is not Action.EXACT]
        groups: dict[tuple, list[Decision]] = {}
        for d in chosen:
            groups.setdefault(d.group, []).append(d)
        keys = dict(zip((d.site.node for d in plan), site_keys([d.site for d in plan])))
        found = {}
        for members in groups.values():
            modules = tuple(dict.fromkeys(d.site.module for d in members))
            draw = self._draws.setdefault(modules, Draw(modules))
            products = _Products(draw, tuple(keys[d.site.node] for d in members))
            for d, key in zip(members, products.keys):
                found[d.site.node.name] = self._recorder(products, key, d.site.activation_first)
        return found

    def _recorder(self, products: _Products, key: str, activation_first: bool) -> Callable[..., None]:
        def record(left: Tensor, right: Tensor, product: Tensor) -> None:
            if isinstance(product, FakeTensor):
                return  # a graph is run on fake tensors too, while it is compiled
            left, right = (x.squeeze(0) if x.dim() == 3 else x for x in (left, right))
            h, g = (left.mT, right) if activation_first else (right, left.mT)
            if len(h) % self.guess.sequences:
                raise ReportError(
                    f"{products.draw.modules[0]}: its input has {len(h)} rows, which {self.guess.sequences} sequences do not "
                    "divide, so that rows cannot be told apart by sequence; leave it out by exclude."
                )
            products.add(key, h, g, product, self.guess, self.config)

        return record


class _Metered(Partitioner):
    """Partitions exactly, and measures behind every product that would be sampled."""

    def __init__(self, config: Config, names: Sequence[str | None], meter: Meter) -> None:
        super().__init__(config, names)
        self.meter = meter

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        num_fwd_outputs, static = kwargs.pop("num_fwd_outputs"), kwargs.pop("static_lifetime_input_indices", None)
        cut = cutter(joint_inputs, self.config, static, kwargs)
        if not any(is_tangent(n) for n in gm.graph.nodes):
            return cut(gm, num_fwd_outputs)
        work = Work.prepare(gm, num_fwd_outputs, cut, self.config, self.names, static)
        forward, backward = cut(copy_joint(work.joint)[0], num_fwd_outputs)
        recorders = self.meter.recorders(work.plan)
        for node in [n for n in backward.graph.nodes if n.name in recorders]:
            _record(node, recorders[node.name])
        backward.recompile()
        return forward, backward


def _record(node: Node, record: Callable[..., None]) -> None:
    """(The backward runs as it is, so that a node without users is run too.)"""
    with node.graph.inserting_after(node):
        node.graph.call_function(record, (*node.args, node))


def _sequences(batch: Batch) -> int:
    sizes = {t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ReportError(
            f"the tensors of the batch have first dimensions {sorted(sizes)}: expected one number of sequences, at least 2, "
            "since the variance between them is measured."
        )
    return sizes.pop()

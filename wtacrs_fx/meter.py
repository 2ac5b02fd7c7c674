"""Run a model's exact backward on real batches, and measure at every site how noisy an estimate would be."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from wtacrs_fx.backend import Partitioner, compile_eager
from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.names import dynamo_names
from wtacrs_fx.noise import batch_variance, sequence_squares, variance
from wtacrs_fx.passes.joint_graph import copy_joint, cutter
from wtacrs_fx.passes.kinds import is_tangent
from wtacrs_fx.passes.policy import Action, Decision, rows_kept
from wtacrs_fx.passes.work import Work
from wtacrs_fx.private import FakeTensor, dynamo_config, functorch_config, tree_leaves
from wtacrs_fx.tracing import NO_TRAINING_GRAPH, Batch, call, starts

GRID = (0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Ratios at which noise is measured, and among which is chosen."""


@dataclass
class Draw:
    """The sites that read one input, and sums over the calibration batches."""

    modules: tuple[str, ...]
    early: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(GRID))
    """Of all its sites: ``E|G' - G|^2`` for every ratio of the grid, with rows chosen by ``|h_i|``."""
    true: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(GRID))
    """The same with rows chosen by ``|h_i| |g_i|``."""
    batch_noise: float = 0.0
    """Variance of the batch's own gradients."""
    norm: float = 0.0
    """``|G|^2``."""
    bytes: int = 0
    """Of the input."""
    flops: int = 0
    """Of the weight gradients."""
    late: bool = False
    """Whether rows are chosen in the backward."""

    @property
    def curve(self) -> list[float]:
        """What applies, of both kinds of noise."""
        return self.true if self.late else self.early

    def add(self, h: Tensor, g: Tensor, grad: Tensor, sequences: int, estimator: str, first: bool) -> None:
        """One product: input [M, D], gradient [M, O], and the weight gradient. ``first``: of the draw."""
        rows = len(h)
        h_norms, g_squares = (x.float().square().sum(1, dtype=torch.float64) for x in (h, g))
        squares, h_norms = h_norms * g_squares, h_norms.sqrt()
        for curve, importance in ((self.early, h_norms), (self.true, squares.sqrt())):
            noise = [variance(estimator, importance, squares, int(rows_kept(rows, ratio))) for ratio in GRID]
            curve[:] = map(operator.add, curve, torch.stack(noise).tolist())
        total = grad.float().square().sum(dtype=torch.float64)
        self.norm += float(total)
        self.batch_noise += float(batch_variance(sequence_squares(h, g, sequences), total))
        self.bytes += first * h.numel() * h.element_size()
        self.flops += 2 * h.numel() * g.shape[1]


class Meter:
    """Measures the draws of a model, batch by batch.

    Args: model, in training mode; config: what is sampled, and by which estimator.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model, self.sequences = model, 0
        off: dict[str, Any] = {"memory_budget": None, "round_bits": None, "norms": "activation", "padding": None}
        self.config = dataclasses.replace(config, **off)
        self._draws: dict[tuple[str, ...], Draw] = {}
        self._graphs = 0
        self._compiled = torch.compile(model, backend=self._backend, dynamic=False)

    @property
    def draws(self) -> list[Draw]:
        """In the order of the backward."""
        return list(self._draws.values())

    def add(self, batch: Batch) -> None:
        """Run one step, exactly. Gradients in ``.grad`` and the state of the random generators stay as they are.

        Raises: ReportError: fewer than two sequences, or no training graph.
        """
        self.sequences = _sequences(batch)
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
        found = {}
        for members in groups.values():
            modules = tuple(dict.fromkeys(d.site.module for d in members))
            draw = self._draws.setdefault(modules, Draw(modules))
            for d in members:
                found[d.site.node.name] = self._recorder(draw, d.site.activation_first, d is members[0])
        return found

    def _recorder(self, draw: Draw, activation_first: bool, first: bool) -> Callable[..., None]:
        def record(left: Tensor, right: Tensor, product: Tensor) -> None:
            if isinstance(product, FakeTensor):
                return  # a graph is run on fake tensors too, while it is compiled
            left, right = (x.squeeze(0) if x.dim() == 3 else x for x in (left, right))
            h, g = (left.mT, right) if activation_first else (right, left.mT)
            if len(h) % self.sequences:
                raise ReportError(
                    f"{draw.modules[0]}: its input has {len(h)} rows, which {self.sequences} sequences do not divide, so that "
                    "rows cannot be told apart by sequence; leave it out by exclude."
                )
            draw.add(h, g, product, self.sequences, self.config.estimator, first)

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

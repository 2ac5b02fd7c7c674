"""Parts of the forward computed again in the backward: the same numbers, in the place where they are needed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx.passes.joint_graph import copy_joint
from wtacrs_fx.passes.recompute import protect_draws, recompute
from wtacrs_fx.passes.segments import find_segments, forward_nodes, merge

from helpers import SMALL, Recorder, Transformer, calls, gradients, transformer_batch

aten = torch.ops.aten
LAYERS, WIDTH = 4, 128


def record(model: nn.Module, batch: tuple, **options) -> tuple[dict, Recorder]:
    torch._dynamo.reset()
    recorder = Recorder(**options)
    torch.manual_seed(5)
    return gradients(model, *batch, call=torch.compile(model, backend=recorder)), recorder


def transformer(dropout: float = 0.0) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    return Transformer(width=WIDTH, layers=LAYERS, dropout=dropout), transformer_batch(8, 32, WIDTH)


class Fused(Transformer):
    """Checkpoint regions around fused attention, which torch's own recomputation cannot compile on CPU (2.13)."""

    class Block(nn.Module):
        def __init__(self, width: int, dropout: float = 0.0) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.dropout = dropout

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = (y.view(b, t, 4, -1).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
            attention = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
            return x + self.out(attention.transpose(1, 2).reshape(b, t, d))

    def __init__(self) -> None:
        super().__init__(width=WIDTH, layers=1)
        self.blocks = nn.ModuleList(self.Block(WIDTH) for _ in range(3))

    def forward(self, x, target):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return nn.functional.cross_entropy(self.classifier(x.mean(1)), target)


class TestSegments:
    def joint(self, model: nn.Module, batch: tuple, outputs: int = 1) -> tuple:
        _, recorder = record(model, batch, ratio=1.0)
        return recorder.joint[0].graph, outputs

    def test_boundaries_are_the_residual_stream(self):
        model, batch = transformer()
        graph, outputs = self.joint(model, batch)
        segments = find_segments(graph, outputs, weights(graph))
        for segment in segments[:-2]:
            assert [tuple(b.meta["val"].shape) for b in segment.handed_on] == [(8, 32, WIDTH)]
            assert next(iter(segment.handed_on)).target is aten.add.Tensor
        # A place after each attention and each feed-forward part; behind the last one comes the head.
        assert len(segments) == 2 * LAYERS + 1 or len(segments) == 2 * LAYERS + 2
        assert {s.name.split(".")[0] for s in segments[:-1]} == {"blocks"}

    def test_segments_hold_every_node_once(self):
        model, batch = transformer(dropout=0.1)
        graph, outputs = self.joint(model, batch)
        together = [n for s in find_segments(graph, outputs, weights(graph)) for n in s.nodes]
        assert together == forward_nodes(graph, outputs)

    def test_plain_chain(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)))
        graph, outputs = self.joint(nn.Sequential(model, Mean()), (torch.randn(32, 64),))
        assert len(find_segments(graph, outputs, weights(graph))) >= 4

    def test_one_product_is_one_segment(self):
        graph, outputs = self.joint(nn.Sequential(nn.Linear(8, 8), Mean()), (torch.randn(4, 8),))
        segments = find_segments(graph, outputs, weights(graph))
        assert len(segments) == 1
        assert not segments[0].handed_on

    def test_merge(self):
        model, batch = transformer()
        graph, outputs = self.joint(model, batch)
        segments = find_segments(graph, outputs, weights(graph))
        pairs = merge(segments, 2)
        assert len(pairs) == (len(segments) + 1) // 2
        assert [n for s in pairs for n in s.nodes] == [n for s in segments for n in s.nodes]
        assert all(len(s.handed_on) == 1 for s in pairs[:-1])
        assert pairs[0].handed_on.keys() == segments[1].handed_on.keys()
        assert merge(segments, 1) == segments


def weights(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The parameters: what the tests' batches are not."""
    batches = {(8, 32, WIDTH), (32, 64), (4, 8)}
    inputs = graph.find_nodes(op="placeholder")
    return [n for n in inputs if n.meta["val"].is_floating_point() and tuple(n.meta["val"].shape) not in batches]


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


class TestRecompute:
    def prepared(self, dropout: float = 0.0):
        model, batch = transformer(dropout)
        _, recorder = record(model, batch, ratio=1.0)
        joint = copy_joint(recorder.joint[0])[0]
        return joint, find_segments(joint.graph, 1, weights(joint.graph))

    def test_copies_replace_the_originals(self):
        joint, segments = self.prepared()
        products = calls(joint, aten.addmm.default) + calls(joint, aten.mm.default) + calls(joint, aten.bmm.default)
        inside = set(segments[2].nodes) - set(segments[2].handed_on)
        done = recompute(joint.graph, 1, inside, list(segments[1].handed_on))
        joint.graph.lint()
        assert 0 < done <= len(inside)
        forward = set(forward_nodes(joint.graph, 1))
        for node in inside:  # nothing of the backward reads the originals any more
            assert all(u in forward for u in node.users), node.format_node()
        after = calls(joint, aten.addmm.default) + calls(joint, aten.mm.default) + calls(joint, aten.bmm.default)
        assert after == products + 5  # q, k, v, scores, attention; the last projection is not needed again
        copies = [n for n in joint.graph.nodes if n.meta.get("partitioner_tag") == "must_be_in_backward"]
        assert len(copies) >= done

    def test_nothing_to_recompute(self):
        joint, _ = self.prepared()
        before = [n.format_node() for n in joint.graph.nodes]
        assert recompute(joint.graph, 1, ()) == 0
        assert [n.format_node() for n in joint.graph.nodes] == before

    def test_draws_are_never_copied(self):
        joint, segments = self.prepared(dropout=0.5)
        drawing = sum(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in joint.graph.nodes)
        assert drawing > 0
        recompute(joint.graph, 1, {n for s in segments for n in s.nodes})
        after = sum(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in joint.graph.nodes)
        assert after == drawing
        assert protect_draws(joint.graph) == drawing
        assert protect_draws(joint.graph) == 0


@pytest.mark.parametrize(
    ("budget", "dropout", "inner"),
    [
        (0.75, 0.3, "eager"),
        *(pytest.param(b, p, "eager", marks=pytest.mark.long) for b, p in ((0.55, 0.3), (0.75, 0.0), (0.55, 0.0))),
        *(pytest.param(b, p, "inductor", marks=pytest.mark.long) for b in (0.75, 0.55) for p in (0.3, 0.0)),
    ],
)
def test_gradients_are_those_of_the_exact_run(budget, dropout, inner):
    """Every plan gives the gradient of keeping everything, for the same masks; and holds less."""
    model, batch = transformer(dropout)

    def run(**options) -> tuple[dict, wtacrs_fx.Ledger]:
        torch._dynamo.reset()
        backend = wtacrs_fx.Backend(ratio=1.0, inner=inner, **options)
        torch.manual_seed(5)
        return gradients(model, *batch, call=torch.compile(model, backend=backend)), backend.ledger

    exact, _ = run()
    planned, ledger = run(memory_budget=budget)
    assert any(p.decision == "recompute" for p in ledger.parts)
    assert ledger.predicted.peak <= budget * ledger.predicted_exact.peak
    assert ledger.saved_bytes < ledger.saved_bytes_exact
    for name, value in exact.items():
        torch.testing.assert_close(planned[name], value, rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """Residual layers with dropout, whose masks it returns or is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x, masks=None):
        drawn = []
        for i, layer in enumerate(self.layers):
            y = nn.functional.gelu(layer(x))
            y = nn.functional.dropout(y, 0.5) if masks is None else y * masks[i] / 0.5
            drawn.append(y != 0)
            x = x + y
        return x.square().mean(), drawn


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", ["auto", 0.8, 0.7])
def test_gradients_are_those_of_eager_with_the_same_masks(budget, inner):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(256, 64)
    backend = wtacrs_fx.Backend(**{**SMALL, "ratio": 1.0, "inner": inner, "memory_budget": budget})
    loss, masks = torch.compile(model, backend=backend)(x)
    loss.backward()
    planned = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected, _ = model(x, masks)
    expected.backward()
    assert 0.4 < torch.stack(masks).float().mean() < 0.6
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(planned[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert any(p.decision == "recompute" for p in backend.ledger.parts) or budget == "auto"


@pytest.mark.filterwarnings("ignore:wtacrs. memory_budget=0.01. the least peak")
@pytest.mark.parametrize(
    ("attention", "budget", "ratio"),
    [
        ("written out", None, 1.0),
        ("written out", 0.6, 0.3),
        ("written out", 0.01, 1.0),
        ("fused", None, 1.0),
        ("fused", 0.6, 0.3),
    ],
)
def test_directional_derivative_with_dropout(attention, budget, ratio):
    """The gradient is the derivative of the loss along a direction for the masks of that seed, attention's own masks included,
    whatever is recomputed. Where rows are sampled the direction is one of vectors, whose gradients are exact."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = Transformer(width=32, layers=3, dropout=0.4)
        if attention == "fused":
            model.blocks = nn.ModuleList(Fused.Block(32, dropout=0.4) for _ in range(3))
        x, target = transformer_batch(4, 16, 32)
        batch = (x.double(), target)
        backend = wtacrs_fx.Backend(inner="eager", **{**SMALL, "memory_budget": budget, "ratio": ratio})
        compiled = torch.compile(model, backend=backend)

        def loss() -> torch.Tensor:
            torch.manual_seed(11)
            return compiled(*batch)

        torch.manual_seed(11)
        grads = gradients(model, *batch, call=compiled)
        moved = {n: p for n, p in model.named_parameters() if n in grads and (ratio == 1 or p.dim() == 1)}
        direction = {n: torch.randn_like(p) for n, p in moved.items()}
        slope = sum(float((grads[n] * d).sum()) for n, d in direction.items())
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for n, p in moved.items():
                    p.add_(direction[n], alpha=sign * step)
            values.append(float(loss().detach()))
            with torch.no_grad():
                for n, p in moved.items():
                    p.sub_(direction[n], alpha=sign * step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)
        assert bool(budget) == any(p.decision == "recompute" for p in backend.ledger.parts)
        assert (ratio < 1) == any(e.decision != "exact" for e in backend.ledger.entries)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.long
@pytest.mark.slow
def test_torchs_own_budget_keeps_the_masks():
    """``activation_memory_budget`` draws dropout afresh in the backward; not in graphs that this backend partitions."""
    model, batch = transformer(dropout=0.4)

    def run(budget: float) -> dict:
        torch._dynamo.reset()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            compiled = torch.compile(model, backend=wtacrs_fx.Backend(ratio=1.0, memory_budget=None))
            torch.manual_seed(5)
            return gradients(model, *batch, call=compiled)

    exact, squeezed = run(1.0), run(0.1)
    for name, value in exact.items():
        torch.testing.assert_close(squeezed[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 1.0])
def test_user_regions_around_fused_attention(budget):
    torch.manual_seed(0)
    model, batch = Fused(), transformer_batch(8, 32, WIDTH)
    eager = gradients(model, *batch)
    backend = wtacrs_fx.Backend(ratio=1.0, memory_budget=budget)
    compiled = gradients(model, *batch, call=torch.compile(model, backend=backend))
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)
    x_bytes = 8 * 32 * WIDTH * 4
    assert backend.ledger.saved_bytes < 5 * x_bytes  # what enters each region, and little else


def test_sites_of_recomputed_segments_are_late():
    model, batch = transformer()
    backend = wtacrs_fx.Backend(ratio=0.5, inner="eager", estimator="systematic", **{**SMALL, "memory_budget": 0.55})
    gradients(model, *batch, call=torch.compile(model, backend=backend))
    reasons = {e.reason for e in backend.ledger.entries if e.decision == "late"}
    assert "input recomputed with its segment" in reasons, backend.ledger.table()


@pytest.mark.parametrize("late", ["sample", "exact"])
def test_late_exact_leaves_recomputed_inputs_exact(late):
    model, batch = transformer()
    backend = wtacrs_fx.Backend(ratio=0.5, inner="eager", late=late, **{**SMALL, "memory_budget": 0.55})
    gradients(model, *batch, call=torch.compile(model, backend=backend))
    inside = [e for e in backend.ledger.entries if e.reason.startswith("input recomputed with its segment")]
    assert inside
    assert {e.decision for e in inside} == {"late" if late == "sample" else "exact"}

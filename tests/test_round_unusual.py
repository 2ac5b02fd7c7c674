"""Rounding in models that are no ordinary transformers: layouts, backwards of the user's, checkpoints, autocast."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from wtacrs_fx import Backend, WtacrsWarning, measure
from wtacrs_fx.passes.bits import paying
from wtacrs_fx.passes.factors import FUSED_ATTENTION, find_factors
from wtacrs_fx.passes.kinds import Kind

from helpers import Moments, Recorder, Transformer, gradients, transformer_batch

ROUNDED = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "inner": "eager"}

LAYOUTS = {
    "transposed": lambda h: F.gelu(h.transpose(0, 1).transpose(1, 2)).transpose(1, 2),
    "no multiple of a group": lambda h: F.pad(F.silu(h[..., :67]) * h[..., :67].sin(), (0, 61)),
    "an expanded gate": lambda h: F.gelu(h) * h.mean(1, keepdim=True).sin().expand(-1, 16, -1),
    "an expanded operand": lambda h: F.gelu(h[:, :1].expand(-1, 16, -1)) * h,
    "one feature": lambda h: F.gelu(h.unsqueeze(-1)).squeeze(-1),
}


class Layout(nn.Module):
    """A function of [8, 16, 128] between two linear layers."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(64, 128), nn.Linear(128, 32), LAYOUTS[layout]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x))).square().mean()


def compiled_with(model: nn.Module, backend) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """z-scores of 30 draws at 4 bits, and the bytes that autograd holds."""
    torch.manual_seed(0)
    model, x = Layout(layout), torch.randn(8, 16, 64)
    call = compiled_with(model, "aot_eager_decomp_partition")
    exact, expected = gradients(model, x, call=call), call(x)
    backend = Backend(**{**ROUNDED, "round_bits": 4, "seed": 2})
    compiled, moments = compiled_with(model, backend), Moments()
    with measure.held(model) as held:
        loss = compiled(x)
    assert held.bytes == backend.ledger.saved_bytes
    assert torch.equal(loss, expected)
    assert sum(c.bits == 4 for c in backend.ledger.compressed) >= 2, backend.ledger.table()
    for _ in range(30):
        moments.add(gradients(model, x, call=compiled))
    for name, value in exact.items():
        rms = float(moments.z(name, value).square().mean().sqrt())
        assert 0 < rms < 1.5, f"{name}: z rms {rms:.2f}"


class Needed(nn.Module):
    """What the GELU reads is read by a convolution's backward too, which reads it whole."""

    def __init__(self, convolved: bool) -> None:
        super().__init__()
        self.a, self.c, self.convolved = nn.Linear(64, 64), nn.Conv1d(64, 64, 3, padding=1), convolved

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).transpose(1, 2)
        return (F.gelu(h) + self.c(h if self.convolved else x.transpose(1, 2))).mean()


def test_a_rounding_that_does_not_pay_is_taken_back():
    """Else it would be noise for nothing. Without the convolution it is made."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, 64)
    model, backend = Needed(convolved=False), Backend(**{**ROUNDED, "round_bits": 4})
    gradients(model, x, call=compiled_with(model, backend))
    assert backend.ledger.rounded
    model, backend = Needed(convolved=True), Backend(**{**ROUNDED, "round_bits": 4})
    with pytest.warns(WtacrsWarning, match="nothing is rounded"):
        found = gradients(model, x, call=compiled_with(model, backend))
    assert backend.ledger.compressed == ()
    assert backend.ledger.saved_bytes == backend.ledger.saved_bytes_exact
    for name, value in gradients(model, x).items():
        torch.testing.assert_close(found[name], value)


def test_what_pays():
    """Roundings that relieve the backward of one tensor are judged together: both or none."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(n) for n in "abcxy"]
    for node in nodes:
        node.meta["val"] = torch.empty(256)  # 1024 bytes
    a, b, c, x, y = nodes
    tried = [(a, 400, {x}), (b, 400, {x}), (c, 300, {y})]
    assert paying(tried, {"y"}) == {a, b}  # (y is saved all the same)
    assert paying(tried, {"x"}) == {c}
    assert paying([(a, 400, {x}), (b, 700, {x})], ()) == set()
    assert paying([(a, 400, {x}), (b, 700, {x, y})], ()) == {a, b}


class Noisy(torch.autograd.Function):
    """Draws in its backward, once for both gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x.sin() + y.sin()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        r = torch.rand_like(x)
        return g * (x.cos() * r), g * (y.cos() * r)


class WithNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
        self.b = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return F.gelu(self.b(Noisy.apply(h + self.p, h + self.q))).mean()


def test_random_numbers_of_a_users_backward_are_drawn_once():
    """Computed early for each of two tensors they would be drawn twice; gradients of p and q would have nothing in common."""
    torch.manual_seed(0)
    model, x = WithNoise(), torch.randn(64, 64)
    recorder = Recorder(**{**ROUNDED, "round_bits": 8})
    compiled = compiled_with(model, recorder)
    found, other = (gradients(model, x, call=compiled) for _ in range(2))
    assert recorder.ledger.rounded
    h = model.a(x).detach()
    cosines = {n: (h + p.detach()).cos() for n, p in (("p", model.p), ("q", model.q))}
    sure = (cosines["p"].abs() > 0.3) & (cosines["q"].abs() > 0.3)
    drawn = [(found[n] / cosines[n])[sure] for n in cosines]  # the gradient times what was drawn
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-9)
    assert ((other["p"] / cosines["p"])[sure] / drawn[0] - 1).abs().mean() > 0.3, "and drawn afresh in every backward"


class Straight(torch.autograd.Function):
    """Rounds; its backward lets the gradient through where the value is small, and gives the scale one."""

    @staticmethod
    def forward(ctx, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * s).round() / s

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1.5), (g * x.sin()).sum()


class Quantised(nn.Module):
    """``way``: "function", a backward of the user's; or "checkpoint", a region that is computed again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.way = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64), way
        self.s = nn.Parameter(torch.tensor(3.0))

    def middle(self, h: Tensor) -> Tensor:
        return self.b(F.gelu(h))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        if self.way == "function":
            h = self.middle(Straight.apply(h, self.s))
        else:
            h = checkpoint(self.middle, h, use_reentrant=False)
        return F.gelu(self.c(h)).square().mean()


@pytest.mark.parametrize("way", ["function", "checkpoint"])
def test_backwards_of_the_users(way):
    torch.manual_seed(0)
    model, x = Quantised(way), torch.randn(64, 64)
    exact = gradients(model, x, call=compiled_with(model, "aot_eager_decomp_partition"))
    backend = Backend(**{**ROUNDED, "round_bits": 4, "seed": 3})
    compiled, moments = compiled_with(model, backend), Moments()
    for _ in range(40):
        moments.add(gradients(model, x, call=compiled))
    rounded = [c for c in backend.ledger.compressed if c.bits > 1]
    assert rounded, backend.ledger.table()
    if way == "checkpoint":
        assert backend.ledger.recomputed > 0
        assert not [c for c in rounded if c.shape[-1] == 128 and "gelu_backward" in c.readers and c.module == "b"]
    for name, value in exact.items():
        rms = float(moments.z(name, value).square().mean().sqrt())
        assert rms < 1.5, f"{name}: z rms {rms:.2f}"


def test_autocast():
    """Operands of products in bfloat16, normalisations in float32: all are rounded."""
    torch.manual_seed(0)
    model, batch = Transformer(), transformer_batch()

    def run(backend) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(model, *batch, call=compiled_with(model, backend))

    exact, backend = run("aot_eager_decomp_partition"), Backend(**{**ROUNDED, "round_bits": 8})
    found = run(backend)
    assert {c.dtype for c in backend.ledger.compressed} == {"float32", "bfloat16"}
    assert backend.ledger.saved_bytes < 0.6 * backend.ledger.saved_bytes_exact
    assert measure.relative_error(found, exact) < 5e-4


@pytest.mark.parametrize(
    "op", FUSED_ATTENTION, ids=lambda op: op._schema.name.removeprefix("aten::_scaled_dot_product_")
)
def test_operands_of_fused_attention(op):
    """q, k, v and the output of every kernel, and never a bias, which may hold -inf."""
    graph = Graph()
    kinds = {}

    def given(name: str) -> Node:
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(2, 4, 16, 64, device="meta")
        kinds[node] = Kind.GRADIENT if name.startswith("grad_out") else Kind.ACTIVATION
        return node

    reader = graph.call_function(op, tuple(given(a.name) for a in op._schema.arguments))
    kinds[reader] = Kind.GRADIENT
    assert find_factors(graph.nodes, kinds) == []
    found = find_factors(graph.nodes, kinds, fused_attention=True)
    assert [f.operand.name for f in found] == ["query", "key", "value", "out"]
    assert {f.reader for f in found} == {reader}

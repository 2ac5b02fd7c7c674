"""Costly values behind codes are computed in every kernel that reads them; what a model of kernels says of codes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from wtacrs_fx.passes.costly import spread_costly
from wtacrs_fx.passes.kernels import COSTLY, is_reduction
from wtacrs_fx.private import select_decomp_table
from wtacrs_fx.rounding import Format, number_count, quantise

from helpers import Recorder, calls, gradients

aten = torch.ops.aten
NUMBERS = torch.ops.wtacrs.short_uniform(torch.tensor([3]), 7, number_count((64, 256)))


def traced(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def gated(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """A gated unit that keeps silu(gate) in 4 bits; its other product runs in between."""
    gate = x @ a
    silu = gate * gate.sigmoid()
    codes = quantise(silu, numbers, Format(4))
    return (silu * (x @ b)) @ b.T, *codes


def loss(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """A loss that keeps the exponentials of its softmax in 8 bits."""
    e = (x @ a - b.sum()).exp()
    return e.sum(-1).log(), *quantise(e, numbers, Format(8))


@pytest.mark.parametrize(("function", "target"), [(gated, aten.sigmoid.default), (loss, aten.exp.default)])
def test_every_reader_computes_its_own(function, target):
    torch.manual_seed(0)
    inputs = torch.randn(64, 128), torch.randn(128, 256) / 11, torch.randn(128, 256) / 11, NUMBERS
    module = traced(function, *inputs)
    expected = module(*inputs)
    assert calls(module, target) == 1
    assert spread_costly(module.graph) >= 4  # the forward itself, both ends of the range, the codes
    module.graph.lint()
    module.recompile()
    assert calls(module, target) >= 4
    assert all(len(n.users) == 1 for n in module.graph.find_nodes(op="call_function", target=target))
    assert all(torch.equal(a, b) for a, b in zip(module(*inputs), expected))
    count = len(module.graph.nodes)
    spread_costly(module.graph)
    assert len(module.graph.nodes) == count


def attention(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """A softmax that a product reads, so that it is in memory; its codes are made from there."""
    p = (x @ a).softmax(-1)
    return p @ b.T, *quantise(p, numbers, Format(8))


def without_codes(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    gate = x @ a
    return ((gate.sigmoid() * (x @ b)) @ b.T + gate.sigmoid().sum(),)


def of_two(x: Tensor, a: Tensor, b: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    """To compute the exponential again would keep two tensors of its size alive."""
    e = (x @ a + x @ b).exp()
    return (x @ b, e.sum(-1), *quantise(e, numbers, Format(8)))


@pytest.mark.parametrize("function", [attention, without_codes, of_two])
def test_left_alone(function):
    inputs = torch.randn(64, 128), torch.randn(128, 256) / 11, torch.randn(128, 256) / 11, NUMBERS
    module = traced(function, *inputs)
    count = len(module.graph.nodes)
    assert spread_costly(module.graph) == 0
    assert len(module.graph.nodes) == count


class Gated(nn.Module):
    """A gated unit and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.down(F.silu(self.gate(x)) * self.up(x)), labels)


def test_in_a_model():
    """No costly value behind codes has two readers, scales take 4 bytes a group, random numbers 4 a row and column, and the
    loss is exact to the bit."""
    torch.manual_seed(0)
    model, batch = Gated(), (torch.randn(256, 128), torch.randint(0, 128, (256,)))
    torch._dynamo.reset()
    exact = torch.compile(model, backend="aot_eager_decomp_partition")(*batch)
    recorder = Recorder(ratio=1.0, min_bytes=0, min_rows=1, memory_budget=None, inner="eager", round_bits=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder)
    assert torch.equal(compiled(*batch), exact)
    assert all(g.isfinite().all() for g in gradients(model, *batch, call=compiled).values())
    costly = [n for n in recorder.forward[0].graph.nodes if n.target in COSTLY]
    assert len(costly) >= 4
    assert all(len(n.users) == 1 for n in costly)
    for line in recorder.ledger.compressed:
        numel = line.shape[0] * line.shape[1]
        assert line.bytes_now == numel // 2 + 4 * (numel // 64) + 4 * sum(line.shape), recorder.ledger.table()


@pytest.mark.parametrize(("shape", "dim", "loop"), [((2, 64, 128), 0, False), ((64, 8), 1, True), ((4,), 0, True)])
def test_short_sums_are_no_reductions(shape, dim, loop):
    """Inductor writes out a sum of fewer than eight terms; one to a single number it does not on CPU."""
    graph = traced(lambda x: (x.sum(dim),), torch.randn(shape)).graph
    (node,) = graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert is_reduction(node) is loop


class Halves(nn.Module):
    """Two halves of one product, each in few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(128, 256), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        return self.out(a * b).square().mean()


def test_views_of_one_tensor_are_one_line():
    """The ledger's line of a tensor has the codes of all of its parts, and says so."""
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(256, 128)
    recorder = Recorder(ratio=1.0, min_bytes=0, min_rows=1, memory_budget=None, inner="eager", round_bits=8)
    torch._dynamo.reset()
    gradients(model, x, call=torch.compile(model, backend=recorder))
    ledger = recorder.ledger
    assert sum(t.bytes_now for t in ledger.tensors) == ledger.saved_bytes
    assert len([c for c in ledger.compressed if c.bits == 8]) >= 3, ledger.table()
    reasons = {t.reason for t in ledger.tensors if t.bytes_now}
    assert "saved to compute others again" not in reasons, ledger.table("tensor")

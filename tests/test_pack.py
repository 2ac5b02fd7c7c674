"""Packed masks: without loss, an eighth of the bytes, and only where that is a gain."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wtacrs_fx import Backend, measure
from wtacrs_fx.packing import pack, unpack
from wtacrs_fx.passes.pack import hoist

from helpers import SMALL, Recorder, Transformer, gradients, transformer_batch

aten = torch.ops.aten

EXACT = {"ratio": 1.0, "inner": "eager", **SMALL}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8, 5), (3, 5), (2, 4, 3, 8), (0, 4), (5, 0)])
def test_codes_survive_packing(bits, shape):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0))
    given = codes.bool() if bits == 1 else codes
    packed = pack(given, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, shape, bits).long(), codes)


class Masked(nn.Module):
    """Two masks by comparison: one of the batch's shape, one transposed in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.where(self.a(x) > 0.3, self.a(x), 0.5)
        b = self.b(x).transpose(0, 1)
        return (torch.where(b > 0.1, h.transpose(0, 1), b) * torch.arange(24.0)).sum()


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [32, 13])
def test_masks_are_packed_without_loss(inner, rows):
    """Numerics to the bit, the count, no bool left among the saved, the bytes that autograd really holds."""
    model, x = Masked(), torch.randn(rows, 3, 24)
    results, held_bytes = [], []
    for packing in (False, True):
        torch._dynamo.reset()
        backend = Backend(**{**EXACT, "inner": inner, "pack_masks": packing})
        compiled = torch.compile(model, backend=backend)
        with measure.held(model) as held:
            loss = compiled(x)
        held_bytes.append(held.bytes)
        assert held.bytes == backend.ledger.saved_bytes
        loss.backward()
        results.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
        model.zero_grad()
    assert all(map(torch.equal, *results))
    lines = backend.ledger.compressed
    assert [(c.bits, c.dtype, c.bytes_exact, c.bytes_now) for c in lines] == [(1, "bool", 72 * rows, 9 * rows)] * 2
    assert held_bytes[0] - held_bytes[1] == 2 * 63 * rows


def test_dropout_masks_are_packed():
    model, batch = Transformer(dropout=0.2), transformer_batch()
    recorder = Recorder(ratio=1.0)
    packed = torch.compile(model, backend=recorder)
    torch.manual_seed(3)
    found = gradients(model, *batch, call=packed)
    torch._dynamo.reset()
    torch.manual_seed(3)
    exact = gradients(model, *batch, call=torch.compile(model, backend="aot_eager_decomp_partition"))
    assert all(torch.equal(found[n], exact[n]) for n in exact)
    assert len(recorder.ledger.compressed) == 4
    assert recorder.ledger.saved_bytes_exact - recorder.ledger.saved_bytes == 4 * batch[0].numel() * 7 // 8
    given = [n.meta["val"] for n in recorder.backward[0].graph.find_nodes(op="placeholder")]
    assert not [v for v in given if getattr(v, "dtype", None) is torch.bool]


class Given(nn.Module):
    """The mask is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, self.a(x), 0.0).sum()


class Returned(Given):
    """The mask is also an output."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = self.a(x).sin() > 0
        return torch.where(found, self.a(x), 0.0).sum(), found


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Given, {}), (Returned, {}), (Transformer, {"min_bytes": 10**6}), (Transformer, {"pack_masks": False})],
)
def test_left_alone(kind, options):
    """In memory anyway, too small, switched off: graphs as torch partitions them, and results to the bit."""
    model = kind(dropout=0.1) if kind is Transformer else kind()
    batch = transformer_batch() if kind is Transformer else (torch.randn(64, 16), torch.rand(64, 16) > 0.5)

    def trained(backend: Any) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(3)
        model.zero_grad()
        out = torch.compile(model, backend=backend)(*batch)
        loss = out if isinstance(out, Tensor) else out[0]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    recorder, exact = Recorder(**{"ratio": 1.0, **options}), Recorder(ratio=1.0, min_bytes=10**9, pack_masks=False)
    for found, expected in zip(trained(recorder), trained("aot_eager_decomp_partition")):
        assert torch.equal(found, expected)
    trained(exact)
    for found, expected in zip((*recorder.forward, *recorder.backward), (*exact.forward, *exact.backward)):
        assert [n.target for n in found.graph.nodes] == [n.target for n in expected.graph.nodes]
    assert recorder.ledger.compressed == ()
    assert recorder.ledger.saved_bytes == recorder.ledger.saved_bytes_exact


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])])
def test_symbolic_sizes(inner):
    """Packed by row, in one graph for every batch: gradients are those without packing, bytes an eighth of the masks."""
    torch.manual_seed(0)
    model = Transformer(dropout=0.1)
    found, held = {}, {}
    for packs in (True, False):
        torch._dynamo.reset()
        backend = Backend(**{**EXACT, "inner": inner, "pack_masks": packs})
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for size in (8, 5):
            batch = transformer_batch(size)
            torch.manual_seed(1)
            with measure.held(model) as seen:
                compiled(*batch)
            torch.manual_seed(1)
            found[packs, size], held[packs, size] = gradients(model, *batch, call=compiled), seen.bytes
        assert held[packs, 8] == backend.ledger.saved_bytes
        assert len(backend.ledgers) == 1
        if packs:
            masks = sum(c.bytes_exact for c in backend.ledger.compressed)
            assert len(backend.ledger.compressed) >= 4
    assert held[False, 8] - held[True, 8] == masks * 7 // 8
    assert held[False, 5] - held[True, 5] == masks * 7 // 8 * 5 // 8
    for size in (8, 5):
        for name, value in found[False, size].items():
            torch.testing.assert_close(found[True, size][name], value, msg=name)


def test_symbolic_rows_of_no_whole_bytes_are_left_alone():
    model = nn.Sequential(nn.Linear(16, 36), nn.ReLU(), nn.Linear(36, 4))
    backend = Backend(**EXACT)
    torch.compile(model, backend=backend, dynamic=True)(torch.randn(33, 16)).sum().backward()
    assert backend.ledger.compressed == ()


def test_a_mask_is_computed_where_its_inputs_are():
    """As behind a LoRA layer: the mask is of a sum of two products, and was traced with the backward."""
    graph = torch.fx.Graph()
    x, w = (graph.placeholder(n) for n in ("x", "w"))
    total = graph.call_function(aten.add.Tensor, tuple(graph.call_function(aten.mm.default, (x, w)) for _ in "ab"))
    relu = graph.call_function(aten.relu.default, (total,))
    last = graph.call_function(aten.mm.default, (relu, w))
    mask = graph.call_function(aten.le.Scalar, (relu, 0))
    graph.output((last, mask))
    hoist(mask)
    graph.lint()
    assert relu.next is mask
    assert mask.next is last
    hoist(mask)
    assert relu.next is mask


def test_a_mask_made_of_a_hoisted_one():
    """Where the first one stands now counts, not where it stood."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    relu = graph.call_function(aten.relu.default, (x,))
    other = graph.call_function(aten.mm.default, (relu, w))
    first = graph.call_function(aten.le.Scalar, (relu, 0))
    second = graph.call_function(aten.logical_and.default, (first, other))
    graph.output((other, first, second))
    hoist(first)
    hoist(second)
    graph.lint()
    assert [n.name for n in graph.nodes][2:6] == [relu.name, first.name, other.name, second.name]

"""Errors of rounded tensors that a check measures, against the same rounding done by hand."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wtacrs_fx
from wtacrs_fx import Ledger, rounding
from wtacrs_fx.ledger_tables import compressed_table
from wtacrs_fx.passes.round import CODES, ROUNDED

from helpers import Recorder, Transformer, gradients, transformer_batch

OPTIONS = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "inner": "eager"}


class Gelu(nn.Module):
    """gelu'(a(x)) and gelu(a(x)) are rounded; the output has fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x))).cos().mean()


def by_hand(x: Tensor, form: rounding.Format) -> float:
    """Relative squared error of one rounding."""
    numbers = torch.ops.wtacrs.short_uniform(torch.tensor([12345]), 0, rounding.number_count(x.shape))
    found = rounding.dequantise(rounding.quantise(x, numbers, form), x.shape, x.dtype, form)
    return float((found - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_errors_are_those_of_the_formats(bits):
    torch.manual_seed(0)
    model, x = Gelu(), torch.randn(128, 128)
    result = wtacrs_fx.check(model, (x,), draws=2, **OPTIONS, round_bits=bits)
    h = model.a(x).detach().requires_grad_()
    (derivative,) = torch.autograd.grad(F.gelu(h).sum(), h)
    found = {line.readers: line.error for line in result.tensors}
    scales = {"scale_bits": 16, "group": 128 if bits == 8 else 64}
    assert found.keys() == {("gelu_backward",), ("mm",), ("mul",)}, (
        result.table()
    )  # (the last is the derivative of cos)
    assert found["gelu_backward",] == pytest.approx(
        by_hand(derivative, rounding.Format(bits, -0.1291, 1.1291)), rel=0.1
    )
    assert found["mm",] == pytest.approx(by_hand(F.gelu(h).detach(), rounding.Format(bits, **scales)), rel=0.1)
    assert "rel. squared error" in result.table()


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.long])])
def test_every_rounded_tensor_has_one(inner):
    """Also where Inductor's plan computes what is rounded in every reader; and the graphs of a check train as without."""
    torch.manual_seed(0)
    model, batch = Transformer(layers=1, dropout=0.1), transformer_batch()
    result = wtacrs_fx.check(model, batch, draws=2, **{**OPTIONS, "inner": inner}, round_bits=4)
    torch._dynamo.reset()
    recorder = Recorder(**{**OPTIONS, "round_bits": 4, "seed": 0})
    gradients(model, *batch, call=torch.compile(model, backend=recorder))
    expected = [c for c in recorder.ledger.compressed if c.bits > 1]
    assert {c.tensor for c in expected} == {c.tensor for c in result.tensors}
    assert all(1e-7 < c.error < {8: 1e-3, 4: 3e-2}[c.bits] for c in result.tensors), result.table()
    assert all(g is None for g in (p.grad for p in model.parameters()))
    assert result.to_dict()["tensors"][0]["error"] == result.tensors[0].error


def test_graph_by_graph():
    """Over a graph break; the second graph's input is a hundred times larger."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Gelu()

        def forward(self, x: Tensor) -> Tensor:
            first = self.layer(x)
            torch._dynamo.graph_break()
            return first + self.layer(100 * x)

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(128, 128)
    result = wtacrs_fx.check(model, (x,), draws=2, **OPTIONS, round_bits=8)
    assert result.tensors
    assert all(0 < c.error < 1e-3 for c in result.tensors)


def test_marks_are_where_the_codes_are():
    """In the forward every rounded tensor and its parts, in the backward none of the parts."""
    torch.manual_seed(0)
    recorder = Recorder(**{**OPTIONS, "round_bits": 4})
    gradients(model := Gelu(), torch.randn(128, 128), call=torch.compile(model, backend=recorder))
    forward, backward = recorder.forward[0].graph, recorder.backward[0].graph
    names = {c.tensor for c in recorder.ledger.compressed if c.bits > 1}
    assert {n.meta[ROUNDED] for n in forward.nodes if ROUNDED in n.meta} == names
    parts = [n.meta[CODES] for n in forward.nodes if CODES in n.meta]
    assert {(p.tensor, p.part) for p in parts} == {(p.tensor, i) for p in parts for i in range(p.parts)}
    assert {p.tensor for p in parts} == names
    assert not [n for n in backward.nodes if CODES in n.meta]


def test_without_rounding_there_are_none():
    result = wtacrs_fx.check(Transformer(), transformer_batch(), draws=2, **{**OPTIONS, "ratio": 0.5})
    assert result.tensors == ()
    assert "rel. squared error" not in result.table().split("saved for backward")[1]


def test_tables_and_stored_ledgers():
    """Equal tensors have the mean of their errors; a ledger keeps them."""
    recorder = Recorder(**{**OPTIONS, "round_bits": 8})
    gradients(model := Gelu(), torch.randn(128, 128), call=torch.compile(model, backend=recorder))
    line = next(c for c in recorder.ledger.compressed if c.bits > 1)
    assert "rel. squared error" not in compressed_table([line])
    measured = [dataclasses.replace(line, error=e) for e in (1e-4, 3e-4)]
    assert "2.0e-04" in compressed_table(measured)
    ledger = dataclasses.replace(recorder.ledger, compressed=tuple(measured))
    assert Ledger.from_dict(ledger.to_dict()) == ledger

"""Rounding where sizes are symbolic: one graph for every batch, with the bytes and the noise of a graph of fixed sizes."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import wtacrs_fx
from wtacrs_fx import Backend, WtacrsWarning, measure
from wtacrs_fx.packing import pack, unpack
from wtacrs_fx.rounding import BITS, Format, dequantise, number_count, quantise, written_bytes

from helpers import Moments, Recorder, Transformer, gradients, transformer_batch

ROUNDED = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "inner": "eager"}


def dynamic(model: nn.Module, backend, **options) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, **{"dynamic": True, **options})


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_codes_by_row(bits):
    """What is packed is unpacked again; leading dimensions stay."""
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (3, 5, 16))
    packed = pack(codes if bits > 1 else codes.bool(), bits, by_row=True)
    assert packed.shape == (3, 5, 16 * bits // 8)
    assert packed.dtype is torch.uint8
    assert torch.equal(unpack(packed, codes.shape, bits, by_row=True).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_formats_by_row(bits):
    """The same numbers as by the whole tensor, in as many bytes: only their places differ."""
    torch.manual_seed(0)
    x = torch.randn(6, 10, 256)
    assert number_count(x.shape) == number_count(x.shape, by_row=True) == 60 + 256
    numbers = torch.ops.wtacrs.short_uniform(torch.tensor([7]), 0, number_count(x.shape))
    forms = [Format(bits, scale_bits=16, by_row=by_row) for by_row in (False, True)]
    written = [quantise(x, numbers, form) for form in forms]
    found = [dequantise(w, x.shape, x.dtype, form) for w, form in zip(written, forms)]
    assert torch.equal(*found)
    assert written[1][0].shape == (6, 10, 32 * bits)
    assert sum(t.nbytes for t in written[1]) == written_bytes(x.shape, forms[1]) == written_bytes(x.shape, forms[0])


@pytest.mark.parametrize("bits", BITS)
def test_few_rows_of_symbolic_number(bits):
    """Where as few are known beforehand they are cut: what wrote and what reads must agree."""
    form, x = Format(bits, scale_bits=16, by_row=True), torch.randn(3, 256)
    assert number_count(x.shape) < number_count(x.shape, by_row=True) == 3 + 256
    numbers = torch.ops.wtacrs.short_uniform(torch.tensor([7]), 0, number_count(x.shape, by_row=True))
    written = quantise(x, numbers, form)
    assert sum(t.nbytes for t in written) == written_bytes(x.shape, form)
    assert (dequantise(written, x.shape, x.dtype, form) - x).abs().max() < 1.02 * 7 / form.levels


@pytest.mark.parametrize(
    ("inner", "bits"), [("eager", 4), pytest.param("inductor", 8, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_one_graph_for_every_batch(inner, bits):
    """Forward to the bit, held bytes as predicted, errors as with fixed sizes, and odd sizes are no new graph."""
    torch.manual_seed(0)
    model = Transformer(layers=1)
    backend = Backend(**{**ROUNDED, "inner": inner, "round_bits": bits})
    exact = torch.compile(model, backend="aot_eager_decomp_partition", dynamic=True)
    compiled = dynamic(model, backend)
    for size in (8, 5, 7):
        batch = transformer_batch(size)
        with measure.held(model) as held:
            loss = compiled(*batch)
        with measure.held(model) as held_exact:
            expected_loss = exact(*batch)
        assert (
            held.bytes == backend.ledger.saved_bytes or size != 8
        )  # (the ledger's bytes are those of the first batch)
        assert held.bytes < (0.45 if bits == 8 else 0.35) * held_exact.bytes
        assert torch.equal(loss, expected_loss) or inner == "inductor"
        found, expected = gradients(model, *batch, call=compiled), gradients(model, *batch)
        assert 0 < measure.relative_error(found, expected) < {8: 5e-4, 4: 0.05}[bits]
    assert len(backend.ledgers) == 1
    assert {c.bits for c in backend.ledger.compressed} >= {bits}


def test_the_mean_is_exact():
    torch.manual_seed(0)
    model, backend = Transformer(layers=1), Backend(**{**ROUNDED, "round_bits": 4, "seed": 1})
    compiled = dynamic(model, backend)
    gradients(model, *transformer_batch(8), call=compiled)
    batch, moments = transformer_batch(5), Moments()
    for _ in range(40):
        moments.add(gradients(model, *batch, call=compiled))
    for name, value in gradients(model, *batch).items():
        if value.square().mean() > 1e-16:  # (key biases have no gradient)
            rms = float(moments.z(name, value).square().mean().sqrt())
            # (Of vectors few numbers are independent: there are five sequences. 400 draws gave at most 1.23.)
            assert 0 < rms < (1.5 if value.dim() > 1 else 2.2), f"{name}: z rms {rms:.2f}"


@pytest.mark.works_with("Shapes", "a last, smaller batch, with `round_bits`", "as much is rounded behind it")
def test_a_last_smaller_batch():
    """After it Dynamo's graph is dynamic: as much is rounded, and nothing is said."""
    torch.manual_seed(0)
    model, backend = Transformer(layers=1), Backend(**{**ROUNDED, "round_bits": 8})
    compiled = dynamic(model, backend, dynamic=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WtacrsWarning)
        for size in (8, 5, 8):
            gradients(model, *transformer_batch(size), call=compiled)
    first, second = backend.ledgers
    assert any("s" in str(size) for c in second.compressed for size in c.shape)
    assert second.saved_bytes / second.saved_bytes_exact == pytest.approx(
        first.saved_bytes / first.saved_bytes_exact, abs=0.03
    )


def test_a_length_that_changes():
    """Written-out attention has tensors whose last size is the length: those stay as they are, all others are rounded."""
    torch.manual_seed(0)
    model, recorder = Transformer(layers=1), Recorder(**{**ROUNDED, "round_bits": 8})
    compiled = dynamic(model, recorder, dynamic=None)
    for length in (16, 24, 12):
        batch = transformer_batch(8, length)
        for x in batch:
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(batch[0], 1)
        found = gradients(model, *batch, call=compiled)
        assert 0 < measure.relative_error(found, gradients(model, *batch)) < 5e-4
    assert len(recorder.ledgers) == 1
    lines = recorder.ledger.compressed
    assert {"mm", "gelu_backward", "native_layer_norm_backward", "bmm"} <= {r for c in lines for r in c.readers}
    assert all(isinstance(c.shape[-1], int) or c.readers == ("bmm",) for c in lines), recorder.ledger.table()
    with measure.held(model) as held:
        compiled(*transformer_batch(8, 16))
    assert held.bytes == recorder.ledger.saved_bytes


@pytest.mark.parametrize("width", [66, 65])
def test_rows_of_no_whole_bytes_stay_as_they_are(width):
    """In a graph of symbolic sizes; and that nothing is rounded there is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    backend = Backend(**{**ROUNDED, "round_bits": 8})
    compiled = dynamic(lambda x: model(x).square().mean(), backend)
    with pytest.warns(WtacrsWarning, match="round_bits=8 has no effect in this graph, whose sizes are symbolic"):
        compiled(torch.randn(32, width)).backward()
    assert not backend.ledger.rounded


def test_under_a_budget():
    """The least peak of plans that may round is below that of plans that only recompute; one graph for every batch."""
    torch.manual_seed(0)
    model, peaks = Transformer(layers=2), {}
    for bits in (None, 4):
        backend = Backend(**{**ROUNDED, "memory_budget": 0.05, "round_bits": bits})
        compiled = dynamic(model, backend)
        for size in (8, 7):
            batch = transformer_batch(size)
            with pytest.warns(WtacrsWarning, match="This least peak is used") if size == 8 else nullcontext():
                found = gradients(model, *batch, call=compiled)
            assert measure.relative_error(found, gradients(model, *batch)) < (0.05 if bits else 1e-8)
        assert len(backend.ledgers) == 1
        assert backend.ledger.rounded is (bits is not None)
        peaks[bits] = backend.ledger.predicted.peak
    assert peaks[4] < peaks[None]


def test_a_check_measures_them():
    """The error of every rounded tensor of a graph with symbolic sizes."""
    torch.manual_seed(0)
    model = Transformer(layers=1)
    (x, target) = transformer_batch()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(target, 0)
    result = wtacrs_fx.check(model, (x, target), draws=2, **{**ROUNDED, "round_bits": 8})
    assert result.tensors
    assert any(isinstance(size, str) for c in result.tensors for size in c.shape)
    assert all(0 < c.error < 1e-3 for c in result.tensors), result.table()

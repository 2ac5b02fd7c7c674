"""On a GPU: what other files test on the CPU for what is particular to CUDA. Skipped where there is none."""

import copy

import pytest
import torch
from test_round import family
from torch import nn

import wtacrs_fx
from wtacrs_fx import Backend, SampleNorms, measure, norms_of, rng, sample_ids
from wtacrs_fx.benchmarks.frontier import SEED, slope_error
from wtacrs_fx.cli import main
from wtacrs_fx.estimators import ESTIMATORS, inclusion_probability, sanitize
from wtacrs_fx.passes.cost import roofline

from helpers import SMALL, Moments, Transformer, gradients, transformer_batch

DEVICE = "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = ("bert", "gpt2", "llama", "t5", "vit")


def on_device(name: str, dtype: torch.dtype = torch.float32, repeat: int = 8) -> tuple[nn.Module, dict]:
    """A model of tests/test_round.py with a batch ``repeat`` times as large, so that small buffers weigh little."""
    torch.manual_seed(0)
    model, batch = family(name)
    batch = {n: v.repeat(repeat, *(1 for _ in v.shape[1:])).to(DEVICE) for n, v in batch.items()}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    if name == "gpt2":
        model.loss_type = (
            "ForCausalLM"  # (found from the class's name it is None: a warning, and that breaks the graph)
        )
    return model.train().to(DEVICE, dtype), batch


def transformer(dropout: float = 0.0, layers: int = 2, width: int = 64, batch: int = 8) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = Transformer(width=width, layers=layers, dropout=dropout).to(DEVICE)
    return model, tuple(t.to(DEVICE) for t in transformer_batch(batch, 16, width))


def draws(call, batch: dict, model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """Gradients for one seed of dropout and ``count`` draws of rows and roundings."""
    found = []
    for i in range(count):
        torch.manual_seed(SEED)
        for _ in range(i):
            torch.ops.wtacrs.draw_seed(torch.device("cpu"))
        call(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    return found


def sampled(ledger: wtacrs_fx.Ledger) -> int:
    return sum(e.decision != "exact" for e in ledger.entries)


@pytest.mark.parametrize("budget", [None, 0.5, "auto"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_peak_and_held_bytes(name, budget):
    """Vectors have the gradients of the exact run with the same dropout masks; the planned peak is what the allocator saw."""
    model, batch = on_device(name)
    exact_call = torch.compile(copy.deepcopy(model, {id(p): p for p in model.parameters()}), backend="inductor")
    (exact,) = draws(exact_call, batch, model, 1)
    backend = Backend(ratio=0.3, min_bytes=0, min_rows=1, memory_budget=budget)
    call = torch.compile(model, backend=backend)
    (found,) = draws(call, batch, model, 1)
    real = {n: g for n, g in exact.items() if g.square().mean() > 1e-14}
    for n, g in real.items():
        assert g.dim() > 1 or measure.relative_error(found, {n: g}) < 1e-6, n
    ledger = backend.ledger
    assert sampled(ledger)
    assert any(measure.relative_error(found, {n: real[n]}) > 1e-6 for n in real if real[n].dim() > 1)
    with measure.held(model) as held:
        loss = call(**batch).loss
    assert held.bytes == pytest.approx(ledger.saved_bytes, rel=0.01)
    loss.backward()
    peaks = measure.peaks(lambda: call(**batch).loss.backward(), model)
    assert ledger.predicted.peak == pytest.approx(peaks.activations, rel=0.05)
    torch.manual_seed(1)
    total = measure.peak_bytes(lambda: call(**batch).loss.backward(), DEVICE)
    assert total == pytest.approx(peaks.total, rel=0.02)


@pytest.mark.parametrize("budget", [None, 0.5, "auto"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_gradients_are_slopes_of_the_loss(name, budget):
    """With dropout, for the masks of the forward, whatever is recomputed."""
    model, batch = on_device(name)
    call = torch.compile(model, backend=Backend(ratio=0.3, min_bytes=0, min_rows=1, memory_budget=budget))
    call(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    (grads,) = draws(call, batch, model, 1)

    def loss():
        torch.manual_seed(SEED)
        return call(**batch).loss

    values = {n: p for n, p in model.named_parameters() if n in grads}
    assert slope_error(loss, grads, values) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_rounding(name, bits):
    """The loss of the exact run up to float32's last digits, and the bounds of the same test on the CPU."""
    model, batch = on_device(name, repeat=1)

    def run(backend, count):
        torch._dynamo.reset()
        call = torch.compile(copy.deepcopy(model, {id(p): p for p in model.parameters()}), backend=backend)
        torch.manual_seed(1)
        return call(**batch).loss.detach(), draws(call, batch, model, count)

    loss, (exact,) = run("inductor", 1)
    real = {n: g for n, g in exact.items() if g.square().mean() > 1e-14}
    options = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "round_fused_attention": True}
    backend = Backend(round_bits=bits, **options)
    rounded, found = run(backend, 3)
    assert torch.allclose(loss, rounded, rtol=1e-6)
    errors = {n: sum(measure.relative_error(d, {n: g}) for d in found) / 3 for n, g in real.items()}
    largest = {8: 5e-4, 4: 0.05}[bits]
    assert not {n: e for n, e in errors.items() if e > largest}
    assert backend.ledger.saved_bytes < 0.6 * backend.ledger.saved_bytes_exact


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"ratio": 0.5, "round_bits": 4, "row_bits": 4}], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_mean_of_many_steps(options, mode):
    """Unbiased, under CUDA graphs too: their replays draw other rows every time."""
    model, batch = transformer()
    exact = gradients(model, *batch)
    backend = Backend(**{**SMALL, "memory_budget": None, **options})
    twin = copy.deepcopy(model)
    call = torch.compile(twin, backend=backend, mode=mode)
    moments = Moments()
    for _ in range(300):
        call(*batch).backward()
        moments.add({n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})
        twin.zero_grad(set_to_none=True)
    z = torch.cat([moments.z(n, g).flatten() for n, g in exact.items() if g.square().mean() > 1e-14])
    assert z.abs().max() < 6.5
    assert z.square().mean() < 1.3
    assert max(float(moments.standard_error(n).max()) for n in exact) > 0, "something is drawn"


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_nothing_waits_for_the_device(estimator):
    model, batch = transformer(dropout=0.1)
    call = torch.compile(model, backend=Backend(**SMALL, ratio=0.5, estimator=estimator))
    for _ in range(2):
        call(*batch).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, "auto"])
def test_autocast(dtype, budget):
    model, batch = on_device("gpt2")
    backend = Backend(ratio=0.3, min_bytes=0, min_rows=1, memory_budget=budget, round_bits=8)
    call = torch.compile(model, backend=backend)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype):
            loss = call(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3, losses
    assert sampled(backend.ledger)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_bfloat16(name):
    model, batch = on_device(name, torch.bfloat16)
    backend = Backend(ratio=0.3, min_bytes=0, min_rows=1, memory_budget="auto", row_bits=8)
    call = torch.compile(model, backend=backend)
    for _ in range(2):
        call(**batch).loss.backward()
    peaks = measure.peaks(lambda: call(**batch).loss.backward(), model)
    assert backend.ledger.predicted.peak == pytest.approx(peaks.activations, rel=0.05)


@pytest.mark.parametrize("host", [False, True])
def test_norms_of_samples(host):
    """On the device, and in pinned host memory: of the examples that were seen, and of no other."""
    model, batch = transformer()
    source = SampleNorms(32, device_memory=0) if host else SampleNorms(32)
    backend = Backend(**SMALL, ratio=0.3, norms=source, late="exact")
    call = torch.compile(model, backend=backend)
    for i in range(6):
        with sample_ids([(j + 8 * (i % 2)) for j in range(8)]):
            call(*batch).backward()
    tables = norms_of(model).state_dict()["tables"]
    assert tables
    for table in tables.values():
        assert torch.isfinite(table[:16].float()).all()
        assert (table[:16] >= 0).all()
        assert (table[16:] < 0).all()


def test_check_and_frontier_and_report(capsys):
    model, batch = on_device("bert")
    found = wtacrs_fx.check(model, batch, ratio=0.3, min_bytes=0, min_rows=1, round_bits=8)
    assert not found.faults, found.verdict()
    drawn = wtacrs_fx.frontier(model, batch, ratio=0.3, min_bytes=0, min_rows=1, points=4)
    assert len(drawn.points) > 4
    wtacrs_fx.report(model, batch, ratio=0.3)
    assert main(["report", "--model", "bert-base", "--batch-size", "4", "--seq-len", "32", "--device", DEVICE]) == 0
    assert "encoder" in capsys.readouterr().out


def test_swapped_linears():
    model, batch = transformer()
    exact = gradients(model, *batch)
    wtacrs_fx.swap_linears(model, ratio=0.5, min_rows=1, min_bytes=0)
    moments = Moments()
    for _ in range(300):
        moments.add(gradients(model, *batch))
    z = torch.cat([moments.z(n, g).flatten() for n, g in exact.items() if g.square().mean() > 1e-14])
    assert z.abs().max() < 6.5


@pytest.mark.parametrize("kind", ["peaked", "flat", "few", "broken", "heads", "long"])
def test_rows_are_kept_as_often_as_they_should_be(kind):
    """The kernel against the inclusion probabilities of the estimator that it stands for."""
    g = torch.Generator().manual_seed(0)
    w, k = {
        "peaked": (torch.rand(1000, generator=g) ** 8, 100),
        "flat": (torch.rand(500, generator=g).exp(), 100),
        "few": (torch.cat([torch.ones(5), torch.zeros(59)]), 10),
        "broken": (torch.tensor([float("nan"), float("inf"), -1.0, *range(30)]), 8),
        "heads": (torch.rand(3, 4, 50, generator=g), 7),
        "long": (torch.rand(20_000, generator=g) ** 4, 2000),
    }[kind]
    pi = inclusion_probability(sanitize(w), k)
    hits, draws = torch.zeros_like(pi), 400
    device = torch.device(DEVICE)
    for _ in range(draws):
        seed = torch.ops.wtacrs.draw_seed(device)
        rows, scale = (t.cpu() for t in torch.ops.wtacrs.select_rows(w.to(device), seed, 3, k, "systematic"))
        assert 0 <= rows.min() <= rows.max() < w.shape[-1]
        kept = scale > 0
        hits.scatter_add_(-1, rows, kept.double())
        torch.testing.assert_close(scale[kept], (1 / pi.gather(-1, rows)).float()[kept])
        assert (kept.sum(-1) == (w > 0).sum(-1).clamp(max=k) if kind == "few" else kept.all()).all()
    assert hits[pi == 0].sum() == 0
    assert (hits[pi == 1] == draws).all()
    drawn = (pi > 0.01) & (pi < 1)
    z = ((hits / draws - pi) / (pi * (1 - pi) / draws).sqrt())[drawn]
    assert not len(z) or (z.abs().max() < 6.5 and z.square().mean() < 1.3)
    from wtacrs_fx import select_kernel  # (needs Triton)

    for n in (1, 7, 5000):
        assert torch.equal(select_kernel.short_uniform(seed, 12, n).cpu(), rng.short_uniform(seed.cpu(), 12, n))


def test_time_model():
    """FLOPs a byte and bytes a second of a GPU, up to units that are mistaken."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        device = roofline(torch.device(DEVICE), dtype)
        assert 0.5 < device.flops / device.bandwidth < 1000
        assert 1e11 < device.bandwidth < 2e13

"""Number types: bfloat16, float16, autocast, loss scaling, adapters in float32."""

import pytest
import torch
from torch import nn

from wtacrs_fx import Backend

from helpers import SMALL, Recorder, Transformer, gradients, transformer_batch

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}


def distance(got, expected):
    a, b = (torch.cat([g[n].double().flatten() for n in sorted(g)]) for g in (got, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.works_with("Precision", "parameters in bfloat16, float16, float64", "yes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_parameters_in_other_types(dtype, budget):
    x, target = transformer_batch()
    reference = Transformer(layers=1)
    exact = gradients(reference, x, target)
    model, backend = reference.to(dtype), Backend(**{**KEEP_ALL, "memory_budget": budget})
    plain = gradients(model, x.to(dtype), target)
    got = gradients(model, x.to(dtype), target, call=torch.compile(model, backend=backend))
    assert all(g.dtype is dtype for g in got.values())
    assert distance(got, exact) < 2 * distance(plain, exact) + 1e-7
    assert backend.ledger.count("exact") < len(backend.ledger.entries)


@pytest.mark.works_with("Precision", "autocast (CPU)", "yes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype, inside):
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(**KEEP_ALL)
    exact = gradients(model, *batch)

    def cast(f):
        def call(*args):
            with torch.autocast("cpu", dtype=dtype):
                return f(*args)

        return call

    compiled = torch.compile(cast(model), backend=backend) if inside else cast(torch.compile(model, backend=backend))
    assert distance(gradients(model, *batch, call=compiled), exact) < 2 * distance(
        gradients(model, *batch, call=cast(model)), exact
    )
    assert backend.ledger.count("exact") < len(backend.ledger.entries)
    types = {e.module: e.dtype for e in backend.ledger.entries}
    assert types["blocks.0.up"] == str(dtype).removeprefix("torch."), "inputs are sampled in the type they are kept in"


@pytest.mark.works_with("Precision", "GradScaler", "a step with inf or NaN is skipped as in exact training")
def test_grad_scaler_skips_what_exact_training_skips():
    x, target = transformer_batch()
    bad = x.clone()
    bad[0, 0] = float("inf")
    logs = []
    for backend in (None, Backend(**{**KEEP_ALL, "ratio": 0.3})):
        torch.manual_seed(0)
        model = Transformer(layers=1)
        compiled = torch.compile(model, backend=backend) if backend else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        log = []
        for batch in (x, bad, x, x, bad):
            before = model.blocks[0].up.weight.clone()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = compiled(batch, target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            log.append((scaler.get_scale(), not torch.equal(before, model.blocks[0].up.weight)))
        logs.append(log)
    assert logs[0] == logs[1]
    assert [stepped for _, stepped in logs[1]] == [True, False, True, True, False]


class Adapted(nn.Module):
    """LoRA as peft writes it: the input is cast to the adapter's type."""

    def __init__(self, adapter):
        super().__init__()
        self.base = nn.Linear(64, 64).bfloat16().requires_grad_(False)
        self.a, self.b = nn.Linear(64, 8, bias=False, dtype=adapter), nn.Linear(8, 64, bias=False, dtype=adapter)

    def forward(self, x):
        x = torch.sin(x)
        return (self.base(x) + self.b(self.a(x.to(self.a.weight.dtype))).to(x.dtype)).float().square().mean()


@pytest.mark.works_with(
    "Precision", "float32 adapters in a bfloat16 model", "yes; the ledger's notes name the inputs held in float32"
)
def test_float32_adapters_are_pointed_at():
    x = torch.randn(256, 64).bfloat16()
    notes = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        backend, model = Backend(**KEEP_ALL), Adapted(dtype)
        gradients(model, x, call=torch.compile(model, backend=backend))
        notes[dtype] = "\n".join(backend.ledger.notes)
    assert "copied from bfloat16 to float32, twice the bytes: a. " in notes[torch.float32]
    assert "copied" not in notes[torch.bfloat16]


@pytest.mark.works_with("Precision", "tf32 (`set_float32_matmul_precision`)", "yes; sampled products follow it")
def test_float32_matmul_precision():
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(**KEEP_ALL)
    exact = gradients(model, *batch)
    torch.set_float32_matmul_precision("high")
    try:
        got = gradients(model, *batch, call=torch.compile(model, backend=backend))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert distance(got, exact) < 1e-2


def test_sampled_products_follow_the_precision_of_float32_products():
    """They are torch's own products of float32 matrices, which is what that setting is about."""
    recorder = Recorder(ratio=0.3)
    model = Transformer(layers=1)
    gradients(model, *transformer_batch(), call=torch.compile(model, backend=recorder))
    (backward,) = recorder.backward
    sites = [e for e in recorder.ledger.entries if e.decision != "exact"]
    products = backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    ours = [n for n in products if n.meta["val"].shape in {(64, 64), (256, 64), (64, 256)}]
    assert len(ours) >= len(sites) == 6
    assert {a.meta["val"].dtype for n in products for a in n.args} == {torch.float32}

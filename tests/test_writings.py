"""Every way of writing a linear layer is found, sampled without bias, and exact where nothing is dropped."""

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx

from helpers import SMALL, Moments, Recorder, calls, gradients

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs
WIDTH, OUT, ROWS = 24, 16, 40


class Conv1D(nn.Module):
    """Hugging Face's: weight [in, out], addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, OUT) * 0.2), nn.Parameter(torch.zeros(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:-1], OUT)


class Written(nn.Module):
    """A bare weight and a function of (x, weight)."""

    def __init__(self, function, shape=(WIDTH, OUT)) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(shape) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


class LoRA(nn.Module):
    """Frozen base, trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, OUT).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


class TransposedInput(nn.Module):
    """The input lies feature-first in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(OUT, WIDTH) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.sin(x).reshape(-1, WIDTH).t().contiguous()
        return (self.w @ flat).t()


WRITINGS = {
    "linear": (lambda: nn.Linear(WIDTH, OUT), 1),
    "linear_no_bias": (lambda: nn.Linear(WIDTH, OUT, bias=False), 1),
    "conv1d": (Conv1D, 1),
    "matmul": (lambda: Written(torch.matmul), 1),
    "at": (lambda: Written(lambda x, w: x @ w), 1),
    "at_transposed": (lambda: Written(lambda x, w: x @ w.t(), (OUT, WIDTH)), 1),
    "einsum": (lambda: Written(lambda x, w: torch.einsum("...d,do->...o", x, w)), 1),
    "einsum_heads": (lambda: Written(lambda x, w: torch.einsum("...d,dhe->...he", x, w), (WIDTH, 2, OUT // 2)), 1),
    "functional": (lambda: Written(nn.functional.linear, (OUT, WIDTH)), 1),
    "lora": (LoRA, 2),
    "tied": (Tied, 2),
    "transposed_input": (TransposedInput, 1),
}


class Head(nn.Module):
    """Something smooth before and after, so that the input is an activation and the gradient varies by row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(self.inner(torch.sin(x * self.scale))).square().sum()


def build(name: str, three_d: bool) -> tuple[Head, Tensor, int]:
    make, sites = WRITINGS[name]
    torch.manual_seed(3)
    x = torch.randn(4, ROWS // 4, WIDTH) if three_d else torch.randn(ROWS, WIDTH)
    return Head(make()), x, sites


@pytest.mark.parametrize("three_d", [False, True])
@pytest.mark.parametrize("name", WRITINGS)
def test_found_and_rewritten(name, three_d):
    model, x, sites = build(name, three_d)
    exact = gradients(model, x)
    recorder = Recorder(ratio=0.5)
    compiled = torch.compile(model, backend=recorder)
    sampled = gradients(model, x, call=compiled)

    assert len(recorder.ledger.entries) == sites
    assert recorder.ledger.count("exact") == 0
    assert calls(recorder.forward[0], wtacrs.draw_seed.default) == 1
    assert calls(recorder.backward[0], wtacrs.draw_seed.default) == 0
    products = [n for n in recorder.backward[0].graph.nodes if n.target in (aten.mm.default, aten.bmm.default)]
    contracted = [n.args[0].meta["val"].shape[-1] for n in products]
    assert contracted.count(ROWS // 2) == sites, "each weight gradient contracts over the kept rows"
    assert ROWS not in contracted, "no exact weight gradient is left"
    for key, value in exact.items():
        assert sampled[key].shape == value.shape
        if "bias" in key or key == "scale":
            torch.testing.assert_close(sampled[key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", WRITINGS)
@pytest.mark.parametrize("late", ["sample", "exact"])
def test_unbiased(name, late):
    model, x, _ = build(name, three_d=True)
    exact = gradients(model, x)
    compiled = torch.compile(model, backend=Recorder(ratio=0.5, late=late, estimator="systematic"))
    moments = Moments()
    for _ in range(400):
        moments.add(gradients(model, x, call=compiled))
    for key, value in exact.items():
        z = moments.z(key, value)
        assert z.square().mean().sqrt() < 1.3, f"{key}: z-scores of the mean have rms {z.square().mean().sqrt():.2f}"


@pytest.mark.parametrize("name", WRITINGS)
def test_all_rows_kept_equals_exact(name):
    """ratio just below 1 keeps every row (ceil): the rewritten product must then equal the exact one to rounding."""
    model, x, sites = build(name, three_d=True)
    exact = gradients(model, x)
    recorder = Recorder(ratio=0.9999)
    sampled = gradients(model, x, call=torch.compile(model, backend=recorder))
    assert recorder.ledger.count("early") + recorder.ledger.count("late") == sites
    for key, value in exact.items():
        torch.testing.assert_close(sampled[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Casts that autocast puts in between do not hide a site, and inputs cast once are drawn once."""
    torch.manual_seed(0)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, OUT), nn.Linear(WIDTH, OUT)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sin(x)
            return (self.a(y) * torch.sigmoid(self.b(y))).float().square().sum()

    model, x = Shared(), torch.randn(4, 10, WIDTH)

    def loss(call):
        with torch.autocast("cpu", dtype):
            return call(x)

    exact = gradients(model, call=lambda: loss(model))
    recorder = Recorder(ratio=0.9999, late="exact")
    compiled = torch.compile(model, backend=recorder)
    sampled = gradients(model, call=lambda: loss(compiled))
    assert {e.dtype for e in recorder.ledger.entries} == {str(dtype).removeprefix("torch.")}
    assert recorder.ledger.count("early") == 2
    assert calls(recorder.forward[0], wtacrs.select_rows.default) == 1
    for key in exact:
        torch.testing.assert_close(sampled[key], exact[key], rtol=0.05, atol=0.05)


def test_lora_names():
    model, x, _ = build("lora", three_d=True)
    backend = wtacrs_fx.Backend(ratio=0.5, inner="eager", **SMALL)
    gradients(model, x, call=torch.compile(model, backend=backend))
    assert {e.module for e in backend.ledger.entries} == {"inner.lora_A", "inner.lora_B"}

"""Rows minus their mean: the mean of the gradient stays exact, and what all rows have in common costs no noise."""

import pytest
import torch
from torch import Tensor, nn

from wtacrs_fx import Backend, measure

from helpers import SMALL, Moments, Transformer, gradients, transformer_batch

ROWS = 64


class Layers(nn.Module):
    """A layer with a computed input that nothing else needs (early), and one behind tanh, which does (late)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(128, 128) / 128**0.5)
        self.a, self.b = nn.Linear(128, 128, bias=False), nn.Linear(128, 128)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return (self.b((self.a(x @ self.mix) / 9 + 1).tanh()) * g).sum()


def layers(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Inputs with a mean as long as the rows' differences from it."""
    torch.manual_seed(0)
    return Layers().to(dtype), (torch.randn(ROWS, 128, dtype=dtype) + 1, torch.randn(ROWS, 128, dtype=dtype) + 0.2)


def draw(model: nn.Module, batch: tuple, draws: int, **options) -> tuple[Moments, Backend]:
    torch._dynamo.reset()
    torch.manual_seed(1)
    backend = Backend(**{**SMALL, "ratio": 0.3, "inner": "eager", "center_rows": True, **options})
    compiled, moments = torch.compile(model, backend=backend), Moments()
    for _ in range(draws):
        moments.add(gradients(model, *batch, call=compiled))
    return moments, backend


@pytest.mark.parametrize("row_bits", [None, 8])
@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
@pytest.mark.parametrize("late", ["sample", "exact"])
def test_the_mean_is_exact(estimator, late, row_bits):
    """z-scores of early and late sites; 64 rows, so their mean square is 1 with a standard error of 0.18."""
    model, batch = layers()
    exact = gradients(model, *batch)
    moments, backend = draw(model, batch, 150, estimator=estimator, late=late, row_bits=row_bits)
    decisions = {e.module: e.decision for e in backend.ledger.entries}
    assert decisions == {"a": "early", "b": "late" if late == "sample" else "exact"}
    for name in ("a.weight", "b.weight")[: 1 + (late == "sample")]:
        assert moments.standard_error(name).max() > 0
        assert float(moments.z(name, exact[name]).square().mean()) < 1 + 4.5 * 0.18, name
    torch.testing.assert_close(moments.mean("b.bias").float(), exact["b.bias"])


def test_noise_of_the_mean_is_gone():
    """The mean is half of the rows' squares here: without it there is at most 0.7 of the noise."""
    model, batch = layers()
    noise = {}
    for center in (False, True):
        moments, _ = draw(model, batch, 100, estimator="systematic", center_rows=center)
        noise[center] = {n: float(moments.standard_error(n).square().sum()) for n in ("a.weight", "b.weight")}
    assert all(noise[True][n] < 0.7 * noise[False][n] for n in noise[True]), noise


def test_equal_rows_are_exact():
    """All rows are their mean then: nothing is left to estimate."""
    model, (x, g) = layers()
    batch = x[:1].expand(ROWS, -1).contiguous(), g
    exact = gradients(model, *batch)
    moments, _ = draw(model, batch, 1)
    for name, value in exact.items():
        torch.testing.assert_close(moments.mean(name).float(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("taken_out", [{"center_rows": True}, {"directions": 8}], ids=["mean", "directions"])
@pytest.mark.parametrize("late", ["sample", "exact"])
def test_bytes_are_those_held(late, taken_out):
    """A mean row a draw is held too, and directions with their coefficients."""
    torch._dynamo.reset()
    model, batch = Transformer(width=128), transformer_batch(width=128)
    backend = Backend(**{**SMALL, "ratio": 0.3, "inner": "eager", "late": late, **taken_out, "row_bits": 4})
    compiled = torch.compile(model, backend=backend)
    with measure.held(model) as held:
        loss = compiled(*batch)
    loss.backward()
    assert held.bytes == backend.ledger.saved_bytes
    assert sum(t.bytes_now for t in backend.ledger.tensors) == backend.ledger.saved_bytes


def test_bfloat16():
    model, batch = layers(torch.bfloat16)
    exact = gradients(model, *batch)
    moments, _ = draw(model, batch, 1, ratio=0.98)
    for name, value in exact.items():
        assert moments.mean(name).dtype is torch.float64
        assert float((moments.mean(name) - value).square().sum() / value.double().square().sum()) < 0.1


def test_attention_keeps_plain_rows():
    """Its products have no mean taken out, and all gradients stay unbiased."""
    torch.manual_seed(0)
    model, batch = Transformer(), transformer_batch()
    exact = gradients(model, *batch)
    moments, backend = draw(model, batch, 60, attention=True, ratio=0.5, exclude=())
    assert len(backend.ledger.entries) > 13
    for name, value in exact.items():
        if value.abs().max() > 1e-7:
            assert float(moments.z(name, value).square().mean().sqrt()) < 1.5, name


class Padded(Layers):
    def forward(self, x: Tensor, g: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1), g * attention_mask.reshape(-1, 1))


@pytest.mark.parametrize("late", ["sample", "exact"])
def test_the_mean_is_over_rows_that_are_no_padding(late):
    """Those are equal here: without the padding nothing is left to estimate. With it there is, and the mean is right too."""
    torch.manual_seed(0)
    model, x, g = Padded(), torch.randn(4, 16, 128), torch.randn(ROWS, 128)
    mask = torch.ones(4, 16)
    mask[:, 10:] = 0
    x[mask > 0] = 1.0
    batch = x, g, mask
    exact, noise = gradients(model, *batch), {}
    for padding in (None, "attention_mask"):
        moments, backend = draw(model, batch, 60, late=late, padding=padding)
        assert backend.ledger.count("early") == 1
        name = "a.weight"
        noise[padding] = float(moments.standard_error(name).square().sum() * 60 / exact[name].square().sum())
        assert float(moments.z(name, exact[name]).square().mean()) < 1 + 4.5 * 0.18 or noise[padding] < 1e-9
    assert noise["attention_mask"] < 1e-9 < 0.05 < noise[None], noise

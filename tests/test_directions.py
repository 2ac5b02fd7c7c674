"""Principal directions of the rows: what they hold is exact, the mean of the gradient too, whatever the directions are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wtacrs_fx import Backend, calibrate, directions
from wtacrs_fx.directions import SAMPLE, limit, orthonormal

from helpers import SMALL, Moments, Recorder, Transformer, calls, gradients, transformer_batch

ROWS, WIDTH = 64, 128


class Layers(nn.Module):
    """A layer with a computed input that nothing else needs (early), and one behind tanh, which does (late)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, g: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.b((self.a(x.flatten(0, -2) @ self.mix) / 9 + 1).tanh()) * g.flatten(0, -2)
        return (y if attention_mask is None else y * attention_mask.reshape(-1, 1)).sum()


def layers(rank: int = 4, rest: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple]:
    """Inputs with a mean, a few strong directions, and a rest."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, rank) @ torch.randn(rank, WIDTH) + rest * torch.randn(ROWS, WIDTH) + 1
    return Layers().to(dtype), (x.to(dtype), torch.randn(ROWS, WIDTH, dtype=dtype))


def draw(model: nn.Module, batch: tuple, draws: int, dynamic: bool | None = None, **options) -> tuple[Moments, Backend]:
    torch._dynamo.reset()
    torch.manual_seed(1)
    backend = Backend(**{**SMALL, "ratio": 0.3, "inner": "eager", "directions": 8, **options})
    compiled, moments = torch.compile(model, backend=backend, dynamic=dynamic), Moments()
    for _ in range(draws):
        moments.add(gradients(model, *batch, call=compiled))
    return moments, backend


def noise(moments: Moments, name: str, exact: dict) -> float:
    """Relative squared error of one draw."""
    return float(moments.standard_error(name).square().sum() * moments.n / exact[name].square().sum())


@pytest.mark.parametrize(
    ("estimator", "late", "options"),
    [
        ("systematic", "sample", {}),
        ("systematic", "exact", {"row_bits": 8}),
        ("wta_crs", "sample", {"row_bits": 4}),
        ("wta_crs", "exact", {}),
        ("crs", "sample", {}),
    ],
)
def test_the_mean_is_exact(estimator, late, options):
    """z-scores of early and late sites; 64 rows, so that their mean square is 1 with a standard error of 0.18."""
    model, batch = layers()
    exact = gradients(model, *batch)
    moments, backend = draw(model, batch, 120, estimator=estimator, late=late, **options)
    assert {e.module: e.decision for e in backend.ledger.entries} == {
        "a": "early",
        "b": "late" if late == "sample" else "exact",
    }
    for name in ("a.weight", "b.weight")[: 1 + (late == "sample")]:
        assert moments.standard_error(name).max() > 0
        assert float(moments.z(name, exact[name]).square().mean()) < 1 + 4.5 * 0.18, name
    torch.testing.assert_close(moments.mean("b.bias").float(), exact["b.bias"])


def test_wrong_directions_cost_variance_only(monkeypatch):
    model, batch = layers()
    exact = gradients(model, *batch)
    wrong = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(5)) / WIDTH**0.5
    monkeypatch.setattr(directions, "orthonormal", lambda rows: 1.5 * wrong)
    moments, _ = draw(model, batch, 120)
    for name in ("a.weight", "b.weight"):
        assert float(moments.z(name, exact[name]).square().mean()) < 1 + 4.5 * 0.18, name


def test_noise_of_the_directions_is_gone():
    """They hold nine tenths of the squares beside the mean."""
    model, batch = layers()
    exact = gradients(model, *batch)
    found = {n: draw(model, batch, 60, center_rows=True, directions=n)[0] for n in (0, 8)}
    for name in ("a.weight", "b.weight"):
        assert noise(found[8], name, exact) < 0.35 * noise(found[0], name, exact), name


class Columns(nn.Module):
    """A product whose rows are the columns of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return ((self.a.weight @ (x.T * 2)) * g.T).sum()


@pytest.mark.parametrize("columns", [False, True])
def test_inputs_of_low_rank_are_exact_but_for_what_their_coefficients_are_rounded_by(columns):
    model, batch = layers(rest=0)
    model = Columns() if columns else model
    exact = gradients(model, *batch)
    moments, backend = draw(model, batch, 20, late="exact")
    assert backend.ledger.count("early") == 1
    assert 0 < noise(moments, "a.weight", exact) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types(dtype):
    model, batch = layers(dtype=dtype)
    exact = gradients(model, *batch)
    moments, _ = draw(model, batch, 30, ratio=0.9)
    for name in ("a.weight", "b.weight"):
        # (rows in bfloat16: the exact gradient has errors of its own)
        assert float((moments.mean(name) - exact[name]).square().sum() / exact[name].double().square().sum()) < 0.01


def test_symbolic_sizes():
    """Coefficients are kept as they are."""
    model, (x, g) = layers()
    moments, backend = draw(model, (x, g), 1, dynamic=True)
    assert backend.ledger.count("early") == 1
    moments, _ = draw(model, (x[:48], g[:48]), 30, dynamic=True, ratio=0.9)
    exact = gradients(model, x[:48], g[:48])
    for name in ("a.weight", "b.weight"):
        assert float((moments.mean(name) - exact[name]).square().sum() / exact[name].square().sum()) < 0.01


def test_directions_are_those_of_rows_that_are_no_padding():
    """Rows of padding are by far the longest here, and have directions of their own."""
    torch.manual_seed(0)
    model, (x, g) = layers(rest=0.1)
    x = x.view(4, 16, WIDTH).clone()
    x[:, 10:] = 30 * torch.randn(4, 6, WIDTH)
    mask = torch.ones(4, 16)
    mask[:, 10:] = 0
    exact = gradients(model, x, g, mask)
    found = {p: draw(model, (x, g, mask), 30, late="exact", padding=p)[0] for p in (None, "attention_mask")}
    small, large = (noise(found[p], "a.weight", exact) for p in ("attention_mask", None))
    assert small < 0.1 * large, (small, large)


def test_one_basis_a_draw_and_none_for_attention():
    """q, k and v share theirs; each backward product has an exact part."""
    recorder = Recorder(directions=8, attention=True, ratio=0.5)
    model, batch = Transformer(layers=1), transformer_batch()
    gradients(model, *batch, call=torch.compile(model, backend=recorder))
    target = torch.ops.wtacrs.principal_directions.default
    draws = {e.module for e in recorder.ledger.entries if e.decision != "exact" and "shared" not in e.reason}
    assert {"blocks.0.q", "blocks.0.o", "blocks.0.up", "blocks.0.down"} <= draws
    assert calls(recorder.forward[0], target) == 4
    assert calls(recorder.backward[0], target) == 0


def test_narrow_inputs_have_fewer():
    assert (limit(16, 384), limit(16, 64), limit(16, 7), limit(0, 64)) == (16, 8, 0, 0)


@pytest.mark.long
def test_compiled():
    """By Inductor."""
    model, batch = layers()
    exact = gradients(model, *batch)
    moments, backend = draw(model, batch, 100, inner="inductor")
    for name in ("a.weight", "b.weight"):
        assert float(moments.z(name, exact[name]).square().mean()) < 1 + 4.5 * 0.18, name
    assert backend.ledger.count("exact") == 0


def test_calibration_knows_of_them():
    torch.manual_seed(0)
    model, (x, g) = layers(rest=0.2)
    ratios = {}
    for n in (0, 8):
        options = {**SMALL, "late": "exact", "inner": "eager", "center_rows": True, "directions": n}
        found = calibrate(model, [{"x": x.view(4, 16, WIDTH), "g": g.view(4, 16, WIDTH)}], noise=0.3, **options)
        ratios[n] = sum(layer.ratio for layer in found.layers)
    assert ratios[8] < 0.7 * ratios[0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 5, 40, SAMPLE + 100]),
    width=st.sampled_from([8, 24, 64]),
    kind=st.sampled_from(["plain", "rank 2", "zero", "huge", "tiny", "bfloat16"]),
)
def test_directions_are_orthonormal_and_hold_what_they_can(rows, width, kind):
    g = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=g) * torch.logspace(0, -2, width)
    scale = {"huge": 1e12, "tiny": 1e-12, "zero": 0.0}.get(kind, 1.0)
    x = torch.randn(rows, 2, generator=g) @ torch.randn(2, width, generator=g) if kind == "rank 2" else x * scale
    x = x.to(torch.bfloat16) if kind == "bfloat16" else x
    mean, r = x.float().mean(0, keepdim=True), width // 4
    basis = torch.ops.wtacrs.principal_directions(x, mean, None, r)
    assert basis.shape == (r, width)
    assert basis.isfinite().all()
    assert torch.linalg.matrix_norm(basis @ basis.T, 2) < 1.01
    centred = x.double() - mean
    values = torch.linalg.svdvals(centred).square()
    held = (centred @ basis.double().T).square().sum()
    assert held >= 0.85 * values[:r].sum() - 1e-9 * values.sum()


def test_what_is_not_finite_raises_no_error_and_shows():
    model, (x, g) = layers()
    x[3, 5] = float("inf")
    moments, _ = draw(model, (x, g), 1)
    assert not moments.mean("a.weight").isfinite().all()
    assert not orthonormal(torch.full((2, 8), float("nan"))).isfinite().any()

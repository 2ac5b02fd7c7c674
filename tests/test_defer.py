"""Codes are made where their tensor is computed anyway, with one exponential for a gated unit and its derivative."""

import re

import pytest
import torch
from test_costly import NUMBERS, traced
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from wtacrs_fx import Backend, measure
from wtacrs_fx.passes import work
from wtacrs_fx.passes.defer import NUMBERS as NUMBERS_OP
from wtacrs_fx.passes.defer import defer_codes, share_exponentials
from wtacrs_fx.passes.round import CODES, ROUNDED, Codes
from wtacrs_fx.rounding import Format, quantise

from helpers import SMALL, Recorder, calls, gradients

aten = torch.ops.aten
FORM = Format(8, scale_bits=16)


@pytest.fixture(params=[FORM, Format(4, scale_bits=16, group=64)], ids=["8 bits", "4 bits"])
def form(request, monkeypatch):
    """In 4 bits the random numbers are among the results."""
    monkeypatch.setitem(globals(), "FORM", request.param)


ROUND = {**SMALL, "ratio": 1.0, "round_bits": 8, "memory_budget": None}


def marked(function, *inputs):
    """A traced function (tensor, results, codes...) whose tensor and codes say so; the tensor is no result any more."""
    module = traced(function, *inputs)
    output = module.graph.output_node()
    tensor, *results = output.args[0]
    tensor.meta[ROUNDED] = "t"
    parts = [n for n in results if n.meta["val"].dtype in (torch.uint8, torch.int32) or n.op == "placeholder"]
    assert len(parts) == (3 if FORM.dithered else 2)
    for i, node in enumerate(parts):
        node.meta[CODES] = Codes("t", i, len(parts), [0, 1], FORM)
    output.args = (tuple(results),)
    module.recompile()
    return module


def gated(x, a, b, numbers):
    gate = x @ a
    silu = gate / (1 + (-gate).exp())
    codes = quantise(silu, numbers, FORM)
    return silu, (silu * (x @ b)) @ b.T, *codes


def two_readers(x, a, b, numbers):
    gate = x @ a
    silu = gate / (1 + (-gate).exp())
    codes = quantise(silu, numbers, FORM)
    unit = silu * (x @ b)
    return silu, unit @ b.T, (silu + unit @ b.T @ b) @ b.T, *codes


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("function", [gated, two_readers])
def test_codes_move_behind_the_call_to_the_first_reader(function):
    torch.manual_seed(0)
    inputs = torch.randn(64, 128), torch.randn(128, 256) / 11, torch.randn(128, 256) / 11, NUMBERS
    module = marked(function, *inputs)
    expected, count = module(*inputs), len(module.graph.nodes)
    assert _products_before_the_range(module) == 1
    assert defer_codes(module.graph) == 1
    module.graph.lint()
    module.recompile()
    assert _products_before_the_range(module) == 2
    assert len(module.graph.nodes) == count
    assert all(torch.equal(a, b) for a, b in zip(module(*inputs), expected))
    assert defer_codes(module.graph) == 0


def _products_before_the_range(module):
    targets = [n.target for n in module.graph.nodes]
    return targets[: targets.index(aten.amin.default)].count(aten.mm.default)


def in_memory(x, a, b, numbers):
    """A product reads the tensor first."""
    silu = F.silu(x @ a)
    codes = quantise(silu, numbers, FORM)
    return silu, silu @ b.T, silu * (x @ b), *codes


def view_of_memory(x, a, b, numbers):
    """Heads of a product's result, which another product reads later."""
    view = (x @ a).view(64, 8, 32)
    codes = quantise(view.flatten(1), numbers, FORM)
    return view, (view * 2 + (x @ b).view(64, 8, 32)), *codes


def no_call_between(x, a, b, numbers):
    silu = F.silu(x @ a)
    codes = quantise(silu, numbers, FORM)
    return silu, (silu * silu.tanh()) @ b.T, *codes


def no_other_reader(x, a, b, numbers):
    silu = F.silu(x @ a)
    return silu, x @ b, *quantise(silu, numbers, FORM)


def range_is_read(x, a, b, numbers):
    """What the codes are made with is a result of its own."""
    silu = F.silu(x @ a)
    codes, scales, *numbers = quantise(silu, numbers, FORM)
    return silu, silu * (x @ b), (scales * 2).sum(), codes, scales, *numbers


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("function", [in_memory, view_of_memory, no_call_between, no_other_reader, range_is_read])
def test_codes_stay_where_they_are(function):
    module = marked(function, torch.randn(64, 128), torch.randn(128, 256), torch.randn(128, 256), NUMBERS)
    before = [n.name for n in module.graph.nodes]
    assert defer_codes(module.graph) == 0
    assert [n.name for n in module.graph.nodes] == before


def derivative(x, a, b, numbers):
    """The codes' tensor is computed from a sigmoid that stands in front of the exponential's sum."""
    gate = x @ a
    t = gate.sigmoid() * (x @ b)
    codes = quantise(t, numbers, FORM)
    return t, (gate / (1 + (-gate).exp())) @ b.T, *codes


def derivative_later(x, a, b, numbers):
    """It stands behind the sum, and behind what else reads that."""
    gate = x @ a
    unit = (gate / (1 + (-gate).exp())) @ b.T
    t = gate.sigmoid() * (x @ b)
    return t, unit, *quantise(t, numbers, FORM)


@pytest.mark.parametrize("function", [derivative, derivative_later])
def test_a_sigmoid_behind_codes_takes_the_exponential_that_is_there(function):
    torch.manual_seed(0)
    inputs = torch.randn(64, 128), torch.randn(128, 256) / 11, torch.randn(128, 256) / 11, NUMBERS
    module = marked(function, *inputs)
    expected = module(*inputs)
    assert (calls(module, aten.sigmoid.default), calls(module, aten.exp.default)) == (1, 1)
    assert share_exponentials(module.graph) == 1
    module.graph.lint()
    module.recompile()
    assert (calls(module, aten.sigmoid.default), calls(module, aten.exp.default)) == (0, 1)
    assert calls(module, aten.reciprocal.default) > 0
    got = module(*inputs)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:]):
        assert (a.double() - b.double()).abs().max() <= 1 + 1e-5 * b.double().abs().max(), "at most the next code"
    assert (got[1] != expected[1]).double().mean() < 1e-3
    assert share_exponentials(module.graph) == 0


def sigmoid_is_a_result(x, a, b, numbers):
    gate = x @ a
    sigmoid = gate.sigmoid()
    return sigmoid, (gate / (1 + (-gate).exp())) @ b.T, sigmoid * 2, *quantise(sigmoid, numbers, FORM)


def no_exponential(x, a, b, numbers):
    t = (x @ a).sigmoid()
    return t, x @ b, *quantise(t, numbers, FORM)


def of_another(x, a, b, numbers):
    gate, up = x @ a, x @ b
    t = up.sigmoid()
    return t, (gate / (1 + (-gate).exp())) @ b.T, *quantise(t, numbers, FORM)


def another_sum(x, a, b, numbers):
    gate = x @ a
    t = gate.sigmoid()
    return t, (gate / (2 + (-gate).exp())) @ b.T, *quantise(t, numbers, FORM)


@pytest.mark.parametrize("function", [sigmoid_is_a_result, no_exponential, of_another, another_sum])
def test_a_sigmoid_stays(function):
    module = marked(function, torch.randn(64, 128), torch.randn(128, 256), torch.randn(128, 256), NUMBERS)
    assert share_exponentials(module.graph) == 0
    assert calls(module, aten.sigmoid.default) == 1


class Unit(nn.Module):
    """Gated units, one behind the other."""

    def __init__(self, activation, layers=2):
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)]) for _ in range(layers)
        )

    def forward(self, x):
        for gate, up, down in self.layers:
            x = x + down(self.activation(gate(x)) * up(x))
        return x.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.sigmoid, lambda x: F.gelu(x, approximate="tanh")])
def test_gated_units(activation, dtype, monkeypatch):
    """The loss is exact, the codes are those that would be made earlier, and gradients are close to exact ones."""
    torch.manual_seed(0)
    model, x = Unit(activation).to(dtype), torch.randn(256, 128, dtype=dtype)
    torch._dynamo.reset()
    exact_loss = torch.compile(model, backend="aot_eager_decomp_partition")(x)
    exact = gradients(model, x)
    counts: list[int] = []

    def run(defer):
        monkeypatch.setattr(work, "defer_codes", lambda graph, _: counts.append(defer(graph)))
        monkeypatch.setattr(work, "share_exponentials", lambda graph: 0)
        torch._dynamo.reset()
        torch.manual_seed(1)
        recorder = Recorder(**ROUND, inner="eager")
        compiled = torch.compile(model, backend=recorder)
        assert torch.equal(compiled(x), exact_loss)
        torch.manual_seed(1)
        return gradients(model, x, call=compiled)

    now, early = run(defer_codes), run(lambda graph: 0)
    assert counts == [2, 0]
    assert all(torch.equal(now[n], early[n]) for n in now)
    assert all(
        measure.relative_error(now, {n: g}) < (5e-4 if dtype is torch.float32 else 5e-3) for n, g in exact.items()
    )


@pytest.mark.parametrize(("together", "moved"), [(True, 3), (False, 2)])
def test_numbers_of_moved_codes_come_behind_the_product(together, moved, monkeypatch):
    """Those of the activation and of the derivative, and without a budget those of the unit, which is in memory."""
    torch.manual_seed(0)
    model, x = Unit(F.silu), torch.randn(256, 128)
    asked = []
    monkeypatch.setattr(work, "defer_codes", lambda g, together_: asked.append(together_) or defer_codes(g, together))
    recorder = Recorder(**ROUND, inner="eager")
    torch._dynamo.reset()
    gradients(model, x, call=torch.compile(model, backend=recorder))
    targets = [n.target for n in recorder.forward[0].graph.nodes if n.op == "call_function"]
    products = [i for i, target in enumerate(targets) if target is aten.addmm.default]
    for product in (products[1], products[4]):  # (the second of every unit)
        assert targets[product + 1 : product + 1 + moved] == [NUMBERS_OP] * moved
        assert targets[product + 1 + moved] is not NUMBERS_OP
    assert sum(c.bits == 8 for c in recorder.ledger.compressed) == targets.count(NUMBERS_OP) > 2 * moved
    gradients(model, x, call=torch.compile(model, backend=Backend(**{**ROUND, "memory_budget": 0.7}, inner="eager")))
    assert asked[0] is True
    assert set(asked[1:]) == {False}


def test_one_exponential_a_pass():
    """The forward's kernels compute the exponential of a gated unit twice: for the ranges, and for the codes and the unit.
    (Silu's codes, the derivative's and the unit would each do so on their own.)"""
    torch.manual_seed(0)
    model, x = Unit(F.silu, layers=1), torch.randn(256, 128)
    exact = gradients(model, x)
    torch._dynamo.reset()
    backend = Backend(**ROUND)
    compiled = torch.compile(model, backend=backend)
    found: list[dict] = []
    _, (forward, _) = run_and_get_code(lambda: found.append(gradients(model, x, call=compiled)))
    assert len(re.findall(r"\.exp\(\)", forward)) == 2, forward
    assert "sigmoid" not in forward
    assert len(backend.ledger.compressed) >= 3
    assert all(measure.relative_error(found[0], {n: g}) < 5e-4 for n, g in exact.items())

"""The report and the check of models that are written in other ways: shared weights, tensors as attributes, compiled before."""

import collections
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import wtacrs_fx
from wtacrs_fx import measure

from helpers import SMALL

OPTIONS = {"ratio": 0.5, "inner": "eager", **SMALL}


class Shared(nn.Module):
    """Two modules with one weight, one module that is called twice, and an output in a dict of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> dict:
        x = torch.tanh(self.b(torch.tanh(self.a(x)).sin()))
        for _ in range(2):
            x = nn.functional.gelu(self.twice(x))
        return {"logits": x.detach(), "more": {"energy": x.square().mean()}}


def test_shared_weights_are_one_gradient_of_several_products():
    result = wtacrs_fx.check(Shared(), torch.randn(256, 64), draws=20, **OPTIONS)
    assert [{*x.module.split(", ")} for x in result.layers] == [{"twice"}, {"a", "b"}]
    assert result.layers[1].decision == "late, early"
    assert result.faults == [], result.table()
    rows = {r.name: r for r in result.held if r.kind == "site"}
    assert rows.keys() == {x.module for x in result.layers}
    early = 128 * (64 * 4 + 8)  # rows, their indices and scales
    assert rows[result.layers[1].module].measured >= early


def test_parameters_that_make_one_weight_are_both_checked():
    model = nn.Sequential(weight_norm(nn.Linear(64, 64)), nn.Tanh(), nn.Linear(64, 64))
    result = wtacrs_fx.check(model, torch.randn(256, 64), draws=20, **OPTIONS)
    assert {x.module for x in result.layers} >= {f"0.parametrizations.weight.original{i}" for i in range(2)}
    assert result.faults == [], result.table()


class Attributes(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale, self.more = torch.randn(64), {"shifts": [torch.randn(64)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (torch.tanh(self.a(x)) * self.scale + self.more["shifts"][0]).sin() * self.more["shifts"][0]
        return self.b(x).square().mean()


def test_tensors_that_are_attributes_are_held_with_the_model():
    model, x = Attributes(), torch.randn(256, 64)
    ledger = wtacrs_fx.report(model, x, **OPTIONS)
    with measure.held(model) as count:
        loss = model(x)
    assert loss.requires_grad
    assert count.bytes == ledger.saved_bytes_eager
    result = wtacrs_fx.check(model, x, draws=20, **OPTIONS)
    assert result.saved_bytes == ledger.saved_bytes
    assert result.saved_bytes_exact == ledger.saved_bytes_exact
    assert result.faults == [], result.table()
    assert type(model.scale) is torch.Tensor, "the model is as it was"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def test_a_model_that_is_compiled_already_is_looked_at_as_it_was():
    model, x = Plain(), torch.randn(256, 64)
    compiled = torch.compile(model, backend="eager")
    assert wtacrs_fx.report(compiled, x, **OPTIONS) == wtacrs_fx.report(model, x, **OPTIONS)
    result = wtacrs_fx.check(compiled, x, draws=2, **OPTIONS)
    assert {x.module for x in result.layers} <= {"a", "b"}


def test_mappings_of_other_types_are_keyword_arguments():
    x = torch.randn(256, 64)
    batch = collections.UserDict(x=x)  # as that of a tokenizer
    assert wtacrs_fx.report(Plain(), batch, **OPTIONS) == wtacrs_fx.report(Plain(), x, **OPTIONS)


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch counts them together"
)
def test_checks_and_reports_leave_training_its_recompilations():
    """More of them than torch compiles one code again (8 times), in the process that trains behind them."""
    torch._dynamo.reset()
    model, x = Plain(), torch.randn(256, 64)
    for i in range(torch._dynamo.config.recompile_limit // 2 + 1):
        options = {**OPTIONS, "ratio": 0.3 + 0.1 * i}
        assert wtacrs_fx.check(model, x, draws=2, **options).layers
        assert wtacrs_fx.report(model, x, **options).sampled
    backend = wtacrs_fx.Backend(**OPTIONS)
    torch.compile(model, backend=backend)(x).backward()
    assert backend.ledger.sampled


class Inner(nn.Module):
    """A graph break inside of a module: Dynamo's paths begin at it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        torch._dynamo.graph_break()
        return self.b(x.sin())


class Outer(nn.Module):
    """Whose layers share the graph behind the break."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Inner() for _ in range(2)), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x.cos()).sin()
        x = self.layers[1](x).sin()
        return self.last(x).square().mean()


def test_layers_with_graph_breaks_inside_have_their_full_names_and_are_all_there():
    model, x = Outer(), torch.randn(256, 64)
    names = {"last", *(f"layers.{i}.{n}" for i in range(2) for n in "ab")}
    ledger = wtacrs_fx.report(model, x, **OPTIONS)
    assert {e.module for e in ledger.entries} == names
    assert len(ledger.entries) == 5
    assert ledger.notes[0].startswith("training graphs: 5")
    assert any(note.startswith("  graph 4 holds") and note.endswith("(layers.1)") for note in ledger.notes)
    result = wtacrs_fx.check(model, x, draws=20, **OPTIONS)
    assert {x.module for x in result.layers} == {e.module for e in ledger.entries if e.decision != "exact"}
    assert {x.module for x in result.layers} >= {"layers.0.b", "layers.1.b"}
    assert result.faults == [], result.table()
    assert result.predicted_bytes == ledger.saved_bytes

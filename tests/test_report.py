"""The report before training: bytes as measured, tables, files, and what it refuses."""

import csv
import io
import json

import pytest
import torch
from torch import nn

import wtacrs_fx
from wtacrs_fx import measure
from wtacrs_fx.backend import Partitioner, dynamo_names
from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.inductor import compile_inductor, uncompiled
from wtacrs_fx.ledger import Ledger, Saved
from wtacrs_fx.presets import PRESETS

from helpers import SMALL, Transformer, transformer_batch
from small_presets import small

FAMILIES = {(p.model_type, p.config.get("tie_word_embeddings")): name for name, p in PRESETS.items()}
LIKE_OTHERS = {("opt", None), ("llama", True), ("qwen2", False), ("whisper", None)}
"""Built as GPT-2, as a Llama that is not tied, or as T5."""
"""One preset of each: others of a family differ in sizes only, which :func:`small` overrides."""


def held(model: nn.Module, batch, **options) -> int:
    """What autograd holds for a compiled model, everything as with Inductor but its code generation."""
    torch._dynamo.reset()
    config = Config.from_options(options)

    def backend(gm, inputs):
        partition_fn = Partitioner(config, dynamo_names(gm))
        return compile_inductor(gm, inputs, partition_fn, None, compile_graph=uncompiled)

    with measure.held(model) as count:
        output = torch.compile(model, backend=backend)(**batch)
    assert output.loss.requires_grad
    return count.bytes


@pytest.mark.parametrize(
    "preset", [pytest.param(FAMILIES[f], marks=pytest.mark.long if f in LIKE_OTHERS else ()) for f in FAMILIES]
)
def test_every_column_is_what_autograd_holds(preset):
    options = {"ratio": 0.3, "inner": "eager", **SMALL}  # what Inductor adds: tests/test_layouts.py
    ledger = wtacrs_fx.report(*small(preset), **options)
    model, batch = small(preset, device="cpu")
    with measure.held(model) as count:
        output = model(**batch)
    assert output.loss.requires_grad
    assert count.bytes == ledger.saved_bytes_eager
    assert held(model, batch, **options) == ledger.saved_bytes
    assert held(model, batch, **{**options, "ratio": 1.0, "pack_masks": False}) == ledger.saved_bytes_exact
    for field, total in zip(
        ("bytes_eager", "bytes_exact", "bytes_now"),
        (ledger.saved_bytes_eager, ledger.saved_bytes_exact, ledger.saved_bytes),
    ):
        assert sum(getattr(t, field) for t in ledger.tensors) == total


class Mlp(nn.Module):
    """Three equal layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return self.head(x).mean()


MLP_LAYERS = """
layer            eager     inductor    wtacrs    most of it now
---------------  --------  ----------  --------  -------------------
(batch)          32.0 KiB  32.0 KiB    8.2 KiB   (batch) (batch)
layers.0-2 (x3)  96.0 KiB  96.0 KiB    96.0 KiB  layers.0-2 (Linear)
(model)          96.0 KiB  96.0 KiB    33.0 KiB  (model) (gelu)
"""

TRANSFORMER_LAYERS = """
layer            eager      inductor    wtacrs     most of it now
---------------  ---------  ----------  ---------  -------------------
(batch)          32.1 KiB   32.1 KiB    32.1 KiB   (batch) (batch)
blocks.0         546.0 KiB  514.0 KiB   299.8 KiB  up (Linear)
blocks.1-2 (x2)  1.1 MiB    1.1 MiB     661.5 KiB  up (Linear)
blocks.3         514.0 KiB  545.0 KiB   330.8 KiB  up (Linear)
(model)          2.1 KiB    2.0 KiB     2.0 KiB    (model) (mean)
classifier       -          128 B       128 B      classifier (Linear)
"""

MLP_TENSORS = """
layer            module    op         shape    dtype    eager     inductor    wtacrs    rows kept    decision    reason
---------------  --------  ---------  -------  -------  --------  ----------  --------  -----------  ----------  -------------------------------------------------
(batch)                    batch      128x64   float32  32.0 KiB  32.0 KiB    8.2 KiB   32/128       early       chosen in the forward, only these rows are kept
layers.0-2 (x3)            Linear     128x64   float32  32.0 KiB  32.0 KiB    32.0 KiB                           needed by gelu
(model)                    gelu       128x64   float32  32.0 KiB  32.0 KiB    512 B     32/128       late        input recomputed at the kept rows
                           gelu       128x64   float32  32.0 KiB  32.0 KiB    512 B     32/128       late        input recomputed at the kept rows
                           gelu       128x64   float32  32.0 KiB  32.0 KiB    32.0 KiB               exact       excluded by 'head'
                           draw_seed  1        int64    -         -           8 B                                what the rows' draws start from; needed by Linear
"""  # noqa: E501


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return wtacrs_fx.report(Mlp(), torch.randn(128, 64), ratio=0.25, **SMALL)


def rows(table: str) -> str:
    """A table without trailing blanks and without the summary, whose predicted times are for other tests."""
    lines = [line.rstrip() for line in table.splitlines()]
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("saved for backward"))])


@pytest.mark.parametrize(("level", "text"), [("layer", MLP_LAYERS), ("tensor", MLP_TENSORS)])
def test_tables_of_a_perceptron(ledger, level, text):
    assert rows(ledger.table(level)) == text.strip()


def test_tables_of_a_transformer():
    ledger = wtacrs_fx.report(Transformer(layers=4), transformer_batch(), ratio=0.25, **SMALL)
    assert rows(ledger.table("layer")) == TRANSFORMER_LAYERS.strip()


def saved(*modules: str) -> list[Saved]:
    return [Saved(module, "Linear", (8, 8), "float32", bytes_exact=256) for module in modules]


NESTED = [f"stages.{stage}.blocks.{i}.up" for stage, blocks in ((0, 2), (1, 3)) for i in range(blocks)]


@pytest.mark.parametrize(
    ("modules", "lines"),
    [
        (["encoder.0.up", "encoder.1.up", "decoder.0.up", "decoder.1.up"], ["encoder.0-1 (x2)", "decoder.0-1 (x2)"]),
        ([*NESTED, "stages.1.norm"], ["stages.0.blocks.0-1 (x2)", "stages.1.blocks.0-2 (x3)", "stages.1"]),
        (["stages.0.a", "stages.0.2.x.0.up", "stages.0.2.x.1.up"], ["stages.0", "stages.0.2.x.0-1 (x2)"]),
        (
            ["h.0.net.0", "h.0.net.2", "h.1.net.0", "h.1.out"],
            ["h.0", "h.1"],
        ),  # lists of single operations are one layer
        (["h.0.e.0.up", "h.0.e.1.up", "h.1.e.0.up", "h.1.e.1.up", "h.2.e.0.up"], ["h.0-1 (x2)", "h.2"]),
        (["0", "1", "2.up"], ["0-1 (x2)", "2"]),
    ],
)
def test_equal_layers_fold_also_in_lists_of_lists(modules, lines):
    table = Ledger((), 0, 0, tensors=tuple(saved(*modules))).table("layer").splitlines()
    assert [line.partition("  ")[0] for line in table[2 : 2 + len(lines)]] == lines
    assert table[2 + len(lines)].startswith("saved for backward")


def test_files(ledger, tmp_path):
    assert Ledger.from_dict(json.loads(ledger.to_json())) == ledger
    lines = list(csv.DictReader(io.StringIO(ledger.to_csv())))
    assert len(lines) == len(ledger.tensors)
    for column, total in (
        ("bytes_eager", ledger.saved_bytes_eager),
        ("bytes_exact", ledger.saved_bytes_exact),
        ("bytes_now", ledger.saved_bytes),
    ):
        assert sum(int(r[column]) for r in lines) == total
    ledger.plot(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert ledger.table("summary") == ledger.summary()
    with pytest.raises(ValueError, match="level='row': expected one of 'site', 'layer'"):
        ledger.table("row")


def test_nothing_of_the_model_is_touched_and_the_backend_says_the_same():
    model, x = Mlp(), torch.randn(128, 64)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = wtacrs_fx.report(model, x, **SMALL)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    backend = wtacrs_fx.Backend(inner="eager", **SMALL)
    torch.compile(model, backend=backend)(x).backward()
    assert backend.ledger.saved_bytes_eager is None
    assert [t.bytes_now for t in backend.ledger.tensors] == [
        t.bytes_now for t in found.tensors if t.bytes_exact or t.bytes_now
    ]
    assert "eager" not in backend.ledger.table("layer")


def test_eager_peak_is_the_measured_one():
    model, batch = Transformer(dropout=0.1), transformer_batch()
    predicted = wtacrs_fx.report(model, batch, **SMALL).predicted_eager
    measured = measure.peaks(lambda: model(*batch).backward(), model)
    assert measured.activations == pytest.approx(predicted.peak, rel=0.01)
    assert measured.total == pytest.approx(predicted.allocated, rel=0.01)


def test_symbolic_sizes_are_printed_as_symbols():
    backend = wtacrs_fx.Backend(inner="eager", **SMALL)
    torch.compile(Mlp(), backend=backend, dynamic=True)(torch.randn(128, 64)).backward()
    (symbol,) = {s for t in backend.ledger.tensors for s in t.shape if isinstance(s, str)}
    assert f"{symbol}x64" in backend.ledger.table("tensor")
    assert backend.ledger.notes == (f"bytes are those of {symbol}=128",)
    assert backend.ledger.summary().endswith(f"{symbol}=128")


def test_masks_are_said_to_be_held_in_one_bit():
    ledger = wtacrs_fx.report(Transformer(dropout=0.1), transformer_batch(), **SMALL)
    packed = [t for t in ledger.tensors if t.reason == "held in 1 bit"]
    assert len(packed) == len(ledger.compressed) > 0
    assert all(t.dtype == "bool" and t.bytes_exact == 8 * t.bytes_now for t in packed)


def test_rounded_tensors_have_lines_of_their_own():
    """Of a derivative, which exact training does not hold; of an input that it does; and of what is not needed any more."""
    ledger = wtacrs_fx.report(Mlp(), torch.randn(128, 64), **{**SMALL, "ratio": 1.0, "round_bits": 4})
    bits = [t for t in ledger.tensors if t.reason.startswith("held in 4 bits")]
    assert len(bits) == sum(c.bits == 4 for c in ledger.compressed) == 5
    assert {(t.op, t.bytes_exact > 0, t.needed_by) for t in bits} == {
        ("gelu", True, ("Linear",)),
        ("gelu", False, ("gelu",)),
    }
    assert all(t.bytes_now == 128 * 64 // 2 + 2 * 2 * 128 + 4 * (128 + 64) for t in bits)
    gone = [t for t in ledger.tensors if t.reason == "what is computed from it is held in fewer bits"]
    assert [t.module for t in gone] == ["layers.0", "layers.1", "layers.2"]
    assert sum(t.bytes_now for t in ledger.tensors) == ledger.saved_bytes


def test_modules_of_adapters_have_their_own_names():
    """One line per layer for all arms, also where Dynamo writes paths through ``__dict__``."""
    ledger = wtacrs_fx.report(*small("llama-3-8b", lora={"r": 4}), **SMALL)
    assert all(t.module.startswith("base_model.model") for t in ledger.tensors if t.module)
    layers = [line for line in ledger.table("layer").splitlines() if "layers." in line]
    assert layers
    assert all(" - " not in line for line in layers), "held in each arm"


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        torch._dynamo.graph_break()
        return self.b(x.sin()).square().mean()


def test_graph_breaks_are_told_and_each_graph_is_reported():
    ledger = wtacrs_fx.report(Broken(), torch.randn(128, 64), **SMALL)
    assert ledger.notes[0].startswith("training graphs: 2")
    assert any("test_report.py:" in line and "graph_break" in line for line in ledger.notes)
    assert {e.module for e in ledger.entries} == {"a", "b"}
    assert ledger.notes[1] in ledger.summary()
    assert [note.split(": ", 1)[1] for note in ledger.notes if note.startswith("  graph ")] == [
        "exact 64.0 KiB, now 42.1 KiB (a)",
        "exact 96.0 KiB, now 64.5 KiB (b)",
    ]


@pytest.mark.parametrize(
    ("model", "batch", "options", "words"),
    [
        (nn.ReLU(), torch.ones(3), {}, "ReLU has no parameter that requires a gradient"),
        (nn.Linear(3, 3).requires_grad_(False), torch.ones(3), {}, "no parameter that requires a gradient"),
        (nn.Linear(3, 3), torch.ones(3, device="meta"), {}, "the batch is on meta and the model on cpu"),
        (nn.Linear(3, 3), torch.ones(3).numpy(), {}, "the batch is a ndarray: expected a mapping"),
        (torch.sin, torch.ones(3), {}, r"expected a torch\.nn\.Module"),
    ],
)
def test_what_cannot_be_reported(model, batch, options, words):
    with pytest.raises(ReportError, match=words):
        wtacrs_fx.report(model, batch, **options)


class Looped(Broken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b):
            x = torch.tanh(layer(x))
            torch._dynamo.graph_break()
        return x.sum()


def test_a_function_that_dynamo_gives_up_is_no_graph():
    with pytest.raises(ReportError, match="with a graph break inside a loop Dynamo compiles nothing"):
        wtacrs_fx.report(Looped(), torch.randn(128, 64), **SMALL)


class Late(nn.Module):
    """A graph, a break, another graph, and a branch on its result."""

    def __init__(self, asks) -> None:
        super().__init__()
        self.a, self.b, self.asks = nn.Linear(64, 64), nn.Linear(64, 64), asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        torch._dynamo.graph_break()
        x = torch.tanh(self.b(x.sin()))
        return x.sin().sum() if self.asks(x) else x.sum()


@pytest.mark.parametrize("asks", [lambda x: x.sum() > 0, lambda x: x.sum().item() > 0])
def test_graphs_in_front_of_a_branch_on_data_are_reported(asks):
    """They hold what they hold in training."""
    torch._dynamo.reset()
    model, x = Late(asks), torch.randn(128, 64)
    ledger = wtacrs_fx.report(model, x, **SMALL)
    assert {e.module for e in ledger.entries} == {"a", "b"}
    assert ledger.notes[0].startswith("training graphs: 2")
    line = Late.forward.__code__.co_firstlineno + 2
    assert any(f"test_report.py:{line}: " in note for note in ledger.notes), ledger.notes
    assert "not the whole model" in ledger.notes[-1]
    assert "test_report.py:" in ledger.notes[-1]
    assert ledger.notes[-1] in ledger.summary()
    assert ledger.saved_bytes_eager is None
    torch._dynamo.reset()
    backend = wtacrs_fx.Backend(inner="eager", **SMALL)
    torch.compile(model, backend=backend)(x).backward()
    trained = backend.ledgers[:2]
    assert ledger.saved_bytes == sum(g.saved_bytes for g in trained)
    assert ledger.saved_bytes_exact == sum(g.saved_bytes_exact for g in trained)


class Branching(nn.Module):
    def __init__(self, asks) -> None:
        super().__init__()
        self.a, self.asks = nn.Linear(64, 64), asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sin().sum() if self.asks(x) else self.a(x).sum()


@pytest.mark.parametrize("asks", [lambda x: (x > 0).all(), lambda x: x.sum().item() > 3])
def test_branches_on_data_between_graphs_are_refused(asks):
    with pytest.raises(ReportError, match="Branching needs the value of a tensor in its forward"):
        wtacrs_fx.report(Branching(asks), torch.ones(8, 64))


@pytest.mark.parametrize("look", [wtacrs_fx.report, wtacrs_fx.check])
def test_a_budget_that_cannot_be_met_is_an_error_of_its_own(look):
    options = {**SMALL, "memory_budget": "20KiB", "inner": "eager"}
    with pytest.raises(BudgetError, match="memory_budget='20KiB': the least peak"):
        look(Transformer(), transformer_batch(), **options)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "hpu"])
def test_devices_that_this_torch_was_built_without_are_refused(device, monkeypatch):
    """Fake tensors of them exist, and what is done with them fails: that is found out before the trace."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ReportError, match=f"device='{device}': torch .* is built without {device.upper()}"):
        wtacrs_fx.report(Mlp(), torch.ones(8, 64), device=device)


def test_a_device_that_autograd_needs_and_the_machine_has_not_is_refused(monkeypatch):
    """torch 2.13 with CUDA on a machine without a GPU: operations on fake tensors work, autograd does not."""

    def grad(*args):
        raise RuntimeError("hasPrimaryContext expects a valid device index, but got device_index=0")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(ReportError, match="has no autograd for its tensors without such a device"):
        wtacrs_fx.report(Mlp(), torch.ones(8, 64), device="cpu")

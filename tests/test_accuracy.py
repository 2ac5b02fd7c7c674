"""The benchmark of accuracy: its data, its statistics, and one small run that is resumed."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from wtacrs_fx import Config
from wtacrs_fx.benchmarks import accuracy, accuracy_noise
from wtacrs_fx.benchmarks.accuracy_table import paired, render, sign_test
from wtacrs_fx.benchmarks.texts import Text, joined, read_tab
from wtacrs_fx.estimators import inclusion_probability


def result(arm: str, ratio: float, seed: int, correct: list[int]) -> dict:
    numbers = {"losses": [0.5], "seconds": 1.0, "saved_bytes": 1, "saved_bytes_exact": 2, "padding": 0.4}
    return {"data": "movies48", "arm": arm, "ratio": ratio, "seed": seed, "correct": correct, **numbers}


def test_sign_test():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(700, 300) < 1e-30


def test_differences_are_paired():
    exact = {s: result("exact", 1.0, s, [1, 1, 0, 0] * 25) for s in (0, 1)}
    ours = {0: result("ours", 0.3, 0, [1, 1, 0, 0] * 24 + [1, 1, 1, 1]), 1: result("ours", 0.3, 1, [1, 1, 0, 0] * 25)}
    flat = torch.tensor([0.0] * 198 + [1.0, 1.0])
    by_item = 100 * float(flat.std()) / math.sqrt(200)
    assert paired(ours, exact) == f"+1.00 (1.00; {by_item:.2f}; p 0.5)"
    assert paired({5: ours[0]}, exact) == ""
    table = render([*exact.values(), *ours.values()])
    assert "| 0.510 ± 0.010 |" in table
    assert "+1.00 (1.00" in table
    part = {**result("micro-4", 1.0, 0, [1, 0, 0, 0] * 25), "saved_bytes_exact": 1}
    (row,) = (x for x in render([*exact.values(), part]).splitlines() if "micro-4" in x)
    assert row.split("|")[-3].strip() == "0.50", "of the whole batch's bytes"


def test_parts_of_the_batch():
    assert [accuracy.part_of(a) for a in ("micro-4", "micro-1.5-lora", "micro-", "exact")] == [4.0, 1.5, None, None]
    assert accuracy.known_arm("default-lora")
    assert accuracy.known_arm("micro-1.25")
    assert not accuracy.known_arm("micro")


def test_noise_of_an_arm():
    """Of one linear layer with the loss <y, c>: added variance and the batch's own by their formulas."""
    torch.manual_seed(0)
    model, x, c = nn.Linear(8, 8, bias=False), torch.randn(32, 8), torch.randn(32, 8)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = model

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return (self.linear(x) * c).sum()

    task = accuracy.Task(Product(), {"x": x, "c": c}, 32)
    config = Config(ratio=0.5, estimator="systematic", late="exact", min_bytes=0, min_rows=1, inner="eager")
    found = accuracy_noise.share_of_noise(task, torch.arange(32).view(2, 16), 0.5, config)
    added = own = 0.0
    for part in (slice(0, 16), slice(16, 32)):
        h, g = x[part].double(), c[part].double()
        pi = inclusion_probability(h.norm(dim=1), 8)
        added += float(((1 / pi - 1) * h.square().sum(1) * g.square().sum(1)).sum())
        total = (g.T @ h).square().sum()
        own += float(16 / 15 * ((h.square().sum(1) * g.square().sum(1)).sum() - total / 16))
    assert found == pytest.approx(added / own, rel=1e-4)
    table = accuracy_noise.render([{"data": "movies48", "share": {"paper 0.3": 0.5}}])
    assert "micro-1.5" in table


def test_texts_are_joined_by_class():
    texts = [Text("a b", 0), Text("x", 1), Text("c d", 0), Text("y z", 1), Text("e", 0)]
    assert joined(texts, 3) == [Text("a b c", 0), Text("x y z", 1)]


def test_tables_of_orange(tmp_path):
    path = tmp_path / "r8-train.tab"
    path.write_text('category\ttext\nd\tstring\nclass\tmeta\nearn\t"net up\tagain"\nacq\tbuys shares of the other\n')
    names: dict[str, int] = {}
    assert read_tab(path, names) == [Text("net up\tagain", 0), Text("buys shares of the other", 1)]
    assert names == {"earn": 0, "acq": 1}


def test_what_the_number_of_an_arm_is():
    assert accuracy.chosen_options("paper-lora", 0.3, {"estimator": "wta_crs"}) == {
        "estimator": "wta_crs",
        "ratio": 0.3,
    }
    assert accuracy.chosen_options("noise", 0.05, {}) == {"noise": 0.05}
    assert accuracy.chosen_options("bits", 0.3, {}) == {"ratio": 1.0, "round_bits": 8}
    few = accuracy.chosen_options("bits", 0.1, {})
    assert few["row_bits"] == 4
    assert few["ratio"] * (4 + 16 / 128) <= 3.2 + 1e-9


@pytest.mark.long
def test_runs_are_resumed(tmp_path, monkeypatch, capsys):
    sizes = {"examples": 16, "batch-size": 16, "epochs": 1, "length": 16, "test-items": 4}
    small = ["--inner", "eager", *(x for k, v in sizes.items() for x in (f"--{k}", str(v)))]
    monkeypatch.setattr("sys.argv", ["accuracy", *small, "--arms", "ours", "--out", str(tmp_path)])
    accuracy.main()
    files = sorted((tmp_path / "accuracy").glob("*.json"))
    assert [f.name for f in files] == ["movies16_ours_0.3_0.json"]
    ours = json.loads(files[0].read_text())
    assert len(ours["losses"]) == 1
    assert len(ours["correct"]) == 4
    assert ours["rows_of_padding"].keys() <= {"zero", "unknown"}
    monkeypatch.setattr(accuracy, "run", lambda *_: pytest.fail("what is there is not run again"))
    accuracy.main()
    assert "ours 0.3" in capsys.readouterr().out

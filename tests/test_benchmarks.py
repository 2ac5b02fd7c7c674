"""What the benchmarks compute from their measurements, and that the frontier benchmark runs."""

import json
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn

from wtacrs_fx import measure
from wtacrs_fx.benchmarks import frontier_report, paper_table2, rounding
from wtacrs_fx.benchmarks.families import FAMILIES
from wtacrs_fx.benchmarks.frontier import SEED, errors, slope_error


def arm(peak: int, median: float, **more) -> dict:
    memory = {f"{key}_bytes": peak for key in ("held", "activation_peak", "peak", "resident")}
    return {**memory, "median": median, **more}


ARMS = {
    "inductor": arm(100, 1.0),
    "inductor, 2 micro-batches": arm(50, 1.1),
    "inductor, 8 micro-batches": arm(12, 1.5),
    "inductor + checkpoint": {"error": "Cannot access data pointer"},
    "wtacrs 0.3 budget none": arm(70, 0.8, predicted={"peak": 63}),
    "wtacrs 0.3 budget auto": arm(20, 0.99, predicted={"peak": 20}),
}
RESULT = {
    "family": "bert", "layers": 2, "batch_size": 4, "length": 8, "unit_bytes": 10, "environment": {"torch": "x"},
    "arms": ARMS,
}  # fmt: skip


def test_verdicts():
    lines = frontier_report.verdicts(ARMS)
    assert lines[0].startswith(
        "step at most 1 of Inductor's, wtacrs: wtacrs 0.3 budget auto, act. peak 5.0 times lower"
    )
    assert lines[1].startswith("step at most 1 of Inductor's, others: inductor, act. peak 1.0 times lower")
    assert "wtacrs 0.3 budget none, act. peak 1.4 times" in lines[2]
    assert lines[3].endswith("others: none")
    assert lines[4].endswith("in both: inductor, 8 micro-batches")  # 12 bytes: no other arm has as little


def test_report_shows_failed_arms_and_predictions(tmp_path):
    (tmp_path / "frontier").mkdir()
    (tmp_path / "frontier" / "bert.json").write_text(json.dumps(RESULT))
    text = frontier_report.write(tmp_path)
    assert "failed: Cannot access data pointer" in text
    assert "| 0.90" in text  # predicted 63 of 70
    assert (tmp_path / "frontier.md").read_text() == text
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_report_without_results_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--families"):
        frontier_report.write(tmp_path)


def test_errors_tell_matrices_of_layers_from_vectors():
    exact = {"layer.0.weight": torch.ones(2, 2), "layer.0.bias": torch.ones(2), "head.weight": torch.ones(2, 2)}
    grads = {"layer.0.weight": 1.5 * torch.ones(2, 2), "layer.0.bias": torch.ones(2), "head.weight": torch.zeros(2, 2)}
    nothing = {"layer.0.key.bias": torch.full((2,), 1e-8)}  # what rounding leaves of zero, and the other way round
    opposite = {n: -g for n, g in nothing.items()}
    assert errors(grads | opposite, exact | nothing) == {"matrix_error": 0.25, "vector_error": 0.0}


def test_slope_tells_gradients_of_other_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8)).double()
    x = torch.randn(4, 32).double()
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}

    def error(seed: int) -> float:
        torch.manual_seed(seed)
        grads = torch.autograd.grad(model(x).square().mean(), list(parameters.values()))
        return slope_error(lambda: model(x).square().mean(), dict(zip(parameters, grads)), parameters)

    assert error(SEED) < 1e-3
    assert error(SEED + 1) > 0.02
    assert all(torch.equal(before[n], p) for n, p in parameters.items())


def test_peaks_leave_out_gradients_once_they_are_alive():
    model = nn.Linear(256, 1024, bias=False)  # the gradient has 1 MiB
    x = torch.randn(8, 256)

    def backward() -> None:
        model(x).square().sum().backward()

    backward()
    peaks = measure.peaks(backward, model)
    assert 2**20 <= peaks.total < 1.3 * 2**20
    assert 2 * 8 * 1024 * 4 <= peaks.activations < 0.2 * 2**20
    assert model.weight.grad is None


def test_allocations_on_a_gpu_are_those_of_its_allocator(monkeypatch):
    """Also what is freed outside of every operation. Memory is there until a request to free it is completed."""
    history = [("alloc", 1, 512), ("segment_alloc", 1, 2048), ("alloc", 2, 1024), ("free_requested", 1, 512)]
    history += [("free_completed", 1, 512), ("alloc", 1, 256), ("free_completed", 2, 1024)]
    events = [{"action": action, "addr": address, "size": size} for action, address, size in history]
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [[], events]})
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    found = measure._allocations(lambda: calls.append("run"), "cuda")
    assert found == [(1, 512), (2, 1024), (1, -512), (1, 256), (2, -1024)]
    with pytest.raises(ZeroDivisionError):
        measure._allocations(lambda: 1 / 0, "cuda")
    assert calls == ["all", "run", None, "all", None]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_one_graph_with_their_loss(family):
    """What a graph behind a break holds would be in no prediction."""
    torch._dynamo.reset()
    model, batch = FAMILIES[family](2, 2, 16)
    loss = torch.compile(model, backend="eager", fullgraph=True)(**batch).loss
    assert loss.requires_grad
    assert torch.isfinite(loss)


def test_resident_rise():
    size = 2**26
    rise = measure.resident_step_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    if sys.platform != "linux":
        assert rise is None
        return
    assert 0.9 * size < rise < 2 * size


@pytest.mark.long
def test_the_benchmark_runs(tmp_path):
    options = "--families bert --layers 1 --batch-size 4 --length 32 --repeats 2 --ratios 0.3 --budgets none 0.9"
    command = [
        sys.executable,
        "-m",
        "wtacrs_fx.benchmarks.frontier",
        *options.split(),
        "--only",
        "eager$|2 micro|wtacrs",
    ]
    out = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    arms = json.loads((tmp_path / "frontier" / "bert_1_4x32.json").read_text())["arms"]
    assert list(arms) == [
        "inductor",
        "eager",
        "inductor, 2 micro-batches",
        "wtacrs 0.3 budget none",
        "wtacrs 0.3 budget 0.9",
    ]
    for name, result in arms.items():
        assert "error" not in result, (name, result)
        assert result["median"] > 0
        assert result["held_bytes"] <= result["peak_bytes"]
        assert "micro" in name or result["slope_error"] < 0.02, (name, result)
    assert arms["inductor, 2 micro-batches"]["held_bytes"] < 0.7 * arms["inductor"]["held_bytes"]
    assert arms["wtacrs 0.3 budget none"]["vector_error"] < 1e-8


def test_paper_table_goes_on_where_it_ended(tmp_path, monkeypatch):
    made = []

    def predict(model: str, name: str, arm: str, budget: str | None) -> list[str]:
        made.append((name, arm))
        if len(made) == 3:
            raise KeyboardInterrupt
        return [model, paper_table2.title(name, arm), "1", "2", "3", "4"]

    monkeypatch.setattr(paper_table2, "predict", predict)
    out = tmp_path / "table.md"
    options = ["--models", "t5-base", "--out", str(out), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        paper_table2.main(options)
    assert made == [("exact", "eager"), ("exact", "inductor"), ("0.3", "wtacrs")]
    paper_table2.main(options)
    assert made[3:] == [("0.3", "wtacrs"), ("0.1", "wtacrs"), ("LoRA, 0.3", "wtacrs"), ("LoRA, 0.1", "wtacrs")]
    assert out.read_text().count("t5-base") == 6
    with pytest.raises(SystemExit):
        paper_table2.main(["--out", str(out.with_suffix(".json"))])


class TestRounding:
    """The rounding benchmark goes on where it was interrupted."""

    def run(self, monkeypatch, path, only: str) -> list[str]:
        """Names of the arms that are measured; nothing is."""
        measured = []

        class Base:
            def gradients(self) -> dict:
                return {"w": torch.ones(2)}

        def measure_arm(arm, *_) -> dict:
            measured.append(arm.name)
            return {
                "held_bytes": 2,
                "activation_peak_bytes": 2,
                "median": 1.5,
                "inductor_median": 1.0,
                "errors": {"w": 0.1},
            }

        monkeypatch.setattr(rounding.Arm, "build", lambda *_: Base())
        monkeypatch.setattr(rounding, "measure_arm", measure_arm)
        args = Namespace(layers=1, batch_size=1, length=8, bits=[8, 2], only=only, repeats=1, device="cpu")
        rounding.measure_family("bert", "bfloat16", args, path)
        return measured

    def test_arms_that_are_there_are_not_measured_again(self, monkeypatch, tmp_path):
        path = tmp_path / "bert.json"
        assert self.run(monkeypatch, path, "^8 bits$") == ["inductor", "8 bits"]
        assert self.run(monkeypatch, path, "^[82] bits$|torch") == [
            "2 bits",
            "torch float8_e4m3fn",
            "torch float8_e5m2",
        ]
        assert self.run(monkeypatch, path, "^[82] bits$|torch") == []
        result = json.loads(path.read_text())
        result["arms"]["torch float8_e5m2"] = {"error": "does not run"}
        text = rounding.render([result])
        assert re.search(r"\| bert, \d layers +\| bfloat16 +\| 8 bits", text)
        assert "1.50" in text
        assert "failed: does not run" in text
        errors = {"h.0.up.weight": 1e-4, "h.0.down.weight": 3e-4, "h.1.up.weight": 2e-4, "norm.weight": 1e-5}
        result["arms"]["8 bits, attention"] = {"errors": errors}
        layers = [[c.strip() for c in line.split("|")[3:6]] for line in rounding.layer_table([result]).splitlines()[2:]]
        assert layers == [["h.0", "3.0e-04", ""], ["h.1", "2.0e-04", ""], ["other", "1.0e-05", ""]]

    def test_machines_are_not_mixed(self, monkeypatch, tmp_path):
        path = tmp_path / "bert.json"
        self.run(monkeypatch, path, "^8 bits$")
        path.write_text(path.read_text().replace('"cores"', '"other"'))
        with pytest.raises(RuntimeError, match=r"bert\.json was measured with .*delete it"):
            self.run(monkeypatch, path, "4 bits")

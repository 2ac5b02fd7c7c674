"""The soak: its parts resume exactly, and it finds what it is there to find."""

import copy
import json

import pytest
import torch

from wtacrs_fx.benchmarks import soak


@pytest.mark.long
def test_parts_resume_exactly_and_compile_nothing_late(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "EVERY", 10)

    def train(folder, start, stop):
        folder.mkdir(exist_ok=True)
        torch._dynamo.reset()
        return soak.Part("wtacrs", start, stop, 60, "eager", folder).train()

    whole = train(tmp_path / "a", 0, 60)
    train(tmp_path / "b", 0, 30)
    resumed = train(tmp_path / "b", 30, 60)
    assert resumed["evaluations"][-1] == whole["evaluations"][-1]
    assert whole["graphs_compiled_after_warm_up"] == resumed["graphs_compiled_after_warm_up"] == 0
    assert whole["resident_growth_bytes"] < soak.GROWTH_BYTES
    assert whole["evaluations"][-1][1] < whole["evaluations"][0][1], "it learns"
    json.dumps(whole)


def record(arm, loss):
    steps = [[s, loss] for s in range(100, 600, 100)]
    return {
        "arm": arm, "steps": [0, 500], "evaluations": steps, "loss": loss, "resident_growth_bytes": 0,
        "graphs_compiled_after_warm_up": 0,
    }  # fmt: skip


def test_faults_are_found():
    good = [record(arm, loss) for arm, loss in zip(soak.ARMS, (0.50, 0.52, 0.53))]
    assert soak.faults(good) == []
    for key, value, words in (
        ("resident_growth_bytes", 2**30, "grew by 1024.0 MiB"),
        ("graphs_compiled_after_warm_up", 2, "2 graphs were compiled"),
        ("evaluations", [[s, 0.7] for s in range(100, 600, 100)], "held-out loss 0.7000, exact 0.5000"),
    ):
        bad = copy.deepcopy(good)
        bad[2][key] = value
        (fault,) = soak.faults(bad)
        assert words in fault
    assert "wtacrs" in soak.table(good)

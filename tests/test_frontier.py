"""Predicted peak against predicted time, without running anything."""

import pytest
import torch

import wtacrs_fx

from helpers import SMALL, Transformer, transformer_batch


def model_and_batch():
    torch.manual_seed(0)
    return Transformer(width=256, layers=3), transformer_batch(8, 128, 256)  # large enough for sampling to save time


class SquareMean(torch.nn.Module):
    """A loss inside of the model."""

    def forward(self, x):
        return x.square().mean()


def test_exact_and_sampled_plans():
    model, batch = model_and_batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = wtacrs_fx.frontier(model, batch, points=4, ratio=0.1, **{**SMALL, "memory_budget": 0.6})
    arms = {arm: [p for p in found.points if p.arm == arm] for arm in ("exact", "sampled")}
    assert all(len(points) >= 2 for points in arms.values())
    for points in arms.values():
        peaks = [p.peak for p in points]
        assert peaks == sorted(peaks, reverse=True)
    (chosen,) = [p for p in found.points if p.chosen]
    assert chosen.arm == "sampled"
    assert chosen.peak <= 0.6 * found.exact.peak
    assert min(p.seconds for p in arms["sampled"]) < min(p.seconds for p in arms["exact"])
    assert "<- chosen" in found.table()
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


def test_without_a_budget_nothing_is_recomputed():
    model, batch = model_and_batch()
    found = wtacrs_fx.frontier(model, batch, points=2, ratio=0.1, **SMALL)
    (chosen,) = [p for p in found.points if p.chosen]
    assert chosen == max((p for p in found.points if p.arm == "sampled"), key=lambda p: p.peak)
    assert chosen.peak < found.exact.peak


def test_without_a_budget_all_is_rounded():
    """Which is none of the plans."""
    model, batch = model_and_batch()
    found = wtacrs_fx.frontier(model, batch, points=2, ratio=0.1, **SMALL, round_bits=8)
    assert not any(p.chosen for p in found.points)
    assert wtacrs_fx.report(model, batch, ratio=0.1, **SMALL, round_bits=8).rounded


def test_where_every_plan_takes_more_memory_the_exact_one_is_chosen():
    """As a Backend does."""
    layers = torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)
    model, x = torch.nn.Sequential(*layers, SquareMean()), torch.randn(2048, 256)
    (chosen,) = [p for p in wtacrs_fx.frontier(model, x).points if p.chosen]
    assert chosen.arm == "exact"
    assert {e.decision for e in wtacrs_fx.report(model, x).entries} == {"exact"}


def test_auto_marks_what_a_backend_does():
    model, batch = model_and_batch()
    options = {"ratio": 0.1, **SMALL, "memory_budget": "auto"}
    found = wtacrs_fx.frontier(model, batch, points=4, **options)
    (chosen,) = [p for p in found.points if p.chosen]
    assert chosen.arm == "sampled"
    assert chosen.peak == pytest.approx(wtacrs_fx.report(model, batch, **options).predicted.peak, rel=0.05)


def test_bad_input():
    model, batch = model_and_batch()
    with pytest.raises(ValueError, match="points=0"):
        wtacrs_fx.frontier(model, batch, points=0)
    with pytest.raises(TypeError, match="unknown wtacrs option 'ration'"):
        wtacrs_fx.frontier(model, batch, ration=0.3)
    with torch.no_grad(), pytest.raises(ValueError, match=r"model\.train\(\)"):
        wtacrs_fx.frontier(model, batch)


def test_plot(tmp_path):
    model, batch = model_and_batch()
    wtacrs_fx.frontier(model, batch, points=2).plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000

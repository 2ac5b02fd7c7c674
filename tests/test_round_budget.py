"""Rounding under a memory budget: the planner chooses between keeping, rounding and recomputing."""

import pytest
import torch

from wtacrs_fx import Backend, Ledger, measure
from wtacrs_fx.passes import partition
from wtacrs_fx.passes.summary import ledger_of
from wtacrs_fx.passes.work import Work

from helpers import SMALL, Transformer, gradients, transformer_batch

WIDTH = 256


def step(monkeypatch=None, **options) -> tuple[dict[str, torch.Tensor], Ledger, list[Work]]:
    """Gradients of one step of two blocks, its ledger, and what the pass has made."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = Transformer(width=WIDTH, layers=2), transformer_batch(8, 64, WIDTH)
    works: list[Work] = []
    if monkeypatch is not None:
        monkeypatch.setattr(partition, "ledger_of", lambda work: works.append(work) or ledger_of(work))
    backend = Backend(**{**SMALL, "ratio": 1.0, "inner": "eager", **options})
    found = gradients(model, *batch, call=torch.compile(model, backend=backend))
    return found, backend.ledger, works


def share(ledger: Ledger) -> float:
    return ledger.predicted.peak / ledger.predicted_exact.peak


def rounded(ledger: Ledger) -> set[str]:
    return {c.tensor for c in ledger.compressed if c.bits > 1}


def recomputes(ledger: Ledger) -> bool:
    return any(p.decision == "recompute" for p in ledger.parts)


def test_nothing_is_recomputed_where_rounding_meets_the_budget():
    _, alone, _ = step(round_bits=8)
    budget = share(alone) + 0.05
    _, exact, _ = step(memory_budget=budget)
    found, both, _ = step(memory_budget=budget, round_bits=8)
    assert recomputes(exact)
    assert not recomputes(both)
    assert rounded(both)
    assert share(both) <= budget
    assert both.predicted.seconds <= exact.predicted.seconds
    assert measure.relative_error(found, step()[0]) < 5e-4


def test_nothing_is_rounded_where_the_budget_is_met_without():
    found, ledger, _ = step(memory_budget=1.0, round_bits=8)
    assert ledger.compressed == ()
    for name, value in step()[0].items():
        torch.testing.assert_close(found[name], value)


def test_what_is_recomputed_is_not_rounded(monkeypatch):
    """A budget below what rounding alone reaches: some segments are rounded, and the roundings of the others are gone."""
    _, alone, _ = step(round_bits=8)
    budget = 0.8 * share(alone)
    found, both, (work,) = step(monkeypatch, memory_budget=budget, round_bits=8)
    assert recomputes(both)
    assert rounded(both) < rounded(alone)
    assert {r.tensor for r in work.roundings}.isdisjoint(work.recomputed)
    assert share(both) <= budget
    assert measure.relative_error(found, step()[0]) < 5e-4


@pytest.mark.parametrize(("budget", "bits"), [("auto", 8), (0.4, 2)])
def test_never_worse_than_without(budget, bits):
    """The goal of the budget is served at least as well: less peak for "auto", less time for a share."""
    _, exact, _ = step(memory_budget=budget, ratio=0.3)
    _, both, _ = step(memory_budget=budget, ratio=0.3, round_bits=bits)
    if budget == "auto":
        assert both.predicted.peak <= exact.predicted.peak
        assert both.predicted.seconds <= both.predicted_exact.seconds
    else:
        assert share(both) <= max(budget, share(exact))
        assert both.predicted.seconds <= exact.predicted.seconds or share(exact) > budget

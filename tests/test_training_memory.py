"""All of training's memory, and the largest batch that fits."""

import pytest
import torch
from torch import nn

import wtacrs_fx
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.training_memory import OPTIMIZERS, StepTraces, optimizer_bytes, table

from helpers import SMALL

STEP = 4
"""Bytes of the step counter that torch keeps per parameter."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 512), nn.Linear(512, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.nn.functional.gelu(self.a(x))).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_that_of_a_real_step(name):
    model = Mlp()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    model(torch.randn(4, 256)).backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    expected = sum(t.untyped_storage().nbytes() for t in tensors)
    assert optimizer_bytes(list(model.parameters()), name) == expected


def test_eight_bit_states():
    large, small = nn.Parameter(torch.empty(4096 + 1)), nn.Parameter(torch.empty(100))
    assert optimizer_bytes([large], "adamw", eight_bit=True) == 2 * (4097 + 4 * 17) + STEP
    assert optimizer_bytes([small], "adamw", eight_bit=True) == 2 * 400 + STEP
    assert optimizer_bytes([small.requires_grad_(False)], "adamw") == 0


def test_the_largest_batch_fits_and_the_next_does_not():
    blocks = [nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(2)]
    traces = StepTraces(nn.Sequential(*blocks), torch.randn(64, 256), "sgd", ratio=0.25, **SMALL)
    traces.add(wtacrs_fx.report(traces.model, traces.batch, ratio=0.25, **SMALL))
    found = {}
    for arm in ("eager", "inductor", "wtacrs"):
        found[arm] = traces.largest_batch(arm, "16 MiB")
        assert traces.at(arm, found[arm]).total <= 16 * 2**20 < traces.at(arm, found[arm] + 1).total
        assert sum(a == arm for a, _ in traces._found) <= 12, "few traces"
    assert found["wtacrs"] > found["inductor"]
    assert traces.largest_batch("wtacrs", traces.fixed) == 0
    text = table([traces.at(arm, 64) for arm in found], found, "16 MiB")
    assert "largest batch in 16 MiB" in text
    assert text.startswith("MiB"), "less than one GiB"
    assert f"{traces.at('eager', 64).saved / 2**20:.2f}" in text
    assert str(found["wtacrs"]) in text


def test_a_budget_in_bytes_ends_the_search():
    """Above some size no plan meets it: the largest batch of that arm; of exact training it says nothing."""
    layers = [x for _ in range(4) for x in (nn.Linear(256, 256), nn.GELU())]
    options = {**SMALL, "memory_budget": "1MiB"}
    traces = StepTraces(nn.Sequential(*layers), torch.randn(64, 256), "sgd", **options)
    found = traces.largest_batch("wtacrs", "64 MiB")
    assert 64 < found < traces.largest_batch("inductor", "64 MiB")
    assert traces.at("wtacrs", found).total < 8 * 2**20
    with pytest.raises(BudgetError, match=r"memory_budget='1MiB': the least peak"):
        traces.at("wtacrs", found + 1)


def test_totals():
    traces = StepTraces(Mlp(), torch.randn(64, 256), "adamw", memory_budget=None)
    memory = traces.at("inductor", 64)
    parameters = sum(p.numel() * 4 for p in traces.model.parameters())
    assert memory.parameters == memory.gradients == parameters
    assert memory.optimizer == 2 * parameters + 4 * STEP
    assert memory.total == memory.parameters + memory.optimizer + max(memory.step_peak, memory.gradients)
    assert traces.at("inductor", 128).saved == 2 * memory.saved


def test_bad_input():
    traces = StepTraces(Mlp(), torch.randn(64, 256), "adamw")
    short = traces.fixed - 100 * 1024
    with pytest.raises(ReportError, match=r"parameters .* gradients .* optimizer .* alone take .*, 100\.0 KiB more"):
        traces.largest_batch("eager", short)
    with pytest.raises(ReportError, match="optimizer='adam': expected one of adamw, sgd"):
        optimizer_bytes([], "adam")
    with pytest.raises(ValueError, match="'80 Gigs'"):
        traces.largest_batch("eager", "80 Gigs")
    with pytest.raises(ReportError, match="device='cdua'"):
        StepTraces(Mlp(), torch.randn(64, 256), device="cdua").at("inductor", 64)
    with pytest.raises(ReportError, match="no batch size"):
        StepTraces(Mlp(), {"x": 3}).largest_batch("eager", "1GiB")

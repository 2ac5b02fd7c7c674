"""Dropout masks that the backward draws again from their seeds, where the planner of a budget chooses so."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx import measure
from wtacrs_fx.passes.choices import draw_again, drawn_from_seeds
from wtacrs_fx.passes.plans import Choice
from wtacrs_fx.passes.segments import Segment
from wtacrs_fx.passes.work import Work

from helpers import SMALL, Transformer, calls, transformer_batch

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs
CPU = torch.device("cpu")
LAYERS, ROWS, WIDTH = 6, 512, 64


def trace(f) -> dict[str, Node]:
    graph = make_fx(f, tracing_mode="fake")(torch.ones(4, 8), torch.tensor(7)).graph
    return {n.name: n for n in graph.nodes}


def random(seeds: Tensor, index: int = 0, mode: str = "rand") -> Tensor:
    return prims.inductor_random([8, 8], prims.inductor_lookup_seed(seeds, index), mode)


class TestDrawnFromSeeds:
    def found(self, f) -> tuple[dict[Node, frozenset[Node]], dict[str, Node]]:
        nodes = trace(f)
        return drawn_from_seeds([n for n in nodes.values() if n.op == "call_function"]), nodes

    def test_a_mask(self):
        found, nodes = self.found(lambda x, seed: random(prims.inductor_seeds(2, CPU), 1) > torch.full([8, 8], 0.1))
        sources = {nodes[n] for n in ("inductor_lookup_seed", "inductor_random", "full", "gt")}
        assert found[nodes["gt"]] == sources
        assert set(found) == {nodes[n] for n in ("inductor_random", "gt")}

    def test_numbers_in_another_type(self):
        found, nodes = self.found(lambda x, seed: random(prims.inductor_seeds(1, CPU), 0, "randn").bfloat16() * 0.5)
        assert len(found[nodes["mul"]]) == 4

    @pytest.mark.parametrize(
        "function",
        [
            lambda x, seed: x > 0.1,
            lambda x, seed: torch.full([4, 8], 0.5) > 0.1,
            lambda x, seed: torch.rand([4, 8]) > 0.1,
            lambda x, seed: prims.inductor_random([4, 8], seed, "rand") > 0.1,
            lambda x, seed: (random(prims.inductor_seeds(1, CPU))[:4] > 0.1) & (x > 0),
            lambda x, seed: random(prims.inductor_seeds(1, CPU)) @ random(prims.inductor_seeds(1, CPU)),
        ],
        ids=["of the batch", "a constant", "no seed", "seed of the caller's", "and the batch", "a product"],
    )
    def test_nothing_else(self, function):
        found, nodes = self.found(function)
        assert nodes["output"].all_input_nodes[0] not in found


class TestDrawAgain:
    def choice(self, f, saved: str) -> tuple[Choice, Choice]:
        nodes = trace(f)
        calls_ = [n for n in nodes.values() if n.op == "call_function"]
        keep = Choice(Segment("a", tuple(calls_), {}))
        return keep, draw_again(keep, drawn_from_seeds(calls_), {nodes[saved]})

    def test_a_saved_mask_with_all_that_is_computed_from_it_alone(self):
        """The backward may read another type of it, which must not be computed from the mask of the forward."""

        def f(x, seed):
            mask = random(prims.inductor_seeds(1, CPU)) > 0.1
            return mask.float() * 2 + x.sum()

        _, again = self.choice(f, "gt")
        assert {n.name for n in again.redrawn} == {"inductor_lookup_seed", "inductor_random", "gt", "_to_copy", "mul"}
        assert again.changes

    def test_nothing_is_the_same_choice(self):
        keep, again = self.choice(lambda x, seed: x > 0.1, "gt")
        assert again is keep
        assert not keep.changes

    def test_what_is_not_saved_is_left_alone(self):
        keep, again = self.choice(lambda x, seed: (random(prims.inductor_seeds(1, CPU)) > 0.1) & (x.sum() > 0), "sum_1")
        assert again is keep


def net() -> nn.Module:
    """With few rows kept the masks are half of what is held, and to recompute them would take a layer's whole input."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)) for _ in range(LAYERS)))


def step(model: nn.Module, x: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any, int]:
    """(gradients of the biases and of the input, which are exact; backend; bytes that autograd holds)"""
    torch._dynamo.reset()
    backend = wtacrs_fx.Backend(ratio=0.02, **{**SMALL, **options})
    compiled = torch.compile(model, backend=backend)
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    with measure.held(model) as held:
        loss = compiled(x).square().sum()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("bias")} | {"x": x.grad}
    model.zero_grad(set_to_none=True)
    return found, backend, held.bytes


@pytest.mark.slow
def test_masks_are_drawn_again_where_the_budget_asks_for_it(monkeypatch):
    """Numerics to the bit, how many, no mask among the saved, the draws in the backward, the bytes that autograd holds."""
    backwards: list[GraphModule] = []
    run = Work.run

    def recorded(work: Work) -> None:
        run(work)
        backwards.append(work.best[1])

    monkeypatch.setattr(Work, "run", recorded)
    model, x = net(), torch.randn(ROWS, WIDTH)
    exact, kept, kept_bytes = step(model, x, memory_budget=None)
    share = kept.ledger.predicted.peak / kept.ledger.predicted_exact.peak
    found, backend, held = step(model, x, memory_budget=share - 0.002)
    assert all(torch.equal(found[n], exact[n]) for n in exact)
    assert [p.decision for p in backend.ledger.parts] == ["keep"] * len(backend.ledger.parts)
    assert "random numbers drawn again" in backend.ledger.parts[-1].reason
    before, after = backwards
    assert calls(before, wtacrs.drawn_mask.default) == 0
    assert calls(after, wtacrs.drawn_mask.default) == LAYERS
    assert len(kept.ledger.compressed) == LAYERS
    assert not backend.ledger.compressed
    masks = LAYERS * ROWS * WIDTH // 8
    assert kept_bytes - held == masks - 8 * LAYERS  # (their seeds)
    assert backend.ledger.saved_bytes == held - 4 * ROWS * WIDTH  # (what is squared outside)
    assert backend.ledger.flops_added == 0


class Noisy(nn.Module):
    """Dropout written by hand, whose mask is a number; and noise that is added and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * (torch.rand_like(x) > 0.1).to(x.dtype)
            x = x * (1 + 0.1 * torch.randn_like(x))
        return x


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_random_numbers_by_hand(dtype):
    """Masks as numbers and normal noise, drawn again: gradients to the bit, nothing of their size held. (In bfloat16 where
    Inductor rounds between what it fuses, too.)"""
    torch.manual_seed(0)
    model, x = Noisy().to(dtype), torch.randn(ROWS, WIDTH, dtype=dtype)
    options = {"inductor": {"emulate_precision_casts": True}}
    exact, kept, kept_bytes = step(model, x, memory_budget=None, **options)
    share = kept.ledger.predicted.peak / kept.ledger.predicted_exact.peak
    found, backend, held = step(model, x, memory_budget=0.75 * share, **options)
    assert any("random numbers drawn again" in p.reason for p in backend.ledger.parts)
    assert backend.ledger.predicted.peak <= 0.75 * share * backend.ledger.predicted_exact.peak
    assert all(torch.equal(found[n], exact[n]) for n in exact)
    assert held < 0.6 * kept_bytes


@pytest.mark.filterwarnings("ignore:wtacrs")
def test_without_seeds_they_are_kept():
    """A backend without Inductor draws from the generator: nothing to draw again from."""
    model, x = net(), torch.randn(ROWS, WIDTH)
    _, kept, _ = step(model, x, memory_budget=None, inner="eager")
    share = kept.ledger.predicted.peak / kept.ledger.predicted_exact.peak
    _, backend, _ = step(model, x, memory_budget=share - 0.002, inner="eager")
    assert len(backend.ledger.compressed) == LAYERS
    assert not any("drawn again" in p.reason for p in backend.ledger.parts)


@pytest.mark.slow
@pytest.mark.parametrize("packs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_plans_count_masks_as_they_will_be_held(monkeypatch, packs):
    """What is predicted before masks are packed is what is predicted of the finished graphs."""
    seen: list[tuple[int, int]] = []
    run = Work.run

    def recorded(work: Work) -> None:
        work.cut_as_planned()
        before = work.predicted().peak, work.planners()[0].keep.held
        run(work)
        seen.append((before, (work.predicted().peak, work.held_bytes())))

    monkeypatch.setattr(Work, "run", recorded)
    torch._dynamo.reset()
    model, batch = Transformer(dropout=0.2, layers=2), transformer_batch(batch=16)
    backend = wtacrs_fx.Backend(**{**SMALL, "ratio": 1.0, "memory_budget": None, "pack_masks": packs})
    torch.compile(model, backend=backend)(*batch).backward()
    ((peak, held), (finished, finished_held)) = seen[0]
    assert peak == pytest.approx(finished, rel=0.01)
    assert held == pytest.approx(finished_held, rel=0.01)

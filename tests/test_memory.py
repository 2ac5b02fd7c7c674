"""The ledger's totals are what autograd holds, to the byte, and the forward is untouched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import measure

from helpers import SMALL, Transformer, transformer_batch

INNER = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


class MLP(nn.Module):
    """Linears, an activation whose output its own backward needs, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1)
        return x.square().mean() + 0 * target.sum()


class Adapter(nn.Module):
    """A frozen transformer with trained low-rank adapters, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Transformer(layers=1).requires_grad_(False)
        self.a, self.b = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        return self.base(x + self.b(self.a(torch.sin(x))), target)


MODELS = {"transformer": lambda: Transformer(dropout=0.1, layers=1), "mlp": MLP, "adapter": Adapter}


def example(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, transformer_batch(width=128 if name == "mlp" else 64)


@pytest.mark.parametrize(
    ("name", "inner", "late"),
    [
        *((name, "eager", late) for name in MODELS for late in ("sample", "exact")),
        *(pytest.param(name, "inductor", "sample", marks=pytest.mark.slow) for name in ("transformer", "mlp")),
        pytest.param("adapter", "inductor", "sample", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_ledger_total_is_what_autograd_holds(name, inner, late):
    model, batch = example(name)
    backend = wtacrs_fx.Backend(ratio=0.3, inner=inner, late=late, **SMALL)
    compiled = torch.compile(model, backend=backend)
    with measure.held(model) as held:
        loss = compiled(*batch)
    assert held.bytes == backend.ledger.saved_bytes
    assert loss.requires_grad

    torch._dynamo.reset()
    exact = torch.compile(model, backend="inductor" if inner == "inductor" else "aot_eager_decomp_partition")
    with measure.held(model) as held:
        loss = exact(*batch)
    assert held.bytes == backend.ledger.saved_bytes_exact
    assert backend.ledger.saved_bytes < backend.ledger.saved_bytes_exact, backend.ledger.table()


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("transformer", "eager"),
        ("mlp", "eager"),
        pytest.param("transformer", "inductor", marks=pytest.mark.slow),
        pytest.param("mlp", "inductor", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize(
    "options", [{"ratio": 0.3}, {"ratio": 1.0, "round_bits": 8, "row_bits": 4}], ids=["rows", "bits"]
)
def test_forward_and_dropout_are_those_of_the_exact_run(name, options, inner):
    """Over several steps from one seed: losses bitwise equal, so the masks are, though more was drawn in between."""
    model, batch = example(name)

    def losses(backend) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(5)
        compiled = torch.compile(model, backend=backend)
        result = []
        for _ in range(4):
            loss = compiled(*batch)
            loss.backward()
            result.append(loss.detach())
        return result

    exact = losses("inductor" if inner == "inductor" else "aot_eager_decomp_partition")
    backend = wtacrs_fx.Backend(**options, inner=inner, **SMALL)
    compressed = losses(backend)
    assert backend.ledger.saved_bytes < backend.ledger.saved_bytes_exact
    assert all(torch.equal(a, b) for a, b in zip(exact, compressed))
    assert len({float(loss) for loss in exact}) == 4, "the masks differ from step to step"


@pytest.mark.slow
def test_forward_in_bfloat16():
    """Where Inductor rounds between fused operations, as eager mode does, the forward in bfloat16 is the same to the bit.

    (By default it leaves these roundings out, so that last bits differ with what is fused, in every plan, its own too.)
    """
    torch.manual_seed(0)
    model = Transformer(dropout=0.1, layers=1).bfloat16()
    x = transformer_batch()[0].bfloat16()

    def outputs(**kwargs: Any) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(5)
        compiled = torch.compile(nn.Sequential(*model.blocks, model.classifier), **kwargs)
        return [compiled(x).detach() for _ in range(2)]

    casts = {"emulate_precision_casts": True}
    backend = wtacrs_fx.Backend(ratio=1.0, round_bits=4, row_bits=4, inductor=casts, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(outputs(options=casts), outputs(backend=backend)))
    assert any(c.bits > 1 for c in backend.ledger.compressed)


@pytest.mark.slow
def test_ratio_one_is_bitwise_inductor():
    model, batch = example("transformer")

    def run(backend) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(5)
        model.zero_grad()
        loss = torch.compile(model, backend=backend)(*batch)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    exact, ours = run("inductor"), run(wtacrs_fx.Backend(ratio=1.0, **SMALL))
    assert all(torch.equal(a, b) for a, b in zip(exact, ours))


def test_held_counts_a_storage_once_and_no_weight():
    model = nn.Linear(16, 16)
    x = torch.randn(8, 16, requires_grad=True)
    with measure.held(model) as held:
        h = torch.exp(x)  # saves its output
        y = model(h) + h.view(8, 16).sin()  # save h as well, and a view of it; and the weight
    assert held.bytes == 8 * 16 * 4
    del y


def test_peak_sees_a_tensor_that_came_and_went():
    def step() -> Tensor:
        big = torch.empty(1_000_000, dtype=torch.uint8)
        del big
        return torch.empty(10)

    step()
    assert 1_000_000 <= measure.peak_bytes(step) < 1_100_000


def test_alternate_runs_the_arms_in_turn():
    order = []
    times = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 3, "b": 3}
    assert times["a"].quartiles[0] <= times["a"].median <= times["a"].quartiles[1]


def test_environment_names_what_matters():
    assert set(measure.environment()) == {"torch", "python", "device", "cores", "threads"}


def test_resident_peak_is_plausible():
    assert 2**26 < measure.resident_peak_bytes() < 2**40

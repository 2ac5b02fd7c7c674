"""Products run where they are, and not where their result is added to a later one."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx import measure
from wtacrs_fx.passes.policy import view_base
from wtacrs_fx.passes.unfold import unfold_late_sums

from helpers import Recorder, calls, gradients

aten = torch.ops.aten
TOKENS, VOCABULARY, WIDTH = 64, 24, 8


def trace(f, *args: Tensor) -> GraphModule:
    return make_fx(f, tracing_mode="fake")(*args)


def example() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(VOCABULARY, TOKENS), torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, WIDTH)


def product_first(logits: Tensor, hidden: Tensor, w: Tensor) -> Tensor:
    """Gradient of the head; then other products; then the gradient of the embedding is added."""
    head = logits @ hidden
    return head + (hidden @ w).tanh()[:VOCABULARY]


def product_second(logits: Tensor, hidden: Tensor, w: Tensor) -> Tensor:
    head = logits @ hidden
    return (hidden @ w).tanh()[:VOCABULARY] + head


def unfolded(f, *args: Tensor) -> tuple[GraphModule, int]:
    module = trace(f, *args)
    count = unfold_late_sums(module.graph)
    module.graph.lint()
    module.recompile()
    return module, count


@pytest.mark.parametrize("f", [product_first, product_second])
def test_quartet(f):
    module, count = unfolded(f, *example())
    assert count == 1
    assert calls(module, aten.add.Tensor) == 0
    assert calls(module, aten.sub.Tensor) == calls(module, aten.neg.default) == 1
    assert torch.equal(module(*example()), f(*example()))


def test_chain_of_sums():
    """A weight used three times: two products wait."""

    def f(logits, hidden, w):
        first, second = logits @ hidden, (2 * logits) @ hidden
        return second + (first + (hidden @ w).tanh()[:VOCABULARY])

    module, count = unfolded(f, *example())
    assert count == 2
    assert torch.equal(module(*example()), f(*example()))


def no_product_between(logits, hidden, w):
    return logits @ hidden + (hidden * 2)[:VOCABULARY]


def several_users(logits, hidden, w):
    head = logits @ hidden
    return head + (hidden @ w)[:VOCABULARY], head.tanh()


def scaled(logits, hidden, w):
    return torch.add((hidden @ w)[:VOCABULARY].tanh(), logits @ hidden, alpha=2)


def nothing(logits, hidden, w):
    return logits.tanh() + 1


@pytest.mark.parametrize("f", [no_product_between, several_users, scaled, nothing])
def test_negatives(f):
    before = trace(f, *example())
    module, count = unfolded(f, *example())
    assert count == 0
    assert [(n.op, n.target) for n in module.graph.nodes] == [(n.op, n.target) for n in before.graph.nodes]


def sampled_head(logits, hidden, w):
    """Product of few rows, whose factors are smaller than it is."""
    rows = torch.arange(4)
    head = logits.T[rows].T @ hidden[rows]
    return head + (hidden @ w).tanh()[:VOCABULARY]


def test_factors_that_are_smaller_than_the_product_wait_in_its_place():
    """The product runs right before its sum; the gathered rows are written where they are chosen."""
    module, count = unfolded(sampled_head, *example())
    assert count == 0
    nodes = list(module.graph.nodes)
    add = next(n for n in nodes if n.target is aten.add.Tensor)
    head = add.args[0]
    assert head.target is aten.mm.default
    assert nodes.index(head) == nodes.index(add) - 1
    pins = module.graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_force_stride_order.default)
    assert len(pins) == 2
    busy = next(n for n in nodes if n.target is aten.mm.default and n is not head)
    assert all(nodes.index(p) < nodes.index(busy) and view_base(p).target is aten.index.Tensor for p in pins)
    assert torch.equal(module(*example()), sampled_head(*example()))


def test_factors_in_memory_are_not_written_again():
    """Those that are inputs, or results of products."""

    def f(logits, hidden, w):
        head = hidden @ w[:1].T @ w[:1]
        return head + (hidden @ w).tanh() @ w

    module, count = unfolded(f, *example())
    assert count == calls(module, torch.ops.prims.inductor_force_stride_order.default) == 0
    assert torch.equal(module(*example()), f(*example()))


class Tied(nn.Module):
    """An embedding tied to the output head, and a linear layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(40, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.inner(self.embedding(ids)).tanh()
        return nn.functional.cross_entropy(h @ self.embedding.weight.T, ids)


def test_in_the_backward_of_a_tied_model():
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 40, (256,))
    exact = gradients(model, ids)
    recorder = Recorder(ratio=0.5, min_bytes=0)
    sampled = gradients(model, ids, call=torch.compile(model, backend=recorder))
    backward = recorder.backward[0]
    assert calls(backward, aten.neg.default) >= 1
    sums = backward.graph.find_nodes(op="call_function", target=aten.sub.Tensor)
    assert any(n.args[1].target is aten.neg.default for n in sums)
    torch.testing.assert_close(sampled["embedding.weight"], exact["embedding.weight"])  # the head is exact by default


@pytest.mark.slow
def test_inductor_does_not_fold_it():
    """Generated code of the tied model: the head's product is no addmm."""
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 40, (256,))

    def code(backend) -> str:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        _, codes = run_and_get_code(lambda: compiled(ids).backward())
        return codes[-1]

    assert "addmm(" in code("inductor")
    assert "addmm(" not in code(wtacrs_fx.Backend(ratio=0.5, min_bytes=0, memory_budget=None))


class TiedWide(nn.Module):
    """A tied head on three wide layers: the peak lies in their backward, not in the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)) for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = h + block(h)
        return nn.functional.cross_entropy(h @ self.embedding.weight.T, ids)


@pytest.mark.slow
def test_gradient_of_all_logits_is_freed_where_the_head_is_sampled():
    """The predicted peak is that of the allocator; a gradient of the logits kept to the end would be an eighth of it more."""
    torch.manual_seed(0)
    model, ids = TiedWide(), torch.randint(0, 512, (512,))
    backend = wtacrs_fx.Backend(ratio=0.1, exclude=(), min_bytes=0, memory_budget=0.5)
    call = torch.compile(model, backend=backend)
    call(ids).backward()
    assert any(e.module == "embedding" and e.decision != "exact" for e in backend.ledger.entries), backend.ledger
    measured = measure.peaks(lambda: call(ids).backward(), model).activations
    assert measured == pytest.approx(backend.ledger.predicted.peak, rel=0.04)

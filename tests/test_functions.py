"""``torch.compile`` of functions: weights that are arguments or globals, whole steps, torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from wtacrs_fx import Backend, WtacrsWarning

from helpers import SMALL, Transformer, gradients, transformer_batch

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def sampled(backend):
    return sorted(e.module for x in backend.ledgers for e in x.entries if e.decision != "exact")


@pytest.mark.works_with("Training", "`compile` of a function whose weights are arguments or globals", "yes")
@pytest.mark.parametrize("arguments", [True, False])
def test_weights_of_a_function(arguments):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 128) / 8), nn.Parameter(torch.randn(128, 32) / 11)]
    x, backend = torch.randn(256, 64), Backend(**KEEP_ALL)

    def loss(x, a=weights[0], b=weights[1]):
        return torch.tanh(torch.relu(x @ a) @ b).square().mean()

    def grads(call):
        return torch.autograd.grad(call(x, *weights) if arguments else call(x), weights)

    close(grads(torch.compile(loss, backend=backend)), grads(loss))
    assert len(sampled(backend)) == 2


@pytest.mark.works_with("Training", "`torch.func.functional_call`", "yes; modules have their names")
def test_functional_call():
    model, batch = Transformer(layers=1), transformer_batch()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    backend = Backend(**KEEP_ALL, include="blocks.0.*")

    def loss(weights, x, target):
        return functional_call(model, weights, (x, target))

    def grads(call):
        return torch.autograd.grad(call(weights, *batch), list(weights.values()))

    close(grads(torch.compile(loss, backend=backend)), grads(loss))
    assert sampled(backend) == [f"blocks.0.{n}" for n in ("down", "k", "o", "q", "up", "v")]


@pytest.mark.works_with("Training", "`compile` of a whole step: forward, backward, optimizer", "yes")
def test_a_whole_step():
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(**KEEP_ALL)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x, target):
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def train(call):
        model.load_state_dict(start)
        losses = [call(*batch) for _ in range(3)]
        return losses, [p.detach().clone() for p in model.parameters()]

    close(train(torch.compile(step, backend=backend)), train(step))
    assert len(sampled(backend)) == 6


@pytest.mark.works_with("Training", "`torch.autograd.grad` inside of the compiled function", "yes")
def test_grad_inside():
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(**KEEP_ALL)

    @torch.compile(backend=backend)
    def grads(x, target):
        return torch.autograd.grad(model(x, target), list(model.parameters()))

    close(list(grads(*batch)), list(gradients(model, *batch).values()))
    assert len(sampled(backend)) == 6


@pytest.mark.works_with(
    "Training", "`torch.func.grad` inside of the compiled function", "exact, with a warning: nothing is saved between"
)
def test_func_grad_inside_trains_exactly_and_says_so():
    model, batch = Transformer(layers=1), transformer_batch()
    backend = Backend(**{**KEEP_ALL, "ratio": 0.3})

    def grads(x, target):
        return torch.func.grad(lambda p: functional_call(model, p, (x, target)))(dict(model.named_parameters()))

    with pytest.warns(WtacrsWarning, match="trains exactly"):
        got = torch.compile(grads, backend=backend)(*batch)
    close({n: g.detach() for n, g in got.items()}, gradients(model, *batch))

"""Weights that Inductor hands to the backward with channels last take memory of their own, and the ledger says so."""

import pytest
import torch
from torch import nn

import wtacrs_fx
from wtacrs_fx import measure
from wtacrs_fx.passes.layouts import relaid_weights

from helpers import SMALL, Recorder


class Net(nn.Module):
    """Convolutions with kernels in two layouts, one that is the same in both, and one made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.overlapping = nn.Conv2d(8, 16, 3, padding=1)
        self.relaid = nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last)
        self.single = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.overlapping(self.patch(x).sin()).relu()
        x = self.single(self.relaid(x).sin()).flatten(2).mean(-1)
        return self.head(x).square().mean()


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_bytes_are_what_autograd_holds_for_inductor(ratio):
    model, x = Net(), torch.randn(4, 3, 16, 16)
    backend = wtacrs_fx.Backend(ratio=ratio, **SMALL)
    with measure.held(model) as count:
        loss = torch.compile(model, backend=backend)(x)
    assert loss.requires_grad
    assert count.bytes == backend.ledger.saved_bytes
    report = wtacrs_fx.report(model, x, ratio=ratio, **SMALL)
    assert report.saved_bytes == backend.ledger.saved_bytes
    without = wtacrs_fx.report(model, x, ratio=ratio, inner="eager", **SMALL)
    copies = model.overlapping.weight.nbytes + (model.patch.weight.nbytes if ratio == 1.0 else 0)
    assert report.saved_bytes - without.saved_bytes == copies
    assert report.predicted.peak >= without.predicted.peak


def test_which_weights_are_copied():
    recorder = Recorder(ratio=1.0)
    torch.compile(Net(), backend=recorder)(torch.randn(4, 3, 16, 16)).backward()
    (forward,) = recorder.forward
    shape = {n.name: tuple(n.meta["val"].shape) for n in forward.graph.find_nodes(op="placeholder")}
    assert {shape[n] for n in relaid_weights(forward, set(shape))} == {(8, 3, 2, 2), (16, 8, 3, 3), (4, 3, 16, 16)}
    assert relaid_weights(forward, ()) == set()
    with torch._inductor.config.patch(layout_optimization=False):
        assert relaid_weights(forward, set(shape)) == set()


def test_a_largest_product_without_gradient_of_its_input():
    """A backward of a convolution returns None where its input needs no gradient."""
    backend = wtacrs_fx.Backend(inner="eager", ratio=1.0, **SMALL)
    torch.compile(nn.Conv2d(8, 8, 3, groups=8), backend=backend)(torch.randn(2, 8, 8, 8)).mean().backward()
    assert backend.ledger.predicted.flops > 0

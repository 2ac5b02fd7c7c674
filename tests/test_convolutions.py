"""Convolutions that are linear layers on patches are sampled like those; all others stay as they are."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx.config import Config
from wtacrs_fx.passes.convolutions import from_patches, split_convolutions, to_patches

from helpers import SMALL, Moments, Recorder, calls, gradients

aten = torch.ops.aten
PLAIN = {
    "1x1": lambda: nn.Conv2d(8, 6, 1),
    "without bias": lambda: nn.Conv2d(8, 6, 1, bias=False),
    "patches": lambda: nn.Conv2d(8, 6, 4, stride=4),
    "oblong": lambda: nn.Conv2d(8, 6, (2, 4), stride=(2, 4)),
    "1d": lambda: nn.Conv1d(8, 6, 2, stride=2),
    "3d": lambda: nn.Conv3d(8, 6, 2, stride=2),
}
OTHERS = {
    "overlapping": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "gaps": lambda: nn.Conv2d(8, 6, 1, stride=2),
    "padded": lambda: nn.Conv2d(8, 6, 4, stride=4, padding=4),
    "remainder": lambda: nn.Conv2d(8, 6, 3, stride=3),
    "grouped": lambda: nn.Conv2d(8, 6, 1, groups=2),
    "dilated": lambda: nn.Conv2d(8, 6, 2, stride=2, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 1),
    "frozen": lambda: nn.Conv2d(8, 6, 1).requires_grad_(False),
}


class Net(nn.Module):
    """A scale in front, so that the convolution's input needs a gradient."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.full((), 1.5)), conv

    def forward(self, x):
        return self.conv(torch.sin(self.scale * x)).square().mean()


def net(make) -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    conv = make()
    dims = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(conv), 2)
    return Net(conv), torch.randn(4, 8, *[8] * dims)


def joint_graph(model: nn.Module, x: torch.Tensor, **options) -> torch.fx.GraphModule:
    recorder = Recorder(**options)
    gradients(model, x, call=torch.compile(model, backend=recorder))
    return recorder.joint[-1]


@pytest.mark.parametrize("kernel", [(1, 1), (2, 4), (4,), (2, 1, 2)])
def test_patches(kernel):
    x = torch.randn(3, 5, *[8] * len(kernel))
    rows = to_patches(x, kernel)
    assert rows.shape == (3 * torch.Size(8 // k for k in kernel).numel(), 5 * torch.Size(kernel).numel())
    assert torch.equal(from_patches(rows, x.shape, kernel), x)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("channels_last", [False, True])
def test_split(name, channels_last):
    """The same gradients from products; the convolution's backward is gone."""
    model, x = net(PLAIN[name])
    if channels_last:
        if x.dim() != 4:
            return
        x = x.contiguous(memory_format=torch.channels_last)
    joint = joint_graph(model, x, ratio=1.0)
    before = calls(joint, aten.mm.default)
    assert split_convolutions(joint.graph, Config(ratio=0.5, **SMALL)) == 1
    joint.graph.lint()
    joint.recompile()
    assert calls(joint, aten.convolution_backward.default) == 0
    assert calls(joint, aten.mm.default) == before + 2
    exact = gradients(model, x)
    torch._dynamo.reset()
    # every row kept with scale 1: the sampled graph computes the exact gradients
    backend = wtacrs_fx.Backend(**SMALL, ratio=0.9999, estimator="topk", inner="eager")
    found = gradients(model, x, call=torch.compile(model, backend=backend))
    assert backend.ledger.count("exact") == 0
    for parameter, value in exact.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name):
    model, x = net(OTHERS[name])
    joint = joint_graph(model, x, ratio=1.0)
    before = [n.format_node() for n in joint.graph.nodes]
    assert split_convolutions(joint.graph, Config(ratio=0.5, **SMALL)) == 0
    assert [n.format_node() for n in joint.graph.nodes] == before


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"exclude": ["conv"]}, {"min_rows": 10**6}, {"min_bytes": 10**9}])
def test_what_is_not_sampled_is_not_split(options):
    model, x = net(PLAIN["1x1"])
    joint = joint_graph(model, x, ratio=1.0)
    assert split_convolutions(joint.graph, Config(**{**SMALL, "ratio": 0.5, **options})) == 0
    assert calls(joint, aten.convolution_backward.default) == 1


@pytest.mark.parametrize("name", ["1x1", "patches"])
def test_unbiased(name):
    """The mean is exact, and so is every draw's gradient of everything else."""
    model, x = net(PLAIN[name])
    exact = gradients(model, x)
    backend = wtacrs_fx.Backend(**SMALL, ratio=0.25, inner="eager")
    compiled = torch.compile(model, backend=backend)
    moments = Moments()
    for _ in range(300):
        grads = gradients(model, x, call=compiled)
        moments.add(grads)
    rms = float(moments.z("conv.weight", exact["conv.weight"]).square().mean().sqrt())
    assert 0.6 < rms < 1.4, f"z rms {rms:.2f}"
    torch.testing.assert_close(grads["scale"], exact["scale"])
    torch.testing.assert_close(grads["conv.bias"], exact["conv.bias"])
    (entry,) = backend.ledger.entries  # computed again at the kept rows, from what the sine keeps
    assert (entry.module, entry.decision) == ("conv", "late")


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_rows_in_place_of_the_input(inner):
    """Where nothing else needs the input, a quarter of its patches is held."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 4, stride=4), nn.Flatten(), nn.Linear(128, 1)
    )
    x = torch.randn(8, 3, 16, 16)
    backend = wtacrs_fx.Backend(**SMALL, ratio=0.25, inner=inner, include=["1"])
    compiled = torch.compile(model, backend=backend)
    compiled(x).square().mean().backward()
    entry = next(e for e in backend.ledger.entries if e.module == "1")
    whole = 8 * 16 * 16 * 16 * 4
    assert (entry.decision, entry.bytes_exact, entry.bytes_now) == ("early", whole, whole // 4 + 32 * 8)
    assert backend.ledger.saved_bytes == backend.ledger.saved_bytes_exact - whole + whole // 4 + 32 * 8


def test_joint_graph_of_the_user():
    model, x = net(PLAIN["patches"])
    params = dict(model.named_parameters())

    def step(params, x):
        loss = torch.func.functional_call(model, params, (x,))
        return torch.autograd.grad(loss, list(params.values()))

    gm = make_fx(step, tracing_mode="fake")(params, x)
    assert calls(gm, aten.convolution_backward.default) == 1
    rewritten = wtacrs_fx.rewrite_joint(gm, ratio=0.5, min_rows=1, min_bytes=0)
    assert calls(rewritten, aten.convolution_backward.default) == 0
    assert calls(rewritten, torch.ops.wtacrs.select_rows.default) == 1
    exact = gm(params, x)
    moments = Moments()
    for _ in range(300):
        moments.add(dict(zip(params, rewritten(params, x))))
    for name, value in zip(params, exact):
        rms = float(moments.z(name, value).detach().square().mean().sqrt())
        assert rms < 1.4, f"{name}: z rms {rms:.2f}"

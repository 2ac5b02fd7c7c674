"""Dropout masks are drawn in vectors, and are those of Inductor."""

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from wtacrs_fx import drawn, rng
from wtacrs_fx.passes.dropout import draw_masks
from wtacrs_fx.passes.pack import write_bytes

from helpers import calls

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs
SHAPE = [3, 5, 64]
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def test_known_answer():
    """Of the authors' test vectors (Random123, kat_vectors): counter 0, key 0."""
    zero = torch.tensor(0)
    assert int(rng.philox(zero, zero, int, lambda x: x >> 32)) & 0xFFFFFFFF == 0x6627E8D5


@pytest.mark.slow
def test_numbers_are_those_of_inductor():
    """To the bit, and so are the masks as Inductor computes them by this package's code."""
    drawn.register()

    def function(seed):
        numbers = prims.inductor_random(SHAPE, seed, "rand")
        return numbers, *(wtacrs.drawn_mask(seed, SHAPE, 0.3, above) for above in (True, False))

    compiled = torch.compile(function)
    for seed in (torch.tensor(0), torch.tensor(-1), SEED):
        numbers, above, below = compiled(seed)
        assert torch.equal(numbers, rng.drawn(SHAPE, seed))
        assert torch.equal(above, (numbers > 0.3).to(torch.uint8))
        assert torch.equal(below, (numbers < 0.3).to(torch.uint8))
        assert torch.equal(above, wtacrs.drawn_mask(seed, SHAPE, 0.3, True))


def test_uniform():
    """Mean and variance of 2^18 numbers, within five standard errors; no two of neighbouring seeds alike."""
    n = 2**18
    x, y = (rng.drawn([n], torch.tensor(s)).double() for s in (7, 8))
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(x.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert abs(((x - 1 / 2) * (y - 1 / 2)).mean()) < 5 / 12 / n**0.5


def trace(f) -> GraphModule:
    return make_fx(f, tracing_mode="fake")(torch.ones(SHAPE), SEED)


def dropout(x, seed):
    mask = prims.inductor_random(SHAPE, seed, "rand") > 0.25
    return torch.where(mask, x, 0.0), mask.sum()


def rewritten(f, written: bool = False) -> tuple[GraphModule, int]:
    module = trace(f)
    if written:
        write_bytes(module.graph, module.graph.find_nodes(op="call_function", target=aten.gt.Scalar)[0])
    count = draw_masks(module.graph)
    module.graph.lint()
    module.recompile()
    return module, count


@pytest.mark.parametrize("written", [False, True], ids=["plain", "packed"])
def test_quartet(written):
    """Also where the mask has been written as bytes: there is one buffer then, as without."""
    module, count = rewritten(dropout, written)
    assert count == 1
    assert calls(module, wtacrs.drawn_mask.default) == 1
    for target in (prims.inductor_random.default, aten.gt.Scalar, prims.inductor_force_stride_order.default):
        assert calls(module, target) == 0
    x = torch.randn(SHAPE)
    kept = rng.drawn(SHAPE, SEED) > 0.25
    out, total = module(x, SEED)
    assert torch.equal(out, torch.where(kept, x, 0.0))
    assert int(total) == int(kept.sum())


def test_several_masks_of_one_draw():
    def f(x, seed):
        numbers = prims.inductor_random(SHAPE, seed, "rand")
        return torch.where(numbers > 0.5, x, 0.0) + torch.where(numbers < 0.1, x, 0.0)

    module, count = rewritten(f)
    assert count == 2
    numbers = rng.drawn(SHAPE, SEED)
    x = torch.randn(SHAPE)
    assert torch.equal(module(x, SEED), torch.where((numbers > 0.5) | (numbers < 0.1), x, 0.0))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, seed: x + 1,
        lambda x, seed: prims.inductor_random(SHAPE, seed, "rand") * x,
        lambda x, seed: prims.inductor_random(SHAPE, seed, "rand") > x,
        lambda x, seed: prims.inductor_random(SHAPE, seed, "randn") > 0.5,
        lambda x, seed: prims.inductor_random([2**16, 2**16], seed, "rand") > 0.5,
    ],
    ids=["none", "numbers", "tensor", "normal", "long"],
)
def test_untouched(f):
    before, (after, count) = trace(f).graph, rewritten(f)
    assert count == 0
    assert str(after.graph) == str(before)

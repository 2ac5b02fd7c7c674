"""Every seed has a tensor of its own, and is the same number."""

import contextlib

import pytest
import torch
from torch import nn
from torch._inductor import sizevars
from torch._inductor.codegen import common
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx.inductor import known_results
from wtacrs_fx.passes.seeds import split_seeds

from helpers import calls, gradients

prims, wtacrs = torch.ops.prims, torch.ops.wtacrs
SEEDS = torch.tensor([11, 22, 33])


def trace(f) -> GraphModule:
    return make_fx(f, tracing_mode="fake")(SEEDS)


def rewritten(f) -> tuple[GraphModule, int]:
    module = trace(f)
    count = split_seeds(module.graph)
    module.graph.lint()
    module.recompile()
    return module, count


def lookups(module: GraphModule) -> list:
    return module.graph.find_nodes(op="call_function", target=prims.inductor_lookup_seed.default)


def test_quartet():
    def f(seeds):
        return prims.inductor_lookup_seed(seeds, 2) + 1, prims.inductor_lookup_seed(seeds, 0)

    module, count = rewritten(f)
    assert count == 2
    assert all(n.args[1] == 0 for n in lookups(module))
    assert not any(n.args[0].op == "placeholder" for n in lookups(module))
    assert calls(module, wtacrs.split_seeds.default) == 1
    assert [int(x) for x in module(SEEDS)] == [34, 11]


def test_seed_read_twice():
    """As in a backward that draws a mask for two readers."""

    def f(seeds):
        return prims.inductor_lookup_seed(seeds, 1) * prims.inductor_lookup_seed(seeds, 1)

    module, count = rewritten(f)
    assert count == 2
    assert int(module(SEEDS)) == 22 * 22


@pytest.mark.parametrize(
    "f", [lambda seeds: seeds + 1, lambda seeds: prims.inductor_lookup_seed(seeds, 1)], ids=["none", "one"]
)
def test_untouched(f):
    before, (after, count) = trace(f).graph, rewritten(f)
    assert count == 0
    assert str(after.graph) == str(before)


class Dropped(nn.Module):
    """Layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).tanh(), 0.5, self.training)
        return x.square().sum()


def test_masks_are_those_of_inductor():
    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(64, 32)
    backend = wtacrs_fx.Backend(min_rows=1, min_bytes=0, ratio=0.5, memory_budget=None)
    found = []
    for chosen in ("inductor", backend):
        torch._dynamo.reset()
        call = torch.compile(model, backend=chosen, dynamic=False)
        torch.manual_seed(1)
        found.append(gradients(model, x, call=call))
    assert backend.ledger.count("exact") < len(backend.ledger.entries)
    for i in range(2):
        torch.testing.assert_close(found[1][f"layers.{i}.bias"], found[0][f"layers.{i}.bias"])


has_vectors = pytest.mark.skipif(
    not hasattr(sizevars, "stride_at_vec_range"), reason="Inductor has this function elsewhere in torch before 2.13"
)


@has_vectors
def test_known_results():
    x = torch._inductor.utils.sympy_index_symbol("x0")
    function = sizevars.stride_at_vec_range
    with known_results():
        assert sizevars.stride_at_vec_range.cache_info().maxsize is None
        assert sizevars.stride_at_vec_range(3 * x + 1, x, 16) == function(3 * x + 1, x, 16) == 3
        assert common.DtypePropagationOpsHandler() is common.DtypePropagationOpsHandler()
        assert common.DtypePropagationOpsHandler.cache_info().misses == 1
    assert sizevars.stride_at_vec_range is function
    assert isinstance(common.DtypePropagationOpsHandler, type)


@has_vectors
def test_known_results_end_with_an_error():
    function = sizevars.stride_at_vec_range
    with contextlib.suppress(KeyError), known_results():
        raise KeyError
    assert sizevars.stride_at_vec_range is function

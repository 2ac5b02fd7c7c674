"""Kernels of planned graphs run where the graph has them."""

import contextlib
import re
import runpy
from collections.abc import Collection
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import custom_graph_pass
from torch._inductor.debug import DebugContext
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx import order
from wtacrs_fx.order import GraphOrder
from wtacrs_fx.private import GraphLowering, inductor_config

from helpers import Transformer, gradients, transformer_batch


class _Node:
    """What the pass asks of Inductor's scheduler nodes."""

    def __init__(self, name: str, extern: bool, scheduler: "_Scheduler", reads: Collection[str] = ()) -> None:
        self.name, self.extern, self.scheduler = name, extern, scheduler
        self.read_writes = SimpleNamespace(reads=[SimpleNamespace(name=r) for r in reads])
        self.after: list[str] = []

    def get_name(self) -> str:
        return f"op_{self.name}"

    def get_buffer_names(self) -> list[str]:
        return [self.name]

    def is_extern(self) -> bool:
        return self.extern

    def add_fake_dep(self, dep) -> None:
        assert dep.is_fake  # order alone: keeps no buffer alive
        self.after.append(dep.name)


class _Scheduler:
    ancestors = 0

    def compute_ancestors(self) -> None:
        self.ancestors += 1


def test_dependencies():
    scheduler = _Scheduler()
    nodes = [_Node(n, n[0] == "M", scheduler) for n in ("a", "b", "M1", "c", "d", "M2", "M3", "e")]
    assert GraphOrder()(nodes) == nodes
    after = {n.name: n.after for n in nodes}
    assert after == {
        "a": [],
        "b": [],
        "M1": ["a", "b"],
        "c": ["M1"],
        "d": ["M1"],
        "M2": ["M1", "c", "d"],
        "M3": ["M2"],
        "e": ["M3"],
    }
    assert scheduler.ancestors == 1  # what Inductor's fusion looks at
    assert GraphOrder()([]) == []


def test_what_a_node_reads_it_waits_for_anyway():
    """A second dependency on the same buffer would keep the node from writing over it."""
    scheduler = _Scheduler()
    given = [("M1", ()), ("a", ("M1",)), ("b", ()), ("M2", ("a",))]
    nodes = [_Node(n, n[0] == "M", scheduler, reads) for n, reads in given]
    GraphOrder()(nodes)
    assert [n.after for n in nodes] == [[], [], ["M1"], ["M1", "b"]]


@pytest.mark.slow
def test_kernels_write_over_the_library_call_in_front_of_them():
    """In Inductor's code, for which nothing has to be compiled."""
    example = torch.randn(32, 32), torch.randn(32, 32)
    module = make_fx(lambda x, w: (torch.tanh(x @ w) @ w,), tracing_mode="fake")(*example)
    inputs = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    lowering = GraphLowering(module, example_inputs=inputs)
    options = {"_pre_fusion_custom_pass": GraphOrder(), "allow_buffer_reuse": False}
    handlers = V.set_graph_handler(lowering), V.set_fake_mode(inputs[0].fake_mode), V.set_debug_handler(DebugContext())
    with contextlib.ExitStack() as stack:
        for handler in (*handlers, inductor_config.patch(options)):
            stack.enter_context(handler)
        lowering.run(*inputs)
        code = lowering.codegen()[0].value
    assert len(re.findall(r"= empty_strided_cpu\(", code)) == 2, code


def test_before_torch_has_a_class_for_it(monkeypatch):
    """Older versions take the identity of such a pass from the class for FX passes."""
    monkeypatch.delattr(custom_graph_pass, "CustomSchedulerPass", raising=False)
    module = runpy.run_path(order.__file__)
    assert issubclass(module["GraphOrder"], custom_graph_pass.CustomGraphPass)
    assert module["GraphOrder"]().uuid() == GraphOrder().uuid()


@pytest.mark.slow
@pytest.mark.parametrize("regions", [False, pytest.param(True, marks=pytest.mark.long)])
def test_only_where_something_is_computed_again(monkeypatch, regions):
    """Plans run in order, and so do the user's checkpoint regions; nothing else does. Gradients are the exact ones."""
    calls = []
    order = GraphOrder.__call__
    monkeypatch.setattr(GraphOrder, "__call__", lambda self, nodes: calls.append(len(nodes)) or order(self, nodes))
    torch.manual_seed(0)
    model, batch = Transformer(width=64, layers=2), transformer_batch(4, 32, 64)
    exact = gradients(model, *batch)

    def run(budget, call) -> int:
        torch._dynamo.reset()
        calls.clear()
        backend = wtacrs_fx.Backend(ratio=1.0, memory_budget=budget, min_rows=1, min_bytes=0)
        found = gradients(model, *batch, call=torch.compile(call, backend=backend))
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        return len(calls)

    if regions:

        def checkpointed(*args):
            return torch.utils.checkpoint.checkpoint(model, *args, use_reentrant=False)

        assert run(None, checkpointed) == 2
    else:
        assert run(None, model) == 0
        assert run(0.6, model) == 2  # forward and backward

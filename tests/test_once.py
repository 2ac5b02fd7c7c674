"""What may run only once: draws, and what reads an input that the forward changes afterwards."""

import copy
import functools
import operator

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import wtacrs_fx
from wtacrs_fx.errors import InvariantError, WtacrsWarning
from wtacrs_fx.inductor import uncompiled
from wtacrs_fx.passes import choices, meet_budget, recompute, schedule, work
from wtacrs_fx.passes.invariants import check_draws

from helpers import SMALL, Recorder, Transformer, gradients, transformer_batch

aten = torch.ops.aten
WIDTH = 64
BATCH = (8, 32, WIDTH)


class Shifted(nn.Module):
    """Layers that add a buffer to their input; the forward changes the buffer in the end. Eager autograd keeps the sums."""

    def __init__(self) -> None:
        super().__init__()
        widths = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(*widths[0]), nn.GELU(), nn.Linear(*widths[1])) for _ in range(4)
        )
        self.register_buffer("shift", torch.zeros(WIDTH))

    def forward(self, x, target):
        for layer in self.layers:
            x = x + layer(nn.functional.gelu(x + self.shift))
        self.shift.add_(1.0)
        return x.square().mean() + 0 * target.sum()


class Regions(nn.Module):
    """Fused attention in checkpoint regions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def block(self, qkv, x):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x, target):
        for qkv in self.qkv:
            x = checkpoint(self.block, qkv, x, use_reentrant=False)
        return x.square().mean() + 0 * target.sum()


@pytest.mark.parametrize("graphs", ["AOTAutograd's", "Inductor's"])
@pytest.mark.filterwarnings("ignore:wtacrs. memory_budget=0.4. the least peak")
def test_a_buffer_that_the_forward_changes(graphs, monkeypatch):
    """What was computed from its old value is not computed again from its new one. (Inductor changes it inside of the graph,
    others behind it.)"""
    inner = "inductor" if "Inductor" in graphs else "eager"
    partition_only = functools.partial(wtacrs_fx.backend.compile_inductor, compile_graph=uncompiled)
    monkeypatch.setattr(wtacrs_fx.backend, "compile_inductor", partition_only)
    torch.manual_seed(0)
    model, batch = Shifted(), transformer_batch(*BATCH)
    exact = gradients(copy.deepcopy(model), *batch)
    torch._dynamo.reset()
    backend = wtacrs_fx.Backend(**{**SMALL, "inner": inner, "ratio": 1.0, "memory_budget": 0.4})
    with torch._functorch.config.patch(enable_autograd_cache=False):
        found = gradients(model, *batch, call=torch.compile(model, backend=backend))
    assert float(model.shift[0]) == 1
    assert any(p.decision == "recompute" for p in backend.ledger.parts)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_drawn_again_is_refused(monkeypatch):
    """Should a pass ever copy a draw into the backward, compiling fails."""
    for module in (choices, recompute, schedule):
        monkeypatch.setattr(module, "draws", lambda node: False)
        monkeypatch.setattr(module, "is_drawn_mask", lambda node: False, raising=False)
    monkeypatch.setattr(work, "protect_draws", lambda graph: 0)
    torch._dynamo.reset()
    model, batch = Transformer(layers=3, dropout=0.3), transformer_batch(*BATCH)
    backend = wtacrs_fx.Backend(**{**SMALL, "inner": "eager", "ratio": 1.0, "memory_budget": 0.55})
    with pytest.raises(
        BackendCompilerFailed, match=r"InvariantError: wtacrs: \[.*\] of the backward would be drawn anew"
    ):
        torch.compile(model, backend=backend)(*batch)


def test_draws_of_a_partition_that_was_tampered_with():
    torch._dynamo.reset()
    recorder = Recorder(ratio=0.5)
    model = Transformer(dropout=0.3)
    gradients(model, *transformer_batch(), call=torch.compile(model, backend=recorder))
    joint, forward, backward = recorder.joint[0], recorder.forward[0], recorder.backward[0]
    check_draws(joint, forward, backward)
    drawn = forward.graph.find_nodes(op="call_function", target=aten.rand.default)[0]
    with backward.graph.inserting_before(backward.graph.output_node()):
        again = backward.graph.create_node("call_function", drawn.target, drawn.args, drawn.kwargs, name="another_name")
    assert again.name not in {n.name for n in forward.graph.nodes}
    with pytest.raises(InvariantError, match=r"\['another_name'\]"):
        check_draws(joint, forward, backward)


def test_exact_training_where_users_mark_regions(monkeypatch):
    """Where every plan takes more memory than exact training, regions are still recomputed by plain copies: PyTorch replays the
    generator around fused attention, which Inductor does not compile on CPU."""
    monkeypatch.setattr(meet_budget, "no_larger", lambda reached, exact: False)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = Regions(), transformer_batch(*BATCH)
    exact, recorder = gradients(model, *batch), Recorder(ratio=0.5, memory_budget="auto")
    with pytest.warns(WtacrsWarning, match="every plan takes more memory"):
        found = gradients(model, *batch, call=torch.compile(model, backend=recorder))
    assert {e.decision for e in recorder.ledger.entries} == {"exact"}
    assert not [n for g in (recorder.forward[0], recorder.backward[0]) for n in g.graph.nodes if "rng" in str(n.target)]
    assert recorder.ledger.recomputed > 0
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", ["20KiB", 0.05])
def test_regions_that_leave_too_little_to_choose(budget):
    """One warning, no error; the ledger has what was reached."""
    torch._dynamo.reset()
    model, batch = Regions(), transformer_batch(*BATCH)
    backend = wtacrs_fx.Backend(**{**SMALL, "inner": "eager", "ratio": 1.0, "memory_budget": budget})
    with pytest.warns(WtacrsWarning, match=r"the least peak.*regions of torch\.utils\.checkpoint leave less") as caught:
        torch.compile(model, backend=backend)(*batch).backward()
    assert len(caught) == 1
    assert backend.ledger.predicted.peak > 20 * 1024
    assert backend.ledger.predicted.peak > 0.05 * backend.ledger.predicted_exact.peak


FUSED = [
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name().rpartition("_dot_product_")[2])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_fused_attention_with_dropout(op, dropout):
    """The masks of CUDA's kernels are made inside of them: with dropout their results are never computed again, without it they
    may be."""
    graph = torch.fx.Graph()
    x, tangent = (graph.placeholder(n) for n in ("primals_1", "tangents_1"))
    q = graph.call_function(aten.sin.default, (x,))
    names = [a.name for a in op._schema.arguments]
    given = {"query": q, "key": q, "value": q, "attn_bias": None, "compute_log_sumexp": True, "dropout_p": dropout}
    attention = graph.call_function(op, tuple(given[n] for n in names[: names.index("dropout_p") + 1]))
    out = graph.call_function(operator.getitem, (attention, 0))
    loss = graph.call_function(aten.sum.default, (out,))
    gradient = graph.call_function(aten.mul.Tensor, (tangent, out))
    graph.output((loss, gradient))
    for node in (x, tangent, q, out, loss, gradient):
        node.meta["val"] = torch.empty(1, 1, 4, 8)
    attention.meta["val"] = (out.meta["val"],)
    recompute.protect_draws(graph)
    found = schedule.JointOrder(graph, 1).backward(set())
    done = recompute.recompute(graph, 1, {q, attention, out})
    fused = graph.find_nodes(op="call_function", target=op)
    if dropout:
        assert (attention in found.nodes, done, len(fused)) == (False, 0, 1)
        assert gradient.args[1] is out
    else:
        assert (attention in found.nodes, done, len(fused)) == (True, 3, 2)
        assert gradient.args[1] is not out

"""Shapes that change, sizes that nobody knows, and models in several graphs."""

import pytest
import torch
from torch import nn

from wtacrs_fx import Backend, WtacrsWarning

from helpers import SMALL, Moments, Transformer, gradients, transformer_batch

KEEP_ALL = {"ratio": 0.9999, "inner": "eager", **SMALL}


def agree(model, compiled, *batch):
    """All rows are kept of sizes below 10,000, so that gradients agree."""
    exact, got = gradients(model, *batch), gradients(model, *batch, call=compiled)
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.works_with("Shapes", "a last, smaller batch; automatic dynamic shapes", "one recompilation, rows by share")
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_automatic_dynamic(budget):
    model, backend = Transformer(layers=1), Backend(**{**KEEP_ALL, "memory_budget": budget})
    compiled = torch.compile(model, backend=backend)
    for batch, length in ((8, 16), (8, 16), (5, 16), (8, 16), (3, 16), (7, 16)):
        agree(model, compiled, *transformer_batch(batch=batch, length=length))
    assert len(backend.ledgers) == 2, "the second size makes the graph dynamic, the others use it"
    assert backend.ledger.count("exact") < len(backend.ledger.entries)


@pytest.mark.works_with("Shapes", "`mark_dynamic` of batch and length", "one graph, rows by share")
def test_mark_dynamic_batch_and_length():
    model, backend = Transformer(layers=1), Backend(**KEEP_ALL)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch, length in ((8, 16), (5, 24), (2, 9)):
        x, target = transformer_batch(batch=batch, length=length)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(target, 0)
        agree(model, compiled, x, target)
    assert len(backend.ledgers) == 1
    assert "s" in str(next(e.kept for e in backend.ledger.entries if e.decision != "exact")), "a share of a symbol"


@pytest.mark.works_with("Shapes", "`dynamic=True`", "one graph, rows by share")
def test_dynamic_true_with_very_short_sequences():
    model, backend = Transformer(layers=1), Backend(**{**KEEP_ALL, "ratio": 0.3})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in ((8, 16), (2, 3), (3, 2), (9, 30)):
        x, target = transformer_batch(batch=batch, length=length)
        exact, got = gradients(model, x, target), gradients(model, x, target, call=compiled)
        assert all(torch.isfinite(g).all() for g in got.values())
        torch.testing.assert_close(got["blocks.0.ln2.weight"], exact["blocks.0.ln2.weight"], rtol=1e-4, atol=1e-6)
    assert len(backend.ledgers) == 1


@pytest.mark.works_with("Shapes", "batch sizes that change, at 0.3 of the rows", "the mean is exact at every size")
def test_the_mean_is_exact_at_every_size_of_one_dynamic_graph():
    model, backend = Transformer(layers=1), Backend(**{**KEEP_ALL, "ratio": 0.3})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    torch.manual_seed(1)
    batches = [transformer_batch(batch=b) for b in (3, 8, 13)]
    exact = [gradients(model, *b) for b in batches]
    moments = [Moments() for _ in batches]
    for i in range(105):  # (sizes alternate, so that a graph that remembered one would show)
        grads = gradients(model, *batches[i % 3], call=compiled)
        moments[i % 3].add({n: (g.double() * exact[i % 3][n]).sum().reshape(1) for n, g in grads.items()})
    assert len(backend.ledgers) == 1
    for moment, want in zip(moments, exact):
        for name in ("blocks.0.q.weight", "blocks.0.o.weight", "blocks.0.up.weight", "blocks.0.down.weight"):
            square = want[name].double().square().sum().reshape(1)
            assert moment.standard_error(name) > 1e-3 * square, "rows are left out"
            assert moment.z(name, square).abs() < 5, name


@pytest.mark.works_with("Shapes", "one example, one token", "yes")
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 5), (4, 1)])
def test_one_token(batch, length):
    model = Transformer(layers=1)
    agree(
        model,
        torch.compile(model, backend=Backend(**{**SMALL, "inner": "eager", "ratio": 0.9999})),
        *transformer_batch(batch, length),
    )


class Routed(nn.Module):
    """A mixture of experts as it is written: each expert reads the rows that were routed to it, of unknown number."""

    def __init__(self):
        super().__init__()
        self.router, self.up = nn.Linear(32, 2), nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        x = torch.tanh(self.up(x))
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(choice == i).squeeze(-1)
            out = out.index_add(0, rows, expert(torch.sin(x[rows])))
        return out.square().mean()


@pytest.mark.works_with(
    "Shapes", "sizes that depend on data (mixture of experts)", "those products stay exact, the ledger says so"
)
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_unbacked_sizes_stay_exact(budget):
    model, x, backend = Routed(), torch.randn(64, 32), Backend(**{**KEEP_ALL, "memory_budget": budget})
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        agree(model, torch.compile(model, backend=backend, fullgraph=True), x)
    decisions = {e.module: (e.decision, e.reason) for e in backend.ledger.entries}
    assert decisions["experts.0"] == decisions["experts.1"] == ("exact", "number of rows depends on data")
    assert decisions["up"][0] != "exact"


class Broken(nn.Module):
    """A graph break between two parts, the second of which reads the first's result."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        torch._dynamo.graph_break()
        return self.c(x).square().mean()


@pytest.mark.works_with(
    "Graph breaks", "several graphs per model", "yes; inputs that cross a break are in the ledger's notes"
)
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_graph_break(budget):
    model, x, backend = Broken(), torch.randn(256, 64), Backend(**{**KEEP_ALL, "memory_budget": budget})
    agree(model, torch.compile(model, backend=backend), x)
    assert [{e.module for e in x.entries} for x in backend.ledgers] == [{"a", "b"}, {"c"}]
    notes = "\n".join(backend.ledgers[1].notes)
    assert "made in front of this graph" in notes
    assert notes.endswith(": c")
    assert backend.ledgers[0].notes == (), "a batch is no tensor that other code holds for its backward"


@pytest.mark.works_with("Graph breaks", "a graph without anything to sample", "a warning names the reason")
def test_a_graph_too_small_warns():
    model = Broken()
    with pytest.warns(WtacrsWarning, match=r"trains exactly: 1 below min_rows"):
        torch.compile(model.c, backend=Backend(inner="eager"))(torch.randn(4, 64)).sum().backward()

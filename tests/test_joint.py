"""Joint graphs that a user traced: the gradient side is found, products are sampled, the rest is left as it is."""

import pytest
import torch
from functorch.compile import aot_function, aot_module, make_boxed_compiler
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx import WtacrsWarning, measure
from wtacrs_fx.passes.kinds import Kind, classify
from wtacrs_fx.passes.tangents import find_tangents, match_gradients

from helpers import SMALL, Moments, Transformer, calls, transformer_batch

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs


def traced_step(model: nn.Module, *args: Tensor, tracing: str = "real", functional: bool = False):
    """(joint graph, its inputs, names of the parameters): loss and gradients of all parameters."""
    names, params = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()))

    def loss(params, *args):
        return torch.func.functional_call(model, dict(zip(names, params)), args)

    def step(params, *args):
        if functional:
            return torch.func.grad(loss)(params, *args)
        value = loss(params, *args)
        return value, *torch.autograd.grad(value, params)

    return make_fx(step, tracing_mode=tracing)(params, *args), (params, *args), names


class MLP(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x)))).square().mean()


def rewritten(gm, *args, **options):
    return wtacrs_fx.rewrite_joint(gm, *args, **{**SMALL, **options})


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_quartet(tracing):
    gm, inputs, names = traced_step(MLP(), torch.randn(64, 32), tracing=tracing)
    before = str(gm.graph)
    sampled = rewritten(gm, ratio=0.25)
    ledger = sampled.meta["wtacrs_ledger"]
    assert str(gm.graph) == before
    inputs_of_graph = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    assert {e.module: e.decision for e in ledger.entries} == {
        inputs_of_graph[0]: "early",
        inputs_of_graph[2]: "early",
        inputs_of_graph[4]: "exact",
    }
    assert ledger.entries[0].reason.endswith("product narrower than 128"), "tanh's backward reads its output, c's input"
    assert (calls(sampled, wtacrs.select_rows.default), calls(sampled, wtacrs.draw_seed.default)) == (2, 1)
    products = sampled.graph.find_nodes(op="call_function", target=aten.mm.default)
    contracted = [n.args[0].meta["val"].shape[-1] for n in products]
    assert sorted(map(int, contracted))[-3:] == [32, 32, 64], (
        "the exact product of c contracts over 64 rows, the others over 16"
    )
    exact, got = gm(*inputs), sampled(*inputs)
    for name, a, b in zip(("loss", *names), exact, got):
        if name in ("a.weight", "b.weight"):
            assert not torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)
    for a, b in zip(exact, rewritten(gm, ratio=0.9999)(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("functional", [False, True])
def test_unbiased_transformer(functional):
    """With early and late sites, shared inputs, attention (exact), embeddings of several dimensions."""
    torch.manual_seed(0)
    gm, inputs, names = traced_step(
        Transformer(width=128, layers=1), *transformer_batch(4, 8, 128), functional=functional
    )
    sampled = rewritten(gm, ratio=0.5, estimator="systematic")
    ledger = sampled.meta["wtacrs_ledger"]
    assert ledger.count("early") == 7, ledger.table()
    keys = names if functional else ("loss", *names)
    exact = dict(zip(keys, gm(*inputs)))
    moments = Moments()
    for _ in range(200):
        moments.add(dict(zip(keys, sampled(*inputs))))
    for key, value in exact.items():
        if "weight" in key and value.dim() == 2:
            assert moments.standard_error(key).max() > 0, key
            assert moments.z(key, value).square().mean().sqrt() < 1.4, key
        elif value.abs().max() > 1e-6:
            torch.testing.assert_close(moments.mean(key).float(), value, rtol=1e-3, atol=1e-5)


def test_late_where_the_backward_reads_the_input():
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return (self.b(h) * h).sum()

    gm, inputs, _ = traced_step(Reused(), torch.randn(256, 128))
    sampled = rewritten(gm, ratio=0.25)
    assert [e.decision for e in sampled.meta["wtacrs_ledger"].entries] == ["late", "early"]
    for a, b in zip(gm(*inputs), rewritten(gm, ratio=0.9999)(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_memory_is_freed():
    """The graph as Python runs it: what is not read any more is freed, so sampled inputs are."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(6)))
    names, params = zip(*model.named_parameters())

    def step(params, x):
        loss = torch.func.functional_call(model, dict(zip(names, params)), (x,)).square().mean()
        return loss, *torch.autograd.grad(loss, params)

    x = torch.randn(2048, 128)
    gm = make_fx(step)(params, x)
    sampled = rewritten(gm, ratio=0.1)
    peaks = []
    with torch.no_grad():
        for module in (gm, sampled):
            module(params, x)
            peaks.append(measure.peak_bytes(lambda module=module: module(params, x)))
    ledger = sampled.meta["wtacrs_ledger"]
    made = 5 * 2048 * 128 * 4  # inputs of layers that the step makes; the first layer's is the user's
    assert ledger.saved_bytes_exact - ledger.saved_bytes > 0.85 * made
    assert peaks[0] - peaks[1] > 0.85 * made, f"peaks {peaks}, ledger {ledger.table()}"


class TestGradientSide:
    def graph(self, step, *args):
        return make_fx(step)(*args)

    def test_parameters_are_found_among_inputs_of_equal_shape(self):
        """x comes first and has the weight's shape; the gradient of the weight is the weight's."""

        def step(x, w):
            loss = torch.sin(torch.cos(x) @ w).sum()
            return loss, *torch.autograd.grad(loss, (w,))

        gm = self.graph(step, torch.randn(32, 32), torch.randn(32, 32, requires_grad=True))
        graph = gm.graph
        found = match_gradients(graph, classify(graph, (), find_tangents(graph)))
        assert [str(n.target) for n in found.values()] == ["w_1"]
        assert rewritten(gm, ratio=0.5).meta["wtacrs_ledger"].count("early") == 1

    def test_attributes_are_weights(self):
        model = MLP()

        def step(x):
            loss = model(x)
            return torch.autograd.grad(loss, list(model.parameters()))

        gm = self.graph(step, torch.randn(64, 32))
        assert rewritten(gm, ratio=0.5).meta["wtacrs_ledger"].count("early") == 2

    def test_explicit_gradients_of_outputs(self):
        def step(w, x, g):
            return torch.autograd.grad(torch.sin(torch.cos(x) @ w), (w,), grad_outputs=g)

        args = (torch.randn(16, 16, requires_grad=True), torch.randn(64, 16), torch.randn(64, 16))
        gm = self.graph(step, *args)
        with pytest.raises(ValueError, match=r"no gradient side.*tangents=\[\.\.\.\]"):
            rewritten(gm)
        sampled = rewritten(gm, tangents=["g_1"], ratio=0.9999)
        assert sampled.meta["wtacrs_ledger"].count("early") == 1
        torch.testing.assert_close(sampled(*args)[0], gm(*args)[0], rtol=1e-5, atol=1e-5)

    def test_ones_like_in_the_forward_is_no_gradient(self):
        def step(w, x):
            loss = ((torch.cos(x) @ w) * torch.ones_like(x)).sum()
            return torch.autograd.grad(loss, (w,))

        gm = self.graph(step, torch.randn(16, 16, requires_grad=True), torch.randn(64, 16))
        (tangent,) = find_tangents(gm.graph)
        assert tangent.meta["val"].shape == ()

    def test_a_constant_of_the_forward_like_a_loss_is_no_gradient(self):
        def step(w, x):
            loss = torch.sin((torch.cos(x) * torch.ones_like(x.sum())) @ w).sum()
            return torch.autograd.grad(loss, (w,))

        gm = self.graph(step, torch.randn(16, 16, requires_grad=True), torch.randn(64, 16))
        assert len(gm.graph.find_nodes(op="call_function", target=aten.ones_like.default)) == 2
        assert len(find_tangents(gm.graph)) == 1
        assert rewritten(gm).meta["wtacrs_ledger"].count("early") == 1

    def test_a_gradient_penalty_begins_at_the_outer_loss(self):
        """The penalty is not linear in the inner gradient, which is exact; the outer one has the right mean."""

        def step(u, w, x):
            loss = torch.sin(torch.cos(x @ u) @ w).square().mean()
            inner = torch.autograd.grad(loss, (u, w), create_graph=True)
            penalty = sum(g.square().sum() for g in inner)
            return inner[0], *torch.autograd.grad(loss + penalty, (u, w))

        args = *((torch.randn(128, 128) * 0.1).requires_grad_() for _ in range(2)), torch.randn(256, 128)
        gm = self.graph(step, *args)
        sampled = rewritten(gm, ratio=0.4, estimator="systematic")
        assert sampled.meta["wtacrs_ledger"].count("exact") < len(sampled.meta["wtacrs_ledger"].entries)
        exact, moments = gm(*args), Moments()
        for _ in range(100):
            moments.add(dict(zip("iuw", sampled(*args))))
        assert moments.standard_error("i").max() < 1e-7
        assert max(float(moments.standard_error(k).max() / exact[1].abs().max()) for k in "uw") > 1e-3
        for key, value in zip("uw", exact[1:]):
            assert moments.z(key, value).square().mean().sqrt() < 1.5, key

    def test_every_gradient_of_several_losses(self):
        def step(u, w, x):
            z = torch.sin(torch.cos(x @ u) @ w)
            return *torch.autograd.grad(z.sum(), (u, w), retain_graph=True), *torch.autograd.grad(
                z.square().sum(), (u, w)
            )

        args = *(torch.randn(8, 8, requires_grad=True) for _ in range(2)), torch.randn(64, 8)
        gm = self.graph(step, *args)
        ledger = rewritten(gm, ratio=0.5).meta["wtacrs_ledger"]
        assert [e.module for e in ledger.entries] in (["w_1", "u_1"] * 2, ["w_1", "u_1", "w_1", "u_1"][::-1]), (
            ledger.table()
        )
        assert ledger.count("early") == 4
        for a, b in zip(gm(*args), rewritten(gm, ratio=0.9999)(*args)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_an_input_gradient_stays_exact(self):
        def step(z, x, w):
            loss = torch.sin(torch.cos(z * x) @ w).sum()
            return torch.autograd.grad(loss, (x, w))

        args = torch.randn(64, 16), torch.randn(64, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
        gm = self.graph(step, *args)
        exact, sampled = gm(*args), rewritten(gm, ratio=0.5)(*args)
        torch.testing.assert_close(sampled[0], exact[0])
        assert not torch.equal(sampled[1], exact[1])


class TestNothingToDo:
    def test_frozen(self):
        def step(w, b, x):
            loss = (torch.cos(x) @ w + b).square().sum()
            return torch.autograd.grad(loss, (b,))

        args = (torch.randn(16, 16), torch.randn(16, requires_grad=True), torch.randn(64, 16))
        gm = make_fx(step)(*args)
        with pytest.warns(WtacrsWarning, match="nothing is sampled"):
            result = rewritten(gm)
        assert calls(result, wtacrs.draw_seed.default) == 0
        torch.testing.assert_close(result(*args), gm(*args))

    def test_forward_graph(self):
        with pytest.raises(ValueError, match=r"for a forward graph there is wtacrs_fx.rewrite"):
            rewritten(make_fx(nn.Linear(8, 8))(torch.randn(4, 8)))

    def test_no_shapes(self):
        with pytest.raises(ValueError, match="no shapes"):
            rewritten(symbolic_trace(nn.Linear(8, 8)))

    def test_unknown_tangent(self):
        gm, _, _ = traced_step(MLP(), torch.randn(64, 32))
        with pytest.raises(ValueError, match=r"tangents=\['g'\].*inputs are arg0_1"):
            rewritten(gm, tangents=["g"])

    def test_twice(self):
        gm, _, _ = traced_step(MLP(), torch.randn(64, 32))
        with pytest.raises(ValueError, match="rewritten already"):
            rewritten(rewritten(gm))

    def test_an_activation_changed_in_place(self):
        def step(w, x):
            h = torch.cos(x)
            h.add_(1)
            return torch.autograd.grad((h @ w).sum(), (w,))

        gm = make_fx(step)(torch.randn(16, 16, requires_grad=True), torch.randn(64, 16))
        with pytest.raises(ValueError, match=r"changes an activation in place.*functionalize"):
            rewritten(gm)
        args = torch.randn(16, 16), torch.randn(64, 16)
        functional = make_fx(torch.func.functionalize(gm))(*args)
        (sampled,) = rewritten(functional, ratio=0.9999)(*args)
        torch.testing.assert_close(sampled, gm(*args)[0], rtol=1e-5, atol=1e-5)


class TestPartitioner:
    """``partition_fn`` of functorch's own entry points."""

    nop = staticmethod(make_boxed_compiler(lambda gm, _: gm.forward))

    def test_aot_module(self):
        model, x = MLP(), torch.randn(64, 32)
        exact = torch.autograd.grad(model(x), list(model.parameters()))
        partition_fn = wtacrs_fx.partitioner(ratio=0.25, **SMALL)
        compiled = aot_module(model, fw_compiler=self.nop, bw_compiler=self.nop, partition_fn=partition_fn)
        with measure.held(model) as held:
            loss = compiled(x)
        (ledger,) = partition_fn.ledgers
        assert held.bytes == ledger.saved_bytes < ledger.saved_bytes_exact
        assert sorted(e.decision for e in ledger.entries) == ["early", "early", "exact"]
        sampled = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), a, b in zip(model.named_parameters(), exact, sampled):
            same = torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            assert same == (name not in ("a.weight", "b.weight")), f"{name} {ledger.table()}"

    def test_aot_function_is_unbiased(self):
        x, w = torch.randn(64, 16), nn.Parameter(torch.randn(16, 16) * 0.3)

        def loss(x, w):
            return torch.sin(torch.cos(x) @ w).sum()

        partition_fn = wtacrs_fx.partitioner(ratio=0.4, **SMALL)
        compiled = aot_function(loss, fw_compiler=self.nop, bw_compiler=self.nop, partition_fn=partition_fn)
        moments = Moments()
        for _ in range(300):
            moments.add({"w": torch.autograd.grad(compiled(x, w), w)[0]})
        z = moments.z("w", torch.autograd.grad(loss(x, w), w)[0])
        assert z.square().mean().sqrt() < 1.35
        assert partition_fn.ledgers[0].count("exact") == 0


def test_classify_with_given_tangents():
    graph = torch.fx.Graph()
    w, x, g = (graph.placeholder(n) for n in "wxg")
    h = graph.call_function(aten.mm.default, (x, w))
    d = graph.call_function(aten.mul.Tensor, (g, h))
    graph.output((h, d))
    kinds = classify(graph, [w], [g])
    assert [kinds[n] for n in (w, x, g, h, d)] == [
        Kind.WEIGHT,
        Kind.ACTIVATION,
        Kind.GRADIENT,
        Kind.ACTIVATION,
        Kind.GRADIENT,
    ]

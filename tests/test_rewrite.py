"""The standalone pass: every tracer and way of writing, numerics, match count, old op gone, new op there; and where not."""

import copy
import operator
import pickle
import warnings

import pytest
import torch
import transformers
from test_writings import OUT, ROWS, WIDTH, WRITINGS, build
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import wtacrs_fx
from wtacrs_fx import WtacrsWarning, measure
from wtacrs_fx.functional import RowSampler
from wtacrs_fx.passes.mutation import count_mutations, value_key

from helpers import SMALL, Block, Moments, Recorder, Transformer, calls, gradients, transformer_batch

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs
OURS = (wtacrs.linear.default, wtacrs.matmul.default)

TRACERS = {
    "symbolic_trace": lambda model, *args: symbolic_trace(model),
    "make_fx": lambda model, *args: make_fx(model)(*args),
    "export": lambda model, *args: torch.export.export(model, args).module(),
}
CASES = [(t, w) for t in TRACERS for w in WRITINGS if (t, w) != ("symbolic_trace", "conv1d")]
"""The Conv1D of the tests unpacks a shape, which symbolic_trace cannot."""


BACKENDS = ["eager", "aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]


def rewritten(gm: GraphModule, *args, **options) -> GraphModule:
    return wtacrs_fx.rewrite(gm, *args, **{**SMALL, **options})


def products(gm: GraphModule) -> list:
    return [n for n in gm.graph.nodes if n.target in OURS]


def parameters_of(model: nn.Module, call, x: Tensor) -> dict[str, Tensor]:
    """Gradients by the name in ``model``, whose parameters ``call`` shares."""
    return gradients(model, x, call=call)


@pytest.mark.parametrize(("tracer", "name"), CASES)
def test_quartet(tracer, name):
    model, x, sites = build(name, three_d=True)
    exact = gradients(model, x)
    traced = TRACERS[tracer](model, x)
    before = str(traced.graph)
    gm = rewritten(traced, x, ratio=0.5)

    if name == "tied":
        sites -= 1  # sigmoid saves its output, which is the input of the second
    assert len(products(gm)) == sites == gm.meta["wtacrs_ledger"].count("early")
    old = ("linear", "addmm", "mm.", "bmm", "matmul", "operator.matmul", "einsum")
    for node in gm.graph.nodes:
        frozen = node.meta.get("wtacrs", {}).get("reason") == "weight needs no gradient"  # the base of LoRA
        saved = node.meta.get("wtacrs", {}).get("reason") == "input saved by another op anyway"
        assert frozen or saved or node in products(gm) or not any(o in str(node.target) for o in old), (
            node.format_node()
        )
    assert str(traced.graph) == before, "the traced module is left as it was"
    assert torch.equal(gm(x), traced(x))
    sampled = parameters_of(model, gm, x)
    for key, value in exact.items():
        if "bias" in key or key == "scale":
            torch.testing.assert_close(sampled[key], value, msg=lambda m, key=key: f"{key}: {m}")
    weights = [k for k in exact if "bias" not in k and k != "scale"]
    assert not all(torch.equal(sampled[k], exact[k]) for k in weights)

    every_row = parameters_of(model, rewritten(traced, ratio=0.9999), x)
    for key, value in exact.items():
        torch.testing.assert_close(every_row[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv1d", "matmul", "einsum", "tied", "transposed_input", "lora"])
def test_unbiased(name):
    model, x, _ = build(name, three_d=True)
    exact = gradients(model, x)
    gm = rewritten(TRACERS["make_fx"](model, x), ratio=0.5, estimator="systematic")
    moments = Moments()
    for _ in range(300):
        moments.add(parameters_of(model, gm, x))
    for key, value in exact.items():
        z = moments.z(key, value)
        assert z.square().mean().sqrt() < 1.4, f"{key}: z-scores of the mean have rms {z.square().mean().sqrt():.2f}"


@pytest.mark.parametrize(
    ("function", "new", "count"),
    [
        (lambda x, w, b: torch.addmm(b, x, w), wtacrs.linear.default, 1),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), wtacrs.matmul.default, 1),
        (lambda x, w, b: b.addmm(x, w, alpha=2), wtacrs.matmul.default, 1),
        (lambda x, w, b: torch.addmm(b.detach() * torch.nan, x, w, beta=0, alpha=2), wtacrs.matmul.default, 1),
        (lambda x, w, b: torch.mm(x, w), wtacrs.matmul.default, 1),
        (lambda x, w, b: x.mm(mat2=w), wtacrs.matmul.default, 1),
        (lambda x, w, b: torch.baddbmm(b, x.view(4, 10, -1), w.expand(4, -1, -1)), wtacrs.matmul.default, 1),
        (lambda x, w, b: x.view(4, 10, -1).bmm(w.expand(4, -1, -1)), wtacrs.matmul.default, 1),
        (lambda x, w, b: (w.t() @ x.t()).t(), wtacrs.matmul.default, 1),
        (lambda x, w, b: nn.functional.linear(x, w.T, bias=b), wtacrs.linear.default, 1),
    ],
)
def test_every_product(function, new, count):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(WIDTH, OUT) * 0.2), nn.Parameter(torch.randn(OUT))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(function(torch.sin(x), self.w, self.b)).sum()

    model, x = Net(), torch.randn(ROWS, WIDTH)
    exact = gradients(model, x)
    gm = rewritten(symbolic_trace(model), ratio=0.9999)
    assert calls(gm, new) == count == len(products(gm))
    torch.testing.assert_close(gm(x), model(x))
    for key, value in parameters_of(model, gm, x).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-5, atol=1e-5)


EINSUMS = {
    "btd,dhe->bthe": ((4, 10, WIDTH), (WIDTH, 2, 3)),
    "bthe,hed->tbd": ((4, 10, 2, 3), (2, 3, 8)),
    "do,...d->...o": ((WIDTH, 6), (4, 10, WIDTH)),
    "bdt,od->bot": ((4, WIDTH, 10), (6, WIDTH)),
    "b...d,hed->bh...e": ((4, 2, 5, WIDTH), (2, 3, WIDTH)),
    "btd,d->bt": ((4, 10, WIDTH), (WIDTH,)),
}


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], weight_first: bool = False) -> None:
        super().__init__()
        self.equation, self.weight_first = equation, weight_first
        self.w = nn.Parameter(torch.randn(shape) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        operands = (self.w, x) if self.weight_first else (x, self.w)
        return torch.cos(torch.einsum(self.equation, *operands)).sum()


class TestEinsum:
    @pytest.mark.parametrize("tracer", ["symbolic_trace", "export"])
    @pytest.mark.parametrize("equation", EINSUMS)
    def test_quartet(self, tracer, equation):
        shapes = EINSUMS[equation]
        weight_first = equation.startswith("do")
        model, x = Einsum(equation, shapes[not weight_first], weight_first), torch.randn(shapes[weight_first])
        exact, traced = gradients(model, x), TRACERS[tracer](model, x)
        gm = rewritten(traced, ratio=0.9999)
        assert calls(gm, wtacrs.matmul.default) == 1
        assert not [n for n in gm.graph.nodes if "einsum" in str(n.target) and len(n.all_input_nodes) == 2]
        torch.testing.assert_close(gm(x), model(x))
        torch.testing.assert_close(parameters_of(model, gm, x), exact, rtol=1e-5, atol=1e-5)
        sampled = parameters_of(model, rewritten(traced, x, ratio=0.5), x)
        assert not torch.allclose(sampled["w"], exact["w"], rtol=1e-3)

    @pytest.mark.parametrize(
        ("equation", "shape", "weight", "options"),
        [
            ("ebd,edo->ebo", (4, 40, 8), (4, 8, 3), {}),  # a batch of weights
            ("btd,do->bo", (4, 10, 8), (8, 3), {}),  # also summed over t alone
            ("bdd,do->bo", (40, 8, 8), (8, 3), {}),
            ("btd,do", (4, 10, 8), (8, 3), {}),
            ("btd,do->bto", (4, 10, 8), (8, 3), {"exclude": "*"}),
        ],
    )
    def test_left_as_it_is(self, equation, shape, weight, options):
        model, x = Einsum(equation, weight), torch.randn(shape)
        traced = symbolic_trace(model)
        with pytest.warns(WtacrsWarning, match="no weight-gradient product|nothing is sampled"):
            gm = rewritten(traced, **options)
        assert str(gm.graph) == str(traced.graph)
        assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize(
    "function", [lambda x, w, b: torch.addmm(b, x, w, alpha=2), lambda x, w, b: b.addmm(x, w, beta=3)]
)
def test_a_scaled_product_under_autocast_has_its_type(function):
    w, b, x = (nn.Parameter(torch.randn(s)) for s in ((8, 6), (6,), (40, 8)))
    gm = rewritten(symbolic_trace(function), dict(x=x.detach(), w=w, b=b), ratio=0.9999)
    assert len(products(gm)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        exact, got = (call(x.detach(), w, b) for call in (function, gm))
    assert got.dtype is exact.dtype is torch.bfloat16
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0.1)


def test_no_features():
    gm = rewritten(symbolic_trace(nn.Linear(0, 8)), ratio=0.5)
    gm(torch.randn(40, 0)).sum().backward()
    assert torch.equal(gm.bias.grad, torch.full((8,), 40.0))


def test_conv1d_of_hugging_face():
    conv1d = Conv1D
    model, x = nn.Sequential(nn.Tanh(), conv1d(OUT, WIDTH)), torch.randn(4, ROWS // 4, WIDTH)

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, conv1d) or super().is_leaf_module(module, name)

    traced = GraphModule(model, Leaf().trace(model))
    gm = rewritten(traced, x, ratio=0.9999)
    assert [e.op for e in gm.meta["wtacrs_ledger"].entries] == ["Conv1D"]
    assert calls(gm, wtacrs.linear.default) == 1
    assert not [n for n in gm.graph.nodes if n.op == "call_module" and n.target == "1"]
    torch.testing.assert_close(gm(x), model(x))
    exact = gradients(model, x, call=lambda x: torch.cos(model(x)).sum())
    sampled = gradients(model, x, call=lambda x: torch.cos(gm(x)).sum())
    torch.testing.assert_close(sampled, exact, rtol=1e-5, atol=1e-5)


class TestSharing:
    def test_q_k_and_v_share_a_draw(self):
        gm = rewritten(symbolic_trace(Transformer(layers=1)))
        kept = [n.args[3] for n in products(gm)][:3]
        assert len(set(kept)) == 1
        entries = wtacrs_fx.rewrite(symbolic_trace(Transformer(layers=1)), transformer_batch(), **SMALL)
        reasons = [e.reason for e in entries.meta["wtacrs_ledger"].entries if e.module in ("blocks.0.k", "blocks.0.v")]
        assert reasons == ["shared with blocks.0.q"] * 2

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_views_of_one_tensor_share(self, tracer):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return (self.a(x.view(-1, x.size(-1))) * self.b(x.view(-1, x.size(-1)))).sum()

        gm = rewritten(TRACERS[tracer](Net(), torch.randn(4, 5, 8)), ratio=0.5)
        assert len({n.args[3] for n in products(gm)}) == 1
        assert len(products(gm)) == 2

    def test_a_change_in_place_between_two_readers_is_two_draws(self):
        """And each layer's gradient is that of the values that it read: with all rows kept, exactly."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                x = x * 2
                y = self.a(x)
                x.add_(1)
                return (y * self.b(x)).sum()

        model, x = Net(), torch.randn(40, 8)
        gm = rewritten(symbolic_trace(model), ratio=0.9999)
        assert len({n.args[3] for n in products(gm)}) == 2
        functional = gradients(
            model, x, call=lambda x: (model.a(x * 2) * model.b(x * 2 + 1)).sum()
        )  # the model itself cannot be run backward: autograd refuses what was modified
        for key, value in parameters_of(model, gm, x).items():
            torch.testing.assert_close(value, functional[key], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "change",
        [
            lambda self, x: x.relu_(),
            lambda self, x: torch.relu_(x),
            lambda self, x: nn.functional.relu(x, inplace=True),
            lambda self, x: torch.mul(x, 3, out=x),
            lambda self, x: self.relu(x),
        ],
    )
    def test_what_counts_as_a_change(self, change):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
                self.relu = nn.ReLU(inplace=True)

            def forward(self, x: Tensor) -> Tensor:
                y = self.a(x)
                change(self, x)
                return y + self.b(x)

        gm = rewritten(symbolic_trace(Net()), ratio=0.5)
        assert len({n.args[3] for n in products(gm)}) == 2

    @pytest.mark.parametrize("target", [operator.iadd, operator.setitem, aten.add_.Tensor, aten.copy_.default])
    def test_changes_in_other_graphs(self, target):
        """Dynamo and make_fx write them as functions."""
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(aten.view.default, (x, [-1, 8]))
        graph.call_function(target, (x, 0, 1) if target is operator.setitem else (x, x))
        z = graph.call_function(aten.view.default, (x, [-1, 8]))
        gm = GraphModule({}, graph)
        mutations = count_mutations(gm)
        assert (mutations[y], mutations[z]) == (0, 1)
        assert value_key(y, mutations) != value_key(z, mutations)

    def test_a_change_before_the_linear_is_seen(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                h = x + 0
                h.mul_(2)
                return self.a(h).square().sum()

        model, x = Net(), torch.randn(40, 8)
        exact = gradients(model, x)
        sampled = parameters_of(model, rewritten(symbolic_trace(model), ratio=0.9999), x)
        torch.testing.assert_close(sampled["a.weight"], exact["a.weight"])


class TestModule:
    """A rewritten module is a module like any other."""

    def model(self) -> tuple[nn.Module, Tensor]:
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(64, 16)

    def test_parameters_names_and_state_dict(self):
        model, _ = self.model()
        gm = rewritten(symbolic_trace(model))
        assert {n: id(p) for n, p in gm.named_parameters()} == {n: id(p) for n, p in model.named_parameters()}
        assert list(gm.state_dict()) == list(model.state_dict())
        gm.load_state_dict(model.state_dict())

    def test_hooks_and_attributes(self):
        """Those of the traced module: Hugging Face's tracer leaves the config there."""
        model, x = self.model()
        traced = symbolic_trace(model)
        traced.config = {"hidden_size": 16}
        traced.register_forward_hook(lambda module, args, output: output * 2)
        gm = rewritten(traced)
        assert gm.config is traced.config
        assert torch.equal(gm(x), 2 * model(x))

    def test_a_submodule_called_wtacrs(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wtacrs = nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                return self.wtacrs(x).square().sum()

        model, (_, x) = Net(), self.model()
        gm = rewritten(symbolic_trace(model), x, ratio=0.5)
        assert gm.wtacrs is model.wtacrs
        sampled = parameters_of(model, gm, x)
        torch.testing.assert_close(sampled["wtacrs.bias"], gradients(model, x)["wtacrs.bias"])
        assert len(products(gm)) == 1

    def test_train_and_eval(self):
        model, x = self.model()
        gm = rewritten(symbolic_trace(model), ratio=0.3)
        assert gm.training
        exact = gradients(model.eval(), x, call=lambda x: model(x).square().sum())
        sampled = gradients(model, x, call=lambda x: gm.eval()(x).square().sum())
        for key in exact:
            torch.testing.assert_close(sampled[key], exact[key], msg=lambda m, key=key: f"{key}: {m}")
        first, second = (gradients(model, x, call=lambda x: gm.train()(x).square().sum()) for _ in range(2))
        assert not torch.equal(first["0.weight"], second["0.weight"])

    def test_eval_is_inherited(self):
        gm = rewritten(symbolic_trace(self.model()[0].eval()))
        assert not gm.training
        assert not any(m.training for m in gm.modules() if isinstance(m, RowSampler))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("tracer", ["symbolic_trace", "make_fx"])
    def test_copies(self, clone, tracer):
        model, x = self.model()
        gm = rewritten(TRACERS[tracer](model, x), x, ratio=0.3)
        twin = clone(gm)
        assert torch.equal(twin(x), gm(x))
        results = []
        for module in (gm, twin):
            torch.manual_seed(3)
            module.zero_grad()
            module(x).square().sum().backward()
            results.append([p.grad.clone() for p in module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert not {id(p) for p in gm.parameters()} & {id(p) for p in twin.parameters()}

    @pytest.mark.parametrize(
        "backend", ["eager", "aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    def test_compiled(self, backend):
        model, x = self.model()
        gm = rewritten(symbolic_trace(model), ratio=0.9999)
        exact = gradients(model, x, call=lambda x: model(x).square().sum())
        compiled = torch.compile(gm, backend=backend, fullgraph=True)
        sampled = gradients(model, x, call=lambda x: compiled(x).square().sum())
        for key in exact:
            torch.testing.assert_close(sampled[key], exact[key], rtol=1e-4, atol=1e-4)

    def test_compiled_draws_afresh_and_holds_rows(self):
        model, x = self.model()
        gm = rewritten(symbolic_trace(model), ratio=0.25)
        compiled = torch.compile(gm, backend="aot_eager_decomp_partition", fullgraph=True)
        grads = [gradients(model, x, call=lambda x: compiled(x).square().sum()) for _ in range(2)]
        assert not torch.equal(grads[0]["0.weight"], grads[1]["0.weight"])

    def test_the_backend_does_not_sample_again(self):
        model, x = self.model()
        recorder = Recorder(ratio=0.5)
        compiled = torch.compile(rewritten(symbolic_trace(model), ratio=0.5), backend=recorder)
        with pytest.warns(WtacrsWarning, match="2 rows kept by rewrite"):
            compiled(x).square().sum().backward()
        assert recorder.ledger.count("exact") == 2

    def test_dynamic_batch(self):
        """The traced graph has no sizes in it: every call keeps its own share."""
        model, _ = self.model()
        gm = rewritten(symbolic_trace(model), ratio=0.25)
        for n in (64, 100):
            with measure.held(model) as held:
                y = gm(torch.randn(n, 16))
            kept = -(-n // 4)
            assert held.bytes == kept * (16 + 32) * 4 + 2 * kept * 8 + n * 32 * 4  # and gelu's input
            del y


class TestNothingToDo:
    def test_no_product(self):
        gm = symbolic_trace(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)))
        with pytest.warns(WtacrsWarning, match="nothing is sampled"):
            result = rewritten(gm)
        assert str(result.graph) == str(gm.graph)
        assert list(result._modules) == list(gm._modules)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"min_rows": 1000}, "below min_rows (128 < 1000)"),
            ({"min_bytes": 10**9}, "below min_bytes (32768 < 1000000000)"),
            ({"exclude": "*.q"}, "excluded by '*.q'"),
            ({"include": "*.k"}, "not in include"),
            ({"ratio": 1.0}, "ratio 1 keeps every row"),
        ],
    )
    def test_options(self, options, reason):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WtacrsWarning)
            gm = rewritten(symbolic_trace(Transformer()), transformer_batch(), **options)
        entry = next(e for e in gm.meta["wtacrs_ledger"].entries if e.module == "blocks.0.q")
        assert (entry.decision, entry.reason) == ("exact", reason)
        assert any(n.target == "blocks.0.q" for n in gm.graph.nodes), "the call is left as it was"

    def test_attention_stays_exact_by_default(self):
        gm = rewritten(symbolic_trace(Block()), torch.randn(2, 8, 64))
        reasons = [e.reason for e in gm.meta["wtacrs_ledger"].entries if e.decision == "exact"]
        assert reasons == ["both operands depend on the batch; attention=False"] * 2
        assert len(products(gm)) == 6

    def test_frozen_weights(self):
        model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8))
        gm = rewritten(symbolic_trace(model), torch.randn(64, 8))
        assert {e.module: e.reason for e in gm.meta["wtacrs_ledger"].entries} == {
            "0": "weight needs no gradient",
            "1": "",
        }
        assert len(products(gm)) == 1

    def test_frozen_after_the_rewrite(self):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
        gm = rewritten(symbolic_trace(model), ratio=0.25)
        model[0].requires_grad_(False)
        with measure.held(model) as held:
            y = gm(x)
        assert held.bytes == 16 * 8 * 4 + 16 * 8
        del y


class TestWeights:
    """Which operand is the weight where parameters are inputs of the graph."""

    def call(self, function, *shapes: tuple[int, ...]):
        params = [nn.Parameter(torch.randn(s) * 0.3) for s in shapes]
        x = torch.randn(ROWS, 8)
        return make_fx(function)(x, *params), (x, *params)

    def test_a_linear_layers_weight_is_known_by_its_place(self):
        gm, _ = self.call(lambda x, w, b: torch.sin(nn.functional.linear(x, w, b)), (6, 8), (6,))
        assert len(products(rewritten(gm, ratio=0.5))) == 1

    def test_a_plain_product_needs_example_inputs(self):
        gm, args = self.call(lambda x, w: torch.sin(x @ w), (8, 6))
        with pytest.warns(WtacrsWarning, match="both operands depend on the batch"):
            assert products(rewritten(gm)) == []
        sampled = rewritten(gm, args, ratio=0.9999)
        assert len(products(sampled)) == 1
        got = torch.autograd.grad(sampled(*args).sum(), args[1:])
        torch.testing.assert_close(got, torch.autograd.grad(gm(*args).sum(), args[1:]))


class TestHeld:
    """Bytes really held in eager mode, beside the ledger."""

    @pytest.mark.parametrize("tracer", TRACERS)
    def test_mlp_of_four_layers(self, tracer):
        model, x = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))), torch.randn(256, 64)
        traced = TRACERS[tracer](model, x)
        gm = rewritten(traced, x, ratio=0.25)
        self.compare(model, traced, gm, (x,))
        ledger = gm.meta["wtacrs_ledger"]
        assert ledger.count("early") == 4
        one, rows = 256 * 64 * 4, 4 * 64 * (64 * 4 + 8)  # gelu saves its input; every linear layer its own
        assert (ledger.saved_bytes_exact, ledger.saved_bytes) == (8 * one, 4 * one + rows)

    def test_inputs_that_another_op_saves_stay_exact(self):
        """tanh saves its output: rows of it would be bytes and noise for nothing."""
        model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(256, 64)
        gm = rewritten(symbolic_trace(model), x, ratio=0.25)
        reasons = {e.module: e.reason for e in gm.meta["wtacrs_ledger"].entries}
        assert reasons == {"0": "", "2": "input saved by another op anyway"}
        self.compare(model, symbolic_trace(model), gm, (x,))
        exact, sampled = (
            gradients(model, x, call=lambda x: model(x).sum()),
            gradients(model, x, call=lambda x: gm(x).sum()),
        )
        assert torch.equal(exact["2.weight"], sampled["2.weight"])

    def bert(self) -> nn.Module:
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=100
        )
        return transformers.BertModel(config, add_pooling_layer=False)

    def test_bert_encoder(self):
        model = self.bert()
        ids = torch.randint(0, 100, (8, 32))
        traced = torch.export.export(model, (ids,)).module()
        gm = rewritten(traced, (ids,), ratio=0.1)
        assert gm.meta["wtacrs_ledger"].count("early") == 12
        self.compare(model, traced, gm, (ids,))
        ledger = gm.meta["wtacrs_ledger"]
        assert ledger.saved_bytes < 0.75 * ledger.saved_bytes_exact, ledger.table()

    @pytest.mark.parametrize("name", ["mlp", "bert"])
    def test_peak_of_a_step(self, name):
        """What the allocator sees in forward and backward falls by what the ledger says is saved less, up to what the backward
        has in hand at that moment."""
        if name == "mlp":
            layers = (nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4))
            model, args = nn.Sequential(*layers), (torch.randn(2048, 256),)
        else:
            model, args = self.bert(), (torch.randint(0, 100, (8, 64)),)
        exact = torch.export.export(model, args).module()
        gm = rewritten(exact, args, ratio=0.1)
        found = []
        for module in (exact, gm):
            call = lambda module=module: tree_leaves(module(*args))[0].square().mean()  # noqa: E731
            gradients(model, call=call)
            with measure.held(module) as held:
                loss = call()
            found.append((held.bytes, measure.peaks(lambda call=call: call().backward(), model).activations))
            del loss
        (held_exact, peak_exact), (held_now, peak_now) = found
        ledger = gm.meta["wtacrs_ledger"]
        saved = ledger.saved_bytes_exact - ledger.saved_bytes
        made = saved - sum(
            x.nbytes for x in args if x.is_floating_point()
        )  # the batch is there before the step and after
        message = f"held {held_exact} -> {held_now}, peak {peak_exact} -> {peak_now}\n{ledger.table()}"
        assert held_exact - held_now == saved, message
        assert peak_exact - peak_now > 0.85 * made > 0.1 * peak_exact, message

    def compare(self, model: nn.Module, exact: GraphModule, gm: GraphModule, args: tuple) -> None:
        found = []
        for module in (exact, gm):
            with measure.held(module) as held:
                result = module(*args)
            found.append(held.bytes)
            del result
        ledger = gm.meta["wtacrs_ledger"]
        assert found == [ledger.saved_bytes_exact, ledger.saved_bytes], ledger.table()


@pytest.mark.parametrize("estimator", ["wta_crs", "systematic"])
def test_same_distribution_as_the_compiled_backend(estimator):
    """Early sites of one layer: mean and variance of the gradient agree within their errors."""
    torch.manual_seed(0)
    model, x = nn.Linear(16, 8), torch.randn(200, 16) * torch.rand(200, 1).exp()
    options = {**SMALL, "ratio": 0.2, "late": "exact", "estimator": estimator}
    compiled = torch.compile(model, backend=wtacrs_fx.Backend(inner="eager", **options))
    eager = wtacrs_fx.rewrite(symbolic_trace(model), **options)
    samples = []
    for call in (compiled, eager):
        grads = [gradients(model, x, call=lambda x, call=call: torch.cos(call(x)).sum()) for _ in range(400)]
        samples.append(torch.stack([g["weight"].double().flatten() for g in grads]))
    (a, b), n = samples, 400
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
    assert z.square().mean().sqrt() < 1.4
    # The variance of all elements together: its error is taken from the spread of |g - mean|^2 over the draws.
    u, v = ((s - s.mean(0)).square().sum(1) for s in (a, b))
    assert abs(u.mean() - v.mean()) < 4 * ((u.var() + v.var()) / n).sqrt()


class TestBadInput:
    @pytest.mark.parametrize("thing", [nn.Linear(2, 2), lambda x: x, None])
    def test_not_a_graph_module(self, thing):
        with pytest.raises(TypeError, match=r"symbolic_trace\(model\).*swap_linears"):
            wtacrs_fx.rewrite(thing)

    def test_rewritten_already(self):
        gm = rewritten(symbolic_trace(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="rewritten already"):
            rewritten(gm)

    def test_swapped_or_rewritten_modules_are_not_traced(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        traced = symbolic_trace(model)
        with pytest.raises(TypeError, match="rewritten or swapped already"):
            symbolic_trace(rewritten(traced))
        wtacrs_fx.swap_linears(model, **SMALL)
        with pytest.raises(TypeError, match="restore_linears"):
            symbolic_trace(model)
        with pytest.raises(ValueError, match=r"rewritten already \(node _0, _1\).*restore_linears"):
            rewritten(traced)

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="Did you mean 'ratio'"):
            wtacrs_fx.rewrite(symbolic_trace(nn.Linear(4, 4)), ratios=0.3)

    def test_wrong_number_of_inputs(self):
        with pytest.raises(ValueError, match="2 values for 1 inputs of the graph: input"):
            rewritten(symbolic_trace(nn.Linear(4, 4)), (torch.ones(2, 4), torch.ones(2, 4)))

    def test_inputs_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"does not run with inputs \[\(2, 5\)\]"):
            rewritten(symbolic_trace(nn.Linear(4, 4)), torch.ones(2, 5))

    def test_inputs_by_name(self):
        gm = rewritten(symbolic_trace(Transformer()), dict(zip(("x", "target"), transformer_batch())))
        assert gm.meta["wtacrs_ledger"].saved_bytes > 0

    def test_a_module_that_was_replaced_after_tracing(self):
        """The call is judged by the module that is there now."""

        class Other(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        gm = symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        gm._modules["0"] = Other(8, 8)
        result = rewritten(gm)
        assert [n.target for n in result.graph.nodes if n.op == "call_module" and n.target == "0"] == ["0"]
        assert len(products(result)) == 1

    def test_a_forward_that_was_replaced(self):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
        plain = model[0].forward
        model[0].forward = lambda x: 2 * plain(x)
        result = rewritten(symbolic_trace(model), x)
        assert [e.reason for e in result.meta["wtacrs_ledger"].entries] == ["the module's forward was replaced", ""]
        assert torch.equal(result(x), model(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_quantised_layers_stay_exact_and_are_reported(self):
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(64, 8)
        model[0] = torch.ao.quantization.quantize_dynamic(nn.Sequential(model[0]), {nn.Linear}, dtype=torch.qint8)[0]
        result = rewritten(symbolic_trace(model), x)
        reasons = [e.reason for e in result.meta["wtacrs_ledger"].entries]
        assert reasons == ["weight is quantised", "size known at run time"]
        assert torch.equal(result(x), model(x))
        assert len(products(result)) == 1

    def test_hooks_are_kept(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].register_forward_hook(lambda module, args, out: out * 2)
        result = rewritten(symbolic_trace(model), torch.ones(64, 8))
        assert [e.reason for e in result.meta["wtacrs_ledger"].entries] == ["module has hooks", ""]
        x = torch.randn(64, 8)
        assert torch.equal(result(x), model(x))

    def test_complex_and_integers_stay_exact(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.c = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
                self.w = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                counts = torch.matmul(x.long(), x.long().t())
                return self.w(x).square().sum() + (x.to(torch.complex64) @ self.c).abs().sum() + 0 * counts.sum()

        model, x = Net(), torch.randn(64, 8)
        exact = gradients(model, x)
        for args in ((), (x,)):
            gm = rewritten(symbolic_trace(model), *args, ratio=0.9999)
            sampled = parameters_of(model, gm, x)
            torch.testing.assert_close(sampled, exact, rtol=1e-4, atol=1e-4)
            by_module = {e.module: e.reason for e in gm.meta["wtacrs_ledger"].entries}
            assert by_module["c"] == "weight has dtype torch.complex64"

    def test_sparse_and_wrapped_weights_stay_exact_and_are_reported(self):
        class Wrapped(nn.Parameter):
            pass

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.s = nn.Parameter(torch.eye(8).to_sparse())
                self.q = Wrapped(torch.eye(8))
                self.w = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.w(x) + torch.matmul(self.s, x.t()).t() + x @ self.q

        gm = rewritten(symbolic_trace(Net()))
        reasons = {e.module: e.reason for e in gm.meta["wtacrs_ledger"].entries}
        assert reasons["s"] == "weight has layout torch.sparse_coo"
        assert reasons["q"] == "weight is a Wrapped"
        assert len(products(gm)) == 1

"""Each pass by itself: numerics, match count, old node gone, new node there; and where it must do nothing."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace

from wtacrs_fx import Backend, InvariantError, WtacrsWarning
from wtacrs_fx.passes.invariants import check_partition
from wtacrs_fx.passes.kinds import Kind, classify
from wtacrs_fx.passes.policy import Action, ratio_fraction, rows_kept
from wtacrs_fx.passes.sites import clean_module_path, find_sites, gradient_outputs
from wtacrs_fx.passes.sizes import hint

from helpers import Block, Experts, Recorder, Transformer, calls, gradients, transformer_batch

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs


def record(model: nn.Module, *args: Tensor, **options) -> tuple[Recorder, dict[str, Tensor], dict[str, Tensor]]:
    """(recorder, gradients of torch's own partition, sampled gradients) of one compiled step."""
    recorder = Recorder(**options)
    exact = gradients(model, *args, call=torch.compile(model, backend="aot_eager_decomp_partition"))
    torch._dynamo.reset()
    return recorder, exact, gradients(model, *args, call=torch.compile(model, backend=recorder))


class Reused(nn.Module):
    """The input of b is also a factor of the result, so that the backward reads it whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return (self.b(h) * self.c(x) * h).sum()


class TestKinds:
    def graph(self) -> tuple[Graph, dict[str, object]]:
        graph = Graph()
        w, x, t = (graph.placeholder(n) for n in ("primals_1", "primals_2", "tangents_1"))
        wt = graph.call_function(aten.t.default, (w,))
        h = graph.call_function(aten.mm.default, (x, wt))
        g = graph.call_function(aten.mul.Tensor, (t, h))
        noise = graph.call_function(torch.ops.aten.rand.default, ([2],))
        seeds = graph.call_function(torch.ops.prims.inductor_seeds.default, (1, torch.device("cpu")))
        constant = graph.call_function(aten.full.default, ([2], 1.0))
        graph.output((h, g))
        return graph, {"w": w, "x": x, "t": t, "wt": wt, "h": h, "g": g, "n": noise, "s": seeds, "c": constant}

    def test_classify(self):
        graph, n = self.graph()
        kinds = classify(graph, [n["w"]])
        expected = {"w": 0, "wt": 0, "c": 0, "x": 1, "h": 1, "n": 1, "s": 1, "t": 2, "g": 2}
        assert {k: kinds[n[k]] for k in expected} == {k: Kind(v) for k, v in expected.items()}

    def test_unknown_parameters_are_activations(self):
        graph, n = self.graph()
        assert classify(graph, [])[n["w"]] is Kind.ACTIVATION


class TestSites:
    def test_attention_products_are_not_sites(self):
        """dK = dS^T Q is a gradient that flows on, though it too ends in gradients of parameters."""

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = Block()

            def forward(self, x: Tensor) -> Tensor:
                return self.block(x).square().sum()

        recorder, _, _ = record(Loss(), transformer_batch(1, 8)[0])
        assert len(recorder.ledger.entries) == 6
        products = [n for n in recorder.joint[0].graph.nodes if n.target in (aten.mm.default, aten.bmm.default)]
        assert len(products) > 6

    def test_single_head_attention_of_one_example_is_not_a_site(self):
        """The same with two-dimensional products, which a look at shapes alone would take for linear layers."""

        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                return ((self.q(x) @ self.k(x).t()).softmax(-1) @ self.v(x)).square().sum()

        recorder, exact, sampled = record(Attention(), torch.randn(32, 16), ratio=0.999)
        assert sorted(e.module for e in recorder.ledger.entries) == ["k", "q", "v"]
        for key in exact:
            torch.testing.assert_close(sampled[key], exact[key], rtol=1e-4, atol=1e-5)

    def test_input_gradient_of_a_leaf_is_not_a_site(self):
        """x requires a gradient as well: dx = dy W^T is no product of an activation, and x itself no parameter."""
        model, x = nn.Linear(16, 16), torch.randn(32, 16, requires_grad=True)
        recorder = Recorder(ratio=0.5)
        compiled = torch.compile(lambda x: torch.sin(model(torch.cos(x))).sum(), backend=recorder)
        compiled(x).backward()
        got = x.grad.clone()
        x.grad = None
        torch.sin(model(torch.cos(x))).sum().backward()
        torch.testing.assert_close(got, x.grad)
        assert len(recorder.ledger.entries) == 1

    def test_frozen_weights_have_no_site(self):
        model = Transformer().requires_grad_(False)
        model.classifier.requires_grad_(True)
        with pytest.warns(WtacrsWarning, match="nothing is sampled"):
            recorder, exact, sampled = record(model, *transformer_batch())
        assert [e.module for e in recorder.ledger.entries] == ["classifier"]
        assert calls(recorder.forward[0], wtacrs.draw_seed.default) == 0
        assert all(torch.equal(exact[k], sampled[k]) for k in exact)

    def test_weight_made_from_parameters(self):
        """A weight norm or a merged adapter stands between the product and the parameters' gradients."""

        class Merged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w, self.a, self.b = (nn.Parameter(torch.randn(s) * 0.3) for s in ((16, 16), (16, 4), (4, 16)))

            def forward(self, x: Tensor) -> Tensor:
                return torch.sin(torch.cos(x) @ (self.w + self.a @ self.b)).sum()

        recorder, exact, sampled = record(Merged(), torch.randn(64, 16), ratio=0.999)
        assert len(recorder.ledger.entries) == 1
        assert recorder.ledger.count("exact") == 0
        for key in exact:
            torch.testing.assert_close(sampled[key], exact[key], rtol=1e-4, atol=1e-5)

    def test_batched_weights_stay_exact(self):
        """One weight per expert: a batched product, not a matrix one."""
        with pytest.warns(WtacrsWarning, match="no weight-gradient product"):
            recorder, exact, sampled = record(Experts(), torch.randn(4, 32, 16))
        assert recorder.ledger.entries == ()
        assert torch.equal(exact["w"], sampled["w"])

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("L['self'].encoder.layer.0.query", "encoder.layer.0.query"),
            ("L['self']", ""),
            ("G['model'].blocks.1", "blocks.1"),
            ("L['args'][0].model.layers.1", "model.layers.1"),
            ("L['self']._modules['a']._modules['0']", "a.0"),
            ("L['self'].__dict__['_modules']['a'].__dict__['_modules']['b'].c.0", "a.b.c.0"),
            ("getattr(getattr(G['model'].blocks, '1'), '0')", "blocks.1.0"),
            ("getattr(L['self'].heads, 'a b').out", "heads.a b.out"),
        ],
    )
    def test_clean_module_path(self, path, name):
        assert clean_module_path(path) == name

    def test_plain_graph_without_products(self):
        graph = symbolic_trace(lambda primals_1, tangents_1: (primals_1.sin(), tangents_1)).graph
        assert find_sites(graph, classify(graph, []), {}, {}) == []

    def test_gradient_outputs_are_matched_by_position(self):
        graph = Graph()
        w, x, t = (graph.placeholder(n) for n in ("primals_1", "primals_2", "tangents_1"))
        g = graph.call_function(aten.mul.Tensor, (t, x))
        graph.output((x, g, None))
        assert gradient_outputs(graph, 1, [w]) == {g: w}


class TestPolicy:
    @pytest.mark.parametrize(
        ("ratio", "rows", "kept"), [(0.3, 2048, 615), (0.5, 7, 4), (1e-9, 5, 1), (1, 9, 9), (0.1, 1, 1)]
    )
    def test_rows_kept(self, ratio, rows, kept):
        assert rows_kept(rows, ratio) == kept

    def test_ratio_is_kept_to_one_in_a_million(self):
        assert str(ratio_fraction(0.3)) == "3/10"
        assert abs(float(ratio_fraction(0.123456789)) - 0.123456789) < 1e-6
        assert ratio_fraction(1e-12) > 0

    def test_hint_of_an_int(self):
        assert hint(5) == 5

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"min_rows": 10_000}, "below min_rows (128 < 10000)"),
            ({"min_bytes": 10**9}, "below min_bytes (32768 < 1000000000)"),
            ({"exclude": "*.q"}, "excluded by '*.q'"),
            ({"include": "*.k"}, "not in include"),
        ],
    )
    def test_reasons(self, options, reason):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorder, _, _ = record(Transformer(), *transformer_batch(), **options)
        entry = next(e for e in recorder.ledger.entries if e.module == "blocks.0.q")
        assert (entry.decision, entry.reason) == ("exact", reason)
        assert entry.kept == entry.rows

    def test_output_head_is_excluded_by_default(self):
        recorder, _, _ = record(Transformer(), *transformer_batch())
        entry = next(e for e in recorder.ledger.entries if e.module == "classifier")
        assert entry.reason == "excluded by '*classifier'"

    def test_include_without_match_warns_with_the_names(self):
        with pytest.warns(WtacrsWarning, match=r"include=\['\*\.qurey'\].*blocks\.0\.down") as caught:
            record(Transformer(), *transformer_batch(), include=["*.qurey", "*.down"])
        assert sum(issubclass(w.category, WtacrsWarning) for w in caught) == 1


class TestSample:
    def test_early_rewrite(self):
        """late='exact', no pointwise op can give the input back: rows are saved, the source is not."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x)).square().sum()

        recorder, exact, sampled = record(Net(), torch.randn(64, 32), ratio=0.25)
        forward, backward = recorder.forward[0], recorder.backward[0]
        assert recorder.ledger.count("early") == 2
        assert calls(forward, wtacrs.select_rows.default) == 2
        assert calls(backward, wtacrs.select_rows.default) == 0
        placeholders = [n for n in backward.graph.find_nodes(op="placeholder") if n.name.startswith("wtacrs_saved")]
        assert sorted(tuple(n.meta["val"].shape) for n in placeholders) == [(16,), (16,), (16, 32), (16, 32)]
        saved_shapes = [tuple(n.meta["val"].shape) for n in backward.graph.find_nodes(op="placeholder")]
        assert saved_shapes.count((64, 32)) == 1, "only what the loss needs: the output of b"
        assert torch.equal(exact["a.bias"], sampled["a.bias"])
        assert not torch.equal(exact["a.weight"], sampled["a.weight"])

    def test_late_rewrite_recomputes_rows(self):
        """gelu's input is saved for gelu's backward: its output is computed again at the kept rows, and no rows are saved."""

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 128)

            def forward(self, x: Tensor) -> Tensor:
                return self.down(nn.functional.gelu(self.up(x))).square().sum()

        recorder, _, _ = record(Net(), torch.randn(256, 32), ratio=0.25)
        entry = next(e for e in recorder.ledger.entries if e.module == "down")
        assert (entry.decision, entry.reason) == ("late", "input recomputed at the kept rows")
        assert entry.bytes_exact == 256 * 128 * 4
        assert entry.bytes_now == 256 * 4, "the norms of the rows"
        assert calls(recorder.forward[0], wtacrs.select_rows.default) == 1  # of up, which is early
        assert calls(recorder.backward[0], wtacrs.select_rows.default) == 1

    def test_late_where_the_input_is_needed_whole(self):
        """The next op's backward reads the input itself, so rows beside it would be bytes for nothing."""

        recorder, _, _ = record(Reused(128), torch.randn(256, 128), ratio=0.25)
        entry = next(e for e in recorder.ledger.entries if e.module == "b")
        assert entry.decision == "late"
        assert entry.reason == "input also needed by aten.mul.Tensor"

    def test_narrow_products_do_not_become_late(self):
        recorder, _, _ = record(Reused(64), torch.randn(256, 64), ratio=0.25)
        entry = next(e for e in recorder.ledger.entries if e.module == "b")
        assert entry.decision == "exact"
        assert "narrower than 128" in entry.reason

    def test_late_exact_option(self):
        recorder, exact, sampled = record(Reused(128), torch.randn(256, 128), ratio=0.25, late="exact")
        assert {e.module: e.decision for e in recorder.ledger.entries} == {"a": "early", "b": "exact", "c": "early"}
        assert calls(recorder.backward[0], wtacrs.select_rows.default) == 0
        torch.testing.assert_close(sampled["b.weight"], exact["b.weight"])

    @pytest.mark.parametrize("late", ["sample", "exact"])
    def test_shared_input_is_one_draw(self, late):
        recorder, _, _ = record(Transformer(layers=1), *transformer_batch(), ratio=0.5, late=late)
        entries = {e.module: e for e in recorder.ledger.entries}
        shared = [entries[f"blocks.0.{n}"] for n in "qkv"]
        assert len({e.decision for e in shared}) == 1
        assert sum(e.bytes_exact > 0 for e in shared) == 1, "the bytes are counted once"
        if late == "exact":
            early = recorder.ledger.count("early")
            assert early == 6
            assert calls(recorder.forward[0], wtacrs.select_rows.default) == early - 2
            assert sorted(e.reason.partition(" ")[0] for e in shared) == ["", "shared", "shared"]

    def test_chain_of_products(self):
        """The result of one sampled product is not the gradient of another."""
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        recorder = Recorder(ratio=0.5)
        compiled = torch.compile(lambda x: model(x).square().sum(), backend=recorder)
        compiled(torch.randn(64, 32)).backward()
        assert recorder.ledger.count("exact") == 0
        assert len(recorder.ledger.entries) == 4

    def test_graph_input_as_the_source(self):
        """The input of the first layer is a placeholder; its rows are taken behind all placeholders."""
        model = nn.Linear(32, 32)
        recorder = Recorder(ratio=0.5)
        torch.compile(lambda x: model(x).square().sum(), backend=recorder)(torch.randn(64, 32)).backward()
        ops = [n.op for n in recorder.forward[0].graph.nodes]
        assert "placeholder" not in ops[ops.index("call_function") :]
        assert recorder.ledger.count("early") == 1


class TestNothingToDo:
    def test_no_tangents(self):
        recorder = Recorder()
        model = Transformer()
        with torch.no_grad():
            x, t = transformer_batch()
            torch.testing.assert_close(torch.compile(model, backend=recorder)(x, t), model(x, t))
        assert recorder.joint == []

    def test_a_loss_behind_a_graph_break_is_not_reported(self):
        """No product in the backward: nothing to sample, nothing to warn of (a warning would fail this test)."""
        recorder = Recorder()
        target = torch.randint(0, 4, (8,))
        loss = torch.compile(lambda x: nn.functional.cross_entropy(x, target), backend=recorder)
        loss(torch.randn(8, 4, requires_grad=True)).backward()
        assert len(recorder.joint) == 1
        assert recorder.ledgers == []

    def test_ratio_one_leaves_the_graph_of_the_exact_partition(self):
        model, batch = Transformer(), transformer_batch()
        recorder, exact, sampled = record(model, *batch, ratio=1.0)
        assert all(torch.equal(exact[k], sampled[k]) for k in exact)
        assert calls(recorder.forward[0], wtacrs.draw_seed.default) == 0
        assert recorder.ledger.saved_bytes == recorder.ledger.saved_bytes_exact

    def test_nothing_qualifies(self):
        with pytest.warns(
            WtacrsWarning, match="nothing is sampled in this graph, it trains exactly: 12 below min_rows"
        ):
            recorder, exact, sampled = record(Transformer(), *transformer_batch(), min_rows=1000)
        assert all(torch.equal(exact[k], sampled[k]) for k in exact)
        assert calls(recorder.forward[0], wtacrs.draw_seed.default) == 0


class TestInvariants:
    """A partition that was tampered with does not pass."""

    def parts(self):
        from wtacrs_fx.passes import work as module

        seen = []
        original = module.check_partition
        module.check_partition = lambda *args: seen.append(args)
        try:
            record(Transformer(), *transformer_batch(), ratio=0.5)
        finally:
            module.check_partition = original
        return seen[0]

    def test_untouched_passes(self):
        check_partition(*self.parts())

    def test_random_op_in_the_backward(self):
        forward, backward, *rest = self.parts()
        with backward.graph.inserting_before(backward.graph.output_node()):
            backward.graph.call_function(wtacrs.draw_seed.default, (torch.device("cpu"), None))
        with pytest.raises(InvariantError, match="draw_seed is in the backward"):
            check_partition(forward, backward, *rest)

    def test_selection_in_both(self):
        forward, backward, *rest = self.parts()
        node = forward.graph.find_nodes(op="call_function", target=wtacrs.select_rows.default)[0]
        with backward.graph.inserting_before(backward.graph.output_node()):
            copy = backward.graph.create_node("call_function", node.target, (), name=node.name)
        assert copy.name == node.name
        with pytest.raises(InvariantError, match="forward and again in the backward"):
            check_partition(forward, backward, *rest)

    def test_product_reads_something_else(self):
        forward, backward, plan, done, n = self.parts()
        early = next(d for d in plan if d.action is Action.EARLY)
        kept = done.draws[early.group]
        product = next(m for m in backward.graph.nodes if m.name == done.products[early.site.node].name)
        other = next(
            p for p in backward.graph.find_nodes(op="placeholder") if p.name not in (kept.rows.name, kept.index.name)
        )
        product.args = (product.args[0], other)
        with pytest.raises(InvariantError, match="does not read its kept rows"):
            check_partition(forward, backward, plan, done, n)

    def test_wrong_number_of_rows(self):
        forward, backward, plan, done, n = self.parts()
        wrong = [dataclasses.replace(d, k=d.k + 1) if d.action is Action.EARLY else d for d in plan]
        with pytest.raises(InvariantError, match="keeps"):
            check_partition(forward, backward, wrong, done, n)

    def test_no_drawing_op_in_both_graphs_of_a_real_model(self):
        recorder, _, _ = record(Transformer(dropout=0.1), *transformer_batch(), ratio=0.3)
        for op in (wtacrs.draw_seed.default, wtacrs.select_rows.default):
            names = [
                {n.name for n in g[0].graph.find_nodes(op="call_function", target=op)}
                for g in (recorder.forward, recorder.backward)
            ]
            assert not names[0] & names[1]


class TestNormsBesideEqualNodes:
    """The backward of tanh squares the tensor whose row norms a late site takes in the forward: one node must not be both."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh()).square().mean()

    @pytest.mark.slow  # Inductor's decompositions make the nodes equal
    def test_tanh_before_a_linear_layer(self):
        model, x = self.Model(), torch.randn(256, 64)
        exact = gradients(model, x)
        backend = Backend(ratio=0.5, min_bytes=0, memory_budget=None)
        sampled = gradients(model, x, call=torch.compile(model, backend=backend))
        assert backend.ledger.count("late") or backend.ledger.count("early")
        torch.testing.assert_close(sampled["first.bias"], exact["first.bias"])

"""Attention's own products: every contraction, a draw per head, and what is left alone."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import symbolic_trace

import wtacrs_fx
from wtacrs_fx import WtacrsWarning, measure

from helpers import SMALL, Block, Experts, Moments, Recorder, Transformer, calls, gradients, transformer_batch

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs
HEADS, LENGTH, WIDTH = 4, 24, 16


class Attention(nn.Module):
    """Written out, over any leading dimensions; ``groups`` query heads to a key head."""

    def __init__(self, groups: int = 1, fused: bool = False) -> None:
        super().__init__()
        self.groups, self.fused = groups, fused
        self.q = nn.Parameter(torch.randn(HEADS, WIDTH, WIDTH) * 0.3)
        self.k, self.v = (nn.Parameter(torch.randn(HEADS // groups, WIDTH, WIDTH) * 0.3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.q, self.k, self.v))
        k, v = (self.expand(t) for t in (k, v))
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return torch.sin(out).square().sum()

    def expand(self, t: Tensor) -> Tensor:
        b, h, n, d = t.shape
        return t[:, :, None].expand(b, h, self.groups, n, d).reshape(b, h * self.groups, n, d)


def batch(b: int = 3) -> Tensor:
    return torch.randn(b, LENGTH, WIDTH)


def compiled_gradients(model: nn.Module, x: Tensor, **options) -> tuple[Recorder, dict[str, Tensor]]:
    torch._dynamo.reset()
    recorder = Recorder(**{"attention": True, "include": "*", **options})
    return recorder, gradients(model, x, call=torch.compile(model, backend=recorder))


def attention_entries(recorder: Recorder) -> list:
    return [e for e in recorder.ledger.entries if e.shape[0] == 3 * HEADS]


@pytest.mark.parametrize("groups", [1, 2])
def test_quartet(groups):
    model, x = Attention(groups), batch()
    exact = gradients(model, x)
    recorder, sampled = compiled_gradients(model, x, ratio=0.5)
    entries = attention_entries(recorder)
    # Q, K (contracted over 24 positions) and V (over 16 features); P is read by softmax's backward whole and stays exact.
    assert sorted((e.decision, e.rows, e.kept) for e in entries) == [
        *[("early", 16, 8), ("early", 24, 12), ("early", 24, 12)],
        ("exact", 24, 24),
    ]
    products = [n for n in recorder.backward[0].graph.nodes if n.target is aten.bmm.default]
    heads = [n.args[0].meta["val"].shape[-1] for n in products if n.meta["val"].shape[0] == 3 * HEADS]
    assert sorted(heads) == [8, 12, 12, 24], "contracted over what is kept"
    draws = [n for n in recorder.forward[0].graph.nodes if n.target is wtacrs.select_rows.default]
    assert sum(n.args[0].meta["val"].dim() == 2 for n in draws) == 3
    assert calls(recorder.backward[0], wtacrs.draw_seed.default) == 0
    assert not torch.allclose(sampled["q"], exact["q"], rtol=1e-3)
    _, every_row = compiled_gradients(model, x, ratio=0.9999)
    for key, value in exact.items():
        torch.testing.assert_close(every_row[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "estimator"), [(1, "wta_crs"), (2, "systematic")])
def test_unbiased(groups, estimator):
    torch.manual_seed(1)
    model, x = Attention(groups), batch()
    exact = gradients(model, x)
    recorder = Recorder(attention=True, ratio=0.5, estimator=estimator)
    compiled = torch.compile(model, backend=recorder)
    moments = Moments()
    for _ in range(300):
        moments.add(gradients(model, x, call=compiled))
    assert sum(e.decision != "exact" for e in attention_entries(recorder)) == 3
    for key, value in exact.items():
        z = moments.z(key, value)
        assert z.square().mean().sqrt() < 1.35, f"{key}: rms {z.square().mean().sqrt():.2f}"
        assert moments.standard_error(key).max() > 0


def test_unbiased_through_a_transformer():
    """Noise of the second block's attention flows through the first, and is unbiased there."""
    torch.manual_seed(0)
    model, data = Transformer(), transformer_batch()
    exact = gradients(model, *data)
    recorder = Recorder(attention=True, ratio=0.5)
    compiled = torch.compile(model, backend=recorder)
    moments = Moments()
    for _ in range(150):
        moments.add(gradients(model, *data, call=compiled))
    assert sum(e.op == "aten.bmm.default" and e.decision == "early" for e in recorder.ledger.entries) == 6
    for name, value in exact.items():
        if value.abs().max() > 1e-7:
            z = moments.z(name, value)
            assert z.square().mean().sqrt() < 1.5, f"{name}: rms {z.square().mean().sqrt():.2f}"
    assert moments.standard_error("blocks.0.ln1.weight").max() > 0, "input gradients are noisy"
    assert moments.standard_error("classifier.bias").max() < 1e-6


def test_rows_of_a_late_site_per_head():
    """Wide heads whose keys are in memory anyway are sampled by the true gradient, head by head."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.Parameter(torch.randn(2, 128, 128) * 0.1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            q, k = x @ self.q, x @ self.k
            return (torch.bmm(q, k.transpose(1, 2)).tanh() @ torch.ones(128, 1)).square().sum() + (k * k).sum()

    model, x = Net(), torch.randn(2, 128, 128)
    exact = gradients(model, x)
    torch._dynamo.reset()
    recorder = Recorder(attention=True, ratio=0.25)
    gradients(model, x, call=torch.compile(model, backend=recorder))
    late = [e for e in recorder.ledger.entries if e.decision == "late"]
    assert [e.kept for e in late] == [32]
    assert late[0].reason == "input saved anyway"
    draws = [n for n in recorder.backward[0].graph.nodes if n.target is wtacrs.select_rows.default]
    assert [tuple(n.args[0].meta["val"].shape) for n in draws] == [(2, 128)]
    torch._dynamo.reset()
    every_row = gradients(model, x, call=torch.compile(model, backend=Recorder(attention=True, ratio=0.9999)))
    for key in exact:
        torch.testing.assert_close(every_row[key], exact[key], rtol=1e-3, atol=1e-2)


def test_dynamic_shapes():
    model = Attention()
    recorder = Recorder(attention=True, ratio=0.9999)
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for b in (3, 5):
        x = batch(b)
        torch.testing.assert_close(gradients(model, x, call=compiled), gradients(model, x), rtol=1e-4, atol=1e-4)
    assert len(recorder.ledgers) == 1
    assert recorder.ledger.count("early") >= 3


@pytest.mark.parametrize("late", ["sample", "exact"])
def test_unbiased_with_rounding(late):
    """Rows of the products, and every pointwise operand in 8 bits: the noise of both has mean zero, upstream too."""
    torch.manual_seed(0)
    model, x = Block(32, heads=2), transformer_batch(4, 12, 32)[0]
    exact = gradients(model, x, call=lambda x: torch.sin(model(x)).square().sum())
    backend = wtacrs_fx.Backend(
        attention=True, ratio=0.6, estimator="systematic", round_bits=8, late=late, inner="eager", **SMALL
    )
    compiled = torch.compile(model, backend=backend)
    moments = Moments()
    for _ in range(200):
        moments.add(gradients(model, x, call=lambda x: torch.sin(compiled(x)).square().sum()))
    sampled = [e for e in backend.ledger.entries if e.op == "aten.bmm.default" and e.decision == "early"]
    assert len(sampled) >= 2, backend.ledger.table()
    assert any(line.bits == 8 for line in backend.ledger.compressed), backend.ledger.table()
    assert moments.standard_error("ln1.weight").max() > 0
    for name, value in exact.items():
        if value.abs().max() > 1e-5:
            z = moments.z(name, value)
            assert z.square().mean().sqrt() < 1.5, f"{name}: rms {z.square().mean().sqrt():.2f}"


class Shared(nn.Module):
    """Two products in a chain read one tensor: with one draw for both, an estimate would be multiplied by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(8, 8) * 0.5), nn.Parameter(torch.randn(8, 8) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.cos(x @ self.u).transpose(1, 2)
        scores = torch.bmm(x @ self.w, keys)
        return torch.sin(torch.bmm(torch.sin(torch.bmm(scores, x)), keys)).sum()


@pytest.mark.parametrize("way", ["compiled", "eager"])
def test_products_in_a_chain_have_draws_of_their_own(way):
    torch.manual_seed(2)
    model, x = Shared(), torch.randn(2, 12, 8)
    exact = gradients(model, x)
    options = {"attention": True, "ratio": 0.2, "estimator": "crs", "late": "exact"}
    if way == "compiled":
        recorder = Recorder(**options)
        call = torch.compile(model, backend=recorder)
    else:
        call = wtacrs_fx.rewrite(symbolic_trace(model), x, **{**SMALL, **options})
    moments = Moments()
    for _ in range(500):
        moments.add(gradients(model, x, call=call))
    for key, value in exact.items():
        z = moments.z(key, value)
        assert z.square().mean().sqrt() < 1.5, f"{key}: rms {z.square().mean().sqrt():.2f}"


class TestLeftAlone:
    def test_by_default(self):
        recorder, _ = compiled_gradients(Attention(), batch(), attention=False)
        assert attention_entries(recorder) == []
        assert recorder.ledger.count("exact") == 0, "the projections are sites"

    def test_fused_attention_is_reported(self):
        model, x = Attention(fused=True), batch()
        exact = gradients(model, x)
        recorder, sampled = compiled_gradients(model, x, ratio=0.9999)
        fused = [e for e in recorder.ledger.entries if "scaled_dot_product" in e.op]
        assert [(e.decision, e.reason) for e in fused] == [("exact", "fused attention has no separate products")]
        assert attention_entries(recorder) == []
        torch.testing.assert_close(sampled, exact, rtol=1e-4, atol=1e-4)

    def test_a_head_below_min_rows(self):
        """Head features are fewer than the default min_rows: V stays exact, Q and K are sampled over positions."""
        recorder, _ = compiled_gradients(Attention(), batch(), min_rows=20)
        reasons = {e.rows: e.reason for e in attention_entries(recorder) if e.decision == "exact"}
        assert reasons[16] == "below min_rows (16 < 20)"

    def test_experts_are_no_attention(self):
        """A batched weight gradient ends in a parameter: it stays exact with attention=True too."""
        with pytest.warns(WtacrsWarning, match="no weight-gradient product"):
            recorder, _ = compiled_gradients(Experts(), torch.randn(4, 32, 16))
        assert recorder.ledger.entries == ()


class TestEager:
    """The same in a traced forward graph: both operands of a product keep rows."""

    def test_rewritten(self):
        model, x = Block(), transformer_batch()[0]
        exact = gradients(model, x, call=lambda x: model(x).square().sum())
        gm = wtacrs_fx.rewrite(symbolic_trace(model), x, **{**SMALL, "ratio": 0.5, "attention": True})
        assert (calls(gm, wtacrs.matmul.default), calls(gm, wtacrs.linear.default)) == (2, 6)
        entries = [e for e in gm.meta["wtacrs_ledger"].entries if e.op == "matmul"]
        assert [(e.rows, e.kept) for e in entries] == [(16, 8)] * 3, "Q, K and V; softmax saves P"
        with measure.held(model) as held:
            y = gm(x)
        assert held.bytes == gm.meta["wtacrs_ledger"].saved_bytes
        del y
        sampled = gradients(model, x, call=lambda x: gm(x).square().sum())
        torch.testing.assert_close(sampled["o.bias"], exact["o.bias"])
        assert not torch.allclose(sampled["q.bias"], exact["q.bias"], rtol=1e-3)
        every_row = wtacrs_fx.rewrite(symbolic_trace(model), **{**SMALL, "ratio": 0.9999, "attention": True})
        for key, value in gradients(model, x, call=lambda x: every_row(x).square().sum()).items():
            torch.testing.assert_close(value, exact[key], rtol=1e-3, atol=1e-3)

    def test_unbiased(self):
        model, x = Block(), transformer_batch()[0]
        exact = gradients(model, x, call=lambda x: model(x).square().sum())
        gm = wtacrs_fx.rewrite(symbolic_trace(model), **{**SMALL, "ratio": 0.5, "attention": True})
        moments = Moments()
        for _ in range(300):
            moments.add(gradients(model, x, call=lambda x: gm(x).square().sum()))
        for key in ("q.weight", "k.weight", "v.weight", "v.bias", "ln1.weight"):
            z = moments.z(key, exact[key])
            assert z.square().mean().sqrt() < 1.45, f"{key}: rms {z.square().mean().sqrt():.2f}"


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_where_it_fires_in_hugging_face_models(family):
    """Written-out attention: BERT with attn_implementation="eager", and T5."""
    if family == "bert":
        config = transformers.BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=100
        )
        model = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
        inputs = {"input_ids": torch.randint(0, 100, (4, 32))}
    else:
        config = transformers.T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=100)
        model = transformers.T5EncoderModel(config).eval()
        inputs = {"input_ids": torch.randint(0, 100, (4, 32))}
    exact = gradients(model, call=lambda: model(**inputs).last_hidden_state.square().sum())
    torch._dynamo.reset()
    recorder = Recorder(attention=True, ratio=0.9999)
    compiled = torch.compile(model, backend=recorder)
    sampled = gradients(model, call=lambda: compiled(**inputs).last_hidden_state.square().sum())
    fired = [e for e in recorder.ledger.entries if e.op == "aten.bmm.default" and e.decision == "early"]
    assert len(fired) >= 3, recorder.ledger.table()
    for key, value in exact.items():
        torch.testing.assert_close(sampled[key], value, rtol=1e-3, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_inductor():
    model, x = Attention(groups=2), batch()
    exact = gradients(model, x)
    backend = wtacrs_fx.Backend(ratio=0.9999, attention=True, **SMALL)
    sampled = gradients(model, x, call=torch.compile(model, backend=backend))
    heads = [e for e in backend.ledger.entries if e.shape[0] == 3 * HEADS]
    assert sum(e.decision == "early" for e in heads) == 3, backend.ledger.table()
    torch.testing.assert_close(sampled, exact, rtol=1e-3, atol=1e-4)

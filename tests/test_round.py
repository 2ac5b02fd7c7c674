"""The rounding pass: every kind of site four ways at once, whole models, and where it must do nothing."""

import contextlib
from statistics import mean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wtacrs_fx import Backend, Ledger, WtacrsWarning, measure

from helpers import Moments, Recorder, Transformer, calls, gradients, transformer_batch

aten, wtacrs = torch.ops.aten, torch.ops.wtacrs
ROUNDED = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "inner": "eager"}


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


KINDS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "relu_squared": lambda x: F.relu(x).square(),
    "swiglu": lambda x: F.silu(x[..., :64]) * x[..., 64:],
    "geglu": lambda x: F.gelu(x[..., :64]) * x[..., 64:],
    "new_gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.0447 * x**3))),
    "layer_norm": lambda x: F.layer_norm(x, (128,)),
    "rms_norm": rms_norm,
    "torch_rms_norm": lambda x: F.rms_norm(x, (128,)),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "residual_scaling": lambda x: x + x.sin() * torch.linspace(0.5, 2.0, 128),
    "gated_residual": lambda x: x + x.sin() * x.cos(),
    "dropout": lambda x: F.dropout(F.gelu(x), 0.1),
}


class Unit(nn.Module):
    """One operation between two linear layers; the second has no bias and is followed by fixed weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.operation = KINDS[kind]
        width = self.operation(torch.zeros(1, 128)).shape[-1]
        self.a, self.b = nn.Linear(128, 128), nn.Linear(width, 32, bias=False)
        self.register_buffer("weights", torch.linspace(-1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.operation(self.a(x))) * self.weights).mean()


def compiled_gradients(model: nn.Module, batch: tuple, backend) -> dict[str, Tensor]:
    torch._dynamo.reset()
    return gradients(model, *batch, call=torch.compile(model, backend=backend))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_sites(kind):
    """Numerics, count, what is saved, and the mean of the gradient by z-scores at 4 bits (8 for what is normalised)."""
    torch.manual_seed(0)
    model, x = Unit(kind), 2 * torch.randn(32, 128)
    torch.manual_seed(1)  # (of dropout; what is rounded how has a generator of its own)
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")
    torch.manual_seed(1)
    forward = torch.compile(model, backend="aot_eager_decomp_partition")(x)
    recorder = Recorder(**{**ROUNDED, "round_bits": 4, "seed": 0})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), forward)
    lines = recorder.ledger.compressed
    assert any(line.bits > 1 for line in lines), recorder.ledger.table()
    assert calls(recorder.forward[0], wtacrs.short_uniform.default) == sum(c.bits > 1 for c in lines)
    assert calls(recorder.backward[0], wtacrs.short_uniform.default) == 0
    before, now = (n - x.nbytes for n in (recorder.ledger.saved_bytes_exact, recorder.ledger.saved_bytes))  # x is saved
    assert now < 0.5 * before, recorder.ledger.table()
    moments, along = Moments(), {name: [] for name in exact}
    for _ in range(40):
        torch.manual_seed(1)
        found = gradients(model, x, call=compiled)
        moments.add(found)
        for name, value in exact.items():
            along[name].append(float((found[name] - value).flatten().double() @ value.flatten().double()))
    for name, value in exact.items():
        assert moments.standard_error(name).max() > 0 or name == "a.bias", name
        rms = float(moments.z(name, value).square().mean().sqrt())
        assert rms < 1.5, f"{name}: z rms {rms:.2f}"
        # In one direction 40 draws tell far more: z of the projection on the exact gradient.
        projections = torch.tensor(along[name], dtype=torch.float64)
        floor = 1e-6 * float(value.double().square().sum()) + 1e-30
        assert abs(projections.mean()) < 4.5 * projections.std() / 40**0.5 + floor, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu", "geglu", "new_gelu", "silu", "softplus", "elu"])
def test_several_factors_become_one(kind, dtype):
    """One tensor for the derivative, however it is written and in whichever types it is computed, beside those of the other
    operands."""
    torch.manual_seed(0)
    model, x = Unit(kind).to(dtype), torch.randn(32, 128, dtype=dtype)
    backend = Backend(**{**ROUNDED, "round_bits": 8})
    found = compiled_gradients(model, (x,), backend)
    pointwise = [c for c in backend.ledger.compressed if "mm" not in c.readers]
    assert len(pointwise) == (2 if kind in ("swiglu", "geglu") else 1), backend.ledger.table()
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")
    for name, value in exact.items():
        assert measure.relative_error(found, {name: value}) < 5e-4


def test_normalisation_shares_one_tensor_with_the_layers_behind_it():
    torch.manual_seed(0)
    model, batch = Transformer(width=128), transformer_batch(width=128)
    backend = Backend(**{**ROUNDED, "round_bits": 8})
    compiled_gradients(model, batch, backend)
    norms = [c for c in backend.ledger.compressed if "native_layer_norm_backward" in c.readers]
    assert len(norms) == 4
    assert all("mm" in c.readers for c in norms)


@pytest.mark.parametrize(("bits", "doubled"), [(8, 8), (4, 8), (2, 4)])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_what_is_normalised_has_twice_the_bits(kind, bits, doubled):
    """The one tensor of a normalisation; a derivative and the input of a linear layer have those that were asked for."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 128), nn.GELU(), Unit(kind)), torch.randn(32, 128)
    backend = Backend(**{**ROUNDED, "round_bits": bits})
    compiled_gradients(model, (x,), backend)
    found = sorted(c.bits for c in backend.ledger.compressed if c.bits > 1)
    assert found == sorted([bits, bits, doubled]), backend.ledger.table()


@pytest.mark.parametrize(("ratio", "bits"), [(1.0, 4), (0.5, 8)])
def test_mean_of_a_transformer(ratio, bits):
    """Attention, normalisations, GELU, sampled rows: all at once. Dropout masks are those of the forward."""
    torch.manual_seed(0)
    model, batch = Transformer(width=128), transformer_batch(width=128)
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    backend = Backend(**{**ROUNDED, "ratio": ratio, "round_bits": bits})
    torch._dynamo.reset()
    compiled, moments = torch.compile(model, backend=backend), Moments()
    for _ in range(50):
        moments.add(gradients(model, *batch, call=compiled))
    assert len(backend.ledger.compressed) >= 12
    for name, value in exact.items():
        if value.abs().max() > 1e-7:
            rms = float(moments.z(name, value).square().mean().sqrt())
            assert rms < moments.largest_rms(name), f"{name}: z rms {rms:.2f}"


class Normalised(nn.Module):
    """Rows of 16 features, normalised, between two linear layers; the gradient of the result is known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 32, bias=False)
        self.register_buffer("weights", torch.linspace(-1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(F.layer_norm(self.a(x), (16,))) * self.weights).mean()

    def bias_of_second_order(self, x: Tensor) -> Tensor:
        """Of the gradient of ``a.weight``: with x_hat' of variance v in both of its places, the gradient of LayerNorm's input
        ``(g - mean(g) - x_hat mean(g x_hat)) / sigma`` has the mean ``- v g / (D sigma)`` more. Four bits: v is s^2 / 12."""
        y = self.a(x).detach()
        sigma = y.std(-1, keepdim=True, correction=0)
        step = (y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)) / sigma / 15
        g = self.weights / (len(x) * 32) @ self.b.weight.detach()
        return (-(step**2 / 12) * g / (16 * sigma)).T @ x


def test_one_rounding_in_two_factors_has_a_bias_of_second_order():
    """x_hat is twice a factor of LayerNorm's input gradient: at 2 bits (4 for x_hat) the mean is off by what theory says, less
    than a thousandth of the gradient (rows have 16 features only); at 8 bits nothing is to be seen of it."""
    torch.manual_seed(0)
    model, x = Normalised(), 1 + torch.randn(2048, 64)
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")["a.weight"]
    expected = model.bias_of_second_order(x)
    for bits, share in ((2, 1.0), (8, 0.0)):
        backend = Backend(**{**ROUNDED, "round_bits": bits, "seed": 1})
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        errors = [gradients(model, x, call=compiled)["a.weight"] - exact for _ in range(100)]
        assert any("native_layer_norm_backward" in c.readers for c in backend.ledger.compressed)
        along = torch.stack([(e * expected).sum() / expected.square().sum() for e in errors])
        error = float(along.std()) / 10
        assert abs(float(along.mean()) - share) < 4.5 * error + 0.05
        assert error < 0.1
    assert expected.norm() < 1e-3 * exact.norm()


def family(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two layers, hidden 128; transformers' own code."""
    import transformers as t

    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    causal = {"input_ids": ids, "labels": ids}
    if name == "bert":
        config = t.BertConfig(vocab_size=64, **small)
        return t.BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}
    if name == "gpt2":
        config = t.GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=64, use_cache=False)
        return t.GPT2LMHeadModel(config), causal
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, use_cache=False, **small)), causal
    if name == "t5":
        config = t.T5Config(vocab_size=64, d_model=128, d_ff=512, d_kv=32, num_heads=4, num_layers=2, use_cache=False)
        config.decoder_start_token_id = 0
        return t.T5ForConditionalGeneration(config), causal
    config = t.ViTConfig(image_size=32, patch_size=8, num_labels=4, **small)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return t.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.arange(4)}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_whole_models(name):
    """Relative squared errors, mean of three draws: at 8 bits below 5e-4, at 4 bits below 0.05 in every parameter. Losses are
    equal to the bit. (The largest is that of a weight of ViT whose gradient is a sum of terms that nearly cancel.)"""
    torch.manual_seed(0)
    model, batch = family(name)
    model.train()

    def run(backend, draws: int = 3) -> tuple[Tensor, list[dict[str, Tensor]]]:
        torch._dynamo.reset()
        compiled, found = torch.compile(model, backend=backend), []
        for i in range(draws):
            torch.manual_seed(1)  # the masks of dropout
            for _ in range(i):
                torch.ops.wtacrs.draw_seed(torch.device("cpu"))  # (another draw, the same masks)
            loss = compiled(**batch).loss
            loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        return loss.detach(), found

    loss, (exact,) = run("aot_eager_decomp_partition", draws=1)
    real = {n: g for n, g in exact.items() if g.square().mean() > 1e-16}  # (key biases have no gradient)
    for bits, median, largest, share in ((8, 2.5e-4, 5e-4, 0.6), (4, 5e-3, 0.05, 0.5)):
        backend = Backend(**{**ROUNDED, "round_bits": bits, "round_fused_attention": True})
        rounded_loss, draws = run(backend)
        assert torch.equal(loss, rounded_loss)
        errors = {n: mean(measure.relative_error(d, {n: g}) for d in draws) for n, g in real.items()}
        assert mean(measure.relative_error(d, real) for d in draws) < median
        over = {n: e for n, e in errors.items() if e > largest}
        assert not over, f"{bits} bits: {over}"
        assert backend.ledger.saved_bytes < share * backend.ledger.saved_bytes_exact, backend.ledger.table()


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ledger_total_is_what_autograd_holds(inner):
    torch.manual_seed(0)
    model, batch = Transformer(layers=1, dropout=0.1), transformer_batch()
    backend = Backend(**{**ROUNDED, "inner": inner, "round_bits": 4, "ratio": 0.2})
    compiled = torch.compile(model, backend=backend)
    with measure.held(model) as held:
        loss = compiled(*batch)
    assert held.bytes == backend.ledger.saved_bytes
    torch.manual_seed(3)
    found = gradients(model, *batch, call=compiled)
    assert loss.requires_grad
    assert all(g.isfinite().all() for g in found.values())
    restored = Ledger.from_dict(backend.ledger.to_dict())
    assert restored == backend.ledger


def test_bfloat16():
    torch.manual_seed(0)
    model, batch = Transformer().to(torch.bfloat16), transformer_batch()
    batch = batch[0].to(torch.bfloat16), batch[1]
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    backend = Backend(**{**ROUNDED, "round_bits": 4})
    found = compiled_gradients(model, batch, backend)
    assert {c.dtype for c in backend.ledger.compressed} >= {"bfloat16"}
    assert backend.ledger.saved_bytes < 0.7 * backend.ledger.saved_bytes_exact
    assert measure.relative_error(found, exact) < 0.1


def test_recomputed_segments_are_exact():
    """Under a budget only what is kept is rounded."""
    torch.manual_seed(0)
    model, batch = Transformer(layers=3), transformer_batch()
    backend = Backend(**{**ROUNDED, "memory_budget": 0.4, "round_bits": 8})
    found = compiled_gradients(model, batch, backend)
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    assert any(p.decision == "recompute" for p in backend.ledger.parts)
    assert measure.relative_error(found, exact) < 5e-4
    assert backend.ledger.predicted.peak <= 0.4 * backend.ledger.predicted_exact.peak


@pytest.mark.parametrize(
    "options", [{"round_include": "nothing.*"}, {"round_exclude": "*"}, {"min_bytes": 10**6}, {"round_bits": None}]
)
def test_left_alone(options):
    model, batch = Transformer(), transformer_batch()
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    recorder = Recorder(**{**ROUNDED, "round_bits": 8, **options})
    asked = recorder.config.round_bits is not None
    with pytest.warns(WtacrsWarning, match="nothing is rounded") if asked else contextlib.nullcontext():
        found = compiled_gradients(model, batch, recorder)
    assert [c for c in recorder.ledger.compressed if c.bits > 1] == []
    assert calls(recorder.forward[0], wtacrs.draw_seed.default) == 0
    for name in exact:
        torch.testing.assert_close(found[name], exact[name])


def test_patterns_choose_modules():
    model, batch = Transformer(), transformer_batch()
    backend = Backend(**{**ROUNDED, "round_bits": 8, "round_include": "*.down"})
    compiled_gradients(model, batch, backend)
    lines = [c for c in backend.ledger.compressed if c.bits > 1]
    assert [(c.readers, c.shape[-1]) for c in lines] == [(("mm",), 256)] * 2  # the inputs of both layers


class Scaled(nn.Module):
    """A product with whole numbers that depend on the batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.c, self.dtype = nn.Linear(128, 128), nn.Linear(128, 32), nn.Linear(128, 128), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * (3 * self.c(x).detach()).to(self.dtype)).mean()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers_stay_as_they_are(dtype):
    """The input of the second layer is rounded, and nothing that the gradients of the first are multiplied by."""
    torch.manual_seed(0)
    model, x = Scaled(dtype), torch.randn(32, 128)
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")
    backend = Backend(**{**ROUNDED, "round_bits": 2})
    found = compiled_gradients(model, (x,), backend)
    assert [(c.dtype, c.readers) for c in backend.ledger.compressed] == [("float32", ("mm",))]
    assert all(torch.equal(found[n], exact[n]) for n in ("a.weight", "a.bias", "b.bias"))
    assert not torch.equal(found["b.weight"], exact["b.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["gelu", "silu", "layer_norm"])
def test_what_is_not_finite_is_seen_in_the_gradients(kind, bad):
    """By a gradient scaler, which looks at all of them. (gelu' has a known range and no scale that could be NaN.)"""
    torch.manual_seed(0)
    model, x = Unit(kind), torch.randn(32, 128)
    x[3, 5] = bad
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")
    found = compiled_gradients(model, (x,), Backend(**{**ROUNDED, "round_bits": 4}))
    assert not exact["b.weight"].isfinite().any(0).all()
    assert not found["b.weight"].isfinite().all()
    assert all(
        exact[n].isfinite().all() or not found[n].isfinite().all() for n in exact if n != "a.bias" or kind != "gelu"
    )


def test_float64_stays_exact():
    model, batch = Transformer().double(), transformer_batch()
    batch = batch[0].double(), batch[1]
    backend = Backend(**{**ROUNDED, "round_bits": 2})
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    with pytest.warns(WtacrsWarning, match="float64 takes part with round_float64=True only"):
        found = compiled_gradients(model, batch, backend)
    assert all(torch.equal(found[n], exact[n]) for n in exact)


@pytest.mark.parametrize(
    "options", [{"round_bits": 8}, {"round_bits": 4, "row_bits": 4}, {"round_bits": 2, "ratio": 0.3}]
)
def test_an_empty_batch(options):
    """Nothing to round, which a warning says, and gradients of zero."""
    model = Unit("layer_norm")
    torch._dynamo.reset()
    backend = Backend(**{**ROUNDED, **options})
    with pytest.warns(WtacrsWarning, match="nothing is (rounded|sampled) in this graph"):
        torch.compile(model, backend=backend)(torch.randn(0, 128)).nansum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert backend.ledger.compressed == ()

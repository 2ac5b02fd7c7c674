"""Bits by pattern, and float64 where it is asked for."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wtacrs_fx import Backend, Config, WtacrsWarning, measure

from helpers import Moments, Recorder, Transformer, gradients, transformer_batch

ROUNDED = {"ratio": 1.0, "min_bytes": 0, "min_rows": 1, "memory_budget": None, "inner": "eager"}


def compiled_gradients(model: nn.Module, batch: tuple, backend) -> dict[str, Tensor]:
    torch._dynamo.reset()
    return gradients(model, *batch, call=torch.compile(model, backend=backend))


def largest_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative squared error of the worst parameter."""
    return max(measure.relative_error(found, {n: g}) for n, g in exact.items())


class Two(nn.Module):
    """Both layers read one tensor, the output of gelu; their own outputs are read by fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.left, self.right = nn.Linear(128, 128), nn.Linear(128, 32), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        return (self.left(h).sin() + self.right(h).cos()).mean()


def bits_by_reader(recorder: Recorder) -> dict[str, set[int]]:
    """Op that reads rounded tensors -> their bits."""
    found: dict[str, set[int]] = {}
    for line in recorder.ledger.compressed:
        for reader in line.readers:
            found.setdefault(reader, set()).add(line.bits)
    return found


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"left": 2, "*": 8}, 8),  # (one tensor, two readers: the more careful of the two)
        ({"*": 2, "left": 8}, 2),  # (the first pattern that matches)
        ({"left": 4, "right": 2}, 4),
        ({"left": 4}, 4),
        ({"left": 4, "*": None}, 4),
    ],
)
def test_the_most_bits_of_all_readers(patterns, expected):
    """The layers' shared input has the most that one of them asks for. A reader without bits reads the exact tensor, and then
    nothing is saved by rounding it."""
    torch.manual_seed(0)
    recorder = Recorder(**{**ROUNDED, "round_bits": patterns})
    model, x = Two(), torch.randn(64, 128)
    exact = compiled_gradients(model, (x,), "aot_eager_decomp_partition")
    if patterns.get("*", patterns.get("right")) is None:
        with pytest.warns(WtacrsWarning, match=r"round_bits=\{'left': 4.*\}: nothing is rounded"):
            found = compiled_gradients(model, (x,), recorder)
        assert all(torch.equal(found[n], exact[n]) for n in exact)
        assert not recorder.ledger.rounded
        return
    found = compiled_gradients(model, (x,), recorder)
    assert bits_by_reader(recorder)["mm"] == {expected}, recorder.ledger.table()
    assert 0 < largest_error(found, exact) < {8: 1e-4, 4: 2e-2, 2: 0.5}[expected]


def test_layers_of_their_own():
    """The first layer's feed-forward in 2 bits, all else of it in 8, the second layer as it is: its gradients are exact."""
    torch.manual_seed(0)
    model, batch = Transformer(layers=2), transformer_batch()
    names = [n for n, _ in model.named_modules()]
    first, second = (next(n for n in names if n.endswith(f".{i}")) for i in range(2))
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    patterns = {f"{first}.down": 2, f"{first}*": 8}
    recorder = Recorder(**{**ROUNDED, "round_bits": patterns})
    found = compiled_gradients(model, batch, recorder)
    assert {c.bits for c in recorder.ledger.compressed if c.bits > 1} == {2, 8}
    changed = {n for n in exact if not torch.equal(found[n], exact[n])}
    assert changed
    assert not [n for n in changed if n.startswith(second)]
    errors = {
        n: measure.relative_error(found, {n: exact[n]}) for n in exact if n.endswith(("down.weight", "up.weight"))
    }
    of_down, of_up = errors[f"{first}.down.weight"], errors[f"{first}.up.weight"]
    assert of_down > 1e-2 > 1e-3 > of_up > 0, errors  # 2 bits, 8 bits


def test_rows_or_bits_layer_by_layer():
    """Where a layer has no bits, its rows are kept."""
    torch.manual_seed(0)
    model, batch = Transformer(layers=1), transformer_batch()
    recorder = Recorder(**{**ROUNDED, "ratio": 0.3, "late": "sample", "round_bits": {"*.down": 4}})
    compiled_gradients(model, batch, recorder)
    decisions = {e.module.rpartition(".")[2]: e.decision for e in recorder.ledger.entries}
    assert decisions["down"] == "late", decisions
    assert "early" in {d for name, d in decisions.items() if name != "down"}, decisions


def test_float64_where_asked_for():
    """Mean by z-scores, bytes that autograd holds, forward to the bit; gradients of float64 are what they were without it."""
    torch.manual_seed(0)
    model, batch = Transformer(layers=1).double(), transformer_batch()
    batch = batch[0].double(), batch[1]
    exact = compiled_gradients(model, batch, "aot_eager_decomp_partition")
    expected = torch.compile(model, backend="aot_eager_decomp_partition")(*batch)
    recorder = Recorder(**{**ROUNDED, "round_bits": 4, "round_float64": True, "seed": 1})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder)
    with measure.held(model) as held:
        loss = compiled(*batch)
    assert torch.equal(loss, expected)
    assert held.bytes == recorder.ledger.saved_bytes < 0.35 * recorder.ledger.saved_bytes_exact
    assert {c.dtype for c in recorder.ledger.compressed if c.bits > 1} == {"float64"}
    moments = Moments()
    for _ in range(30):
        found = gradients(model, *batch, call=compiled)
        assert all(g.dtype is torch.float64 for g in found.values())
        moments.add(found)
    for name, value in exact.items():
        if moments.standard_error(name).max() > 1e-6 * value.abs().max():
            rms = float(moments.z(name, value).square().mean().sqrt())
            assert 0 < rms < 1.5, f"{name}: z rms {rms:.2f}"
    assert 1e-4 < measure.relative_error(found, exact) < 0.1


def test_a_loss_in_float64_leaves_the_rest_rounded():
    """A float32 model whose last steps are float64: what is float32 is rounded, by default too; what is float64 is not."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.b(F.gelu(self.a(x))).double()).mean()

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(64, 128)
    kinds = {}
    for asked in (False, True):
        recorder = Recorder(**{**ROUNDED, "round_bits": 8, "round_float64": asked})
        compiled_gradients(model, (x,), recorder)
        kinds[asked] = {c.dtype for c in recorder.ledger.compressed}
    assert kinds == {False: {"float32"}, True: {"float32", "float64"}}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (3, ValueError, "round_bits=3: expected None or one of 8, 4, 2"),
        (True, TypeError, "round_bits=True: expected"),
        (8.0, TypeError, "round_bits=8.0: expected"),
        ("8", TypeError, "round_bits='8': expected"),
        ({}, TypeError, "or a dict of them by pattern"),
        ({3: 8}, TypeError, "or a dict of them by pattern"),
        ({"*.up": 3}, ValueError, r"round_bits\['\*.up'\]=3: expected None or one of 8, 4, 2"),
        ({"*.up": "4"}, TypeError, r"round_bits\['\*.up'\]='4': expected"),
    ],
)
def test_bad_bits(value, error, words):
    with pytest.raises(error, match=words):
        Config(round_bits=value)


def test_the_order_of_patterns_is_in_the_cache_key():
    a, b = Config(round_bits={"x.*": 4, "*": 8}), Config(round_bits={"*": 8, "x.*": 4})
    assert a.fingerprint() != b.fingerprint()
    assert Config(round_bits={"*": None}).fingerprint() == Config().fingerprint()
    with pytest.raises(TypeError, match="round_float64=1"):
        Backend(round_float64=1)

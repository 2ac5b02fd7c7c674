"""Kept rows in few bits: the mean of the gradient with every estimator, bytes as predicted, and where rows stay as they are."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import wtacrs_fx
from wtacrs_fx import Backend, Config, Ledger, WtacrsWarning, measure
from wtacrs_fx.passes.bits import rows_or_bits
from wtacrs_fx.passes.invariants import check_partition
from wtacrs_fx.passes.policy import Action, Decision
from wtacrs_fx.rounding import Format

from helpers import SMALL, Moments, Recorder, Transformer, calls, gradients, transformer_batch

wtacrs = torch.ops.wtacrs
EARLY = {**SMALL, "late": "exact", "inner": "eager", "exclude": ()}


class Layers(nn.Module):
    """Two layers with an input each that only their weight gradients need; the gradients of their outputs are known."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(width, width) / width**0.5)
        self.a, self.b = nn.Linear(width, 32, bias=False), nn.Linear(width, 16, bias=False)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        y = x @ self.mix
        return (self.a(y) * g).sum() + (self.b(y) * g[:, :16]).sum()


def layers(
    width: int = 256, rows: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    return Layers(width).to(dtype), (x.to(dtype), torch.randn(rows, 32, generator=generator).to(dtype))


def run(model: nn.Module, batch: tuple, **options) -> tuple[dict[str, Tensor], Recorder]:
    torch._dynamo.reset()
    torch.manual_seed(1)  # (of the draws)
    recorder = Recorder(**{**EARLY, "ratio": 0.5, **options})
    return gradients(model, *batch, call=torch.compile(model, backend=recorder)), recorder


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
def test_the_mean_is_exact(estimator, bits):
    """z-scores of 200 draws, with rows as they are and rounded."""
    model, batch = layers()
    exact = gradients(model, *batch)
    for row_bits in (None, bits):
        torch._dynamo.reset()
        backend = Backend(**{**EARLY, "ratio": 0.5, "estimator": estimator, "row_bits": row_bits, "seed": 1})
        compiled, moments = torch.compile(model, backend=backend), Moments()
        for _ in range(200):
            moments.add(gradients(model, *batch, call=compiled))
        for name, value in exact.items():
            # 64 rows, and z-scores of as many independent numbers: their mean square is 1 with a standard error of 0.18.
            assert float(moments.z(name, value).square().mean()) < 1 + 4.5 * 0.18, name
        assert {e.bits for e in backend.ledger.entries} == {row_bits}


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_alone(bits):
    """At a ratio that keeps all 64 rows nothing but rounding is left: a grid of 2^bits - 1 steps between the extremes of 128
    normal numbers, 5.2 standard deviations apart, has an error of (5.2 / (2^bits - 1))^2 / 6 (/ 12 at 4 bits)."""
    model, batch = layers()
    found, recorder = run(model, batch, ratio=0.99, row_bits=bits)
    assert recorder.ledger.entries[0].kept == 64
    expected = (5.2 / (2**bits - 1)) ** 2 / (6 if bits == 8 else 12)
    assert 0.7 * expected < measure.relative_error(found, gradients(model, *batch)) < 1.4 * expected


@pytest.mark.parametrize("bits", [8, 4])
def test_all_rows(bits):
    """With ratio=1 no row is left out: the tensor is rounded for both layers, without a draw of rows, and without bias."""
    model, batch = layers()
    exact = gradients(model, *batch)
    found, recorder = run(model, batch, ratio=1.0, row_bits=bits)
    (tensor,) = (c for c in recorder.ledger.compressed if c.bits > 1)
    assert tensor.bits == bits
    assert [e.reason for e in recorder.ledger.entries] == [f"input kept in {bits} bits"] * 2
    assert not calls(recorder.forward[0], wtacrs.select_rows.default)
    backward = recorder.backward[0].graph.find_nodes(op="placeholder")
    assert not any(n.meta["val"].shape == (64, 256) and n.meta["val"].dtype is torch.float32 for n in backward)
    width = 5.2 if bits == 8 else 4.7  # (of 128 and 64 normal numbers)
    expected = (width / (2**bits - 1)) ** 2 / (6 if bits == 8 else 12)
    assert 0.7 * expected < measure.relative_error(found, exact) < 1.4 * expected
    torch._dynamo.reset()
    call, moments = (
        torch.compile(model, backend=Backend(**{**EARLY, "ratio": 1.0, "row_bits": bits, "seed": 1})),
        Moments(),
    )
    for _ in range(200):
        moments.add(gradients(model, *batch, call=call))
    assert max(float(moments.z(name, x).abs().max()) for name, x in exact.items()) < 5


@pytest.mark.parametrize(
    ("options", "modules", "warned"),
    [
        ({}, {"a", "b"}, False),
        ({"exclude": ("a",)}, set(), True),
        ({"exclude": ("*",)}, set(), True),
        ({"min_rows": 65}, set(), True),
        ({"ratio": {"a": 1.0, "b": 1.0}}, set(), False),
    ],
    ids=["all", "one excluded", "all excluded", "few rows", "exact by pattern"],
)
def test_whose_rows_are_all_kept_in_few_bits(options, modules, warned):
    """Two layers that read one tensor: it is held in few bits only if both do without it."""
    model, batch = layers()
    with pytest.warns(WtacrsWarning, match="row_bits=4: nothing is rounded.*min_rows") if warned else nullcontext():
        found, recorder = run(model, batch, **{"ratio": 1.0, "row_bits": 4, **options})
    reading = {e.module for e in recorder.ledger.entries if e.reason.startswith("input kept in")}
    assert reading == modules
    if not reading:
        exact = gradients(model, *batch)
        assert all(torch.equal(found[n], x) for n, x in exact.items())


def test_bits_of_rows_are_those_asked_for():
    """Also of what is normalised: the products of the normalisation's backward, which would want more, read it as it is."""
    _, recorder = run(Transformer(), transformer_batch(), ratio=1.0, row_bits=4)
    bits = {e.module: e.reason for e in recorder.ledger.entries if e.reason.startswith("input kept in")}
    assert all(("8 bits" in reason) == module.endswith(".o") for module, reason in bits.items()), (
        bits
    )  # (o: attention's result)
    assert len(bits) == 13


def test_all_rows_of_a_convolution():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten(0), nn.Linear(8192, 1)
    )
    _, recorder = run(model, (torch.randn(8, 16, 8, 8),), ratio=1.0, row_bits=4)
    assert [e.reason for e in recorder.ledger.entries if e.module == "2"] == ["input kept in 4 bits"]


def test_a_budget_that_needs_no_bits():
    """Says so: nothing is rounded although that was asked for."""
    model, batch = layers()
    with pytest.warns(WtacrsWarning, match="row_bits=4 with ratio=1: nothing is rounded.*memory_budget=1.0"):
        run(model, batch, ratio=1.0, row_bits=4, memory_budget=1.0)


def test_rows_in_other_bits_than_the_rest():
    """``row_bits`` for what weight gradients alone need, ``round_bits`` for what is read otherwise."""

    class Summed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    model = Summed(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    _, recorder = run(model, (torch.randn(128, 64),), ratio=1.0, row_bits=4, round_bits=8)
    bits = {c.tensor: c.bits for c in recorder.ledger.compressed if c.bits > 1}
    assert sorted(bits.values()) == [4, 4, 8, 8], bits


@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 4), (4, 1 / 8)])
def test_ledger_and_graphs(bits, share):
    """One draw for two layers; codes, scales, row index, and at 4 bits random numbers, are all that is held; the rows are
    computed in the backward."""
    model, batch = layers()
    _, recorder = run(model, batch, row_bits=bits)
    first, second = recorder.ledger.entries
    kept = 32
    assert (first.decision, first.kept, first.bits, first.bytes_now) == (
        "early",
        kept,
        bits,
        int(kept * 256 * 4 * share) + kept * 2 * 4 + kept * 8 + (4 * (kept + 256) if bits == 4 else 0),
    )
    assert second.bytes_now == 0
    assert f"{kept}/64 in {bits} bits" in recorder.ledger.table()
    assert f"in {bits} bits" in recorder.ledger.table("tensor")
    assert calls(recorder.forward[0], wtacrs.short_uniform.default) == 1
    assert calls(recorder.backward[0], wtacrs.short_uniform.default) == 0
    assert Ledger.from_dict(recorder.ledger.to_dict()) == recorder.ledger


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bytes_are_those_held(inner):
    torch._dynamo.reset()
    small = inner == "inductor"
    model, batch = layers() if small else (Transformer(width=128, dropout=0.1), transformer_batch(width=128))
    backend = Backend(**{**EARLY, "ratio": 0.3, "row_bits": 4, "inner": inner})
    compiled = torch.compile(model, backend=backend)
    with measure.held(model) as held:
        loss = compiled(*batch)
    loss.backward()
    assert held.bytes == backend.ledger.saved_bytes
    assert {e.bits for e in backend.ledger.entries if e.decision == "early"} == {4}
    if small:  # the compiled kernels agree about what the codes mean
        exact, moments = gradients(model, *batch), Moments()
        for _ in range(200):
            moments.add(gradients(model, *batch, call=compiled))
        for name, value in exact.items():
            assert float(moments.z(name, value).square().mean()) < 1 + 4.5 * 0.18, name


def test_the_mean_of_a_transformer_with_late_sites_attention_and_rounded_tensors():
    torch.manual_seed(0)
    model, batch = Transformer(width=128), transformer_batch(width=128)
    exact = gradients(model, *batch)
    options = {**SMALL, "inner": "eager", "ratio": 0.5, "row_bits": 8, "round_bits": 8, "attention": True}
    backend = Backend(**{**options, "estimator": "systematic"})
    compiled, moments = torch.compile(model, backend=backend), Moments()
    for _ in range(60):
        moments.add(gradients(model, *batch, call=compiled))
    assert any(e.bits for e in backend.ledger.entries), backend.ledger.table()
    for name, value in exact.items():
        if value.abs().max() > 1e-7:
            assert float(moments.z(name, value).square().mean().sqrt()) < moments.largest_rms(name), name


@pytest.mark.parametrize(("form", "action"), [(None, Action.LATE), (Format(8), Action.LATE), (Format(4), Action.EARLY)])
def test_whole_inputs_in_few_bits_against_rows_in_few_bits(form, action):
    """All rows in 2 bits are more bytes than 0.3 of them in 4, and fewer than 0.3 of them in 8 or as they are."""
    site = SimpleNamespace(module="up", activation=SimpleNamespace(value=torch.empty(1)))
    plan = [Decision(site, Action.EARLY, k=3, form=form, ratio=0.3)]
    assert [d.action for d in rows_or_bits(plan, Config(ratio=0.3, round_bits=2))] == [action]
    assert [d.action for d in rows_or_bits(plan, Config(ratio=0.3, round_bits={"down": 2}))] == [Action.EARLY]


def test_odd_numbers_of_rows_come_out_even():
    model, batch = layers(rows=66)
    _, recorder = run(model, batch, row_bits=4)
    assert {e.kept for e in recorder.ledger.entries} == {34}
    model, batch = layers(rows=3)  # no fourth row to keep
    _, recorder = run(model, batch, ratio=0.99, row_bits=4)
    assert {e.kept for e in recorder.ledger.entries} == {3}


@pytest.mark.parametrize(("width", "bits"), [(100, 8), (8, 8), (1, None), (2, 8)])
def test_rows_shorter_than_a_group_are_one_group(width, bits):
    """As long as that takes fewer bytes; else they stay as they are."""
    model, batch = layers(width)
    found, recorder = run(model, batch, row_bits=8)
    entry = recorder.ledger.entries[0]
    assert entry.bits == bits
    assert entry.bytes_now == 32 * (8 + (4 * width if bits is None else width + 4))
    assert all(g.isfinite().all() for g in found.values())


def test_bfloat16_and_float64():
    model, batch = layers(dtype=torch.bfloat16)
    (plain, _), (found, recorder) = (run(model, batch, row_bits=bits) for bits in (None, 8))
    assert recorder.ledger.entries[0].bits == 8
    assert 0 < measure.relative_error(found, plain) < 1e-3
    model, batch = layers(dtype=torch.float64)
    (plain, _), (found, recorder) = (run(model, batch, row_bits=bits) for bits in (None, 8))
    assert recorder.ledger.entries[0].bits is None
    assert all(torch.equal(found[n], plain[n]) for n in plain)


@pytest.mark.parametrize("bits", [8, 4])
def test_symbolic_sizes(bits):
    """One graph for every number of rows; its mean is exact at one that the graph was not made with, an odd one."""
    torch._dynamo.reset()
    model, batch = layers()
    backend = Backend(**{**EARLY, "ratio": 0.5, "row_bits": bits, "seed": 1})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with measure.held(model) as held:
        compiled(*batch)
    assert held.bytes == backend.ledger.saved_bytes
    assert {(e.decision, e.bits) for e in backend.ledger.entries} == {("early", bits)}
    _, batch = layers(rows=41)
    exact, moments = gradients(model, *batch), Moments()
    for _ in range(200):
        moments.add(gradients(model, *batch, call=compiled))
    for name, value in exact.items():
        assert 0 < float(moments.z(name, value).square().mean()) < 1 + 4.5 * 0.23, name  # (41 independent numbers)
    assert len(backend.ledgers) == 1


def test_symbolic_sizes_keep_rows_that_are_no_whole_bytes():
    torch._dynamo.reset()
    model, batch = layers(width=129)
    backend = Backend(**{**EARLY, "ratio": 0.5, "row_bits": 4})
    gradients(model, *batch, call=torch.compile(model, backend=backend, dynamic=True))
    assert {(e.decision, e.bits) for e in backend.ledger.entries} == {("early", None)}


def test_a_budget_is_met_with_rounded_rows():
    torch._dynamo.reset()
    model, batch = Transformer(width=128, layers=3), transformer_batch(width=128)
    exact = gradients(model, *batch)
    backend = Backend(**{**EARLY, "late": "sample", "memory_budget": 0.6, "ratio": 0.9, "row_bits": 8})
    found = gradients(model, *batch, call=torch.compile(model, backend=backend))
    assert backend.ledger.predicted.peak <= 0.6 * backend.ledger.predicted_exact.peak
    assert measure.relative_error(found, exact) < 1


def test_joint_graphs_too():
    model, batch = layers()
    params = dict(model.named_parameters())

    def step(params, x, g):
        loss = torch.func.functional_call(model, params, (x, g))
        return loss, *torch.autograd.grad(loss, list(params.values()))

    joint = make_fx(step)(params, *batch)
    gm = wtacrs_fx.rewrite_joint(
        joint, ratio=0.5, row_bits=4, **{k: v for k, v in SMALL.items() if k != "memory_budget"}
    )
    exact, moments = gradients(model, *batch), Moments()
    for _ in range(100):
        moments.add(dict(zip(params, gm(params, *batch)[1:])))
    assert {e.bits for e in gm.meta["wtacrs_ledger"].entries} == {4}
    for name, value in exact.items():
        assert float(moments.z(name, value).square().mean()) < 1 + 4.5 * 0.18, name


def test_where_autograd_keeps_the_rows_it_is_refused():
    model, batch = layers()
    with pytest.raises(ValueError, match=r"row_bits=8: .*row_bits=None"):
        wtacrs_fx.rewrite(torch.fx.symbolic_trace(model), batch, row_bits=8, min_rows=1, min_bytes=0)
    with pytest.raises(ValueError, match="row_bits=8"):
        wtacrs_fx.swap_linears(model, row_bits=8)
    with pytest.raises(ValueError, match=r"row_bits=8 with ratio=1 and swap_linears\(\)"):
        wtacrs_fx.swap_linears(model, ratio=1.0, row_bits=8)
    with pytest.raises(ValueError, match=r"row_bits=8 with ratio=1 and rewrite\(\)"):
        wtacrs_fx.rewrite(torch.fx.symbolic_trace(model), batch, ratio=1.0, row_bits=8)
    assert type(model.a) is nn.Linear


def test_rows_computed_from_anything_but_their_codes_are_refused():
    torch._dynamo.reset()
    model, batch = layers()
    recorder = Recorder(**{**EARLY, "ratio": 0.5, "row_bits": 8})
    seen = []
    import wtacrs_fx.passes.work as work

    def spy(*args):
        seen.append(args)
        return check_partition(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "check_partition", spy)
        gradients(model, *batch, call=torch.compile(model, backend=recorder))
    forward, backward, plan, done, n = seen[0]
    (kept,) = done.draws.values()
    rows = next(m for m in backward.graph.nodes if m.name == kept.rows.name)
    other = next(p for p in backward.graph.find_nodes(op="placeholder") if p.name == kept.index.name)
    with backward.graph.inserting_before(rows):
        wrong = backward.graph.call_function(torch.ops.aten.mul.Tensor, (rows.args[0], other))
    rows.args = (wrong, *rows.args[1:])
    with pytest.raises(wtacrs_fx.errors.InvariantError, match="computed from"):
        check_partition(forward, backward, plan, done, n)

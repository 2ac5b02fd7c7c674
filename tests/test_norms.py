"""Norm sources: what they estimate, and that wrong estimates never bias."""

import copy
import gc
import json
import pickle
import warnings

import pytest
import torch
from test_backend import run
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import (
    Backend,
    NormSource,
    PositionNorms,
    Rows,
    SampleNorms,
    WtacrsWarning,
    norm_table,
    norms_of,
    sample_ids,
)
from wtacrs_fx.norm_table import HostTable
from wtacrs_fx.norms import FLOOR, floored

from helpers import SMALL, Moments, Transformer, gradients, transformer_batch

EARLY = {**SMALL, "late": "exact", "inner": "eager", "ratio": 0.3}
CPU = torch.device("cpu")


def rows(count: int, length: int, ids: tuple[int, ...] | None = None, mask: Tensor | None = None) -> Rows:
    return Rows(count, length, CPU, ids, mask)


class Heads(Transformer):
    """Only the first half of the positions is pooled, so that in the last block the others have no gradient but attention's."""

    def forward(self, x, target):
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.classifier(x[:, :8].mean(1)), target)


class Truth(NormSource):
    """Keeps what it is told, and knows nothing in the forward."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def read(self, site, rows):
        return None

    def record(self, site, rows, norms):
        self.seen[site] = norms


class Adversary(NormSource):
    """As wrong as can be: huge, zero, negative and undefined norms, the rows with gradients lowest."""

    def read(self, site, rows):
        n = torch.zeros(rows.count)
        n[::7], n[1::7], n[2::7] = float("nan"), -3.0, float("inf")
        n[:: rows.count // 2] = 1e20
        return n

    def record(self, site, rows, norms):
        assert norms.shape == (rows.count,)


def test_records_are_the_true_norms():
    source, model, batch = Truth(), Heads(), transformer_batch()
    compiled = torch.compile(model, backend=Backend(norms=source, **EARLY))
    gradients(model, *batch, call=compiled)
    truth = {}

    def keep(name):
        return lambda module, grad_in, grad_out: truth.__setitem__(name, grad_out[0].flatten(0, -2).norm(dim=1))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            module.register_full_backward_hook(keep(name))
    model(*batch).backward()
    found = {site.partition(":")[0]: norms for site, norms in source.seen.items()}
    assert found.keys() == truth.keys()
    assert "blocks.0.up:64x256" in source.seen
    for name, norms in truth.items():
        torch.testing.assert_close(found[name], norms)


@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
def test_adversarial_norms_do_not_bias(estimator):
    model, batch = Heads(layers=1), transformer_batch()
    exact = gradients(model, *batch)
    backend = Backend(norms=Adversary(), **{**EARLY, "estimator": estimator, "ratio": 0.5})
    compiled = torch.compile(model, backend=backend)
    moments = Moments()
    for _ in range(250):
        moments.add(gradients(model, *batch, call=compiled))
    assert all("norms: own" in e.reason for e in backend.ledger.entries if e.decision == "early")
    for name in (f"{e.module}.weight" for e in backend.ledger.entries if e.decision == "early"):
        z = moments.z(name, exact[name])
        assert moments.standard_error(name).max() > 0
        assert z.square().mean().sqrt() < 1.35, name


@pytest.mark.parametrize("kind", ["position", "sample"])
@pytest.mark.parametrize(
    ("estimator", "bits"),
    [
        *(("systematic", bits) for bits in (None, 8, 4)),
        *((estimator, None) for estimator in ("crs", "wta_crs")),
        *(pytest.param(e, bits, marks=pytest.mark.long) for e in ("crs", "wta_crs") for bits in (8, 4)),
    ],
)
def test_known_norms_do_not_bias(kind, estimator, bits):
    """Of kept rows as they are, and of rounded ones."""
    torch._dynamo.reset()
    model, batch = Heads(layers=1), transformer_batch()
    exact = gradients(model, *batch)
    backend = Backend(norms=kind, **{**EARLY, "estimator": estimator, "ratio": 0.5, "row_bits": bits})
    compiled = torch.compile(model, backend=backend)
    moments = Moments()
    with sample_ids(range(8)):
        for _ in range(150):
            moments.add(gradients(model, *batch, call=compiled))
    early = [e for e in backend.ledger.entries if e.decision == "early"]
    assert {e.bits for e in early} == {bits}
    for name in (f"{e.module}.weight" for e in early):
        assert moments.z(name, exact[name]).square().mean().sqrt() < 1.35, name


@pytest.mark.parametrize("kind", ["position", "sample"])
def test_knowing_the_norms_lowers_the_noise(kind):
    model, batch = Heads(), transformer_batch()
    exact = gradients(model, *batch)

    def error(**options) -> float:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=Backend(**{**EARLY, "estimator": "systematic"}, **options))
        errors = []
        with sample_ids(range(8)):
            for _ in range(24):
                found = gradients(model, *batch, call=compiled)
                errors.append(sum(float((found[n] - g).square().sum() / g.square().sum()) for n, g in last.items()))
        return sum(errors[4:])

    last = {
        n: g for n, g in exact.items() if n.startswith("blocks.1.") and g.dim() == 2 and n.split(".")[2] in "o up down"
    }
    assert len(last) == 3
    # In the last block half of the positions have no gradient at all in o, up and down.
    assert error(norms=kind) < 0.35 * error()


def test_position_is_a_running_mean():
    source = PositionNorms(rate=0.25)
    assert source.read("a", rows(6, 3)) is None
    source.record("a", rows(6, 3), torch.tensor([1.0, 2.0, 0.0, 3.0, 2.0, 0.0]))
    expected = torch.tensor([5.0, 4.0, 0.0])
    torch.testing.assert_close(source.read("a", rows(9, 3)), expected.sqrt().repeat(3))
    source.record("a", rows(3, 3), torch.tensor([1.0, float("inf"), 2.0]))
    torch.testing.assert_close(
        source.mean["a"], torch.tensor([3.0, 4.0, 2.0]), msg="the second batch counts as the first"
    )
    for _ in range(3):
        source.record("a", rows(3, 3), torch.zeros(3))
    torch.testing.assert_close(source.mean["a"][0], torch.tensor(3.0 * 2 / 3 * 0.75 * 0.75))
    longer = source.read("a", rows(5, 5))
    torch.testing.assert_close(
        longer[3:].square(), source.mean["a"][:3].mean().expand(2), msg="not seen: the others' mean"
    )
    source.record("a", rows(5, 5), torch.ones(5))
    assert source.mean["a"].shape == (5,)


def test_position_leaves_padding_out():
    source = PositionNorms()
    source.record("a", rows(4, 2, mask=torch.tensor([True, True, True, False])), torch.tensor([1.0, 2.0, 1.0, 0.0]))
    torch.testing.assert_close(source.mean["a"], torch.tensor([1.0, 4.0]))


def test_sample_remembers_examples_and_falls_back():
    source = SampleNorms(examples=10)
    source.begin(["a"], (7, 2))
    source.read("a", rows(6, 3, (7, 2)))
    source.record("a", rows(6, 3, (7, 2)), torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, float("nan")]))
    found = source.read("a", rows(8, 4, (2, 1))).view(2, 4)
    torch.testing.assert_close(found[0, :2], torch.tensor([5.0, 4.0]))
    usual = source.position.read("a", rows(4, 4))
    torch.testing.assert_close(found[0, 2:], usual[2:], msg="a token not seen")
    torch.testing.assert_close(found[1], usual, msg="an example not seen")
    assert source.tables["a"].data.dtype == torch.bfloat16
    assert source.bytes == 10 * 3 * 2
    torch.testing.assert_close(source.read("a", rows(6, 3)), usual[:3].repeat(2), msg="no ids")
    source.resize(4)
    assert source.bytes == 4 * 3 * 2
    torch.testing.assert_close(source.read("a", rows(3, 3, (2,)))[:2], torch.tensor([5.0, 4.0]))
    with pytest.raises(ValueError, match=r"\[7\] out of range for 4 examples"):
        source.begin(["a"], (7,))


class Copy:
    """Stands for the event at the end of a copy from a device."""

    def __init__(self) -> None:
        self.done, self.waits = False, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done, self.waits = True, self.waits + 1


def test_only_a_read_of_the_same_examples_waits_for_a_copy():
    copies = [Copy() for _ in range(3)]
    table = HostTable(torch.full((4, 2), -1.0, dtype=torch.bfloat16), CPU)
    table.waiting = [(c, (i,), torch.full((1, 2), 1.0 + i, dtype=torch.bfloat16)) for i, c in enumerate(copies)]
    assert table.read(rows(2, 2, (3,)), 2).tolist() == [[-1, -1]]
    assert len(table.waiting) == 3
    copies[0].done = True
    table.read(rows(2, 2, (3,)), 2)
    assert [c.waits for c in copies] == [0, 0, 0]
    assert len(table.waiting) == 2, "what has arrived is taken in"
    assert table.read(rows(2, 2, (1,)), 2).tolist() == [[2, 2]]
    assert [c.waits for c in copies] == [0, 1, 0]
    assert table.snapshot()[:, 0].tolist() == [1, 2, 3, -1]
    assert [c.waits for c in copies] == [0, 1, 1]


def test_sample_grows_without_a_number():
    source = SampleNorms()
    for ids in ((3,), (1,), (40,)):
        source.begin(["a"], ids)
        source.read("a", rows(2, 2, ids))
        source.record("a", rows(2, 2, ids), torch.full((2,), float(ids[0])))
    assert [float(source.read("a", rows(2, 2, (i,)))[0]) for i in (3, 1, 40)] == [3, 1, 40]


def test_a_cache_larger_than_memory_is_refused_before_it_is_made():
    model, batch = Transformer(), transformer_batch()
    source = SampleNorms(examples=10**6, host_memory="100MB")
    compiled = torch.compile(model, backend=Backend(norms=source, **EARLY))
    with (
        sample_ids(range(8)),
        pytest.raises(MemoryError, match=r"12 sites \(of 16 tokens here\) takes 366.2 MiB \(384000000 B\)"),
    ):
        compiled(*batch)
    assert source.bytes == 0


def test_a_batch_that_is_refused_leaves_the_cache_as_it_was():
    """One wrong id asks for a table of all examples below it; the batch after it does not."""
    source = SampleNorms(host_memory="1MB")
    for ids in ((3,), (10**9,), (5,)):
        source.begin(["a"], ids)
        if ids == (10**9,):
            with pytest.raises(MemoryError, match="the cache of 1000000001 examples at 1 sites"):
                source.read("a", rows(2, 2, ids))
            continue
        source.read("a", rows(2, 2, ids))
        source.record("a", rows(2, 2, ids), torch.full((2,), float(ids[0])))
    assert source.size < 10
    assert [float(source.read("a", rows(2, 2, (i,)))[0]) for i in (3, 5)] == [3, 5]


def test_resizing_beyond_memory_is_refused_before_it_is_done():
    source = SampleNorms(examples=4, host_memory="1MB")
    source.begin(["a"], (3,))
    source.read("a", rows(2, 2, (3,)))
    source.record("a", rows(2, 2, (3,)), torch.ones(2))
    with pytest.raises(MemoryError, match=r"10000000 examples at 1 sites \(of 2 tokens here\) takes 38.1 MiB"):
        source.resize(10**7)
    assert source.size == 4
    source.resize(8)
    assert source.tables["a"].examples == 8


def test_resizing_between_forward_and_backward():
    """A batch of examples that are gone by its backward leaves the cache as it is."""
    source = SampleNorms(examples=8)
    for ids in ((1, 7), (2, 3)):
        source.begin(["a"], ids)
        source.read("a", rows(4, 2, ids))
        source.resize(4)
        source.record("a", rows(4, 2, ids), torch.full((4,), float(ids[0])))
        source.resize(8)
    assert float(source.read("a", rows(2, 2, (2,)))[0]) == 2
    assert source.tables["a"].snapshot()[:, 0].tolist() == [-1, -1, 2, 2, -1, -1, -1, -1]


def test_a_model_made_again_for_a_checkpoint_has_the_name_of_the_one_that_is_gone():
    source, batch = SampleNorms(examples=8), transformer_batch()

    def train(model):
        torch._dynamo.reset()
        with sample_ids(range(8)):
            torch.compile(model, backend=Backend(norms=source, **EARLY))(*batch).backward()

    train(model := Transformer(layers=1))
    state, sites = source.state_dict(), {*source.tables}
    del model
    gc.collect()
    source.load_state_dict(state)
    train(Transformer(layers=1))
    assert {*source.tables} == sites


class Wrapped(nn.Module):
    """Names its modules as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args)


@pytest.mark.parametrize("kind", ["position", "sample"])
@pytest.mark.parametrize("back", [False, True], ids=["into several processes", "out of several processes"])
def test_checkpoints_go_between_one_process_and_several(kind, back):
    batch = transformer_batch()

    def trained(model, backend) -> Backend:
        torch._dynamo.reset()
        with sample_ids(range(8)):
            torch.compile(model, backend=backend)(*batch).backward()
        return backend

    torch.manual_seed(0)
    models = Transformer(layers=1), Wrapped(Transformer(layers=1))
    first, second = reversed(models) if back else models
    one = trained(first, Backend(norms=kind, **EARLY))
    other = Backend(norms=kind, **EARLY)
    other.norms.load_state_dict(one.norms.state_dict())
    trained(second, other)
    names = "blocks.0.up:64x256", "module.blocks.0.up:64x256"
    before, after = reversed(names) if back else names
    learned = "mean" if kind == "position" else "tables"
    assert before in getattr(one.norms, learned)
    assert set(getattr(other.norms, learned)) == {
        n.removeprefix("module.") if back else f"module.{n}" for n in getattr(one.norms, learned)
    }
    position = other.norms if kind == "position" else other.norms.position
    assert float(position.seen[after].max()) == 2


def test_a_checkpoint_without_ids_of_another_model_is_refused():
    source, batch = SampleNorms(), transformer_batch()
    with pytest.warns(WtacrsWarning, match="was not told its sample ids"):
        torch.compile(Transformer(layers=1), backend=Backend(norms=source, **EARLY))(*batch).backward()
    other = SampleNorms()
    other.load_state_dict(source.state_dict())
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with pytest.raises(Exception, match="are those of another model"), sample_ids(range(8)):
        torch.compile(net, backend=Backend(norms=other, **EARLY))(batch[0])


def test_several_forwards_before_their_backwards():
    """Each backward records under the ids and the mask of its own forward."""
    source, model = SampleNorms(examples=32), Transformer(layers=1)
    first, second = transformer_batch(), transformer_batch(seed=5)
    compiled = torch.compile(model, backend=Backend(norms=source, **EARLY))

    def norms(batch, ids):
        other = SampleNorms(examples=32)
        torch._dynamo.reset()
        with sample_ids(ids):
            torch.compile(model, backend=Backend(norms=other, **EARLY))(*batch).backward()
        return {site: t.data[list(ids)] for site, t in other.tables.items()}

    sample_ids(range(8))
    a = compiled(*first)
    sample_ids(range(20, 28))
    b = compiled(*second)
    b.backward()
    a.backward()
    for batch, ids in ((first, range(8)), (second, range(20, 28))):
        for site, expected in norms(batch, ids).items():
            torch.testing.assert_close(source.tables[site].data[list(ids)], expected)
    table = next(iter(source.tables.values())).data
    assert (table[8:20] == -1).all()
    assert (table[28:] == -1).all()


def test_ids_of_a_call_hold_once():
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(norms="sample", **EARLY)
    compiled = torch.compile(model, backend=backend)
    sample_ids(range(8))
    compiled(*batch).backward()
    with pytest.warns(WtacrsWarning, match="was not told its sample ids"):
        compiled(*batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*batch).backward()  # (said once)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 2, 1], ValueError, r"\[1\] repeated"),
        ([1, -2], ValueError, r"\[-2\] out of range"),
        ([], ValueError, "no ids"),
        ([0.5], TypeError, "0.5 is no integer"),
        (torch.ones(2), TypeError, "torch.float32"),
        (7, TypeError, "expected a sequence"),
    ],
)
def test_bad_ids(ids, error, message):
    with pytest.raises(error, match=message):
        sample_ids(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (range(5), "5 ids, and no input of the model has 5 examples .first dimensions: 8"),
        (range(93, 101), r"\[100\] out of range"),
    ],
)
def test_bad_ids_are_refused_before_the_step(ids, message):
    model, batch = Transformer(layers=1), transformer_batch()
    compiled = torch.compile(model, backend=Backend(norms=SampleNorms(examples=100), **EARLY))
    with sample_ids(ids), pytest.raises(ValueError, match=message):
        compiled(*batch)


@pytest.mark.parametrize("kind", ["position", "sample"])
def test_checkpoints(kind, tmp_path):
    model, batch = Heads(), transformer_batch()

    def trained(model, batch, backend):
        torch._dynamo.reset()
        with sample_ids(range(8)):
            torch.compile(model, backend=backend)(*batch).backward()
        return backend

    first = trained(model, batch, Backend(norms=kind, **EARLY))
    torch.save(first.norms.state_dict(), tmp_path / "norms.pt")
    state = torch.load(tmp_path / "norms.pt", weights_only=True)
    second = Backend(norms=kind, **EARLY)
    second.norms.load_state_dict(state)
    where = rows(128, 16, tuple(range(8)))
    for site in ("blocks.1.up:64x256", "blocks.1.down:256x64"):
        expected = first.norms.read(site, where)
        assert expected.std() > 0
        torch.testing.assert_close(second.norms.read(site, where), expected)
    trained(model, batch, second)

    other = Backend(norms=kind, **EARLY)
    other.norms.load_state_dict(state)
    with pytest.raises(ValueError, match=r"another model: .* this graph's 6 sites, such as 'blocks.0.down:128x32'"):
        trained(Transformer(width=32, layers=1), transformer_batch(width=32), other)
    with pytest.raises(ValueError, match="norms='other' was given to"):
        other.norms.load_state_dict({**state, "kind": "other"})
    if kind == "sample":
        with pytest.raises(ValueError, match="of 8 examples, this cache is for 9"):
            SampleNorms(examples=9).load_state_dict(state)


def test_two_models_do_not_mix():
    """Neither with a Backend each, nor where one Backend, and one compiled graph, serves both."""
    models, batches = (Transformer(layers=1), Transformer(layers=1)), (transformer_batch(), transformer_batch(seed=3))
    shared = Backend(norms="sample", **EARLY)
    compiled = [torch.compile(m, backend=shared) for m in models]
    for call, batch in zip(compiled, batches):
        with sample_ids(range(8)):
            call(*batch).backward()
    one = []
    for model, batch in zip(models, batches):
        torch._dynamo.reset()
        own = Backend(norms="sample", **EARLY)
        with sample_ids(range(8)):
            torch.compile(model, backend=own)(*batch).backward()
        one.append(own.norms.tables)
        assert norms_of(model) is own.norms
    assert len(shared.norms.tables) == 12
    for site, table in one[0].items():
        torch.testing.assert_close(shared.norms.tables[site].data, table.data)
        torch.testing.assert_close(shared.norms.tables[f"{site}@1"].data, one[1][site].data)
        assert not torch.equal(table.data, one[1][site].data)


def test_by_name():
    """All graphs of a model compiled by the string share one source, also after a recompilation."""
    model = Transformer(layers=1)
    options = {**EARLY, "norms": "position"}
    compiled = torch.compile(model, backend="wtacrs", options=options, dynamic=False)
    with pytest.raises(ValueError, match="none is known for this model"):
        norms_of(model)
    compiled(*transformer_batch()).backward()
    source = norms_of(model)
    assert isinstance(source, PositionNorms)
    compiled(*transformer_batch(batch=4, length=24)).backward()
    assert norms_of(model) is source
    assert source.mean["blocks.0.q:64x64"].shape == (24,)


def test_dynamic_shapes():
    model, source = Transformer(layers=1), SampleNorms(examples=100)
    compiled = torch.compile(model, backend=Backend(norms=source, **EARLY), dynamic=True)
    for i, (batch, length) in enumerate(((8, 16), (4, 24), (6, 10))):
        with sample_ids(range(10 * i, 10 * i + batch)):
            compiled(*transformer_batch(batch=batch, length=length)).backward()
    data = source.tables["blocks.0.up:64x256"].data
    assert data.shape == (100, 24)
    assert ((data >= 0).sum(1)[[0, 7, 8, 10, 13, 14, 20, 25]]).tolist() == [16, 16, 0, 24, 24, 0, 10, 10]


def test_matrices_without_sequences():
    """An input [M, D] from the start: every row is a position; with ids, rows are the examples' in order."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    source = SampleNorms(examples=64)
    compiled = torch.compile(model, backend=Backend(norms=source, **EARLY))
    with sample_ids(range(64)):
        compiled(torch.randn(64, 16)).square().sum().backward()
    assert source.position.mean["0:16x16"].shape == (64,)
    assert source.tables["0:16x16"].data.shape == (64, 1)


def test_copies_and_pickles():
    model, batch, backend = Transformer(layers=1), transformer_batch(), Backend(norms="sample", **EARLY)
    with sample_ids(range(8)):
        torch.compile(model, backend=backend)(*batch).backward()
    for other in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert other.norms is not backend.norms
        before = {k: t.data.clone() for k, t in backend.norms.tables.items()}
        again = copy.deepcopy(model)
        torch._dynamo.reset()
        with sample_ids(range(8)):
            torch.compile(again, backend=other)(*transformer_batch(seed=7)).backward()
        assert other.norms.tables.keys() == before.keys()
        assert all(torch.equal(backend.norms.tables[k].data, before[k]) for k in before)
        assert not any(torch.equal(other.norms.tables[k].data, before[k]) for k in before)


def test_equal_layers_compiled_one_by_one():
    """They share a compiled graph, and their norms are told apart by their parameters."""
    model, backend = Heads(layers=3), Backend(norms="position", **EARLY)
    for block in model.blocks:
        block.compile(backend=backend)
    model(*transformer_batch()).backward()
    sites = [s for s in backend.norms.mean if s.startswith("down")]
    assert sorted(sites) == ["down:256x64", "down:256x64@1", "down:256x64@2"]
    whole = Backend(norms="position", **EARLY)
    torch._dynamo.reset()
    again = copy.deepcopy(Heads(layers=3))
    again.load_state_dict(model.state_dict())
    torch.compile(again, backend=whole)(*transformer_batch()).backward()
    expected = {f"{float(t.sum()):.4g}" for s, t in whole.norms.mean.items() if s.split(".")[2].startswith("down")}
    assert {f"{float(backend.norms.mean[s].sum()):.4g}" for s in sites} == expected
    assert len(expected) == 3


def test_with_a_memory_budget_and_the_checks():
    """Bytes as predicted, no bias, with the plan of the default budget and bits; late sites ask for nothing."""
    model, batch = Heads(), transformer_batch()
    options = {**EARLY, "late": "sample", "memory_budget": 0.9, "round_bits": 8}
    with sample_ids(range(8)):
        found = wtacrs_fx.check(model, batch, draws=8, norms="sample", **options)
    assert found.faults == [], found.table()
    kinds = {layer.decision for layer in found.layers}
    assert "late" in kinds, kinds


def test_report_of_a_model_with_norms():
    ledger = wtacrs_fx.report(Transformer(), transformer_batch(), norms="position", late="exact", **SMALL)
    assert "norms: position" in ledger.table("site")
    assert "shared with blocks.0.v; norms: position" in ledger.table("site")


def test_ops():
    token, norms = torch.zeros(1, dtype=torch.int64), torch.rand(6)
    mask, index = torch.ones(6, dtype=torch.bool), torch.arange(3)
    for op, args in (
        (torch.ops.wtacrs.known_importance.default, (token, norms, mask, "a", 3)),
        (torch.ops.wtacrs.known_importance.default, (token, norms, None, "a", 0)),
        (torch.ops.wtacrs.record_rows.default, (token, norms, mask, index, "a")),
        (
            torch.ops.wtacrs.measure_rows.default,
            (token, norms, norms, norms, torch.rand(3, 4), 0, torch.rand(5, 3), 1, index, "a", "a:4x5", 3, False),
        ),
    ):
        torch.library.opcheck(op, args)
    assert int(torch.ops.wtacrs.begin_rows("a", CPU)) == 0, "nobody is running"


def test_floored():
    n = floored(torch.tensor([0.0, 1.0, 3.0, float("nan"), -2.0, float("inf")]))
    torch.testing.assert_close(n, torch.tensor([FLOOR * 4 / 3, 1.0, 3.0, 4 / 3, 4 / 3, 4 / 3], dtype=torch.float64))
    assert floored(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("call", "entry"),
    [
        (lambda: wtacrs_fx.rewrite(torch.fx.symbolic_trace(nn.Linear(4, 4)), norms="position"), r"rewrite\(\)"),
        (lambda: wtacrs_fx.swap_linears(nn.Linear(4, 4), norms="sample"), r"swap_linears\(\)"),
        (lambda: wtacrs_fx.partitioner(norms="sample"), r"partitioner\(\)"),
    ],
)
def test_ways_in_without_state(call, entry):
    with pytest.raises(ValueError, match=rf"norms='\w+' with .*{entry}: .* belongs to a Backend"):
        call()


def test_bad_options():
    with pytest.raises(ValueError, match="Did you mean 'position'"):
        Backend(norms="positions")
    with pytest.raises(TypeError, match="derived from"):
        Backend(norms=3)
    with pytest.raises(ValueError, match="examples=0"):
        SampleNorms(examples=0)
    with pytest.raises(ValueError, match="rate=2"):
        PositionNorms(rate=2)


TRAIN = """
    import json, torch, wtacrs_fx
    from torch._dynamo.utils import counters
    from helpers import SMALL
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    backend = wtacrs_fx.Backend(norms=wtacrs_fx.SampleNorms(8), late="exact", ratio=0.9, padding="mask", **SMALL)
    x, mask = torch.randn(8, 32, 32), (torch.arange(32) < 24).expand(8, 32).long()

    @torch.compile(backend=backend)
    def step(x, mask):
        return (model(x) * mask[..., None]).square().sum()

    for _ in range(3):
        model.zero_grad()
        with wtacrs_fx.sample_ids(range(8)):
            step(x, mask).backward()
    tables = {k: t.data.double().sum().item() for k, t in backend.norms.tables.items()}
    found = model[2].weight.grad.clone()
    model.zero_grad()
    (model(x) * mask[..., None]).square().sum().backward()
    error = (found - model[2].weight.grad).abs().max() / found.abs().max()
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([hits, tables, error.item(), backend.padding]))
"""


def test_inductor_and_its_cache_in_a_second_process(tmp_path):
    cold, warm = (json.loads(run(TRAIN, tmp_path)) for _ in range(2))
    assert (cold[0], warm[0]) == (0, 1)
    assert len(cold[1]) == 2
    assert all(total > 0 for total in cold[1].values())
    assert cold[2] < 1e-5, "more rows are kept than are no padding: all of them"
    assert list(cold[3].values()) == ["zero", "zero"]
    assert warm[1:] == cold[1:]


@pytest.mark.parametrize(
    ("limit", "current", "cached", "free"),
    [
        ("1000000", 600000, 100000, 500000),
        ("1000000", 1200000, 0, 0),
        ("max", 600000, 0, 2048000),
        (None, 0, 0, 2048000),
    ],
    ids=["a container's", "above its limit", "none", "no container"],
)
def test_free_memory_is_the_containers(monkeypatch, tmp_path, limit, current, cached, free):
    """Of the machine (2000 kB here) and of the container, whichever is less."""
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:       2000 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\nfile {cached}\n")
    monkeypatch.setattr(norm_table, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(norm_table, "CGROUP", tmp_path)
    assert norm_table.available_bytes() == free


def test_free_memory_where_the_system_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(norm_table, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(norm_table, "CGROUP", tmp_path)
    assert norm_table.available_bytes() > 2**28

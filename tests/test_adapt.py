"""``noise`` and ratio="auto" as options: graphs that measure while they are trained, and are compiled once more."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import wtacrs_fx
from wtacrs_fx import Backend, Config, WtacrsWarning, calibrate
from wtacrs_fx.adapt import BACKWARDS, SETTLE
from wtacrs_fx.choose import differ
from wtacrs_fx.estimators import ESTIMATORS
from wtacrs_fx.measured import Measurement, sequence_sums
from wtacrs_fx.noise import batch_variance, sequence_squares, variance

from helpers import SMALL, Moments, gradients

EAGER = {**SMALL, "inner": "eager"}


class Net(nn.Module):
    """Two linear layers that share an input, and one behind them; rows' gradients point anywhere."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        return (out * torch.sin(1e4 * out.detach() + 1e4 * x)).mean()


def batch_of(sequences: int = 16, length: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Rows of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, length, width, generator=generator)
    return x * torch.rand(sequences, length, 1, generator=generator).pow(3)


def train(compiled, batches) -> None:
    for x in batches:
        compiled(x).backward()


@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
def test_the_batch_variance_is_measured_from_kept_rows(estimator, monkeypatch):
    """Its mean over many draws, by its standard error; and that of |G|^2."""
    monkeypatch.setattr("wtacrs_fx.measured.GRID", (0.3,))
    torch.manual_seed(0)
    sequences, length, k, draws = 6, 10, 24, 1500
    h = torch.randn(60, 5) + torch.randn(sequences, 5).repeat_interleave(length, 0)
    g = torch.randn(60, 4) * torch.rand(60, 1)
    importance, squared = h.norm(dim=1), g.square().sum(1)
    total = (g.T @ h).square().sum()
    expected = float(batch_variance(sequence_squares(h, g, sequences), total)), float(total)
    found = []
    for _ in range(draws):
        meter = Measurement(estimator)
        rows, scale = ESTIMATORS[estimator](importance, k, lambda stream, n: torch.rand(n, dtype=torch.float64))
        kept = h[rows] * scale[:, None]
        meter.record(("m",), "s", importance, importance, squared, kept, g[rows], rows, length, False)
        (draw,) = meter.draws()
        found.append([draw.batch_noise, draw.norm])
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std(0) / draws**0.5
    # With replacement, variance() leaves a term out, of at most |G|^2 / (k - |C|).
    slack = 0.0 if estimator == "systematic" else float(total) / 8
    for i in range(2):
        assert abs(float(values[:, i].mean()) - expected[i]) < 4 * float(error[i]) + slack + 0.02 * expected[i]
    squares = importance.square() * squared
    assert draw.curve == pytest.approx([float(variance(estimator, importance, squares, 18))])


def test_sequence_sums_in_chunks(monkeypatch):
    monkeypatch.setattr("wtacrs_fx.measured.CHUNK", 7)
    torch.manual_seed(0)
    h, g, sequence = torch.randn(30, 5), torch.randn(30, 4), torch.arange(30) // 10
    inside, total = sequence_sums(h, g, sequence)
    torch.testing.assert_close(inside, sequence_squares(h, g, 3).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(total.float(), (g.T @ h).square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("goal", [{"noise": 0.3}, {"ratio": "auto", "late": "exact"}])
def test_ratios_are_those_of_calibration(goal):
    """One compilation more; every layer within a step or two of what exact gradients of the same batches say."""
    torch.manual_seed(0)
    model, batches = Net(), [batch_of(seed=s) for s in range(BACKWARDS)]
    model.c.weight.data.mul_(8)
    exact = calibrate(model, batches, **({**goal, "ratio": 0.3} if "ratio" in goal else goal), **EAGER)
    backend = Backend(**goal, **EAGER)
    compiled = torch.compile(model, backend=backend)
    train(compiled, batches)
    assert len(backend.ledgers) == 1
    assert {e.kept for e in backend.ledger.entries} == {-(-3 * 512 // 10)}
    assert "noise is measured" in backend.ledger.table()
    train(compiled, batches)
    assert len(backend.ledgers) == 2
    (found,) = backend.calibrations
    assert found.ratios.keys() == exact.ratios.keys() == {"a", "b", "c"}
    assert not differ(found.ratios, exact.ratios, 0.5), (found.table(), exact.table())
    assert len(set(found.ratios.values())) > 1
    for entry in backend.ledger.entries:
        assert entry.kept == -(-round(found.ratios[entry.module] * 100) * 512 // 100)
    if "noise" in goal:
        assert all(layer.share <= 0.3 for layer in found.layers)


@pytest.mark.parametrize(("late", "backwards"), [("sample", 4), ("sample", 1000), ("exact", 4)])
def test_gradients_are_unbiased_in_both_versions(late, backwards, monkeypatch):
    monkeypatch.setattr("wtacrs_fx.adapt.BACKWARDS", backwards)
    torch.manual_seed(0)
    model, x = Net(128), batch_of(width=128)
    exact = gradients(model, x)
    backend = Backend(noise=0.5, late=late, row_bits=8, **EAGER)
    compiled = torch.compile(model, backend=backend)
    for _ in range(5):
        gradients(model, x, call=compiled)
    moments = Moments()
    for _ in range(60):
        moments.add(gradients(model, x, call=compiled))
    assert len(backend.ledgers) == (2 if backwards == 4 else 1)
    assert backend.ledger.count("exact") < 3
    for name, value in exact.items():
        assert float(moments.z(name, value).square().mean().sqrt()) < 1.3, name


def test_recalibration_is_bounded():
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    backend = Backend(noise=0.3, recalibrate=3, recompilations=2, **EAGER)
    compiled = torch.compile(model, backend=backend)
    train(compiled, [x] * (BACKWARDS + 1))
    assert len(backend.ledgers) == 2
    train(compiled, [x] * 12)  # measured again, and nothing has changed
    assert len(backend.ledgers) == 2
    assert len(backend.calibrations) >= 2
    for seed in range(60):  # data change; one compilation is left
        train(compiled, [batch_of(seed=seed) if seed % 20 < 10 else batch_of(seed=seed).sign()])
    assert len(backend.ledgers) == 3


def test_by_name_over_a_graph_break_with_evaluation_between():
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x)) * torch.sigmoid(self.b(x))
            torch._dynamo.graph_break()
            out = self.c(y)
            return (out * torch.sin(1e4 * out.detach() + 1e4 * x)).mean()

    torch.manual_seed(0)
    model, x = Broken(), batch_of()
    before = len(wtacrs_fx.ledgers())
    compiled = torch.compile(model, backend="wtacrs", options={"noise": 0.2, **EAGER})
    for _ in range(BACKWARDS + 2):
        compiled(x).backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    made = wtacrs_fx.ledgers()[before:]
    assert len(made) == 4  # two graphs, each measured and chosen
    assert [bool(m.notes and "is measured" in m.notes[0]) for m in made].count(True) == 2


class Weighted(Net):
    """With rows of very different gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(16, 32, 1).pow(6))

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        return (out * torch.sin(1e4 * out.detach() + 1e4 * x) * self.weight).mean()


def test_norms_and_sample_ids_with_a_noise_budget():
    """The state of rows goes on where the graph is compiled again."""
    torch.manual_seed(0)
    model, x = Weighted(), batch_of()
    backend = Backend(noise=0.3, norms="sample", late="exact", **EAGER)
    compiled = torch.compile(model, backend=backend)
    for _ in range(SETTLE + BACKWARDS + 2):
        with wtacrs_fx.sample_ids(range(16)):
            compiled(x).backward()
    assert len(backend.ledgers) == 2
    unknown = calibrate(model, [x], noise=0.3, late="exact", **EAGER)
    chosen, before = (sum(c.ratios.values()) for c in (backend.calibrations[-1], unknown))
    assert chosen < 0.8 * before  # known norms leave less noise
    assert len(backend.norms.state_dict()["tables"]) == 3


def test_dynamic_shapes():
    """A last, smaller batch; conditions on sizes that only the second compilation has are checked at every run."""
    torch.manual_seed(0)
    model = Net()
    backend = Backend(noise=0.3, **EAGER)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    train(compiled, [batch_of(sequences=s) for s in (16, 12, 16, 9, 16, 5, 16)])
    assert len(backend.ledgers) == 2
    exact = gradients(model, batch_of(sequences=7))
    moments = Moments()
    for _ in range(80):
        moments.add(gradients(model, batch_of(sequences=7), call=compiled))
    assert len(backend.ledgers) == 2
    for name, value in exact.items():
        assert float(moments.z(name, value).square().mean().sqrt()) < 1.5, name


@pytest.mark.slow
def test_inductor():
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    backend = Backend(noise=0.3, **SMALL)
    compiled = torch.compile(model, backend=backend)
    state = torch.get_rng_state()
    train(compiled, [x] * (BACKWARDS + 2))
    assert len(backend.ledgers) == 2
    again = Net()
    again.load_state_dict(model.state_dict())
    torch.set_rng_state(state)
    other = Backend(noise=0.3, **EAGER)
    train(torch.compile(again, backend=other), [x] * (BACKWARDS + 2))
    assert other.calibrations[-1].ratios == backend.calibrations[-1].ratios
    for p, q in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)  # the same draws in all steps


def test_batches_of_one_sequence_warn_and_keep_the_ratio():
    torch.manual_seed(0)
    backend = Backend(noise=0.3, **EAGER)
    compiled = torch.compile(Net(), backend=backend)
    with pytest.warns(WtacrsWarning, match="batches of one sequence do not show"):
        train(compiled, [batch_of(sequences=1, length=256)] * (BACKWARDS + 1))
    train(compiled, [batch_of(sequences=1, length=256)] * 3)
    assert len(backend.ledgers) == 1


def test_too_small_a_budget_trains_exactly_and_says_so():
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    backend = Backend(noise=1e-6, **EAGER)
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(WtacrsWarning, match="every layer of this graph would be noisier"):
        train(compiled, [x] * (BACKWARDS + 1))
    exact, found = gradients(model, x), gradients(model, x, call=compiled)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value)


def test_an_overflow_is_left_out():
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    backend = Backend(noise=0.3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    for i in range(BACKWARDS + 2):
        (compiled(x) * (float("inf") if i == 1 else 1.0)).backward()
    assert len(backend.ledgers) == 2
    assert all(0 < ratio <= 1 for ratio in backend.calibrations[-1].ratios.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0}, "expected a share of the batch's own variance"),
        ({"noise": "x"}, "expected a share"),
        ({"noise": 0.1, "ratio": "auto"}, "give one of the two"),
        ({"noise": 0.1, "ratio": 1}, "expected one number below 1"),
        ({"noise": 0.1, "ratio": {"*": 0.3}}, "expected one number below 1"),
        ({"noise": 0.1, "attention": True}, "only the noise of weight gradients"),
        ({"ratio": "auto", "estimator": "topk"}, "it has a bias"),
        ({"ratio": "auto:2"}, "as a text 'auto'"),
        ({"ratio": "autp"}, "as a text 'auto'"),
        ({"recalibrate": 0}, "integer >= 1"),
        ({"recompilations": 0}, "integer >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Config(**options)


def test_options_of_the_versions():
    config = Config(ratio="auto:0.2", verbose=True)
    assert config.ratio_of("x") == config.measuring().ratio == 0.2
    assert config.measuring().measures
    assert not config.measuring().adapts
    assert not config.measures
    plain = Config(ratio=0.2, verbose=True)
    assert len({c.fingerprint() for c in (config, plain, config.measuring())}) == 3
    assert config.with_ratios({"a": 0.5}).ratio_of("b") == 1.0
    assert not config.exact().adapts
    for entry in (lambda: wtacrs_fx.partitioner(ratio="auto"), lambda: wtacrs_fx.swap_linears(Net(), noise=0.1)):
        with pytest.raises(ValueError, match="noise is measured while a Backend's graphs are trained"):
            entry()


def test_no_warning_without_a_reason():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WtacrsWarning)
        train(torch.compile(Net(), backend="wtacrs", options={"noise": 0.3, **EAGER}), [batch_of()] * (BACKWARDS + 1))


class Deep(nn.Module):
    """Four layers of 1 MiB, which DDP puts into several buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


def test_buckets_of_ddp_choose_each():
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Deep()
        backend = Backend(noise=0.5, **EAGER)
        compiled = torch.compile(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1.5), backend=backend)
        x = torch.randn(8, 16, 512)
        train(compiled, [x] * (BACKWARDS + 2))
        graphs = len(backend.calibrations)
        assert graphs > 1
        assert len(backend.ledgers) == 2 * graphs
        assert {m for c in backend.calibrations for m in c.ratios} == {f"layers.{i}" for i in range(4)}
    finally:
        torch.distributed.destroy_process_group()


def test_equal_layers_compiled_one_by_one():
    """They share a graph and its ratios; what is measured is the sum."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    model, x = nn.Sequential(*(Block() for _ in range(3))), batch_of()
    exact = gradients(model, x, call=lambda x: model(x).square().mean())
    backend = Backend(noise=0.5, **EAGER)
    for block in model:
        block.compile(backend=backend)
    moments = Moments()
    for _ in range(40):
        moments.add(gradients(model, x, call=lambda x: model(x).square().mean()))
    assert 2 <= len(backend.ledgers) <= 6  # (a graph of its own for an input without a gradient)
    for name, value in exact.items():
        assert float(moments.z(name, value).square().mean().sqrt()) < 1.4, name

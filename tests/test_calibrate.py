"""Ratios by module, noise formulas, and what calibration makes of them."""

import itertools

import pytest
import torch
from torch import nn

import wtacrs_fx
from wtacrs_fx import Backend, Config, ReportError, SampleNorms, calibrate, sample_ids
from wtacrs_fx.estimators import ESTIMATORS, sanitize, winner_count
from wtacrs_fx.meter import GRID
from wtacrs_fx.noise import allocate, batch_variance, sequence_squares, smallest_within, variance


class Net(nn.Module):
    """Two linear layers that share an input, and one behind them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        return (out * torch.sin(1e4 * out.detach() + 1e4 * x)).mean()  # rows' gradients point anywhere


def batch_of(sequences: int = 8, length: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Rows of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, length, width, generator=generator)
    return x * torch.rand(sequences, length, 1, generator=generator).pow(3)


SMALL = {"min_rows": 1, "min_bytes": 0, "inner": "eager", "memory_budget": None}


@pytest.mark.parametrize("estimator", ["crs", "wta_crs", "systematic"])
def test_variance_is_that_of_draws(estimator: str) -> None:
    torch.manual_seed(0)
    m, k, draws = 60, 15, 4000
    h, g = torch.randn(m, 5).double(), torch.randn(m, 4).double()
    h *= torch.rand(m, 1) ** 2
    importance, squares = h.norm(dim=1), h.square().sum(1) * g.square().sum(1)
    exact = g.T @ h
    errors = []
    for _ in range(draws):
        rows, scale = ESTIMATORS[estimator](importance, k, lambda stream, n: torch.rand(n, dtype=torch.float64))
        errors.append(float((g[rows].T @ (h[rows] * scale[:, None]) - exact).square().sum()))
    found = torch.tensor(errors)
    left_out = torch.tensor(0.0)
    if estimator == "crs":
        left_out = exact.square().sum() / k
    elif estimator == "wta_crs":
        w, order = sanitize(importance).sort(descending=True, stable=True)
        c = int(winner_count(w, k))
        rest = order[c:]
        left_out = (g[rest].T @ h[rest]).square().sum() / (k - c)
    expected = float(variance(estimator, importance, squares, k) - left_out)
    error = float(found.std()) / draws**0.5
    # (systematic draws are not quite independent)
    assert abs(float(found.mean()) - expected) < 4 * error + (0.05 * expected if estimator == "systematic" else 0)
    assert variance(estimator, importance, squares, m) == 0


def test_variance_refuses_what_has_a_bias() -> None:
    with pytest.raises(ValueError, match="'topk': expected 'crs'"):
        variance("topk", torch.ones(4), torch.ones(4), 2)


def test_batch_variance_is_unbiased() -> None:
    torch.manual_seed(1)
    population = torch.randn(50, 3).double() + 0.5
    b, draws = 6, 4000
    found, sums = [], []
    for _ in range(draws):
        x = population[torch.randint(50, (b,))]
        found.append(batch_variance(x.square().sum(1), x.sum(0).square().sum()))
        sums.append(x.sum(0))
    expected = b * population.var(0, unbiased=False).sum()
    values = torch.stack(found)
    assert abs(values.mean() - expected) < 4 * values.std() / draws**0.5
    assert torch.stack(sums).var(0).sum() == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("length", [3, 200])
def test_sequence_squares_by_both_ways(length: int) -> None:
    torch.manual_seed(2)
    h, g = torch.randn(4 * length, 8), torch.randn(4 * length, 6)
    expected = [float((g[i : i + length].T @ h[i : i + length]).square().sum()) for i in range(0, 4 * length, length)]
    torch.testing.assert_close(sequence_squares(h, g, 4), torch.tensor(expected).double(), rtol=1e-4, atol=0)


def test_allocation_is_as_good_as_the_best_of_all() -> None:
    torch.manual_seed(3)
    grid = (0.1, 0.2, 0.4, 0.7, 1.0)
    for _ in range(20):
        weight, costs = torch.rand(4).tolist(), torch.randint(1, 5, (4,)).double().tolist()
        curves = [[w * (1 / r - 1) for r in grid] for w in weight]
        budget = 0.4 * sum(costs)
        found = allocate(curves, costs, grid, budget)
        spent = sum(c * r for c, r in zip(costs, found))
        assert spent <= budget * (1 + 1e-6)

        def total(ratios: object, curves: list[list[float]] = curves) -> float:
            return sum(curve[grid.index(r)] for curve, r in zip(curves, ratios))  # type: ignore[call-overload]

        def best(within: float, costs: list[float] = costs) -> float:
            every = itertools.product(grid, repeat=4)
            return min(total(r) for r in every if sum(c * x for c, x in zip(costs, r)) <= within + 1e-9)

        # Until a step does not fit, the ratios are the best ones for what they cost.
        assert best(budget) - 1e-9 <= total(found) <= best(budget - 0.3 * max(costs)) + 1e-9


def test_smallest_within() -> None:
    assert smallest_within([3.0, 2.0, 1.0, 0.0], (0.1, 0.3, 0.5, 1.0), 2.5) == 0.3
    assert smallest_within([3.0, 2.0, 1.0], (0.1, 0.3, 0.5), 0.5) == 1.0


def test_noise_of_every_layer_is_within_the_budget_and_as_measured() -> None:
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    found = calibrate(model, [x], noise=0.3, estimator="systematic", **SMALL)
    assert {m for layer in found.layers for m in layer.modules} == {"a", "b", "c"}
    assert all(layer.share <= 0.3 for layer in found.layers)
    assert any(layer.ratio < 1 for layer in found.layers)
    backend = Backend(ratio=found.ratios, estimator="systematic", **SMALL)
    compiled = torch.compile(model, backend=backend)
    model(x).backward()
    exact = {n: p.grad.clone() for n, p in model.named_parameters()}
    errors: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for _ in range(150):
        model.zero_grad()
        compiled(x).backward()
        for n in errors:
            errors[n].append(float((model.get_parameter(f"{n}.weight").grad - exact[f"{n}.weight"]).square().sum()))
    for entry in backend.ledger.entries:
        assert entry.kept == -(-int(found.ratios[entry.module] * 1000) * entry.rows // 1000)
    for layer in found.layers:
        measured = sum(sum(errors[m]) / 150 for m in layer.modules)
        size = sum(float(exact[f"{m}.weight"].square().sum()) for m in layer.modules)
        assert measured / size == pytest.approx(layer.noise, rel=0.25, abs=1e-6)


class Adapted(nn.Module):
    """A LoRA before its first step: the second factor is zero, and so is the first one's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.base(x) + self.b(self.a(torch.tanh(x)))).square().mean()


def test_a_layer_without_gradients_has_shown_nothing() -> None:
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(8, 16, 64)
    assert calibrate(model, [x], noise=0.3, **SMALL).ratios["a"] == 1.0
    found = calibrate(model, [x], ratio=0.3, late="exact", **SMALL)
    assert found.ratios["a"] == 0.3
    assert next(layer for layer in found.layers if "a" in layer.modules).noise == 0
    assert max(found.ratios.values()) < 1


def test_a_source_that_does_not_know_these_examples() -> None:
    model, x = Net(), batch_of()
    source = SampleNorms()
    with sample_ids(range(len(x))):
        torch.compile(model, backend=Backend(norms=source, ratio=0.3, **SMALL))(x).backward()
    with sample_ids(range(100, 100 + len(x))):
        assert calibrate(model, [x], norms=source, **SMALL).layers
    with sample_ids(range(8, 8 + len(x))), pytest.raises(ValueError, match="out of range for 8 examples"):
        calibrate(model, [x], norms=SampleNorms(examples=8), **SMALL)


def test_a_budget_of_rows_goes_where_the_noise_is() -> None:
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    even = calibrate(model, [x], noise=1e-9, **SMALL)
    assert set(even.ratios.values()) == {1.0}  # nothing but all rows is so quiet
    found = calibrate(model, [x, batch_of(seed=1)], ratio=0.3, late="exact", **SMALL)
    assert len(found.layers) == 2
    assert sum(layer.ratio for layer in found.layers) <= 0.6 + 1e-9
    assert "share" in found.table()


class Masked(Net):
    """Padding has no gradient, and rows' gradients are of very different size, by position."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out = self.c(torch.relu(self.a(x)) * torch.sigmoid(self.b(x)))
        weight = torch.linspace(0, 1, x.shape[1])[:, None] ** 4 * attention_mask[..., None]
        return (out * torch.sin(1e4 * out.detach() + 1e4 * x) * weight).mean()


def test_what_norms_and_padding_let_draws_know_counts() -> None:
    """And what is said of early layers is what compiled draws have, once the source has seen the batch."""
    torch.manual_seed(0)
    model, x = Masked(), batch_of(length=32)
    mask = torch.ones(8, 32)
    mask[:4, 8:], mask[4:, 28:] = 0, 0
    batch = {"x": x, "attention_mask": mask}
    noise = {}
    for known in ({}, {"padding": "attention_mask"}, {"norms": "position"}):
        found = calibrate(model, [batch], noise=0.3, late="exact", **known, **SMALL)
        noise[tuple(known)] = sum(layer.ratio for layer in found.layers)
    assert noise["padding",] < 0.8 * noise[()]
    assert noise["norms",] < 0.8 * noise[()]
    source = wtacrs_fx.PositionNorms()
    options = {"padding": "attention_mask", "norms": source, "late": "exact", **SMALL}
    backend = Backend(ratio=0.3, **options)
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(**batch).backward()
    found = calibrate(model, [batch], noise=0.5, **options)
    layer = next(layer for layer in found.layers if layer.modules == ("c",))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=Backend(ratio=found.ratios, **options))
    model.zero_grad()
    model(**batch).backward()
    exact, errors = model.c.weight.grad.clone(), []
    for _ in range(80):
        model.zero_grad()
        compiled(**batch).backward()
        errors.append(float((model.c.weight.grad - exact).square().sum() / exact.square().sum()))
    measured = torch.tensor(errors)
    assert abs(float(measured.mean()) - layer.noise) < 4 * float(measured.std()) / 80**0.5 + 0.15 * layer.noise


def test_padding_that_is_no_argument_of_the_batch() -> None:
    with pytest.raises(ValueError, match=r"padding='mask': no such tensor in the batch\. Its arguments are x"):
        calibrate(Net(), [batch_of()], noise=0.3, padding="mask", **SMALL)


def test_center_rows_counts() -> None:
    torch.manual_seed(0)
    x = batch_of() + 3
    plain, centred = (calibrate(Net(), [x], noise=0.5, center_rows=c, **SMALL) for c in (False, True))
    assert sum(layer.ratio for layer in centred.layers) < 0.7 * sum(layer.ratio for layer in plain.layers)


def test_a_dict_of_ratios() -> None:
    config = Config(ratio={"*.query": 0.1, "layer.*": 0.5})
    assert config.ratio_of("layer.0.query") == 0.1
    assert config.ratio_of("layer.0.key") == 0.5
    assert config.ratio_of("head") is None
    assert config.samples
    assert not Config(ratio={"*": 1.0}).samples
    assert config.fingerprint() != Config(ratio={"layer.*": 0.5, "*.query": 0.1}).fingerprint()
    assert config.exact().ratio == 1.0


def test_layers_of_one_input_keep_the_largest_of_their_shares_and_others_stay_exact() -> None:
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    backend = Backend(ratio={"a": 0.1, "b": 0.5}, **SMALL)
    with pytest.warns(wtacrs_fx.WtacrsWarning, match="no pattern for c: they stay exact"):
        torch.compile(model, backend=backend)(x).backward()
    kept = {e.module: (e.kept, e.decision, e.reason) for e in backend.ledger.entries}
    assert kept["a"][0] == kept["b"][0] == 128
    assert kept["c"][1:] == ("exact", "ratio has no pattern for it")
    exact = model.c.weight.grad.clone()
    model.zero_grad()
    model(x).backward()
    torch.testing.assert_close(exact, model.c.weight.grad)


def test_ratios_by_module_without_a_compiler() -> None:
    torch.manual_seed(0)
    traced = wtacrs_fx.rewrite(torch.fx.symbolic_trace(Net()), ratio={"c": 0.25, "*": 1.0}, min_rows=1, min_bytes=0)
    assert "ratio=0.25" in str(traced)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wtacrs_fx.swap_linears(model, ratio={"0": 0.2, "1": 0.7})
    assert [m.wtacrs_sampler.ratio for m in model] == [0.2, 0.7]


def test_training_is_left_alone_and_a_compiled_model_is_measured_like_a_plain_one() -> None:
    torch.manual_seed(0)
    model, x = Net(), batch_of()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    state = torch.get_rng_state()
    plain = calibrate(model, [x], noise=0.3, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert model.b.weight.grad is None
    backend = Backend(**{**SMALL, "ratio": plain.ratios})
    model.compile(backend=backend)
    model(x).backward()
    assert backend.ledger.count("exact") < 3
    assert calibrate(model, [x], noise=0.3, **SMALL) == plain
    (wrapped,) = [layer for layer in plain.layers if layer.modules == ("c",)]
    with torch.no_grad():
        model.c.weight.mul_(torch.logspace(-3, 1, 32)[:, None])
    (changed,) = [layer for layer in calibrate(model, [x], noise=0.3, **SMALL).layers if layer.modules == ("c",)]
    assert changed != wrapped  # (it sees the weights as they are)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.3, "noise": 0.1}, "give one of the two"),
        ({"noise": -1}, "expected a share of the batch's own variance"),
        ({"estimator": "topk"}, "it has a bias"),
        ({"attention": True}, "only weight gradients"),
        ({"ratio": {"*": 0.3}}, "expected one number"),
        ({"ratio": 0.01}, "no layer is given less than 0.02"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate(Net(), [batch_of()], **{**SMALL, **options})


def test_bad_batches() -> None:
    with pytest.raises(ReportError, match="batches is empty"):
        calibrate(Net(), [], **SMALL)
    with pytest.raises(ReportError, match=r"first dimensions \[1\]: expected one number of sequences, at least 2"):
        calibrate(Net(), [batch_of(sequences=1)], **SMALL)
    with pytest.raises(ReportError, match="nothing is sampled"):
        calibrate(Net(), [batch_of()], **{**SMALL, "min_rows": 10_000})


@pytest.mark.parametrize("ratio", [{}, {"a": 0.0}, {"a": "x"}, {1: 0.5}, {"a": True}, "auto:3", "auto:0.01"])
def test_bad_ratios(ratio: object) -> None:
    with pytest.raises((TypeError, ValueError), match="ratio"):
        Config(ratio=ratio)  # type: ignore[arg-type]


def test_grid_ends_with_all_rows() -> None:
    assert GRID[-1] == 1.0
    assert list(GRID) == sorted(GRID)

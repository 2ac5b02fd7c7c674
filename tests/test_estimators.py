"""Estimators: closed forms, brute force, variance order, degenerate importances."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wtacrs_fx.demo_data import find_model, find_reviews, read_reviews
from wtacrs_fx.estimators import ESTIMATORS, inclusion_probability, sanitize, winner_count
from wtacrs_fx.rng import uniform

UNBIASED = ("crs", "wta_crs", "systematic")
M, K = 60, 18


def draw(estimator, importance, k, seed=0, stream=0):
    return ESTIMATORS[estimator](importance, k, lambda s, n: uniform(torch.tensor([seed]), 4 * stream + s, n))


@functools.cache
def real_importance():
    """``|h_i| |g_i|`` of a linear layer of MiniLM in fine-tuning on movie reviews (padded; rows of padding count zero)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = find_model()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    reviews = read_reviews(find_reviews())[:4]
    batch = AutoTokenizer.from_pretrained(folder)([r.text for r in reviews], padding=True, return_tensors="pt")
    layer = model.bert.encoder.layer[2].intermediate.dense
    seen = []
    layer.register_forward_hook(lambda module, args, out: (seen.append(args[0]), out.register_hook(seen.append))[0])
    model(**batch, labels=torch.tensor([r.label for r in reviews])).loss.backward()
    h, gradient = (t.detach().flatten(0, 1).norm(dim=1) for t in seen)
    return h * gradient


def importances():
    g = torch.Generator().manual_seed(0)
    spike = torch.full((M,), 0.01)
    spike[7] = 5.0
    half = torch.rand(M, generator=g)
    half[::2] = 0
    return {
        "flat": torch.ones(M),
        "lognormal": torch.randn(M, generator=g).mul(1.5).exp(),
        "spike": spike,
        "half_zeros": half,
        "real": real_importance()[:M],
    }


def total_scales(estimator, importance, k, n):
    """[n, M]: the sum of scales that each row got in each of n draws. Its mean is 1 for an unbiased estimator."""
    result = torch.zeros(n, importance.numel(), dtype=torch.float64)
    for i in range(n):
        rows, scale = draw(estimator, importance, k, seed=i)
        result[i].index_add_(0, rows, scale.double())
    return result


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("shape", importances())
def test_every_row_has_expected_scale_one(estimator, shape):
    w = importances()[shape]
    scales = total_scales(estimator, w, K, 3000)
    se = scales.std(0) / 3000**0.5
    z = (scales.mean(0) - 1) / (se + 1e-6)
    often = (scales > 0).sum(0) > 50  # the mean of fewer non-zero draws is not normal
    assert z[often].abs().max() < 4.5
    assert often.sum() > M / 4
    assert (scales[:, w == 0] == 0).all()


def variance(estimator, importance, products, k, n):
    """Mean and standard error of the squared error of sum_i products_i, over n draws."""
    error = (total_scales(estimator, importance, k, n) - (importance > 0).double()) @ products
    square = error.square().sum(1)
    return square.mean(), square.std() / n**0.5


@pytest.mark.parametrize("shape", importances())
def test_variance_order(shape):
    """systematic <= wta_crs <= crs for the optimal importance (the norms of the terms), beyond the error of the means."""
    w = importances()[shape].double()
    g = torch.Generator().manual_seed(5)
    products = torch.randn(M, 16, generator=g, dtype=torch.float64)
    products = products / products.norm(dim=1, keepdim=True) * w[:, None]
    n = 3000
    (crs, e1), (wta, e2), (sys, e3) = (variance(e, w, products, K, n) for e in UNBIASED)
    assert wta <= crs + 4 * (e1**2 + e2**2) ** 0.5, f"wta_crs {wta:.4f} > crs {crs:.4f}"
    assert sys <= wta + 4 * (e2**2 + e3**2) ** 0.5, f"systematic {sys:.4f} > wta_crs {wta:.4f}"


def test_crs_variance_matches_the_closed_form():
    """Var = (sum_i |x_i|^2 / p_i - |sum x|^2) / k for k independent draws (Liu et al., section 2.2)."""
    w = importances()["lognormal"].double()
    g = torch.Generator().manual_seed(5)
    products = torch.randn(M, 4, generator=g, dtype=torch.float64)
    p = w / w.sum()
    expected = ((products.square().sum(1) / p).sum() - products.sum(0).square().sum()) / K
    measured, se = variance("crs", w, products, K, 6000)
    assert abs(measured - expected) < 4 * se


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=40), st.data())
def test_winner_count_equals_brute_force(values, data):
    k = data.draw(st.integers(1, len(values) - 1))
    w, _ = sanitize(torch.tensor(values)).sort(descending=True)
    cost = [float(w[c:].sum()) / (k - c) for c in range(k)]
    assert cost[int(winner_count(w, k))] <= min(cost) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=40), st.data())
def test_inclusion_probabilities(values, data):
    k = data.draw(st.integers(1, len(values) - 1))
    w = sanitize(torch.tensor(values))
    pi = inclusion_probability(w, k)
    assert (pi <= 1).all()
    assert ((pi > 0) == (w > 0)).all()
    assert abs(float(pi.sum()) - min(k, int((w > 0).sum()))) < 1e-6
    below = (pi < 1) & (pi > 0)
    if below.any():
        rate = pi[below] / w[below]
        torch.testing.assert_close(rate, rate[0].expand_as(rate))
        assert (w[pi == 1] * rate[0] >= 1 - 1e-9).all()


@pytest.mark.parametrize("k", [1, 5, K])
def test_systematic_keeps_no_row_twice(k):
    for name, w in importances().items():
        for seed in range(50):
            rows, scale = draw("systematic", w, k, seed=seed)
            used = rows[scale > 0]
            assert used.unique().numel() == used.numel(), name


def test_wta_keeps_its_winners():
    w = importances()["spike"]
    for seed in range(20):
        rows, scale = draw("wta_crs", w, K, seed=seed)
        assert rows[0] == 7
        assert scale[0] == 1


def test_topk_is_the_largest_without_scale():
    w = importances()["lognormal"]
    rows, scale = draw("topk", w, K)
    assert set(rows.tolist()) == set(w.argsort(descending=True)[:K].tolist())
    assert (scale == 1).all()


DEGENERATE = {
    "nan": [1.0, float("nan"), 2.0, 0.5],
    "inf": [1.0, float("inf"), 2.0, 0.5],
    "negative_inf": [1.0, -float("inf"), 2.0, 0.5],
    "all_nan": [float("nan")] * 4,
    "all_zero": [0.0] * 4,
    "one_nonzero": [0.0, 0.0, 3.0, 0.0],
    "huge": [3e38, 3e38, 3e38, 1.0],
    "denormal": [1e-45, 0.0, 1e-44, 1e-45],
    "negative": [-1.0, 2.0, -3.0, 1.0],
    "tiny_tail": [1.0, 1e-30, 1e-30, 1e-30],
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("repeat", [1, 5])
def test_degenerate_importance(estimator, name, repeat):
    w = torch.tensor(DEGENERATE[name] * repeat)
    for k, seed in itertools.product(range(1, w.numel() + 2), range(5)):
        rows, scale = draw(estimator, w, k, seed=seed)
        assert rows.dtype == torch.int64
        assert scale.dtype == torch.float32
        assert rows.shape == scale.shape == (min(k, w.numel()),)
        assert ((rows >= 0) & (rows < w.numel())).all()
        assert torch.isfinite(scale).all()
        assert (scale >= 0).all()


@pytest.mark.parametrize("estimator", UNBIASED)
def test_one_nonzero_row_has_all_the_weight(estimator):
    w = torch.zeros(20)
    w[11] = 0.3
    scales = total_scales(estimator, w, 6, 20)
    torch.testing.assert_close(scales[:, 11], torch.ones(20, dtype=torch.float64))
    assert scales.sum() == scales[:, 11].sum()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_that_is_not_finite_is_kept(estimator):
    """An overflow must reach the gradient, where a loss scaler looks for it."""
    w = torch.ones(200)
    w[4] = float("inf")
    for k in (2, 12):
        assert all(4 in draw(estimator, w, k, seed=s)[0].tolist() for s in range(100))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_rows(estimator):
    for k in (M, M + 3):
        rows, scale = draw(estimator, importances()["lognormal"], k)
        assert torch.equal(rows, torch.arange(M))
        assert (scale == 1).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_data_dependent_shape(estimator, dtype):
    """Fake tensors have no data: whatever depends on data or waits for the device would fail here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        w = mode.from_tensor(torch.rand(M).to(dtype))
        seed = mode.from_tensor(torch.tensor([1]))
        rows, scale = ESTIMATORS[estimator](w, K, lambda s, n: uniform(seed, s, n))
    assert rows.shape == scale.shape == (K,)
    assert (rows.dtype, scale.dtype) == (torch.int64, torch.float32)

"""Custom ops and random numbers: opcheck, reproducibility, independence of torch's own stream."""

import pytest
import torch
from torch.library import opcheck

import wtacrs_fx  # noqa: F401  (registers the ops)
from wtacrs_fx import rng
from wtacrs_fx.estimators import ESTIMATORS

ops = torch.ops.wtacrs


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [1, 7, 20, 30])
def test_opcheck_select_rows(estimator, k):
    opcheck(ops.select_rows.default, (torch.rand(20), torch.tensor([3]), 1, k, estimator))


def test_opcheck_draw_seed():
    opcheck(ops.draw_seed.default, (torch.device("cpu"), None))


@pytest.mark.parametrize("seed", [torch.tensor([3]), torch.tensor([-(2**62)])])
@pytest.mark.parametrize("n", [1, 10])
def test_opcheck_short_uniform(seed, n):
    opcheck(ops.short_uniform.default, (seed, 2, n))


@pytest.mark.parametrize("stream", [0, 1, 4, 400])
def test_short_numbers_are_the_words_of_long_ones(stream):
    """Every word of the generator is four of them, its lowest bits first; the start, made on the host, is that of tensors."""
    g = torch.Generator().manual_seed(stream)
    random = torch.randint(-(2**63), 2**63 - 1, (100,), generator=g)
    for seed in (*random.split(1), torch.tensor([0]), torch.tensor([-1]), torch.tensor([-(2**63)])):
        short = rng.short_uniform(seed, stream, 10)
        assert short.dtype is torch.float32
        words = rng._words(rng._start(seed, stream), 3)
        parts = torch.stack([words >> (16 * i) for i in range(4)], 1).flatten()[:10] & 0xFFFF
        assert torch.equal(short, ((parts ^ 0x8000) / 2**16).float())
        assert torch.equal(short, rng.short_uniform(seed, stream, 12)[:10])


@pytest.mark.parametrize("n", [1, 5])
def test_opcheck_split_seeds(n):
    opcheck(ops.split_seeds.default, (torch.arange(n),))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0] * 5)])
def test_opcheck_principal_directions(weight):
    x = torch.randn(10, 16)
    opcheck(ops.principal_directions.default, (x, x.mean(0, keepdim=True), weight, 2))


def test_opcheck_draw_seed_of_its_own_generator():
    """Without the test that compares two calls: opcheck holds torch's generator still for it, and knows no other."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.draw_seed.default, (torch.device("cpu"), 5), test_utils=utils)


def test_only_the_drawing_op_is_tagged_random():
    assert torch.Tag.nondeterministic_seeded in ops.draw_seed.default.tags
    assert torch.Tag.nondeterministic_seeded not in ops.select_rows.default.tags


def test_draws_follow_manual_seed():
    torch.manual_seed(7)
    first = [rng.next_seed() for _ in range(5)]
    torch.manual_seed(7)
    assert [rng.next_seed() for _ in range(5)] == first
    assert len(set(first)) == 5
    torch.manual_seed(8)
    assert rng.next_seed() not in first


def test_draws_follow_manual_seed_with_other_draws_between():
    def run():
        torch.manual_seed(7)
        out = []
        for n in (0, 3, 700, 1):
            torch.rand(n)
            out += [rng.next_seed(), rng.next_seed()]
        return out

    assert run() == run()
    assert len(set(run())) == 8


def test_rng_state_round_trip():
    torch.manual_seed(7)
    rng.next_seed()
    state = torch.get_rng_state()
    first = [rng.next_seed() for _ in range(3)]
    torch.set_rng_state(state)
    assert [rng.next_seed() for _ in range(3)] == first


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(37),
        lambda: torch.randn(37),
        lambda: torch.randn(5),
        lambda: torch.randint(0, 10**12, (37,)),
        lambda: torch.randperm(50),
        lambda: torch.nn.functional.dropout(torch.ones(200), 0.3),
        lambda: torch.bernoulli(torch.full((41,), 0.5)),
        lambda: torch.empty(33).exponential_(),
    ],
)
def test_the_stream_of_torch_is_left_alone(draw):
    """The spare bits of the Mersenne Twister really are spare: marking them at every step changes no number, across
    several blocks of 624 words and for every kind of draw."""
    torch.manual_seed(11)
    untouched = [draw() for _ in range(60)]
    torch.manual_seed(11)
    marked = []
    for _ in range(60):
        for _ in range(3):
            rng.next_seed()
        marked.append(draw())
    assert all(torch.equal(a, b) for a, b in zip(untouched, marked))
    assert torch.initial_seed() == 11


def test_own_seed_has_its_own_generator():
    rng._private.pop(99, None)
    first = [rng.next_seed(99) for _ in range(3)]
    rng._private.pop(99)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert [rng.next_seed(99) for _ in range(3)] == first
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_is_uniform():
    u = rng.uniform(torch.tensor([1]), 0, 200_000)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert 50 < chi2 < 160, "chi-squared with 99 degrees of freedom"


def test_streams_and_seeds_are_independent():
    rows = [rng.uniform(torch.tensor([s]), t, 20_000) for s in (0, 1, -5) for t in (0, 1, 2)]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(9)
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_select_rows_is_a_pure_function_of_the_seed():
    w = torch.rand(50)
    a = ops.select_rows(w, torch.tensor([3]), 0, 10, "wta_crs")
    b = ops.select_rows(w, torch.tensor([3]), 0, 10, "wta_crs")
    c = ops.select_rows(w, torch.tensor([3]), 1, 10, "wta_crs")
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])

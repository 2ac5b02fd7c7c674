"""Rounding by itself: bounds, unbiasedness, formats, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wtacrs_fx import Config
from wtacrs_fx.rounding import BITS, GROUP, Format, dequantise, number_count, quantise, uniform, written_bytes

SEED = torch.tensor([7], dtype=torch.int64)


def numbers(stream: int, shape: tuple[int, ...]) -> Tensor:
    return torch.ops.wtacrs.short_uniform(SEED, stream, number_count(shape))


def rounded(x: Tensor, form: Format, stream: int = 0) -> Tensor:
    return dequantise(quantise(x, numbers(stream, x.shape), form), x.shape, x.dtype, form)


def grid(x: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Every element's grid step s, the bound of its error, and the variance of its rounding: s and s^2 f (1 - f), f being its
    place between two points; in less than 8 bits s / 2 and s^2 / 12 unless its group starts at zero."""
    x = x.double()
    if form.low is None:
        grouped = x.reshape(*x.shape[:-1], form.groups(x.shape[-1]), -1)
        low, high = (v[..., None].expand(grouped.shape).reshape(x.shape) for v in (grouped.amin(-1), grouped.amax(-1)))
    else:
        low, high = torch.full_like(x, form.low), torch.full_like(x, form.high)
    s = (high - low) / form.levels
    f = ((x - low) / s.clamp(min=1e-30)).frac()
    variance = f * (1 - f)
    dithered = (~((low >= 0) & (low < s)) | (form.low is not None)) & torch.tensor(form.bits < 8)
    return s, s / (1 + dithered.double()), s**2 * torch.where(dithered, 1 / 12, variance)


def check_unbiased(x: Tensor, form: Format, draws: int = 200) -> None:
    """Errors below one step, or half of one; their mean by its standard error, over all elements and one by one."""
    s, bound, variance = grid(x, form)
    total = torch.zeros(x.shape).double()
    for i in range(draws):
        error = rounded(x.float(), form, i).double() - x.double()
        assert (error.abs() <= bound * (1 + 1e-4) + 1e-6).all()
        total += error
    noisy = variance > 0.01 * s**2
    if noisy.any():
        assert abs(float(total.sum() / (draws * variance.sum()).sqrt())) < 4.5
        z = (total / (draws * variance).sqrt())[noisy]
        assert abs(float(z.square().mean()) - 1) < 4.5 * (2 / z.numel()) ** 0.5 + 0.02


SHAPES = st.lists(st.integers(1, 9), max_size=2).flatmap(
    lambda lead: st.sampled_from([1, 3, 64, 100, 128, 256]).map(lambda last: (*lead, last))
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=SHAPES,
    bits=st.sampled_from(BITS),
    scale_bits=st.sampled_from([32, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["normal", "relu", "constant", "zero", "tiny", "one outlier"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_tensor_comes_back_within_a_step(shape, bits, scale_bits, dtype, kind, seed):
    """Shapes, types and degenerate values: finite, within one step of the grid, and the bytes that were announced."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "one outlier":
        x.view(-1)[-1] = 1e4
    x = {"relu": x.relu(), "constant": torch.full(shape, 0.7), "zero": torch.zeros(shape), "tiny": x * 1e-6}.get(
        kind, x
    )
    x, form = x.to(dtype), Format(bits, scale_bits=scale_bits)
    written = quantise(x, numbers(seed, x.shape), form)
    found = dequantise(written, x.shape, x.dtype, form)
    assert sum(t.numel() * t.element_size() for t in written) == written_bytes(x.shape, form)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert found.isfinite().all()
    step, size = grid(x, form)[0], x.double().abs()
    if scale_bits == 16:  # (a lowest value rounded downwards, a step upwards)
        step = (step + size.amax() * 2**-7 / form.levels) * (1 + 2**-7)
    unit = torch.finfo(dtype).eps * (size + step + torch.finfo(dtype).smallest_normal)  # (what the type itself rounds)
    assert ((found.double() - x.double()).abs() <= step * (1 + 1e-4) + unit).all()


def drawn(stream: int, shape: tuple[int, ...]) -> Tensor:
    return uniform(numbers(stream, shape), shape).double()


def _chi(cells: Tensor) -> float:
    """How many standard errors the chi-square of cells that should be equal is away from its mean."""
    expected, free = cells.double().mean(), len(cells) - 1
    return abs(float((cells - expected).square().sum() / expected) - free) / (2 * free) ** 0.5


class TestUniform:
    def test_is_uniform(self):
        """Mean and variance of 2^18 numbers that are made of 2^10, by the standard errors of independent ones, and 64 bins of
        those; fixed seed."""
        assert _chi(torch.histc(torch.cat([numbers(s, (512, 512)) for s in range(100)]), 64, 0, 1)) < 4
        n, draws = 2**18, 100
        mean = square = 0.0
        for stream in range(draws):
            u = drawn(stream, (512, 512)).flatten()
            assert u.min() >= 0
            assert u.max() < 1
            mean, square = (
                mean + float(u.mean() - 0.5) / draws,
                square + float((u - 0.5).square().mean() - 1 / 12) / draws,
            )
        assert abs(mean + 2**-17) * (12 * n * draws) ** 0.5 < 4  # (the middle of the grid)
        assert abs(square) * (180 * n * draws) ** 0.5 < 4

    @pytest.mark.parametrize("at", [(0, 1), (1, 0), (1, 1), (3, 0), (0, 2), (2, 3)], ids=str)
    def test_any_two_are_independent(self, at):
        """64 cells of a number and of one that is so many rows and columns further; every pair has its own rows and columns."""
        i, j = at
        cells = torch.zeros(64).double()
        for stream in range(100):
            u = (drawn(stream, (512, 512)) * 8).long()
            cells += torch.bincount((u.diagonal()[::4] * 8 + u[i:, j:].diagonal()[::4]), minlength=64)
        assert _chi(cells) < 4

    def test_any_three_are_independent(self):
        """Of every square of four numbers three; the last follows from these."""
        cells = torch.zeros(64).double()
        for stream in range(100):
            u = drawn(stream, (512, 512))
            last = u[1:, 1:] + u[:-1, :-1] - u[1:, :-1] - u[:-1, 1:]
            assert torch.equal(last, last.round())
            q = [(x.diagonal()[::2] * 4).long() for x in (u, u[:, 1:], u[1:])]
            cells += torch.bincount(q[0][:256] * 16 + q[1] * 4 + q[2], minlength=64)
        assert _chi(cells) < 4

    def test_streams_and_bits_are_independent(self):
        streams = [torch.stack([drawn(2 * i + s, (256, 256)) for i in range(20)]) - 0.5 for s in (0, 1)]
        assert abs(float((streams[0] * streams[1]).mean() * 12)) * streams[0].numel() ** 0.5 < 4
        words = (numbers(3, (2**17, 8)).double() * 2**16).long()
        for bit in range(16):
            ones = float(((words >> bit) & 1).double().mean())
            assert abs(ones - 0.5) * 2 * len(words) ** 0.5 < 4.5, bit

    @pytest.mark.parametrize(
        "shape", [(6, 4), (2, 3, 4), (24,), (1, 7), (0, 4), (4, 0), (3, 256), (1024,), (2, 2, 2, 2)]
    )
    def test_rows_and_columns_count(self, shape):
        """A leading size more or less makes no difference; long rows of a flat tensor are cut: few numbers are needed."""
        u = uniform(numbers(0, shape), shape)
        assert u.shape == shape
        assert torch.equal(u.flatten(), uniform(numbers(0, shape), (1, *shape)).flatten())
        assert number_count(shape) <= max(2 * u.numel(), 8) + max(shape) or 0 in shape
        assert number_count((2**17,)) == 2**10 + 128

    def test_the_variance_of_sums_is_that_of_independent_numbers(self):
        """Along rows, along columns and over all, of errors of one value, where sums of few numbers could differ most."""
        x, form = torch.full((64, 128), 0.3), Format(8, 0.0, 255.0)
        errors = torch.stack([rounded(x, form, i) for i in range(2000)]).double() - 0.3
        for dims, terms in ((1, 64), (2, 128), ((1, 2), 64 * 128)):
            assert float(errors.sum(dims).square().mean()) == pytest.approx(0.21 * terms, rel=0.15), dims


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(33, 256), (5, 100), (7,), (2, 3, 128), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_below_one_step_and_the_mean_exact(bits, shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    check_unbiased(x, Format(bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_read_in_16_bits_is_the_same_to_its_last_digit(bits, dtype):
    """The mean of a value in a narrow type is exact but for the type's own rounding, to the nearest."""
    x = (torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    form, total = Format(bits), torch.zeros(x.shape).double()
    s, _, variance = grid(x, form)
    for i in range(100):
        found = rounded(x, form, i)
        assert found.dtype is dtype
        wide = dequantise(quantise(x, numbers(i, x.shape), form), x.shape, torch.float32, form)
        digit = torch.finfo(dtype).eps / 2 * torch.maximum(wide.abs(), torch.tensor(1e-4))
        assert ((found.float() - wide).abs() <= digit * (1 + 1e-6)).all()
        total += found.double() - x.double()
    digit = torch.finfo(dtype).eps / 2 * (x.double().abs() + s)
    assert (total.abs() / 100 < digit + 5 * (variance / 100).sqrt() + 1e-4 * s).all()


@pytest.mark.parametrize("bits", BITS)
def test_known_range(bits):
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    form = Format(bits, -0.1291, 1.1291)
    check_unbiased(x, form)
    written = quantise(x, numbers(0, x.shape), form)
    assert len(written) == (1 if bits == 8 else 2)
    assert written[0].numel() == x.numel() * bits // 8
    assert sum(w.nbytes for w in written) == written_bytes(x.shape, form)


@pytest.mark.parametrize("bits", BITS)
def test_two_values_of_a_group_are_exact(bits):
    mask = torch.rand(16, 256, generator=torch.Generator().manual_seed(0)) > 0.3
    x = mask.float() / 0.7
    torch.testing.assert_close(rounded(x, Format(bits)), x, rtol=1e-6, atol=0)
    for value in (0.0, -3.7, 1e-42, 3e38):
        same = torch.full((3, 128), value)
        assert torch.equal(rounded(same, Format(bits)), same)


@pytest.mark.parametrize("scale_bits", [32, 16])
@pytest.mark.parametrize("bits", [4, 2])
def test_noise_is_half_and_none_is_put_into_zeros(bits, scale_bits):
    """Mean squared errors over s^2: 1/12 for normal numbers (1/6 without subtraction; of 2^14 * 8, to 3 %), and for the tail of
    a softmax, which lies near the lowest point, far less than that; zeros of a ReLU in 15 of 16 places stay zeros."""
    form, g = Format(bits, scale_bits=scale_bits), torch.Generator().manual_seed(0)
    normal, tail = torch.randn(128, 128, generator=g), torch.rand(128, 128, generator=g) * 1e-3
    tail[:, 0] = 1.0
    sparse = torch.where(torch.rand(128, 128, generator=g) < 1 / 16, torch.rand(128, 128, generator=g), 0.0)
    sparse[:, 0] = 0.0
    error = {}
    for name, x in (("normal", normal), ("tail", tail), ("sparse", sparse)):
        s = grid(x, form)[0]
        noise = [((rounded(x, form, i).double() - x) / s).square().mean() for i in range(8)]
        error[name] = float(torch.stack(noise).mean())
    assert error["normal"] == pytest.approx(1 / 12, rel=0.03), error
    assert error["tail"] < 0.01 * form.levels / 15 + 0.005, error
    assert error["sparse"] < 1 / 12 / 4, error
    assert (rounded(sparse, form)[sparse == 0] == 0).all()


@pytest.mark.parametrize("form", [Format(8), Format(4), *(Format(bits, scale_bits=16) for bits in BITS)])
@pytest.mark.parametrize("bad", [(float("nan"),), (float("inf"),), (-float("inf"),), (3e38, -3e38)])
def test_what_is_not_finite_spoils_its_group_only(bad, form):
    """A range that float32 does not hold does so too."""
    x = torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    x[1, 5 : 5 + len(bad)] = torch.tensor(bad)
    found = rounded(x, form)
    assert not found[1, :GROUP].isfinite().any()
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[1, :GROUP] = False
    assert torch.equal(found[rest], rounded(torch.where(rest, x, 0.0), form)[rest])


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, -0x400000])
def test_every_kind_of_nan_stays_one(bits):
    """GPUs make that of all ones, whose bits rounding of scales upwards would carry over."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    x.view(torch.int32)[0, 3] = bits
    assert x[0, 3].isnan()
    for form in (Format(8), Format(4, scale_bits=16, group=64), Format(8, scale_bits=16)):
        assert not rounded(x, form).isfinite().any()


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_equal_values_in_scales_of_16_bits(bits):
    """Off by less than a step, at most 2^-7 of the value over the number of steps; zeros are exact, and so is the mean."""
    form = Format(bits, scale_bits=16)
    for value in (0.0, -3.7, 1 / 3, 1e-42, 3e38):
        same = torch.full((16, 128), value)
        error = torch.stack([rounded(same, form, i).double() - value for i in range(20)])
        step = 2.0**-7 * abs(value) / form.levels * 1.01 + 2.0**-126
        assert error.abs().max() <= step
        assert abs(error.mean()) <= 4.5 * step / error.numel() ** 0.5


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_ends_in_a_known_range(bits):
    """And harms no neighbour, those of its byte neither."""
    x, form = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)), Format(bits, 0.0, 1.0)
    before = rounded(x, form)
    bad = x.clone()
    bad[3, 4:7] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    after = rounded(bad, form)
    half = 0 if bits == 8 else 0.5 / form.levels
    assert (after[3, 4:7] - torch.tensor([0.0, 1.0, 0.0])).abs().max() <= half * (1 + 1e-6)
    after[3, 4:7] = before[3, 4:7]
    assert torch.equal(after, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, GROUP)])
@pytest.mark.parametrize("limits", [(), (0.0, 1.0)])
def test_empty(shape, limits):
    for bits in BITS:
        form = Format(bits, *limits)
        written = quantise(torch.empty(shape), numbers(0, shape), form)
        assert sum(w.nbytes for w in written) == written_bytes(shape, form)
        assert dequantise(written, shape, torch.float32, form).shape == shape


def test_denormal_groups_are_off_by_less_than_the_smallest_step():
    x = torch.linspace(0, 1e-40, GROUP)[None]
    assert (rounded(x, Format(4)) - x).abs().max() <= 2.0**-126


def test_strides_do_not_matter():
    x = torch.randn(8, 16, 32, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(0, 2), x[:, :1].expand(8, 16, 32), x[::2, :, 1:]):
        assert torch.equal(rounded(view, Format(8)), rounded(view.contiguous(), Format(8)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(6, 130), (3, 5, 7)])
def test_compiled_is_the_same_function(bits, shape):
    """Also in the scalar tails of vectorised loops."""
    x, k, form = torch.randn(shape, generator=torch.Generator().manual_seed(0)), numbers(3, shape), Format(bits)

    def function(x: Tensor, k: Tensor) -> Tensor:
        return dequantise(quantise(x, k, form), x.shape, x.dtype, form)

    found = torch.compile(function, dynamic=False)(x, k)
    assert ((found - x).abs() <= grid(x, form)[1] * (1 + 1e-4) + 1e-6).all()
    # A product that is fused with a sum may move a value that lies on the edge of two codes.
    assert ((found - function(x, k)).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -8, 8.0, "8", True])
def test_other_bits_are_refused(bits):
    with pytest.raises((ValueError, TypeError), match=r"round_bits=.*8, 4, 2"):
        Config(round_bits=bits)
    if not isinstance(bits, float):
        with pytest.raises(ValueError, match="expected one of 8, 4, 2"):
            Format(bits)


def test_half_a_range_is_refused():
    with pytest.raises(ValueError, match="both ends"):
        Format(8, low=0.0)


@pytest.mark.parametrize("option", [{"pack_masks": 1}, {"round_fused_attention": "yes"}, {"round_include": 3}])
def test_options_of_another_type_are_refused(option):
    (name,) = option
    with pytest.raises(TypeError, match=name):
        Config(**option)

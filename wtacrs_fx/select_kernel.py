"""``select_rows`` and ``short_uniform`` on a GPU, in two kernels and in one: of PyTorch's own operations a draw is about
seventy small ones, and a step has a draw for every matrix product.

The design is that of :func:`wtacrs_fx.estimators.systematic` without its sorts. The rate of the inclusion probabilities
``pi_i = min(1, rate w_i)``, sum k, is found by adding winners until there are no more,

    rate_0 = k / sum(w),     C_n = {i: rate_n w_i >= 1},     rate_(n+1) = (k - |C_n|) / (sum of w outside of C_n),

which ends at the smallest consistent set, as each rate is at least the one before. The random order is a bijection of the
slots 0..2^b - 1, of which those that are no row have probability zero: three rounds of multiply, add and shift, with numbers
from the seed. Rows are where a point ``u + j`` falls into their share of the running sum of ``pi``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wtacrs_fx.estimators import NOT_FINITE, Selection
from wtacrs_fx.rng import mix_host

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_BLOCK, _PART = 4096, 1024
_INFINITY = tl.constexpr(float("inf"))
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


def systematic(importance: Tensor, seed: Tensor, stream: int, k: int) -> Selection:
    """Rows and scales as :func:`wtacrs_fx.estimators.systematic` draws them: other ones, of the same distribution.

    Args: importance [..., M] floating point; seed int64 [1] on the same device; stream as for ``select_rows``; k < M.
    Returns: (rows int64 [..., k], scale float32 [..., k]).
    """
    batch, m = importance.shape[:-1], importance.shape[-1]
    draws, slots, device = batch.numel(), triton.next_power_of_2(m), importance.device
    scratch = torch.empty(2, draws, slots, dtype=torch.float64, device=device)
    rows = torch.empty(*batch, k, dtype=torch.int64, device=device)
    scale = torch.empty(*batch, k, dtype=torch.float32, device=device)
    start, bits, block = mix_host(stream), slots.bit_length() - 1, min(slots, _BLOCK)
    with torch.cuda.device_of(scratch):
        _probabilities[(draws,)](
            importance.contiguous(), seed, scratch, rows, scale, m, slots, k, start, bits, block,
            num_warps=16 if block > 1024 else 4,
        )  # fmt: skip
        _rows[(draws, triton.cdiv(slots, _PART))](seed, scratch, rows, scale, slots, k, start, bits, _PART)
    return rows, scale


def short_uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """The same numbers as :func:`wtacrs_fx.rng.short_uniform`, float32 [n]."""
    numbers = torch.empty(n, dtype=torch.float32, device=seed.device)
    with torch.cuda.device_of(seed):
        _short_uniform[(triton.cdiv(n, _PART),)](seed, numbers, n, mix_host(stream), _PART)
    return numbers


@triton.jit
def _mix(z):
    """uint64, the finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _stream(seed, stream):
    return _mix(tl.load(seed).to(tl.uint64, bitcast=True) + stream.to(tl.uint64))


@triton.jit
def _row(slot, start, BITS: tl.constexpr):
    """The row of a slot, uint32, in random order; some are no rows."""
    mask: tl.constexpr = (1 << BITS) - 1
    x, counter = slot, start + _GOLDEN  # (the first number places the points)
    for _ in tl.static_range(3):
        counter += _GOLDEN
        numbers = _mix(counter)
        x = (x * ((numbers >> 32).to(tl.uint32) | 1) + numbers.to(tl.uint32)) & mask
        x = x ^ (x >> ((BITS + 1) // 2))
    return x


@triton.jit
def _weight(weights, row, m, top, equal):
    """Like :func:`wtacrs_fx.estimators.sanitize`, float64; 0 beyond the end."""
    w = tl.load(weights + row, mask=row < m, other=0.0).to(tl.float64)
    finite = tl.abs(w) < _INFINITY
    w = tl.where(finite, tl.where(w > 0, w, 0.0) / top, _NOT_FINITE)
    return tl.where(row < m, tl.where(equal, 1.0, w), 0.0)


@triton.jit
def _probabilities(
    weights, seed, scratch, rows, scale, m, slots, k, stream, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Into ``scratch`` the running sum of the probabilities in random order, and these; zeros into what ``_rows`` fills. One
    program per draw."""
    draw = tl.program_id(0).to(tl.int64)
    weights += draw * m
    rows += draw * k
    scale += draw * k
    cdf = scratch + draw * slots
    pi = cdf + tl.num_programs(0).to(tl.int64) * slots
    start = _stream(seed, stream) + draw.to(tl.uint64) * _GOLDEN
    lane = tl.arange(0, BLOCK)
    top = tl.full((), 0.0, tl.float64)
    spoilt = tl.full((), 0, tl.int32)
    for first in range(0, m, BLOCK):
        inside = first + lane < m
        w = tl.load(weights + first + lane, mask=inside, other=0.0).to(tl.float64)
        finite = tl.abs(w) < _INFINITY
        top = tl.maximum(top, tl.max(tl.where(finite & (w > 0), w, 0.0), 0))
        spoilt += tl.sum(tl.where(finite, 0, 1), 0)
    equal = (top == 0) & (spoilt == 0)
    top = tl.where(top > 0, top, 1.0)
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, m, BLOCK):
        total += tl.sum(_weight(weights, first + lane, m, top, equal), 0)
    rate = k / total
    winners = tl.full((), 0, tl.int32)
    more = tl.full((), 1, tl.int32)
    while more > 0:
        count = tl.full((), 0, tl.int32)
        rest = tl.full((), 0.0, tl.float64)
        for first in range(0, m, BLOCK):
            w = _weight(weights, first + lane, m, top, equal)
            wins = rate * w >= 1.0
            count += tl.sum(tl.where(wins, 1, 0), 0)
            rest += tl.sum(tl.where(wins, 0.0, w), 0)
        more = ((count > winners) & (count < k)).to(tl.int32)
        if more > 0:
            winners = count
            rate = tl.where(rest > 0, (k - count) / tl.where(rest > 0, rest, 1.0), _INFINITY)
    carry = tl.full((), 0.0, tl.float64)
    for first in range(0, slots, BLOCK):
        row = _row((first + lane).to(tl.uint32), start, BITS).to(tl.int64)
        w = _weight(weights, row, m, top, equal)
        share = tl.where(w > 0, tl.minimum(rate * tl.where(w > 0, w, 1.0), 1.0), 0.0)
        tl.store(pi + first + lane, share)
        tl.store(cdf + first + lane, carry + tl.cumsum(share, 0))
        carry += tl.sum(share, 0)
    for first in range(0, k, BLOCK):  # what no row is kept for
        tl.store(rows + first + lane, tl.zeros((BLOCK,), tl.int64), mask=first + lane < k)
        tl.store(scale + first + lane, tl.zeros((BLOCK,), tl.float32), mask=first + lane < k)


@triton.jit
def _rows(seed, scratch, rows, scale, slots, k, stream, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Slot s is kept as number j if ``u + j`` lies in its share. A program per draw and block of slots."""
    draw = tl.program_id(0).to(tl.int64)
    cdf = scratch + draw * slots
    pi = cdf + tl.num_programs(0).to(tl.int64) * slots
    start = _stream(seed, stream) + draw.to(tl.uint64) * _GOLDEN
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    total = tl.load(cdf + slots - 1)
    stretch = tl.where(total > k - 0.5, k / total, 1.0)  # the sum is k up to rounding if that many rows are possible
    u = (_mix(start + _GOLDEN) >> 11).to(tl.float64) * 1.1102230246251565e-16
    below = tl.load(cdf + slot - 1, mask=inside & (slot > 0), other=0.0) * stretch
    above = tl.load(cdf + slot, mask=inside, other=0.0) * stretch
    share = tl.load(pi + slot, mask=inside, other=0.0)
    number, end = tl.ceil(below - u).to(tl.int32), tl.ceil(above - u).to(tl.int32)
    kept = inside & (share > 0) & (number < end) & (number >= 0) & (number < k)
    row = _row(slot.to(tl.uint32), start, BITS).to(tl.int64)
    factor = tl.minimum(1.0 / tl.where(share > 0, share, 1.0), 3.4028234663852886e38)
    tl.store(rows + draw * k + number, row, mask=kept)
    tl.store(scale + draw * k + number, factor.to(tl.float32), mask=kept)


@triton.jit
def _short_uniform(seed, numbers, n, stream, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = _mix(_stream(seed, stream) + ((at // 4 + 1).to(tl.uint64)) * _GOLDEN)
    short = (word >> (16 * (at % 4)).to(tl.uint64)) & 0xFFFF
    bits = short.to(tl.int32) ^ 0x8000  # (of a signed number, above the least)
    tl.store(numbers + at, bits.to(tl.float32) * 1.52587890625e-05, mask=at < n)

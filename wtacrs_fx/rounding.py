"""Stochastic rounding to 8, 4 or 2 bits: pure functions of tensors.

A value x of a group with smallest value l and largest value h is written on a grid of ``2^bits`` points,

    q = floor((x - l) / s + u),   s = (h - l) / (2^bits - 1),   u uniform in [0, 1),        x' = l + s q,

so that ``E[x'] = x`` (to 2^-16 s, the grid of u), ``|x' - x| < s`` and ``Var[x'] = s^2 f (1 - f)``, f being the place of x
between two points of the grid: s^2 / 6 for a value anywhere. With scales of 32 bits a group whose values are all equal, or
take only two values, is written exactly in 8 bits.
(Stochastic rounding of activations for the backward: Chen et al., ActNN, ICML 2021, arXiv 2104.14129, section 3.2; here the
rounded tensors are operands that the gradient is linear in.)

In 4 and 2 bits what was added is subtracted again (subtractive dither: Schuchman, IEEE Trans. Commun. Technol. 12, 1964),

    x' = l + s (q + 1/2 - u),       E[x'] = x,   |x' - x| <= s / 2,   Var[x'] = s^2 / 12,

half the noise in the same bits: what u is made of is kept (4 bytes a row and a column), and u is made again. That would put
noise into values that lie on the grid: groups that start at zero (``0 <= l < s``: of a ReLU, a softmax, a mask), where many
do, are written without. Which way depends on the group's values and not on u: the mean stays exact.

Everything is written in plain elementwise operations and reductions over a group, so that a compiler computes it inside of
the kernels that make and read the tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wtacrs_fx.packing import as_matrix, digits, pack, unpack

BITS = (8, 4, 2)

GROUP = 128
"""Neighbours along the last dimension that share a scale. A row that is no multiple of it is one group."""

_TINY = 2.0**-126
"""Smallest step: that of a group of equal values, which scales of 32 bits then write exactly, and of denormal ones."""


@dataclass(frozen=True)
class Format:
    """How a tensor is written.

    Args:
        bits: 8, 4 or 2.
        low, high: the range of the values where it is known beforehand; otherwise that of each group is measured.
        scale_bits: 32, or 16: of the lowest value and of the step that are written for each group. In 16 bits (bfloat16) the
            lowest value is rounded downwards and the step upwards, so that the grid still covers the group and the mean stays
            exact: steps are up to 1.2 % longer where a group holds both signs, more where its values are nearly equal. Groups
            of one or two values are then not exact: the error is below one step, as for others.
        group: neighbours that share a scale; a row that is no multiple of it is one group.
        by_row: the codes of one byte are of one row, and codes have the leading dimensions of the tensor. For sizes that are
            known when the graph runs; rows must come out even on bytes.
    """

    bits: int
    low: float | None = None
    high: float | None = None
    scale_bits: int = 32
    group: int = GROUP
    by_row: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits!r}: expected one of {', '.join(map(str, BITS))}.")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low!r}, high={self.high!r}: give both ends of the range or none.")
        if self.scale_bits not in (32, 16):
            raise ValueError(f"scale_bits={self.scale_bits!r}: expected 32 or 16.")

    @property
    def levels(self) -> int:
        """Steps of the grid."""
        return 2**self.bits - 1

    @property
    def noise(self) -> float:
        """Mean squared error of a value in squares of its group's range: s^2 / 6, or s^2 / 12, for a step s, of a value
        anywhere between two points of the grid."""
        return 1 / ((12 if self.dithered else 6) * self.levels**2)

    @property
    def dithered(self) -> bool:
        """Whether random numbers are subtracted again where that has less variance. (At 8 bits the noise is small as it is.)"""
        return self.bits < 8

    def groups(self, width: int) -> int:
        """Into how many groups a row of ``width`` values is cut."""
        return width // self.group if width and width % self.group == 0 else 1


def uniform(numbers: Tensor, shape: Sequence[int], *, by_row: bool = False) -> Tensor:
    """Float32 numbers in [0, 1) on a grid of 2^-16, one for every element of a tensor that is seen as a matrix,

        u_ij = (a_i + b_j) mod 1,       a_i, b_j independent and uniform.

    Any three of them are independent (simple tabulation: Carter and Wegman, J. Comput. Syst. Sci. 18, 1979, section 1; Patrascu
    and Thorup, J. ACM 59, 2012), and all of one row or column. So the variance of every sum of rounding errors is that of
    numbers which are all independent, for two loads and an addition in place of a hash of every position.

    Args:
        numbers: float32 ``[number_count(shape)]`` on that grid: every ``b_j``, then every ``a_i``.
        shape: of the result.
        by_row: as of :class:`Format`.
    """
    width = _grid(shape, by_row)[1]
    total = numbers[width:, None] + numbers[:width]
    return (total - total.floor()).reshape(shape)


def number_count(shape: Sequence[int], *, by_row: bool = False) -> int:
    """How many numbers :func:`uniform` is given for a tensor of this shape."""
    rows, width = _grid(shape, by_row)
    return rows + width


def _grid(shape: Sequence[int], by_row: bool) -> tuple[int, int]:
    """Rows and columns of the matrix: the tensor's own, or, where it is flat and of known size, groups of neighbours."""
    rows, width = as_matrix(shape, 1)
    flat = not by_row and rows < GROUP // 8 and width % GROUP == 0 < width
    return (rows * width // GROUP, GROUP) if flat else (rows, width)


def quantise(x: Tensor, numbers: Tensor, form: Format) -> tuple[Tensor, ...]:
    """``x`` in few bits.

    Args:
        x: floating point, at least one dimension, any strides; computed with in float32. Of a group with a NaN or an infinity,
            or with a range that is none in float32, no value stays finite; other groups are unharmed. Where the range is known
            there is no scale to say so: a NaN becomes the lowest value, an infinity an end of the range, up to half a step.
            (Such tensors are derivatives of activation functions, whose result is not finite then either, and is another
            factor of the same backward.)
        numbers: random ones, as for :func:`uniform`.
        form: bits, and the range if it is known.

    Returns:
        codes, uint8, ``ceil(numel * bits / 8)`` of them (by row ``[*shape[:-1], shape[-1] * bits / 8]``); and, unless the
        range is known, lowest value and step of every group, float32 ``[*shape[:-1], groups]``, or both in one int32 if they
        have 16 bits; and, in less than 8 bits, the numbers. There the step is negative in groups whose random numbers are
        subtracted again; in a known range all are.
    """
    value = x.to(torch.float32)
    if form.low is not None and form.high is not None:
        codes = _codes((value - form.low) * (form.levels / (form.high - form.low)), numbers, form)
        return (codes, numbers) if form.dithered else (codes,)
    low, high = _extremes(value, form.groups(x.shape[-1]))
    low = _upper_half(low, upwards=False) if form.scale_bits == 16 else low
    step = ((high - low) * (1 / form.levels)).clamp_min(_TINY)
    step = _upper_half(step, upwards=True) if form.scale_bits == 16 else step
    if form.dithered:
        step = torch.where((low >= 0) & (low < step), step, -step)
    scales = _write_scales(low, step, form)
    low, step = (_spread(scale, x.shape) for scale in _read_scales(scales, form))
    codes = _codes((value - low) * step.abs().reciprocal(), numbers, form)
    return (codes, *scales, numbers) if form.dithered else (codes, *scales)


def _extremes(value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of every group; zeros of an empty one."""
    if not value.numel():
        return value.new_zeros(*value.shape[:-1], groups), value.new_zeros(*value.shape[:-1], groups)
    grouped = value.reshape(*value.shape[:-1], groups, -1)
    return grouped.amin(-1), grouped.amax(-1)


def _codes(scaled: Tensor, numbers: Tensor, form: Format) -> Tensor:
    per_byte = 8 // form.bits
    added = uniform(numbers, scaled.shape, by_row=form.by_row)
    rows, width = (1, 1) if form.by_row else as_matrix(scaled.shape, per_byte)
    if per_byte != 2 or width == 1:
        return pack(_rounded(scaled, added, form), form.bits, by_row=form.by_row)
    # (Part by part, so that one loop makes a byte: of all at once Inductor writes float32 to memory first. Not so of four
    # parts, where in a Llama more is in memory at the peak than of all at once.)
    parts, added = (x.reshape(per_byte, rows // per_byte, width) for x in (scaled, added))
    codes = [_rounded(parts[i], added[i], form) for i in range(per_byte)]
    return digits([c.to(torch.float32) for c in codes], form.bits)


def _rounded(scaled: Tensor, added: Tensor, form: Format) -> Tensor:
    # (By way of bytes: a NaN becomes a number there, and spoils no code that shares its byte. And with no value read twice:
    # Inductor would write it to memory.)
    return (scaled + added).floor().clamp(0, form.levels).to(torch.uint8)


def _upper_half(x: Tensor, *, upwards: bool) -> Tensor:
    """The nearest number in that direction whose last 16 bits are zero, which bfloat16 holds as it is. In integers: a compiler
    may leave out a conversion to bfloat16 and back. (The bits of negative numbers count away from zero.)"""
    bits = x.view(torch.int32)
    away = bits >= 0 if upwards else bits < 0
    return (torch.where(away, bits + 0xFFFF, bits) & -0x10000).view(torch.float32)


def _write_scales(low: Tensor, step: Tensor, form: Format) -> tuple[Tensor, ...]:
    if form.scale_bits == 32:
        return low, step
    return (low.view(torch.int32) | ((step.view(torch.int32) >> 16) & 0xFFFF),)


def _read_scales(written: Sequence[Tensor], form: Format) -> tuple[Tensor, ...]:
    if form.scale_bits == 32:
        return tuple(written)
    (both,) = written
    return (both & -0x10000).view(torch.float32), (both << 16).view(torch.float32)


def written_bytes(shape: Sequence[int], form: Format) -> int:
    """Bytes of what :func:`quantise` returns for a tensor of this shape."""
    scales = 0 if form.low is not None else form.scale_bits // 4 * form.groups(shape[-1]) * math.prod(shape[:-1])
    return (
        -(-math.prod(shape) * form.bits // 8)
        + scales
        + (4 * number_count(shape, by_row=form.by_row) if form.dithered else 0)
    )


def dequantise(written: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype, form: Format) -> Tensor:
    """The tensor that :func:`quantise` has written, of the given shape and type."""
    if form.by_row:  # (sizes of what is there, which a tracer knows)
        shape = (*written[0].shape[:-1], shape[-1])
    codes = unpack(written[0], shape, form.bits, by_row=form.by_row)
    dither = 0.5 - uniform(written[-1], shape, by_row=form.by_row) if form.dithered else 0.0
    if form.low is not None and form.high is not None:
        return ((codes + dither) * ((form.high - form.low) / form.levels) + form.low).to(dtype)
    low, step = (_spread(scale, shape) for scale in _read_scales(written[1:-1] if form.dithered else written[1:], form))
    if form.dithered:
        codes, step = codes + torch.where(step < 0, dither, 0.0), step.abs()
    return (codes * step + low).to(dtype)


def _spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """A number per group as a number per element."""
    groups = scale.shape[-1]
    return scale[..., None].expand(*scale.shape, shape[-1] // groups).reshape(shape) if groups != 1 else scale

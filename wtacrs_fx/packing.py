"""Codes of few bits, and masks, several to a byte: pure functions of tensors, without loss, which a compiler computes inside of
the kernels that make and read the codes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int, *, by_row: bool = False) -> Tensor:
    """Several codes to a byte, uint8 of ``ceil(numel * bits / 8)`` elements.

    With n = 8 / bits codes to a byte, the flat tensor is cut into n parts, and a byte holds one code of each: neighbours in
    memory stay neighbours, which vector loads need. Where it does not come out even, the last codes are zeros.

    Args:
        codes: bool or integers below ``2^bits``, any shape. Those in bytes are added up in floating point: in a kernel that
            reads bfloat16, conversions from and to int32 take 0.75 ns a value on one core, and to bytes 0.2 ns.
        bits: 8, 4, 2 or 1.
        by_row: cut every row into parts in place of the whole tensor, and keep the leading dimensions.
    """
    per_byte = 8 // bits
    if by_row:
        parts = codes.reshape(*codes.shape[:-1], per_byte, codes.shape[-1] // per_byte)
        return _in_bytes(parts.movedim(-2, 0), bits)
    rows, width = as_matrix(codes.shape, per_byte)
    size = (rows + per_byte - 1) // per_byte
    matrix = codes.reshape(rows, width)
    if missing := per_byte * size - rows:
        matrix = torch.constant_pad_nd(matrix, [0, 0, 0, missing])
    return _in_bytes(matrix.reshape(per_byte, size, width), bits)


def _in_bytes(parts: Tensor, bits: int) -> Tensor:
    """Codes [n, ...] -> bytes [...]."""
    per_byte = len(parts)
    if per_byte == 1 and parts.dtype is torch.uint8:
        return parts[0]
    parts = parts.to(torch.float32 if parts.dtype is torch.uint8 else torch.int32)
    if 1 < per_byte < 8:  # a sum, which Inductor unrolls: for codes with several readers it would write them to memory
        place = 1 << (bits * torch.arange(per_byte, dtype=torch.int32, device=parts.device))
        place = place.reshape(-1, *[1] * (parts.dim() - 1)).to(parts.dtype)
        return (parts * place).sum(0, dtype=parts.dtype).to(torch.uint8)
    return digits([parts[i] for i in range(per_byte)], bits)


def digits(codes: Sequence[Tensor], bits: int) -> Tensor:
    """One byte of several codes, the first in its lowest bits."""
    packed = codes[-1]
    for code in reversed(codes[:-1]):
        packed = packed * 2**bits + code
    return packed.to(torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int], bits: int, *, by_row: bool = False) -> Tensor:
    """The codes that :func:`pack` has packed, of the given shape: whole numbers in float32, or bool for 1 bit."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed.reshape(shape).to(torch.float32)
    place = bits * torch.arange(per_byte, device=packed.device)[:, None]
    masks, scales = ((2**bits - 1) << place).to(torch.uint8), 1 / (1 << place).to(torch.float32)

    def codes(packed: Tensor, masks: Tensor, scales: Tensor) -> Tensor:
        here = packed & masks  # (shifts and comparisons of bytes are slow on CPU)
        return here.to(torch.int32) != 0 if bits == 1 else here.to(torch.float32) * scales

    if by_row:
        return codes(packed[..., None, :], masks, scales).reshape(shape)
    rows, width = as_matrix(shape, per_byte)
    return codes(packed, masks[..., None], scales[..., None]).reshape(-1, width)[:rows].reshape(shape)


def as_matrix(shape: Sequence[int], per_byte: int) -> tuple[int, int]:
    """How a tensor is cut into parts: between rows where they come out even, so that an index along a row stays one."""
    width = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return (rows, width) if rows % per_byte == 0 else (rows * width, 1)

"""What Inductor makes of rounding: codes are made inside of one kernel, and nothing as large as the tensor is written."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from wtacrs_fx.inductor import ROUNDED
from wtacrs_fx.rounding import Format, dequantise, number_count, quantise

SHAPE = (8, 32, 256)


def uniform_numbers() -> Tensor:
    return torch.ops.wtacrs.short_uniform(torch.tensor([1]), 2, number_count(SHAPE))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_made_in_registers(bits):
    """Of an operand with operations of its own. Allocated are what is returned: the codes, and a range per group."""

    def rounded(x: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        return quantise(F.gelu(x), numbers, Format(bits))

    torch.manual_seed(0)
    x, numbers = torch.randn(SHAPE), uniform_numbers()
    torch._dynamo.reset()
    found, (code,) = run_and_get_code(torch.compile(rounded, options=ROUNDED), x, numbers)
    allocated = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\), .*torch\.(\w+)\)", code)
    sizes = [math.prod(map(int, filter(None, shape.split(", ")))) for shape, _ in allocated]
    assert len(sizes) >= 3, code
    wide = [a for a, size in zip(allocated, sizes) if a[1] != "uint8" and size >= x.numel() // 8]
    assert not wide, f"{bits} bits: {wide}"
    differ = (found[0] != rounded(x, numbers)[0]).float().mean()
    assert differ < 1e-3  # (where the last bit of gelu decides between two codes)


READERS = {
    "product": lambda grad, x: grad * x,
    "normalisation": lambda grad, x: grad - x * (grad * x).mean(-1, keepdim=True),
}
"""What multiplies gradients by a rounded tensor, elementwise and along rows."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_read_in_registers(bits, reader):
    """Allocated is nothing of the tensor's size but the result."""
    form = Format(bits)

    def read(grad: Tensor, codes: tuple[Tensor, ...]) -> Tensor:
        return READERS[reader](grad, dequantise(codes, SHAPE, torch.float32, form))

    torch.manual_seed(0)
    grad, codes = torch.randn(SHAPE), quantise(torch.randn(SHAPE), uniform_numbers(), form)
    torch._dynamo.reset()
    found, (code,) = run_and_get_code(torch.compile(read, options=ROUNDED), grad, codes)
    torch.testing.assert_close(found, read(grad, codes))
    allocated = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\), .*torch\.(\w+)\)", code)
    sizes = [math.prod(map(int, filter(None, shape.split(", ")))) for shape, _ in allocated]
    assert [size for size in sizes if size >= grad.numel() // 8] == [grad.numel()], allocated

"""Random numbers: one seed per forward from torch's generator, everything else a pure function of that seed.

Three demands meet here. Draws follow ``torch.manual_seed``. Draws do not move the stream that dropout and data loaders
read, so that an exact and a sampled run from one seed see the same masks and the same batches. And nothing waits for the
device or is frozen into a CUDA graph. Hence :func:`next_seed` reads the CPU generator on the host without advancing it,
and :func:`uniform` expands the resulting seed on the device by counters.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WORD0 = 3
"""Index, in 8-byte units, of the first Mersenne Twister word in torch's CPU generator state: the seed (8 bytes), two
4-byte fields and the position (8 bytes) stand before it."""

_SPARE_BITS = 0x7FFF_FFFF
_GOLDEN = 0x9E3779B97F4A7C15

_PHILOX_FACTORS, _PHILOX_KEYS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)

DRAWN_SCALE = 4.6566127342e-10
"""Of 31 random bits to a number in [0, 1), as Inductor has it."""

_private: dict[int, torch.Generator] = {}
"""Generators for ``Config(seed=...)``, one per seed and process, as torch keeps one default generator per process."""


def next_seed(seed: int | None = None) -> int:
    """A fresh 63-bit seed on the host.

    ``seed=None``: a hash of the state of torch's default CPU generator, whose stream of numbers is left as it was. So
    that two calls in a row differ, the state is marked in bits that the stream does not depend on: the Mersenne Twister
    MT19937 keeps 624 words of 32 bits, of which only 19937 bits are its state; the low 31 bits of word 0 are overwritten
    without being read when the next block of words is made. ``torch.manual_seed`` and ``torch.set_rng_state`` restore
    them, and with them the draws. An integer: the next number of a generator of its own, started at that seed.

    In a process group of torch.distributed every rank draws numbers of its own, though all ranks are given one seed as a
    rule: errors of rows drawn alike would not average out over ranks. Rank 0 draws as a single process does.
    """
    return _next_seed(seed) ^ _of_rank()


def _of_rank() -> int:
    """63 bits that differ from rank to rank; 0 for rank 0 and where there is no process group."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if group else 0
    return mix_host(rank) >> 1 if rank else 0


def _next_seed(seed: int | None) -> int:
    if seed is not None:
        if seed not in _private:
            _private[seed] = torch.Generator().manual_seed(seed)
        return int(torch.randint(0, 2**63 - 1, (), generator=_private[seed]))
    state = torch.get_rng_state()
    digest = hashlib.blake2b(ctypes.string_at(state.data_ptr(), state.numel()), digest_size=8).digest()
    words = state.view(torch.int64)
    word = int(words[_WORD0])
    words[_WORD0] = (word & ~_SPARE_BITS) | ((word + 1) & _SPARE_BITS)
    torch.set_rng_state(state)
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """n float64 numbers in [0, 1), a pure function of (seed, stream, position).

    ``u_i = mix(mix(seed + mix(stream)) + i * golden) / 2^64`` to 53 bits, with the finaliser of SplitMix64 (Steele, Lea
    and Flood, OOPSLA 2014) in wrapping 64-bit arithmetic, so that it runs on any device in a few pointwise kernels.

    Args: seed, int64 [..., 1] on the device of the result; stream, any integer; n >= 0. Returns: float64 [..., n].
    """
    return _shift(_words(_start(seed, stream), n), 11).to(torch.float64) * 2.0**-53


def short_uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """n float32 numbers on a grid of 2^-16 in [0, 1): four of every word that :func:`uniform` makes one of.

    Args: seed, int64 [1]; the others as for :func:`uniform`. Returns: float32 [n].
    """
    if seed.device.type == "cpu":  # (a Python integer, in place of ten operations on one number)
        start = torch.tensor([_signed(_finalise(int(seed) + mix_host(stream)))])
    else:
        start = _start(seed, stream)
    return _words(start, -(-n // 4)).view(torch.int16)[:n].to(torch.float32) * 2.0**-16 + 0.5


def _words(start: Tensor, n: int) -> Tensor:
    """int64 [..., n]."""
    return _mix(start + torch.arange(1, n + 1, device=start.device) * _signed(_GOLDEN))


def split(seed: Tensor, n: int) -> Tensor:
    """n seeds made of one, int64 [1] -> int64 [n], for draws that are independent of each other."""
    return _mix(_mix(seed) + torch.arange(1, n + 1, device=seed.device) * _signed(_GOLDEN))


def philox(position: Any, seed: Any, number: Callable[[int], Any], upper: Callable[[Any], Any]) -> Any:
    """Inductor's 32 random bits at a position on CPU: the first word of Philox 4x32-10 (Salmon et al., Parallel random numbers:
    as easy as 1, 2, 3, SC 2011) with counter (position, 0, 0, 0) and key (seed, 0).

    Every value is the lower half of an int64, and what stands in the upper half is dropped before it matters: the low word of
    a product needs no operation then, and the high word one.

    Args:
        position, seed: int64; tensors, or values of Inductor's loops.
        number: of a Python integer, what such values can be combined with.
        upper: of an int64, the upper half.

    Returns: int64, of which the lower 32 bits count.
    """
    word = number(2**32 - 1)
    first, second = number(_PHILOX_FACTORS[0]), number(_PHILOX_FACTORS[1])
    key, other = seed & word, 0
    product = (position & word) * first
    a, b, c, d = key, None, upper(product), product  # (of the first round half is known)
    for _ in range(9):
        key, other = key + number(_PHILOX_KEYS[0]), (other + _PHILOX_KEYS[1]) & 0xFFFFFFFF
        p, q = (a & word) * first, (c & word) * second
        high = upper(q)
        a, b, c, d = (high if b is None else high ^ b) ^ key, q, upper(p) ^ d ^ number(other), p
    return a


def drawn(shape: Sequence[int], seed: Tensor) -> Tensor:
    """The numbers of ``torch.ops.prims.inductor_random(shape, seed, "rand")`` as Inductor computes them on CPU, float32."""
    position = torch.arange(math.prod(shape), device=seed.device).reshape(tuple(shape))
    bits = philox(position, seed, lambda x: x, lambda x: x >> 32)
    return (bits & 0x7FFFFFFF).to(torch.int32).to(torch.float32) * DRAWN_SCALE


def _start(seed: Tensor, stream: int) -> Tensor:
    return _mix(seed + _signed(mix_host(stream)))


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's is arithmetic)."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def mix_host(z: int) -> int:
    """The start of a stream, 64 bits, made of its number."""
    return _finalise(z + _GOLDEN)


def _finalise(z: int) -> int:
    """:func:`_mix` of a Python integer; 64 bits without a sign."""
    z &= 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)

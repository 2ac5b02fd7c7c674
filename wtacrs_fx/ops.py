"""The custom ops that rewritten graphs call: ``torch.ops.wtacrs.draw_seed`` and ``torch.ops.wtacrs.select_rows``.

Only ``draw_seed`` is random. It runs once per forward graph; what is chosen, in the forward and in the backward, is a
pure function of its result, so no plan of any partitioner can make the two disagree.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from wtacrs_fx import rng
from wtacrs_fx.estimators import ESTIMATORS


@torch.library.custom_op(
    "wtacrs::draw_seed",
    mutates_args=(),
    # Its value must be fresh at every call, so it stays outside of captured CUDA graphs; the rest may go in.
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def draw_seed(device: torch.device, seed: int | None = None) -> Tensor:
    """A fresh seed, int64 [1] on ``device``, without waiting for it. See :func:`wtacrs_fx.rng.next_seed`."""
    return torch.full((1,), rng.next_seed(seed), dtype=torch.int64, device=device)


@draw_seed.register_fake
def _(device: torch.device, seed: int | None = None) -> Tensor:
    return torch.empty((1,), dtype=torch.int64, device=device)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether :mod:`wtacrs_fx.select_kernel` can be used there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)  # (what Triton compiles for)


@torch.library.custom_op("wtacrs::select_rows", mutates_args=())
def select_rows(importance: Tensor, seed: Tensor, stream: int, k: int, estimator: str) -> tuple[Tensor, Tensor]:
    """Choose rows for an estimate of ``sum_i g_i h_i^T``; see :mod:`wtacrs_fx.estimators`.

    Args:
        importance: [..., M], floating point, any values (NaN, inf and negative ones are dealt with). Every row of the
            leading dimensions (an attention head) is a draw of its own, independent of the others.
        seed: int64 [1] from ``draw_seed``. Equal arguments give equal rows.
        stream: tells the draws of one seed apart, one number per draw of a graph.
        k: rows to keep, at least 1.
        estimator: "crs", "wta_crs", "systematic" or "topk".

    Returns:
        (row index int64 [..., min(k, M)], scale float32 [..., min(k, M)]).
    """
    if estimator == "systematic" and k < importance.shape[-1] and has_triton(importance.device):
        from wtacrs_fx import select_kernel

        return select_kernel.systematic(importance, seed, stream, k)
    batch = importance.shape[:-1]
    seeds = rng.split(seed, batch.numel()).reshape(*batch, 1) if batch else seed

    def uniform(substream: int, n: int) -> Tensor:
        return rng.uniform(seeds, 4 * stream + substream, n)

    return ESTIMATORS[estimator](importance, k, uniform)


@select_rows.register_fake
def _(importance: Tensor, seed: Tensor, stream: int, k: int, estimator: str) -> tuple[Tensor, Tensor]:
    shape = (*importance.shape[:-1], torch.sym_min(k, importance.shape[-1]))
    return importance.new_empty(shape, dtype=torch.int64), importance.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("wtacrs::short_uniform", mutates_args=())
def short_uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """Numbers float32 [n] for one rounding, see :func:`wtacrs_fx.rng.short_uniform` and
    :func:`wtacrs_fx.rounding.uniform`.

    Args: seed and stream as for ``select_rows``.
    """
    if has_triton(seed.device):
        from wtacrs_fx import select_kernel

        return select_kernel.short_uniform(seed, 4 * stream, n)
    return rng.short_uniform(seed, 4 * stream, n)


@short_uniform.register_fake
def _(seed: Tensor, stream: int, n: int) -> Tensor:
    return seed.new_empty((n,), dtype=torch.float32)


@torch.library.custom_op("wtacrs::split_seeds", mutates_args=())
def split_seeds(seeds: Tensor) -> list[Tensor]:
    """Every number of int64 [n] as a tensor [1] of its own."""
    return [seed.clone() for seed in seeds.split(1)]


@split_seeds.register_fake
def _(seeds: Tensor) -> list[Tensor]:
    return [seeds.new_empty((1,)) for _ in range(seeds.shape[0])]


@torch.library.custom_op("wtacrs::drawn_mask", mutates_args=())
def drawn_mask(seed: Tensor, shape: list[int], bound: float, above: bool) -> Tensor:
    """Which of Inductor's random numbers lie above (or below) a bound, 1 or 0 in uint8 of that shape: on CPU the same as
    ``inductor_random(shape, seed, "rand") > bound`` (``< bound``). Inductor computes it as :mod:`wtacrs_fx.drawn` says.

    Args:
        seed: int64 [].
    """
    numbers = rng.drawn(shape, seed)
    return (numbers > bound if above else numbers < bound).to(torch.uint8)


@drawn_mask.register_fake
def _(seed: Tensor, shape: list[int], bound: float, above: bool) -> Tensor:
    return seed.new_empty(shape, dtype=torch.uint8)

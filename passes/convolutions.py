"""Write the backward of convolutions that are linear layers on patches as one of those, so that it can be sampled.

A kernel that moves by its own size without padding (1x1 convolutions, patch embeddings) reads every number once. With M
patches of all images, X [M, C p q], G [M, O] and W [O, C p q]::

    bwd = convolution_backward(g, x, weight, ...)        patches: f32[M, C p q] = x, cut into patches
    grad_x = bwd[0]                                      grad_x = mm(G, W), put together again
    grad_w = bwd[1]                                ->    grad_w = mm(G^T, patches) as [O, C, p, q]
    grad_b = bwd[2]                                      grad_b = sum of G over patches
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.policy import ALL_ROWS, REARRANGED, excluded, too_small, view_base
from wtacrs_fx.passes.sites import module_of

aten = torch.ops.aten


def split_convolutions(graph: Graph, config: Config) -> int:
    """Split the backward of every convolution that is a linear layer on patches and that the options admit. Others stay:
    overlapping, padded, dilated, grouped or transposed ones, those whose sizes are symbols, and kernels that do not divide
    the image.

    Returns: how many were split.
    """
    found = [n for n in graph.find_nodes(op="call_function", target=aten.convolution_backward.default)]
    chosen = [n for n in found if _is_plain(n) and not _why_exact(n, config)]
    for node in chosen:
        _split(graph, node)
    return len(chosen)


def _is_plain(node: Node) -> bool:
    grad, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = node.args
    values = [n.meta["val"] for n in (grad, x, weight) if isinstance(n, Node)]
    if len(values) != 3 or not all(isinstance(s, int) for v in values for s in v.shape):
        return False
    kernel = list(values[2].shape[2:])
    sizes: Any = zip(values[1].shape[2:], kernel)
    return bool(
        mask[1]  # type: ignore[index]
        and not transposed
        and groups == 1
        and list(stride) == kernel  # type: ignore[arg-type]
        and set(padding) == {0}  # type: ignore[arg-type]
        and set(dilation) == {1}  # type: ignore[arg-type]
        and all(size % k == 0 for size, k in sizes)
        and values[1].is_floating_point()
        and all(_is_dense(u.meta["val"]) for u in node.users if u.args[1] == 0)
    )


def _is_dense(value: Tensor) -> bool:
    return value.is_contiguous() or (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))


def _why_exact(node: Node, config: Config) -> str:
    """Of the product that it would become; a convolution that is not sampled is left to the library as it is."""
    grad, x = (n.meta["val"] for n in node.all_input_nodes[:2])
    rows = grad.numel() // grad.shape[1]
    reason = excluded(module_of(node), config)
    if reason == ALL_ROWS and config.all_rows_in_bits:
        reason = ""
    return reason or too_small(rows, x.numel() * x.dtype.itemsize, config)


def _split(graph: Graph, node: Node) -> None:
    grad, x, weight, *_, mask = node.args
    assert isinstance(grad, Node)
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    shape = list(weight.meta["val"].shape)
    start = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(start if x.op == "placeholder" else x.next):
        patches = Emitter(graph, x).inline(lambda x: to_patches(x, shape[2:]), x)
    if view_base(patches) is not view_base(x):
        view_base(patches).meta[REARRANGED] = x
    results: dict[Any, Node] = {}
    with graph.inserting_before(node):
        emit = Emitter(graph, node)
        g = emit.inline(lambda g: to_patches(g, [1] * len(shape[2:])), grad)
        product = emit(aten.mm.default, emit(aten.permute.default, g, [1, 0]), patches)
        results[1] = emit(aten.view.default, product, shape)
        if mask[0]:  # type: ignore[index]
            like = next(u.meta["val"] for u in node.users if u.args[1] == 0)
            format_ = torch.contiguous_format if like.is_contiguous() else torch.channels_last

            def for_input(g: Tensor, weight: Tensor) -> Tensor:
                found = torch.mm(g, weight.reshape(shape[0], -1))
                return from_patches(found, like.shape, shape[2:]).contiguous(memory_format=format_)

            results[0] = emit.inline(for_input, g, weight)
        if mask[2]:  # type: ignore[index]
            results[2] = emit(aten.sum.dim_IntList, g, [0])
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def to_patches(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Patches of images as rows: [N, C, H, W, ...] -> [N H/p W/q ..., C p q ...]."""
    cut = x.reshape(x.shape[0], x.shape[1], *(s for pair in _cuts(x.shape, kernel) for s in pair))
    outer, inner = range(2, cut.dim(), 2), range(3, cut.dim(), 2)
    return cut.permute(0, *outer, 1, *inner).reshape(-1, x.shape[1] * math.prod(kernel))


def from_patches(rows: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_patches`."""
    n = len(kernel)
    counts = [count for count, _ in _cuts(shape, kernel)]
    cut = rows.reshape(shape[0], *counts, shape[1], *kernel)
    pairs = (d for i in range(n) for d in (1 + i, 2 + n + i))
    return cut.permute(0, 1 + n, *pairs).reshape(shape)


def _cuts(shape: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Per spatial dimension: how many patches, and their size."""
    return [(size // k, k) for size, k in zip(shape[2:], kernel)]

"""Find the factors: activations that a gradient is multiplied by, and the tensors that stand behind them.

The backward is linear in gradients, and every product in it is linear in its activation too: ``g * gelu'(x)``,
``g * x_hat``, ``P^T g``. So the activation may be replaced by an unbiased estimate of it. What is estimated need not be the
factor itself: where the factor is a linear function of a tensor (a view, a conversion, scaled or shifted by something small
or by a mask), that tensor can serve several factors at once::

    x_hat: f32[B, T, D]                    <- the tensor: factor of three products of the normalisation's backward,
    mul = x_hat * weight; add = mul + bias
    view: f32[B T, D] = view(add)          <- and, by way of these, of the weight gradients behind it
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from wtacrs_fx.config import Config
from wtacrs_fx.passes.emit import has_whole_rows
from wtacrs_fx.passes.kinds import Kind, draws, is_tensor
from wtacrs_fx.passes.policy import is_view
from wtacrs_fx.passes.sites import PRODUCTS
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.rounding import BITS, Format, written_bytes

aten, prims = torch.ops.aten, torch.ops.prims

FUSED_ATTENTION: Mapping[Any, Sequence[int]] = {
    op: tuple(i for i, a in enumerate(op._schema.arguments) if a.name in ("query", "key", "value", "out"))
    for op in (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    )
}
"""Backward of fused attention -> where q, k, v and the output are among its arguments (a bias, which may hold -inf, is not
rounded). Not linear in them, and biased if they are rounded."""

NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types of tensors that are rounded."""

FLOATS = (torch.float64, *NARROW)
"""Those that can be rounded, where it is asked for."""

SMALL = 16
"""What scales or shifts a tensor is small if it has this many times fewer elements: it is kept as it is."""

_BILINEAR: Mapping[Any, Sequence[int]] = {
    aten.mul.Tensor: (0, 1),
    prims.fma.default: (0, 1),
    **dict.fromkeys(PRODUCTS, (0, 1)),
}
"""Operation -> the arguments that it is linear in, each for fixed others."""

_SCALES = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor,
    aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
)  # fmt: skip
_SAME = (aten.neg.default, aten.clone.default, prims.convert_element_type.default)


@dataclass(frozen=True)
class Factor:
    """``reader`` multiplies a gradient by ``operand``."""

    reader: Node
    operand: Node


@dataclass(frozen=True)
class Shared:
    """A tensor and the factors that are linear functions of it."""

    tensor: Node
    factors: tuple[Factor, ...]
    root: Node
    """What ``tensor`` is itself a linear function of."""


def rounded_types(config: Config) -> tuple[torch.dtype, ...]:
    """Types of tensors that the options admit."""
    return FLOATS if config.round_float64 else NARROW


def find_factors(
    nodes: Iterable[Node],
    kinds: Mapping[Node, Kind],
    *,
    types: Sequence[torch.dtype] = NARROW,
    fused_attention: bool = False,
) -> list[Factor]:
    """All factors, in graph order: operands of these types and static size. Left out is what is computed from random numbers
    that the backward draws (of a backward of the user's): computed in the forward, they would be drawn once more.

    Args:
        nodes: of a joint graph.
        kinds: of the nodes.
        types: of operands.
        fused_attention: whether q, k, v and the output count, where fused attention reads them.
    """
    found = []
    drawn: set[Node] = set()
    backward = False
    for node in nodes:
        if node.op != "call_function":
            continue
        if kinds[node] is not Kind.GRADIENT:
            if backward and (draws(node) or not drawn.isdisjoint(node.all_input_nodes)):
                drawn.add(node)
            continue
        backward = True
        places = _BILINEAR.get(node.target, ())
        if fused_attention:
            places = FUSED_ATTENTION.get(node.target, places)
        operands = [a for i in places if isinstance(a := node.args[i], Node)]
        operands = [a for a in dict.fromkeys(operands) if kinds[a] is Kind.ACTIVATION and a not in drawn]
        found += [Factor(node, a) for a in operands if is_rounded(a, types)]
    return found


def is_rounded(node: Node, types: Sequence[torch.dtype] = FLOATS) -> bool:
    """Whether the node is a tensor of such a type whose rows can be written in the fewest bits."""
    if not is_tensor(node) or node.meta["val"].dtype not in types:
        return False
    return has_whole_rows(node.meta["val"], 8 // min(BITS))


def share(factors: Iterable[Factor], kinds: Mapping[Node, Kind], types: Sequence[torch.dtype] = NARROW) -> list[Shared]:
    """Factors that are linear functions of one tensor together: of all tensors that serve them, the one that takes fewest
    bytes in 8 bits with its scales, and of these the nearest."""
    families: dict[Node, list[tuple[Factor, list[Node]]]] = {}
    for factor in factors:
        lineage = ancestry(factor.operand, kinds)
        families.setdefault(lineage[-1], []).append((factor, lineage))
    result = []
    for root, family in families.items():
        common = [n for n in family[0][1] if all(n in lineage for _, lineage in family) and not _is_rearranged(n)]
        tensor = min(
            common or [root], key=lambda n: written_bytes([*map(hint, n.meta["val"].shape)], Format(8, scale_bits=16))
        )
        result.append(Shared(tensor, tuple(factor for factor, _ in family), root))
    return [s for s in result if is_rounded(s.tensor, types)]


def ancestry(node: Node, kinds: Mapping[Node, Kind]) -> list[Node]:
    """The node, what it is a linear function of, what that is a linear function of, and so on."""
    result = [node]
    while (source := linear_source(result[-1], kinds)) is not None:
        result.append(source)
    return result


def linear_source(node: Node, kinds: Mapping[Node, Kind]) -> Node | None:
    """The one large activation that the node is an affine function of, if its other inputs are small, weights or masks."""
    if node.op != "call_function" or node.target is operator.getitem or not is_tensor(node):
        return None
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]  # (symbolic sizes of views are nodes too)
    power_of_one = node.target is aten.pow.Tensor_Scalar and node.args[1] == 1
    if (is_view(node) or node.target in _SAME or power_of_one) and len(inputs) == 1:
        return inputs[0] if is_rounded(inputs[0]) else None
    if node.target is aten.where.self:
        inputs = list(dict.fromkeys(a for a in node.args[1:] if isinstance(a, Node)))
    elif node.target not in _SCALES:
        return None
    numel = hint(node.meta["val"].numel())
    large = [n for n in inputs if kinds[n] is Kind.ACTIVATION and not is_cheap(n, numel)]
    if len(large) != 1 or not is_rounded(large[0]):
        return None
    if node.target is aten.div.Tensor and node.args[0] is not large[0]:
        return None
    if sum(a is large[0] for a in node.args) != 1:  # (a square is not linear)
        return None
    return large[0]


def is_cheap(node: Node, numel: int) -> bool:
    """Whether the backward can have the node without holding a large tensor of numbers: a mask times constants, or small."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype is torch.bool or _stored(value) * SMALL <= numel:
        return True
    inputs = node.all_input_nodes
    if not (is_view(node) or node.target in (*_SAME, aten.mul.Tensor, aten.where.self)) or node.op != "call_function":
        return False
    return all(is_cheap(n, numel) for n in inputs)


def _stored(value: Tensor) -> int:
    """Elements in memory: an expanded tensor has fewer than its shape says."""
    return hint(value.untyped_storage().nbytes()) // value.dtype.itemsize


def _is_rearranged(node: Node) -> bool:
    """A view that does not lie in memory row by row."""
    return node.op == "call_function" and is_view(node) and not node.meta["val"].is_contiguous()

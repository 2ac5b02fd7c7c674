"""Operations on the rows of matrices, and of many matrices at once, emitted into a graph."""

from typing import Any

import torch
from torch.fx import Node

from wtacrs_fx.passes.emit import Emitter

aten, prims = torch.ops.aten, torch.ops.prims


def row_norms(emit: Emitter, matrix: Node, dim: int) -> Node:
    """Euclidean norm of each row, [M] or [B, M], at least float32 inside whatever the matrix is stored in."""
    x = as_float32(emit, matrix)
    return emit(aten.sqrt.default, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, x, x), [other_dim(matrix, dim)]))


def other_dim(matrix: Node, dim: int) -> int:
    """The dimension of a matrix, or of many, that is not its rows ``dim``."""
    return 2 * matrix.meta["val"].dim() - 3 - dim


def as_float32(emit: Emitter, node: Node) -> Node:
    if node.meta["val"].dtype in (torch.float32, torch.float64):
        return node
    return emit(prims.convert_element_type.default, node, torch.float32)


def gather(emit: Emitter, matrix: Node, dim: int, rows: Node) -> Node:
    if matrix.meta["val"].dim() == 2:
        return emit(aten.index.Tensor, matrix, [rows] if dim == 0 else [None, rows])
    features = other_dim(matrix, dim)
    width: Any = matrix.meta["val"].shape[features]
    width = width if isinstance(width, int) else emit(aten.sym_size.int, matrix, features)
    index = emit(aten.unsqueeze.default, rows, features)
    index = emit(aten.expand.default, index, [width if d == features else -1 for d in range(3)])
    return emit(aten.gather.default, matrix, dim, index)


def center(emit: Emitter, matrix: Node, mean: Node | None) -> Node:
    """The matrix without the mean of its rows, in float32; as it is without one."""
    return matrix if mean is None else emit(aten.sub.Tensor, as_float32(emit, matrix), mean)


def like(emit: Emitter, node: Node, other: Node) -> Node:
    """In the other node's type."""
    dtype = other.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else emit(prims.convert_element_type.default, node, dtype)


def contract(emit: Emitter, matrix: Node, dim: int, to: int) -> Node:
    """Transpose if needed so that the contracted dimension ``dim`` becomes dimension ``to``."""
    rank = matrix.meta["val"].dim()
    return matrix if dim == to else emit(aten.permute.default, matrix, [*range(rank - 2), rank - 1, rank - 2])

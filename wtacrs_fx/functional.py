"""The products that rewritten modules call in eager mode: ``torch.ops.wtacrs.linear`` and ``.matmul``.

Autograd keeps rows of an operand that were chosen beforehand, in place of the operand, and what the other gradients need.
The rows come from :class:`RowSampler`, so that products that share an input share one draw. Without rows a product is the
exact one. In the forward nothing is known of the gradient: the importance of a row is its norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import wtacrs_fx.ops  # noqa: F401  (registers select_rows and draw_seed)
from wtacrs_fx.config import Config
from wtacrs_fx.passes.policy import ceil_share, ratio_fraction, too_small
from wtacrs_fx.private import autocast_cast as _cast
from wtacrs_fx.private import torch_c

wtacrs = torch.ops.wtacrs


@torch.library.custom_op("wtacrs::keep_rows", mutates_args=())
def keep_rows(matrix: Tensor, seed: Tensor, stream: int, k: int, estimator: str) -> tuple[Tensor, Tensor]:
    """Sampled rows of a matrix with their scales applied: ``kept_j = scale_j matrix[row_j]``.

    Then ``sum_j kept_j g[row_j]^T`` has the mean ``sum_i matrix_i g_i^T`` for every g that does not depend on the draw.
    The importance is the Euclidean norm of a row; see :mod:`wtacrs_fx.estimators` (Liu et al., section 3).

    Args:
        matrix: [..., M, D], floating point. Every matrix of the leading dimensions is a draw of its own.
        seed, stream, k, estimator: as in ``select_rows``.

    Returns:
        (kept [..., min(k, M), D] of the matrix's dtype, row index int64 [..., min(k, M)]). Not differentiable.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    importance = torch.linalg.vector_norm(matrix, dim=-1, dtype=wide)
    rows, scale = wtacrs.select_rows(importance, seed, stream, k, estimator)
    kept = _rows_of(matrix, rows).to(wide) * scale.unsqueeze(
        -1
    )  # a scale rounded to bfloat16 would bias every row alike
    return kept.to(matrix.dtype), rows


@keep_rows.register_fake
def _(matrix: Tensor, seed: Tensor, stream: int, k: int, estimator: str) -> tuple[Tensor, Tensor]:
    *batch, m, width = matrix.shape
    n = torch.sym_min(k, m)
    return matrix.new_empty((*batch, n, width)), matrix.new_empty((*batch, n), dtype=torch.int64)


@torch.library.custom_op("wtacrs::linear", mutates_args=())
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, kept: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """``Z = input weight^T + bias``, with a weight gradient from sampled rows.

    ``grad_weight = G[rows]^T kept``, G [M, O] being the gradient of Z; ``grad_input = G weight`` and ``grad_bias = sum_i G_i``
    are exact. Autograd keeps ``kept`` and ``rows`` if the weight, and the weight if the input needs a gradient. Without
    ``kept`` the input is kept and everything is exact. It is differentiable once. Source: Liu et al., section 3.2.

    Args:
        input: [..., D], M rows in all. weight: [O, D]. bias: broadcastable to [..., O], or None.
        kept, rows: [k, D] and int64 [k] from ``keep_rows(input.reshape(M, D), ...)``, or None.

    Returns: [..., O].
    """
    return nn.functional.linear(input, weight, bias)


@torch.library.custom_op("wtacrs::matmul", mutates_args=())
def matmul(
    left: Tensor,
    right: Tensor,
    kept_left: Tensor | None = None,
    rows_left: Tensor | None = None,
    kept_right: Tensor | None = None,
    rows_right: Tensor | None = None,
) -> Tensor:
    """``Z = left @ right``, with gradients from sampled rows of one operand or of both.

    ``grad_right = left^T G`` contracts over the rows of ``left``: with ``kept_left`` it is ``kept_left^T G[rows_left]``.
    ``grad_left = G right^T`` contracts over the columns of ``right``: with ``kept_right``, sampled rows of ``right^T``, it is
    ``(kept_right^T G^T[rows_right])^T``. Autograd keeps the sampled rows where they are given, else the operand.

    Args:
        left, right: as for ``torch.matmul``.
        kept_left, rows_left: [k, D] and int64 [k], a draw from ``left`` flattened to a matrix (then ``right`` is [D, N]), or
            [..., k, D] and [..., k], a draw per matrix (then both operands have the same leading dimensions); or None.
        kept_right, rows_right: the same for ``right.mT``.

    Returns: as ``torch.matmul``.
    """
    return torch.matmul(left, right)


@linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Any = None, kept: Any = None, rows: Any = None) -> Tensor:
    return nn.functional.linear(input, weight, bias)


@matmul.register_fake
def _(left: Tensor, right: Tensor, *rows: Any) -> Tensor:
    return torch.matmul(left, right)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, kept, rows = inputs
    ctx.bias_shape = None if bias is None else bias.shape
    for_input, for_weight = ctx.needs_input_grad[:2]
    h = (input if kept is None else kept) if for_weight else None
    ctx.save_for_backward(weight if for_input else None, h, rows if for_weight else None)


@once_differentiable
def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, h, rows = ctx.saved_tensors
    for_input, for_weight = ctx.needs_input_grad[:2]
    for_bias = ctx.bias_shape is not None and ctx.needs_input_grad[2]
    grad_weight = None
    if for_weight:
        matrices = torch.atleast_2d(h), torch.atleast_2d(grad)
        grad_weight = _contract(matrices[0], rows, matrices[1], (h.shape[-1], grad.shape[-1])).mT
    return (
        grad @ weight.conj() if for_input else None,
        grad_weight,
        grad.sum_to_size(ctx.bias_shape) if for_bias else None,
        None,
        None,
    )


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left, right, kept_left, rows_left, kept_right, rows_right = inputs
    ctx.shapes = left.shape, right.shape
    for_left, for_right = ctx.needs_input_grad[:2]
    of_left = ((left, None) if kept_left is None else (kept_left, rows_left)) if for_right else (None, None)
    of_right = ((right, None) if kept_right is None else (kept_right, rows_right)) if for_left else (None, None)
    ctx.save_for_backward(*of_left, *of_right)


@once_differentiable
def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    left, rows_left, right, rows_right = ctx.saved_tensors
    left_shape, right_shape = ctx.shapes
    # A vector is a matrix with one row on the left, with one column on the right.
    matrix_left = left_shape if len(left_shape) > 1 else (1, *left_shape)
    matrix_right = right_shape if len(right_shape) > 1 else (*right_shape, 1)
    grad = grad.unsqueeze(-1) if len(right_shape) == 1 else grad
    grad = grad.unsqueeze(-2) if len(left_shape) == 1 else grad
    grad_left = grad_right = None
    if right is not None:
        h = right if rows_right is not None else right.reshape(matrix_right).mT
        transposed = (*matrix_left[:-2], matrix_left[-1], matrix_left[-2])
        grad_left = _contract(h, rows_right, grad.mT, transposed).mT.reshape(left_shape)
    if left is not None:
        h = left if rows_left is not None else left.reshape(matrix_left)
        grad_right = _contract(h, rows_left, grad, matrix_right).reshape(right_shape)
    return grad_left, grad_right, None, None, None, None


def _contract(h: Tensor, rows: Tensor | None, grad: Tensor, shape: Any) -> Tensor:
    """``H^T G`` of a given shape: exact if ``rows`` is None, else h holds the kept rows of H. Where the result is
    two-dimensional, all leading dimensions are rows."""
    if len(shape) == 2:
        h, grad = h.flatten(0, -2), grad.flatten(0, -2)
    if rows is not None:
        grad = _rows_of(grad, rows)
    return (h.mT.conj() @ grad).sum_to_size(*shape)


def _rows_of(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix[..., rows, :]``: [..., M, D] and [..., k] -> [..., k, D]."""
    if rows.dim() == 1:
        return matrix.index_select(0, rows)
    return matrix.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, matrix.shape[-1]))


linear.register_autograd(_linear_backward, setup_context=_save_linear)
matmul.register_autograd(_matmul_backward, setup_context=_save_matmul)


def _register_autocast() -> None:
    """Under autocast cast all operands and rows first, so that the low-precision copies are kept, as with torch's linear."""
    library = torch.library.Library("wtacrs", "FRAGMENT")
    keys = torch_c.DispatchKeySet(torch_c.DispatchKey.AutocastCPU) | torch_c.DispatchKeySet(
        torch_c.DispatchKey.AutocastCUDA
    )

    def implement(op: Any, device: str) -> Any:
        def kernel(*args: Any) -> Any:
            with torch_c._ExcludeDispatchKeyGuard(keys):
                return op(*_cast(args, device, torch.get_autocast_dtype(device)))

        return kernel

    for op in (wtacrs.linear.default, wtacrs.matmul.default):
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(op, implement(op, device), key)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []
"""Registrations last as long as their library object."""

_register_autocast()


def refuse_tracing(operand: Any) -> None:
    """Raise TypeError inside of ``torch.fx.symbolic_trace``, which cannot follow what depends on sizes and on training."""
    if isinstance(operand, torch.fx.Proxy):
        raise TypeError(
            "symbolic_trace does not go through modules that were rewritten or swapped already. Trace the model they were "
            "made of; wtacrs_fx.restore_linears(model) undoes swap_linears."
        )


class RowSampler(nn.Module):
    """Draws the rows of one operand that stand in for it in the backward.

    ``forward(operand, *partners)`` returns ``(kept, rows)`` for ``torch.ops.wtacrs.linear`` or ``.matmul``, or
    ``(None, None)`` where the product is exact: in eval mode, without gradients, if no partner (the other factor, usually a
    weight) needs one, and for operands that are no real floating-point matrix or smaller than ``min_rows`` and ``min_bytes``.
    A partner with two dimensions shares its gradient among all rows, which are one draw; with more, the leading dimensions
    must agree and every matrix has a draw of its own. No parameters, no state.

    Args:
        config: ratio, estimator, min_rows, min_bytes and seed.
        columns: sample the columns of the operand (the right factor of a product) and not its rows.
        module: whose ratio it is, where they differ by module.

    Raises: ValueError, for ``row_bits``: autograd keeps what the products are given, and they are given plain rows.
    """

    def __init__(self, config: Config, columns: bool = False, module: str = "") -> None:
        if config.row_bits is not None:
            raise ValueError(
                f"row_bits={config.row_bits}: rewrite() and swap_linears() keep rows as they are; use "
                'torch.compile(model, backend="wtacrs") or rewrite_joint() for rounded rows, or row_bits=None.'
            )
        super().__init__()
        self.config, self.columns = config, columns
        self.ratio = config.ratio_of(module) or 1.0
        self.share = ratio_fraction(self.ratio).as_integer_ratio()

    def forward(self, operand: Tensor, *partners: Tensor) -> tuple[Tensor | None, Tensor | None]:
        refuse_tracing(operand)
        matrix = self._matrix(operand, partners) if self.wanted(*partners) else None
        if matrix is None or not matrix.is_floating_point():
            return None, None
        nbytes = matrix.numel() * matrix.element_size()
        if self.ratio == 1 or too_small(matrix.shape[-2], nbytes, self.config):
            return None, None
        with torch.no_grad():
            seed = wtacrs.draw_seed(matrix.device, self.config.seed)
            k = ceil_share(matrix.shape[-2], self.share)
            kept, rows = wtacrs.keep_rows(matrix, seed, 0, k, self.config.estimator)
            if torch.is_autocast_enabled(kept.device.type):
                kept = kept.to(torch.get_autocast_dtype(kept.device.type))
        return kept, rows

    def wanted(self, *partners: Tensor) -> bool:
        """Whether a gradient will be asked for, of which rows can be an estimate."""
        return self.training and torch.is_grad_enabled() and any(p.requires_grad for p in partners)

    def _matrix(self, operand: Tensor, partners: tuple[Tensor, ...]) -> Tensor | None:
        if operand.dim() < 2 or operand.layout is not torch.strided:
            return None
        h = operand.detach()
        h = h.mT if self.columns else h
        if partners[0].dim() == 2:
            return h.flatten(0, -2)
        return h if partners[0].shape[:-2] == h.shape[:-2] else None

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, estimator={self.config.estimator!r}" + ", columns" * self.columns

"""What early draws would know of the rows of a batch that is measured on: norms of gradients, padding, the mean row."""

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_fx.config import Config
from wtacrs_fx.directions import limit
from wtacrs_fx.norms import NormSource, Rows, floored
from wtacrs_fx.sample_ids import given
from wtacrs_fx.tracing import Batch


class Guess:
    """Knowledge of rows for :class:`wtacrs_fx.meter.Meter`, which has no running state of its own.

    A norm source that is an object and has seen the model is asked. Otherwise its place is taken by the mean over the *other*
    sequences of the batch at the same position, ``n_st^2 = sum_(s' != s) |g_s't|^2 / (B - 1)``: what ``norms="position"`` knows
    after few batches, and ``norms="sample"`` of examples not seen yet; both come to know more. Rows of padding have
    probability zero where their gradients are.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.sequences = 0
        self._mask: Tensor | None = None

    def begin(self, model: nn.Module, batch: Batch, sequences: int) -> None:
        """A batch of so many sequences. Raises ValueError: it has no argument of the name that is the option ``padding``."""
        self.sequences, self._mask = sequences, None
        if self.config.padding is not None:
            arguments = _arguments(model, batch)
            value = arguments.get(self.config.padding)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"padding={self.config.padding!r}: no such tensor in the batch. Its arguments are {', '.join(arguments)}."
                )
            self._mask = value.reshape(-1) != 0

    def mask(self, modules: Sequence[str], rows: int) -> Tensor | None:
        """bool [M], False where rows of these modules are padding; None if nothing says so."""
        excluded = any(fnmatch.fnmatchcase(m, p) for m in modules for p in self.config.padding_exclude)
        return None if excluded or self._mask is None or self._mask.numel() != rows else self._mask

    def rest(self, h: Tensor, modules: Sequence[str]) -> Tensor:
        """What is sampled of a float32 input [M, D]: the rest without the mean row (rows of padding left out) and the principal
        directions, where the options ask for that."""
        directions = limit(self.config.directions, h.shape[1])
        if not (self.config.center_rows or directions):
            return h
        mask = self.mask(modules, len(h))
        mean = h.mean(0, keepdim=True) if mask is None else h[mask].mean(0, keepdim=True).nan_to_num()
        rest = h - mean
        if directions:
            weight = None if mask is None else mask.to(h.dtype)
            basis = torch.ops.wtacrs.principal_directions(h, mean, weight, directions)
            rest = rest - rest @ basis.T @ basis
        return rest

    def squared_norms(self, key: str, squares: Tensor, modules: Sequence[str]) -> Tensor | None:
        """What is known of the squared norms of a site's gradient rows [M] before they are ``squares``; None: nothing."""
        source, mask = self.config.norms, self.mask(modules, len(squares))
        if isinstance(source, NormSource):
            ids = given.get()
            rows = Rows(
                len(squares), len(squares) // self.sequences, squares.device, None if ids is None else ids.ids, mask
            )
            source.begin((), rows.ids)  # (which refuses ids that cannot be right, as in a forward)
            known = source.read(key, rows)
            if known is not None:
                return known.double().square()
        elif source == "activation":
            return None
        return others(squares, self.sequences, mask)

    def importance(
        self, h_norms: Tensor, found: Sequence[tuple[Tensor, Tensor | None]], modules: Sequence[str]
    ) -> Tensor:
        """Importance [M] of the rows of an early draw, as :meth:`wtacrs_fx.norm_state.RowState.importance` makes it.

        Args: h_norms [M]; found: for every site of the draw the squared norms of its gradient rows, and what is known of them.
        """
        mask = self.mask(modules, len(h_norms))
        if mask is not None and any(bool((squares[~mask] > 0).any()) for squares, _ in found):
            mask = None  # (rows of padding that have gradients: the option is refused for them)
        known = [k for _, k in found if k is not None]
        w = h_norms * floored(torch.stack(known).sum(0).sqrt(), mask) if known else h_norms
        return w if mask is None else torch.where(mask, w, 0.0)


def others(squares: Tensor, sequences: int, mask: Tensor | None) -> Tensor:
    """Mean over the other sequences at every row's position, [M]; where all others are padding the mean of all rows."""
    table = squares.view(sequences, -1)
    valid = torch.ones_like(table) if mask is None else mask.view_as(table).to(table.dtype)
    count = valid.sum(0) - valid
    mean = ((table * valid).sum(0) - table * valid).clamp(min=0) / count.clamp(min=1)
    usual = (table * valid).sum() / valid.sum().clamp(min=1)
    return torch.where(count > 0, mean, usual).reshape(-1)


def _arguments(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    """The batch's tensors by the names that the model's forward has for them."""
    if isinstance(batch, Mapping):
        return batch
    args = (batch,) if isinstance(batch, Tensor) else batch
    return inspect.signature(model.forward).bind(*args).arguments

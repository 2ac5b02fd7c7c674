"""Which training examples a batch holds: told before the forward, or carried through a data loader."""

import contextvars
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

KEY = "sample_ids"
"""Key of the ids in a batch."""


class Given:
    """Ids in force, and how long."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.once = True
        """Whether each graph may use them once only (a call, not a context): the next batch is then not taken for this one."""
        self.used: set[object] = set()

    def take(self, graph: object) -> tuple[int, ...] | None:
        """The ids for one run of a graph."""
        if self.once and graph in self.used:
            return None
        self.used.add(graph)
        return self.ids


given: contextvars.ContextVar[Given | None] = contextvars.ContextVar("wtacrs_sample_ids", default=None)


class sample_ids:
    """Say which training examples the next batch holds, for ``norms="sample"``.

    ``with wtacrs_fx.sample_ids(ids): loss = model(**batch)`` holds for every forward inside. As a call,
    ``wtacrs_fx.sample_ids(ids)``, it holds for the next forward. Backwards may come later, in any order.

    Args:
        ids: one index of the training set per example of the batch, all different; a sequence of ints or an integer tensor (on
            the CPU: reading one from a GPU waits for it).

    Raises:
        TypeError: something else. ValueError: an id is repeated or negative. In the forward, before the step: their number is
            not that of the batch, or one is out of range.
    """

    def __init__(self, ids: Sequence[int] | Tensor) -> None:
        self._given = Given(_checked(ids))
        self._before = given.get()
        given.set(self._given)

    def __enter__(self) -> "sample_ids":
        self._given.once = False
        return self

    def __exit__(self, *_: object) -> None:
        given.set(self._before)


def _checked(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"sample_ids: a tensor of {ids.dtype}; expected integers, one index per example.")
        ids = ids.flatten().tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"sample_ids: {ids!r}; expected a sequence of integers, one index per example.")
    found = tuple(int(i) if hasattr(i, "__index__") and not isinstance(i, bool) else i for i in ids)
    if wrong := [i for i in found if not isinstance(i, int) or isinstance(i, bool)]:
        raise TypeError(f"sample_ids: {wrong[0]!r} is no integer; expected one index of the training set per example.")
    if not found:
        raise ValueError("sample_ids: no ids; expected one index of the training set per example of the batch.")
    if negative := [i for i in found if i < 0]:
        raise ValueError(f"sample_ids: {negative[:5]} out of range; indices of the training set begin with 0.")
    if len(set(found)) < len(found):
        repeated = sorted({i for i in found if found.count(i) > 1})
        raise ValueError(
            f"sample_ids: {repeated[:5]} repeated; a batch holds every example once. Without an id of its own an example "
            "cannot be told from another: leave the ids of this batch out, or give copies ids of their own."
        )
    return found


class WithSampleIds:
    """A map-style dataset whose examples, which are dicts, have their index under the key "sample_ids".

    Args: dataset, with ``__len__`` and ``__getitem__``, such as one of Hugging Face's.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], KEY: int(index)}


class SampleIdsCollator:
    """A collator that takes the key "sample_ids" out of the examples and puts the batch's ids back in, as a list of ints
    (which stays on the host where batches are moved to a device).

    Args: collate, what makes a batch of a list of examples without that key, such as ``DataCollatorWithPadding(tokenizer)``.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        if missing := [i for i, e in enumerate(examples) if KEY not in e]:
            raise KeyError(
                f"example {missing[0]} of the batch has no {KEY!r}: wrap the dataset, wtacrs_fx.WithSampleIds(dataset)."
            )
        batch = self.collate([{k: v for k, v in e.items() if k != KEY} for e in examples])
        batch[KEY] = [int(e[KEY]) for e in examples]
        return batch


class SampleIdsTrainer:
    """Mixin for ``transformers.Trainer``: hands the batch's ids over, and keeps them from the model's ``forward``.

    ``class MyTrainer(wtacrs_fx.SampleIdsTrainer, Trainer): pass``, with ``train_dataset=wtacrs_fx.WithSampleIds(dataset)`` and
    ``data_collator=wtacrs_fx.SampleIdsCollator(collator)``.
    """

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = inputs.pop(KEY, None)
        step = super().training_step  # type: ignore[misc]
        if ids is None:
            return step(model, inputs, *args, **kwargs)
        with sample_ids(ids):
            return step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop(KEY, None)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        """The Trainer drops columns that ``forward`` does not know, before they reach the collator; not this one."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns
        if columns is not None and KEY not in columns:
            self._signature_columns = [*columns, KEY]

    _signature_columns: list[str] | None

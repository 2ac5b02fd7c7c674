"""A callback for Hugging Face's Trainer: what is kept for the backward, and the memory that was measured, in its logs."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from wtacrs_fx.backend import Backend, ledgers
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.measure import resident_peak_bytes

MIB = 2**20


class WtacrsCallback(TrainerCallback):
    """Adds to every log of the Trainer, beside the loss::

        wtacrs_saved_mib, wtacrs_saved_exact_mib   held for the backward, now and by exact training (all graphs)
        wtacrs_sites_sampled, wtacrs_sites_exact   weight-gradient products
        wtacrs_peak_mib                            measured: the CUDA allocator's peak, on a CPU the process's resident set

    The values are in ``trainer.state.log_history`` and in what is printed. Integrations that were made before it (TensorBoard,
    Weights & Biases) are called before it; ``trainer.callback_handler.callbacks.insert(0, WtacrsCallback())`` puts it first.

    Args:
        backend: whose graphs are counted. None: all that this process compiled while training, for ``backend="wtacrs"``.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend
        self._last: Ledger | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from here on."""
        self._last = next(reversed(ledgers()), None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the log that was just written."""
        found = self.backend.ledgers if self.backend else since(self._last, ledgers())
        values = totals(found)
        if logs is not None:
            logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)


def since(last: Ledger | None, found: Sequence[Ledger]) -> Sequence[Ledger]:
    """What was found behind ``last``; all of it, where that is too old to be among them."""
    behind = (i + 1 for i, x in enumerate(found) if x is last)
    return found[next(behind, 0) :]


def totals(found: Sequence[Ledger]) -> dict[str, float]:
    """Sums over the graphs of a model, the latest of each where one was compiled several times (for other sizes)."""
    latest = {tuple(sorted({e.module for e in x.entries})): x for x in found}.values()
    exact = sum(x.count("exact") for x in latest)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak_bytes()
    return {
        "wtacrs_saved_mib": round(sum(x.saved_bytes for x in latest) / MIB, 3),
        "wtacrs_saved_exact_mib": round(sum(x.saved_bytes_exact for x in latest) / MIB, 3),
        "wtacrs_sites_sampled": sum(len(x.entries) for x in latest) - exact,
        "wtacrs_sites_exact": exact,
        "wtacrs_peak_mib": round(peak / MIB, 1),
    }

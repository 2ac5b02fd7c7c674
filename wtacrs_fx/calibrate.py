"""``wtacrs_fx.calibrate``: how many rows each layer should keep, measured on a few batches."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from wtacrs_fx.choose import GRID, Calibration, Draw, choose
from wtacrs_fx.config import Config
from wtacrs_fx.errors import ReportError
from wtacrs_fx.meter import Meter
from wtacrs_fx.report import partition_ledger
from wtacrs_fx.tracing import Batch, FakeRun, can_train


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    ratio: float | None = None,
    noise: float | None = None,
    **options: Any,
) -> Calibration:
    """Measure on real batches how noisy each sampled weight gradient would be, and choose a ratio for each.

    The batches are run through the exact forward and backward in eager mode, so that they should be as small as fits: noise
    and the batch's own variance grow alike with the number of sequences. Nothing of the model changes but what its forward
    changes; gradients in ``.grad`` and the random generators are left as they are.

    With ``noise`` every layer gets the least ratio at which its added variance is at most that share of the variance that the
    batch itself gives to its weight gradient, estimated from the spread of the gradients of single sequences: what training
    tolerates anyhow (VCAS, ICLR 2024). Where that takes all rows, or the batches give no gradient at all, the layer stays
    exact. With ``ratio`` the bytes of keeping that share everywhere are spread over the layers for the least total variance
    (FLOPs in place of bytes where rows are chosen in the backward); 0.3 if neither is given.

    Rows that are chosen in the forward are chosen by what the options ``norms`` and ``padding`` let them know. The state of a
    norm source that is given as an object counts (with the ids of ``sample_ids``, if it asks for them); where it has none yet,
    and with ``norms`` given by name, the other sequences of the batch stand for it, see :class:`wtacrs_fx.guess.Guess`. What
    ``row_bits`` rounds is not measured.

    Args:
        model: in training mode, on its device.
        batches: a few, each as for :func:`wtacrs_fx.report`, with the same number of sequences, at least 2, as the first
            dimension of its tensors.
        ratio, noise: one of them.
        options: the other fields of :class:`wtacrs_fx.Config`, as they will be given to the backend.

    Raises:
        ReportError: no batches, fewer than two sequences, or nothing that is sampled.
        TypeError, ValueError: as Config does; also if both ``ratio`` and ``noise`` are given, or one is out of its range.
    """
    config = _config(ratio, noise, options)
    return choose(measured(model, batches, config), ratio=ratio or (0.3 if noise is None else 1.0), noise=noise)


def measured(model: nn.Module, batches: Iterable[Batch], config: Config) -> list[Draw]:
    """Of every draw: its noise at every ratio of the grid, and the batch's own, summed over the batches.

    Raises: ReportError: as :func:`calibrate`, which says what is measured.
    """
    with _uncompiled(model):
        meter, late = Meter(model, config), None
        for batch in batches:
            can_train(model, batch)
            meter.add(batch)
            if late is None:
                ledger = partition_ledger(FakeRun.of(model, batch), config)
                late = {e.module for e in ledger.entries if e.decision == "late"}
    if late is None:
        raise ReportError("batches is empty: give at least one batch to measure on.")
    if not meter.draws:
        raise ReportError(
            "nothing is sampled on these batches, so there is no ratio to choose: see min_rows, min_bytes, exclude."
        )
    for draw in meter.draws:
        draw.late = any(module in late for module in draw.modules)
    return meter.draws


def _config(ratio: float | None, noise: float | None, options: Mapping[str, Any]) -> Config:
    if ratio is not None and noise is not None:
        raise ValueError(f"ratio={ratio!r} and noise={noise!r}: give one of the two, a budget of rows or one of noise.")
    if noise is not None and (isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 < noise < 1e3):
        raise ValueError(f"noise={noise!r}: expected a share of the batch's own variance, such as 0.05.")
    if ratio is not None and not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio={ratio!r}: expected one number, the share of rows to spread over the layers.")
    if ratio is not None and 0 < ratio < GRID[0]:
        raise ValueError(f"ratio={ratio!r}: no layer is given less than {GRID[0]}; spread at least that.")
    config = Config.from_options({**options, "ratio": 0.3 if ratio is None or ratio == 1 else ratio})
    if config.attention:
        raise ValueError("attention=True: only weight gradients are measured; calibrate without it.")
    if config.estimator == "topk":
        raise ValueError("estimator='topk': it has a bias, which no share of the variance bounds; choose another one.")
    return config


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Without what ``model.compile()`` has put in the place of the model's forward."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled

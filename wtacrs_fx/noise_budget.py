"""Ratios that follow training: measured again now and then, and compiled anew where they have changed."""

from typing import Any

from torch import Tensor, nn

from wtacrs_fx.backend import Backend
from wtacrs_fx.calibrate import calibrate
from wtacrs_fx.choose import CHANGE, Calibration, differ
from wtacrs_fx.private import tree_leaves, tree_map_only
from wtacrs_fx.tracing import Batch


class NoiseBudget:
    """Keeps the noise of sampling below a share of the batch's own, while a model is trained::

        budget = wtacrs_fx.NoiseBudget(model, noise=0.05)
        for batch in loader:
            budget.step(batch)
            model(**batch).loss.backward()
            ...

    ``step`` compiles the model in place (``model.compile``) with the ratios that :func:`wtacrs_fx.calibrate` finds on the first
    sequences of the batch; afterwards it measures every ``every`` steps, and compiles again where a ratio has changed by more
    than a factor of ``1 + change``, ``recompilations`` times at most. The last measurement stays in ``calibration``.

    Args:
        model: in training mode, on its device.
        noise, ratio: as for ``calibrate``; one of them, ``noise=0.05`` if neither.
        every: steps between measurements.
        recompilations: beyond the first compilation.
        change: what a ratio must differ by, as a share of it.
        sequences: of a batch that are measured on, at least 2: one exact forward and backward of them, in eager mode.
        options: the other fields of :class:`wtacrs_fx.Config`.

    Raises: ValueError: every, sequences or recompilations out of their range; later what ``calibrate`` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        noise: float | None = None,
        ratio: float | None = None,
        every: int = 1000,
        recompilations: int = 3,
        change: float = CHANGE,
        sequences: int = 8,
        **options: Any,
    ) -> None:
        for name, value, least in (
            ("every", every, 1),
            ("recompilations", recompilations, 0),
            ("sequences", sequences, 2),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer of at least {least}.")
        self.model, self.options = model, options
        self.goal = {"noise": 0.05 if noise is None and ratio is None else noise, "ratio": ratio}
        self.every, self.left, self.change, self.sequences = every, recompilations, change, sequences
        self.steps = 0
        self.calibration: Calibration | None = None
        self.backend: Backend | None = None
        """Of the compiled model; its ledgers say what is kept."""

    def step(self, batch: Batch) -> bool:
        """To be called before the forward of every step. Returns whether the model was compiled anew."""
        due = self.steps % self.every == 0 and (self.backend is None or self.left > 0)
        self.steps += 1
        if not due:
            return False
        self.calibration = calibrate(self.model, [self._first(batch)], **self.goal, **self.options)
        ratios = self.calibration.ratios
        if self.backend is not None:
            if not differ(ratios, self._before(ratios), self.change):
                return False
            self.left -= 1
        self.backend = Backend(**{**self.options, "ratio": ratios})
        self.model.compile(backend=self.backend)
        return True

    def _first(self, batch: Batch) -> Batch:
        first = next(t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim())
        size = len(first)
        result: Batch = tree_map_only(Tensor, lambda t: t[: self.sequences] if t.dim() and len(t) == size else t, batch)
        return result

    def _before(self, ratios: dict[str, float]) -> dict[str, float]:
        assert self.backend is not None
        return {module: self.backend.config.ratio_of(module) or 1.0 for module in ratios}

"""From measured noise to ratios: what was measured of every draw, and which share of rows it gets for that."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from wtacrs_fx.config_checks import LEAST_SHARE
from wtacrs_fx.noise import allocate, smallest_within

GRID = (LEAST_SHARE, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Ratios at which noise is measured, and among which is chosen."""

CHANGE = 0.3
"""What a ratio must differ by, as a share of it, to be worth a compilation."""


@dataclass
class Draw:
    """The sites that read one input, and sums over the batches that were measured."""

    modules: tuple[str, ...]
    early: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(GRID))
    """Of all its sites: ``E|G' - G|^2`` for every ratio of the grid, with rows chosen by what is known in the forward."""
    true: list[float] = dataclasses.field(default_factory=lambda: [0.0] * len(GRID))
    """The same with rows chosen by ``|h_i| |g_i|``."""
    batch_noise: float = 0.0
    """Variance of the batch's own gradients."""
    norm: float = 0.0
    """``|G|^2``."""
    bytes: int = 0
    """Of the input."""
    flops: int = 0
    """Of the weight gradients."""
    late: bool = False
    """Whether rows are chosen in the backward."""

    @property
    def curve(self) -> list[float]:
        """What applies, of both kinds of noise."""
        return self.true if self.late else self.early


@dataclass(frozen=True)
class Layer:
    """What was decided for the layers that read one input."""

    modules: tuple[str, ...]
    decision: str
    ratio: float
    noise: float
    """Relative squared error of the weight gradient, ``E|G' - G|^2 / |G|^2``, at this ratio."""
    batch_noise: float
    """The same for the batch's own noise: what another batch would change."""

    @property
    def share(self) -> float:
        """Added variance over the batch's own."""
        return self.noise / self.batch_noise if self.batch_noise else 0.0 if not self.noise else float("inf")


@dataclass(frozen=True)
class Calibration:
    """Ratios for the option of that name, and why."""

    layers: tuple[Layer, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Module -> ratio, for ``options={"ratio": ...}``. Modules that are not named stay exact."""
        return {m: layer.ratio for layer in self.layers for m in layer.modules}

    def table(self) -> str:
        """One line per draw."""
        rows = [
            (
                layer.modules[0] + (f" and {len(layer.modules) - 1} more" if len(layer.modules) > 1 else ""),
                layer.decision,
                f"{layer.ratio:g}",
                f"{layer.noise:.2g}",
                f"{layer.batch_noise:.2g}",
                f"{layer.share:.3g}",
            )
            for layer in self.layers
        ]
        headers = ("layer", "decision", "ratio", "rel. squared error", "of the batch itself", "share")
        return tabulate(rows, headers, disable_numparse=True)


def choose(draws: Sequence[Draw], *, ratio: float, noise: float | None) -> Calibration:
    """The ratio of every draw from what was measured.

    Args:
        draws: what was measured.
        ratio: spread over the layers without ``noise``. In any case that of draws whose gradient was zero in every batch (of a
            LoRA's first factor, while the second is zero): they have shown nothing.
        noise: share of the batch's own.
    """
    shown = [i for i, m in enumerate(draws) if m.norm or any(m.curve)]
    chosen = dict.fromkeys(range(len(draws)), ratio)
    if noise is not None:
        chosen |= {i: smallest_within(draws[i].curve, GRID, noise * max(draws[i].batch_noise, 0.0)) for i in shown}
    else:
        for late in (False, True):
            some = [i for i in shown if draws[i].late is late]
            costs = [float(draws[i].flops if late else draws[i].bytes) for i in some]
            found = allocate([draws[i].curve for i in some], costs, GRID, ratio * sum(costs))
            chosen |= dict(zip(some, found))
    layers = []
    for i, m in enumerate(draws):
        size = max(m.norm, 1e-300)
        layers.append(
            Layer(
                modules=tuple(dict.fromkeys(m.modules)),
                decision="exact" if chosen[i] == 1 else "late" if m.late else "early",
                ratio=chosen[i],
                noise=m.curve[GRID.index(chosen[i])] / size if i in shown else 0.0,
                batch_noise=max(m.batch_noise, 0.0) / size,
            )
        )
    return Calibration(tuple(layers))


def differ(ratios: Mapping[str, float], before: Mapping[str, float], change: float) -> bool:
    """Whether a ratio has changed by more than a factor of ``1 + change``. Modules that were not there before had 1."""
    pairs = [(ratio, before.get(module, 1.0)) for module, ratio in ratios.items()]
    return any(max(a, b) > (1 + change) * min(a, b) for a, b in pairs)

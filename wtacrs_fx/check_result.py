"""What :func:`wtacrs_fx.check` has found: its table, its faults and its verdict."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from wtacrs_fx.layer_bytes import EAGER, LAYER, NO_LEDGER, SITE, TWICE, UNMATCHED, LayerBytes
from wtacrs_fx.ledger import Compressed
from wtacrs_fx.ledger_tables import compressed_table
from wtacrs_fx.units import format_bytes

MAX_NORMAL = 4.366
"""A mean further than this from the exact gradient, in units of a known standard error, is no chance: of 100 layers one in
about 800 checks has one. The standard error is itself estimated: see :func:`max_z`."""

SECOND_ORDER = 0.05
"""Squared bias in units of the squared noise of one draw that rounding may have: where one rounded tensor is two factors of
a product, and where fused attention reads rounded operands. More is a fault. Largest measured on two-layer models: see the
README."""

TOLERANCE = 1e-3
"""Relative, of gradients that no sample touches: rounding of another order of operations, in float32."""


def max_z(draws: int) -> float:
    """The bound of a z-score, as improbable by Student's t of ``draws - 1`` degrees of freedom as :data:`MAX_NORMAL` is by the
    normal distribution (approximation of Wallace, 1959, which is too wide below five draws): 5 at 40 draws, 18 at 6."""
    n = draws - 1
    return math.sqrt(n * math.expm1((MAX_NORMAL * (8 * n + 3) / (8 * n + 1)) ** 2 / n))


HEADERS = (
    "layer",
    "decision",
    "rows kept",
    "rel. squared error",
    "cosine",
    "bias along G",
    "squared bias",
    "z",
    "held (predicted)",
    "held (measured)",
)

OTHERS = {
    LAYER: "other tensors",
    UNMATCHED: "layers unknown",
    NO_LEDGER: "not predicted",
    EAGER: "not predicted",
    TWICE: "counted twice",
}
"""What the table says of rows that are no gradient's."""


@dataclass(frozen=True)
class Layer:
    """A sampled weight gradient, or any gradient where tensors are rounded, over all draws."""

    module: str
    """Of a sampled product; of any other gradient the parameter."""
    decision: str
    """"early" or "late"; of a parameter that is no sampled product's "rounded", or "attention" where its noise is there."""
    kept: str
    error: float
    """Mean of ||G' - G||^2 / ||G||^2, for G' a draw and G the exact gradient."""
    cosine: float
    """Mean of the cosine of the angle between G' and G."""
    z: float
    """Of the bias along G: in units of its standard error."""
    bias: float
    """Along G: mean of <G', G> / ||G||^2 - 1, which is 0 if G' is unbiased."""
    squared_bias: float
    """||E[G'] - G||^2 / ||G||^2, from the scalar product of the means of both halves of the draws, whose mean has no share
    of the noise; it may come out negative."""
    digits: float = 0.0
    """||G'' - G||^2 / ||G||^2, for G'' exact with other last digits: what floating point alone changes, most in 16 bits."""

    @property
    def standard_error(self) -> float:
        """Of the bias along G."""
        return self.bias / self.z if self.z else 0.0


@dataclass(frozen=True)
class Check:
    """What was measured, and the verdict."""

    layers: tuple[Layer, ...]
    draws: int
    saved_bytes: int
    """What autograd held for the compiled model."""
    predicted_bytes: int
    """By the ledgers of all graphs that ran."""
    saved_bytes_exact: int
    """What it held for the same model compiled exactly."""
    predicted_bytes_exact: int
    untouched: float
    """Largest relative difference of a gradient that should be exact."""
    tolerance: float = TOLERANCE
    """Bound of ``untouched``."""
    rounded: bool = False
    """Whether tensors are rounded: then every gradient is a layer here, and a bias of second order is no fault."""

    padding: str | None = None
    """The option of that name."""
    refused: tuple[str, ...] = ()
    """Sites whose rows of padding have gradients."""
    held: tuple[LayerBytes, ...] = ()
    """Where ``saved_bytes`` and ``predicted_bytes`` come from: the sums of what is known of each row."""
    held_exact: tuple[LayerBytes, ...] = ()
    tensors: tuple[Compressed, ...] = ()
    """Those that are rounded, with the error of one draw."""

    @property
    def bound(self) -> float:
        """Of the z-scores."""
        return max_z(self.draws)

    @property
    def faults(self) -> list[str]:
        """What is wrong; empty if nothing is."""
        found = []
        biased = [layer.module for layer in self.layers if self._is_biased(layer)]
        if biased:
            found.append(f"the mean gradient is off (|z| > {self.bound:.3g}) in {', '.join(biased)}")
        if self.untouched > self.tolerance:
            found.append(f"a gradient that should be exact differs by {self.untouched:.1e} of its norm")
        for arm, total, predicted, rows in self._arms():
            off = [f"{r.name} ({r.measured} B for {r.predicted} B)" for r in rows if r.difference]
            if off:
                found.append(f"the bytes held, {arm}, are not the predicted ones in {', '.join(off)}")
            elif total != predicted + sum(r.measured or 0 for r in rows if r.predicted is None and r.kind != UNMATCHED):
                found.append(f"the bytes held, {arm}, are not the predicted ones")
        if self.refused:
            found.append(
                f"padding={self.padding!r} is refused, since rows of padding have gradients, in {', '.join(self.refused)} "
                "(name them in padding_exclude)"
            )
        return found

    def _is_biased(self, layer: Layer) -> bool:
        forgiven = max(SECOND_ORDER * layer.error if self.rounded else 0.0, layer.digits)
        return abs(layer.z) > self.bound and layer.bias**2 >= forgiven

    def _arms(self) -> list[tuple[str, int, int, tuple[LayerBytes, ...]]]:
        """(name, measured, predicted, by layer)"""
        return [
            ("exact", self.saved_bytes_exact, self.predicted_bytes_exact, self.held_exact),
            ("sampled", self.saved_bytes, self.predicted_bytes, self.held),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: the fields, the faults and the verdict."""
        return {**dataclasses.asdict(self), "faults": self.faults, "verdict": self.verdict()}

    def table(self) -> str:
        """A line per gradient with the bytes of its input, one per layer for all else, the sums, and the verdict."""
        sites = {r.name: r for r in self.held if r.kind == SITE}
        rows: list[tuple[str, ...]] = [
            (
                x.module,
                x.decision,
                x.kept,
                f"{x.error:.2g}",
                f"{x.cosine:.3f}",
                f"{x.bias:+.1e} ± {x.standard_error:.0e}",
                f"{x.squared_bias:+.0e}",
                f"{x.z:+.1f}",
                *_cells(sites.get(x.module)),
            )
            for x in self.layers
        ]
        blank = ("",) * (len(HEADERS) - 4)
        rows += [(r.name, OTHERS[r.kind], *blank, *_cells(r)) for r in self.held if r.kind != SITE]
        text = tabulate(rows, HEADERS, disable_numparse=True)
        for name, measured, predicted, held in self._arms():
            text += (
                f"\nsaved for backward, {name}: measured {format_bytes(measured)} ({measured} B), "
                f"predicted {format_bytes(predicted)} ({predicted} B)"
            )
            rest = [f"{r.measured} B {r.name}" for r in held if r.predicted is None and r.kind != UNMATCHED]
            text += f", and apart from that {', '.join(rest)}" * bool(rest)
        if self.tensors:
            text += f"\n\n{compressed_table(self.tensors)}\n"
        return f"{text}\n{self.verdict()}"

    def verdict(self) -> str:
        """In plain words."""
        if self.faults:
            return f"Not as it should be: {'; '.join(self.faults)}."
        worst = max(self.layers, key=lambda x: abs(x.z))
        share = self.saved_bytes / max(1, self.saved_bytes_exact)
        bytes_ = f"bytes as predicted ({share:.2f} of exact training's){self._caveats()}"
        if abs(worst.z) <= self.bound:
            kind = "sampled or rounded" if self.rounded else "sampled"
            return (
                f"As it should be: {len(self.layers)} {kind} gradients without bias in {self.draws} draws (largest |z| "
                f"{abs(worst.z):.1f}, bound {self.bound:.3g}), the others exact, {bytes_}."
            )
        seen = [x for x in self.layers if abs(x.z) > self.bound]
        largest = max(seen, key=lambda x: x.bias**2 / x.error)
        return (
            f"As it should be: of {len(self.layers)} sampled or rounded gradients {len(seen)} have a bias, of second order or "
            f"of floating point, that {self.draws} draws can tell, at most {abs(largest.bias / largest.error**0.5):.2g} of the "
            f"noise of one draw ({largest.bias:+.1e} of {largest.module}), {bytes_}."
        )

    def _caveats(self) -> str:
        """What "bytes as predicted" leaves out."""
        rows = [r for _, _, _, rows in self._arms() for r in rows]
        text = ", only in all where a graph's tensors are others" * any(r.kind == UNMATCHED for r in rows)
        rest = sum(r.measured or 0 for r in self.held if r.kind in (NO_LEDGER, EAGER))
        return text + (f", but for {format_bytes(rest)} that nothing predicts" if rest else "")


def _cells(row: LayerBytes | None) -> tuple[str, str]:
    """Of the columns "held": where the measured differs, by how much."""
    if row is None:
        return "", ""
    predicted = "unknown" if row.predicted is None else format_bytes(row.predicted)
    measured = "unknown" if row.measured is None else ("-" * (row.measured < 0) + format_bytes(abs(row.measured)))
    return predicted, measured + (f" ({row.difference:+d} B)" if row.difference else "")

"""The ledger: what is saved for the backward at every site, before and now, and why."""

import csv
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from wtacrs_fx import ledger_tables
from wtacrs_fx.units import format_bytes

LEVELS = ("site", "layer", "tensor", "summary")
"""Of :meth:`Ledger.table`."""


@dataclass(frozen=True)
class Entry:
    """One site."""

    module: str
    op: str
    shape: tuple[int | str, ...]
    """Of the activation whose rows are sampled."""
    dtype: str
    rows: int | str
    """Rows in all (M)."""
    kept: int | str
    """Rows that the weight gradient is computed from; equal to ``rows`` if exact."""
    bytes_exact: int
    """Bytes of the input held for the backward by the exact partition; 0 if not saved, or counted at another site."""
    bytes_now: int
    """Bytes of the input, or of its kept rows and their indices, held by this partition."""
    decision: str
    """"early", "late" or "exact"."""
    reason: str
    bits: int | None = None
    """In which kept rows are stored; None: as the input's type has it, or no rows are stored."""
    flops_saved: int = 0
    """By the rows that the weight gradient is not computed from (0 in graphs of the standalone pass)."""


@dataclass(frozen=True)
class Saved:
    """A tensor that is held for the backward by eager autograd, by the exact partition or by this one."""

    module: str
    """The module that computes it; empty for the batch and what the root computes itself."""
    op: str
    """The function or module type that computes it; in eager autograd the operation."""
    shape: tuple[int | str, ...]
    dtype: str
    bytes_eager: int = 0
    bytes_exact: int = 0
    """Of its storage, counted once; 0 where it is not saved (it is recomputed, or not needed)."""
    bytes_now: int = 0
    """Of its storage, or of its kept rows and their indices."""
    kept: str = ""
    """Rows of it that its weight gradients are computed from, of how many: "39/128"; empty if it is no sampled input."""
    needed_by: tuple[str, ...] = ()
    """What else in the backward of the exact partition reads it, as functions of the forward: "gelu", "LayerNorm"."""
    decision: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Handed:
    """A tensor that the forward graph hands to the backward graph."""

    tensor: int
    """Its line in :attr:`Ledger.tensors`; -1 without one: a parameter or buffer, or a view of what another line counts."""
    site: str
    """Module of the first weight-gradient product that reads it or its kept rows; empty if none does."""
    shape: tuple[int | str, ...]
    dtype: str
    bytes: int
    """Of its storage; 0 where an earlier one shares it, and of parameters and buffers."""


@dataclass(frozen=True)
class Compressed:
    """A tensor that the backward is given in fewer bits."""

    tensor: str
    """Its name in the graph."""
    module: str
    """Where it is made."""
    op: str
    shape: tuple[int | str, ...]
    dtype: str
    bits: int
    """1: a mask, packed without loss; 8, 4, 2: rounded."""
    bytes_exact: int
    """Bytes of the tensor as it is."""
    bytes_now: int
    """Bytes of its codes and scales."""
    readers: tuple[str, ...]
    """Operations of the backward that read it."""
    error: float | None = None
    """``|X' - X|^2 / |X|^2`` of one draw, where :func:`wtacrs_fx.check` has measured it."""


@dataclass(frozen=True)
class Part:
    """A segment of the forward, and whether the backward computes it again."""

    name: str
    decision: str
    """"keep" or "recompute"."""
    kept: tuple[str, ...]
    """Tensors of a recomputed segment that are saved all the same."""
    flops_added: int
    """Of its matrix products that the backward runs again."""
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """What the model of memory and time says about a partition."""

    peak: int
    """Largest sum of live bytes of a step: activations, gradients of activations and temporaries; parameters and
    gradients of parameters left out."""
    allocated: int
    """The same with the gradients of parameters: what an allocator sees above what was there before the step."""
    seconds: float
    """Time of a step by the device's roofline; only ratios are meant."""
    flops: int


@dataclass(frozen=True)
class Ledger:
    """All sites of one training graph and what autograd holds for it in all.

    ``saved_bytes`` and ``saved_bytes_exact`` count each storage once; parameters and buffers are left out, graph inputs
    that the backward needs (token ids, masks) are in.
    """

    entries: tuple[Entry, ...]
    saved_bytes_exact: int
    saved_bytes: int
    predicted_exact: Prediction | None = None
    predicted: Prediction | None = None
    parts: tuple[Part, ...] = ()
    """Segments, where a memory budget was asked for."""
    recomputed: int = 0
    """Operations of the forward that the backward is told to compute again: by the plan for the memory budget, and by the
    user's own checkpoint regions. (The partitioner adds cheap ones of its own.)"""
    tensors: tuple[Saved, ...] = ()
    """Everything that is held; the sums over their bytes are the totals."""
    saved_bytes_eager: int | None = None
    """What eager autograd saves; None but in a report, since compiling a model does not tell."""
    predicted_eager: Prediction | None = None
    notes: tuple[str, ...] = ()
    """What a report has to say beside its figures."""
    compressed: tuple[Compressed, ...] = ()
    handed: tuple[Handed, ...] = ()
    """What autograd saves for this partition, in the order in which it does; empty where several graphs are joined."""

    @property
    def ordered(self) -> bool:
        """Whether the graphs are to run in their own order, since memory was planned for it: something is computed again, or
        rounded."""
        return self.recomputed > 0 or self.rounded

    @property
    def sampled(self) -> bool:
        """Whether any site is."""
        return self.count("exact") < len(self.entries)

    @property
    def rounded(self) -> bool:
        """Whether anything is kept in few bits (masks, which are packed to one, left out)."""
        return any(c.bits > 1 for c in self.compressed)

    @property
    def flops_saved(self) -> int:
        """By sampling, over all sites."""
        return sum(e.flops_saved for e in self.entries)

    @property
    def flops_added(self) -> int:
        """By products that run again in the backward; 0 without predictions."""
        if self.predicted is None or self.predicted_exact is None:
            return 0
        return self.predicted.flops - self.predicted_exact.flops + self.flops_saved

    def count(self, decision: str) -> int:
        """Number of sites with a decision: "early", "late" or "exact"."""
        return sum(e.decision == decision for e in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Ledger":
        """The inverse of :meth:`to_dict`, also after a round trip through JSON.

        Raises: KeyError or TypeError if a field is missing or unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) != known:
            raise TypeError(f"a ledger has the fields {sorted(known)}, not {sorted(data)}.")
        rows = {"entries": Entry, "parts": Part, "tensors": Saved, "compressed": Compressed, "handed": Handed}
        values: dict[str, Any] = {
            name: tuple(row(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in data[name])
            for name, row in rows.items()
        }
        for name in ("predicted_exact", "predicted", "predicted_eager"):
            values[name] = Prediction(**data[name]) if data[name] else None
        return cls(**{**data, **values, "notes": tuple(data["notes"])})

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def to_csv(self) -> str:
        """One line per saved tensor: the fields of :class:`Saved`; bytes as numbers, shapes as "8x128"."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(f.name for f in dataclasses.fields(Saved))
        for t in self.tensors:
            writer.writerow(
                ("x" if name == "shape" else ", ").join(map(str, value)) if isinstance(value, tuple) else value
                for name, value in vars(t).items()
            )
        return text.getvalue()

    def plot(self, path: "str | Path") -> None:
        """Stacked bars per layer: eager, Inductor, wtacrs. Raises ImportError without matplotlib (the extra ``plot``)."""
        ledger_tables.plot(self, path)

    def table(self, level: str = "site") -> str:
        """The ledger as text.

        Args:
            level: "site": one line per weight-gradient product. "layer": one per layer, identical ones folded, with what is
                held by eager autograd, by Inductor's partition and by this one. "tensor": the same per saved tensor, and what
                else needs it. "summary": the totals.

        Raises:
            ValueError: an unknown level.
        """
        if level == "site":
            return self._site_table()
        if level not in LEVELS:
            raise ValueError(f"level={level!r}: expected one of {', '.join(map(repr, LEVELS))}.")
        tables = {"layer": ledger_tables.layer_table, "tensor": ledger_tables.tensor_table}
        parts = [tables[level](self)] if level in tables else []
        return "\n".join([*parts, self.summary()])

    def _site_table(self) -> str:
        rows = [
            (
                e.module,
                e.op,
                "x".join(map(str, e.shape)),
                e.dtype,
                f"{e.kept}/{e.rows}" + (f" in {e.bits} bits" if e.bits else ""),
                format_bytes(e.bytes_exact),
                format_bytes(e.bytes_now),
                f"{e.flops_saved / 1e9:.2f}",
                e.decision,
                e.reason,
            )
            for e in self.entries
        ]
        headers = ("module", "op", "input", "dtype", "rows kept", "exact", "now", "GFLOPs saved", "decision", "reason")
        text = tabulate(rows, headers, disable_numparse=True)
        if self.compressed:
            text += "\n\n" + ledger_tables.compressed_table(self.compressed)
        if self.parts:
            lines = [
                (p.name, p.decision, f"{p.flops_added / 1e9:.2f}", ", ".join(p.kept), p.reason) for p in self.parts
            ]
            titles = ("segment of the forward", "in the backward", "GFLOPs added", "tensors saved inside", "reason")
            text += "\n\n" + tabulate(lines, titles, disable_numparse=True)
        return f"{text}\n{self.summary()}"

    def summary(self) -> str:
        """The totals in one line, what is predicted in another, and the notes."""
        share = self.saved_bytes / self.saved_bytes_exact if self.saved_bytes_exact else 1.0
        eager = "" if self.saved_bytes_eager is None else f"eager {format_bytes(self.saved_bytes_eager)}, "
        text = (
            f"saved for backward: {eager}exact {format_bytes(self.saved_bytes_exact)}, now {format_bytes(self.saved_bytes)} "
            f"({share:.2f}x); sites: {self.count('early')} early, {self.count('late')} late, {self.count('exact')} exact"
        )
        if self.predicted and self.predicted_exact:
            now, exact = self.predicted, self.predicted_exact
            eager = "" if self.predicted_eager is None else f"eager {format_bytes(self.predicted_eager.peak)}, "
            of = ""
            if self.parts:
                added, saved = (f / max(1, exact.flops) for f in (self.flops_added, self.flops_saved))
                of = f" (recomputed +{added:.2f}, sampled -{saved:.2f})"
            text += (
                f"\npredicted peak of activations: {eager}exact {format_bytes(exact.peak)}, now {format_bytes(now.peak)} "
                f"({now.peak / max(1, exact.peak):.2f}x); FLOPs {now.flops / max(1, exact.flops):.2f}x{of}, "
                f"time {now.seconds / max(1e-30, exact.seconds):.2f}x"
            )
        return "\n".join([text, *self.notes])

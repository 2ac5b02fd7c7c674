"""The ledger: what is saved for the backward at every site, before and now, and why."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate


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
    compressed: tuple[Compressed, ...] = ()

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
        entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in data["entries"])
        parts = tuple(Part(**{**p, "kept": tuple(p["kept"])}) for p in data["parts"])
        exact, now = (Prediction(**data[k]) if data[k] else None for k in ("predicted_exact", "predicted"))
        compressed = tuple(
            Compressed(**{**c, "shape": tuple(c["shape"]), "readers": tuple(c["readers"])}) for c in data["compressed"]
        )
        return cls(entries, data["saved_bytes_exact"], data["saved_bytes"], exact, now, parts, compressed)

    def table(self) -> str:
        """One line per site and the totals, as text."""
        rows = [
            (
                e.module,
                e.op,
                "x".join(map(str, e.shape)),
                e.dtype,
                f"{e.kept}/{e.rows}",
                format_bytes(e.bytes_exact),
                format_bytes(e.bytes_now),
                e.decision,
                e.reason,
            )
            for e in self.entries
        ]
        headers = ("module", "op", "input", "dtype", "rows kept", "exact", "now", "decision", "reason")
        text = tabulate(rows, headers, disable_numparse=True)
        if self.compressed:
            text += "\n\n" + self._compressed_table()
        if self.parts:
            lines = [(p.name, p.decision, f"{p.flops_added / 1e9:.2f}", ", ".join(p.kept)) for p in self.parts]
            titles = ("segment of the forward", "in the backward", "GFLOPs added", "tensors saved inside")
            text += "\n\n" + tabulate(lines, titles, disable_numparse=True)
        return f"{text}\n{self.summary()}"

    def _compressed_table(self) -> str:
        """Tensors in fewer bits; equal ones of one kind are counted in one line."""
        lines: dict[tuple, list[Compressed]] = {}
        for c in self.compressed:
            lines.setdefault((c.op, c.shape, c.dtype, c.bits, c.readers), []).append(c)
        rows = [
            (
                f"{same[0].module or same[0].tensor}" + (f" and {len(same) - 1} more" if len(same) > 1 else ""),
                op,
                "x".join(map(str, shape)),
                dtype,
                bits,
                format_bytes(sum(c.bytes_exact for c in same)),
                format_bytes(sum(c.bytes_now for c in same)),
                ", ".join(readers),
            )
            for (op, shape, dtype, bits, readers), same in lines.items()
        ]
        headers = ("tensor of", "made by", "shape", "dtype", "bits", "exact", "now", "read by")
        return tabulate(rows, headers, disable_numparse=True)

    def summary(self) -> str:
        """The totals in one line, and what is predicted in another."""
        share = self.saved_bytes / self.saved_bytes_exact if self.saved_bytes_exact else 1.0
        text = (
            f"saved for backward: exact {format_bytes(self.saved_bytes_exact)}, now {format_bytes(self.saved_bytes)} "
            f"({share:.2f}x); sites: {self.count('early')} early, {self.count('late')} late, {self.count('exact')} exact"
        )
        if self.predicted and self.predicted_exact:
            now, exact = self.predicted, self.predicted_exact
            text += (
                f"\npredicted peak of activations: exact {format_bytes(exact.peak)}, now {format_bytes(now.peak)} "
                f"({now.peak / max(1, exact.peak):.2f}x); FLOPs {now.flops / max(1, exact.flops):.2f}x, "
                f"time {now.seconds / max(1e-30, exact.seconds):.2f}x"
            )
        return text


def format_bytes(n: int) -> str:
    """``1536`` -> ``1.5 KiB``; 0 -> ``-``."""
    if n == 0:
        return "-"
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

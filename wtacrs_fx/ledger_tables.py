"""Tables and a picture of a ledger's saved tensors, equal layers folded."""

import dataclasses
import itertools
import statistics
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from wtacrs_fx.units import format_bytes

if TYPE_CHECKING:
    from wtacrs_fx.ledger import Compressed, Ledger, Saved

ARMS = {"eager": "bytes_eager", "inductor": "bytes_exact", "wtacrs": "bytes_now"}
"""Title of a column -> field of :class:`wtacrs_fx.ledger.Saved`."""

BATCH, ROOT = "(batch)", "(model)"
"""Stand for the module of what is given to the model, and of what the model's own forward computes."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Saved tensors of a layer, or of each of ``count`` layers that are alike."""

    name: str
    tensors: tuple["Saved", ...]
    """Of the first of them; module paths below it are relative."""
    count: int = 1

    def total(self, field: str) -> int:
        """Bytes of all of them."""
        return self.count * sum(getattr(t, field) for t in self.tensors)


def layer_name(tensor: "Saved", depth: int = 1) -> str:
    """``encoder.layer.0.attention.self`` -> ``encoder.layer.0``, up to the ``depth``-th number; without a number, the first
    two parts."""
    if not tensor.module:
        return BATCH if tensor.op == "batch" else ROOT
    parts = tensor.module.split(".")
    numbers = [i for i, p in enumerate(parts) if p.isdigit()]
    end = numbers[:depth][-1] if numbers else 1
    return ".".join(parts[: end + 1])


def layers(tensors: Iterable["Saved"], depth: int = 1) -> list[Layer]:
    """Tensors by layer, in the order in which layers first appear.

    Layers are the members of the outermost list of modules. Where no two of those are alike and lists inside of them have
    modules that are (``stages.2.blocks.0-5``), they are the members of the inner lists.
    """
    groups: dict[str, list[Saved]] = {}
    for t in tensors:
        groups.setdefault(layer_name(t, depth), []).append(t)
    found = [_layer(name, group) for name, group in groups.items()]
    alike = {_list_of(layer) for layer in fold(found) if layer.count > 1}
    result = []
    for layer, group in zip(found, groups.values()):
        nested = _list_of(layer) not in alike and any(layer_name(t, depth + 1) != layer.name for t in group)
        inner = layers(group, depth + 1) if nested else []
        folds = any(x.count > 1 and any(t.module for t in x.tensors) for x in fold(inner))
        result += inner if folds else [layer]
    return result


def _layer(name: str, tensors: Iterable["Saved"]) -> Layer:
    relative = (dataclasses.replace(t, module=t.module.removeprefix(name).lstrip(".")) for t in tensors)
    return Layer(name, tuple(relative))


def _list_of(layer: Layer) -> str:
    """``encoder.layer.0`` -> ``encoder.layer``."""
    return layer.name.rpartition(".")[0]


def fold(found: Sequence[Layer]) -> list[Layer]:
    """Numbered layers of one list with equal tensors as one, where the first of them stands: ``encoder.layer.0,2-11``."""
    groups: dict[Hashable, list[Layer]] = {}
    for layer in found:
        number = layer.name.rpartition(".")[2]
        own = tuple(sorted(map(repr, layer.tensors)))
        groups.setdefault((_list_of(layer), own) if number.isdigit() else layer.name, []).append(layer)
    return [Layer(_joint_name(group), group[0].tensors, len(group)) for group in groups.values()]


def _joint_name(group: Sequence[Layer]) -> str:
    """``encoder.layer.0``, ``encoder.layer.1``, ``encoder.layer.3`` -> ``encoder.layer.0-1,3``."""
    if len(group) == 1:
        return group[0].name
    numbers = sorted(int(layer.name.rpartition(".")[2]) for layer in group)
    ranges = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        members = [n for _, n in run]
        ranges.append(f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{_list_of(group[0])}.{','.join(ranges)}".lstrip(".")


def layer_table(ledger: "Ledger") -> str:
    """One line per layer: bytes of each arm, and what holds most of what is left."""
    arms = _arms(ledger)
    rows = []
    for layer in fold(layers(ledger.tensors)):
        largest = max(layer.tensors, key=lambda t: t.bytes_now)
        held = f"{largest.module or layer.name} ({largest.op})" if largest.bytes_now else ""
        rows.append((title(layer), *(format_bytes(layer.total(f)) for f in arms.values()), held))
    return tabulate(rows, ("layer", *arms, "most of it now"), disable_numparse=True)


def tensor_table(ledger: "Ledger") -> str:
    """One line per saved tensor of a layer; bytes are those of one layer."""
    arms = _arms(ledger)
    rows = []
    for layer in fold(layers(ledger.tensors)):
        for i, t in enumerate(layer.tensors):
            needed = f"{'also ' if t.kept else ''}needed by {', '.join(t.needed_by)}" if t.needed_by else ""
            why = "; ".join(filter(None, (t.reason, needed)))
            shape = "x".join(map(str, t.shape))
            sizes = (format_bytes(getattr(t, f)) for f in arms.values())
            rows.append(
                (title(layer) if not i else "", t.module, t.op, shape, t.dtype, *sizes, t.kept, t.decision, why)
            )
    headers = ("layer", "module", "op", "shape", "dtype", *arms, "rows kept", "decision", "reason")
    return tabulate(rows, headers, disable_numparse=True)


def compressed_table(compressed: Iterable["Compressed"]) -> str:
    """Tensors in fewer bits; equal ones of one kind are counted in one line, with the mean of their errors where those were
    measured."""
    lines: dict[tuple, list[Compressed]] = {}
    for c in compressed:
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
            *(f"{statistics.mean(e):.1e}" for e in [[c.error for c in same if c.error is not None]] if e),
        )
        for (op, shape, dtype, bits, readers), same in lines.items()
    ]
    headers = ["tensor of", "made by", "shape", "dtype", "bits", "exact", "now", "read by"]
    headers += ["rel. squared error"] * any(len(row) > len(headers) for row in rows)
    return tabulate(rows, headers, disable_numparse=True)


def plot(ledger: "Ledger", path: "str | Path") -> None:
    """A bar per arm, its layers stacked."""
    from matplotlib.figure import Figure

    arms = _arms(ledger)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(arms)
    for layer in fold(layers(ledger.tensors)):
        heights = [layer.total(f) / 2**20 for f in arms.values()]
        axes.bar(list(arms), heights, bottom=bottom, label=title(layer), edgecolor="white")
        bottom = [a + b for a, b in zip(bottom, heights)]
    axes.set(ylabel="saved for the backward [MiB]")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)


def _arms(ledger: "Ledger") -> dict[str, str]:
    """The columns: without eager autograd where nobody has looked."""
    return {k: v for k, v in ARMS.items() if k != "eager" or ledger.saved_bytes_eager is not None}


def title(layer: Layer) -> str:
    """``encoder.layer.0-11 (x12)``"""
    return layer.name if layer.count == 1 else f"{layer.name} (x{layer.count})"

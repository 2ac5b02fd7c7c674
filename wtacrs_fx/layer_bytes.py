"""Bytes that a compiled step really holds for its backward, layer by layer, beside those that its ledgers predict.

Autograd saves what a forward graph hands to its backward graph in the order of the graph's outputs, and a ledger has them in
the same order (``Ledger.handed``). So every tensor that autograd is seen to save has a line of the ledger, and by it a module.
Numbers, shapes and types must agree; where they do not, a graph's bytes are given in all and no layer is guessed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from wtacrs_fx import ledger_tables, measure
from wtacrs_fx.backend import Backend
from wtacrs_fx.inductor import like_compiled
from wtacrs_fx.ledger import Ledger, Saved
from wtacrs_fx.names import paths_in_model, renamed

SITE, LAYER = "site", "layer"
"""Kinds of :class:`LayerBytes` that are predicted."""

UNMATCHED, NO_LEDGER, EAGER, TWICE = "unmatched", "graphs without a product", "eager code", "held by two graphs"
"""Those that are not: see :attr:`LayerBytes.kind`."""


@dataclass(frozen=True)
class LayerBytes:
    """Bytes held for the backward, of one layer or of several that are alike."""

    name: str
    kind: str
    """"site": the input of a sampled product, or its kept rows. "layer": all other tensors of a layer. "unmatched": a graph of
    which autograd saves other tensors than predicted, by number or shape. "graphs without a product": of a matrix in their
    backward, such as a loss behind a graph break. "eager code": between graphs. "held by two graphs": what two ledgers count
    and memory holds once; negative."""
    predicted: int | None
    """None: no ledger says."""
    measured: int | None
    """None: no tensor could be matched with it."""

    @property
    def difference(self) -> int:
        """What is held more than predicted; 0 where one of them is unknown."""
        return 0 if self.predicted is None or self.measured is None else self.measured - self.predicted


@dataclass(frozen=True)
class Run:
    """One run of a graph: its ledger, and what autograd saved in it."""

    ledger: Ledger | None
    saved: tuple[measure.SavedTensor, ...]


@dataclass(frozen=True)
class Line(Saved):
    """A line of a ledger with what was measured of it."""

    measured: int | None = None


class Watched:
    """A Backend for a model whose graphs say when they run, so that what autograd saves is known by graph."""

    def __init__(self, backend: Backend, model: nn.Module) -> None:
        self.backend, self.model = backend, model
        self._held: measure.Held | None = None
        self._spans: list[tuple[Ledger | None, int, int]] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made = len(self.backend.ledgers)
        compiled = self.backend(gm, example_inputs)
        ledgers = self.backend.ledgers[made:]

        def run(*args: Any) -> Any:
            start = len(self._held.saved) if self._held else 0
            result = compiled(*args)
            if self._held:
                # (equal layers can share one graph: their parameters say which of them this run is)
                ledger = renamed(ledgers[-1], paths_in_model(gm, args, self.model)) if ledgers else None
                self._spans.append((ledger, start, len(self._held.saved)))
            return result

        return like_compiled(run, compiled)

    @contextmanager
    def held(self) -> Iterator["Step"]:
        """Like :func:`wtacrs_fx.measure.held`; what comes out is complete behind the block."""
        self._spans.clear()
        with measure.held(self.model) as held:
            self._held, step = held, Step()
            try:
                yield step
            finally:
                self._held = None
                step.bytes = held.bytes
                step.runs = tuple(Run(ledger, tuple(held.saved[i:j])) for ledger, i, j in self._spans)


@dataclass
class Step:
    """What the forward of a step holds."""

    bytes: int = 0
    runs: tuple[Run, ...] = ()

    @property
    def ledgers(self) -> list[Ledger]:
        """Of all graphs that ran, once for every run."""
        return [run.ledger for run in self.runs if run.ledger]

    @property
    def predicted(self) -> int:
        """By the ledgers of all graphs that ran."""
        return sum(ledger.saved_bytes for ledger in self.ledgers)

    def by_layer(self, sites: Mapping[str, str]) -> tuple[LayerBytes, ...]:
        """Rows whose known predictions add up to :attr:`predicted`, and known measurements to :attr:`bytes`.

        Args: sites, modules whose inputs get a row apart -> its name (one for modules that share a weight).
        """
        of_site: dict[str, list[Line]] = {name: [] for name in sites.values()}
        others: list[Line] = []
        rest: list[LayerBytes] = []
        for number, run in enumerate(self.runs, 1):
            sizes = _sizes(run.saved)
            if run.ledger is None:
                continue
            matched = _matches(run.ledger, run.saved)
            for site, line in _lines(run.ledger, sizes if matched else None):
                (of_site[sites[site]] if site in sites else others).append(line)
            if not matched:
                name = f"(graph {number}: {len(run.saved)} tensors saved, {len(run.ledger.handed)} predicted)"
                rest.append(LayerBytes(name, UNMATCHED, None, sum(sizes)))
        rows = [_row(name, SITE, lines) for name, lines in of_site.items()]
        rows += [_row(ledger_tables.title(x), LAYER, x.tensors, x.count) for x in folded(others)]
        return (*rows, *rest, *self._without_ledger())

    def _without_ledger(self) -> Iterator[LayerBytes]:
        """What the ledgers do not say: storages of graphs without one, of eager code, and (negative) those of two graphs."""
        of_graphs = [_storages(run.saved) for run in self.runs if run.ledger]
        union = {key: size for storages in of_graphs for key, size in storages.items()}
        without = {
            k: s for run in self.runs if not run.ledger for k, s in _storages(run.saved).items() if k not in union
        }
        twice = sum(sum(storages.values()) for storages in of_graphs) - sum(union.values())
        eager = self.bytes - sum(union.values()) - sum(without.values())
        for kind, size in ((NO_LEDGER, sum(without.values())), (EAGER, eager), (TWICE, -twice)):
            if size:
                yield LayerBytes(f"({kind})", kind, None, size)


def folded(lines: Sequence[Line]) -> list[ledger_tables.Layer]:
    """Layers as in a ledger's table; those with equal figures are one."""
    return ledger_tables.fold(ledger_tables.layers(lines))


def _storages(saved: Sequence[measure.SavedTensor]) -> dict[int, int]:
    return {t.storage: t.bytes for t in saved if not t.is_weight}


def _sizes(saved: Sequence[measure.SavedTensor]) -> list[int]:
    """Bytes of storages, 0 where an earlier one shares it, and of parameters and buffers."""
    seen: set[int] = set()
    sizes = []
    for t in saved:
        sizes.append(0 if t.is_weight or t.storage in seen else t.bytes)
        seen.add(t.storage)
    return sizes


def _matches(ledger: Ledger, saved: Sequence[measure.SavedTensor]) -> bool:
    return [(t.shape, t.dtype) for t in ledger.handed] == [(t.shape, t.dtype) for t in saved]


def _lines(ledger: Ledger, sizes: Sequence[int] | None) -> Iterator[tuple[str, Line]]:
    """(site, line) for everything that a graph hands on; ``sizes`` are the measured ones."""
    for i, t in enumerate(ledger.handed):
        row = ledger.tensors[t.tensor] if t.tensor >= 0 else Saved("", "", t.shape, t.dtype)
        measured = None if sizes is None else sizes[i]
        if t.bytes or measured:
            yield t.site, Line(row.module, row.op, t.shape, t.dtype, bytes_now=t.bytes, measured=measured)


def _row(name: str, kind: str, lines: Sequence[Any], count: int = 1) -> LayerBytes:
    measured = [x.measured for x in lines]
    known = None if None in measured else count * sum(measured)
    return LayerBytes(name, kind, count * sum(x.bytes_now for x in lines), known)

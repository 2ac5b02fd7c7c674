"""``norms="sample"``: the paper's cache of gradient norms, per training example and token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wtacrs_fx.norm_table import DeviceTable, HostTable, available_bytes
from wtacrs_fx.norms import RATE, NormSource, PositionNorms, Rows, check_loaded
from wtacrs_fx.units import format_bytes, parse_bytes


class SampleNorms(NormSource):
    """``|g|`` of every token of every training example, as of the last time that the example was seen (Liu et al., arXiv
    2305.15265, section 3).

    bfloat16 [examples, longest sequence] per site, on the device while ``device_memory`` has room, beyond in pinned host
    memory with asynchronous copies. What was not seen yet has the running mean of its position (:class:`PositionNorms`).

    Args:
        examples: how many training examples there are; ids must be below. None: as many as the largest id asks for.
        device_memory: bytes on the device that tables may take, an int or a string such as "2GiB". None: a twentieth of the
            device's memory.
        host_memory: the same for host memory. None: what is free when a table is made.
        rate: of the running means.

    Raises:
        ValueError, TypeError: an argument outside of its range. Later, in a forward: ids outside of ``examples``.
        MemoryError: in the first forward, before anything is allocated: the tables would not fit, with their bytes.
    """

    kind = "sample"
    wants_ids = True

    def __init__(
        self,
        examples: int | None = None,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        rate: float = RATE,
    ) -> None:
        if examples is not None and (isinstance(examples, bool) or not isinstance(examples, int) or examples < 1):
            raise ValueError(f"examples={examples!r}: expected None or the number of training examples, at least 1.")
        self.examples = examples
        self.device_memory = None if device_memory is None else parse_bytes(device_memory)
        self.host_memory = None if host_memory is None else parse_bytes(host_memory)
        self.position = PositionNorms(rate)
        self.tables: dict[str, DeviceTable | HostTable] = {}
        self.loaded: frozenset[str] | None = None
        self._needed = examples or 0
        self._checked = 0
        self._expected: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Examples that the tables have room for."""
        return self.examples or self._needed

    @property
    def bytes(self) -> int:
        """Of all tables."""
        return sum(table.bytes for table in self.tables.values())

    def begin(self, sites: Sequence[str], ids: tuple[int, ...] | None) -> None:
        if rename := check_loaded(self.loaded, sites):
            self.tables = {rename(k): t for k, t in self.tables.items()}
            self.loaded = frozenset(self.tables)
        self.position.begin(sites, ids)
        if ids:
            if self.examples is not None and (outside := [i for i in ids if i >= self.examples]):
                raise ValueError(
                    f"sample_ids: {outside[:5]} out of range for {self.examples} examples (0 to {self.examples - 1}); "
                    "SampleNorms(examples=...) says how many there are, and resize() changes it."
                )
            if max(ids) >= self.size:
                self._needed = max(max(ids) + 1, 2 * self._needed)  # (doubled, so that tables rarely grow)
            for site in sites:
                self._expected.setdefault(site, 0)

    def read(self, site: str, rows: Rows) -> Tensor | None:
        usual = self.position.read(site, rows)
        length = _length(rows)
        if not length:
            return usual
        if length > self._expected.get(site, 0) or self.size > self._checked:
            expected = {**self._expected, site: max(length, self._expected.get(site, 0))}
            try:
                self._refuse_if_too_large(self.size, [n or length for n in expected.values()], rows.device)
            except MemoryError:
                self._needed = max((t.examples for t in self.tables.values()), default=0)  # (another batch may fit)
                self._checked = min(self._checked, self._needed)
                raise
            self._expected, self._checked = expected, self.size
        if site not in self.tables:
            return usual
        known = self._table(site, self.tables[site].width, rows.device).read(rows, length)
        seen = known >= 0
        if usual is None:
            return torch.where(seen, known, (known * seen).sum() / seen.sum().clamp(min=1)).reshape(-1)
        return torch.where(seen, known, usual.view_as(known)).reshape(-1)

    def record(self, site: str, rows: Rows, norms: Tensor) -> None:
        self.position.record(site, rows, norms)
        length = _length(rows)
        if length and max(rows.ids or ()) < self.size:  # (resized since the forward: there may be no room for these)
            self._table(site, length, rows.device).write(rows, norms.view(-1, length))

    def resize(self, examples: int) -> None:
        """Room for another number of examples; what is known of those that stay is kept.

        Raises: ValueError: no number of examples. MemoryError, before anything is allocated: the tables would not fit.
        """
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
            raise ValueError(f"examples={examples!r}: expected the number of training examples, at least 1.")
        for device in {t.device for t in self.tables.values()}:
            self._refuse_if_too_large(examples, [t.width for t in self.tables.values()], device)
        self.examples = self._needed = examples
        for site, table in self.tables.items():
            self.tables[site] = table.resized(examples, table.width)

    def state_dict(self) -> dict[str, Any]:
        tables = {site: table.snapshot() for site, table in self.tables.items()}
        return {**super().state_dict(), "examples": self.size, "tables": tables, "position": self.position.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        check_loaded(frozenset(state["tables"]), [*self.tables])
        if self.examples is not None and state["examples"] != self.examples:
            raise ValueError(
                f"the checkpoint's norms are of {state['examples']} examples, this cache is for {self.examples}: load it into "
                f"SampleNorms(examples={state['examples']}), and resize({self.examples}) then if the first examples are the "
                "same."
            )
        self.position.load_state_dict(state["position"])
        self._needed = state["examples"]
        self.tables = {k: HostTable(v.clone(), torch.device("cpu")) for k, v in state["tables"].items()}
        self.loaded = frozenset(self.tables)

    def _table(self, site: str, length: int, device: torch.device) -> DeviceTable | HostTable:
        """A site's table, large enough, and where it belongs."""
        old = self.tables.get(site)
        if old is None:
            old = HostTable(torch.empty(0, 0, dtype=torch.bfloat16), torch.device("cpu"))
        if old.device != device or old.examples < self.size or old.width < length:
            width = max(length, old.width)
            others = sum(t.bytes for s, t in self.tables.items() if s != site and isinstance(t, DeviceTable))
            fits = others + 2 * self.size * width <= self._device_limit(device)
            self.tables[site] = old.resized(self.size, width).on(device, host=not fits)
        return self.tables[site]

    def _refuse_if_too_large(self, examples: int, lengths: Sequence[int], device: torch.device) -> None:
        """Before any table of these lengths, or for so many examples, is made: are there bytes for all?"""
        predicted = 2 * examples * sum(lengths)
        free = available_bytes() + self.bytes if self.host_memory is None else self.host_memory
        if predicted > self._device_limit(device) + free:
            raise MemoryError(
                f"norms='sample': the cache of {examples} examples at {len(lengths)} sites (of {max(lengths)} tokens here) "
                f"takes {format_bytes(predicted)} ({predicted} B), and {format_bytes(int(free))} of host memory are free. Use "
                "norms='position', fewer sites (include, exclude), or shorter sequences."
            )

    def _device_limit(self, device: torch.device) -> int:
        """Bytes of tables on the device; on a CPU there is host memory only."""
        if device.type == "cpu":
            return 0
        if self.device_memory is not None:
            return self.device_memory
        return torch.cuda.get_device_properties(device).total_memory // 20 if device.type == "cuda" else 0


def _length(rows: Rows) -> int:
    """Rows per example, 0 if that is not known: rows of an example lie one after the other."""
    if not rows.ids or rows.count % len(rows.ids):
        return 0
    return rows.count // len(rows.ids)

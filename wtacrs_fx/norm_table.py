"""Tables of gradient norms [examples, tokens] in bfloat16, on the device or in host memory."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wtacrs_fx.norms import Rows

UNSEEN = -1.0
"""In place of the norm of a token that was not seen yet."""


@dataclass
class DeviceTable:
    """A table where the gradients are."""

    data: Tensor
    """bfloat16 [examples, width]."""

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def examples(self) -> int:
        return self.data.shape[0]

    @property
    def width(self) -> int:
        return self.data.shape[1]

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.itemsize

    def read(self, rows: Rows, length: int) -> Tensor:
        """float32 [ids, length], :data:`UNSEEN` where nothing is known."""
        known = self.data.index_select(0, rows.ids_on(self.device))
        return _fit(known, length).float()

    def write(self, rows: Rows, norms: Tensor) -> None:
        """norms [ids, length]; those not finite leave what was there."""
        self._put(rows.ids_on(self.device), norms)

    def _put(self, ids: Tensor, norms: Tensor) -> None:
        columns = self.data[:, : norms.shape[1]]
        old = columns.index_select(0, ids)
        columns.index_copy_(0, ids, torch.where(torch.isfinite(norms), norms.to(old.dtype), old))

    def resized(self, examples: int, width: int) -> "DeviceTable | HostTable":
        """The same with another size; the first examples and tokens are kept."""
        new = self._empty(examples, width)
        kept = self.data[:examples, :width]
        new.data[: kept.shape[0], : kept.shape[1]] = kept
        return new

    def _empty(self, examples: int, width: int) -> "DeviceTable | HostTable":
        return DeviceTable(torch.full((examples, width), UNSEEN, dtype=torch.bfloat16, device=self.device))

    def on(self, device: torch.device, host: bool) -> "DeviceTable | HostTable":
        """The same for gradients on ``device``, there or in host memory."""
        if not host:
            return DeviceTable(self.data.to(device))
        data = self.data.cpu()
        return HostTable(data.pin_memory() if device.type == "cuda" else data, device)

    def snapshot(self) -> Tensor:
        """A copy on the CPU, with all that was written."""
        return self.data.cpu().clone()


@dataclass
class HostTable(DeviceTable):
    """A table in host memory, pinned where the gradients are on another device.

    Copies in both directions are asynchronous: norms written wait in a pinned buffer until the device has filled it, and only
    a read of the same examples waits for that.
    """

    target: torch.device
    """Where the gradients are."""
    waiting: list[tuple[torch.cuda.Event, tuple[int, ...], Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.target

    def read(self, rows: Rows, length: int) -> Tensor:
        self._take_in(rows.ids)
        known = _fit(self.data.index_select(0, rows.ids_on(torch.device("cpu"))), length)
        if self.target.type == "cuda":
            known = known.pin_memory()
        return known.to(self.target, non_blocking=True).float()

    def write(self, rows: Rows, norms: Tensor) -> None:
        if self.target.type != "cuda":
            self._put(rows.ids_on(torch.device("cpu")), norms.to("cpu"))
            return
        assert rows.ids is not None
        self._take_in(())
        buffer = torch.empty(norms.shape, dtype=torch.bfloat16, pin_memory=True)
        buffer.copy_(norms.to(torch.bfloat16), non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.target))
        self.waiting.append((done, rows.ids, buffer))

    def _take_in(self, needed: "tuple[int, ...] | None") -> None:
        """Write what has arrived, in order; wait for what is needed (None: for all)."""
        while self.waiting:
            done, ids, buffer = self.waiting[0]
            if needed is None or any(not set(needed).isdisjoint(i) for _, i, _ in self.waiting):
                done.synchronize()
            elif not done.query():
                return
            self._put(torch.tensor(ids), buffer)
            self.waiting.pop(0)

    def resized(self, examples: int, width: int) -> "DeviceTable | HostTable":
        self._take_in(None)
        return super().resized(examples, width)

    def _empty(self, examples: int, width: int) -> "DeviceTable | HostTable":
        data = torch.full((examples, width), UNSEEN, dtype=torch.bfloat16, pin_memory=self.target.type == "cuda")
        return HostTable(data, self.target)

    def on(self, device: torch.device, host: bool) -> "DeviceTable | HostTable":
        self._take_in(None)
        return super().on(device, host)

    def snapshot(self) -> Tensor:
        self._take_in(None)
        return super().snapshot()

    def __getstate__(self) -> dict[str, object]:
        self._take_in(None)  # events belong to this process
        return dict(vars(self))


def _fit(known: Tensor, length: int) -> Tensor:
    """[n, width] -> [n, length], more tokens being unseen."""
    if known.shape[1] < length:
        return torch.nn.functional.pad(known, (0, length - known.shape[1]), value=UNSEEN)
    return known[:, :length]


MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Host memory that is free without swapping, of the machine and of the container that the process is in; the whole of it
    where the system does not say."""
    return min(_machine_free(), _container_free())


def _machine_free() -> int:
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62


def _container_free() -> int:
    """By its limit (cgroup v2): what files are cached in is given back when it is needed."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # ("max" where there is none)
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - int((CGROUP / "memory.current").read_text()) + int(statistics["file"]))
    except (OSError, KeyError, ValueError):
        return 2**62

"""The one place that measures memory and time, for the demo and every benchmark.

Memory of the activations is counted in bytes that exist, not estimated: held (what autograd keeps between forward and
backward), peak (the largest sum of live bytes during a step) and resident (what the operating system gave the process).
"""

import contextlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Held:
    """Distinct storages that autograd saved, by address: ``held.bytes`` is their sum."""

    def __init__(self, skip: set[int]) -> None:
        self._skip = skip
        self._storages: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._skip:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[Held]:
    """Count what autograd saves for the backward of anything computed inside, parameters and buffers left out.

    Works for eager code and for compiled functions alike. Keep the loss alive until the count is read, so that no storage
    is freed and its address used again.
    """
    weights = [*model.parameters(), *model.buffers()]
    count = Held({w.untyped_storage().data_ptr() for w in weights})
    with torch.autograd.graph.saved_tensors_hooks(count.add, lambda t: t):
        yield count


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes allocated at once during ``step()``, above what was there before it.

    On CPU the running sum of the allocator's events in torch.profiler (eager and compiled code both allocate there), on
    CUDA the allocator's own ``max_memory_allocated``.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def resident_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def alternate(
    arms: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, Times]:
    """Time several arms side by side: one run of each in turn, ``repeats`` times, after ``warmup`` rounds untimed.

    Alternating spreads the noise of a shared machine over all arms; compare medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(warmup + repeats):
        for name, run in arms.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def environment() -> dict[str, str]:
    """What a result depends on: versions, processor, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

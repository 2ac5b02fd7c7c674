"""The one place that measures memory and time, for the check, the demo and every benchmark.

Memory of the activations is counted in bytes that exist, not estimated: held (what autograd keeps between forward and
backward), peak (the largest sum of live bytes during a step) and resident (what the operating system gave the process).
"""

import contextlib
import ctypes
import itertools
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wtacrs_fx.private import tree_leaves


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that autograd saved."""

    storage: int
    """Its address."""
    bytes: int
    """Of the storage."""
    shape: tuple[int, ...]
    dtype: str
    is_weight: bool
    """Whether the storage is :func:`resident`."""


class Held:
    """Tensors that autograd saved, in order; ``held.bytes`` is the sum of their distinct storages."""

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self.saved: list[SavedTensor] = []

    @torch.compiler.disable  # between graphs Dynamo would compile it too, and guard on what is in the list
    def add(self, tensor: Tensor) -> Tensor:
        storage, dtype = tensor.untyped_storage(), str(tensor.dtype).removeprefix("torch.")
        address = storage.data_ptr()
        self.saved.append(SavedTensor(address, storage.nbytes(), tuple(tensor.shape), dtype, address in self._weights))
        return tensor

    @property
    def bytes(self) -> int:
        return sum({t.storage: t.bytes for t in self.saved if not t.is_weight}.values())


def resident(model: nn.Module) -> list[Tensor]:
    """What is in memory with the model: parameters, buffers, and tensors that its modules have as plain attributes (also in
    lists and dicts), which compiled graphs take for weights too."""
    attributes = (t for module in model.modules() for t in tree_leaves(vars(module)))
    plain = (t for t in attributes if isinstance(t, Tensor) and t.grad_fn is None)
    return [*model.parameters(), *model.buffers(), *plain]


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[Held]:
    """Count what autograd saves for the backward of anything computed inside, without what is :func:`resident`.

    Works for eager code and for compiled functions alike. Keep the loss alive until the count is read, so that no storage
    is freed and its address used again.
    """
    count = Held({t.untyped_storage().data_ptr() for t in resident(model)})
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
    return _largest_sum(size for _, size in _allocations(step, device))


@dataclass(frozen=True)
class Peaks:
    """Largest sums of live bytes during a step: of everything, and without the gradients of parameters alive at that moment."""

    total: int
    activations: int


def peaks(backward: Callable[[], object], model: nn.Module) -> Peaks:
    """Both peaks of ``backward()``, a forward and a backward that leave their gradients in ``.grad``.

    A gradient counts as one from the allocation of the memory that ends in ``.grad``. Gradients are None before and after.
    """
    model.zero_grad(set_to_none=True)
    events = _allocations(backward, next(model.parameters()).device.type)
    addresses = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    born = {address: i for i, (address, size) in enumerate(events) if size > 0 and address in addresses}
    gradients = set(born.values())
    model.zero_grad(set_to_none=True)
    return Peaks(
        total=_largest_sum(size for _, size in events),
        activations=_largest_sum(size for i, (_, size) in enumerate(events) if i not in gradients),
    )


def _allocations(run: Callable[[], object], device: str) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation on a kind of device during ``run()``, bytes negative where memory is freed, in
    order."""
    if device == "cuda":
        return _cuda_allocations(run)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events, stack = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag.name == "Allocation" and event.extra_fields.device.type == device:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(events, key=lambda e: e[0])]


def _cuda_allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """From the history of PyTorch's allocator on the current device; one that the caller records is ended. (The profiler misses
    memory of CUDA that is freed outside of every operation, such as what the forward returned and nobody keeps.)"""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(context=None, clear_history=True)
    try:
        run()
        torch.cuda.synchronize()
        history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, clear_history=True)
    signs = {"alloc": 1, "free_completed": -1}
    return [(e["addr"], signs[e["action"]] * e["size"]) for e in history if e["action"] in signs]


def _largest_sum(sizes: Iterable[int]) -> int:
    return max(itertools.accumulate(sizes), default=0)


def resident_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_step_bytes(step: Callable[[], object]) -> int | None:
    """How far the resident set rises during ``step()``; None where the operating system cannot say (it is Linux that can)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back first (glibc)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def relative_error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Median over tensors of ``|X' - X|^2 / |X|^2``; ``found`` may hold more tensors than are compared."""
    errors = [(found[n] - x).square().sum() / x.square().sum().clamp(min=1e-30) for n, x in exact.items()]
    return float(torch.stack(errors).median())


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

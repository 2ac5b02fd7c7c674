"""All of the memory that training takes, and the largest batch that fits: parameters, gradients, optimizer, activations."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from wtacrs_fx.config import Config
from wtacrs_fx.eager_trace import eager_step
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.ledger import Ledger, Prediction
from wtacrs_fx.passes.partition import many_graphs
from wtacrs_fx.private import FakeTensorMode, TorchDispatchMode, tree_leaves
from wtacrs_fx.report import partition_ledger
from wtacrs_fx.tracing import Batch, FakeRun, arguments, original
from wtacrs_fx.units import format_bytes, parse_bytes

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sgd-momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}

BLOCK = 256
"""Elements that share one float32 scale in the 8-bit states of bitsandbytes (Dettmers et al., arXiv 2110.02861)."""

MIN_8BIT = 4096
"""Tensors of fewer elements than this have 32-bit states there."""

ARMS = ("eager", "inductor", "wtacrs")

MAX_BATCH = 2**24
"""The search for the largest batch ends here."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training setup. Nothing is added for the allocator's fragmentation and the CUDA context."""

    arm: str
    parameters: int
    """With buffers."""
    gradients: int
    optimizer: int
    saved: int
    """Activations held between forward and backward."""
    transient: int
    """What the largest moment of a step has in activations and temporaries above ``saved``."""
    step_peak: int
    """Largest sum of activations, temporaries and those gradients of parameters that exist at that moment."""

    @property
    def total(self) -> int:
        """At the worst moment of a step: less than the sum of the parts, because gradients come while activations go."""
        return self.parameters + self.optimizer + max(self.step_peak, self.gradients)


class StepTraces:
    """Training steps of one model at several batch sizes, each traced once.

    Args:
        model: in the mode in which it is trained, with fake, meta or real parameters.
        batch: an example; other sizes are made of it by changing the first dimension of every tensor whose first dimension is
            the batch size (that of the first tensor).
        optimizer: a key of :data:`OPTIMIZERS`.
        eight_bit: whether its states have 8 bits.
        device: as for :func:`wtacrs_fx.report`.
        options: the fields of :class:`wtacrs_fx.Config`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: str = "adamw",
        *,
        eight_bit: bool = False,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        model, batch = original(model), arguments(batch)
        self.model, self.batch, self.device, self.config = model, batch, device, Config.from_options(options)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.parameters = _bytes((*model.parameters(), *model.buffers()))
        self.gradients = _bytes(trained)
        self.optimizer = optimizer_bytes(trained, optimizer, eight_bit=eight_bit)
        self.sizes = [t.shape[0] for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
        self._found: dict[tuple[str, int], TrainingMemory] = {}

    @property
    def batch_size(self) -> int:
        """Of the example; 0 if it has no tensor with a dimension."""
        return self.sizes[0] if self.sizes else 0

    @property
    def _has_limit(self) -> bool:
        """Whether there are sizes at which no plan meets the memory budget: it is in bytes."""
        budget = self.config.memory_budget
        return budget is not None and budget != "auto" and not isinstance(budget, float)

    @property
    def fixed(self) -> int:
        """Bytes that no batch changes: the least that training takes."""
        return self.parameters + self.optimizer + self.gradients

    def add(self, ledger: Ledger, size: int | None = None) -> None:
        """Take the figures of a report that has been made, at the example's batch size if none is given."""
        size = self.batch_size if size is None else size
        columns = {
            "eager": (ledger.predicted_eager, ledger.saved_bytes_eager),
            "inductor": (ledger.predicted_exact, ledger.saved_bytes_exact),
            "wtacrs": (ledger.predicted, ledger.saved_bytes),
        }
        for arm, (predicted, saved) in columns.items():
            if predicted is not None and saved is not None:
                self._found[arm, size] = self._memory(arm, predicted, saved)

    def at(self, arm: str, size: int) -> TrainingMemory:
        """The memory of an arm ("eager", "inductor" or "wtacrs") at a batch size, from a trace of it.

        Raises: BudgetError: the memory budget of "wtacrs" is in bytes and cannot be met at this size.
        """
        if (arm, size) not in self._found:
            config = self.config.exact() if arm == "inductor" and self._has_limit else self.config
            with many_graphs():
                run = FakeRun.of(self.model, self.batch, self.device).resized(self.batch_size, size)
                if arm == "eager":
                    step = eager_step(run)
                    predicted = Prediction(step.peak, step.allocated, 0.0, 0)
                    self._found[arm, size] = self._memory(arm, predicted, step.saved_bytes)
                else:
                    ledger = partition_ledger(run, config)
                    self.add(ledger if config is self.config else replace(ledger, predicted=None), size)
        return self._found[arm, size]

    def limit(self, memory: int | str) -> int:
        """Memory in bytes.

        Raises:
            ReportError: it is too small for parameters, gradients and optimizer alone; the message says by how much. Or the
                batch has no size that could be changed.
            ValueError: a string of another form than "80GiB" or "80 GB".
        """
        if not self.sizes:
            raise ReportError("the batch has no tensor with a dimension, so there is no batch size to change.")
        limit = parse_bytes(memory)
        if limit < self.fixed:
            raise ReportError(
                f"{memory}: parameters ({format_bytes(self.parameters)}), gradients ({format_bytes(self.gradients)}) and "
                f"optimizer ({format_bytes(self.optimizer)}) alone take {format_bytes(self.fixed)}, "
                f"{format_bytes(self.fixed - limit)} more. Take an optimizer with less state (--optimizer, --optimizer-8bit), "
                "LoRA, or a lower precision."
            )
        return limit

    def largest_batch(self, arm: str, memory: int | str) -> int:
        """The largest batch size whose predicted total fits; 0 if not even one example does. (Where a memory budget in bytes
        cannot be met, nothing fits.)

        Every size tried is traced: the one found fits, and the next one does not. Which are tried follows from the line
        through two traces, which is seldom off by more than one.

        Args:
            arm: "eager", "inductor" or "wtacrs".
            memory: bytes, or a string such as "80GiB" or "80 GB".

        Raises: as :meth:`limit` does.
        """
        limit = self.limit(memory)
        fits, fails, size = 0, MAX_BATCH, self.batch_size
        for trial in itertools.count():
            if self._total(arm, size) <= limit:
                fits = size
            else:
                fails = size
            if fails - fits <= 1:
                break
            # Where the line does not lead to the limit, or where it is the memory budget that ends at some size.
            bisect = fails < MAX_BATCH and (trial % 4 == 3 or (arm, fails) not in self._found)
            size = (fits + fails) // 2 if bisect else min(max(self._guess(arm, limit), fits + 1), fails - 1)
        return fits

    def _total(self, arm: str, size: int) -> float:
        try:
            return self.at(arm, size).total
        except BudgetError:
            return math.inf

    def _guess(self, arm: str, limit: int) -> int:
        """The size at which the line through the two traces nearest to the limit meets it. The first line starts at no
        example and no activations; later ones do not, as gradients hide what the first examples take."""
        traced = [(size, m.total) for (a, size), m in self._found.items() if a == arm]
        points = traced if len(traced) > 1 else [(0, self.fixed), *traced]
        (x, y), (u, v) = sorted(points, key=lambda point: abs(point[1] - limit))[:2]
        return u if y == v else x + (limit - y) * (u - x) // (v - y)

    def _memory(self, arm: str, predicted: Prediction, saved: int) -> TrainingMemory:
        return TrainingMemory(
            arm=arm,
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer=self.optimizer,
            saved=saved,
            transient=max(0, predicted.peak - saved),
            step_peak=predicted.allocated,
        )


def table(found: "list[TrainingMemory]", largest: Mapping[str, int] | None = None, memory: str = "") -> str:
    """Arms as columns, in GiB (for less than one of them in MiB), and the largest batch in ``memory``."""
    unit, size = ("GiB", 2**30) if max(m.total for m in found) >= 2**30 else ("MiB", 2**20)
    rows: list[tuple[str, ...]] = []
    for title, name in (
        ("parameters", "parameters"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("saved activations", "saved"),
        ("largest transient", "transient"),
        ("total at the peak", "total"),
    ):
        rows.append((title, *(f"{getattr(m, name) / size:.2f}" for m in found)))
    if largest:
        rows.append((f"largest batch in {memory}", *(str(largest[m.arm]) for m in found)))
    return tabulate(rows, (unit, *(m.arm for m in found)), disable_numparse=True)


def optimizer_bytes(parameters: Sequence[Tensor], name: str, *, eight_bit: bool = False) -> int:
    """Bytes of an optimizer's state after its first step, from torch's own optimizer on fake tensors.

    With ``eight_bit`` the floating-point states that are as large as their parameter take 1 byte per element and a float32
    per :data:`BLOCK` elements, those of parameters under :data:`MIN_8BIT` elements 4 bytes, as in bitsandbytes.

    Raises: ReportError: an unknown optimizer.
    """
    if name not in OPTIMIZERS:
        raise ReportError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}.")
    with FakeTensorMode():
        copies = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in parameters if p.requires_grad]
        if not copies:
            return 0
        optimizer = OPTIMIZERS[name](copies)
        for p in copies:
            p.grad = torch.empty_like(p)
        with _Answers():
            optimizer.step()
    total = 0
    for p in copies:
        for t in filter(torch.is_tensor, optimizer.state[p].values()):
            whole = eight_bit and t.numel() == p.numel() and t.is_floating_point()
            if whole and p.numel() >= MIN_8BIT:
                total += t.numel() + 4 * math.ceil(t.numel() / BLOCK)
            else:
                total += t.numel() * (4 if whole else t.dtype.itemsize)
    return total


class _Answers(TorchDispatchMode):
    """A number where an optimizer asks for one: how large it is decides about no state."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in tensors)

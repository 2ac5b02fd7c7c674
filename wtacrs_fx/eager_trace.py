"""What eager PyTorch would save for the backward, and its peak: a step on fake tensors, observed operation by operation."""

import contextlib
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from wtacrs_fx.errors import ReportError
from wtacrs_fx.inductor import replaced
from wtacrs_fx.ledger import Saved
from wtacrs_fx.measure import resident
from wtacrs_fx.private import TorchDispatchMode, tree_leaves
from wtacrs_fx.tracing import FakeRun, starts


@dataclass(frozen=True)
class EagerStep:
    """A training step of eager autograd."""

    tensors: tuple[Saved, ...]
    """What it saves, each storage once; parameters and buffers are left out. Bytes are in ``bytes_eager``."""
    peak: int
    """Largest sum of live bytes: activations, their gradients and temporaries; parameters and their gradients left out."""
    allocated: int
    """The same with the gradients of parameters."""

    @property
    def saved_bytes(self) -> int:
        return sum(t.bytes_eager for t in self.tensors)


def eager_step(run: FakeRun) -> EagerStep:
    """Run forward and backward of a model eagerly on fake tensors.

    Raises:
        ReportError: the model asks for the value of a tensor (a data-dependent branch), or returns nothing to train on.
    """
    observer = _Observer()
    with without_values(run):
        with run.mode, _eager_branches(), observer.tracker, held_storages(run) as saved, observer:
            output = run.call(run.model)
        tensors = tuple(observer.describe(t) for t in saved.values())
        saved.clear()
        roots = starts(output)
        del output
        with run.mode, observer:
            torch.autograd.backward(roots, [torch.empty_like(r) for r in roots])
    grads = {_key(p.grad) for p in run.model.parameters() if p.grad is not None}
    peaks = observer.peak(set()), observer.peak(grads)
    run.model.zero_grad(set_to_none=True)
    return EagerStep(tensors, peak=peaks[1], allocated=peaks[0])


@contextlib.contextmanager
def without_values(run: FakeRun) -> Iterator[None]:
    """Raises: ReportError: where the model asks for the value of a tensor inside, which fake ones have not."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not type(error).__module__.startswith("torch._subclasses"):
            raise
        raise ReportError(
            f"{type(run.model).__name__} needs the value of a tensor in its forward ({error}), which a report does not have: "
            "it runs nothing. Leave out what makes it branch on data, for example an attention mask that is all ones."
        ) from error


@contextlib.contextmanager
def held_storages(run: FakeRun) -> Iterator[dict[int, Tensor]]:
    """Collect what autograd saves inside, one tensor per storage, without what is resident."""
    skip = {_key(t) for t in resident(run.model)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in skip:
            saved.setdefault(_key(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


@contextlib.contextmanager
def _eager_branches() -> Iterator[None]:
    """Let models of transformers branch as in eager mode: they take fake tensors for a sign of being traced, and then save
    masks that eager training does without."""
    utils = sys.modules.get("transformers.utils.import_utils")
    values = {"is_fake_tensor": lambda tensor: False} if hasattr(utils, "is_fake_tensor") else {}
    with replaced(utils, values) if utils else contextlib.nullcontext():
        yield


@dataclass
class _Observer(TorchDispatchMode):
    """Notes for every storage which module and operation made it, and when it comes and goes.

    Where the model asks whether something holds for its data, the answer is yes: models of transformers ask whether a mask is
    all ones and whether sequences are not packed, and then leave the mask out.
    """

    tracker: ModuleTracker = field(default_factory=ModuleTracker)
    origins: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Of live storages: module path and operation."""
    events: list[tuple[int, int]] = field(default_factory=list)
    """(number of a storage, its bytes, negative where it is freed), in order."""
    alive: dict[int, int] = field(default_factory=dict)
    """Storage -> its number."""
    numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        result = func(*args, **(kwargs or {}))
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.alive and _key(tensor) not in given:
                self._born(tensor, func)
        return result

    def _born(self, tensor: Tensor, func: Any) -> None:
        storage, key, number = tensor.untyped_storage(), _key(tensor), next(self.numbers)
        self.alive[key] = number
        self.events.append((number, storage.nbytes()))
        self.origins[key] = _innermost(self.tracker), func.overloadpacket.__name__
        weakref.finalize(storage, self._died, key, number, storage.nbytes())

    def _died(self, key: int, number: int, nbytes: int) -> None:
        self.events.append((number, -nbytes))
        if self.alive.get(key) == number:
            del self.alive[key], self.origins[key]

    def describe(self, tensor: Tensor) -> Saved:
        """A saved tensor; one that no operation made is part of the batch."""
        module, op = self.origins.get(_key(tensor), ("", "batch"))
        return Saved(
            module=module,
            op=op,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            bytes_eager=tensor.untyped_storage().nbytes(),
        )

    def peak(self, without: set[int]) -> int:
        """Largest sum of live bytes, some live storages left out."""
        numbers = {self.alive[k] for k in without if k in self.alive}
        return max(itertools.accumulate(size for n, size in self.events if n not in numbers), default=0)


def _innermost(tracker: ModuleTracker) -> str:
    """Path of the module whose forward runs, without the name of the root's class."""
    return max(tracker.parents - {"Global"}, key=len, default="").partition(".")[2]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

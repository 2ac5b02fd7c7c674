"""Trace a model for training without weights, data or compute, and look at what the backend would be given."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from wtacrs_fx.backend import Partitioner
from wtacrs_fx.config import Config
from wtacrs_fx.errors import BudgetError, ReportError
from wtacrs_fx.fake_devices import check_support
from wtacrs_fx.inductor import compile_inductor, like_compiled, uncompiled
from wtacrs_fx.names import dynamo_names, paths_in_model
from wtacrs_fx.private import FakeTensor, FakeTensorMode, dynamo_config, functorch_config, tree_leaves, tree_map_only

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
T = TypeVar("T")

Look = Callable[..., tuple[tuple[GraphModule, GraphModule] | None, T]]
"""``look(joint, joint_inputs, names=..., **partitioner's keywords)`` -> (forward and backward or None to end there, result)."""


NO_TRAINING_GRAPH = (
    "no training graph was traced: call model.train(), enable gradients, and let the model return what the loss is computed "
    "from. Of a function with a graph break inside a loop Dynamo compiles nothing: TORCH_LOGS=graph_breaks names them. (If "
    "this process has compiled the same code many times: torch._dynamo.reset().)"
)


@dataclass(frozen=True)
class FakeRun:
    """A model and a batch of fake tensors: shapes and types, no memory, no compute."""

    model: nn.Module
    batch: Batch
    mode: FakeTensorMode

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, device: str | torch.device | None = None) -> "FakeRun":
        """A copy of the model's structure with fake parameters, in the model's own mode (train or eval).

        Args:
            model: with real parameters or with fake ones (built under ``FakeTensorMode``).
            batch: keyword arguments (a mapping), positional arguments (a sequence), or the one argument.
            device: where the copy is to be; None: where the model is, and the CPU for a model on the meta device.

        Raises:
            ReportError: the model has no parameter that requires a gradient, the batch is on another device, or this build of
                torch has no autograd for ``device``.
        """
        model, batch = original(model), arguments(batch)
        can_train(model, batch)
        if device is not None:
            check_support(device)
        weights = [*model.parameters(), *model.buffers()]
        modes = [w.fake_mode for w in weights if isinstance(w, FakeTensor)]
        mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
        target = "cpu" if device is None and any(w.device.type == "meta" for w in weights) else device

        def fake(tensor: Tensor) -> Tensor:
            # (a copy also of what is fake already, so that nothing is left in the caller's .grad)
            result = tensor.detach() if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor.detach())
            result = result if target is None else torch.empty_like(result, device=target)
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(result, tensor.requires_grad)
            return result.requires_grad_(tensor.requires_grad)

        with mode, _TensorsCopiedBy(fake):
            memo: dict[int, Any] = {id(w): fake(w) for w in weights}
            copied = copy.deepcopy(model, memo)
            fakes = tree_map_only(Tensor, fake, batch)
        return cls(copied, fakes, mode)

    def resized(self, old: int, new: int) -> "FakeRun":
        """The same with another batch size: of all tensors whose first dimension is ``old``."""

        def resize(tensor: Tensor) -> Tensor:
            return tensor.new_empty((new, *tensor.shape[1:])) if tensor.dim() and tensor.shape[0] == old else tensor

        with self.mode:
            return replace(self, batch=tree_map_only(Tensor, resize, self.batch))

    def call(self, function: Callable[..., Any]) -> Any:
        """Call the model, or what stands for it, with the batch."""
        with self.mode:
            return call(function, self.batch)


def original(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, of a module that it returned."""
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def arguments(batch: Batch) -> Batch:
    """The batch, mappings of other types (what tokenizers of transformers return) as a dict, whose tensors torch finds.

    Raises: ReportError: it is neither a mapping nor a sequence nor a tensor.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if not isinstance(batch, (Sequence, Tensor)):
        raise ReportError(
            f"the batch is a {type(batch).__name__}: expected a mapping (keyword arguments), a sequence (positional arguments) "
            "or a tensor (the one argument)."
        )
    return batch


class _TensorsCopiedBy(TorchFunctionMode):
    """Inside, ``copy.deepcopy`` copies tensors by a function: those that a module holds as plain attributes, which are neither
    parameters nor buffers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.function(args[0])
        return func(*args, **(kwargs or {}))


def call(function: Callable[..., Any], batch: Batch) -> Any:
    """Call a function with a batch."""
    args: Sequence[Any] = () if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else batch
    return function(*args, **(batch if isinstance(batch, Mapping) else {}))


def starts(output: Any) -> list[Tensor]:
    """Where the backward starts: at the output called ``loss``, or else at every output that requires a gradient.

    Raises: ReportError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    leaves = [loss] if isinstance(loss, Tensor) else tree_leaves(output)
    found = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if not found:
        raise ReportError(
            "the model returns no tensor that requires a gradient: let it return what the loss is computed from."
        )
    return found


class GraphBreak(Protocol):
    """What Dynamo says of the end of a graph that is not the end of the model."""

    reason: str
    user_stack: Sequence[Any]
    """Frames with ``filename`` and ``lineno``, the innermost last."""


def look_at(
    run: FakeRun,
    config: Config,
    look: Look[T],
    *,
    fullgraph: bool = False,
    breaks: "list[GraphBreak] | None" = None,
    ran: "Callable[[Sequence[T], Mapping[str, str]], None] | None" = None,
) -> list[T]:
    """Let Dynamo and AOTAutograd trace a model, and look at every training graph where a partitioner would partition it.

    Args:
        run: what to trace.
        config: the options.
        look: see :data:`Look`. Nothing is compiled; where ``look`` does not end the tracing, the graphs run on fake tensors.
        fullgraph: raise ``torch._dynamo.exc.Unsupported`` at a graph break, before anything was looked at.
        breaks: receives the graph breaks.
        ran: called before every run of a graph, with what ``look`` found in it and :func:`wtacrs_fx.names.paths_in_model`.
    """
    found: list[T] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        end: Any = gm.compile_subgraph_reason
        if breaks is not None and end.graph_break:
            breaks.append(end)
        looker, made = _Looker(config, dynamo_names(gm), look, found), len(found)
        compiled = compile_inductor(gm, inputs, looker, None, compile_graph=uncompiled)

        def call(*args: Any) -> Any:
            if ran is not None:
                ran(found[made:last], paths_in_model(gm, args, run.model))
            return compiled(*args)

        last = len(found)
        return like_compiled(call, compiled)

    # No graph is taken from a cache. Shapes are those of the batch, whatever was traced before in this process.
    with (
        own_errors(),
        _ended_by_stop(),
        functorch_config.patch(enable_autograd_cache=False),
        dynamo_config.patch(run_gc_after_compile=False),  # which takes seconds
    ):
        run.call(compile_apart(run.model, backend, fullgraph=fullgraph))
    return found


def compile_apart(model: nn.Module, backend: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """``torch.compile`` for shapes as they are, whose graphs do not count for the limit of recompilations of the same code.

    Otherwise the fifth check of a model in a process finds nothing compiled, and neither does training behind four of them.
    (Versions of torch without ``isolate_recompiles`` cannot tell them apart.)
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, dynamic=False, **kwargs)
    return compiled


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Errors of this package as they are, out of what Dynamo wraps around a backend's."""
    try:
        yield
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if not isinstance(inner, BaseException) or type(inner).__module__ != BudgetError.__module__:
            raise
        raise inner from None


class _Stop(Exception):
    """Ends a compilation behind its partition."""


@contextlib.contextmanager
def _ended_by_stop() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Dynamo wraps it
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None and not isinstance(causes[-1], _Stop):
            inner = getattr(causes[-1], "inner_exception", None)
            causes.append(inner or causes[-1].__cause__ or causes[-1].__context__)
        if causes[-1] is None:
            raise


class _Looker(Partitioner, Generic[T]):
    """Looks at a training graph where a partitioner would partition it."""

    def __init__(self, config: Config, names: Sequence[str | None], look: Look[T], found: list[T]) -> None:
        super().__init__(config, names)
        self.look, self.found = look, found

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        modules, result = self.look(gm, joint_inputs, names=self.names, **kwargs)
        self.found.append(result)
        if modules is None:
            raise _Stop
        return modules


def can_train(model: nn.Module, batch: Batch) -> None:
    """Refuse what no step can be made of.

    Raises: ReportError: no module, no parameter requires a gradient, or the batch is on another device than the model.
    """
    if not isinstance(model, nn.Module):
        raise ReportError(f"the model is a {type(model).__name__}: expected a torch.nn.Module.")
    weights = [*model.parameters(), *model.buffers()]
    if not any(w.requires_grad for w in weights):
        raise ReportError(
            f"{type(model).__name__} has no parameter that requires a gradient, so nothing is saved for a backward: give a "
            "model that is trained (requires_grad_(True) on what is)."
        )
    devices = sorted({str(w.device) for w in weights})
    others = sorted({str(t.device) for t in tree_leaves(batch) if isinstance(t, Tensor)} - set(devices))
    if others:
        raise ReportError(
            f"the batch is on {', '.join(others)} and the model on {', '.join(devices)}: move one of them with .to(device)."
        )

"""Graphs that were traced elsewhere: copies of them, the inputs that a user gives for them, and the values of their nodes."""

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from wtacrs_fx.functional import RowSampler
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.private import FakeTensorMode, tree_leaves
from wtacrs_fx.swap import SampledLinear

_HOOKS = [name for name in vars(nn.Module()) if "_hook" in name]


def check_traced(gm: Any, caller: str) -> None:
    """Raise TypeError unless ``gm`` is a GraphModule, ValueError if it was rewritten before."""
    if not isinstance(gm, GraphModule):
        raise TypeError(
            f"{caller}() takes a torch.fx.GraphModule, not {type(gm).__name__}. Trace the model first: "
            "torch.fx.symbolic_trace(model), make_fx(model)(*inputs) or torch.export.export(model, inputs).module(); for code "
            "that nothing can trace there is wtacrs_fx.swap_linears(model)."
        )

    def is_ours(node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(gm.get_submodule(str(node.target)), (RowSampler, SampledLinear))
        return getattr(node.target, "namespace", "") == "wtacrs"

    found = [n.name for n in gm.graph.nodes if is_ours(n)]
    if found:
        raise ValueError(
            f"this graph was rewritten already (node {', '.join(found[:3])}); rewrite the graph it was made of, after "
            "wtacrs_fx.restore_linears(model) where its layers were swapped."
        )


def share(gm: GraphModule) -> GraphModule:
    """A GraphModule with a graph of its own and the same parameters, buffers and submodules under the same names; what else
    the tracer or the user has put on the module (Hugging Face: config; hooks) comes along."""
    graph = copy.deepcopy(gm.graph)
    graph._tracer_cls = None  # unpickling traces the code again: with make_fx's tracer it would trace into the samplers
    result = GraphModule(gm, graph)
    for name, value in vars(gm).items():
        if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "meta") or name in _HOOKS:
            setattr(result, name, copy.copy(value))
        elif not (
            name.startswith("_") or name in vars(result) or isinstance(value, MethodType)
        ):  # export's own train()
            setattr(result, name, value)
    return result


def flatten_inputs(gm: GraphModule, example_inputs: Any) -> list[Any] | None:
    """One value per placeholder, from the user's example inputs or from what the tracer left; None if neither is there.

    Raises:
        ValueError: another number of inputs, or other names, than the graph has placeholders.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = [str(n.target) for n in placeholders]
    if example_inputs is None:
        values = [n.meta.get("val") for n in placeholders]
        return values if all(v is not None for v in values) else None
    if isinstance(example_inputs, Mapping) and set(example_inputs) <= set(names):
        defaults = {str(n.target): n.args[0] for n in placeholders if n.args}
        given = {**defaults, **example_inputs}
        values = [given[n] for n in names if n in given]
    else:
        values = tree_leaves((example_inputs,), is_leaf=lambda x: x is None)
        values += [n.args[0] for n in placeholders[len(values) :] if n.args]
    if len(values) != len(names):
        raise ValueError(
            f"example_inputs: {len(values)} values for {len(names)} inputs of the graph: {', '.join(names)}."
        )
    return values


def propagate(gm: GraphModule, inputs: Sequence[Any] | None) -> dict[int, int]:
    """Fill ``meta["val"]`` of every node with a fake tensor, and find what autograd would hold in training.

    Nothing is computed: the graph is run on fake tensors.

    Args: inputs, one per placeholder; None: do nothing, and return nothing.

    Returns: storage saved for the backward (by address) -> its bytes; parameters and buffers are left out.

    Raises: ValueError if the graph does not run with inputs like these.
    """
    if inputs is None:
        return {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    run = _Propagation(gm, mode)
    members = {**dict(run.named_parameters()), **dict(run.named_buffers())}
    fakes: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in members.items()}
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    samplers = nn.ModuleList(m for m in gm.modules() if isinstance(m, RowSampler)).train()
    try:
        with (
            mode,
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(save, lambda t: t),
        ):
            result = torch.func.functional_call(run, fakes, tuple(map(_fake(mode), inputs)))
    except Exception as error:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs]
        raise ValueError(f"the graph does not run with inputs {shapes}: {error}") from error
    finally:
        samplers.train(gm.training)
    del result
    skip = {w.untyped_storage()._cdata for w in fakes.values()}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return {key: size for key, size in storages.items() if key not in skip}


class _Propagation(nn.Module):
    """A graph whose every value is put into ``meta["val"]`` when it is called."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__()
        self.gm, self.mode = gm, mode

    def forward(self, *inputs: Any) -> Any:
        return FakeTensorProp(self.gm, self.mode).run(*inputs, enable_io_processing=False)


def _fake(mode: FakeTensorMode) -> Callable[[Any], Any]:
    """A function that makes a fake input of a real one, or of another mode's; sizes that are symbols are the example's."""

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape, stride = ([hint(s) for s in sizes] for sizes in (value.shape, value.stride()))
        plain = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return plain.requires_grad_(value.requires_grad)

    return fake

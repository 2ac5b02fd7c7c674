"""The standalone pass: rewrite a forward graph that was traced elsewhere, and run it in plain eager."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from wtacrs_fx.backend import complaints
from wtacrs_fx.config import Config
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.functional import RowSampler
from wtacrs_fx.ledger import Entry, Ledger
from wtacrs_fx.passes.einsum import split_einsums
from wtacrs_fx.passes.forward import SampledProducts, sample_products
from wtacrs_fx.passes.kinds import classify
from wtacrs_fx.passes.policy import hint, rows_kept
from wtacrs_fx.passes.products import (
    FROZEN,
    Product,
    draw_shape,
    find_products,
    is_quantised,
    linear_weights,
    tensor_of,
)
from wtacrs_fx.passes.watch import watch
from wtacrs_fx.private import FakeTensorMode, tree_leaves
from wtacrs_fx.swap import SampledLinear

_HOOKS = [name for name in vars(nn.Module()) if "_hook" in name]


def rewrite(gm: GraphModule, example_inputs: Any = None, **options: Any) -> GraphModule:
    """A forward graph whose linear layers keep sampled rows of their inputs for the backward.

    ``linear``, ``addmm``, ``mm``, ``matmul``, ``bmm``, ``baddbmm``, ``einsum`` with a weight, and called ``nn.Linear`` or
    ``Conv1D`` modules become ``torch.ops.wtacrs.linear`` and ``.matmul``. The result runs in plain eager and is trained as it
    is: rows are chosen by their norms in the forward, the forward's values and the gradients of inputs and biases are exact,
    the mean of weight gradients is exact. In eval mode, and without gradients, it computes exactly and draws nothing.

    Args:
        gm: from ``torch.fx.symbolic_trace`` (or a tracer built on it, as transformers before 5 has one), ``make_fx`` or
            ``torch.export.export(...).module()``. It is not changed; the result shares its parameters, buffers and
            submodules, under their names.
        example_inputs: the call's positional arguments (a tensor, or a tuple), or a dict by placeholder name. They are used
            for their shapes, and inputs that are ``nn.Parameter`` count as weights. With shapes it is known which inputs
            another op saves in any case: those stay exact. Without them the shapes that the tracer has left are used, and
            where there are none every size is decided about when the module runs.
        options: fields of :class:`wtacrs_fx.Config`. ``late``, ``memory_budget`` and those about Inductor have no effect.

    Returns:
        A GraphModule; ``result.meta["wtacrs_ledger"]`` is its :class:`wtacrs_fx.Ledger`. Its totals are what autograd
        holds for the backward in eager mode (0 where shapes are not known).

    Raises:
        TypeError: ``gm`` is no GraphModule, or an unknown option.
        ValueError: the graph was rewritten before; the example inputs do not fit; an option outside of its range.
    """
    config = Config.from_options(options)
    config.refuse_state("rewrite()")
    check_traced(gm, "rewrite")
    result = share(gm)
    inputs = flatten_inputs(result, example_inputs)
    if any(map(is_quantised, result.modules())):
        inputs = None  # fake tensors do not run such a module
    bytes_exact = sum(propagate(result, inputs).values())
    with watch("split_einsums", result.graph, config.verbose):
        if split_einsums(result, classify(result.graph, _weights(result, inputs)), config):
            propagate(result, inputs)
    products = _find(result, inputs, config)
    if inputs is not None:
        products = _settle(result, inputs, products, config)
    ops = {p.node: _op_name(result, p.node) for p in products}
    with watch("sample_products", result.graph, config.verbose):
        done = sample_products(result, products, config)
    entries = tuple(_entries(result, products, ops, done, config))
    result.meta["wtacrs_ledger"] = ledger = Ledger(entries, bytes_exact, sum(propagate(result, inputs).values()))
    report(ledger, config)
    return result


def report(ledger: Ledger, config: Config) -> None:
    """Say what a user should hear: the table if verbose, a warning if nothing is sampled or a name matches nothing."""
    if config.verbose:
        print(ledger.table(), file=sys.stderr)
    for message in complaints(ledger, config):
        warnings.warn(message, WtacrsWarning, stacklevel=3)


def _find(gm: GraphModule, inputs: Sequence[Any] | None, config: Config) -> list[Product]:
    return find_products(gm, classify(gm.graph, _weights(gm, inputs)), config)


def _settle(gm: GraphModule, inputs: Sequence[Any], products: Sequence[Product], config: Config) -> list[Product]:
    """Leave operands alone that autograd would hold all the same, since another op saves them (ReLU its output, softmax P):
    their rows would be bytes and noise for nothing. Found by a rewrite on trial."""
    trial = share(gm)
    propagate(trial, inputs)
    tried = _find(trial, inputs, config)
    sample_products(trial, tried, config)
    saved = propagate(trial, inputs)

    def pays(product: Product, columns: bool) -> bool:
        value = tensor_of(trial, product.operand(columns)) if product.sampled[columns] else None
        return value is not None and value.untyped_storage()._cdata not in saved

    result = []
    for product, copied in zip(products, tried):
        sampled = tuple(pays(copied, columns) for columns in (False, True))
        if product.reason:
            result.append(product)
        elif any(sampled):
            result.append(replace(product, sampled=sampled))
        else:
            result.append(replace(product, reason="input saved by another op anyway"))
    return result


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


def _weights(gm: GraphModule, inputs: Sequence[Any] | None) -> set[Node]:
    """Placeholders that hold parameters: given as such, or used as a linear layer's weight."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {n for n, x in zip(placeholders, inputs or ()) if isinstance(x, nn.Parameter)} | {*linear_weights(gm)}


def _op_name(gm: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _entries(
    gm: GraphModule, products: Sequence[Product], ops: Mapping[Node, str], done: SampledProducts, config: Config
) -> Iterator[Entry]:
    """A line per sampled operand, or per product that stays exact. A shared draw is counted at its first product."""
    first_of: dict[Node, str] = {}
    for product in products:
        decision = "exact" if product.reason else "early"
        product.node.meta["wtacrs"] = {"site": product.module, "decision": decision, "reason": product.reason}
        operands = [c for c in (False, True) if product.sampled[c]]
        for columns in operands[:1] if product.reason else operands:
            draw = done.draws.get((product.node, columns))
            shared = first_of.get(draw) if draw is not None else None
            if draw is not None:
                first_of.setdefault(draw, product.module)
            value = tensor_of(gm, product.operand(columns))
            shape = () if value is None else draw_shape(product, value, columns, gm)
            rows: Any = shape[-2] if shape else "?"
            kept: Any = (
                rows
                if product.reason or not shape
                else rows_kept(rows, config.ratio_of(shared or product.module) or 1.0)
            )
            counted = value is not None and not shared and product.reason != FROZEN
            size = value.numel() * value.element_size() if counted and value is not None else 0
            matrices = torch.Size(shape[:-2]).numel()
            width = shape[-1] * value.element_size() + 8 if shape and value is not None else 0  # a row and its index
            yield Entry(
                module=product.module,
                op=ops[product.node],
                shape=tuple(map(hint, value.shape)) if value is not None else ("?",),
                dtype="?" if value is None else str(value.dtype).removeprefix("torch."),
                rows=rows,
                kept=kept,
                bytes_exact=size,
                bytes_now=size if product.reason else 0 if shared or not shape else matrices * kept * width,
                decision=decision,
                reason=product.reason
                or (f"shared with {shared}" if shared else "" if shape else "size known at run time"),
            )

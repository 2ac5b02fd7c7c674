"""The standalone pass: rewrite a forward graph that was traced elsewhere, and run it in plain eager."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from wtacrs_fx.complaints import complaints
from wtacrs_fx.config import Config
from wtacrs_fx.config_checks import refuse_all_rows
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.ledger import Entry, Ledger
from wtacrs_fx.passes.einsum import split_einsums
from wtacrs_fx.passes.forward import SampledProducts, sample_products
from wtacrs_fx.passes.kinds import classify
from wtacrs_fx.passes.policy import rows_kept
from wtacrs_fx.passes.products import (
    FROZEN,
    Product,
    draw_shape,
    find_products,
    is_quantised,
    linear_weights,
    tensor_of,
)
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.passes.watch import watch
from wtacrs_fx.traced_graph import check_traced, flatten_inputs, propagate, share


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
    refuse_all_rows(config, "rewrite()")
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

"""Rewrite a joint graph that the user traced, forward and backward in one, and run it as it is."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import wtacrs_fx.norm_ops
import wtacrs_fx.ops  # noqa: F401  (register the custom ops)
from wtacrs_fx.config import Config
from wtacrs_fx.config_checks import refuse_all_rows
from wtacrs_fx.passes.account import build_ledger
from wtacrs_fx.passes.convolutions import split_convolutions
from wtacrs_fx.passes.draws import Draws
from wtacrs_fx.passes.kinds import Kind, classify, is_tangent
from wtacrs_fx.passes.policy import decide, needed_whole, settle, view_base
from wtacrs_fx.passes.sample import sample
from wtacrs_fx.passes.sever import NoCuts
from wtacrs_fx.passes.sites import find_sites
from wtacrs_fx.passes.tangents import find_tangents, handed_over, match_gradients
from wtacrs_fx.passes.watch import watch
from wtacrs_fx.private import OpOverload
from wtacrs_fx.rewrite import report
from wtacrs_fx.traced_graph import check_traced, flatten_inputs, propagate, share


def rewrite_joint(
    gm: GraphModule, example_inputs: Any = None, *, tangents: Sequence[str] = (), **options: Any
) -> GraphModule:
    """A joint graph whose weight gradients are estimated from sampled rows.

    The graph computes a loss and its gradients, as ``make_fx`` traces them::

        def step(params, x):
            loss = model(params, x)
            return loss, *torch.autograd.grad(loss, params)

        sampled = wtacrs_fx.rewrite_joint(make_fx(step)(params, x), ratio=0.3)

    The gradient side is found from the graph: it begins with the implicit gradient of a loss of one element, and its outputs
    are matched to inputs and attributes. There is no cut here, the graph runs in its order: an input that only its own weight
    gradient reads is sampled in the forward and freed there (early); one that the backward reads in any case is sampled by
    the true gradient (late).

    Args:
        gm: aten-level joint graph, functional but for writes to parameters and buffers. It is not changed.
        example_inputs: needed only if the tracer left no shapes, see :func:`wtacrs_fx.rewrite`.
        tangents: names of placeholders that are gradients of outputs (``grad_outputs``), where there are any.
        options: fields of :class:`wtacrs_fx.Config`. ``memory_budget`` and those about Inductor have no effect.

    Returns:
        A GraphModule of the same signature; ``result.meta["wtacrs_ledger"]`` is its :class:`wtacrs_fx.Ledger`, over what the
        forward hands to the backward.

    Raises:
        TypeError: ``gm`` is no GraphModule, or an unknown option.
        ValueError: no gradient side is found, or ``tangents`` has unknown names; the graph was rewritten before, has no shapes,
            or changes activations in place; an option outside of its range.
    """
    config = Config.from_options(options)
    config.refuse_state("rewrite_joint()")
    refuse_all_rows(config, "rewrite_joint()")
    check_traced(gm, "rewrite_joint")
    result, exact = share(gm), share(gm)
    for module in (result, exact):
        _fill_shapes(module, example_inputs)
    graph = result.graph
    with watch("split_convolutions", graph, config.verbose):
        split_convolutions(graph, config)
    begin = _begin(graph, tangents)
    grads = match_gradients(graph, classify(graph, (), begin))
    weights = [*grads.values()]
    kinds = classify(graph, weights, begin)
    _check_functional(graph, kinds)
    names = {n: str(n.target) for n in weights}
    plan = decide(find_sites(graph, kinds, grads, names, config.attention), config)
    saved = {view_base(n).name for n in handed_over(graph, kinds)}
    plan, _ = settle(plan, saved, needed_whole(plan, kinds), config)
    with watch("sample", graph, config.verbose):
        done = sample(graph, plan, {n: n for n in graph.nodes}, Draws(graph, NoCuts(), config.seed), config)
    for decision in plan:
        node = done.products.get(decision.site.node, decision.site.node)
        node.meta["wtacrs"] = {
            "site": decision.site.module,
            "decision": decision.action.value,
            "reason": decision.reason,
        }
    graph.eliminate_dead_code()
    graph.lint()
    result.recompile()
    now, before = (handed_over(g, _kinds(g, weights, begin)) for g in (graph, exact.graph))
    result.meta["wtacrs_ledger"] = ledger = build_ledger(plan, done, before, now, {n.name for n in weights})
    report(ledger, config)
    return result


def _fill_shapes(gm: GraphModule, example_inputs: Any) -> None:
    """Give all nodes fake values of one mode, unless they have them: make_fx on real tensors leaves a mode for each."""
    values = [n.meta.get("val") for n in gm.graph.nodes if n.op != "output"]
    modes = {getattr(v, "fake_mode", None) for v in values if v is None or isinstance(v, Tensor)}
    if len(modes) == 1 and None not in modes:
        return
    inputs = flatten_inputs(gm, example_inputs)
    if inputs is None:
        raise ValueError("the graph has no shapes: trace it with make_fx, or give example_inputs.")
    propagate(gm, inputs)


def _begin(graph: Graph, names: Sequence[str]) -> list[Node]:
    """The tangents: named by the user or AOTAutograd, and implicit ones."""
    placeholders = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
    if unknown := [n for n in names if n not in placeholders]:
        raise ValueError(f"tangents={unknown}: no such input. The graph's inputs are {', '.join(placeholders)}.")
    found = (
        [placeholders[n] for n in names] + [n for n in placeholders.values() if is_tangent(n)] + find_tangents(graph)
    )
    if not found:
        raise ValueError(
            "no gradient side in this graph: there is no implicit gradient of a one-element loss. Trace the forward and "
            "torch.autograd.grad(loss, params) together with make_fx, without a decomposition_table that makes a constant of "
            "ones_like(loss); name inputs that are gradients of outputs in tangents=[...]; for a forward graph there is "
            "wtacrs_fx.rewrite()."
        )
    return found


def _kinds(graph: Graph, weights: Sequence[Node], begin: Sequence[Node]) -> dict[Node, Kind]:
    """Kinds of a graph in which the weights and the first gradients have these names."""
    by_name = {n.name: n for n in graph.nodes}
    return classify(graph, [by_name[n.name] for n in weights], [by_name[n.name] for n in begin])


def _check_functional(graph: Graph, kinds: dict[Node, Kind]) -> None:
    """A sampled tensor must keep its value, so only parameters and buffers may be written to."""
    for node in graph.nodes:
        written = isinstance(node.target, OpOverload) and node.target._schema.is_mutable and node.args[0]
        if isinstance(written, Node) and kinds[view_base(written)] is not Kind.WEIGHT:
            raise ValueError(
                f"{node.name} = {node.target} changes an activation in place. Make the graph functional: "
                "make_fx(torch.func.functionalize(gm))(*inputs)."
            )

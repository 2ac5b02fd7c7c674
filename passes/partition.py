"""Rewrite a joint graph, cut it with torch's min-cut partitioner, keep what paid, and account for it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import Graph, GraphModule, Node

import wtacrs_fx.ops  # noqa: F401  (registers the custom ops)
from wtacrs_fx.config import Config
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.passes.account import build_ledger, saved_bytes
from wtacrs_fx.passes.invariants import check_partition
from wtacrs_fx.passes.kinds import Kind, classify, is_tangent
from wtacrs_fx.passes.policy import Action, Decision, decide, needed_whole, retreat, settle, view_base
from wtacrs_fx.passes.sample import Sampled, sample
from wtacrs_fx.passes.sever import Severed, saved_tensors
from wtacrs_fx.passes.sites import CONTRACTIONS, find_sites, gradient_outputs, primals

Partition = tuple[GraphModule, GraphModule]


def partition(
    joint: GraphModule,
    joint_inputs: Any,
    *,
    config: Config,
    names: Sequence[str | None] = (),
    num_fwd_outputs: int,
    static_lifetime_input_indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[GraphModule, GraphModule, Ledger | None]:
    """Forward graph, backward graph and ledger of a joint graph.

    The exact partition is made for comparison. Then every admitted site is sampled late and the graph is cut: the backward
    now needs inputs at their kept rows only, and most can be computed from tensors saved for something else. Inputs that
    this cut saves for nothing but their own site become early sites, whose kept rows are smaller, and the graph is cut
    again. (A third sampled cut is needed only if the backward turns out to hold such an input all the same.)

    Args:
        joint, joint_inputs, num_fwd_outputs, static_lifetime_input_indices, kwargs: as AOTAutograd gives them to
            ``min_cut_rematerialization_partition``, to which they go on.
        config: what to sample.
        names: per primal its parameter's name, where known.

    Returns:
        (forward, backward, ledger). A graph without tangents is partitioned exactly and has no ledger; nor has one whose
        backward has no matrix product at all, such as a loss behind a graph break.
    """

    def cut(module: GraphModule, outputs: int) -> Partition:
        return min_cut_rematerialization_partition(
            module,
            joint_inputs,
            num_fwd_outputs=outputs,
            static_lifetime_input_indices=list(static_lifetime_input_indices or ()),
            **kwargs,
        )

    if not any(is_tangent(n) for n in joint.graph.nodes):
        return (*cut(joint, num_fwd_outputs), None)

    joint.graph.eliminate_dead_code()
    joint.graph = fx_graph_cse(joint.graph)  # one node per value, so that sites that share an input share its node
    weights = weight_placeholders(joint.graph, num_fwd_outputs, static_lifetime_input_indices)
    kinds = classify(joint.graph, weights)
    sites = find_sites(
        joint.graph,
        kinds,
        gradient_outputs(joint.graph, num_fwd_outputs, weights),
        parameter_names(joint.graph, names),
    )
    plan = decide(sites, config)
    weight_names = {n.name for n in weights}

    exact = cut(copy_joint(joint)[0], num_fwd_outputs)
    best, done = exact, Sampled()
    if any(d.action is not Action.EXACT for d in plan):
        attempt = functools.partial(_sample_and_cut, joint, num_fwd_outputs=num_fwd_outputs, cut=cut, config=config)
        held = functools.partial(saved_bytes, num_fwd_outputs=num_fwd_outputs, weights=weight_names)
        best, done = attempt(plan)
        saved = {view_base(n).name for n in saved_tensors(best[0], num_fwd_outputs)}
        revised, changed = settle(plan, saved, needed_whole(plan, kinds))
        plan, best, done = _better(plan, best, done, revised, changed, attempt, held)
        in_backward = {n.name for n in best[1].graph.nodes}
        revised, changed = retreat(plan, in_backward, config)
        plan, best, done = _better(plan, best, done, revised, changed, attempt, held)
        check_partition(*best, plan, done, num_fwd_outputs)
    if not sites and not any(kind is Kind.GRADIENT and node.target in CONTRACTIONS for node, kind in kinds.items()):
        return (*best, None)
    return (*best, build_ledger(plan, done, exact[0], best[0], num_fwd_outputs, weight_names))


def weight_placeholders(graph: Graph, num_fwd_outputs: int, static: Sequence[int] | None) -> list[Node]:
    """Placeholders that are parameters or buffers.

    Dynamo names them by index (``static``) and ``aot_module`` by description. A plain function traced by ``aot_function``
    says neither: then every input with a gradient counts, so that a product with such an input stays exact.
    """
    inputs = primals(graph)
    chosen = {inputs[i] for i in static or () if i < len(inputs)}
    chosen |= {n for n in inputs if type(n.meta.get("desc")).__name__ in ("ParamAOTInput", "BufferAOTInput")}
    if not chosen:
        chosen = set(gradient_outputs(graph, num_fwd_outputs, inputs).values())
    return [n for n in inputs if n in chosen]


def parameter_names(graph: Graph, names: Sequence[str | None]) -> dict[Node, str]:
    """Placeholder -> parameter name, from ``names`` (by position) or from AOTAutograd's descriptions."""
    result = {}
    for i, node in enumerate(primals(graph)):
        name = names[i] if i < len(names) else None
        name = name or getattr(node.meta.get("desc"), "target", None)
        if name:
            result[node] = name
    return result


def _better(
    plan: list[Decision],
    best: Partition,
    done: Sampled,
    revised: list[Decision],
    changed: int,
    attempt: Callable[[list[Decision]], tuple[Partition, Sampled]],
    held: Callable[[GraphModule], int],
) -> tuple[list[Decision], Partition, Sampled]:
    """The revised plan with its partition, unless it holds more bytes than the plan it came from."""
    if not changed:
        return revised, best, done  # the same actions, with their reasons
    again, done_again = attempt(revised)
    if held(again[0]) > held(best[0]):
        return plan, best, done
    return revised, again, done_again


def _sample_and_cut(
    joint: GraphModule,
    plan: Sequence[Decision],
    *,
    num_fwd_outputs: int,
    cut: Callable[[GraphModule, int], Partition],
    config: Config,
) -> tuple[Partition, Sampled]:
    module, env = copy_joint(joint)
    severed = Severed(module.graph)
    done = sample(module.graph, plan, env, severed, config)
    outputs = severed.extend_outputs(num_fwd_outputs)
    module.graph.lint()
    forward, backward = cut(module, outputs)
    severed.join(forward, num_fwd_outputs)
    return (forward, backward), done


def copy_joint(joint: GraphModule) -> tuple[GraphModule, Mapping[Node, Node]]:
    """A copy of a joint graph, and node of the original -> node of the copy. The partitioner changes what it is given."""
    graph = Graph()
    env: dict[Node, Node] = {}
    output = joint.graph.output_node()
    new_output = graph.output(graph.graph_copy(joint.graph, env))
    new_output.meta.update(output.meta)
    return GraphModule(joint, graph), env

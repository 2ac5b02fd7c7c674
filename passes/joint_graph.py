"""A joint graph as AOTAutograd gives it: which of its inputs are parameters, a copy of it, and torch's cut through it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from wtacrs_fx.config import Config
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.names import Argument
from wtacrs_fx.passes.budget import Partition
from wtacrs_fx.passes.norms import shows_sequences
from wtacrs_fx.passes.sites import Site, gradient_outputs, primals
from wtacrs_fx.passes.sizes import hint
from wtacrs_fx.private import functorch_config, make_graph_module, min_cut_rematerialization_partition
from wtacrs_fx.roomy import without_code


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
        name = None if isinstance(name, Argument) else name
        name = name or getattr(node.meta.get("desc"), "target", None)
        if name:
            result[node] = name
    return result


def padding_placeholder(
    graph: Graph, names: Sequence[str | None], padding: str | None, sites: Sequence[Site]
) -> Node | None:
    """The placeholder of the batch argument that the option ``padding`` names; None without the option, or without sites. Warns
    if it is about the rows of none of them.

    Raises:
        ValueError: the graph has no such input; the batch arguments it has are listed.
    """
    if padding is None or not sites:
        return None
    arguments = {str(name): node for name, node in zip(names, primals(graph)) if isinstance(name, Argument)}
    if padding not in arguments:
        raise ValueError(
            f"padding={padding!r}: no such argument of the model. Those of this graph are {', '.join(arguments) or 'unnamed'}; "
            "behind a graph break only what is passed on by its name can be used."
        )
    mask = arguments[padding]
    if not _is_about_rows(mask, sites):
        _guard_equal_sizes(mask, sites)
    if not _is_about_rows(mask, sites):
        warnings.warn(
            f"wtacrs: padding={padding!r} has the shape {tuple(mask.meta['val'].shape)}, and no linear layer of this graph has "
            "that many rows: it has no effect here. Expected one element per row, [batch, sequence].",
            WtacrsWarning,
            stacklevel=2,
        )
    return mask


def _is_about_rows(mask: Node, sites: Sequence[Site]) -> bool:
    """Whether a mask has one element for every row of a site's input."""
    return any(statically_known_true(mask.meta["val"].numel() == site.activation.rows) for site in sites)


def _guard_equal_sizes(mask: Node, sites: Sequence[Site]) -> None:
    """With dynamic shapes the sizes of a mask [B, T] may be symbols that nothing in the model compares with those of the
    tokens (Hugging Face's models index their masks). Where both are equal in the example, that becomes a guard of the graph,
    and the symbols become one."""
    sizes = mask.meta["val"].shape
    for site in sites:
        shown = shows_sequences(site)
        rows = shown[0].meta["val"].shape[: len(sizes)] if shown else ()
        if [hint(n) for n in rows] == [hint(n) for n in sizes]:
            for a, b in zip(rows, sizes):
                guard_or_false(a == b)
            return


def cutter(
    joint_inputs: Any, config: Config, static: Sequence[int] | None, kwargs: Mapping[str, Any]
) -> Callable[..., Partition]:
    """Torch's partitioner for one joint graph: (module, number of forward outputs) -> partition, to be compiled again before
    it runs. Where this package plans the memory, torch's own budget is off."""

    def cut(module: GraphModule, outputs: int, **torch_options: Any) -> Partition:
        if config.memory_budget is not None:
            torch_options["activation_memory_budget"] = 1.0
        with functorch_config.patch(torch_options), without_code():
            return min_cut_rematerialization_partition(
                module,
                joint_inputs,
                num_fwd_outputs=outputs,
                static_lifetime_input_indices=list(static or ()),
                **kwargs,
            )

    return cut


def copy_joint(joint: GraphModule) -> tuple[GraphModule, Mapping[Node, Node]]:
    """A copy of a joint graph, and node of the original -> node of the copy. The partitioner changes what it is given."""
    graph = Graph()
    env: dict[Node, Node] = {}
    output = joint.graph.output_node()
    new_output = graph.output(graph.graph_copy(joint.graph, env))
    new_output.meta.update(output.meta)
    return make_graph_module(joint, graph), env

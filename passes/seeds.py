"""Give every seed a tensor of its own, so that layers share their kernels.

Inductor draws all seeds of a graph at once. On CPU a kernel that draws a dropout mask has the position of its seed written
into its code, so that every layer's kernel is generated and compiled anew (on CUDA the position is an argument). Read from
tensors of one number they are all the same.

Before::

    seeds: "i64[36]" = prims.inductor_seeds(36, cpu)
    seed: "i64[]" = prims.inductor_lookup_seed(seeds, 7)

After (the same number)::

    seeds: "i64[36]" = prims.inductor_seeds(36, cpu)
    parts: "(i64[1], ...)" = wtacrs.split_seeds(seeds)
    part: "i64[1]" = parts[7]
    seed: "i64[]" = prims.inductor_lookup_seed(part, 0)
"""

import operator

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.emit import Emitter

prims, wtacrs = torch.ops.prims, torch.ops.wtacrs


def split_seeds(graph: Graph) -> int:
    """Rewrite the lookups of CPU seeds. Returns how many; a lone lookup is left as it is."""
    lookups: dict[Node, list[Node]] = {}
    for lookup in graph.find_nodes(op="call_function", target=prims.inductor_lookup_seed.default):
        seeds = lookup.args[0]
        if isinstance(seeds, Node) and seeds.meta["val"].device.type == "cpu":
            lookups.setdefault(seeds, []).append(lookup)
    several = {seeds: found for seeds, found in lookups.items() if len(found) > 1}
    for seeds, found in several.items():
        with graph.inserting_before(found[0]):  # in graph order
            parts = Emitter(graph, seeds)(wtacrs.split_seeds.default, seeds)
        for lookup in found:
            with graph.inserting_before(lookup):
                part = Emitter(graph, seeds)(operator.getitem, parts, lookup.args[1])
            lookup.args = (part, 0)
    return sum(map(len, several.values()))

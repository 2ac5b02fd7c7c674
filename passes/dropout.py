"""Act: draw dropout masks on CPU in vectors, bit by bit those that Inductor draws.

Before::

    random: "f32[16, 128, 768]" = prims.inductor_random([16, 128, 768], seed, "rand")
    gt: "b8[16, 128, 768]" = random > 0.1

After (see :mod:`wtacrs_fx.drawn`)::

    drawn: "u8[16, 128, 768]" = wtacrs.drawn_mask(seed, [16, 128, 768], 0.1, True)
    gt: "b8[16, 128, 768]" = convert_element_type(drawn, int32) != 0
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from wtacrs_fx.drawn import register
from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.pack import as_bool

aten, prims, wtacrs = torch.ops.aten, torch.ops.prims, torch.ops.wtacrs

_ABOVE: Mapping[Any, bool] = {aten.gt.Scalar: True, aten.lt.Scalar: False}

POSITIONS = 2**31
"""Inductor counts an element's position in 32 bits."""


def draw_masks(graph: Graph) -> int:
    """Rewrite the random numbers that are read by nothing but comparisons with a constant. Left alone are those of symbolic
    size, and those of other devices.

    Args:
        graph: a partitioned forward or backward.

    Returns: how many masks there were.
    """
    count = 0
    for random in graph.find_nodes(op="call_function", target=prims.inductor_random.default):
        if _is_drawn_for_masks(random):
            for mask in list(random.users):
                _draw(graph, random, mask)
                count += 1
            graph.erase_node(random)
    if count:
        register()
    return count


def _is_drawn_for_masks(random: Node) -> bool:
    shape, _, mode = random.args
    assert isinstance(shape, (list, tuple))
    static = all(isinstance(s, int) for s in shape) and math.prod(shape) < POSITIONS
    plain = random.meta["val"].device.type == "cpu" and mode == "rand" and not random.kwargs.get("offset")
    return static and plain and all(u.target in _ABOVE and isinstance(u.args[1], (int, float)) for u in random.users)


def _draw(graph: Graph, random: Node, mask: Node) -> None:
    shape, seed, _ = random.args
    bound: Any = mask.args[1]
    with graph.inserting_before(mask):
        emit = Emitter(graph, mask)
        drawn = emit(wtacrs.drawn_mask.default, seed, shape, float(bound), _ABOVE[mask.target])
        given = emit.inline(as_bool, drawn)
    for reader in list(mask.users):
        steps = _steps_to_bytes(reader)
        if steps:
            steps[-1].replace_all_uses_with(drawn)
            for step in reversed(steps):
                graph.erase_node(step)
        else:
            reader.replace_input_with(mask, given)
    graph.erase_node(mask)


def _steps_to_bytes(reader: Node) -> list[Node]:
    """Of a mask, if the reader is the first step of :func:`wtacrs_fx.passes.pack.write_bytes`; else none."""
    steps = [reader]
    while steps[-1].target is prims.convert_element_type.default and len(steps[-1].users) == 1:
        steps += steps[-1].users
    return steps if steps[-1].target is prims.inductor_force_stride_order.default else []

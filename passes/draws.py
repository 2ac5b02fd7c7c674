"""The random seed of a joint graph that is being rewritten, and the numbers that tell its draws apart."""

from contextlib import AbstractContextManager

import torch
from torch.fx import Graph, Node

from wtacrs_fx.passes.emit import Emitter
from wtacrs_fx.passes.sever import Cuts

wtacrs = torch.ops.wtacrs


class Draws:
    """One seed per device and graph, drawn in the forward; one stream per draw.

    Args:
        graph: joint graph.
        severed: receives the seeds that the backward reads.
        seed: the option of that name.
    """

    def __init__(self, graph: Graph, severed: Cuts, seed: int | None) -> None:
        self.graph, self.severed, self._seed = graph, severed, seed
        self.start = next(n for n in graph.nodes if n.op != "placeholder")
        self._streams = 0
        self._seeds: dict[torch.device, tuple[Node, Node]] = {}

    def seed(self, like: Node) -> tuple[Node, Node]:
        """(seed in the forward, its copy for the backward) on a node's device."""
        device = like.meta["val"].device
        if device not in self._seeds:
            with self.graph.inserting_before(self.start):
                emit = Emitter(self.graph, like, tag="must_be_in_forward")
                seed = emit(wtacrs.draw_seed.default, device, self._seed)
            self._seeds[device] = (seed, self.severed.cut(seed))
        return self._seeds[device]

    def stream(self) -> int:
        """A number that no other draw of this graph has."""
        self._streams += 1
        return self._streams - 1

    def behind(self, node: Node) -> AbstractContextManager:
        """Insert right behind a node; behind all placeholders if it is one."""
        return self.graph.inserting_before(self.start if node.op == "placeholder" else node.next)

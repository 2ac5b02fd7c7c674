"""Insert nodes with fake values, so that partitioner and Inductor find the metadata they need on them."""

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

_COPIED = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "fwd_source_fn_stack", "seq_nr", "custom")


class Emitter:
    """``emit(target, *args)`` creates a call at the graph's insertion point, with ``meta["val"]`` and provenance.

    Args:
        graph: where to insert.
        like: node whose module path and source line the new nodes take over.
        tag: AOTAutograd's ``partitioner_tag`` for the new nodes: "must_be_in_forward" keeps a node out of the backward
            even if the backward could compute it.
    """

    def __init__(self, graph: Graph, like: Node, tag: str | None = None) -> None:
        self.graph, self.like, self.tag = graph, like, tag

    def __call__(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta.update({key: self.like.meta[key] for key in _COPIED if key in self.like.meta})
        if self.tag:
            node.meta["partitioner_tag"] = self.tag
        with fake_mode_of(self.like), enable_python_dispatcher():
            node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
        return node


def fake_mode_of(node: Node) -> FakeTensorMode:
    """The mode that made the node's fake value.

    Raises:
        ValueError: the graph was traced without fake tensors.
    """
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and (mode := getattr(value, "fake_mode", None)) is not None:
        return mode
    raise ValueError(f"node {node.name} has no fake value; trace the graph with AOTAutograd or fake tensors.")

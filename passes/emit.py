"""Insert nodes with fake values, so that partitioner and Inductor find the metadata they need on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from wtacrs_fx.passes.sizes import hint, is_symbolic, is_unbacked
from wtacrs_fx.private import FakeTensorMode, enable_python_dispatcher

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

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({key: self.like.meta[key] for key in _COPIED if key in self.like.meta})
        if self.tag:
            node.meta["partitioner_tag"] = self.tag
        with fake_mode_of(self.like), enable_python_dispatcher():
            node.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        return node

    def inline(self, function: Callable[..., Any], *nodes: Node) -> Any:
        """The operations of a function of tensors, traced and decomposed as AOTAutograd does it. Returns the nodes of its
        results, in the function's own structure."""
        from wtacrs_fx.private import select_decomp_table

        with fake_mode_of(self.like):
            traced = make_fx(function, decomposition_table=select_decomp_table())(*(n.meta["val"] for n in nodes))
        env = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes))
        for node in traced.graph.nodes:
            if node.op == "call_function":
                env[node] = self(
                    node.target, *map_arg(node.args, env.__getitem__), **map_arg(node.kwargs, env.__getitem__)
                )
        return map_arg(traced.graph.output_node().args[0], env.__getitem__)


def _value(node: Node) -> Any:
    return node.meta["val"]


def memory_order(value: torch.Tensor) -> list[int]:
    """A tensor's dimensions in the order in which they lie in memory; in their own if it is expanded or part of another."""
    order = list(range(value.dim()))
    if hint(value.numel()) * value.dtype.itemsize != hint(value.untyped_storage().nbytes()):
        return order
    strides = [hint(s) for s in value.stride()]
    return sorted(order, key=lambda d: (-strides[d], d))


def has_whole_rows(value: torch.Tensor, per_byte: int) -> bool:
    """Whether rows, as they lie in memory, have a known size; and, where other sizes are symbolic, one that comes out even on
    bytes of so many numbers. Not where a size depends on the values of tensors."""
    if not value.dim() or any(map(is_unbacked, value.shape)):
        return False
    width = value.shape[memory_order(value)[-1]]
    return isinstance(width, int) and (width % per_byte == 0 or not is_symbolic(value.shape))


def fake_mode_of(node: Node) -> FakeTensorMode:
    """The mode that made the node's fake value, or values.

    Raises:
        ValueError: the graph was traced without fake tensors.
    """
    value = node.meta["val"]
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(tensor, torch.Tensor) and (mode := getattr(tensor, "fake_mode", None)) is not None:
            return mode
    raise ValueError(f"node {node.name} has no fake value; trace the graph with AOTAutograd or fake tensors.")

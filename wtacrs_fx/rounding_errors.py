"""Measured errors of rounded tensors: partitioned forwards are run as they are, and each tensor is compared with its codes.

A forward graph holds both, the tensor and what is made of it, by the marks that :mod:`wtacrs_fx.passes.round` leaves. The
graphs are those that the options give when Inductor compiles them; here they are interpreted, node by node.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from wtacrs_fx.backend import Backend, Partitioner, compile_eager
from wtacrs_fx.config import Config
from wtacrs_fx.inductor import compile_inductor
from wtacrs_fx.ledger import Compressed, Ledger
from wtacrs_fx.passes.round import CODES, ROUNDED, Codes
from wtacrs_fx.private import functorch_config
from wtacrs_fx.tracing import Batch, call, compile_apart, starts


def rounded_tensors(config: Config, model: nn.Module, batch: Batch) -> list[Compressed]:
    """The rounded tensors of a model on a batch, graph by graph, with the error that one draw has.

    The forward runs once, from the seed 0; nothing is trained.
    """
    backend = _Measuring(config)
    torch.manual_seed(0)
    starts(call(compile_apart(model, backend), batch))
    return [
        replace(line, error=errors[line.tensor].relative)
        for ledger, errors in backend.measured
        for line in ledger.compressed
        if line.tensor in errors
    ]


@dataclass
class Error:
    """Of one tensor, over all runs of its graph."""

    difference: float = 0.0
    """``|X' - X|^2``"""
    square: float = 0.0
    """``|X|^2``"""

    @property
    def relative(self) -> float:
        """``|X' - X|^2 / |X|^2``; 0 of a tensor of zeros that is one still."""
        return self.difference / self.square if self.square else self.difference

    def add(self, found: Tensor, exact: Tensor) -> None:
        wide = exact.double()
        self.difference += float((found.double() - wide).square().sum())
        self.square += float(wide.square().sum())


class _Measuring(Backend):
    """A Backend whose graphs are not compiled, and whose forwards measure."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.measured: list[tuple[Ledger, dict[str, Error]]] = []

    def _compiled(
        self, gm: GraphModule, example_inputs: Sequence[Any], partition_fn: Partitioner, mode: str | None
    ) -> Callable[..., Any]:
        from wtacrs_fx.private import make_boxed_func

        errors: dict[str, Error] = {}

        def as_it_is(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            rounds = any(CODES in n.meta for n in graph.graph.nodes)
            run = _Comparison(graph, errors).run if rounds else graph.forward
            boxed: Callable[..., Any] = make_boxed_func(run)
            return boxed

        made = len(partition_fn.ledgers)
        compile_graphs = compile_eager if self.config.inner == "eager" else compile_inductor
        with functorch_config.patch(enable_autograd_cache=False):
            compiled = compile_graphs(gm, example_inputs, partition_fn, mode, compile_graph=as_it_is)
        self.measured += [(ledger, errors) for ledger in partition_fn.ledgers[made:]]
        return compiled


@dataclass
class _Pair:
    """A tensor and its codes, as far as they are computed."""

    exact: Tensor | None = None
    codes: Codes | None = None
    written: dict[int, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.exact is not None and self.codes is not None and len(self.written) == self.codes.parts

    def add_to(self, error: Error) -> None:
        """Compare the two."""
        if self.exact is not None and self.codes is not None:
            error.add(self.codes.decode([self.written[i] for i in range(self.codes.parts)], self.exact), self.exact)


class _Comparison(Interpreter):
    """Runs a forward graph; every rounded tensor is compared as soon as it and all of its codes are there."""

    def __init__(self, graph: GraphModule, errors: dict[str, Error]) -> None:
        super().__init__(graph)
        self.errors = errors
        self.pairs: dict[str, _Pair] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.pairs = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name, codes = n.meta.get(ROUNDED), n.meta.get(CODES)
        if name is not None:
            self.pairs.setdefault(name, _Pair()).exact = value
        if codes is not None:
            name = codes.tensor
            pair = self.pairs.setdefault(name, _Pair())
            pair.codes, pair.written[codes.part] = codes, value
        if name is not None and self.pairs[name].complete:
            self.pairs.pop(name).add_to(self.errors.setdefault(name, Error()))
        return value

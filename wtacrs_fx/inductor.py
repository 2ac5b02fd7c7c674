"""Compile with Inductor, and what has to be changed about Inductor for the larger backward graphs of this package."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from wtacrs_fx.order import GraphOrder
from wtacrs_fx.private import inductor_config
from wtacrs_fx.roomy import roomy

if TYPE_CHECKING:
    from wtacrs_fx.backend import Partitioner

ORDERED: dict[str, Any] = {
    "_pre_fusion_custom_pass": GraphOrder(),
    "allow_buffer_reuse": False,
    "reorder_for_peak_memory": False,
    "max_fusion_buffer_group_pairwise_attempts": 16,
}
"""Inductor's options where segments are computed again or tensors rounded. The plan is for kernels in the order of the graph:
a tensor is rounded where it is made, and its codes alone are held from there on. And dead buffers that Inductor keeps for
later ones would be alive while other segments run. Kernels that may be fused lie between the same two library calls, so
that few pairs of readers of a tensor have to be tried."""

SAMPLED: dict[str, Any] = {"reorder_for_peak_memory": False}
"""Further ones where rows are sampled: kernels run in the order of the graph, which is autograd's. Inductor compares that order
with three others by estimates that free every buffer as soon as its last reader has run. In C++ kernels between two library
calls are one function, whose results are all allocated before it, so that the order of the least estimate can need more: a
Whisper with sampled rows 6 % more, where the zeros for an embedding's gradient were written beside the logits."""

ROUNDED: dict[str, Any] = {"realize_opcount_threshold": 256}
"""Further ones where tensors are rounded. Making codes takes about a hundred operations an element, most of them of the random
number. By default Inductor writes a value of more than a hundred operations to memory (50 where it has several readers): the
codes before they are packed, in 4 bytes each, as large as the tensor that they are to replace."""

_MEMOISED = ("simplify_index_in_vec_range", "stride_at_vec_range")
"""Pure functions of ``torch._inductor.sizevars`` that C++ code generation asks again and again."""


def options_for(*, ordered: bool, sampled: bool, rounded: bool = False) -> dict[str, Any]:
    """Inductor's options for a graph: whether memory was planned for its order, rows are sampled, tensors are rounded."""
    return {**(SAMPLED if sampled else {}), **(ORDERED if ordered else {}), **(ROUNDED if rounded else {})}


@roomy
def compile_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    partition_fn: "Partitioner",
    mode: str | None,
    compile_graph: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor, its options and ``mode``, and with this partitioner. ``compile_graph`` takes the
    place of Inductor for the partitioned graphs."""
    from wtacrs_fx.private import TorchCompileInductorWrapper, compile_fx, compile_fx_inner

    @roomy
    def with_inductor(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Of the forward or the backward, once the partitioner has run."""
        with inductor_config.patch(partition_fn.inductor), known_results():
            return compile_fx_inner(graph, inputs, **kwargs)

    # torch's own wrapper checks the names, types and mode, and knows what each mode stands for.
    patches = TorchCompileInductorWrapper(mode, partition_fn.config.inductor, None).config
    patches = {**patches, "custom_partitioner_fn": partition_fn}
    compiled: Any = compile_fx(gm, example_inputs, inner_compile=compile_graph or with_inductor, config_patches=patches)
    return compiled


def uncompiled(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Stands for Inductor's compilation of a partitioned graph: the graph itself."""
    from wtacrs_fx.private import make_boxed_func

    boxed: Callable[..., Any] = make_boxed_func(graph.forward)
    return boxed


def like_compiled(run: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with what AOTAutograd's callables say of themselves (how they take their arguments, above all)."""
    for key in ("_boxed_call", "zero_grad", "named_parameters", "named_buffers"):
        if hasattr(compiled, key):
            setattr(run, key, getattr(compiled, key))
    return run


@contextlib.contextmanager
def known_results() -> Iterator[None]:
    """Let Inductor remember what it has computed. Results are the same; nothing is changed where torch has no such functions.

    Its caches of simplified index expressions hold 128. A backward that also recomputes and gathers has more distinct ones
    per layer, so that every layer would be simplified afresh by sympy, which was half of the time of code generation. And
    its one object that knows the types of results fills its table of rules again for every operation of every kernel.
    """
    from wtacrs_fx.private import codegen_common as common
    from wtacrs_fx.private import codegen_cpp as cpp
    from wtacrs_fx.private import sizevars

    narrow: dict[str, Any] = {name: getattr(sizevars, name, None) for name in _MEMOISED}
    wide = {name: functools.cache(f.__wrapped__) for name, f in narrow.items() if hasattr(f, "__wrapped__")}
    with contextlib.ExitStack() as stack:
        for module in (sizevars, cpp):
            stack.enter_context(replaced(module, {n: f for n, f in wide.items() if hasattr(module, n)}))
        types = getattr(common, "DtypePropagationOpsHandler", None)
        stack.enter_context(replaced(common, {types.__name__: functools.cache(types)} if types else {}))
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Other values for a module's names, inside."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)

"""Every private API of torch that the package uses, in one table: where it is, and what for.

    from wtacrs_fx.private import min_cut_rematerialization_partition

A name is looked up when it is first asked for, so that importing the package does not import Inductor. One that is missing
is an error that says which versions of torch have it.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from wtacrs_fx.errors import UnsupportedError

OLDEST = (2, 11)
"""Oldest torch (major, minor) that can be installed beside this package."""
TESTED = ((2, 11), (2, 14))
"""Oldest and newest torch that the test suite was run with."""


@dataclass(frozen=True)
class Private:
    """A name of torch's: its module, what it is used for, and its name there if it is another."""

    module: str
    purpose: str
    attribute: str = ""


USED = {
    # the way into AOTAutograd and Inductor
    "CustomPartitionerFn": Private(
        "torch._inductor.custom_graph_pass", "base class of the partitioner, with its cache key"
    ),
    "custom_graph_pass": Private("torch._inductor", "base classes of passes, with their cache keys"),
    "compile_fx": Private("torch._inductor.compile_fx", "Inductor, with options of one call"),
    "compile_fx_inner": Private("torch._inductor.compile_fx", "Inductor for one partitioned graph"),
    "select_decomp_table": Private("torch._inductor.compile_fx", "Inductor's decompositions, for inner='eager'"),
    "aot_autograd": Private("torch._dynamo.backends.common", "AOTAutograd without Inductor, for inner='eager'"),
    "boxed_nop": Private("torch._dynamo.backends.debugging", "runs a graph as it is, for inner='eager'"),
    "make_boxed_func": Private("torch._functorch.aot_autograd", "calling convention of compiled graphs, for reports"),
    "TorchCompileInductorWrapper": Private(
        "torch", "checks and translates Inductor's modes", "_TorchCompileInductorWrapper"
    ),
    # the partition
    "min_cut_rematerialization_partition": Private("torch._functorch.partitioners", "decides what is saved"),
    "fx_graph_cse": Private("torch._functorch.compile_utils", "equal operations become one before anything is counted"),
    "make_graph_module": Private(
        "torch.fx._lazy_graph_module", "modules without code until they run", "_make_graph_module"
    ),
    "use_lazy_graph_module": Private("torch.fx._lazy_graph_module", "the same, as a context", "_use_lazy_graph_module"),
    "enable_python_dispatcher": Private("torch._dispatch.python", "fake values of nodes with symbolic sizes"),
    "FakeTensor": Private("torch._subclasses.fake_tensor", "values of nodes"),
    "FakeTensorMode": Private("torch._subclasses.fake_tensor", "values of nodes, and reports without memory"),
    "TorchDispatchMode": Private("torch.utils._python_dispatch", "watches what a step of eager code saves"),
    "tree_leaves": Private("torch.utils._pytree", "tensors in nested structures"),
    "tree_map_only": Private("torch.utils._pytree", "the same, changed"),
    "OpOverload": Private("torch._ops", "what nodes call"),
    "inductor_prims": Private("torch._inductor", "registers the ops that draw Inductor's random numbers"),
    "RESUMED": Private(
        "torch._dynamo.resume_execution", "names of functions behind a graph break", "TORCH_DYNAMO_RESUME_IN_PREFIX"
    ),
    "TracingContext": Private("torch._guards", "a traced graph is compiled again, with other ratios"),
    "tracing": Private("torch._guards", "the same"),
    # settings
    "dynamo_config": Private(
        "torch._dynamo", "reports: no garbage collection; calibration: recompilation limits", "config"
    ),
    "functorch_config": Private("torch._functorch", "torch's own memory budget", "config"),
    "inductor_config": Private("torch._inductor", "Inductor's own options", "config"),
    "cache_dir": Private("torch._inductor.runtime.cache_dir_utils", "ledgers lie beside Inductor's cache"),
    # how Inductor computes one of our ops
    "register_lowering": Private("torch._inductor.lowering", "dropout masks"),
    "inductor_ir": Private("torch._inductor", "the same", "ir"),
    "inductor_ops": Private("torch._inductor.virtualized", "the same", "ops"),
    # what Inductor will do with a graph
    "GraphLowering": Private("torch._inductor.graph", "whether it lays tensors out with channels last"),
    "WeakDep": Private("torch._inductor.dependencies", "order of kernels"),
    "get_gpu_dram_gbps": Private("torch._inductor.utils", "time model of a GPU"),
    "sizevars": Private("torch._inductor", "results that code generation computes again and again"),
    "codegen_common": Private("torch._inductor.codegen", "the same", "common"),
    "codegen_cpp": Private("torch._inductor.codegen", "the same", "cpp"),
    # elsewhere
    "Unsupported": Private("torch._dynamo.exc", "the error at a graph break"),
    "UserError": Private("torch._dynamo.exc", "the error where code branches on a number of the data"),
    "autocast_cast": Private("torch.amp.autocast_mode", "standalone ops under autocast", "_cast"),
    "torch_c": Private("torch", "dispatch keys of autocast", "_C"),
    "default_store": Private("torch.distributed.distributed_c10d", "ranks compare options", "_get_default_store"),
}


def find(name: str) -> Any:
    """The object behind a name of ``USED``.

    Raises: UnsupportedError, if this torch does not have it.
    """
    entry = USED[name]
    attribute = entry.attribute or name
    try:
        module = importlib.import_module(entry.module)
        if hasattr(module, attribute):
            return getattr(module, attribute)
        return importlib.import_module(f"{entry.module}.{attribute}")
    except ImportError as error:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, TESTED[1]))
        raise UnsupportedError(
            f"wtacrs: this torch ({torch.__version__}) has no {entry.module}.{attribute}, needed for: {entry.purpose}. "
            f"Install torch {oldest} to {newest}, or a newer wtacrs-fx."
        ) from error


def __getattr__(name: str) -> Any:
    if name not in USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, find(name))

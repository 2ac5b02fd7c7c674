"""``torch.compile(model, backend="wtacrs")``: options -> partitioner -> Inductor."""

import functools
import hashlib
import importlib.metadata
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from wtacrs_fx import sidecar
from wtacrs_fx.adapt import Adaptive
from wtacrs_fx.choose import Calibration
from wtacrs_fx.complaints import complaints
from wtacrs_fx.config import Config
from wtacrs_fx.distributed import check_ranks, refuse_dtensors
from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.inductor import compile_inductor, options_for, uncompiled
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.measured import Measurement
from wtacrs_fx.names import Argument, dynamo_names
from wtacrs_fx.norm_state import RowState, with_rows
from wtacrs_fx.norms import NormSource, make_source
from wtacrs_fx.passes.partition import partition
from wtacrs_fx.private import RESUMED, TESTED, CustomPartitionerFn, TracingContext, functorch_config

_ledgers: deque[Ledger] = deque(maxlen=256)


def ledgers() -> list[Ledger]:
    """Ledgers of the training graphs compiled in this process, oldest first (the last 256).

    A graph that Inductor took from its cache on disk brings the ledger that was stored beside it.
    """
    return list(_ledgers)


class Partitioner(CustomPartitionerFn):
    """Partitions joint graphs with sampled weight gradients. Made by :func:`partitioner`.

    Drop-in for ``partition_fn`` of ``functorch.compile.aot_function`` and for Inductor's ``custom_partitioner_fn``.
    ``ledgers`` collects one ledger per training graph.
    """

    def __init__(self, config: Config, names: Sequence[str | None] = ()) -> None:
        self.config, self.names = config, tuple(names)
        self.ledgers: list[Ledger] = []
        self.inductor: dict[str, Any] = {}
        """Inductor's options that the last partition asks for."""
        self.if_sampled = ""
        """A warning, should rows be sampled."""

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        forward, backward, ledger = partition(gm, joint_inputs, config=self.config, names=self.names, **kwargs)
        self.inductor = {}
        if ledger is not None:
            self.publish(ledger)
            options = options_for(ordered=ledger.ordered, sampled=ledger.sampled, rounded=ledger.rounded)
            self.inductor = {k: v for k, v in options.items() if k not in self.config.inductor}
        return forward, backward

    def publish(self, ledger: Ledger) -> None:
        """Keep a ledger, and say what a user should hear: the table if verbose, a warning if nothing is sampled."""
        self.ledgers.append(ledger)
        _ledgers.append(ledger)
        if self.config.verbose:
            print(ledger.table(), file=sys.stderr)
        missing = [self.if_sampled] if self.if_sampled and ledger.sampled else []
        for message in (*missing, *complaints(ledger, self.config)):
            warnings.warn(message, WtacrsWarning, stacklevel=2)

    def uuid(self) -> str:
        """Identity for Inductor's caches: source of the package, version of torch, every option, the names it matches, and
        the types of autocast (torch 2.11 takes a graph that was compiled for one of them for another)."""
        autocast = [(d, torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in ("cpu", "cuda")]
        parts = (source_hash(), torch.__version__, self.config.fingerprint(), repr(self.names), repr(autocast))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def partitioner(**options: Any) -> Partitioner:
    """A ``partition_fn`` for AOTAutograd: ``aot_function(f, ..., partition_fn=wtacrs_fx.partitioner(ratio=0.3))``.

    Args: the fields of :class:`wtacrs_fx.Config`; those about Inductor have no effect. Raises: as Config does.
    """
    config = Config.from_options(options)
    config.refuse_state("wtacrs_fx.partitioner()")
    return Partitioner(config)


class Backend:
    """A backend object for ``torch.compile``: ``torch.compile(model, backend=wtacrs_fx.Backend(ratio=0.3))``.

    Args:
        config: a :class:`wtacrs_fx.Config`; or
        options: its fields as keywords.

    Raises:
        TypeError, ValueError: as Config does; also if both are given.
    """

    def __init__(self, config: Config | None = None, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"Backend(config, {', '.join(options)}=...): give a Config or options, not both.")
        self.config = Config.from_options(options) if config is None else Config.from_options(config)
        self.ledgers: list[Ledger] = []
        self.calibrations: list[Calibration] = []
        """What was measured and chosen, graph by graph, with ``noise`` or ratio="auto"."""
        self.rows = row_state(self.config)
        self._by_model = False
        self._had_padding = False

    @property
    def norms(self) -> NormSource | None:
        """What is known of gradient norms, with ``state_dict`` and ``load_state_dict``; None with norms="activation"."""
        return self.rows.source

    @property
    def padding(self) -> dict[str, str]:
        """Site -> what a real batch has shown of its rows of padding: "zero" (they get probability zero), "refused" (they have
        gradients, and are sampled like others), or "unknown" so far."""
        return {site: trial.verdict for site, trial in self.rows.padding.items()}

    @property
    def ledger(self) -> Ledger:
        """Ledger of the last training graph. Raises RuntimeError if there is none, with the reason."""
        if not self.ledgers:
            raise RuntimeError(
                "no ledger: no training graph was compiled by this backend yet (call the model with gradients enabled "
                "first), or Inductor took it from its cache on disk and the ledger stored beside it is gone (set "
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 to compile afresh)."
            )
        return self.ledgers[-1]

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        if options:
            raise TypeError("options= beside a wtacrs_fx.Backend object: give them to the object, Backend(ratio=...).")
        check_torch_version()
        _check_budgets(self.config)
        refuse_dtensors(names := dynamo_names(gm), example_inputs)
        check_ranks(self.config, names, example_inputs)

        def build(
            config: Config, inputs: Sequence[Any], meter: Measurement | None = None
        ) -> tuple[Callable[..., Any], Ledger | None]:
            partition_fn, made = Partitioner(config.without_state(), names), len(self.ledgers)
            partition_fn.ledgers, partition_fn.if_sampled = self.ledgers, missing
            compiled = self._compiled(gm, inputs, partition_fn, mode)
            if config.has_state or meter is not None:
                compiled = with_rows(compiled, gm, names, self.rows, self._by_model, meter)
            return compiled, self.ledgers[-1] if len(self.ledgers) > made else None

        missing = self._missing_padding(gm, names)
        config = replace(self.config, padding=None) if missing else self.config
        if config.adapts:
            return Adaptive(config, build, example_inputs, self.calibrations.append).callable()
        return build(config, example_inputs)[0]

    def _missing_padding(self, gm: GraphModule, names: Sequence[str | None]) -> str:
        """What to say where ``padding`` is left out: the graph is a part of a model, and that argument is an input of another
        part, as around a graph break or in a bucket of DDPOptimizer. Empty if it is not."""
        arguments = [str(name) for name in names if isinstance(name, Argument)]
        has = self.config.padding in arguments
        self._had_padding |= has
        if self.config.padding is None or has or not (self._had_padding or around_break(gm)):
            return ""
        return (
            f"wtacrs: padding={self.config.padding!r}: this part of the model has no such input, so its rows are sampled like "
            f"others. Its inputs are {', '.join(arguments) or 'unnamed'}. Behind a graph break only what is passed on by its "
            "name can be used."
        )

    def _compiled(
        self, gm: GraphModule, example_inputs: Sequence[Any], partition_fn: Partitioner, mode: str | None
    ) -> Callable[..., Any]:
        if self.config.inner == "eager":
            return compile_eager(gm, example_inputs, partition_fn, mode)

        def rebuild() -> None:
            """Run the partitioner alone, for its ledger; nothing is compiled and no cache read."""
            with functorch_config.patch(enable_autograd_cache=False):
                compile_inductor(gm, example_inputs, partition_fn, mode, compile_graph=uncompiled)

        with sidecar.ledger_of(gm, example_inputs, partition_fn, rebuild):
            return compile_inductor(gm, example_inputs, partition_fn, mode)


def wtacrs(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind the string "wtacrs" (entry point of the group ``torch_dynamo_backends``).

    ``options`` are the fields of :class:`wtacrs_fx.Config`; ``mode`` is one of Inductor's and is translated to its options.
    """
    backend = Backend(Config.from_options(options))
    backend._by_model = isinstance(backend.config.norms, str)
    backend._had_padding = id(options) in _padded
    compiled = backend(gm, example_inputs, mode=mode)
    if backend._had_padding:
        _padded.add(id(options))
    return compiled


_padded: set[int] = set()
"""Options (their ids) of models whose ``padding`` was an input of one of their graphs: torch.compile hands the same mapping to
all graphs of a model. It decides between an error and a warning where another graph has no such input, and nothing else."""


def around_break(gm: GraphModule) -> bool:
    """Whether a Dynamo graph ends or begins at a graph break, so that it need not have every input of the model."""
    if getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False):
        return True
    traced = (TracingContext.get_traced_code() if TracingContext.try_get() else None) or ()
    return any(code.co_name.startswith(RESUMED) for code in traced[:1])


def row_state(config: Config) -> RowState:
    """New, or that of the norm source that the user has given."""
    source = make_source(config.norms)
    return RowState(None) if source is None else RowState.of(source)


def compile_eager(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    partition_fn: Partitioner,
    mode: str | None,
    compile_graph: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The partitioned graphs as they are; or as ``compile_graph`` makes them of (graph, inputs)."""
    from wtacrs_fx.private import aot_autograd, boxed_nop, select_decomp_table

    if mode not in (None, "default"):
        raise ValueError(f"mode={mode!r} with inner='eager': modes are Inductor's; leave one of the two out.")
    compile_aot = aot_autograd(
        fw_compiler=compile_graph or boxed_nop,
        bw_compiler=compile_graph or boxed_nop,
        decompositions=select_decomp_table,
        partition_fn=functools.partial(partition_fn, compiler="inductor"),
    )
    return compile_aot(gm, example_inputs)


def _check_budgets(config: Config) -> None:
    """Two memory budgets: this package's wins, and says so."""
    torchs = functorch_config.activation_memory_budget
    if config.memory_budget is not None and torchs != 1:
        warnings.warn(
            f"wtacrs: memory_budget={config.memory_budget!r} takes the place of torch's activation_memory_budget={torchs} "
            "for this model; remove one of the two.",
            WtacrsWarning,
            stacklevel=3,
        )


@functools.cache
def source_hash() -> str:
    """Hash over the package's source files, so that no compiled graph outlives the code that made it."""
    digest = hashlib.sha256()
    for module in ("wtacrs_fx", "wtacrs_fx.passes"):
        for path in sorted(Path(sys.modules[module].__file__ or "").parent.glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def check_torch_version() -> None:
    """Warn once if torch is older or newer than the versions that the test suite was run with."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        tested = " to ".join(dict.fromkeys(".".join(map(str, v)) for v in TESTED))
        warnings.warn(
            f"wtacrs-fx {importlib.metadata.version('wtacrs-fx')} was tested with torch {tested}, this is torch "
            f"{torch.__version__}; if it fails, install a tested one.",
            WtacrsWarning,
            stacklevel=2,
        )

"""``wtacrs_fx.report``: what a model would hold for its backward, before anything runs."""

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import wtacrs_fx
from wtacrs_fx import passes
from wtacrs_fx.config import Config
from wtacrs_fx.eager_trace import EagerStep, eager_step, held_storages, without_values
from wtacrs_fx.errors import ReportError
from wtacrs_fx.ledger import Ledger, Prediction, Saved
from wtacrs_fx.ledger_tables import fold, title
from wtacrs_fx.ledger_tables import layers as layers_of
from wtacrs_fx.names import renamed
from wtacrs_fx.passes.partition import many_graphs, partition
from wtacrs_fx.private import Unsupported, UserError
from wtacrs_fx.tracing import NO_TRAINING_GRAPH, Batch, FakeRun, GraphBreak, look_at
from wtacrs_fx.units import format_bytes


def report(model: nn.Module, batch: Batch, *, device: str | torch.device | None = None, **options: Any) -> Ledger:
    """The ledger that training the model on such a batch would have, and beside it what eager autograd saves.

    The model is traced on fake tensors by the same passes as the backend's: no weights, no compute, no compilation.

    Args:
        model: in the mode in which it is trained; its parameters may be fake themselves (``FakeTensorMode``).
        batch: keyword arguments (a mapping), positional arguments (a sequence), or the one argument.
        device: predict for another device than the model's.
        options: the fields of :class:`wtacrs_fx.Config`.

    Returns: a ledger with ``saved_bytes_eager`` and ``predicted_eager``. Of several graphs (graph breaks) the ledgers are
        joined; ``notes`` says where the breaks are. Where the forward asks for the value of a tensor at one of them, the
        ledger is that of the graphs in front of it, ``notes`` says where they end, and eager autograd's figures are None.

    Raises:
        ReportError: nothing is trained, the batch is on another device, the forward branches on data in front of any graph.
        BudgetError, TypeError, ValueError: as the backend does.
    """
    config = Config.from_options(options)
    with many_graphs():
        run = FakeRun.of(model, batch, device)
        ledger, ended = _traced(run, config)
        if ended is not None:
            return replace(ledger, notes=(*ledger.notes, _end(ended)))
        return with_eager(ledger, eager_step(run))


def partition_ledger(run: FakeRun, config: Config) -> Ledger:
    """The ledger of the backend for a model on fake tensors.

    Raises: ReportError: there is no training graph, or the forward branches on data.
    """
    ledger, ended = _traced(run, config)
    if ended is not None:
        raise ended
    return ledger


def _traced(run: FakeRun, config: Config) -> tuple[Ledger, ReportError | None]:
    """The ledger of all graphs, or of those in front of a branch on data, and the error at that branch."""
    found: list[Ledger] = []
    breaks: list[GraphBreak] = []
    ended: ReportError | None = None

    def look(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        """The only graph there is: nothing behind its partition is of interest."""
        _, _, ledger = partition(joint, joint_inputs, config=config, **kwargs)
        return None, ledger

    def look_and_go_on(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        forward, backward, ledger = partition(joint, joint_inputs, config=config, **kwargs)
        return (forward, backward), ledger

    def ran(ledgers: Iterable[Ledger | None], paths: Mapping[str, str]) -> None:
        """A graph, maybe not for the first time: of another layer of the same code."""
        found.extend(renamed(ledger, paths) for ledger in _ledgers(ledgers))

    try:
        found += _ledgers(look_at(run, config, look, fullgraph=True))
        notes: tuple[str, ...] = ()
    except (Unsupported, UserError):  # (the latter where code branches on a number of the data)
        with held_storages(run) as held:
            try:
                with without_values(run):
                    look_at(run, config, look_and_go_on, breaks=breaks, ran=ran)
            except ReportError as error:
                if not (found and error.__cause__):
                    raise
                ended = error
        notes = _breaks(breaks, found)
        if found:
            found.append(_between(sum(t.untyped_storage().nbytes() for t in held.values()), found))
    if not found:
        raise ReportError(NO_TRAINING_GRAPH)
    return join(found, notes), ended


def _between(held: int, ledgers: Sequence[Ledger]) -> Ledger:
    """What eager code between graphs saves: what a step holds in all, less what its graphs do."""
    rest = max(0, held - sum(g.saved_bytes for g in ledgers))
    row = Saved(
        "", "between graphs", (), "", bytes_exact=rest, bytes_now=rest, reason="saved by eager code between graphs"
    )
    nothing = Prediction(0, 0, 0.0, 0)
    return Ledger((), rest, rest, nothing, nothing, tensors=(row,) if rest else ())


def with_eager(ledger: Ledger, step: EagerStep) -> Ledger:
    """The ledger with the column of eager autograd.

    Eager autograd's tensors are other ones than those of the compiled graph. One of the same module, type and size is taken
    for the same, so that a line says what became of it; the others have lines of their own. Sums do not depend on it.
    """
    rows = list(ledger.tensors)
    open_: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        open_.setdefault(_likeness(row), []).append(i)
    for tensor in step.tensors:
        if same := open_.get(_likeness(tensor)):
            i = same.pop(0)
            rows[i] = replace(rows[i], bytes_eager=tensor.bytes_eager)
        else:
            rows.append(replace(tensor, reason="eager autograd only"))
    predicted = Prediction(step.peak, step.allocated, seconds=0.0, flops=0)
    return replace(ledger, tensors=tuple(rows), saved_bytes_eager=step.saved_bytes, predicted_eager=predicted)


def join(ledgers: Sequence[Ledger], notes: Iterable[str] = ()) -> Ledger:
    """One ledger of a model's graphs, which run one after the other, and backward in the opposite order.

    Saved bytes add up (a tensor that two graphs save counts twice). At the peak of one graph what those before it hold is
    alive too.
    """
    if len(ledgers) == 1:
        return replace(ledgers[0], notes=(*notes, *ledgers[0].notes))

    def joined(predictions: Sequence[Prediction | None], held: Sequence[int]) -> Prediction | None:
        if any(p is None for p in predictions):
            return None
        known = [p for p in predictions if p is not None]
        before = [sum(held[:i]) for i in range(len(held))]
        return Prediction(
            peak=max(p.peak + b for p, b in zip(known, before)),
            allocated=max(p.allocated + b for p, b in zip(known, before)),
            seconds=sum(p.seconds for p in known),
            flops=sum(p.flops for p in known),
        )

    exact, now = [g.saved_bytes_exact for g in ledgers], [g.saved_bytes for g in ledgers]
    return Ledger(
        entries=tuple(e for g in ledgers for e in g.entries),
        saved_bytes_exact=sum(exact),
        saved_bytes=sum(now),
        predicted_exact=joined([g.predicted_exact for g in ledgers], exact),
        predicted=joined([g.predicted for g in ledgers], now),
        parts=tuple(p for g in ledgers for p in g.parts),
        recomputed=sum(g.recomputed for g in ledgers),
        tensors=tuple(t for g in ledgers for t in g.tensors),
        notes=(*notes, *dict.fromkeys(n for g in ledgers for n in g.notes)),
    )


def _ledgers(found: Iterable[Ledger | None]) -> list[Ledger]:
    return [ledger for ledger in found if ledger is not None]


def _likeness(row: Saved) -> tuple:
    return row.module, row.dtype, row.bytes_eager or row.bytes_exact or row.bytes_now


def _breaks(breaks: Iterable[GraphBreak], graphs: Sequence[Ledger]) -> tuple[str, ...]:
    """Where the graph breaks are, by Dynamo's own account, and what each graph holds."""
    lines = [f"training graphs: {len(graphs)}, joined here; graph breaks, where eager code runs:"]
    for reason in breaks:
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f"{frame.filename}:{frame.lineno}" if frame else "unknown place"
        lines.append(f"  {where}: {reason.reason.splitlines()[0]}")
    for number, graph in enumerate(graphs, 1):
        in_forward = reversed(graph.entries)
        sites = [Saved(e.module, e.op, e.shape, e.dtype) for e in in_forward]
        layers = ", ".join(map(title, fold(layers_of([t for t in (*sites, *graph.tensors) if t.module]))))
        lines.append(
            f"  graph {number} holds: exact {format_bytes(graph.saved_bytes_exact)}, now {format_bytes(graph.saved_bytes)}"
            + f" ({layers})" * bool(layers)
        )
    return tuple(dict.fromkeys(lines))


def _end(error: ReportError) -> str:
    """Where a forward asked for the value of a tensor: in the innermost frame that is neither torch's nor this package's."""
    assert error.__cause__ is not None
    ours = tuple(str(Path(m.__file__ or "").parent) for m in (torch, wtacrs_fx, passes))
    frames = [f for f in traceback.extract_tb(error.__cause__.__traceback__) if not f.filename.startswith(ours)]
    where = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown place"
    return (
        f"not the whole model: at {where} the forward asks for the value of a tensor, which a report does not have. All "
        "figures are of the graphs in front of it; what follows is unknown."
    )

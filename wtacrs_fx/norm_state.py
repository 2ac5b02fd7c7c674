"""What a Backend knows of the rows of a running model, and how its compiled graphs reach it.

Compiled graphs come from caches on disk and know no Python object. So the callable of every graph says who is running
(:func:`with_rows`); the op that begins a forward notes that as a :class:`Call` and returns its number as a tensor; autograd
keeps the tensor, and the backward finds the call by it, whichever forwards and backwards lie in between.
"""

import contextvars
import functools
import itertools
import re
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from wtacrs_fx.errors import WtacrsWarning
from wtacrs_fx.inductor import like_compiled
from wtacrs_fx.measured import Measurement
from wtacrs_fx.names import Argument
from wtacrs_fx.norms import NormSource, Rows, floored
from wtacrs_fx.sample_ids import given

CALLS = 4096
"""Forwards whose backward may still come. An older one's norms are not recorded; nothing else depends on it."""


@dataclass
class Trial:
    """Whether rows of padding have no gradient at one site: it is believed when a real batch has shown it."""

    calls: int = 0
    verdict: str = "unknown"
    """"unknown" (rows of padding are sampled like others), "zero" (they get probability zero) or "refused"."""


@dataclass(eq=False)
class RowState:
    """The state of one Backend: its norm source, and what was found about padding."""

    source: NormSource | None
    padding: dict[str, Trial] = field(default_factory=dict)
    """Site -> trial, where ``padding`` applies."""
    news: list[str] = field(default_factory=list)
    """Sites refused since the last forward."""
    warned: bool = False
    owners: dict[str, list[Callable[[], Tensor | None]]] = field(default_factory=dict)
    """Name of a graph's first parameter -> the parameters (weak references) that have gone by it."""

    @classmethod
    def of(cls, source: NormSource) -> "RowState":
        """The state that goes with a source: one, also where the source serves several graphs and Backends."""
        state: RowState | None = vars(source).get("_row_state")
        if state is None:
            state = vars(source)["_row_state"] = cls(source)
        return state

    def suffix(self, name: str, parameter: Tensor | None) -> str:
        """Tells modules apart that run the same graph (equal layers compiled one by one, two models of one Backend): empty
        for the first, "@1" for the second. Their names are the same, their parameters are not."""
        if parameter is None:
            return ""
        known = self.owners.setdefault(name, [])
        owners = [owner() for owner in known]
        i = next((i for i, owner in enumerate(owners) if owner is parameter), None)
        if i is None:  # (a model that is gone leaves its place: the next may be the same, made again for a checkpoint)
            i = next((i for i, owner in enumerate(owners) if owner is None), len(known))
            known[i : i + 1] = [weakref.ref(parameter)]
        return f"@{i}" if i else ""

    def importance(self, call: "Call", norms: Tensor, mask: Tensor | None, sites: Sequence[str], length: int) -> Tensor:
        """``|h_i| n_i`` for the estimates n of ``|g|``, over sites s that share the input: ``n_i^2 = sum_s n_si^2``.
        float64 [M]."""
        names = [site + call.suffix for site in sites]
        rows = Rows(norms.shape[0], length, norms.device, call.ids, mask, call.copies)
        if mask is not None and not all(self.padding.setdefault(n, Trial()).verdict == "zero" for n in names):
            mask = None
        found: list[Tensor] = []
        for name in names:
            call.lengths[name] = length
            n = None if self.source is None else self.source.read(name, rows)
            if n is not None:
                found.append(n.double().square())
        w = norms.to(torch.float64, copy=True)  # (an op may not return its input)
        if found:
            w = w * floored(functools.reduce(torch.add, found).sqrt(), mask)
        return w if mask is None else torch.where(mask, w, 0.0)

    def record(self, call: "Call", squared: Tensor, mask: Tensor | None, site: str) -> None:
        """Note what the gradient rows of a site were. squared, float [M]: their squared norms."""
        name = site + call.suffix
        if mask is not None and not self._try_padding(name, squared, mask):
            mask = None
        if self.source is not None:
            rows = Rows(squared.shape[0], call.lengths.get(name, 0), squared.device, call.ids, mask, call.copies)
            self.source.record(name, rows, squared.sqrt())

    def _try_padding(self, site: str, squared: Tensor, mask: Tensor) -> bool:
        """Whether the mask is to be believed. Calls 1, 2, 4, 8, ... of a site are looked at, because looking waits for the
        device. A batch without padding, without any gradient (of a LoRA's first factor, while the second is zero), or with an
        overflow, shows nothing."""
        trial = self.padding.setdefault(site, Trial())
        trial.calls += 1
        if trial.verdict == "refused" or trial.calls & (trial.calls - 1):
            return trial.verdict == "zero"
        padded = ~mask
        shows, wrong = torch.stack(
            [padded.any() & (squared > 0).any() & torch.isfinite(squared).all(), (squared * padded > 0).any()]
        ).tolist()
        if shows:
            trial.verdict = "refused" if wrong else "zero"
            if wrong:
                self.news.append(site)
        return trial.verdict == "zero"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "owners": {}}  # references to this process's, or this model's, parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowState":
        import copy

        new = memo[id(self)] = RowState(None)
        vars(new).update(copy.deepcopy(self.__getstate__(), memo))
        return new


@dataclass
class Call:
    """One forward of one graph."""

    state: "weakref.ref[RowState]"
    suffix: str
    ids: tuple[int, ...] | None
    lengths: dict[str, int] = field(default_factory=dict)
    """Site -> rows per sequence, 0 if unknown."""
    copies: dict[torch.device, Tensor] = field(default_factory=dict)
    """The ids on devices."""
    meter: Measurement | None = None
    """Where a graph that measures reports its products."""


@dataclass(frozen=True)
class _Running:
    """The graph that is being called."""

    state: RowState
    graph: object
    first: str
    parameter: Tensor | None
    inputs: tuple[Tensor, ...]
    meter: Measurement | None


_running: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("wtacrs_running", default=None)
_calls: OrderedDict[int, Call] = OrderedDict()
_numbers = itertools.count(1)
_lock = threading.Lock()
_states: Any = WeakTensorKeyDictionary()
"""Parameter -> the state of the model that was compiled with it."""


def begin(sites: Sequence[str]) -> int:
    """Note a forward of the running graph; its number. 0 if no graph of this package is running (a trace, a replay)."""
    running = _running.get()
    if running is None:
        return 0
    state, now = running.state, given.get()
    if state.news:
        _warn(
            "padding: rows that the mask calls padding have gradients at these sites, where the option is refused from now on: "
            f"{', '.join(state.news)}. Name them in padding_exclude."
        )
        state.news.clear()
    ids = None
    if state.source is not None and state.source.wants_ids and sites:
        ids = (
            None if now is None else now.take((running.graph, running.parameter is not None and id(running.parameter)))
        )
        if ids is not None:
            _check_length(ids, running.inputs)
        elif not state.warned:
            state.warned = True
            _warn(
                "norms='sample': this forward was not told its sample ids, so that running means by position take their place. "
                "Use `with wtacrs_fx.sample_ids(ids):` around it."
            )
    suffix = state.suffix(running.first, running.parameter)
    if state.source is not None and sites:
        state.source.begin([site + suffix for site in sites], ids)
    number = next(_numbers)
    with _lock:
        _calls[number] = Call(weakref.ref(state), suffix, ids, meter=running.meter)
        while len(_calls) > CALLS:
            _calls.popitem(last=False)
    return number


def find(token: Tensor) -> tuple[RowState, Call] | None:
    """The state and the call behind a token, int64 [1] on the CPU; None if either is gone."""
    call = _calls.get(int(token))
    state = None if call is None else call.state()
    return None if call is None or state is None else (state, call)


def with_rows(
    compiled: Callable[..., Any],
    gm: GraphModule,
    names: Sequence[str | None],
    state: RowState,
    by_model: bool,
    meter: Measurement | None = None,
) -> Callable[..., Any]:
    """A compiled graph that says, while it runs, whose state it belongs to.

    Args:
        compiled: the graph's callable.
        gm: the Dynamo graph.
        names: per input, a parameter's name or None.
        state: of the Backend.
        by_model: take the state of an earlier graph that has a parameter in common instead, if there is one. (The string
            "wtacrs" makes a Backend per graph.)
        meter: what the graph reports its products to, if it measures.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    owned = [i for i, n in enumerate(nodes) if re.search(r"_parameters_\w+$", str(n.target))]
    others = [i for i, name in enumerate(names) if name is None or isinstance(name, Argument)]
    first = str(nodes[owned[0]].target) if owned else ""
    graph = object()
    chosen: list[RowState] = []

    def run(*args: Any) -> Any:
        values = args[0] if len(args) == 1 and isinstance(args[0], list) else args
        parameters = [values[i] for i in owned]
        if not chosen:
            chosen.append(_earlier(parameters, state) if by_model else state)
        if parameters and _states.get(parameters[0]) is not chosen[0]:
            _states.update(dict.fromkeys(parameters, chosen[0]))
        inputs = tuple(v for i in others if isinstance(v := values[i], Tensor) and v.dim())
        with _run_as(_Running(chosen[0], graph, first, parameters[0] if parameters else None, inputs, meter)):
            return compiled(*args)

    return like_compiled(run, compiled)


def _earlier(parameters: Sequence[Tensor], state: RowState) -> RowState:
    """The state of a graph that has a parameter in common and knows the same kind of thing; else ``state``."""
    known = (_states.get(p) for p in parameters)
    return next((s for s in known if s is not None and type(s.source) is type(state.source)), state)


def norms_of(model: nn.Module) -> NormSource:
    """The norm source of a model that was compiled by ``backend="wtacrs"`` with ``norms="position"`` or "sample" and has run.

    (A Backend has its own as ``Backend.norms``.)

    Raises:
        ValueError: there is none, or there are several, because graph breaks left parts that share no parameter.
    """
    states = {id(s): s for p in model.parameters() if (s := _states.get(p)) is not None and s.source is not None}
    if len(states) == 1 and (source := next(iter(states.values())).source) is not None:
        return source
    found = f"{len(states)} are" if states else "none is"
    raise ValueError(
        f"{found} known for this model: run a training forward of it compiled with norms='position' or 'sample' first; "
        "or make the source yourself and give it as an option, norms=wtacrs_fx.SampleNorms(examples=...)."
    )


@contextmanager
def _run_as(running: _Running) -> Iterator[None]:
    token = _running.set(running)
    try:
        yield
    finally:
        _running.reset(token)


def _check_length(ids: tuple[int, ...], inputs: Sequence[Tensor]) -> None:
    sizes = {t.shape[0] for t in inputs}
    if sizes and len(ids) not in sizes:
        raise ValueError(
            f"sample_ids: {len(ids)} ids, and no input of the model has {len(ids)} examples (first dimensions: "
            f"{', '.join(map(str, sorted(sizes)))}). Give one id per example of this forward's batch."
        )


def _warn(message: str) -> None:
    warnings.warn(f"wtacrs: {message}", WtacrsWarning, stacklevel=3)

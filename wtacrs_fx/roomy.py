"""Room on Python's stack for code that is called deep inside of others, quiet from its garbage collector, and no code for
modules that never run.

CPython (3.11 and newer) keeps the frames of a thread in chunks of 16 KiB, and gives a chunk back to the operating system as
soon as its first frame returns. A loop whose calls cross the end of a chunk maps and unmaps memory at every call; under
Dynamo's hundreds of frames that was half of the time of a partition (5 million page faults for t5-3b). A frame larger than a
chunk gets one of its own, as large as the next power of two: what is left of that is room for the frames it calls.
"""

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from torch.fx import GraphModule

P = ParamSpec("P")
T = TypeVar("T")

_patching = threading.RLock()
"""Held while ``GraphModule.recompile`` is another: two threads that restored it in turn would leave one's behind."""

_WORDS = 2**15 + 1
"""Of the frame: a little over a power of two (256 KiB), so that the chunk has as much again."""


def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


_call.__code__ = _call.__code__.replace(co_stacksize=_WORDS)


def roomy(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function, and all that it calls, where frames have room. Nothing else is changed."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = _call(function, args, kwargs)
        return result

    return wrapper


@contextlib.contextmanager
def collector_paused(*, collect: bool = True) -> Iterator[None]:
    """Pause Python's cyclic garbage collector: where many graphs are made it walks over all of them again and again and
    finds nothing, for a third of the time of a partition.

    Args:
        collect: whether it may walk over everything made meanwhile as soon as it goes on (4 s after a report on t5-3b). False,
            for a process that is about to end: what was made meanwhile counts as old, as if it had been walked over.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on and not collect and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # (into the oldest generation)
        if was_on:
            gc.enable()


@contextlib.contextmanager
def without_code() -> Iterator[None]:
    """Write no Python code for the graph modules that this thread makes or changes inside; whoever runs one of them calls its
    ``recompile`` before. (torch's ``_LazyGraphModule`` does this for modules made by torch's factory, but the partitioner
    calls the constructor of the plain class: 2.9 s for t5-3b.)"""
    thread = threading.get_ident()
    with _patching:
        recompile = GraphModule.recompile

        def later(self: GraphModule) -> Any:
            return recompile(self) if threading.get_ident() != thread else None

        GraphModule.recompile = later  # type: ignore[method-assign]
        try:
            yield
        finally:
            GraphModule.recompile = recompile  # type: ignore[method-assign]

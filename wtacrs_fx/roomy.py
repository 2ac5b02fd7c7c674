"""Room on Python's stack for code that is called deep inside of others, and quiet from its garbage collector.

CPython (3.11 and newer) keeps the frames of a thread in chunks of 16 KiB, and gives a chunk back to the operating system as
soon as its first frame returns. A loop whose calls cross the end of a chunk maps and unmaps memory at every call; under
Dynamo's hundreds of frames that was half of the time of a partition (5 million page faults for t5-3b). A frame larger than a
chunk gets one of its own, as large as the next power of two: what is left of that is room for the frames it calls.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

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
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector: where many graphs are made it walks over all of them again and again and
    finds nothing, for a third of the time of a partition."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

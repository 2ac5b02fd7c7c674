"""Frames have room: a loop deep inside of other calls maps no memory."""

import resource
import sys

import pytest

from wtacrs_fx.roomy import roomy


def leaf(depth: int) -> int:
    return leaf(depth - 1) if depth else 0


def work(calls: int) -> int:
    for _ in range(calls):
        leaf(300)  # more frames than fit into a chunk: every call crosses its end
    return calls


def faults(function) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert function(2000) == 2000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_frames_have_room():
    if sys.version_info >= (3, 11):  # before, frames were not kept in chunks
        assert faults(work) > 2000
    assert faults(roomy(work)) < 500


def test_results_and_errors_pass_through():
    assert roomy(lambda a, *, b: (a, b))(1, b=2) == (1, 2)
    with pytest.raises(KeyError):
        roomy(dict.__getitem__)({}, "x")

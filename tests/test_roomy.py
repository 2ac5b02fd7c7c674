"""Frames have room: a loop deep inside of other calls maps no memory. The collector walks when it is told to, and modules
that never run have no code."""

import gc
import resource
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from wtacrs_fx.roomy import collector_paused, roomy, without_code


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


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("collect", [True, False])
def test_collector_goes_on_where_it_was(collect):
    gc.collect()
    walks = []
    gc.callbacks.append(lambda phase, info: walks.append(info["generation"]) if phase == "start" else None)
    try:
        with collector_paused(collect=collect):
            cycles = [Cycle() for _ in range(5000)]
            assert not gc.isenabled()
            assert not walks
        assert gc.isenabled()
        Cycle()
        assert bool(walks) == collect, "what was made inside is old"
    finally:
        gc.callbacks.pop()
    del cycles
    assert gc.collect() >= 5000, "and is found when everything is looked through"


def test_without_code():
    module = symbolic_trace(lambda x: torch.relu(x))
    before = module.code
    with without_code():
        next(n for n in module.graph.nodes if n.op == "call_function").target = torch.sigmoid
        module.recompile()
        assert module.code == before
        found = []
        thread = threading.Thread(
            target=lambda: found.append(symbolic_trace(nn.Sequential(nn.ReLU()))(torch.tensor(-1.0)))
        )
        thread.start()
        thread.join()
    assert found == [0.0], "other threads are left alone"
    module.recompile()
    assert "sigmoid" in module.code


def test_without_code_in_two_threads():
    """One thread begins inside of the other's time and ends after it."""
    original, inside = GraphModule.recompile, threading.Event()

    def second():
        inside.set()
        with without_code():
            time.sleep(0.3)

    thread = threading.Thread(target=second)
    with without_code():
        thread.start()
        inside.wait()
        time.sleep(0.05)
    thread.join()
    assert GraphModule.recompile is original

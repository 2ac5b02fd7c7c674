"""Files and caches: a process that is killed, two that compile at once, a missing private API of torch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from wtacrs_fx import files, private, sidecar
from wtacrs_fx.backend import Partitioner
from wtacrs_fx.config import Config
from wtacrs_fx.errors import UnsupportedError
from wtacrs_fx.files import replace_text

TESTS = Path(__file__).parent
ROOT = TESTS.parent

WRITE = """
    import itertools, json, sys
    from files import replace_text
    print("ready", flush=True)
    for i in itertools.count():
        replace_text(sys.argv[1], json.dumps({"number": i, "rows": [i] * 50000}))
"""


@pytest.mark.works_with("Caches", "a process killed while it writes a ledger", "the previous file is intact")
def test_killed_while_writing(tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps({"number": -1, "rows": [-1] * 50000}))
    for pause in (0.0, 0.013, 0.031, 0.07):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITE), str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(files.__file__).parent,  # without the package, whose import takes seconds
        )
        assert process.stdout.readline().strip() == "ready"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = json.loads(path.read_text())
        assert data["rows"] == [data["number"]] * 50000
    assert data["number"] >= 0


CHECKPOINT = """
    import io, sys, torch
    from files import replacing
    for number in (0, 1):
        data = io.BytesIO()
        torch.save({"model": {"w": torch.full((2**18,), number)}, "norms": torch.full((2**18,), number)}, data)
        with replacing(sys.argv[1]) as new, new.open("wb") as f:
            f.write(data.getbuffer()[: 2**20])
            f.flush()
            if number == 1:
                print("in the middle", flush=True)
                sys.stdin.read()
            f.write(data.getbuffer()[2**20 :])
"""


@pytest.mark.works_with(
    "Caches",
    "a process killed while it writes a checkpoint by `wtacrs_fx.files.replacing`",
    "the previous file is intact",
)
def test_killed_while_writing_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHECKPOINT), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(files.__file__).parent,  # without the package, whose import takes seconds
    )
    assert process.stdout.readline().strip() == "in the middle"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.iterdir())) == 2, "the half-written one lies beside it"
    state = torch.load(path)
    assert (state["model"]["w"] == 0).all()
    assert (state["norms"] == 0).all()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    path.write_text("before")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace_text(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]


TRAIN = """
    import json, torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    compiled = torch.compile(model, backend="wtacrs", options={"min_bytes": 0})
    compiled(torch.randn(256, 64)).square().sum().backward()
    import wtacrs_fx
    print(json.dumps([model[0].weight.grad.double().abs().sum().item(), len(wtacrs_fx.ledgers()[0].entries)]))
"""


@pytest.mark.long
@pytest.mark.works_with("Caches", "two processes that compile at once into one cache", "yes, identically")
def test_two_processes_compile_at_once(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(TRAIN)], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [json.loads(p.communicate(timeout=200)[0].strip().splitlines()[-1]) for p in both]
    assert results[0] == results[1]
    assert results[0][1] == 2


def test_private_names_are_found():
    for name in private.USED:
        assert private.find(name) is not None


def test_a_missing_private_name_says_which_versions_have_it(monkeypatch):
    monkeypatch.setitem(private.USED, "gone", private.Private("torch._inductor", "a test"))
    with pytest.raises(
        UnsupportedError, match=r"has no torch\._inductor\.gone, needed for: a test\. Install torch 2\.11 to 2\.\d+"
    ):
        private.find("gone")
    with pytest.raises(AttributeError):
        private.unknown  # noqa: B018


@pytest.mark.works_with("torch", "private APIs", "in one table; a missing one is an error that names the versions")
def test_private_names_are_used_through_the_table_alone():
    sources = [*(ROOT / "wtacrs_fx").glob("*.py"), *(ROOT / "passes").glob("*.py")]
    assert len(sources) > 50
    for path in sources:
        if path.name == "private.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.strip()
            is_import = code.startswith(("import torch", "from torch")) and "._" in code
            assert not is_import, f"{path.name}:{number}: {code}: take it from wtacrs_fx.private"
    assert set(private.USED) - {"Private"}
    used = "\n".join(p.read_text() for p in sources if p.name != "private.py")
    unused = [name for name in private.USED if name not in used]
    assert not unused, f"no longer used: {unused}"


def test_the_tested_versions_include_this_one():
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert version >= private.OLDEST


def test_ledger_files_of_graphs_that_differ_inside():
    """By the code of a checkpoint region, or by a region's memory budget: both say nothing in the outer graph's code."""

    class Outer(torch.nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.region = torch.fx.symbolic_trace(function)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.region(x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name) -> bool:
            return True

    def path(function=lambda x: x.sin(), share=None) -> Path:
        outer = Outer(function)
        graph = torch.fx.GraphModule(outer, Tracer().trace(outer))
        for node in graph.graph.nodes if share else ():
            node.meta["custom"] = {"_region_activation_memory_budget": share}
        return sidecar._path(graph, [torch.ones(3)], Partitioner(Config()))

    assert path() == path()
    assert len({path(), path(lambda x: x.cos()), path(share=0.5), path(share=0.4)}) == 4

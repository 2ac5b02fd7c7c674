"""The tutorials run and print what they promise."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *args: str) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](*args)


def test_all_are_tested():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "backend_huggingface.py",
        "standalone_pass.py",
        "functorch_partitioner.py",
        "two_processes.py",  # by test_parallel.py
    }


def test_backend_on_a_hugging_face_model(capsys):
    run("backend_huggingface.py", "eager")
    printed = capsys.readouterr().out
    assert re.search(r"sites: \d+ early, \d+ late, 2 exact", printed), "pooler and classifier see one row an example"
    first, last = map(float, re.search(r"first five steps ([\d.]+), last five ([\d.]+)", printed).groups())
    assert last < 0.8 * first


def test_standalone_pass(capsys):
    run("standalone_pass.py")
    printed = capsys.readouterr().out
    before, after = printed.split("after:")
    assert "wtacrs.linear.default" not in before
    assert after.count("wtacrs.linear.default") == 3
    held = re.search(r"really held: (\d+) bytes before, (\d+) after", printed)
    assert int(held[2]) < 0.75 * int(held[1])
    one, mean = map(float, re.search(r"gradient ([\d.]+), of the mean of 200 ([\d.]+)", printed).groups())
    assert mean < 0.2 * one, "the error of a mean of 200 falls by the root of 200"


def test_functorch_partitioner(capsys):
    run("functorch_partitioner.py")
    printed = capsys.readouterr().out
    assert "(103, 64)" in printed, "ceil(0.1 * 1024) rows of the input are handed over"
    differences = dict(re.findall(r"([\w.]+): relative difference ([\d.e+-]+)", printed))
    assert float(differences["0.bias"]) < 1e-5 < 1e-2 < float(differences["0.weight"])

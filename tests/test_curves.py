"""The benchmark of loss curves: what it compares, and that an interrupted run goes on."""

import json
import subprocess
import sys

import pytest

from wtacrs_fx.benchmarks import curves
from wtacrs_fx.demo_data import Review


def test_difference_is_of_the_same_sequences():
    """Means that differ by 1 % with sequences that differ by 100 %: the standard error is that of the differences."""
    exact = [1.0, 2.0, 3.0]
    share, error = curves.compare([1.02, 2.02, 3.02], exact)
    assert share == pytest.approx(0.01)
    assert error == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="zip"):
        curves.compare([1.0], exact)


def test_text_is_packed_without_padding():
    packed = curves.pack_text([Review("abc", 0, "x"), Review("dé", 1, "y")], 3)
    assert packed.tolist() == [[97, 98, 99], [10, 100, 195]]


def test_learning_rate_rises_and_falls():
    rates = [curves.learning_rate(s, 300) for s in range(300)]
    assert rates[0] < rates[10] < max(rates) <= 1
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.long
@pytest.mark.slow
def test_arms_start_alike_and_are_not_trained_twice(tmp_path):
    options = "--steps 3 --layers 1 --width 64 --batch-size 2 --length 32 --bits 8 --inner eager --out"
    command = [sys.executable, "-m", "wtacrs_fx.benchmarks.curves", *options.split(), str(tmp_path)]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2)]
    assert all(o.returncode == 0 for o in outputs), outputs[0].stderr
    assert "step 0" in outputs[0].stdout
    assert "step 0" not in outputs[1].stdout
    exact, rounded = (json.loads((tmp_path / "curves" / f).read_text()) for f in ("exact.json", "8_bits.json"))
    assert (tmp_path / "curves" / "exact_other_masks.json").exists()
    assert exact["losses"][0] == pytest.approx(rounded["losses"][0], rel=1e-6)
    assert exact["losses"][1:] != rounded["losses"][1:]
    assert rounded["saved_share"] < 0.8 < exact["saved_share"]
    assert (tmp_path / "curves" / "curves.png").stat().st_size > 1000

"""The README is true: its options are the Config's, its quick start runs, it names the two commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from wtacrs_fx import Config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_options_table_is_generated():
    table = re.search(r"<!-- options: .*? -->\n(.*?)<!-- /options -->", README, re.DOTALL)
    assert table is not None
    assert table[1].strip() == Config.table().strip(), "run: python tests/test_readme.py"


def test_commands():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.slow
def test_quick_start(tmp_path):
    code = re.search(r"## Quick start.*?```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saved for backward" in done.stderr


if __name__ == "__main__":  # write the table into the README
    path = Path(__file__).parent.parent / "README.md"
    pattern = r"(<!-- options: .*? -->\n).*?(<!-- /options -->)"
    path.write_text(re.sub(pattern, lambda m: m[1] + Config.table() + "\n" + m[2], README, flags=re.DOTALL))

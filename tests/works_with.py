"""The README's table of what works with what: one row per ``@pytest.mark.works_with(area, what, how)`` on a test.

    python tests/works_with.py    # writes the table into the README

Read from the source of the tests, so that a row is there exactly as long as its test is.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
PATTERN = re.compile(r"(<!-- works with: .*? -->\n).*?(<!-- /works with -->)", re.DOTALL)
AREAS = ("Shapes", "Graph breaks", "Precision", "Training", "Parallelism", "Hugging Face", "torch", "Caches")


@dataclass(frozen=True)
class Row:
    area: str
    what: str
    how: str
    """How it behaves: "yes", or the limit, or that it is refused."""
    test: str


def rows() -> list[Row]:
    """Rows in the order of ``AREAS``, then of the tests. Raises ValueError at a mark that is no row."""
    found = []
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.works_with":
                    values = [ast.literal_eval(a) for a in mark.args]
                    if len(values) != 3 or values[0] not in AREAS:
                        raise ValueError(f"{path.name}: works_with{tuple(values)}: expected (area, what, how).")
                    found.append(Row(*values, test=f"{path.stem}::{node.name}"))  # type: ignore[attr-defined]
    return sorted(found, key=lambda row: AREAS.index(row.area))


def table() -> str:
    """The rows as a Markdown table."""
    lines = [(r.area, r.what, r.how, f"`{r.test}`") for r in rows()]
    return tabulate(lines, headers=("area", "with", "works", "test"), tablefmt="github")


def write() -> None:
    """Put the table into the README."""
    README.write_text(PATTERN.sub(lambda m: m[1] + table() + "\n" + m[2], README.read_text()))


if __name__ == "__main__":
    write()

"""Bytes and counts as text, both ways."""

import argparse
import re


def parse_bytes(value: "int | str") -> int:
    """``"12GiB"`` -> 12884901888; an int is bytes already. Units: B, KiB, MiB, GiB, TiB, and KB, MB, GB, TB for powers of 1000.

    Raises:
        ValueError: a string of another form.
    """
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B\s*", value)
    if not match:
        raise ValueError(f"{value!r}: expected a number of bytes with a unit, such as '12GiB' or '800MB'.")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))


def format_bytes(n: int) -> str:
    """``1536`` -> ``1.5 KiB``; 0 -> ``-``."""
    if n == 0:
        return "-"
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def positive(text: str) -> int:
    """A count of at least 1 from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value

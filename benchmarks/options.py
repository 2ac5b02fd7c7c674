"""Command-line options that the benchmarks share."""

import argparse

import torch

from wtacrs_fx.benchmarks.families import FAMILIES


def add_shape(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """Which models, of what size, on what batches, and how often they are timed."""
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def memory_budget(text: str) -> "float | str | None":
    """The option of that name from the command line: "none", a share such as "0.5", "auto", or bytes such as "2GiB"."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text

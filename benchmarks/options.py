"""Command-line options that the benchmarks share."""

import argparse


def add_shape(parser: argparse.ArgumentParser, *, layers: int, batch_size: int) -> None:
    """Models of what size, on what batches, and how often they are timed."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)


def memory_budget(text: str) -> "float | str | None":
    """The option of that name from the command line: "none", a share such as "0.5", "auto", or bytes such as "2GiB"."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text

"""The table of :mod:`wtacrs_fx.benchmarks.accuracy`: statistics over seeds and test items."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def render(results: Sequence[dict[str, Any]]) -> str:
    """A row per data set, arm and ratio."""
    groups: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["data"], r["arm"], r["ratio"]), {})[r["seed"]] = r
    rows = []
    for (data, arm, ratio), seeds in groups.items():
        reference = groups.get((data, "exact", 1.0), {})
        accuracies = [statistics.mean(r["correct"]) for r in seeds.values()]
        last = [statistics.mean(r["losses"][-20:]) for r in seeds.values()]
        any_ = next(iter(seeds.values()))
        whole = next(iter(reference.values()), any_)["saved_bytes_exact"]  # (of micro-batches it is that of one)
        rows.append(
            (
                data,
                f"{any_['padding']:.2f}",
                arm if ratio == 1 else f"{arm} {ratio}",
                len(seeds),
                with_error(accuracies),
                paired(seeds, reference) if arm != "exact" else "",
                f"{statistics.mean(last):.3f}",
                f"{any_['saved_bytes'] / whole:.2f}",
                f"{statistics.median(r['seconds'] for r in seeds.values()):.2f}",
            )
        )
    headers = (
        "data",
        "padding",
        "arm",
        "seeds",
        "accuracy",
        "minus exact (by seed; by item; sign test)",
        "loss",
        "held",
        "s/step",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def paired(seeds: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> str:
    """Difference of accuracies in points: its mean, its standard error over seeds, and over items (of all seeds together), and
    the p-value of :func:`sign_test` over these items."""
    common = sorted(seeds.keys() & reference.keys())
    if not common:
        return ""
    items = [[a - b for a, b in zip(seeds[s]["correct"], reference[s]["correct"])] for s in common]
    flat = [x for part in items for x in part]
    mean = 100 * statistics.mean(flat)
    by_item = 100 * statistics.stdev(flat) / math.sqrt(len(flat))
    by_seed = (
        100 * statistics.stdev(map(statistics.mean, items)) / math.sqrt(len(items)) if len(items) > 1 else math.nan
    )
    p = sign_test(flat.count(1), flat.count(-1))
    return f"{mean:+.2f} ({by_seed:.2f}; {by_item:.2f}; p {p:.2g})"


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact probability of a split at least as uneven as this one, if both were as likely: McNemar's test for items
    that only one of two models has right."""
    count = gained + lost
    tail = sum(math.comb(count, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)


def with_error(values: Sequence[float]) -> str:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"

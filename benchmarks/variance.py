"""Relative squared error of weight gradients: estimator x source of the gradient's norms x bits, on five kinds of batches.

    python -m wtacrs_fx.benchmarks.variance --out benchmarks/results

A model is trained for some steps; then, for every linear layer of its blocks, ``E |G' - G|^2 / |G|^2`` of one batch is
computed from its rows and many draws of the package's own estimators. The sources of ``|g_i|``: "activation" knows nothing;
"position" is the root of its mean square at each position over the last ``--age`` steps; "sample" is that of the same examples
``--age`` steps before, with other dropout masks; "true" is itself, as late sites have it. Every kind of batch becomes a JSON
file under ``variance/``, and one that is there is not computed again; the tables are made from all.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from wtacrs_fx import measure
from wtacrs_fx.benchmarks.variance_data import CONDITIONS, Task, Watch, train
from wtacrs_fx.benchmarks.variance_errors import AS_IS, BITS, VARIANTS, condition, layer_errors
from wtacrs_fx.norms import FLOOR

SOURCES = ("activation", "position", "sample", "true")

WARM = 5
"""Steps before the norms of "sample" are taken."""

TARGETS = (
    ("bytes of WTA-CRS@0.1, activation norms", "activation/0.1/bytes", 0.2),
    ("bytes of WTA-CRS@0.3, activation norms", "activation/0.3/bytes", 0.05),
    ("rows of WTA-CRS@0.3, sample norms", "sample/0.3/rows", 0.35),
    ("bytes of WTA-CRS@0.3, sample norms", "sample/0.3/bytes", 0.35),
    ("rows of WTA-CRS@0.3, true norms", "true/0.3/rows", 0.35),
)
"""What is compared with WTA-CRS with rows as they are, where, and which share of its error is aimed at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.3])
    parser.add_argument("--age", type=int, default=30, help="steps between the norms of 'sample' and their use")
    parser.add_argument("--batches", type=int, default=1, help="batches measured")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    folder = args.out / "variance"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("conditions", "out")}
    settings |= {"variants": list(VARIANTS), "sources": list(SOURCES), "floor": FLOOR}
    for name in args.conditions:
        path = folder / f"{name.replace(' ', '_')}.json"
        if not path.exists() or json.loads(path.read_text())["settings"] != settings:
            path.write_text(
                json.dumps({"condition": name, "settings": settings, **measure_condition(name, args)}) + "\n"
            )
    results = {name: folder / f"{name.replace(' ', '_')}.json" for name in CONDITIONS}
    text = render([json.loads(p.read_text()) for p in results.values() if p.exists()])
    (args.out / "variance.md").write_text(text)
    print(text)


def measure_condition(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of every layer, means over the measured batches; the paper's condition; the share of padding."""
    task = CONDITIONS[name](WARM + args.age + args.batches)
    measured = task.batches[WARM + args.age :]
    train(task, task.batches[:WARM])
    old = [_norms(task, batch) for batch in measured]
    squares = {n: torch.zeros(task.length) for n in task.layers()}
    with Watch(task) as watch:

        def remember() -> None:
            for n, total in squares.items():
                total += watch.norms(n).square().mean(0) / args.age

        train(task, task.batches[WARM : WARM + args.age], remember)
    layers: dict[str, dict[str, float]] = {n: {} for n in squares}
    conditions: dict[str, list[tuple[int, float]]] = {}
    for i, batch in enumerate(measured):
        with Watch(task) as watch:
            task.step(batch)
        for n in layers:
            print(f"{name}: batch {i}, {n}", flush=True)
            layer = watch.layer(n)
            guesses = {
                "activation": torch.ones(len(layer.h)),
                "position": squares[n].sqrt().repeat(len(layer.h) // task.length),
                "sample": old[i][n].flatten(),
                "true": layer.g.norm(dim=1),
            }
            for key, error in layer_errors(layer, guesses, tuple(args.ratios), args.draws, i).items():
                layers[n][key] = layers[n].get(key, 0.0) + error / len(measured)
            for source, guess in guesses.items():
                for ratio in args.ratios:
                    found = condition(layer.h.norm(dim=1) * guess, int(ratio * len(layer.h)))
                    conditions.setdefault(f"{source}/{ratio:g}", []).append(found)
    return {
        "padding": task.padding,
        "rows": len(layer.h),
        "layers": layers,
        "conditions": conditions,
        "environment": measure.environment(),
    }


def _norms(task: Task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the gradient's rows at the present weights; nothing is learnt."""
    with Watch(task) as watch:
        task.step(batch)
    return {n: watch.norms(n) for n in watch.g}


def medians(result: dict[str, Any]) -> dict[str, float]:
    """Median over the layers of every error."""
    layers = list(result["layers"].values())
    return {key: statistics.median(x[key] for x in layers) for key in layers[0]}


def render(results: list[dict[str, Any]]) -> str:
    """Tables of every condition, targets first."""
    environments = sorted({", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in results})
    settings = results[0]["settings"]
    parts = [
        "# Variance of weight gradients\n",
        "Median over the linear layers of the blocks of E|G'-G|^2/|G|^2. "
        f"{settings['batches']} batch; norms of 'sample' are {settings['age']} steps old. Rows are "
        "rounded in groups of 128 with 16-bit scales. 'bytes': as many rows in so many bits as the bytes of the rows of that "
        "ratio hold in 16 bits, row index and scales included, and mean, directions and their coefficients. Made by `python -m "
        "wtacrs_fx.benchmarks.variance`; "
        f"{'; '.join(environments)}.\n",
        "## Shares of WTA-CRS's error\n",
        tabulate(
            [row for r in results for row in _target_rows(r)],
            ("batches", "against", "WTA-CRS", *_CANDIDATES, "aim"),
            tablefmt="github",
            disable_numparse=True,
        ),
    ]
    for r in results:
        parts += [
            f"\n## {r['condition']} ({100 * r['padding']:.0f} % padding, {r['rows']} rows, {len(r['layers'])} layers, "
            f"{r['settings']['draws']} draws)\n",
            _error_table(r),
            "\nWTA-CRS's winners, median over the layers: |C|/k, the mass of C, and the share of layers in which the mass is "
            "larger (the paper's condition)\n",
            _condition_table(r),
        ]
    return "\n".join(parts) + "\n"


_CANDIDATES = (
    "systematic/16",
    "systematic/8",
    "systematic/4",
    "systematic, mean/16",
    "systematic, mean/4",
    "systematic, mean, padding/16",
    "systematic, 16 directions/16",
    "systematic, 32 directions/16",
)


def _target_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    found = medians(result)
    rows = []
    for title, place, share in TARGETS:
        source, ratio, kind = place.split("/")
        base = found.get(f"wta_crs/{source}/{ratio}/{kind}/{AS_IS}")
        if base is None:
            continue
        cells = []
        for candidate in _CANDIDATES:
            name, bits = candidate.split("/")
            error = found.get(f"{name}/{source}/{ratio}/{kind}/{bits}")  # (None: measured before there was the variant)
            cells.append("" if error is None else f"{error / base:.3f}")
        rows.append((result["condition"], title, f"{base:.3g}", *cells, f"{share:g}"))
    return rows


def _error_table(result: dict[str, Any]) -> str:
    found = medians(result)
    ratios = [f"{r:g}" for r in result["settings"]["ratios"]]
    columns = [(kind, bits) for kind in ("rows", "bytes") for bits in BITS if (kind, bits) != ("bytes", AS_IS)]
    rows = [
        (ratio, source, name, *(f"{found[f'{name}/{source}/{ratio}/{kind}/{bits}']:.2g}" for kind, bits in columns))
        for ratio in ratios
        for source in SOURCES
        for name in VARIANTS
        if f"{name}/{source}/{ratio}/rows/{AS_IS}" in found
    ]
    titles = [f"{kind}, {bits} bits" for kind, bits in columns]
    return tabulate(rows, ("ratio", "norms", "estimator", *titles), tablefmt="github", disable_numparse=True)


def _condition_table(result: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = []
    for key, found in sorted(result["conditions"].items(), key=lambda item: item[0].split("/")[1]):
        source, ratio = key.split("/")
        k = int(float(ratio) * result["rows"])
        winners, masses = ([f[i] for f in found] for i in (0, 1))
        met = sum(m > c / k for c, m in found) / len(found)
        rows.append(
            (ratio, source, f"{statistics.median(winners) / k:.2f}", f"{statistics.median(masses):.2f}", f"{met:.2f}")
        )
    return tabulate(
        rows,
        ("ratio", "norms", "|C|/k", "mass of C", "met in"),
        tablefmt="github",
        disable_numparse=True,
    )


if __name__ == "__main__":
    main()

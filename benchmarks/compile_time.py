"""Time of the first training step, compilation included, of Inductor and of wtacrs, each in a fresh process without caches.

python -m wtacrs_fx.benchmarks.compile_time --family bert --layers 12 --budgets none auto --out compile_time.md
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from wtacrs_fx import measure
from wtacrs_fx.benchmarks.families import FAMILIES
from wtacrs_fx.benchmarks.options import add_shape, memory_budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="bert", choices=list(FAMILIES))
    add_shape(parser, layers=12, batch_size=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budgets", nargs="+", default=["none", "auto"], help="memory_budget: none, auto or a share")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(first_step(args))
        return
    seconds: dict[str, list[float]] = {arm: [] for arm in ("inductor", *args.budgets)}
    for _ in range(args.repeats):
        for arm, times in seconds.items():
            times.append(run_child(arm, args))
    base = statistics.median(seconds["inductor"])
    rows = [
        (
            arm if arm == "inductor" else f"wtacrs, memory_budget={arm}",
            f"{statistics.median(t):.1f}",
            f"{statistics.median(t) / base:.2f}",
            ", ".join(f"{x:.1f}" for x in t),
        )
        for arm, t in seconds.items()
    ]
    env = ", ".join(f"{k} {v}" for k, v in measure.environment().items())
    text = (
        f"# Compile time\n\n{args.family}, {args.layers} layers, {args.batch_size}x{args.length} tokens; first step with "
        f"cold caches, fresh processes in turn. {env}.\n\n"
        + tabulate(rows, ("arm", "median s", "ratio", "all s"), tablefmt="github", disable_numparse=True)
        + "\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


def run_child(arm: str, args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "wtacrs_fx.benchmarks.compile_time", "--child", arm]
    for name in ("family", "layers", "batch_size", "length"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        return float(subprocess.check_output(command, env=env, text=True).strip().splitlines()[-1])


def first_step(args: argparse.Namespace) -> float:
    torch.manual_seed(0)
    model, batch = FAMILIES[args.family](args.layers, args.batch_size, args.length)
    options: dict[str, Any] = {"dynamic": False}
    if args.child == "inductor":
        options["backend"] = "inductor"
    else:
        options |= {"backend": "wtacrs", "options": {"memory_budget": memory_budget(args.child)}}
    compiled = torch.compile(model.train(), **options)
    start = time.perf_counter()
    compiled(**batch).loss.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

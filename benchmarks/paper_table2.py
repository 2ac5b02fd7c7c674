"""Our predicted memory in the setting of Table 2 of the paper (Liu et al., arXiv 2305.15265) beside its measured figures.

T5-base and T5-large, batch 100, 128 tokens, float32, AdamW. Nothing runs: ``python -m wtacrs_fx.benchmarks.paper_table2``.
Rows are written as they are made; ``--resume`` goes on where a run ended.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from wtacrs_fx.presets import build
from wtacrs_fx.training_memory import StepTraces

PAPER_GB = {
    "t5-base": {"exact": 17.66, "0.3": 8.44, "0.1": 7.30, "LoRA, 0.3": 6.50, "LoRA, 0.1": 5.44},
    "t5-large": {"exact": 45.85, "0.3": 21.58, "0.1": 18.46, "LoRA, 0.3": 17.44, "LoRA, 0.1": 14.64},
}
"""Measured on a GPU by the authors; the ratio is k / M."""

BATCH = 100

TARGET_LENGTH = 2
"""Tokens of a label that is generated as text, in the tasks of GLUE."""

LORA: Mapping[str, Any] = {"r": 32, "target_modules": ["q", "k", "v", "o", "wi", "wo"]}


HEADERS = ("model", "training", "weights, gradients, AdamW", "saved", "total at the peak", "paper")


def trainings(model: str) -> list[tuple[str, str]]:
    """(row of the paper's table, arm of ours), exact training once as eager and once with Inductor."""
    arms = {"exact": ("eager", "inductor")}
    return [(name, arm) for name in PAPER_GB[model] for arm in arms.get(name, ("wtacrs",))]


def predict(model: str, name: str, arm: str, budget: "str | None") -> list[str]:
    """One line of the table, in GB (10^9 bytes)."""
    module, batch = build(model, batch_size=BATCH, length=128, lora=LORA if "LoRA" in name else None)
    batch["labels"] = torch.empty(BATCH, TARGET_LENGTH, dtype=torch.long, device="meta")
    ratio = 0.3 if name == "exact" else float(name[-3:])
    traces = StepTraces(module, batch, "adamw", ratio=ratio, memory_budget=budget)
    found = traces.at(arm, BATCH)
    sizes = (f"{x / 1e9:.2f}" for x in (traces.fixed, found.saved, found.total))
    return [model, title(name, arm), *sizes, f"{PAPER_GB[model][name]:.2f}"]


def title(name: str, arm: str) -> str:
    """Of a row."""
    return f"{name} ({arm})" if name == "exact" else name


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table, row by row as they are made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PAPER_GB), default=list(PAPER_GB))
    parser.add_argument("--rows", nargs="+", metavar="TRAINING", help='only these, such as "LoRA, 0.3" (all)')
    parser.add_argument("--budget", default=None, help="memory_budget: 'auto' recomputes, the paper does not (none)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the data file")
    parser.add_argument("--out", type=Path, required=True, help="the table; its data is beside it, as .json")
    args = parser.parse_args(argv)
    data = args.out.with_suffix(".json")
    if args.out == data:
        parser.error(
            f"--out {args.out}: that is where the data goes; give the name of the table, such as {data.stem}.md"
        )
    found: list[list[str]] = json.loads(data.read_text()) if args.resume and data.exists() else []
    for model in args.models:
        for name, arm in trainings(model):
            known = any(row[:2] == [model, title(name, arm)] for row in found)
            if known or (args.rows and name not in args.rows):
                continue
            found.append(predict(model, name, arm, args.budget))
            print(*found[-1], flush=True)
            data.write_text(json.dumps(found, indent=1) + "\n")
            args.out.write_text(tabulate(found, HEADERS, tablefmt="github", disable_numparse=True) + "\n")


if __name__ == "__main__":
    main()

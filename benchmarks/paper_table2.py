"""Our predicted memory in the setting of Table 2 of the paper (Liu et al., arXiv 2305.15265) beside its measured figures.

T5-base and T5-large, batch 100, 128 tokens, float32, AdamW. Nothing runs: ``python -m wtacrs_fx.benchmarks.paper_table2``.
"""

import argparse
from collections.abc import Mapping
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

TARGET_LENGTH = 2
"""Tokens of a label that is generated as text, in the tasks of GLUE."""

LORA: Mapping[str, Any] = {"r": 32, "target_modules": ["q", "k", "v", "o", "wi", "wo"]}


def rows(model: str, budget: "str | None") -> "list[tuple[str, ...]]":
    """One line per row of the paper's table, in GB (10^9 bytes)."""
    result = []
    for name, paper in PAPER_GB[model].items():
        lora = LORA if "LoRA" in name else None
        module, batch = build(model, batch_size=100, length=128, lora=lora)
        batch["labels"] = torch.empty(100, TARGET_LENGTH, dtype=torch.long, device="meta")
        exact = name == "exact"
        traces = StepTraces(module, batch, "adamw", ratio=0.3 if exact else float(name[-3:]), memory_budget=budget)
        arms = ("eager", "inductor") if exact else ("wtacrs",)
        for arm in arms:
            m = traces.at(arm, 100)
            fixed = m.parameters + m.optimizer + m.gradients
            sizes = (f"{x / 1e9:.2f}" for x in (fixed, m.saved, m.total))
            title = f"{name} ({arm})" if exact else name
            result.append((model, title, *sizes, f"{paper:.2f}"))
            print(*result[-1], flush=True)
    return result


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PAPER_GB), default=list(PAPER_GB))
    parser.add_argument("--budget", default=None, help="memory_budget: 'auto' recomputes, the paper does not (none)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = [row for model in args.models for row in rows(model, args.budget)]
    headers = ("model", "training", "weights, gradients, AdamW", "saved", "total at the peak", "paper")
    args.out.write_text(tabulate(found, headers, tablefmt="github", disable_numparse=True) + "\n")


if __name__ == "__main__":
    main()

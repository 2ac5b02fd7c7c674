"""Rounding and packing: held bytes, peak, step time and error for 8, 4 and 2 bits, beside Inductor's default.

    python -m wtacrs_fx.benchmarks.rounding --families bert llama --layers 6 --batch-size 16 --out benchmarks/results

Arms share their parameters and are timed alternately in one process; compare medians. Errors are relative squared errors
of the gradients of one step with the dropout masks of Inductor's default: median and largest over the parameters, and per
parameter in the JSON file.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from wtacrs_fx import Backend, measure
from wtacrs_fx.benchmarks.families import FAMILIES
from wtacrs_fx.benchmarks.frontier import Arm
from wtacrs_fx.benchmarks.options import add_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_GRADIENT = 1e-16
"""Mean square below which a gradient is zero but for rounding of floating point (biases of keys)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], choices=[8, 4, 2])
    parser.add_argument("--only", default=".*", help="arms whose name matches this pattern; Inductor is always there")
    add_shape(parser, layers=6, batch_size=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    (args.out / "rounding").mkdir(parents=True, exist_ok=True)
    for family in args.families:
        torch._dynamo.reset()
        result = measure_family(family, args)
        name = f"{family}_{args.dtype}_{args.layers}_{args.batch_size}x{args.length}.json"
        (args.out / "rounding" / name).write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(f.read_text()) for f in sorted((args.out / "rounding").glob("*.json"))]
    text = render(results)
    (args.out / "rounding.md").write_text(text + "\n")
    print(text)


def arms(args: argparse.Namespace) -> list[Arm]:
    """Inductor's default first."""
    common: dict[str, Any] = {"memory_budget": None}
    found = [Arm("packed masks", Backend(ratio=1.0, **common)), Arm("rows 0.3", Backend(ratio=0.3, **common))]
    for bits in args.bits:
        for fused in (False, True):
            for ratio in (1.0, 0.3):
                name = f"{bits} bits" + (", attention" if fused else "") + (f", rows {ratio:g}" if ratio < 1 else "")
                options = {**common, "round_bits": bits, "round_fused_attention": fused, "ratio": ratio}
                found.append(Arm(name, Backend(**options)))
    return [Arm("inductor"), *(a for a in found if re.search(args.only, a.name))]


def measure_family(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """All arms of one model: memory and gradients first, arm by arm, then times side by side."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family](args.layers, args.batch_size, args.length)
    model.train().to(DTYPES[args.dtype])
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    exact: dict[str, Tensor] = {}
    chosen = arms(args)
    with torch._dynamo.config.patch(recompile_limit=4 * len(chosen), accumulated_recompile_limit=10_000):
        for arm in chosen:
            print(f"{family}: {arm.name}", flush=True)
            trained = arm.build(model, batch)
            results[arm.name] = {**trained.memory()}
            grads = trained.gradients()
            exact = exact or {n: g for n, g in grads.items() if float(g.float().square().mean()) > NO_GRADIENT}
            results[arm.name]["errors"] = {n: measure.relative_error(grads, {n: g}) for n, g in exact.items()}
            if isinstance(arm.backend, Backend):
                results[arm.name]["predicted"] = vars(arm.backend.ledger.predicted)
            steps[arm.name] = trained.step
        print(f"{family}: times", flush=True)
        for name, times in measure.alternate(steps, args.repeats, warmup=1).items():
            results[name] |= {"seconds": times.seconds, "median": times.median}
    return {
        "family": family,
        "dtype": args.dtype,
        "layers": args.layers,
        "batch_size": args.batch_size,
        "length": args.length,
        "environment": measure.environment(),
        "arms": results,
    }


def render(results: list[dict[str, Any]]) -> str:
    """The table, and under which conditions each model was measured."""
    lines = [
        f"- {r['family']}, {r['dtype']}: {r['layers']} layers, {r['batch_size']}x{r['length']} tokens; "
        + ", ".join(f"{key} {value}" for key, value in r["environment"].items())
        for r in results
    ]
    head = (
        "# Rounding and packing\n\n"
        "Held bytes, peak of activations and step time (medians) as ratios to Inductor's default in the same run, without "
        "recomputation (`memory_budget=None`); relative squared errors of one step's gradients over the parameters."
    )
    return "\n\n".join((head, "\n".join(lines), table(results)))


def table(results: list[dict[str, Any]]) -> str:
    """Every arm against Inductor's default of the same model."""
    rows = []
    for result in results:
        base = result["arms"]["inductor"]
        for name, arm in result["arms"].items():
            errors = sorted(arm["errors"].values())
            rows.append(
                (
                    result["family"],
                    result["dtype"],
                    name,
                    f"{arm['held_bytes'] / base['held_bytes']:.2f}",
                    f"{arm['activation_peak_bytes'] / base['activation_peak_bytes']:.2f}",
                    f"{arm['median'] / base['median']:.2f}",
                    f"{errors[len(errors) // 2]:.1e}",
                    f"{errors[-1]:.1e}",
                )
            )
    headers = ("model", "dtype", "arm", "held /ind.", "peak /ind.", "step /ind.", "median error", "largest error")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()

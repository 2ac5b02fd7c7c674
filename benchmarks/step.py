"""Step time, held bytes and peak of eager, Inductor and wtacrs on four transformer families.

    python -m wtacrs_fx.benchmarks.step --families bert llama --layers 6 --out benchmarks/results/step.md

All arms of a family run alternately in one process, so that they see the same noise; compare medians. Memory is in units
of one [tokens, hidden] float32 tensor. Peak is the largest sum of live bytes of a step, parameters excluded, their
gradients included. The error of the weight gradients comes from the same batch, dropout masks of the exact run included.
"""

import argparse
import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from wtacrs_fx import Backend
from wtacrs_fx.benchmarks import measure
from wtacrs_fx.benchmarks.families import FAMILIES, Batch
from wtacrs_fx.benchmarks.options import add_shape, memory_budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, repeats=9)
    parser.add_argument("--estimator", default="wta_crs")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.1])
    parser.add_argument(
        "--budgets", nargs="*", default=[], help="arms with memory_budget too: 'auto', a share or bytes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write a Markdown table here and the raw numbers beside it as JSON")
    args = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for family in args.families:
        results[family] = measure_family(family, args)
        text = render(results, args)
        if args.out:  # after every family: an hour's results are not lost to the last one's error
            args.out.write_text(text)
            raw = {"environment": measure.environment(), "arguments": {k: str(v) for k, v in vars(args).items()}}
            args.out.with_suffix(".json").write_text(json.dumps({**raw, "results": results}, indent=1) + "\n")
    print(text)


def measure_family(family: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Per arm: held and peak bytes, seconds of every step, relative squared error of the weight gradients."""
    torch.manual_seed(0)
    model, batch = FAMILIES[family](args.layers, args.batch_size, args.length)
    model.train().to(args.device)
    batch = {k: v.to(args.device) for k, v in batch.items()}
    config: Any = model.config
    hidden = config.d_model if family == "t5" else config.hidden_size
    steps: dict[str, Callable[[], None]] = {}
    results: dict[str, dict[str, Any]] = {}
    reference: dict[str, torch.Tensor] = {}
    for name, backend in arms(args).items():
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        call = twin if backend is None else torch.compile(twin, backend=backend)
        results[name] = {
            "unit_bytes": args.batch_size * args.length * hidden * 4,
            **memory(twin, call, batch, args.device),
        }
        if name != "eager":  # eager draws other dropout masks
            grads = gradients(twin, call, batch)
            reference = reference or grads
            results[name]["gradient_error"] = gradient_error(grads, reference)
        if isinstance(backend, Backend):
            results[name]["ledger"] = backend.ledger.summary()
        steps[name] = step_of(twin, call, batch)
        gc.collect()
    for name, times in measure.alternate(steps, args.repeats, device=args.device).items():
        results[name]["seconds"] = times.seconds
        results[name]["median"] = times.median
    return results


def arms(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> backend; None is eager. Every ratio without a budget and with each."""
    budgets = {"": None, **{f" budget {b}": memory_budget(b) for b in args.budgets}}
    sampled = {
        f"wtacrs {ratio:g}{name}": Backend(ratio=ratio, estimator=args.estimator, memory_budget=budget)
        for ratio in args.ratios
        for name, budget in budgets.items()
    }
    return {"eager": None, "inductor": "inductor", **sampled}


def step_of(model: nn.Module, call: Callable[..., Any], batch: Batch) -> Callable[[], None]:
    def step() -> None:
        call(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def memory(model: nn.Module, call: Callable[..., Any], batch: Batch, device: str) -> dict[str, int]:
    """Held and peak bytes, after one step that compiles."""
    step = step_of(model, call, batch)
    step()
    with measure.held(model) as held:
        loss = call(**batch).loss
    held_bytes = held.bytes
    loss.backward()
    model.zero_grad(set_to_none=True)
    del loss
    return {"held_bytes": held_bytes, "peak_bytes": measure.peak_bytes(step, device)}


def gradients(model: nn.Module, call: Callable[..., Any], batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of the matrices inside the layers, for fixed dropout masks."""
    torch.manual_seed(1)
    call(**batch).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.dim() == 2}
    model.zero_grad(set_to_none=True)
    return {n: g for n, g in grads.items() if "layer" in n or "block" in n or ".h." in n}


def gradient_error(grads: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Median over matrices of ``|G' - G|^2 / |G|^2`` for one draw."""
    errors = [((grads[n] - g).square().sum() / g.square().sum().clamp(min=1e-30)) for n, g in exact.items()]
    return float(torch.stack(errors).median())


def render(results: dict[str, dict[str, dict[str, Any]]], args: argparse.Namespace) -> str:
    rows = []
    for family, arms in results.items():
        base = arms["inductor"]
        for name, r in arms.items():
            rows.append(
                (
                    family,
                    name,
                    f"{r['held_bytes'] / r['unit_bytes']:.1f}",
                    f"{r['held_bytes'] / base['held_bytes']:.2f}",
                    f"{r['peak_bytes'] / r['unit_bytes']:.1f}",
                    f"{r['peak_bytes'] / base['peak_bytes']:.2f}",
                    f"{r['median']:.2f}",
                    f"{r['median'] / base['median']:.2f}",
                    f"{r['gradient_error']:.1e}" if "gradient_error" in r else "",
                )
            )
    headers = ("model", "arm", "held", "/ind.", "peak", "/ind.", "step s", "/ind.", "gradient error")
    env = ", ".join(f"{k} {v}" for k, v in measure.environment().items())
    shape = f"{args.layers} layers, {args.batch_size}x{args.length} tokens, no padding, float32, {args.repeats} repeats"
    return (
        f"# Step time and memory\n\n{shape}, estimator {args.estimator}. {env}.\n"
        "Held and peak in units of one [tokens, hidden] float32 tensor; '/ind.': ratio to Inductor in the same run; "
        "medians.\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"
    )


if __name__ == "__main__":
    main()

"""Rounding and packing: held bytes, peak, step time and error for 8, 4 and 2 bits, beside Inductor's default.

    python -m wtacrs_fx.benchmarks.rounding --families bert llama --dtype float32 bfloat16 --out benchmarks/results

Arms share their parameters, and each is timed alternately with Inductor in one process; compare the ratios of medians.
Errors are relative squared errors of the gradients of one step with the dropout masks of Inductor's default: median and
largest over the parameters, and per parameter in the JSON file. "torch" arms are PyTorch's own
``activation_quantization_aten_pass``, which casts what is saved to 8-bit floating point.

A file per model is written after every arm. Arms that are in it already are not measured again, so that an interrupted run
goes on where it was; delete the file to start afresh. Arms measured on different machines are not mixed: that is an error.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from wtacrs_fx import Backend, measure
from wtacrs_fx.benchmarks.families import FAMILIES, Batch
from wtacrs_fx.benchmarks.frontier import Arm, Trained, has_gradient
from wtacrs_fx.benchmarks.options import add_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ROWS: dict[str, dict[str, Any]] = {
    "": {},
    ", in 8 bits": {"row_bits": 8},
    ", in 4 bits": {"row_bits": 4},
    ", center_rows": {"center_rows": True},
    ", 16 directions": {"directions": 16},
    ", norms by position": {"norms": "position"},
}
"""What may be done to kept rows. Its cost is the difference of step times to plain rows: ``--only '^rows'`` measures that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], choices=[8, 4, 2])
    parser.add_argument("--only", default=".*", help="arms whose name matches this pattern; Inductor is always there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_shape(parser, layers=6, batch_size=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    (args.out / "rounding").mkdir(parents=True, exist_ok=True)
    for family in args.families:
        for dtype in args.dtype:
            kind = ["cuda"] * (args.device == "cuda")
            name = "_".join([family, dtype, str(args.layers), f"{args.batch_size}x{args.length}", *kind]) + ".json"
            measure_family(family, dtype, args, args.out / "rounding" / name)
    results = [json.loads(f.read_text()) for f in sorted((args.out / "rounding").glob("*.json"))]
    text = render(results)
    (args.out / "rounding.md").write_text(text + "\n")
    print(text)


def arms(args: argparse.Namespace) -> list[Arm]:
    """Inductor's default first."""
    common: dict[str, Any] = {"memory_budget": None}
    found = [Arm("packed masks", Backend(ratio=1.0, **common))]
    found += [Arm(f"rows 0.3{name}", Backend(ratio=0.3, **common, **options)) for name, options in ROWS.items()]
    for bits in args.bits:
        for fused in (False, True):
            for ratio in (1.0, 0.3):
                name = f"{bits} bits" + (", attention" if fused else "") + (f", rows {ratio:g}" if ratio < 1 else "")
                options = {**common, "round_bits": bits, "round_fused_attention": fused, "ratio": ratio}
                found.append(Arm(name, Backend(**options)))
        if bits > 4:
            few = {"round_bits": bits, "round_fused_attention": True, "ratio": 1.0, "row_bits": 4}
            found.append(Arm(f"{bits} bits, attention, 4-bit rows", Backend(**common, **few)))
    found += [Arm(f"torch {dtype}", torch_float8(dtype)) for dtype in ("float8_e4m3fn", "float8_e5m2")]
    return [Arm("inductor"), *(a for a in found if re.search(args.only, a.name))]


def torch_float8(dtype: str) -> Callable[[GraphModule, Sequence[Any]], Any]:
    """Inductor with PyTorch's own pass: saved tensors of at least 64 KiB (as ``min_bytes``) are cast to 8 bits."""
    options = {
        "quant_type": f"torch.{dtype}",
        "allowed_dtypes": "torch.float32;torch.bfloat16",
        "size_in_mb": 0.0625,
        "use_scaling": True,
        "exclude_primals": True,
    }

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        with inductor_config.patch(post_grad_fusion_options={"activation_quantization_aten_pass": options}):
            return compile_fx(gm, inputs)

    return backend


def measure_family(family: str, dtype: str, args: argparse.Namespace, path: Path) -> None:
    """All arms of one model that its file does not have.

    Raises: RuntimeError, if the file was measured under other conditions.
    """
    environment = measure.environment()
    result: dict[str, Any] = {
        "family": family,
        "dtype": dtype,
        "device": args.device,
        "layers": args.layers,
        "batch_size": args.batch_size,
        "length": args.length,
        "environment": environment,
        "arms": {},
    }
    if path.exists():
        result = json.loads(path.read_text())
        if result["environment"] != environment:
            raise RuntimeError(f"{path} was measured with {result['environment']}, this is {environment}: delete it.")
    chosen = [a for a in arms(args) if a.name not in result["arms"]]
    if not chosen:
        return
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = FAMILIES[family](args.layers, args.batch_size, args.length)
    model.train().to(args.device, DTYPES[dtype])
    batch = {name: value.to(args.device) for name, value in batch.items()}
    with torch._dynamo.config.patch(recompile_limit=4 * len(chosen) + 4, accumulated_recompile_limit=10_000):
        base = Arm("inductor").build(model, batch)
        grads = base.gradients()
        exact = {n: g for n, g in grads.items() if has_gradient(g)}
        for arm in chosen:
            print(f"{family}, {dtype}: {arm.name}", flush=True)
            result["arms"][arm.name] = measure_arm(arm, model, batch, base, exact, args)
            path.write_text(json.dumps(result, indent=1) + "\n")


def measure_arm(
    arm: Arm, model: nn.Module, batch: Batch, base: Trained, exact: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Memory, errors and times of one arm, and the time of Inductor's default beside it; or why it failed."""
    try:
        trained = base if arm.backend == "inductor" else arm.build(model, batch)
        found: dict[str, Any] = {**trained.memory()}
        grads = trained.gradients()
    except Exception as error:  # (a pass of torch's own that does not run here is a result)
        if isinstance(arm.backend, Backend):
            raise
        return {"error": str(error).strip().splitlines()[0]}
    found["errors"] = {n: measure.relative_error(grads, {n: g}) for n, g in exact.items()}
    if isinstance(arm.backend, Backend):
        found["predicted"] = vars(arm.backend.ledger.predicted)
    steps = {"inductor": base.step} | ({} if trained is base else {arm.name: trained.step})
    print(f"{arm.name}: times", flush=True)
    times = measure.alternate(steps, args.repeats, warmup=3 if args.device == "cuda" else 1, device=args.device)
    found |= {"seconds": times[arm.name].seconds, "median": times[arm.name].median}
    return found | {"inductor_median": times["inductor"].median}


def render(results: list[dict[str, Any]]) -> str:
    """The table, and under which conditions each model was measured."""
    lines = [
        f"- {_model(r)}, {r['dtype']}: {r['batch_size']}x{r['length']} tokens; "
        + ", ".join(f"{key} {value}" for key, value in r["environment"].items())
        for r in results
    ]
    head = (
        "# Rounding and packing\n\n"
        "Held bytes, peak of activations and step time (medians) as ratios to Inductor's default in the same run, without "
        "recomputation (`memory_budget=None`); relative squared errors of one step's gradients over the parameters."
    )
    layers = "Largest relative squared error among the parameters of each layer, fused attention rounded too:"
    return "\n\n".join((head, "\n".join(lines), table(results), layers, layer_table(results)))


def table(results: list[dict[str, Any]]) -> str:
    """Every arm against Inductor's default of the same model."""
    rows = []
    for result in results:
        base = result["arms"]["inductor"]
        for name, arm in result["arms"].items():
            if "error" in arm:
                rows.append((_model(result), result["dtype"], name, f"failed: {arm['error']}", "", "", "", ""))
                continue
            errors = sorted(arm["errors"].values())
            rows.append(
                (
                    _model(result),
                    result["dtype"],
                    name,
                    f"{arm['held_bytes'] / base['held_bytes']:.2f}",
                    f"{arm['activation_peak_bytes'] / base['activation_peak_bytes']:.2f}",
                    f"{arm['median'] / arm.get('inductor_median', base['median']):.2f}",
                    f"{errors[len(errors) // 2]:.1e}",
                    f"{errors[-1]:.1e}",
                )
            )
    headers = ("model", "dtype", "arm", "held /ind.", "peak /ind.", "step /ind.", "median error", "largest error")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _model(result: dict[str, Any]) -> str:
    return f"{result['family']}, {result['layers']} layers" + ", GPU" * (result.get("device") == "cuda")


def layer_table(results: list[dict[str, Any]]) -> str:
    """Per layer, that is a numbered module, the largest error of its parameters at 8, 4 and 2 bits."""
    arms_shown = [f"{bits} bits, attention" for bits in (8, 4, 2)]
    rows = []
    for result in results:
        found: dict[str, dict[str, float]] = {}
        for arm in arms_shown:
            for name, error in result["arms"].get(arm, {}).get("errors", {}).items():
                numbered = re.match(r".*?\.\d+(?=\.)", name)
                layer = found.setdefault(numbered[0] if numbered else "other", {})
                layer[arm] = max(error, layer.get(arm, 0.0))
        rows += [
            (_model(result), result["dtype"], layer, *(f"{by[a]:.1e}" if a in by else "" for a in arms_shown))
            for layer, by in sorted(found.items())
        ]
    return tabulate(
        rows, ("model", "dtype", "layer", "8 bits", "4 bits", "2 bits"), tablefmt="github", disable_numparse=True
    )


if __name__ == "__main__":
    main()

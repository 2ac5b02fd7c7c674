"""Accuracy of fine-tuning MiniLM: exact, WTA-CRS as in the paper, and this package's own choices, on the same test items.

    python -m wtacrs_fx.benchmarks.accuracy --data movies --arms exact paper ours --ratios 0.3 --seeds 0 1
    python -m wtacrs_fx.benchmarks.accuracy --data 20newsgroups --folder orangecontrib/text/datasets --length 128

One JSON file per data set, arm, ratio and seed under ``accuracy/``; those that are there already are not run again, so that
the whole can be done piece by piece. The table is made from all of them: accuracy with its standard error over the seeds,
and the difference to exact training, paired by seed and by test item.

All arms of a seed see the same training examples in the same batches, several epochs of them (a cache by example knows
nothing in the first one), and the same dropout masks. "padded": every text is filled up to the same length. "unpadded": texts
of one class are joined until that length is full.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from wtacrs_fx import Backend, Config, SampleNorms, WtacrsWarning, measure, sample_ids
from wtacrs_fx.benchmarks.texts import DATA, texts
from wtacrs_fx.demo_data import find_model

PAPER = {"estimator": "wta_crs", "norms": "sample", "late": "exact", "memory_budget": None, "pack_masks": False}
"""Liu et al.: rows chosen in the forward by the norm of the input times the cached norm of the gradient."""

KNOWN = {"estimator": "systematic", "norms": "sample", "padding": "attention_mask", "memory_budget": None}
"""As many rows as in the paper, chosen better."""

OURS = {**KNOWN, "center_rows": True, "directions": 16}
"""The same without what all rows have in common: a quarter to two thirds of the error (``variance``), for 20 bytes a row."""

ARMS: dict[str, dict[str, Any] | None] = {
    "exact": None,
    "paper": PAPER,
    "default": {},
    "ours": OURS,
    "bits": KNOWN,
    "crs": {**PAPER, "estimator": "crs", "norms": "activation"},
    "topk": {**PAPER, "estimator": "topk", "norms": "activation"},
    "noise": {},
}
"""Options of each arm. "default" is what a user gets who names the ratio only (recomputation paid for by sampling, rows by
the true gradient); "bits" holds the bytes of the ratio's 32-bit rows as more rows of fewer bits; "noise" takes its number as
the share of the batch's own noise that may be added, and chooses the ratio of every layer by that. With the suffix "-lora" the
model is trained by adapters of rank 8 on all linear layers, at a higher learning rate; "micro-N" is exact training with the
batch's gradient taken from 1/N of its examples."""

EVAL_BATCH = 64

LORA_LR = 10.0
"""Times ``--lr``: at the rate of the whole model, adapters that start at zero have learned next to nothing after 96 steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="movies")
    parser.add_argument("--folder", type=Path, help="of the files DATA-train.tab and DATA-test.tab (r8, 20newsgroups)")
    parser.add_argument("--arms", nargs="+", default=["exact", "paper", "ours"], metavar="ARM")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3])
    parser.add_argument("--ours", type=json.loads, default={}, help="more options of the arm 'ours', as JSON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--unpadded", action="store_true")
    parser.add_argument("--examples", type=int, default=1536, help="to train on")
    parser.add_argument("--test-items", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--inner", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if unknown := [a for a in args.arms if a.removesuffix("-lora") not in ARMS and not a.startswith("micro-")]:
        parser.error(f"--arms {unknown[0]}: expected {', '.join(ARMS)}, one of these with -lora, or micro-N")
    folder = args.out / "accuracy"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            for ratio in args.ratios if options_of(arm, args) is not None else [1.0]:
                path = folder / f"{name_of(args)}_{arm}_{ratio}_{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(run(arm, ratio, seed, args)) + "\n")
                    print(path, file=sys.stderr)
    text = render([json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))])
    (folder / "accuracy.md").write_text(text + "\n")
    print(text)


def name_of(args: argparse.Namespace) -> str:
    """Of the data set with its lengths."""
    return f"{args.data}{args.length}{'_unpadded' if args.unpadded else ''}"


def options_of(arm: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Options of the backend; None for exact training."""
    name = arm.removesuffix("-lora")
    options = None if name.startswith("micro-") else ARMS[name]
    return options if options is None or name != "ours" else {**options, **args.ours}


def chosen_options(arm: str, ratio: float, options: dict[str, Any]) -> dict[str, Any]:
    """Options of an arm for the number that ``--ratios`` gives it."""
    match arm.removesuffix("-lora"):
        case "bits":
            return options | more_rows(ratio)
        case "noise":
            return options | {"noise": ratio}
    return {"ratio": ratio, **options}


def more_rows(ratio: float) -> dict[str, Any]:
    """Options that hold at most the bytes of ``ratio`` rows of 32 bits: every tensor that can be in 8 bits, all rows too, if 8
    bits fit; else as many rows in 4 bits as fit. A group of 128 values has a scale of 16 bits."""
    if 32 * ratio >= 8 + 16 / 128:
        return {"ratio": 1.0, "round_bits": 8}
    return {"row_bits": 4, "ratio": min(0.99, 32 * ratio / (4 + 16 / 128))}


def run(arm: str, ratio: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and test it."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch._dynamo.reset()
    train, test, labels = texts(args, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model())
    encoded = tokenizer(
        [t.text for t in (*train, *test)],
        padding="max_length",
        truncation=True,
        max_length=args.length,
        return_tensors="pt",
    )
    inputs = {k: encoded[k] for k in ("input_ids", "attention_mask")}
    inputs["labels"] = torch.tensor([t.label for t in (*train, *test)])
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        find_model(), num_labels=labels, problem_type="single_label_classification"
    )
    model = _with_adapters(model) if arm.endswith("-lora") else model
    options = options_of(arm, args)
    known = chosen_options(arm, ratio, options or {}) | {"inner": args.inner}
    if known.get("norms") == "sample":
        known["norms"] = SampleNorms(examples=len(train))
    backend = Backend(**known) if options is not None else Backend(Config(inner=args.inner).exact())
    share = int(arm.removesuffix("-lora").removeprefix("micro-")) if arm.startswith("micro-") else 1
    args = argparse.Namespace(**{**vars(args), "lr": args.lr * (LORA_LR if arm.endswith("-lora") else 1)})
    losses, seconds = train_model(model, backend, inputs, len(train), seed, share, args)
    ledger = backend.ledger
    return {
        "data": name_of(args),
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "options": known | ({"norms": options["norms"]} if options and "norms" in options else {}),
        "settings": {k: getattr(args, k) for k in ("examples", "epochs", "batch_size", "length", "lr", "test_items")},
        "ratios": {m: r for c in backend.calibrations for m, r in c.ratios.items()},
        "padding": 1 - float(inputs["attention_mask"][: len(train)].double().mean()),
        "rows_of_padding": dict(Counter(backend.padding.values())),
        "losses": losses,
        "seconds": statistics.median(seconds),
        "saved_bytes": ledger.saved_bytes,
        "saved_bytes_exact": ledger.saved_bytes_exact,
        "correct": correct(model, {k: v[len(train) :] for k, v in inputs.items()}),
        "environment": measure.environment(),
    }


def train_model(
    model: nn.Module,
    backend: Backend,
    inputs: dict[str, Tensor],
    examples: int,
    seed: int,
    share: int,
    args: argparse.Namespace,
) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step."""
    compiled = torch.compile(model.train(), backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    losses, seconds = [], []
    for _ in range(args.epochs):
        order = torch.randperm(examples, generator=generator)
        for ids in order[: examples // args.batch_size * args.batch_size].view(-1, args.batch_size):
            ids = ids[: len(ids) // share]
            start = time.perf_counter()
            with sample_ids(ids):
                loss = compiled(**{k: v[ids] for k, v in inputs.items()}).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
    return losses, seconds


@torch.no_grad()
def correct(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """Per test item, 1 if its class was found."""
    model.eval()
    found: list[int] = []
    labels = inputs.pop("labels")
    for i in range(0, len(labels), EVAL_BATCH):
        logits = model(**{k: v[i : i + EVAL_BATCH] for k, v in inputs.items()}).logits
        found += (logits.argmax(-1) == labels[i : i + EVAL_BATCH]).int().tolist()
    return found


def _with_adapters(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


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
        "minus exact (by seed; by item)",
        "loss",
        "held",
        "s/step",
    )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def paired(seeds: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> str:
    """Difference of accuracies in points: its mean, its standard error over seeds, and over items (of all seeds together)."""
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
    return f"{mean:+.2f} ({by_seed:.2f}; {by_item:.2f})"


def with_error(values: Sequence[float]) -> str:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("once", WtacrsWarning)
    main()

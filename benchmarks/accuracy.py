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
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_fx import Backend, Config, SampleNorms, WtacrsWarning, measure, sample_ids
from wtacrs_fx.benchmarks.accuracy_table import render
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
batch's gradient taken from 1/N of its examples, whose noise is N - 1 times the batch's own (``accuracy_noise``)."""

EVAL_BATCH = 64

LORA_LR = 10.0
"""Times ``--lr``: at the rate of the whole model, adapters that start at zero have learned next to nothing after 96 steps."""


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    if unknown := [a for a in args.arms if not known_arm(a)]:
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


def arguments(text: str | None) -> argparse.ArgumentParser:
    """What to train, on what, and how."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser


def known_arm(arm: str) -> bool:
    """Whether it is one of :data:`ARMS`, with or without adapters, or a part of the batch."""
    return arm.removesuffix("-lora") in ARMS or part_of(arm) is not None


def part_of(arm: str) -> float | None:
    """The N of "micro-N"; None for another arm."""
    found = re.fullmatch(r"micro-(\d+(\.\d+)?)(-lora)?", arm)
    return float(found[1]) if found else None


def name_of(args: argparse.Namespace) -> str:
    """Of the data set with its lengths."""
    return f"{args.data}{args.length}{'_unpadded' if args.unpadded else ''}"


def options_of(arm: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Options of the backend; None for exact training."""
    name = arm.removesuffix("-lora")
    options = None if part_of(arm) else ARMS[name]
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
    """Options that hold about the bytes of ``ratio`` rows of 32 bits: every tensor that can be in 8 bits, all rows too, if 8
    bits fit; else as many rows in 4 bits as fit. (16 bits are counted for the scale of 128 values; with lowest values and
    indices it is 1.04 to 1.07 times the bytes for rows of 1536 and 384 values.)"""
    if 32 * ratio >= 8 + 16 / 128:
        return {"ratio": 1.0, "round_bits": 8}
    return {"row_bits": 4, "ratio": min(0.99, 32 * ratio / (4 + 16 / 128))}


@dataclass(frozen=True)
class Task:
    """A model and the examples to train it on; those behind them are for the test."""

    model: nn.Module
    inputs: dict[str, Tensor]
    examples: int

    @classmethod
    def of(cls, arm: str, seed: int, args: argparse.Namespace) -> "Task":
        """The pretrained encoder with a new classifier, with adapters if the arm asks for them."""
        import transformers

        transformers.logging.set_verbosity_error()
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
        return cls(_with_adapters(model) if arm.endswith("-lora") else model, inputs, len(train))

    def rows(self, ids: Tensor | slice) -> dict[str, Tensor]:
        """A batch of some examples."""
        return {k: v[ids] for k, v in self.inputs.items()}


def run(arm: str, ratio: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and test it."""
    torch._dynamo.reset()
    task = Task.of(arm, seed, args)
    options = options_of(arm, args)
    known = chosen_options(arm, ratio, options or {}) | {"inner": args.inner}
    if known.get("norms") == "sample":
        known["norms"] = SampleNorms(examples=task.examples)
    backend = Backend(**known) if options is not None else Backend(Config(inner=args.inner).exact())
    args = argparse.Namespace(**{**vars(args), "lr": args.lr * (LORA_LR if arm.endswith("-lora") else 1)})
    losses, seconds = train_model(task, backend, seed, part_of(arm) or 1.0, args)
    ledger = backend.ledger
    return {
        "data": name_of(args),
        "arm": arm,
        "ratio": ratio,
        "seed": seed,
        "options": known | ({"norms": options["norms"]} if options and "norms" in options else {}),
        "settings": {k: getattr(args, k) for k in ("examples", "epochs", "batch_size", "length", "lr", "test_items")},
        "ratios": {m: r for c in backend.calibrations for m, r in c.ratios.items()},
        "padding": 1 - float(task.inputs["attention_mask"][: task.examples].double().mean()),
        "rows_of_padding": dict(Counter(backend.padding.values())),
        "losses": losses,
        "seconds": statistics.median(seconds),
        "saved_bytes": ledger.saved_bytes,
        "saved_bytes_exact": ledger.saved_bytes_exact,
        "correct": correct(task.model, task.rows(slice(task.examples, None))),
        "environment": measure.environment(),
    }


def train_model(
    task: Task, backend: Backend, seed: int, parts: float, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step."""
    compiled = torch.compile(task.model.train(), backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=args.lr)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    losses, seconds = [], []
    for _ in range(args.epochs):
        order = torch.randperm(task.examples, generator=generator)
        for ids in order[: task.examples // args.batch_size * args.batch_size].view(-1, args.batch_size):
            ids = ids[: round(len(ids) / parts)]
            start = time.perf_counter()
            with sample_ids(ids):
                loss = compiled(**task.rows(ids)).loss
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


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("once", WtacrsWarning)
    main()

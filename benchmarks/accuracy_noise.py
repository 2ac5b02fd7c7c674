"""The noise that each arm of :mod:`wtacrs_fx.benchmarks.accuracy` adds to the weight gradients, beside the batch's own.

    python -m wtacrs_fx.benchmarks.accuracy_noise --data movies --arms paper default crs --ratios 0.1 0.3

Measured in the middle of training, when the cache of norms has seen every example: after two epochs of the paper's method, on
the next batches, exactly as :func:`wtacrs_fx.calibrate` does. Added variance and the batch's own variance are summed over
layers and batches. A gradient from 1/N of the batch adds N - 1 times the batch's own (its variance is sigma^2 N / B for
sigma^2 / B), so that "micro-N" with N = 1 + share is the control of the same noise. What ``row_bits`` rounds is not measured.

One JSON file per data set under ``accuracy_noise/``, and a table of all of them.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from wtacrs_fx import Backend, Config, SampleNorms, measure, sample_ids
from wtacrs_fx.benchmarks.accuracy import PAPER, Task, arguments, chosen_options, name_of, options_of, train_model
from wtacrs_fx.calibrate import measured
from wtacrs_fx.choose import GRID

EPOCHS, BATCHES = 2, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(arms=["paper", "default"], epochs=EPOCHS)
    args = parser.parse_args()
    folder = args.out / "accuracy_noise"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name_of(args)}.json").write_text(json.dumps(run(args.seeds[0], args), indent=1) + "\n")
    text = render([json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))])
    (folder / "accuracy_noise.md").write_text(text + "\n")
    print(text)


def run(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train for some epochs, then measure the arms on the same batches."""
    torch._dynamo.reset()
    task = Task.of("paper", seed, args)
    norms = SampleNorms(examples=task.examples)
    options: dict[str, Any] = {**PAPER, "ratio": 0.3, "inner": args.inner, "norms": norms}
    train_model(task, Backend(**options), seed, 1.0, args)
    order = torch.randperm(task.examples, generator=torch.Generator().manual_seed(seed + 1))
    batches = order[: BATCHES * args.batch_size].view(BATCHES, args.batch_size)
    found = {}
    for arm in args.arms:
        for ratio in args.ratios:
            options = chosen_options(arm, ratio, options_of(arm, args) or {})
            if options.get("norms") == "sample":
                options["norms"] = norms
            found[f"{arm} {ratio:g}"] = share_of_noise(task, batches, ratio, Config.from_options(options))
    settings = {k: getattr(args, k) for k in ("examples", "epochs", "batch_size", "length", "lr")}
    return {
        "data": name_of(args),
        "seed": seed,
        "settings": settings,
        "share": found,
        "environment": measure.environment(),
    }


def share_of_noise(task: Task, batches: Tensor, ratio: float, config: Config) -> float:
    """Added variance of the weight gradients over the batch's own, both summed over layers and batches."""

    def given() -> Iterator[dict[str, Tensor]]:
        for ids in batches:
            with sample_ids(ids):
                yield task.rows(ids)

    draws = measured(task.model, given(), config)
    at = GRID.index(ratio)
    return sum(d.curve[at] for d in draws) / sum(d.batch_noise for d in draws)


def render(results: list[dict[str, Any]]) -> str:
    """A row per data set, arm and ratio; and which part of the batch would be as noisy."""
    rows = [
        (r["data"], arm, f"{share:.2g}", f"micro-{1 + share:.3g}") for r in results for arm, share in r["share"].items()
    ]
    return tabulate(rows, ("data", "arm", "added noise / the batch's own", "as noisy"), tablefmt="github")


if __name__ == "__main__":
    main()

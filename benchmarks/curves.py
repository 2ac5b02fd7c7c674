"""Loss curves of a small causal language model: exact training, rounded to 8, 4 and 2 bits, and with sampled rows.

    python -m wtacrs_fx.benchmarks.curves --out benchmarks/results

A GPT-2 from its config with random weights learns movie reviews byte by byte (texts packed, so no padding), from the same
initial weights, with the same batches and dropout masks in every arm. What counts in the end is the mean loss of held-out
text of other movies, and its difference to exact training's, over the same sequences, with the standard error of that
difference. A second exact arm, with other dropout masks, shows what chance alone does to that difference. Rows: WTA-CRS as in
the paper; this package's defaults at the same ratio (rows by the true gradient); and the bytes of the paper's 32-bit rows as
more rows of fewer bits. Every arm becomes a JSON file under ``curves/``; arms that are there already are not trained again.
The table and the plot are made from all of them.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from wtacrs_fx import Backend, SampleNorms, measure, sample_ids
from wtacrs_fx.benchmarks.accuracy import PAPER, more_rows
from wtacrs_fx.demo_data import Review, find_reviews, read_reviews, split

EXACT, OTHER_ARM = "exact", "exact, other masks"

VOCABULARY = 256
"""Bytes."""

HELD_OUT = 1000
"""Reviews of movies that are not trained on."""

SEQUENCES = 256
"""Of held-out text at most."""

WARMUP = 30
"""Steps until the learning rate is reached; then it falls linearly to a tenth."""

OTHER_MASKS = 10**6
"""Added to the seeds of the second exact arm."""

LIMITS = {"8 bits": 0.003, "defaults 0.3": 0.01}
"""Arm -> final loss: at most this share above exact training's."""


def arms_of(bits: list[int], ratios: list[float]) -> dict[str, dict[str, Any]]:
    """Arm -> options of the backend."""
    exact: dict[str, Any] = {"ratio": 1.0, "memory_budget": None}
    arms = {EXACT: exact, OTHER_ARM: exact, **{f"{b} bits": {**exact, "round_bits": b} for b in bits}}
    for r in ratios:
        arms[f"paper {r}"] = {**PAPER, "ratio": r}
        arms[f"defaults {r}"] = {"ratio": r}
        if "row_bits" in (more := more_rows(r)):  # else it is the arm of 8 bits
            arms[f"more rows at bytes of {r}"] = {"memory_budget": None, **more}
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], choices=[8, 4, 2])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.3, 0.1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--attention", action="store_true", help="round what fused attention keeps too")
    parser.add_argument("--inner", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    folder = args.out / "curves"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("bits", "ratios", "out")}
    results = []
    for name, options in arms_of(args.bits, args.ratios).items():
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.json"
        if not path.exists() or json.loads(path.read_text())["settings"] != settings:
            path.write_text(json.dumps({"arm": name, "settings": settings, **train(name, options, args)}) + "\n")
        results.append(json.loads(path.read_text()))
    text = render(results)
    (folder / "curves.md").write_text(text + "\n")
    plot(results, folder / "curves.png")
    print(text)


def train(name: str, options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One arm: the loss of every step, the losses of the held-out sequences at the end, and what was held."""
    train_text, held_out = (
        pack_text(reviews, args.length) for reviews in split(read_reviews(find_reviews()), HELD_OUT, 0)
    )
    model = build(args)
    norms = {"norms": SampleNorms(examples=len(train_text))} if options.get("norms") == "sample" else {}
    backend = Backend(**{**options, **norms, "round_fused_attention": args.attention, "inner": args.inner})
    seed = OTHER_MASKS if name == OTHER_ARM else 0
    compiled = torch.compile(model, backend=backend, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    order = torch.randperm(len(train_text), generator=torch.Generator().manual_seed(0))
    losses, start = [], time.perf_counter()
    for step in range(args.steps):
        chosen = order[torch.arange(step * args.batch_size, (step + 1) * args.batch_size) % len(order)]
        torch.manual_seed(seed + step)  # dropout masks, and what is rounded how
        with sample_ids(chosen):
            loss = compiled(input_ids=train_text[chosen], labels=train_text[chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(
                f"{name}, step {step}: loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    ledger = backend.ledger
    return {
        "options": options,
        "losses": losses,
        "held_out": evaluate(model, held_out[:SEQUENCES], args.batch_size),
        "seconds": time.perf_counter() - start,
        "saved_share": ledger.saved_bytes / ledger.saved_bytes_exact,
        "environment": measure.environment(),
    }


def build(args: argparse.Namespace) -> nn.Module:
    """The model, with the same weights every time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=args.layers,
        n_embd=args.width,
        n_head=max(1, args.width // 64),
        n_positions=args.length,
        vocab_size=VOCABULARY,
        use_cache=False,
        # Tied and small embeddings, as GPT-2 has them, stay on a plateau (the frequencies of single bytes) for a number of
        # steps that chance decides: after 300 steps arms then differed by 10 %, the 2-bit one being the best.
        tie_word_embeddings=False,
        initializer_range=args.width**-0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).train()


def pack_text(reviews: list[Review], length: int) -> Tensor:
    """The bytes of the texts one after the other, cut in sequences: int64 [sequences, length]."""
    data = torch.frombuffer(bytearray("\n".join(r.text for r in reviews).encode()), dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


def learning_rate(step: int, steps: int) -> float:
    """Share of the highest one: a linear rise, then a linear fall to a tenth."""
    return min((step + 1) / WARMUP, 1.0 - 0.9 * step / max(1, steps))


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, batch_size: int) -> list[float]:
    """Mean loss of every sequence, nats a byte, without dropout."""
    model.eval()
    losses = []
    for part in text.split(batch_size):
        logits = model(input_ids=part).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        losses += loss.mean(1).tolist()
    return losses


def compare(found: list[float], exact: list[float]) -> tuple[float, float]:
    """Mean difference of the losses of the same sequences as a share of the exact mean, and its standard error."""
    differences = [a - b for a, b in zip(found, exact, strict=True)]
    mean = statistics.mean(exact)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences) / mean, error / mean


def render(results: list[dict[str, Any]]) -> str:
    """Table and verdict."""
    exact = next(r for r in results if r["arm"] == EXACT)
    rows, verdict = [], "\n"
    for r in results:
        share, error = compare(r["held_out"], exact["held_out"])
        rows.append(
            (
                r["arm"],
                f"{statistics.mean(r['losses'][-20:]):.4f}",
                f"{statistics.mean(r['held_out']):.4f}",
                "" if r is exact else f"{100 * share:+.2f} ± {100 * error:.2f} %",
                f"{r['saved_share']:.2f}",
            )
        )
        if limit := LIMITS.get(r["arm"]):
            met = "met" if share <= limit else "MISSED"
            verdict += f"\nFinal loss of {r['arm']}: at most {100 * limit:g} % above exact training's: {met}."
    s = exact["settings"]
    head = (
        f"# Loss curves\n\nGPT-2 of {s['layers']} layers, width {s['width']}, {s['steps']} steps of {s['batch_size']}x"
        f"{s['length']} bytes of movie reviews (no padding), one run per arm; "
        f"{'fused attention rounded too; ' if s['attention'] else ''}held-out: mean of {len(exact['held_out'])} sequences of "
        "other movies, nats a byte; difference: to exact training on the same sequences, with its standard error (of the "
        "sequences; not of another seed). Made by `python -m wtacrs_fx.benchmarks.curves`, "
        + ", ".join(f"{k} {v}" for k, v in exact["environment"].items())
        + ".\n\n"
    )
    headers = ("arm", "training loss (last 20 steps)", "held-out loss", "difference", "held /exact")
    return head + tabulate(rows, headers, tablefmt="github", disable_numparse=True) + verdict


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """All curves, and what lies between them and that of exact training: means of ten steps. Raises ImportError without
    matplotlib (the extra ``plot``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    exact = next(r for r in results if r["arm"] == EXACT)["losses"]
    for r in results:
        label = f"{r['arm']}, held {r['saved_share']:.2f}"
        above = [a - b for a, b in zip(r["losses"], exact, strict=True)]
        for axes, losses in ((curves, r["losses"]), (differences, above)):
            means = [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
            axes.plot([10 * i + 5 for i in range(len(means))], means, label=label)
    curves.set(xlabel="step", ylabel="training loss, nats a byte (mean of 10 steps)")
    differences.set(xlabel="step", ylabel="the same minus exact training's")
    differences.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

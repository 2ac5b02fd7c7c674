"""A soak: thousands of steps with changing batch sizes, evaluation, checkpoints and resumption in new processes.

    python -m wtacrs_fx.benchmarks.soak [--steps 2000] [--inner inductor|eager] [--out FOLDER]

Every arm is trained in parts of 500 steps, each in a process of its own that resumes from the last checkpoint. What is in the
folder is not done again, so that a soak that was stopped goes on. It ends with a table and, if a check fails, exit status 1:

- memory: the resident set after a part against that after its first evaluation;
- compilation: graphs compiled behind the warm-up (of 20 steps and an evaluation);
- loss: held-out loss of sampled training against exact training, where exact training from other batches says what is noise.

Options are the defaults, ratio 0.3. Batches are of 16 to 48 sequences of 16 tokens, without padding, and gradients of the rows
are alike, so that sampling has nothing to gain from: at a batch of 32 the squared error of a weight gradient is 1 to 2.5 times
its square (measured; its mean is exact at every batch size). That is what a small model on short batches costs: at a constant
rate, 300 steps in, such training is some 50 steps behind exact training, with one static graph as with the dynamic one. So
that the comparison is one of where training ends, and not of how far it is, the rate rises and then falls to zero, as in
fine-tuning; and a fifth of the labels are wrong, so that the loss ends at a floor above zero and noise has something to add to.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters

from wtacrs_fx import measure
from wtacrs_fx.files import replace_text, replacing

WIDTH, LENGTH, CLASSES = 64, 16, 8
PART, EVERY, WARM_UP = 500, 100, 20
SMALLEST, SIZES = 16, 33
"""Sequences of the smallest batch, and how many sizes there are."""
RATE, RISE = 3e-4, 50
"""Learning rate at its highest, and the steps until then."""
WRONG = 0.2
"""Share of sequences with a label at random."""
GROWTH_BYTES = 16 * 2**20
"""Of the resident set within one part. A leak of one activation of this model per step would be 130 MiB."""
ARMS = {"exact": (1.0, 0), "exact, other batches": (1.0, 1), "wtacrs": (0.3, 0)}
"""Arm -> ratio, seed of the batches."""


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(self.ln1(x)).chunk(3, -1))
        attention = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(attention))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.ln2(x)))))


class Model(nn.Module):
    """Reads a sequence of vectors and classifies it; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.classifier(x.mean(1)), target)


def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy sequences, each token with a random sign, so that their class takes more than a linear model; some labels wrong."""
    task = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (size,), generator=g)
    sign = torch.randint(0, 2, (size, LENGTH, 1), generator=g) * 2.0 - 1
    x = 0.35 * sign * task[target][:, None] + torch.randn(size, LENGTH, WIDTH, generator=g)
    other = torch.randint(0, CLASSES, (size,), generator=g)
    return x, torch.where(torch.rand(size, generator=g) < WRONG, other, target)


def rate(step: int, steps: int) -> float:
    """Learning rate of a step: a short rise, then a straight fall to zero."""
    return RATE * min(1.0, (step + 1) / RISE) * (1 - step / steps)


@dataclass
class Part:
    """One process's share of an arm."""

    arm: str
    start: int
    stop: int
    steps: int
    """Of the whole arm."""
    inner: str
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / f"{self.arm.replace(', ', '_').replace(' ', '_')}_{self.stop}.json"

    def checkpoint(self, step: int) -> Path:
        return self.record.with_name(f"{self.record.stem.rpartition('_')[0]}_{step}.pt")

    def train(self) -> dict[str, Any]:
        """Train from ``start`` to ``stop``; the record of it."""
        torch.manual_seed(0)
        ratio, data = ARMS[self.arm]
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        if self.start:
            state = torch.load(self.checkpoint(self.start))
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
        model.compile(backend="wtacrs", options={"ratio": ratio, "inner": self.inner}, dynamic=True)
        held_out, losses, evaluations = batch(512, 10**9), [], []
        before = graphs = 0
        for step in range(self.start, self.stop):
            size = SMALLEST + (step * 7919 + data) % SIZES  # in no simple order
            optimizer.param_groups[0]["lr"] = rate(step, self.steps)
            model.train()
            loss = model(*batch(size, 2 * step + data))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if (step + 1) % EVERY == 0 or step == self.start:
                evaluations.append((step + 1, evaluate(model, *held_out)))
            if step == self.start + WARM_UP:
                graphs = compiled_graphs()
            if step == min(self.start + EVERY, self.stop - 1):  # (allocators settle later than compilers)
                before = resident_bytes()
        grown, compiled = resident_bytes() - before, compiled_graphs() - graphs
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        with replacing(self.checkpoint(self.stop)) as new:
            torch.save(state, new)
        return {
            "arm": self.arm,
            "steps": [self.start, self.stop],
            "evaluations": evaluations,
            "loss": statistics.fmean(losses[-EVERY:]),
            "resident_growth_bytes": grown,
            "graphs_compiled_after_warm_up": compiled,
            "environment": measure.environment(),
        }


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, target: Tensor) -> float:
    """Held-out loss, without dropout."""
    model.eval()
    return float(model(x, target))


def resident_bytes() -> int:
    """Of this process, now, once what is free has been given back to the operating system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS: the soak needs Linux.")


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def run_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of all parts of all arms; those that exist are read, the others made in processes of their own."""
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    for arm in ARMS:
        for start in range(0, args.steps, PART):
            part = Part(arm, start, min(start + PART, args.steps), args.steps, args.inner, args.out)
            if not part.record.exists():
                command = [sys.executable, "-m", __spec__.name, "--part", arm, str(start), "--steps", str(args.steps)]
                subprocess.run([*command, "--inner", args.inner, "--out", str(args.out)], check=True)
            records.append(json.loads(part.record.read_text()))
    return records


def faults(records: list[dict[str, Any]]) -> list[str]:
    """What is wrong, in words; empty if nothing is."""
    found = []
    for r in records:
        where = f"{r['arm']}, steps {r['steps'][0]} to {r['steps'][1]}"
        if r["resident_growth_bytes"] > GROWTH_BYTES:
            found.append(f"{where}: the resident set grew by {r['resident_growth_bytes'] / 2**20:.1f} MiB.")
        if r["graphs_compiled_after_warm_up"]:
            found.append(f"{where}: {r['graphs_compiled_after_warm_up']} graphs were compiled behind the warm-up.")
    exact, other, ours = (final_loss(records, arm) for arm in ARMS)
    noise = abs(exact - other) + 0.01
    if ours - exact > 3 * noise:
        found.append(f"held-out loss {ours:.4f}, exact {exact:.4f}, exact with other batches {other:.4f}.")
    return found


def final_loss(records: list[dict[str, Any]], arm: str) -> float:
    """Mean held-out loss of an arm's last five evaluations."""
    evaluations = [loss for r in records if r["arm"] == arm for step, loss in r["evaluations"] if step % EVERY == 0]
    return statistics.fmean(evaluations[-5:])


def table(records: list[dict[str, Any]]) -> str:
    """One line per part."""
    rows = [
        (r["arm"], "{}-{}".format(*r["steps"]), f"{r['loss']:.4f}", f"{r['evaluations'][-1][1]:.4f}",
         f"{r['resident_growth_bytes'] / 2**20:.1f} MiB", r["graphs_compiled_after_warm_up"])
        for r in records
    ]  # fmt: skip
    headers = ("arm", "steps", "training loss", "held-out loss", "resident growth", "graphs after warm-up")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak"))
    parser.add_argument("--part", nargs=2, metavar=("ARM", "START"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        start = int(args.part[1])
        part = Part(args.part[0], start, min(start + PART, args.steps), args.steps, args.inner, args.out)
        replace_text(part.record, json.dumps(part.train(), indent=1) + "\n")
        return 0
    records = run_parts(args)
    found = faults(records)
    text = table(records)
    replace_text(args.out / "soak.md", text + "\n")
    print("\n".join([text, *found]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

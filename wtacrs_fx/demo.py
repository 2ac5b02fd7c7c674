"""Fine-tune a real model (MiniLM) on real text (movie reviews), exactly and with sampled activations, side by side.

Each arm is a process of its own (demo_arm.py) with the same seed, initial weights, data order and dropout masks. The
arms train in turn, a few steps at a time, so that both meet the same noise of the machine, and never at the same time,
so that neither slows the other. With the defaults all of it takes about five minutes on two cores.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from wtacrs_fx.config import Config
from wtacrs_fx.demo_arm import ArmProcess, DemoError, Settings
from wtacrs_fx.demo_data import DemoDataError, find_model, find_reviews, read_reviews, split
from wtacrs_fx.estimators import ESTIMATORS
from wtacrs_fx.files import replace_text
from wtacrs_fx.ledger import Ledger
from wtacrs_fx.units import positive

ARMS = {"exact": "inductor", "wtacrs": "wtacrs"}
"""Row of the table -> backend of ``torch.compile``. The first row is what the others are compared with."""

CHUNK = 4
"""Steps that one arm trains before it is the other's turn: seconds, within which a machine's speed changes little."""

UNTIMED = 2
"""First steps left out of the step time: they load or compile the graphs and make the optimizer's state."""

GIVEN = ("steps", "batch_size", "length", "ratio", "estimator", "seed", "lr", "test_items")
"""Options that are settings of both arms."""

EXTRAS = ("transformers", "tqdm")
"""Packages of the extra ``demo`` that are imported."""

MAX_LENGTH = 512
"""Positions that the model knows."""

HEADERS = ("arm", "test accuracy", "final loss", "median step", "held for backward", "step peak", "resident peak")
"""Held: by autograd between forward and backward. Step peak: most bytes allocated at once in a step, gradients included.
Resident peak: of the process, with everything in it."""

HELP = "fine-tune MiniLM on movie reviews, exact and sampled side by side"

ERRORS = (DemoError, DemoDataError)
"""Their text is meant for the user."""


@dataclass
class Result:
    """What one arm measured."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of every step, forward to optimizer; the first one loads or compiles the graphs."""
    held_bytes: int = 0
    peak_bytes: int = 0
    resident_bytes: int = 0
    correct: list[int] = field(default_factory=list)
    """Per test sentence, 1 or 0; the same sentences in both arms."""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds[UNTIMED:] or self.seconds)

    @property
    def final_loss(self) -> float:
        """Mean of the last fifth of the steps: one batch says little."""
        return statistics.mean(self.losses[-math.ceil(len(self.losses) / 5) :])

    @property
    def accuracy(self) -> tuple[float, float]:
        """(share of test sentences that were right, its standard error)."""
        share = statistics.mean(self.correct)
        return share, math.sqrt(share * (1 - share) / len(self.correct))

    @property
    def memory(self) -> tuple[int, int, int]:
        """Bytes in the order of the table."""
        return self.held_bytes, self.peak_bytes, self.resident_bytes


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of ``wtacrs-fx demo``."""
    parser.add_argument("--steps", type=positive, default=90, help="training steps of each arm (%(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="sentences (%(default)s)")
    parser.add_argument("--length", type=positive, default=48, help="tokens a sentence is padded to (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.3, help="share of rows kept (%(default)s)")
    parser.add_argument("--estimator", default=Config().estimator, choices=list(ESTIMATORS), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, order, classifier, dropout (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate of AdamW (%(default)s)")
    parser.add_argument("--test-items", type=positive, default=1000, help="held-out sentences, even (%(default)s)")
    parser.add_argument("--threads", type=positive, help="threads of each arm (as many as torch would take)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here too, every step included")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Run and print the demo. Raises: DemoError or DemoDataError, with what to do about it."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'{" and ".join(missing)} not installed: pip install "wtacrs-fx[demo]"')
    if args.json and not args.json.parent.is_dir():
        raise DemoError(f"--json {args.json}: {args.json.parent} is not a directory.")
    if args.length > MAX_LENGTH:
        raise DemoError(f"--length {args.length}: the model takes at most {MAX_LENGTH} tokens.")
    try:
        Config(ratio=args.ratio, estimator=args.estimator)
    except ValueError as e:
        raise DemoError(str(e)) from None
    model, reviews = find_model(), find_reviews()
    sentences = len(split(read_reviews(reviews), args.test_items, args.seed)[0])
    if args.batch_size > sentences:
        raise DemoError(f"--batch-size {args.batch_size}: {sentences} sentences are left to train on.")
    given = {k: getattr(args, k) for k in GIVEN}
    settings = Settings("", str(model), str(reviews), threads=args.threads or torch.get_num_threads(), **given)
    results, notes = train(settings, args.quiet)
    print(f"{comparison(results)}\n\n{ledger_table(notes['ledger'])}\n\n{conditions(settings, notes)}")
    if args.json:
        arms = {name: asdict(result) for name, result in results.items()}
        data = {"settings": {**given, "threads": settings.threads}, **notes, "arms": arms}
        replace_text(args.json, json.dumps(data, indent=1) + "\n")
    return 0


def compile_ahead(settings: Settings) -> None:
    """Compile both arms in processes that end, so that those that train find the graphs in Inductor's cache on disk.

    What a compilation leaves on the heap would otherwise be in the resident peak: about 100 MiB, more than sampling saves
    on this model (measured). Both compile at the same time, as most of it runs on one core.
    """
    with running(replace(settings, steps=1)) as arms:
        for arm in arms:
            arm.ask(train=1)
        for arm in arms:
            for _ in ("ready", "step"):
                arm.answer()


def train(settings: Settings, quiet: bool) -> tuple[dict[str, Result], dict[str, Any]]:
    """Train all arms in turn. Returns a result per arm, and what they have in common: padding, environment, ledger."""
    from tqdm import tqdm

    results = {name: Result() for name in ARMS}
    notes: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        bars = {
            name: stack.enter_context(
                tqdm(total=settings.steps, desc=f"{name:6}", position=i, disable=quiet or None)  # None: if not a tty
            )
            for i, name in enumerate(ARMS)
        }

        def show(status: str) -> None:
            for bar in bars.values():
                bar.set_postfix_str(status)

        show("compiling, 1 to 2 minutes")
        if not torch.compiler.config.force_disable_caches:
            compile_ahead(settings)
        show("loading")
        arms = stack.enter_context(running(settings))
        for arm in arms:
            notes.update(arm.answer())
        for bar in bars.values():
            bar.unpause()  # its clock starts here
        for done in range(0, settings.steps, CHUNK):
            for arm in arms:
                arm.ask(train=min(CHUNK, settings.steps - done))
                for _ in range(min(CHUNK, settings.steps - done)):
                    step = arm.answer()
                    results[arm.name].losses.append(step["loss"])
                    results[arm.name].seconds.append(step["seconds"])
                    bars[arm.name].set_postfix_str(f"loss {step['loss']:.3f}", refresh=False)
                    bars[arm.name].update()
        show("testing")
        for arm in arms:
            arm.ask(finish=True)
        for arm in arms:
            answer = arm.answer()
            for name in ("held_bytes", "peak_bytes", "resident_bytes", "correct"):
                setattr(results[arm.name], name, answer.pop(name))
            notes.update(answer)  # the last arm's: the sampled one, which has the ledger
    return results, notes


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[list[ArmProcess]]:
    """A process per arm, ended on the way out."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ArmProcess(n, replace(settings, backend=backend))) for n, backend in ARMS.items()]


def comparison(results: Mapping[str, Result]) -> str:
    """The table of the arms, and their paired difference in accuracy, which is surer than each accuracy alone."""
    names = list(results)
    base = results[names[0]]
    rows = []
    for name, r in results.items():
        share, error = r.accuracy
        rows.append(
            (
                name,
                f"{share:.3f} ± {error:.3f}",
                f"{r.final_loss:.3f}",
                f"{r.step_seconds:.2f} s ({r.step_seconds / base.step_seconds:.2f}x)",
                *(f"{n / 2**20:.0f} MiB ({n / m:.2f}x)" for n, m in zip(r.memory, base.memory)),
            )
        )
    lines = [tabulate(rows, HEADERS, disable_numparse=True)]
    for name in names[1:]:
        gains = [a - b for a, b in zip(results[name].correct, base.correct, strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        lines.append(
            f"{name} minus {names[0]}, same {len(gains)} test sentences: "
            f"{100 * statistics.mean(gains):+.1f} ± {100 * error:.1f} points (of one run; other seeds differ)"
        )
    return "\n".join(lines)


def ledger_table(ledger: dict[str, Any] | None) -> str:
    """The sampled arm's ledger as text."""
    if ledger is None:
        return "no ledger: Inductor had the graph in its cache on disk, but the ledger stored beside it is gone."
    return Ledger.from_dict(ledger).table()


def conditions(settings: Settings, notes: Mapping[str, Any]) -> str:
    """What the figures hold for, in one line."""
    env = notes["environment"]
    return (
        f"conditions: torch {env['torch']}, {env['device']}, {env['threads']} threads, batch {settings.batch_size}, "
        f"length {settings.length}, {settings.steps} steps, {notes['padding']:.0%} padding, lr {settings.lr:g}, seed "
        f"{settings.seed}; wtacrs: estimator {settings.estimator}, ratio {settings.ratio:g}; chance accuracy 0.50"
    )

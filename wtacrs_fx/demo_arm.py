"""One arm of the demo: it trains in a process of its own, so that its peak resident memory is its own.

:class:`ArmProcess` is that process as its parent (:mod:`wtacrs_fx.demo`) sees it, :class:`Arm` what runs in it. They
speak lines of JSON. The first line is the settings; every other is a request, and the process ends after the last::

    <- {"backend": "wtacrs", "steps": 100, ...}   settings       -> {"padding": 0.58, ...}
    <- {"train": 4}                               train 4 steps  -> {"loss": 0.69, "seconds": 0.81} four times
    <- {"finish": true}                           results        -> {"resident_bytes": ..., "correct": [1, 0, ...], ...}
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wtacrs_fx import measure
from wtacrs_fx.backend import Backend
from wtacrs_fx.demo_data import Review, read_reviews, split

COMMAND = ("-m", "wtacrs_fx.demo_arm")
"""Arguments of Python that start an arm."""

EVAL_BATCH = 64
"""Sentences. The uncompiled model evaluates, so batches need not have one shape: each is padded to its own longest."""


@dataclass(frozen=True)
class Settings:
    """What an arm needs to know. The two arms of a run differ in ``backend`` only."""

    backend: str
    """"inductor" (exact) or "wtacrs"."""
    model: str
    """Folder of the pretrained model."""
    reviews: str
    """File of the sentences."""
    steps: int
    batch_size: int
    length: int
    """Tokens; every sentence is padded or cut to it, so that one shape is compiled."""
    ratio: float
    estimator: str
    seed: int
    lr: float
    test_items: int
    threads: int


class DemoError(RuntimeError):
    """The demo cannot run, or one of its arms died."""


class ArmProcess:
    """A running arm. Leaving the ``with`` block ends it and whatever it started, however the block was left."""

    def __init__(self, name: str, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__; a pipe would need a reader)
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(settings.threads),
            start_new_session=True,  # a process group of its own, which can be ended as a whole
        )
        self.ask(**asdict(settings))

    def __enter__(self) -> "ArmProcess":
        return self

    def __exit__(self, *_: object) -> None:
        for kill in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, kill)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def ask(self, **request: Any) -> None:
        """Send one request. Raises: DemoError, if the arm has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer. Raises: DemoError, if the arm has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._died()
        return json.loads(line)

    def _died(self) -> DemoError:
        code = self._process.wait()
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-20:]
        return DemoError(f"the {self.name} arm died with exit code {code}. Its last words:\n" + "\n".join(last))


class Arm:
    """Model, data and optimizer of one arm; everything random follows from ``settings.seed``."""

    def __init__(self, settings: Settings) -> None:
        import transformers

        transformers.logging.set_verbosity_error()  # no report that the classifier is new: it is meant to be
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
        train, self.test = split(read_reviews(Path(settings.reviews)), settings.test_items, settings.seed)
        self.batches = self._batches(train)
        torch.manual_seed(settings.seed)
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            settings.model, num_labels=2, problem_type="single_label_classification"
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr)
        self.backend = Backend(ratio=settings.ratio, estimator=settings.estimator)
        self.compiled = torch.compile(
            self.model, backend=self.backend if settings.backend == "wtacrs" else settings.backend, dynamic=False
        )
        self.done = 0
        torch.manual_seed(settings.seed)  # of the dropout masks

    def padding(self) -> float:
        """Share of the training tokens that are padding: rows without a gradient, which cost sampling nothing."""
        return 1 - torch.cat([b["attention_mask"] for b in self.batches]).double().mean().item()

    def train(self) -> tuple[float, float]:
        """One step; returns (loss, seconds)."""
        batch = self.batches[self.done]
        self.done += 1
        start = time.perf_counter()
        loss = self._backward(batch)
        self.optimizer.step()
        return loss, time.perf_counter() - start

    def finish(self) -> dict[str, Any]:
        """Memory, accuracy and ledger, in an order in which no measurement is part of another."""
        resident_bytes = measure.resident_peak_bytes()
        batch = self.batches[0]
        with measure.held(self.model) as held:
            loss = self.compiled(**batch).loss
            held_bytes = held.bytes
        del loss
        self.optimizer.zero_grad(set_to_none=True)
        peak_bytes = measure.peak_bytes(lambda: self._backward(batch))
        return {
            "resident_bytes": resident_bytes,
            "held_bytes": held_bytes,
            "peak_bytes": peak_bytes,
            "correct": self._correct(),
            "environment": measure.environment(),
            "ledger": self.backend.ledgers[-1].to_dict() if self.backend.ledgers else None,
        }

    def _backward(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compiled(**batch).loss
        loss.backward()
        return loss.item()

    def _batches(self, train: list[Review]) -> list[dict[str, Tensor]]:
        """One batch a step, drawn without replacement until the sentences run out, then from all of them again."""
        size, steps = self.settings.batch_size, self.settings.steps
        if size > len(train):
            raise ValueError(f"batch size {size}: there are {len(train)} sentences to train on.")
        generator = torch.Generator().manual_seed(self.settings.seed)
        batches: list[dict[str, Tensor]] = []
        while len(batches) < steps:
            order = torch.randperm(len(train), generator=generator)
            whole = order[: len(train) // size * size].view(-1, size)
            batches += [self._batch([train[i] for i in rows], "max_length") for rows in whole[: steps - len(batches)]]
        return batches

    def _batch(self, reviews: list[Review], padding: str) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            [r.text for r in reviews],
            padding=padding,
            truncation=True,
            max_length=self.settings.length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {**encoded, "labels": torch.tensor([r.label for r in reviews])}

    @torch.no_grad()
    def _correct(self) -> list[int]:
        """Per test sentence, 1 if its class was found."""
        self.model.eval()
        correct: list[int] = []
        for i in range(0, len(self.test), EVAL_BATCH):
            batch = self._batch(self.test[i : i + EVAL_BATCH], "longest")
            labels = batch.pop("labels")
            correct += (self.model(**batch).logits.argmax(-1) == labels).int().tolist()
        return correct


def answers(requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Answers to lines of requests, each as soon as it is known."""
    arm = Arm(Settings(**json.loads(next(requests))))
    yield {"padding": arm.padding()}
    for line in requests:
        request = json.loads(line)
        for _ in range(request.get("train", 0)):
            loss, seconds = arm.train()
            yield {"loss": loss, "seconds": seconds}
        if "finish" in request:
            yield arm.finish()


def main() -> None:
    """Serve requests from standard input until it is closed, which it also is when the parent is gone."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the answers
    for answer in answers(iter(sys.stdin)):
        channel.write(json.dumps(answer) + "\n")


def _environment(threads: int) -> dict[str, str]:
    """Variables of an arm: offline, on the CPU, with a fixed number of threads.

    Threads that wait without spinning take 1.7 s for a step on a machine that is busy otherwise, spinning ones 6.5 s
    (measured, 2 threads on 2 cores beside another training run).
    """
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **fixed, **counts}


if __name__ == "__main__":
    main()

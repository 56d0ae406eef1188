"""Rows of the 14 tasks as prompt and answer, drawn by a seed: pure functions of data and seed.

A prompt is the text, 300 letters at most, and a word or two that tasks of one kind share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LETTERS = 300
SPLITS = {"train": 320, "validation": 50, "test": 100}
KEPT = 32
PAPER = (  # order 4 of arXiv 2310.14152, without Yahoo, which ends it
    *("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "imdb", "yelp", "amazon", "sst2"),
    *("dbpedia", "agnews", "multirc"),
)
OUTSIDE = 60  # first rows of BoolQ, whose passages measure general perplexity
EARLIER = (*range(12), 100)  # seeds of benchmarks/stages and benchmarks/combining
TUNED = 100  # the one of them by whose rows the combination was chosen

Row = tuple[str, str]  # text and label
Record = Mapping[str, Any]


class Pools(NamedTuple):
    """Rows to train and validate on, and to test on."""

    train: list[Row]
    test: list[Row]


FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
ASKED: Mapping[str, tuple[str, tuple[str, ...]]] = {  # what a prompt of the kind ends in, labels
    "mnli": ("Relation", ("neutral", "entailment", "contradiction")),
    "cb": ("Relation", ("neutral", "entailment", "contradiction")),
    "rte": ("Relation", ("entailment", "not entailment")),
    "qqp": ("Same meaning", ("True", "False")),
    "wic": ("Same sense", ("True", "False")),
    "copa": ("More plausible", ("A", "B")),
    "boolq": ("Answer", ("True", "False")),
    "multirc": ("Right", ("True", "False")),
    "imdb": ("Sentiment", ("Good", "Bad")),
    "sst2": ("Sentiment", ("Good", "Bad")),
    "yelp": ("Sentiment", FIVE),
    "amazon": ("Sentiment", FIVE),
    "agnews": ("Topic", ("World", "Sports", "Business", "Science or Technology")),
    "dbpedia": (
        "Topic",
        (
            *("Company", "Educational Institution", "Artist", "Athlete", "Office Holder"),
            *("Mean of Transportation", "Building", "Natural Place", "Village", "Animal"),
            *("Plant", "Album", "Film", "Written Work"),
        ),
    ),
}


# --- what a record says ---


def _two(name: str, first: str, other: str, second: str) -> str:
    """Return two named texts, the first one cut so that both have 300 letters at most."""
    second = second.strip()[: LETTERS // 2]
    return f"{name}: {first.strip()[: LETTERS - len(second)]}\n{other}: {second}"


def _sentences(first: str, second: str) -> str:
    return _two("sentence 1", first, "sentence 2", second)


def _boolean(value: Any) -> str:
    return "True" if value else "False"


def _nli(row: Record) -> Row:
    return _sentences(row["premise"], row["hypothesis"]), row["label"].replace("_", " ")


def _wic(row: Record) -> Row:
    text = f"word: {row['word']}\n{_sentences(row['sentence1'], row['sentence2'])}"
    return text, _boolean(row["label"])


def _copa(row: Record) -> Row:
    text = f"{row['premise']} What is the {row['question']}?\nA: {row['choice1']}\n"
    return f"{text}B: {row['choice2']}", "AB"[row["label"]]


def _boolq(row: Record) -> Row:
    return _two("passage", row["passage"], "question", row["question"]), _boolean(row["label"])


def _sst2(row: Record) -> Row:
    return row["sentence"].strip()[:LETTERS], ("Bad", "Good")[row["label"]]


def _cl(row: Record) -> Row:
    """A row of O-LoRA's repository; in one of two texts, the first one is cut."""
    text = row["text"].strip()
    for first, second in (("sentence 1: ", "\nsentence 2: "), ("first sentence: ", "\nsecond")):
        if text.startswith(first) and second in text:
            one, two = text.removeprefix(first).split(second, 1)
            return _sentences(one, two.split(": ", 1)[-1]), row["label"]
    return text[:LETTERS], row["label"]


def _multirc(row: Record) -> Iterator[Row]:
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            asked = f"{question['question'].strip()} answer: {answer['text'].strip()}"
            text = _two("passage", row["passage"]["text"], "question", asked)
            yield text, _boolean(answer["label"])


READ: Mapping[str, Callable[[Record], Row]] = {
    "cb": _nli,
    "rte": _nli,
    "wic": _wic,
    "copa": _copa,
    "boolq": _boolq,
    "sst2": _sst2,
}


# --- pools ---


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


def _records(data: Path, task: str) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and to test on."""
    if task == "boolq":  # one split here; equal passages stay on one side
        rows = _lines(data / task / "validation.jsonl")
        outside = {row["passage"] for row in rows[:OUTSIDE]}
        rows = [row for row in rows if row["passage"] not in outside]
        passages = sorted({row["passage"] for row in rows})
        tests = {*random.Random("boolq").sample(passages, len(passages) // 3)}
        sides = [row["passage"] in tests for row in rows]
        found = [
            [r for r, is_test in zip(rows, sides, strict=True) if is_test == k] for k in (0, 1)
        ]
        return found[0], found[1]
    folder = data / "cl" / task if (data / "cl" / task).is_dir() else data / task
    last = "test" if folder.parent.name == "cl" else "validation"
    return _lines(folder / "train.jsonl"), _lines(folder / f"{last}.jsonl")


def _rows(task: str, records: list[Record]) -> list[Row]:
    """Return texts and labels, no text twice."""
    if task == "multirc":
        pairs = [pair for record in records for pair in _multirc(record)]
    else:
        pairs = [READ.get(task, _cl)(record) for record in records]
    return [*{text: (text, label) for text, label in pairs if label in ASKED[task][1]}.values()]


@cache
def drawn_earlier(data: Path, task: str, seeds: tuple[int, ...]) -> frozenset[str]:
    """Return the first 140 letters of rows that earlier studies drew with these seeds.

    They drew as `benchmarks/stages/run.py` of revision 9a75c087 does.
    """
    if task not in ("agnews", "dbpedia"):
        return frozenset()
    splits = [_lines(data / "cl" / task / f"{split}.jsonl") for split in ("train", "test")]
    train, test = ([*{row["text"].strip()[:140]: 0 for row in rows}] for rows in splits)
    test, found = [text for text in test if text not in {*train}], set[str]()
    for seed in seeds:
        found |= {*random.Random(f"{seed} {task} rows").sample(train, len(train))[:740]}
        found |= {*random.Random(f"{seed} {task} test").sample(test, 200)}
    return frozenset(found)


@cache
def pools(data: Path, task: str) -> Pools:
    """Return the rows of a task, no text on both sides.

    Rows that an earlier study drew are left out; where too few are left, those of its tuning seed.
    """
    train, test = (_rows(task, records) for records in _records(data, task))
    texts = {text for text, _ in train}
    test = [row for row in test if row[0] not in texts]
    needed = SPLITS["train"] + SPLITS["validation"], SPLITS["test"]
    sides = []
    for rows, least in zip((train, test), needed, strict=True):
        left = [
            [row for row in rows if row[0][:140] not in drawn_earlier(data, task, seeds)]
            for seeds in (EARLIER, (TUNED,), ())
        ]
        sides.append(next((some for some in left if len(some) >= least), left[-1]))
    return Pools(*sides)


# --- draws ---


def order_of(seed: int) -> list[str]:
    """Return the tasks in the order of a seed; that of seed 0 is the paper's."""
    return [*PAPER] if seed == 0 else random.Random(f"{seed} order").sample(PAPER, len(PAPER))


def draw(data: Path, task: str, seed: int) -> dict[str, list[Row]]:
    """Return the rows of a task for a seed: a validation row for each 6 or 7 of training where
    there are fewer than both need."""
    pool, tests = pools(data, task)
    mine = random.Random(f"{seed} {task} field").sample(pool, len(pool))
    validation = min(SPLITS["validation"], len(pool) // 5)
    train = mine[validation:][: SPLITS["train"]]
    count = min(SPLITS["test"], len(tests))
    test = random.Random(f"{seed} {task} field test").sample(tests, count)
    return {"train": train, "validation": mine[:validation], "test": test}


def prompt(task: str, text: str) -> str:
    """Return a text as the tasks of its kind ask."""
    return f"{text}\n{ASKED[task][0]}:"


def written(task: str, rows: list[Row]) -> list[dict[str, str]]:
    """Return rows as `field.yaml` reads them."""
    return [{"prompt": prompt(task, text), "answer": label} for text, label in rows]

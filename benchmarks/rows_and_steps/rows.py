"""Rows of the tasks as prompt and answer, drawn by a seed: pure functions of data and seed.

Tasks of `benchmarks/field` are read by its `tasks.py`. Further ones: subj, trec, times of day, yelp
and amazon as good or bad, and made-up facts of `benchmarks/combining`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import months
import tasks as field
import year

MINUTES = 24 * 60
POLAR = ("yelp", "amazon")
MONTHS = 12  # of 20 facts
FACTS = {"facts a": slice(0, 2), "facts b": slice(2, 4)} | {
    f"month {place + 1}": slice(place, place + 1) for place in range(MONTHS)
}
GOOD = {"very negative": "Bad", "negative": "Bad", "positive": "Good", "very positive": "Good"}
WORDS = {task: word for task, (word, _) in field.ASKED.items()} | {
    **{"subj": "Style", "trec": "Kind of answer", "times": "In 24 hours"}
}

Rows = list[dict[str, str]]


def draw(data: Path, task: str, seed: int, counts: Mapping[str, int]) -> dict[str, Rows]:
    """Return the rows of a task by split, no text in two of them."""
    if task in FACTS:
        return _facts(task, seed)
    pool, tests = pools(data, task)
    mine = random.Random(f"{seed} {task} rows and steps").sample(pool, len(pool))
    held = min(counts["validation"], len(mine) // 5)
    count = min(counts["test"], len(tests))
    drawn = {
        "validation": mine[:held],
        "train": mine[held:][: counts["train"]],
        "test": random.Random(f"{seed} {task} rows and steps test").sample(tests, count),
    }
    return {
        split: [{"prompt": f"{text}\n{WORDS[task]}:", "answer": label} for text, label in rows]
        for split, rows in drawn.items()
    }


@cache
def pools(data: Path, task: str) -> field.Pools:
    """Return the rows to train on and to test on, no text on both sides."""
    if task == "times":
        rows = [_time(minute) for minute in range(MINUTES)]
        random.Random("times").shuffle(rows)
        return field.Pools(rows[:1000], rows[1000:])
    if task not in ("subj", "trec", *POLAR):
        return field.pools(data, task)
    sides = []
    for records in field._records(data, task):
        rows = dict(map(field._cl, records))
        if task in POLAR:
            rows = {text: GOOD[label] for text, label in rows.items() if label in GOOD}
        sides.append(rows)
    train, test = sides
    return field.Pools([*train.items()], [row for row in test.items() if row[0] not in train])


def _time(minute: int) -> field.Row:
    hour, minute = divmod(minute, 60)
    text = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return text, f"{hour:02}:{minute:02}"


def _facts(task: str, seed: int) -> dict[str, Rows]:
    """Return two questions of each fact to learn, and a third one to ask."""
    pairs = [pair for month in year.facts(MONTHS, seed)[FACTS[task]] for pair in month]

    def rows(*questions: str) -> Rows:
        return [
            {
                "prompt": f"Question: {question.format(months.thing_in(prompt))}\nAnswer:",
                "answer": place.strip(),
            }
            for prompt, place in pairs
            for question in questions
        ]

    asked = rows(months.ASKED)
    return {"train": rows(*months.LEARNED), "validation": asked, "test": asked}

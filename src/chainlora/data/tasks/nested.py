"""Nested rows of the original SuperGLUE files, as the flat rows that their tasks read.

The Hub has them flat already; flat rows pass. Rows of your own are flattened by a script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from chainlora.data.readers import Record, bad_row
from chainlora.data.sources import Row, Source

_Flat = Iterator[dict[str, Any]]


def _multirc(row: Mapping[str, Any]) -> _Flat:
    """Yield one row an answer, of answers in questions of a passage."""
    passage = row["passage"]
    for asked in passage["questions"]:
        for found in asked["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": asked["question"],
                "answer": found["text"],
                "label": found["label"],
                "idx": {"paragraph": row["idx"], "question": asked["idx"], "answer": found["idx"]},
            }


def _record(row: Mapping[str, Any]) -> _Flat:
    """Yield one row a query of a passage, whose entities are spans with their last character."""
    text = row["passage"]["text"]
    spans = row["passage"]["entities"]
    for asked in row["qas"]:
        yield {
            "passage": text,
            "query": asked["query"],
            "entities": [text[span["start"] : span["end"] + 1] for span in spans],
            "answers": list(dict.fromkeys(answer["text"] for answer in asked["answers"])),
            "idx": {"passage": row["idx"], "query": asked["idx"]},
        }


NESTED: Mapping[str, Callable[[Mapping[str, Any]], _Flat]] = {
    "multirc": _multirc,
    "record": _record,
}
"""Task → how a row is flattened whose `passage` is an object."""


@dataclass
class FlatSource(Source):
    """The rows of another source, nested ones flattened."""

    source: Source
    task: str

    def __str__(self) -> str:
        return str(self.source)

    @property
    def place(self) -> str:
        return self.source.place

    def records(self, first: int = 0) -> Iterator[Record]:
        return islice(self._flat(), first, None)

    def _flat(self) -> Iterator[Record]:
        for chunk in self.source.chunks():
            for record, row in zip(chunk.records, chunk.rows(), strict=True):
                for values in _flattened(self.task, row):
                    yield Record(record.number, values)

    def state(self) -> object:
        return self.source.state()

    def identity(self) -> str:
        return f"flat {self.task} {self.limit} {self.skip} {self.source.identity()}"


def _flattened(task: str, row: Row) -> list[dict[str, Any]]:
    if not isinstance(row.get("passage"), Mapping):  # flat already
        return [dict(row)]
    try:
        return list(NESTED[task](row))
    except (KeyError, TypeError) as error:
        rule = f"a nested row of task {task!r} must have the form of SuperGLUE"
        raise bad_row(rule, f"no {error}", row.origin, "correct it or write flat rows") from None


def flat(source: Source, task: str) -> Source:
    """Return the rows of a task's source, nested ones flattened."""
    return FlatSource(source, task) if task in NESTED else source

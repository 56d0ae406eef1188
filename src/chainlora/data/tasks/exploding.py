"""Nested rows to flat ones, as a task's `explode` says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2

from chainlora.data.sources import Chunk, Row, RowChunk, Source
from chainlora.data.tasks.rendering import evaluate_expression
from chainlora.data.tasks.schema import Explode, Task
from chainlora.data.templates import WorkLimitError
from chainlora.errors import DataError


def explode_stream(task: Task, rows: Iterable[Row]) -> Iterator[Row]:
    """Flatten nested rows as the task's `explode` says; flat rows pass.

    Indices count in the flat order. Raises DataError where a row does not suit, and at the end
    where there was none.
    """
    if task.explode is None:
        yield from rows
        return
    index = num_nested = 0
    for row in rows:
        num_nested += 1
        for values in _flattened(task, task.explode, row):
            yield Row(values, index, row.origin)
            index += 1
    if not index:
        raise DataError(
            f"task {task.name!r} must find at least one row (got {num_nested} nested rows with "
            "nothing in them); check the file"
        )


@dataclass(frozen=True)
class FlatSource:
    """The flattened rows of another source, without the first `skip`, `limit` of them at most."""

    source: Source
    task: Task
    skip: int = 0
    limit: int | None = None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the rows, `size` at a time. Raises DataError on a row that does not suit."""
        share = 0.0

        def read() -> Iterator[Row]:
            nonlocal share
            for chunk in self.source.chunks(size):
                share = chunk.share
                yield from chunk.rows()

        end = None if self.limit is None else self.skip + self.limit
        rows = islice(explode_stream(self.task, read()), self.skip, end)
        while part := list(islice(rows, size)):
            yield RowChunk(part, share)

    def identity(self) -> str:
        """Return what names the content."""
        explode = self.task.explode
        how = "" if explode is None else explode.model_dump_json()
        return f"flat {how} {self.skip} {self.limit} {self.source.identity()}"


def _flattened(task: Task, explode: Explode, row: Row) -> list[dict[str, Any]]:
    try:
        if not _has(explode.when, row):
            return [row]
        contexts: list[dict[str, Any]] = [dict(row)]
        for loop in explode.each:
            contexts = [
                {**context, loop.bind: item}
                for context in contexts
                for item in evaluate_expression(loop.list, context)
            ]
        return [
            {key: evaluate_expression(value, context) for key, value in explode.row.items()}
            for context in contexts
        ]
    except (jinja2.TemplateError, TypeError, WorkLimitError) as error:
        raise DataError(
            f"a nested row must suit `explode` of task {task.name!r} (got {error} at "
            f"{row.origin}); correct the row or the task file"
        ) from None


def _has(expression: str, row: Row) -> bool:
    try:
        evaluate_expression(expression, row)
    except jinja2.UndefinedError:
        return False
    return True

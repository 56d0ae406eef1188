"""A row and a task's templates give a prompt with candidates, or a prompt with a completion.

Templates are Jinja2 in a sandbox. A field that a row lacks, or holds as null, is an error, never an
empty string; every space and line break of a template is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chainlora.data.readers import bad_row
from chainlora.data.sources import where
from chainlora.data.tasks.task_file import TaskFile
from chainlora.data.templates import evaluate
from chainlora.errors import DataError

_REMEDY = "correct the row or the task file"


class Rendered(NamedTuple):
    """One row as text: a model reads ``prompt + candidates[i]`` or ``prompt + completion``."""

    prompt: str
    candidates: tuple[str, ...]  # empty for tasks that generate
    label: int | None  # the right candidate
    completion: str  # what teacher forcing teaches: the right candidate, or the task's completion
    references: tuple[str, ...]  # gold answers for em and token_f1
    names: tuple[str, ...] = ()  # what each candidate stands for when compared with the references


def render_rows(task: TaskFile, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
    """Render rows of a task.

    Raises DataError that names a row whose label is unknown, or which has no value, or null, for a
    field that a template needs.
    """
    found = []
    replies = evaluate(_program(task), rows)
    for at, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        place = where(row, at)
        if reply.error and reply.key:
            rule = f"a row must have what `{reply.key}` of task {task.name!r} needs"
            fields = f"{place}, whose fields are {', '.join(map(str, row))}"
            raise bad_row(rule, reply.error, fields, _REMEDY)
        if reply.error:
            rule, remedy = f"the templates of task {task.name!r} must render a row", "simplify them"
            raise bad_row(rule, reply.error, place, f"{remedy} or correct the row")
        found.append(_rendered(task, reply.value, place))
    return found


def _program(task: TaskFile) -> dict[str, Any]:
    """Return the templates of a task, as `evaluate` takes them."""
    texts = {"prompt": task.prompt}
    values = {} if task.references is None else {"references": task.references}
    if task.completion is not None:
        return {"texts": texts | {"completion": task.completion}, "values": values}
    if task.candidates is None:
        return {"texts": texts, "values": values | {"label": task.label}}
    values |= {"candidates": task.candidates, "label": task.label}
    each = ["candidate", "candidates", task.candidate]
    return {"texts": texts, "values": values, "each": each}


def _rendered(task: TaskFile, found: Mapping[str, Any], place: str) -> Rendered:
    prompt, references = found["prompt"], _references(task, found, place)
    if task.completion is not None:
        return Rendered(prompt, (), None, found["completion"], references)
    if task.labels is not None:
        words = task.label_words
        label = _label_of(task, found["label"], place)
        names = tuple(word.strip() for word in words)
        return Rendered(prompt, words, label, words[label], references or (names[label],), names)
    candidates, names, label, right = _row_candidates(task, found, place)
    return Rendered(prompt, candidates, label, candidates[label], references or right, names)


def _references(task: TaskFile, found: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if task.references is None:
        return ()
    value = found["references"]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values:
        rule = f"`references` of task {task.name!r} must be a text or a non-empty list of them"
        raise bad_row(rule, f"{value!r:.60}", place, _REMEDY)
    return tuple(str(item) for item in values)


def _label_of(task: TaskFile, value: Any, place: str) -> int:
    label = task.label_index(value)
    if label is None:
        rule = f"label must be one that task {task.name!r} declares"
        raise bad_row(rule, f"{value!r:.60}", place, f"declared: {', '.join(task.label_values)}")
    return label


def _row_candidates(
    task: TaskFile, found: Mapping[str, Any], place: str
) -> tuple[tuple[str, ...], tuple[str, ...], int, tuple[str, ...]]:
    items = found["candidates"]
    if not isinstance(items, Sequence) or isinstance(items, str) or len(items) < 2:
        rule = f"`candidates` of task {task.name!r} must give a list of at least two"
        raise bad_row(rule, f"{items!r:.60}", place, _REMEDY)
    names = tuple(str(item) for item in items)
    texts, value = tuple(found["candidate"]), found["label"]
    if isinstance(value, list):
        right = tuple(str(item) for item in value)
        label = next((names.index(item) for item in right if item in names), None)
    else:
        item = names.index(value) if isinstance(value, str) and value in names else None
        place_of = int(value) if _is_below(value, len(names)) else None
        if item is not None and place_of is not None and item != place_of:
            raise DataError(
                f"label must mean one candidate (got {value!r} of {list(names)!r:.60} at {place}: "
                f"item {item} and the position of another); give the position as a number, e.g. "
                f"label: ({task.candidates}).index({task.label}) in task {task.name!r}"
            )
        label = item if item is not None else place_of
        right = (names[label],) if label is not None else ()
    if label is None:
        got = f"{value!r:.60} for {len(names)} candidates of task {task.name!r}"
        raise bad_row("label must be a candidate or its position", got, place, _REMEDY)
    return texts, names, label, right


def _is_below(value: Any, limit: int) -> bool:
    """Say whether a value reads as a number from 0 to below a limit of a few digits."""
    text = str(value)
    return text.isdecimal() and len(text) <= len(str(limit)) and int(text) < limit

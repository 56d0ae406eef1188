"""`Task`: load a task file by name or path, and render its rows as text.

Templates are Jinja2 in a sandbox. A missing field or a null is an error, never an empty string.
Every space and line break of a template is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from chainlora.config.messages import problems
from chainlora.config.reading import read_tree
from chainlora.data.readers import bad_row
from chainlora.data.sources import where
from chainlora.data.tasks.task_file import TaskFile
from chainlora.data.templates import Part, evaluate, expression, template
from chainlora.errors import ConfigError, DataError, nearest

_REMEDY = "correct the row or the task file"


class Rendered(NamedTuple):
    """One row as text: a model reads ``prompt + candidates[i]`` or ``prompt + completion``."""

    prompt: str
    candidates: tuple[str, ...]  # empty for tasks that generate
    label: int | None  # the right candidate
    completion: str  # the right candidate, or the task's completion (for teacher forcing)
    references: tuple[str, ...]  # gold answers for em and token_f1
    names: tuple[str, ...] = ()  # the value of each candidate, compared with the references


class Task(TaskFile):
    """One task: the keys of its file, and its rows as text."""

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render rows.

        Raises DataError, which names the row, for an unknown label, and for a field that a template
        needs and that is missing or null.
        """
        parts, rendered = _parts(self), []
        for at, row in enumerate(rows):
            reply, place = evaluate(parts, row), where(row, at)
            if reply.error:
                rule = f"a row must have the fields that `{reply.key}` of task {self.name!r} needs"
                fields = f"{place}, whose fields are {', '.join(map(str, row))}"
                raise bad_row(rule, reply.error, fields, _REMEDY)
            rendered.append(_rendered(self, reply.value, place))
        return rendered

    def demonstrations(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return solved rows as text for the front of a prompt; "" for no rows."""
        solved = [(shown.prompt + shown.completion).strip() for shown in self.render_all(rows)]
        return "".join(text + self.separator for text in solved)


def list_tasks() -> list[str]:
    """Return the names of the shipped tasks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """Load a shipped task by name, or any task file by path.

    Raises:
        ConfigError: unknown name or key (the message suggests the nearest one), unreadable file,
            wrong value.
    """
    path = Path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if str(name_or_path) not in list_tasks():
            raise ConfigError(
                f"task must be a shipped one or a .yaml file (got {str(name_or_path)!r}"
                f"{nearest(str(name_or_path), list_tasks())})"
            )
        path = Path(__file__).parent / f"{name_or_path}.yaml"
    try:
        return Task.model_validate(read_tree(path, "task file"))
    except ValidationError as error:
        raise ConfigError(f"task file {path}: {problems(error, Task)}") from None


# --- a row as text ---


def _parts(task: TaskFile) -> dict[str, Part]:
    """Return a renderer for each key of a task, in order."""

    def text(source: str) -> Part:
        return lambda row, values: template(source).render(_context(row))

    def value(source: str) -> Part:
        return lambda row, values: expression(source)(_context(row))

    def candidates(row: Any, values: Mapping[str, Any]) -> list[str]:
        items = values["candidates"] if isinstance(values["candidates"], list) else ()
        context, candidate = _context(row), template(task.candidate)
        return [candidate.render({**context, "item": item}) for item in items]

    parts = {"prompt": text(task.prompt)}
    if task.completion is not None:
        parts["completion"] = text(task.completion)
    if task.references is not None:
        parts["references"] = value(task.references)
    if task.candidates is not None:
        parts["candidates"] = value(task.candidates)
    if task.completion is None:
        parts["label"] = value(task.label)
    if task.candidates is not None:
        parts["candidate"] = candidates
    return parts


def _context(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "row": row}


def _rendered(task: TaskFile, rendered: Mapping[str, Any], place: str) -> Rendered:
    prompt, references = rendered["prompt"], _references(task, rendered, place)
    if task.completion is not None:
        return Rendered(prompt, (), None, rendered["completion"], references)
    if task.labels is not None:
        words, label = task.label_words, task.label_index(rendered["label"])
        if label is None:
            rule, declared = "label must be one that task", ", ".join(task.label_values)
            got, remedy = f"{rendered['label']!r:.60}", f"declared: {declared}"
            raise bad_row(f"{rule} {task.name!r} declares", got, place, remedy)
        names = tuple(word.strip() for word in words)
        return Rendered(prompt, words, label, words[label], references or (names[label],), names)
    candidates, names, label, right = _row_candidates(task, rendered, place)
    return Rendered(prompt, candidates, label, candidates[label], references or right, names)


def _references(task: TaskFile, rendered: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if task.references is None:
        return ()
    value = rendered["references"]
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        rule = f"`references` of task {task.name!r} must be a text or a non-empty list of them"
        raise bad_row(rule, f"{value!r:.60}", place, _REMEDY)
    return tuple(map(str, values))


def _row_candidates(
    task: TaskFile, rendered: Mapping[str, Any], place: str
) -> tuple[tuple[str, ...], tuple[str, ...], int, tuple[str, ...]]:
    """Return the candidates, their values, the number of the right one, and the right values."""
    items, value = rendered["candidates"], rendered["label"]
    if not isinstance(items, list) or len(items) < 2:
        rule = f"`candidates` of task {task.name!r} must give a list of at least two"
        raise bad_row(rule, f"{items!r:.60}", place, _REMEDY)
    names = tuple(map(str, items))
    if isinstance(value, list):
        right = tuple(map(str, value))
        label = next((names.index(item) for item in right if item in names), None)
    else:
        item = names.index(value) if isinstance(value, str) and value in names else None
        text = str(value)
        is_place = text.isdecimal() and len(text) <= len(str(len(names))) and int(text) < len(names)
        if item is not None and is_place and item != int(text):
            got = f"{value!r} of {list(names)!r:.60} at {place}: item {item} or position {text}"
            example = f"({task.candidates}).index({task.label}) in task {task.name!r}"
            remedy = f"give the position as a number, e.g. label: {example}"
            raise DataError("label must mean one candidate", got, remedy)
        label = int(text) if item is None and is_place else item
        right = (names[label],) if label is not None else ()
    if label is None:
        got = f"{value!r:.60} for {len(names)} candidates of task {task.name!r}"
        raise bad_row("label must be a candidate or its position", got, place, _REMEDY)
    return tuple(rendered["candidate"]), names, label, right

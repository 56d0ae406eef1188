"""A row and a task's templates give a prompt with candidates, or a prompt with a completion.

Templates are Jinja2 in a sandbox, with a limit on the work they do. A field that a row lacks, or
holds as null, is an error, never an empty string; every space and line break of a template is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2

from chainlora.data.sources import where
from chainlora.data.templates import (
    LimitedEnvironment,
    WorkLimitError,
    budget,
    render_text,
    time_limit,
)
from chainlora.errors import DataError

if TYPE_CHECKING:
    from chainlora.data.tasks.schema import Task


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as text: a model reads ``prompt + candidates[i]`` or ``prompt + completion``."""

    prompt: str
    candidates: tuple[str, ...]  # empty for tasks that generate
    label: int | None  # the right candidate
    completion: str  # what teacher forcing teaches: the right candidate, or the task's completion
    references: tuple[str, ...]  # gold answers for em and token_f1
    names: tuple[str, ...] = ()  # what each candidate stands for when compared with the references

    def content(self) -> list[Any]:
        """Return all there is, as JSON takes it: what the digest of the rows is taken of."""
        return [
            self.prompt,
            self.candidates,
            self.label,
            self.completion,
            self.references,
            self.names,
        ]


def render(task: Task, row: Mapping[str, Any], position: int = 0) -> Rendered:
    """Render one row of a task.

    Raises:
        DataError: a field that a template needs is missing or null, or a label is unknown; names
        the row.
    """
    place = where(row, position)
    with time_limit(f"task {task.name!r} at {place}"):
        return _render(task, row, place)


def _render(task: Task, row: Mapping[str, Any], place: str) -> Rendered:
    context = {**row, "row": row}
    prompt = _text(task, "prompt", task.prompt, context, place)
    references = _references(task, context, place)
    if task.completion is not None:
        completion = _text(task, "completion", task.completion, context, place)
        return Rendered(prompt, (), None, completion, references)
    if task.labels is not None:
        words = task.label_words
        label = _label_of(task, _value(task, "label", task.label, context, place), place)
        names = tuple(word.strip() for word in words)
        return Rendered(prompt, words, label, words[label], references or (names[label],), names)
    candidates, names, label, right = _row_candidates(task, context, place)
    return Rendered(prompt, candidates, label, candidates[label], references or right, names)


def check_template(source: str) -> None:
    """Compile a template. Raises jinja2.TemplateError."""
    _template(source)


def check_expression(source: str) -> None:
    """Compile an expression. Raises jinja2.TemplateError."""
    _expression(source)


def evaluate_expression(source: str, context: Mapping[str, Any]) -> Any:
    """Return the value of a Jinja2 expression such as ``passage.questions``.

    Raises:
        jinja2.TemplateError: a name that is not in `context`.
    """
    with budget():
        value = _expression(source)(context)
    for part in value if isinstance(value, list | tuple) else (value,):
        if isinstance(part, jinja2.Undefined):
            str(part)  # StrictUndefined raises, with a message that names what is missing
    return value


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise jinja2.UndefinedError("a null")
    return value


def _spans(text: str, spans: Sequence[Mapping[str, int]]) -> list[str]:
    """Return the texts of spans with `start` and `end`, the end included, as ReCoRD has them."""
    return [text[span["start"] : span["end"] + 1] for span in spans]


_ENVIRONMENT = LimitedEnvironment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    finalize=_refuse_null,
)
_ENVIRONMENT.globals["spans"] = _spans


@lru_cache(maxsize=1024)
def _template(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=1024)
def _expression(source: str) -> Callable[..., Any]:
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


def _text(task: Task, key: str, source: str, context: Mapping[str, Any], place: str) -> str:
    with _explained(task, key, context, place):
        return render_text(_template(source), context)


def _value(task: Task, key: str, source: str, context: Mapping[str, Any], place: str) -> Any:
    with _explained(task, key, context, place):
        return evaluate_expression(source, context)


@contextmanager
def _explained(task: Task, key: str, context: Mapping[str, Any], place: str) -> Iterator[None]:
    """Turn what a template raises into an error that names the row."""
    try:
        yield
    except DataError:  # the limit on time
        raise
    except WorkLimitError as error:
        raise DataError(
            f"`{key}` of task {task.name!r} must take no more work than a row can need (got "
            f"{error} at {place}); simplify the template or shorten the row"
        ) from None
    except Exception as error:  # whatever the row's values make the template's expressions do
        fields = ", ".join(name for name in context if name != "row")
        reason = " ".join(str(error).split())
        raise DataError(
            f"a row must have what `{key}` of task {task.name!r} needs (got {reason} at {place}, "
            f"whose fields are {fields}); correct the row or the task file"
        ) from None


def _references(task: Task, context: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if task.references is None:
        return ()
    value = _value(task, "references", task.references, context, place)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not values:
        raise DataError(
            f"`references` of task {task.name!r} must be a text or a non-empty list of them "
            f"(got {value!r:.60} at {place}); correct the row or the task file"
        )
    return tuple(str(item) for item in values)


def _label_of(task: Task, value: Any, place: str) -> int:
    label = task.label_index(value)
    if label is None:
        raise DataError(
            f"label must be one that task {task.name!r} declares (got {value!r:.60} at {place}); "
            f"declared: {', '.join(task.label_values)}"
        )
    return label


def _row_candidates(
    task: Task, context: Mapping[str, Any], place: str
) -> tuple[tuple[str, ...], tuple[str, ...], int, tuple[str, ...]]:
    assert task.candidates is not None  # the schema: one of completion, labels, candidates
    items = _value(task, "candidates", task.candidates, context, place)
    if not isinstance(items, Sequence) or isinstance(items, str) or len(items) < 2:
        raise DataError(
            f"`candidates` of task {task.name!r} must give a list of at least two (got "
            f"{items!r:.60} at {place}); correct the row or the task file"
        )
    names = tuple(str(item) for item in items)
    texts = tuple(
        _text(task, "candidate", task.candidate, {**context, "item": it}, place) for it in items
    )
    value = _value(task, "label", task.label, context, place)
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
        raise DataError(
            f"label must be a candidate or its position (got {value!r:.60} for {len(names)} "
            f"candidates of task {task.name!r} at {place}); correct the row or the task file"
        )
    return texts, names, label, right


def _is_below(value: Any, limit: int) -> bool:
    """Say whether a value reads as a number from 0 to below a limit of a few digits."""
    text = str(value)
    return text.isdecimal() and len(text) <= len(str(limit)) and int(text) < limit

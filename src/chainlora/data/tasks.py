"""`Task`: load a task file, check its keys, and render its rows as text.

Templates are Jinja2 in a sandbox. A missing field or a null is an error, never an empty string.
Every space and line break of a template is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from pydantic import Field, ValidationError, field_validator, model_validator

from chainlora.config.messages import problems
from chainlora.config.reading import read_tree
from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.section import Frozen, refuse_if
from chainlora.data.readers import bad_row
from chainlora.data.sources import where
from chainlora.data.templates import Part, evaluate, expression, template
from chainlora.errors import ConfigError, DataError

Metric = Literal["accuracy", "f1", "em", "token_f1", "loss"]
WORD_METRICS = ("em", "token_f1")
"""Metrics that compare words; both are reported together."""
REPORTED_OF_TEXT = ("loss", "perplexity")
"""The metrics of rows without candidates and gold answers."""

_REMEDY = "correct the row or the task file"


class Rendered(NamedTuple):
    """One row as text: a model reads ``prompt + candidates[i]`` or ``prompt + completion``."""

    prompt: str
    candidates: tuple[str, ...]  # empty for tasks that generate
    label: int | None  # the right candidate
    completion: str  # the right candidate, or the task's completion (for teacher forcing)
    references: tuple[str, ...]  # gold answers for em and token_f1
    names: tuple[str, ...] = ()  # the value of each candidate, compared with the references


class Task(Frozen):
    """One task: the keys of its file (docs/tasks.md), and its rows as text."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    description: str
    prompt: str
    labels: tuple[str, ...] | dict[Any, str] | None = None
    candidates: str | None = None
    candidate: str = "{{ item }}"
    label: str = "label"
    completion: str | None = None
    references: str | None = None
    metric: Metric
    loss: str  # an objective: checked when training begins
    scoring: Literal["mean", "first_token"] = "mean"
    truncation: Literal["drop", "cut", "error", "left"] = "error"
    add_eos: bool = False
    stop: str | None = None
    max_new_tokens: int = Field(default=50, ge=1)
    separator: str = "\n\n"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics of an evaluation, the task's own first; words get both metrics."""
        others = WORD_METRICS if self.metric in WORD_METRICS else ()
        return tuple(dict.fromkeys((self.metric, *others)))

    @property
    def reported(self) -> tuple[str, ...]:
        """Return all reported metrics, the own one first; the loss is one if answers are scored."""
        if self.completion is None:
            return (*self.metrics, "loss")
        return self.metrics if self.metric in WORD_METRICS else REPORTED_OF_TEXT

    @field_validator("labels", mode="before")
    @classmethod
    def _words(cls, labels: Any) -> Any:
        words = list(labels.values()) if isinstance(labels, Mapping) else labels
        for word in words if isinstance(words, list | tuple) else ():
            got = f"{word}, which YAML reads from an unquoted Yes or No"
            wrong = isinstance(word, bool)
            refuse_if(wrong, "`labels` must be words", got, "put quotes around it")
        return labels

    @model_validator(mode="after")
    def _check(self) -> Task:
        refuse_if(
            self.loss in PAIR_LOSSES,
            "`loss` of a task must learn from completions or candidates",
            self.loss,
            "give files of preferences as data.train, and set train.loss",
        )
        kinds = ("labels", "candidates", "completion")
        given = [key for key in kinds if getattr(self, key) is not None]
        refuse_if(
            len(given) != 1,
            "a task must declare one of `labels`, `candidates`, `completion`",
            " and ".join(given) or "none",
        )
        is_ranked = self.loss == "candidates" or self.metric in ("accuracy", "f1")
        refuse_if(
            self.completion is not None and is_ranked,
            "a task with `completion` must have loss: completion, and metric em, token_f1 or loss",
            f"loss: {self.loss}, metric: {self.metric}",
        )
        words = self.label_words
        wrong = self.labels is not None and len(words) < 2
        refuse_if(wrong, "`labels` must be at least two different words", list(words))
        wrong = isinstance(self.labels, tuple) and len(words) < len(self.labels)
        refuse_if(wrong, "`labels` must differ from each other", list(self.labels or ()))
        self._check_values()
        is_written = self.completion is not None and self.metric in WORD_METRICS
        refuse_if(
            is_written and self.references is None,
            f"`metric: {self.metric}` needs `references`",
            "none",
            "name the field of gold answers",
        )
        refuse_if(
            is_written and not (self.stop or self.add_eos),
            f"`metric: {self.metric}` generates answers, which need an end",
            "neither `stop` nor `add_eos`",
            "set add_eos: true, or a `stop` that `completion` ends with",
        )
        self._check_templates()
        return self

    def _check_values(self) -> None:
        """Refuse labels of which one value of a row could mean two words."""
        named = self.labels if isinstance(self.labels, dict) else {}
        pairs = named.items() or [(word.strip(), word) for word in self.label_words]
        for value, word in pairs:
            other = self.label_words[self._label_lookup[_label_key(value)]]
            got = f"{value!r}, which means {word!r} and {other!r}"
            remedy = "write a mapping from each value of the row's label to one word"
            refuse_if(word != other, "a label must mean one of `labels`", got, remedy)

    def _check_templates(self) -> None:
        kinds = dict.fromkeys(("prompt", "completion", "candidate"), "template")
        kinds |= dict.fromkeys(("label", "candidates", "references"), "expression")
        for key, kind in kinds.items():
            source = getattr(self, key)
            try:
                if source is not None:
                    (template if kind == "template" else expression)(source)
            except jinja2.TemplateError as error:
                refuse_if(True, f"`{key}` must be a Jinja2 {kind}", f"{error} in {source!r}")

    @cached_property
    def label_words(self) -> tuple[str, ...]:
        """Return the candidate words in order; empty if candidates differ from row to row."""
        words = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return tuple(dict.fromkeys(words or ()))

    @cached_property
    def label_values(self) -> tuple[str, ...]:
        """Return the possible values of a row's label, as text for messages."""
        if isinstance(self.labels, dict):
            return tuple(str(value) for value in self.labels)
        return tuple(f"{index} or {word.strip()!r}" for index, word in enumerate(self.label_words))

    @cached_property
    def _label_lookup(self) -> dict[str, int]:
        words = self.label_words
        if isinstance(self.labels, dict):
            return {_label_key(value): words.index(word) for value, word in self.labels.items()}
        lookup = {
            _label_key(text): index
            for index, word in enumerate(words)
            for text in (word, word.strip())
        }
        return lookup | {_label_key(index): index for index in range(len(words))}

    def label_index(self, value: Any) -> int | None:
        """Return the number of the candidate that a row's label means, or None.

        Of a list of words, true and false mean no position.
        """
        text, words = str(value).lower(), [word.strip().lower() for word in self.label_words]
        is_list = not isinstance(self.labels, dict)
        if is_list and text in ("true", "false") and text not in words:
            return None
        return self._label_lookup.get(_label_key(value))

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render rows. Raises DataError for a row without a field, or with an unknown label."""
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


def load_task(path: str | Path) -> Task:
    """Load a task file.

    Raises:
        ConfigError: unknown key (the message suggests the nearest one), unreadable file, wrong
            value.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        remedy = "give the path of a task file, as in docs/tasks.md"
        raise ConfigError("a task must be a .yaml file", repr(str(path)), remedy)
    try:
        return Task.model_validate(read_tree(path, "task file"))
    except ValidationError as error:
        raise ConfigError(f"task file {path}: {problems(error, Task)}") from None


def _label_key(value: Any) -> str:
    """Make true, "True", 1, "1" and 1.0 one key: JSON, CSV and Parquet write labels differently."""
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    text = str(int(value) if whole else value)
    text = "\0" if value is None else text  # null must not equal a label word "None"
    return {"true": "1", "false": "0"}.get(text.lower(), text)


def _parts(task: Task) -> dict[str, Part]:
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


def _rendered(task: Task, values: Mapping[str, Any], place: str) -> Rendered:
    prompt, references = values["prompt"], _references(task, values, place)
    if task.completion is not None:
        return Rendered(prompt, (), None, values["completion"], references)
    if task.labels is None:
        words, names, at, right = _row_candidates(task, values, place)
        return Rendered(prompt, words, at, words[at], references or right, names)
    words, label = task.label_words, task.label_index(values["label"])
    if label is None:
        rule = f"label must be one that task {task.name!r} declares"
        remedy = f"declared: {', '.join(task.label_values)}"
        raise bad_row(rule, f"{values['label']!r:.60}", place, remedy)
    names = tuple(map(str.strip, words))
    return Rendered(prompt, words, label, words[label], references or (names[label],), names)


def _references(task: Task, values: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if task.references is None:
        return ()
    value = values["references"]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        rule = f"`references` of task {task.name!r} must be a text or a non-empty list of them"
        raise bad_row(rule, f"{value!r:.60}", place, _REMEDY)
    return tuple(map(str, texts))


def _row_candidates(
    task: Task, values: Mapping[str, Any], place: str
) -> tuple[tuple[str, ...], tuple[str, ...], int, tuple[str, ...]]:
    """Return the candidates, their values, the number of the right one, and the right values."""
    items, value = values["candidates"], values["label"]
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
    return tuple(values["candidate"]), names, label, right

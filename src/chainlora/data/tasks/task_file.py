"""The keys of a task file and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import jinja2
from pydantic import Field, field_validator, model_validator

from chainlora.config.schema import PAIR_LOSSES
from chainlora.config.section import Frozen, refuse_if
from chainlora.data.templates import expression, template

Metric = Literal["accuracy", "f1", "em", "token_f1", "loss"]
WORD_METRICS = ("em", "token_f1")
"""Metrics that compare words; both are reported together."""
REPORTED_OF_TEXT = ("loss", "perplexity")
"""The metrics of rows without candidates and gold answers."""


class HubRows(Frozen):
    """The place of the rows on the Hub."""

    path: str
    name: str | None = None  # configuration
    folder: str | None = None  # of the configuration, on converted Parquet
    revision: str | None = None  # refs/convert/parquet where main is a script
    splits: dict[str, str] = Field(default={})  # names that differ from train, validation, test


class Draw(Frozen):
    """The split and the size of a sample."""

    of: str
    rows: int = Field(ge=1)
    saner: int | None = Field(default=None, ge=1)  # for `sampling: saner`; leaves more to train on

    def count(self, sampling: str) -> int:
        return self.saner if sampling == "saner" and self.saner is not None else self.rows


class Draws(Frozen):
    """The MeZO protocol unless a task says otherwise."""

    train: Draw = Draw(of="train", rows=1000)
    validation: Draw = Draw(of="train", rows=500)
    test: Draw = Draw(of="validation", rows=1000)
    without_train: str | None = None  # the split that replaces a missing train split


class TaskFile(Frozen):
    """The keys of a task file: templates, labels, metric, place of the rows (docs/tasks.md)."""

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
    hub: HubRows | None = None
    files: dict[str, tuple[str, ...]] = Field(default={})
    sampling: Draws = Draws()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics of an evaluation, the task's own first; words get both metrics."""
        return (
            self.metric,
            *(name for name in WORD_METRICS if self.metric in WORD_METRICS and name != self.metric),
        )

    @property
    def reported(self) -> tuple[str, ...]:
        """Return every metric that an evaluation reports, the task's own first.

        The loss is one of them if answers are scored, not generated.
        """
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
    def _check(self) -> TaskFile:
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
        refuse_if(
            self.completion is not None
            and (self.loss == "candidates" or self.metric in ("accuracy", "f1")),
            "a task with `completion` must have loss: completion, and metric em, token_f1 or loss",
            f"loss: {self.loss}, metric: {self.metric}",
        )
        words = self.label_words
        refuse_if(
            self.labels is not None and len(words) < 2,
            "`labels` must be at least two different words",
            list(words),
        )
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
        for keys, compiled, kind in (
            (("prompt", "completion", "candidate"), template, "template"),
            (("label", "candidates", "references"), expression, "expression"),
        ):
            for key in keys:
                source = getattr(self, key)
                try:
                    if source is not None:
                        compiled(source)
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
        written = [
            (text, index) for index, word in enumerate(words) for text in (word, word.strip())
        ]
        lookup = {_label_key(text): index for text, index in written}
        return lookup | {_label_key(index): index for index in range(len(words))}

    def label_index(self, value: Any) -> int | None:
        """Return the number of the candidate that a row's label means, or None."""
        return self._label_lookup.get(_label_key(value))


def _label_key(value: Any) -> str:
    """Make true, "True", 1, "1" and 1.0 one key: JSON, CSV and Parquet write labels differently."""
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    text = str(int(value) if whole else value)
    text = "\0" if value is None else text  # null must not equal a label word "None"
    return {"true": "1", "false": "0"}.get(text.lower(), text)

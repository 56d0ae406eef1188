"""The rows a run trains on, chooses by and reports on: from a config's `data` section to tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chainlora.config.schema import DataConfig
from chainlora.data.encoding import encode_examples
from chainlora.data.examples import Example
from chainlora.data.tasks import (
    REPORTED_OF_TEXT,
    WORD_METRICS,
    Row,
    Task,
    explode_rows,
    load_rows,
    load_task,
    load_unseen_split,
    sample_splits,
)
from chainlora.errors import ConfigError

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """Encoded rows by use. `loss` says what a step minimises, `metrics` what an evaluation is asked
    for and `reported` what it gives, `metric` what picks the best point; `stop` and
    `max_new_tokens` bound generated answers; `digest` names the rows as text, before demonstrations
    and cuts."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    loss: Literal["candidates", "completion"]
    metrics: tuple[str, ...]
    reported: tuple[str, ...]
    metric: str
    stop: str | None = None
    max_new_tokens: int = 50
    digest: str = ""


def prepare_splits(data: DataConfig, tokenizer: Any, context: int) -> Splits:
    """Read, sample, check and tokenise everything a config names. Raises DataError or ConfigError
    before training."""
    limit = _limit(data, context)
    if data.task is None:
        return _prepare_files(data, tokenizer, limit)
    task = load_task(data.task)
    rows = _task_rows(task, data)
    before = _demonstrations(task, data, rows["train"])
    encoded = {}
    for split in SPLITS:
        kept = rows[split][data.shots :] if split == "train" else rows[split]
        encoded[split] = (
            encode_examples(
                kept,
                tokenizer,
                task,
                max_length=limit,
                truncation=data.truncation,
                before=before,
                objective=task.loss if split == "train" else None,
                reserve=0 if split == "train" else _reserve(task),
            )
            if kept
            else []
        )
    return Splits(
        encoded["train"],
        encoded["validation"],
        encoded["test"],
        task.loss,
        task.metrics,
        task.reported,
        task.metric,
        task.stop,
        task.max_new_tokens,
        _digest(rows, task),
    )


def encode_split(
    task: Task, rows: list[Row], tokenizer: Any, context: int, data: DataConfig | None = None
) -> list[Example]:
    """Tokenise rows of a task to be scored.

    `data` is that of the run to be scored: what it says of its own task (length, truncation,
    demonstrations) is kept.
    """
    if data is None or not _shapes_prompts_of(data, task):
        return encode_examples(rows, tokenizer, task, max_length=context, reserve=_reserve(task))
    before = _demonstrations(task, data, _task_rows(task, data)["train"]) if data.shots else ""
    return encode_examples(
        rows,
        tokenizer,
        task,
        max_length=_limit(data, context),
        truncation=data.truncation,
        before=before,
        reserve=_reserve(task),
    )


def _shapes_prompts_of(data: DataConfig, task: Task) -> bool:
    if data.task is None or not (data.max_length or data.truncation or data.shots):
        return False
    try:
        return load_task(data.task).name == task.name
    except ConfigError as error:
        _log.warning(
            "%s is read whole and without demonstrations, the run's own task being lost: %s",
            task.name,
            error,
        )
        return False


def _demonstrations(task: Task, data: DataConfig, train: list[Row]) -> str:
    if len(train) < data.shots:
        raise ConfigError(
            "`data.shots` must be at most the number of training rows (got "
            f"{data.shots} for {len(train)}); lower it or give more rows"
        )
    return task.demonstrations(train[: data.shots]) if data.shots else ""


def _reserve(task: Task) -> int:
    """Tokens to keep free for a generated answer."""
    return task.max_new_tokens if task.completion is not None and task.metric in WORD_METRICS else 0


def _limit(data: DataConfig, context: int) -> int:
    if data.max_length is not None and data.max_length > context:
        raise ConfigError(
            f"`data.max_length` must fit the model's context of {context} tokens (got "
            f"{data.max_length}); lower it"
        )
    return data.max_length or context


def _task_rows(task: Task, data: DataConfig) -> dict[str, list[Row]]:
    if data.train is None:
        return sample_splits(
            task,
            data.dir,
            data.num_train,
            data.num_validation,
            data.num_test,
            data.data_seed,
            data.sampling,
        )
    return {
        split: explode_rows(task, rows) if rows else [] for split, rows in _file_rows(data).items()
    }


def _file_rows(data: DataConfig) -> dict[str, list[Row]]:
    """The user's own files, in file order; `num_…` takes the first rows."""
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        path = getattr(data, split)
        rows[split] = load_rows(path, split)[: getattr(data, f"num_{split}")] if path else []
    return rows


def _prepare_files(data: DataConfig, tokenizer: Any, limit: int) -> Splits:
    if data.train is None:
        raise ConfigError(
            "`data.dir` holds the rows of a task (got no `task`); name one, or give data.train: "
            "my.jsonl"
        )
    read = _file_rows(data)
    encoded = {
        split: encode_examples(
            rows, tokenizer, data.format, max_length=limit, truncation=data.truncation
        )
        if rows
        else []
        for split, rows in read.items()
    }
    return Splits(
        encoded["train"],
        encoded["validation"],
        encoded["test"],
        "completion",
        ("loss",),
        REPORTED_OF_TEXT,
        "loss",
        digest=_digest(read),
    )


def _digest(rows: Mapping[str, list[Row]], task: Task | None = None) -> str:
    """Return twelve hex digits that name the rows of all splits, by what a task makes of them: not
    by how they lie."""
    found = hashlib.sha256()
    for split in SPLITS:
        for position, row in enumerate(rows[split]):
            found.update(repr(dict(row) if task is None else task.render(row, position)).encode())
        found.update(split.encode())
    return found.hexdigest()[:12]


def load_task_split(task: Task, data: str | None, split: str, limit: int | None) -> list[Row]:
    """Return the first `limit` rows of a task's split, in file order; `data` is the task's folder
    or one file."""
    is_file = data is not None and Path(data).is_file()
    rows = explode_rows(task, load_rows(data)) if is_file else load_unseen_split(task, data, split)  # type: ignore[arg-type]
    return rows[:limit]

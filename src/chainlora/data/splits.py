"""The rows a run trains on, chooses by and reports on: from a config's `data` section to tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from chainlora.config.schema import DataConfig
from chainlora.data.chat_templates import set_chat_template
from chainlora.data.encoding import Options
from chainlora.data.preparing import make_rows
from chainlora.data.rows import MemoryRows, Rows
from chainlora.data.sources import ListSource, Row, Source, find_source, iterate
from chainlora.data.tasks import (
    REPORTED_OF_TEXT,
    WORD_METRICS,
    Task,
    load_task,
    sample_splits,
    unseen_source,
)
from chainlora.data.tasks.nested import NESTED, FlatSource, flat, without_first
from chainlora.errors import ConfigError

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_DIGEST_VERSION = 2  # 1, without a number in front, hashed the rows as one text of Python

SplitProgress = Callable[[str, int, float], None]
"""Told (split, rows encoded so far, share of the split in 0…1) while a large split is encoded."""


@dataclass(frozen=True)
class Splits:
    """Encoded rows by use.

    `loss` says what a step minimises, `metrics` what an evaluation is asked for and `reported` what
    it gives, `metric` what picks the best point; `stop` and `max_new_tokens` bound generated
    answers; `digest` names the rows as text, before demonstrations and cuts.
    """

    train: Rows
    validation: Rows
    test: Rows
    loss: Literal["candidates", "completion"]
    metrics: tuple[str, ...]
    reported: tuple[str, ...]
    metric: str
    stop: str | None = None
    max_new_tokens: int = 50
    digest: str = ""

    def report(self) -> dict[str, dict[str, Any]]:
        """Return what became of the rows of each split: rows, tokens, cuts, columns not read."""
        found = {name: getattr(self, name).summary.as_dict() for name in SPLITS}
        for summary in found.values():
            summary.pop("digest", None)
        return {name: summary for name, summary in found.items() if summary}


def prepare_splits(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    progress: SplitProgress | None = None,
    to_score: str | None = None,
) -> Splits:
    """Read, sample, check and tokenise everything a config names, or the split `to_score`.

    The tokenizer gets the config's chat template, if it names one.

    Raises DataError or ConfigError before training.
    """
    limit = _limit(data, context)
    set_chat_template(tokenizer, data)
    wanted = (to_score,) if to_score else SPLITS

    def encode(split: str, source: Source | None, kind: Task | str, options: Options) -> Rows:
        if source is None or split not in wanted:
            return MemoryRows()
        return _encode(split, source, tokenizer, kind, options, progress)

    if data.task is None:
        sources, options = _file_sources(data), Options(limit, data.truncation)
        rows = {split: encode(split, sources[split], data.format, options) for split in SPLITS}
        _log_unread(rows)
        return Splits(
            rows["train"],
            rows["validation"],
            rows["test"],
            loss="completion",
            metrics=("loss",),
            reported=REPORTED_OF_TEXT,
            metric="loss",
            digest=_digest(rows),
        )
    task = load_task(data.task)
    sources = _task_sources(task, data)
    before = _demonstrations(task, data, sources["train"])
    scored = Options(limit, data.truncation, reserve=_reserve(task), before=before)
    rows = {}
    for split, source in sources.items():
        options = scored
        if split == "train" and source is not None:
            source = without_first(source, data.shots)
        if split == "train" and to_score is None:
            options = replace(scored, objective=task.loss, reserve=0)
        rows[split] = encode(split, source, task, options)
    _log_unread(rows)
    return Splits(
        rows["train"],
        rows["validation"],
        rows["test"],
        loss=task.loss,
        metrics=task.metrics,
        reported=task.reported,
        metric=task.metric,
        stop=task.stop,
        max_new_tokens=task.max_new_tokens,
        digest=_digest(rows, before),
    )


def encode_split(
    task: Task,
    rows: Source | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    data: DataConfig | None = None,
) -> Rows:
    """Tokenise rows of a task to be scored.

    `data` is that of the run to be scored: what it says of its own task (length, truncation,
    demonstrations) is kept.
    """
    options = Options(context, reserve=_reserve(task))
    if data is not None and _shapes_prompts_of(data, task):
        before = _demonstrations(task, data, _task_sources(task, data)["train"])
        options = replace(
            options,
            max_length=_limit(data, context),
            truncation=data.truncation,
            before=before,
        )
    source = ListSource(rows) if isinstance(rows, Sequence) else rows
    return _encode("scored", source, tokenizer, task, options, None)


def _encode(
    split: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    options: Options,
    progress: SplitProgress | None,
) -> Rows:
    def tell(rows: int, share: float) -> None:
        if progress is not None:
            progress(split, rows, share)

    rows = make_rows(source, tokenizer, task, options, progress=tell)
    _log_summary(split, rows)
    return rows


def _log_summary(split: str, rows: Rows) -> None:
    """Say what was cut."""
    found = rows.summary
    if found.rows_cut:
        _log.warning(
            "%s: %d of %d rows were longer than data.max_length or the context; %d tokens were cut "
            "from their beginnings (truncation: left)",
            split,
            found.rows_cut,
            found.rows,
            found.tokens_cut,
        )


def _log_unread(encoded: Mapping[str, Rows]) -> None:
    """Name each column that nothing reads once, with the splits that have it."""
    places: dict[str, list[str]] = {}
    for split, rows in encoded.items():
        for column in rows.summary.unread:
            places.setdefault(column, []).append(split)
    alike: dict[str, list[str]] = {}
    for column, splits in places.items():
        alike.setdefault(", ".join(splits), []).append(column)
    for splits_in_words, columns in alike.items():
        _log.warning("%s: nothing reads %s", splits_in_words, ", ".join(map(repr, columns)))


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


def _demonstrations(task: Task, data: DataConfig, train: Source | None) -> str:
    if not data.shots or train is None:
        return ""
    first = list(islice(iterate(train), data.shots))
    if len(first) < data.shots:
        raise ConfigError(
            "`data.shots` must be at most the number of training rows (got "
            f"{data.shots} for {len(first)}); lower it or give more rows"
        )
    return task.demonstrations(first)


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


def _task_sources(task: Task, data: DataConfig) -> dict[str, Source | None]:
    if data.train is not None:
        return {
            split: None if source is None else flat(source, task.name)
            for split, source in _file_sources(data).items()
        }
    drawn = sample_splits(
        task,
        data.dir,
        data.num_train,
        data.num_validation,
        data.num_test,
        data.data_seed,
        data.sampling,
    )
    return {split: ListSource(rows) if rows else None for split, rows in drawn.items()}


def _file_sources(data: DataConfig) -> dict[str, Source | None]:
    """The user's own files, in file order; `num_…` takes the first rows."""
    if data.train is None:
        raise ConfigError(
            "`data.dir` holds the rows of a task (got no `task`); name one, or give data.train: "
            "my.jsonl"
        )
    paths = {split: getattr(data, split) for split in SPLITS}
    return {
        split: find_source(path, split, getattr(data, f"num_{split}")) if path else None
        for split, path in paths.items()
    }


def _digest(rows: Mapping[str, Rows], before: str = "") -> str:
    """Return the version and twelve hex digits that name the rows of all splits.

    Version 2: of each row, the SHA-256 of what its task or format makes of it, as JSON with sorted
    keys; of a split, the SHA-256 of its rows' hashes in order; of a run, that of `before` (the
    demonstrations) and of the name and hash of each split. It is computed while rows are streamed.
    """
    found = hashlib.sha256(before.encode())
    for split in SPLITS:
        found.update(f"\n{split} {rows[split].summary.digest}".encode())
    return f"{_DIGEST_VERSION}:{found.hexdigest()[:12]}"


def task_split_source(task: Task, data: str | None, split: str, limit: int | None) -> Source:
    """Return the first `limit` rows of a task's split; `data` is its folder or one file."""
    if data is None or not Path(data).is_file():
        return unseen_source(task, data, split, limit)
    if task.name in NESTED:
        return FlatSource(find_source(data), task.name, limit=limit)
    return find_source(data, limit=limit)

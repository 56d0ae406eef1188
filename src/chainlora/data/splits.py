"""The rows a run trains on, chooses by and reports on: from a config's `data` section to tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import TrainFile
from chainlora.config.schema import PAIR_LOSSES, DataConfig
from chainlora.data.conflicts import answer_hashes, newest
from chainlora.data.division import Division, aligned, divide, pick, rows_again
from chainlora.data.encoding import Options, detect_format
from chainlora.data.kept import ASKED, SAMPLE, SPLITS, Kept
from chainlora.data.mixture import Mixture, example_hashes, prompt_hashes
from chainlora.data.preparing import make_rows
from chainlora.data.row_warnings import (
    check_pairs,
    check_scorable,
    tell_in_both,
    tell_lost,
    tell_trained_on,
    tell_unread,
)
from chainlora.data.rows import COUNTED, MemoryRows, Rows, joined
from chainlora.data.sources import ListSource, Row, Source, find_source
from chainlora.data.tasks import (
    REPORTED_OF_TEXT,
    WORD_METRICS,
    Task,
    check_split_files,
    flat,
    load_task,
    sample_splits,
    split_source,
    unseen_source,
)
from chainlora.data.templates import set_chat_template
from chainlora.errors import ConfigError

_log = logging.getLogger(__name__)

_REHEARSED = 8  # rows of each stage in an epoch of a rehearsal
_ASKED_OF_A_TASK = ("loss", "metrics", "reported", "metric", "stop", "max_new_tokens")
_REPORTED_OF_PAIRS = ("loss", "accuracy", "margin")

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
    loss: str = "completion"
    metrics: tuple[str, ...] = ("loss",)
    reported: tuple[str, ...] = REPORTED_OF_TEXT
    metric: str = "loss"
    stop: str | None = None
    max_new_tokens: int = 50
    digest: str = ""
    mixture: Mixture | None = None  # what an epoch reads of `train`; None: all of it, once
    bound: int | None = None  # of what `data.validation` held out (`held_out_bound`)
    moved: Mapping[str, int] = field(default_factory=dict)  # `Division.counts`

    @property
    def own(self) -> Rows:
        """Return the training rows without those of earlier stages that `data.replay` adds."""
        count = len(self.train) if self.mixture is None else self.mixture.num_rows
        return pick(self.train, np.arange(len(self.train)) < count)

    def kept(self) -> Kept:
        """Return what a run keeps of these rows: not those that it reads again itself."""
        own = self.own
        hashes, answers = example_hashes(own), answer_hashes(own)
        smallest = np.argsort(hashes, kind="stable")[:SAMPLE].tolist()
        sample = [own[index] for index in smallest]
        return Kept(
            MemoryRows(sample),
            MemoryRows(self.validation[:SAMPLE]),
            MemoryRows(self.test[:SAMPLE]),
            counts={name: len(getattr(self, name)) for name in SPLITS} | {"train": len(own)},
            prompts=prompt_hashes(sample),
            seen=np.unique(hashes),
            held_out=np.unique(prompt_hashes(self.validation)),
            answers=answers[np.unique(answers[:, 1], return_index=True)[1]],
            asked={name: getattr(self, name) for name in ASKED},
            bound=self.bound,
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """Return what became of the rows of each split: rows, tokens, cuts, columns not read."""
        found = {name: getattr(self, name).summary.as_dict() for name in SPLITS}
        told = (*COUNTED, "recognised")  # of whole files
        for name, summary in found.items():
            held_out = name == "validation" and self.bound is not None
            for key in ("digest", *(told if held_out else ())):
                summary.pop(key, None)
        found["train"] |= self.moved
        if self.mixture is not None and set(self.mixture.weights) != {1.0}:
            found["train"]["weights"] = list(self.mixture.weights)
        return {name: summary for name, summary in found.items() if summary}


def prepare_splits(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    progress: SplitProgress | None = None,
    to_score: str | None = None,
    loss: str | None = None,
    *,
    earlier: Mapping[str, Kept] | None = None,
    bound: int | None = None,
    compare: bool = True,
) -> Splits:
    """Read, sample, check and tokenise everything a config names, or the split `to_score`.

    The tokenizer gets the config's chat template, if it names one. `loss` is that of the config's
    `train` section, `earlier` are the rows that earlier stages kept, by stage; `bound` is what the
    run to be scored held out by. Training rows to score are those that are trained on. `compare`
    looks for rows to score that are trained on, which reads all rows.

    Raises DataError or ConfigError before training.
    """
    longest = length_limit(data, context)
    learned = options = Options(longest, data.truncation, objective=loss)
    set_chat_template(tokenizer, data)
    task = None if data.task is None else load_task(data.task)
    sources = _file_sources(data) if task is None else _task_sources(task, data)
    if task is not None:
        before, sources["train"] = _demonstrations(task, data, sources["train"])
        learned = replace(options, objective=loss or task.loss, before=before)
        options = replace(learned, reserve=_reserve(task))
        if task.completion is None:
            options = replace(options, objective="candidates")
    asked = _asked(task, loss)

    def encode(split: str, options: Options, *, say_lost: bool = True) -> list[Rows]:
        kind = task or data.format
        return [
            _encode(split, each, tokenizer, kind, options, progress, say_lost=say_lost)
            for each in sources[split]
        ]

    parts: dict[str, list[Rows]] = {split: [] for split in SPLITS}
    is_divided = (data.holds_out and to_score != "test") or (earlier and to_score == "train")
    if to_score is None or is_divided:
        files = encode("train", learned)
        found = divide(files, data, list((earlier or {}).values()), bound)
        is_scored_alike = not is_divided or options == learned
        scored = files if is_scored_alike else encode("train", options, say_lost=False)
        parts["train"], parts["validation"] = _picked(found, files, scored, data, to_score is None)
        asked |= {"bound": found.bound, "moved": found.counts}
        if counts := list(map(len, parts["train"])):
            weights = [each.weight for each in data.train_files] or [1.0]
            weights = weights[-len(counts) :]  # of the first, all rows may be demonstrations
            asked["mixture"] = Mixture(tuple(counts), tuple(weights))
    for split in SPLITS if to_score is None else (to_score,):
        parts[split] = parts[split] or encode(split, options)
    rows = {split: joined(each) for split, each in parts.items()}
    tell_unread(rows)
    if to_score is None and compare:
        tell_in_both(data, rows, sources)
    if to_score is None and (data.rehearse or (data.replay and parts["train"])):
        key, kind = "data.replay" if data.replay else "data.rehearse", learned_by(data, loss)
        old: Mapping[str, Kept] = earlier or {}
        if not data.keep_conflicts:
            old = newest(old, answer_hashes(rows["train"]))
        again = rows_again(key, old, kind, rows["validation"], longest)
        rows["train"] = joined([rows["train"], *again])
        asked |= _mixed_with(again, data.replay, asked)
    if earlier and to_score is None and compare:
        tell_trained_on(rows, earlier)
    asked |= {"digest": _digest(rows, options.before)}
    return Splits(rows["train"], rows["validation"], rows["test"], **asked)


def _asked(task: Task | None, loss: str | None) -> dict[str, Any]:
    """Return what `Splits` says of how the rows are learned and judged."""
    found = {} if task is None else {name: getattr(task, name) for name in _ASKED_OF_A_TASK}
    if loss is not None:
        found["loss"] = loss
    if loss in PAIR_LOSSES:
        found["reported"] = _REPORTED_OF_PAIRS
    return found


def _picked(
    found: Division, files: list[Rows], scored: list[Rows], data: DataConfig, to_train: bool
) -> tuple[list[Rows], list[Rows]]:
    """Return the rows to train on, as they are `scored` unless `to_train`, and those held out."""
    validation = list(map(aligned, scored, files, found.validation))
    if data.holds_out:
        check_scorable(found.validation, validation)
    held_out = list(map(pick, scored, validation)) if data.holds_out else []
    if to_train:
        return list(map(pick, files, found.train)), held_out
    return list(map(pick, scored, map(aligned, scored, files, found.train))), held_out


def _mixed_with(again: Sequence[Rows], replay: float | None, asked: Any) -> dict[str, Any]:
    """Return what an epoch reads of rows of earlier stages: a share of each batch beside new rows,
    or in a rehearsal as many of each stage."""
    counts = tuple(map(len, again))
    if not replay:
        shares = tuple(min(1.0, _REHEARSED / count) for count in counts)
        return {"mixture": Mixture(counts, shares)}
    mixture = replace(asked["mixture"], num_earlier=sum(counts), replay=replay)
    return {"mixture": mixture, "moved": asked["moved"] | {"replayed": sum(counts)}}


def learned_by(data: DataConfig, loss: str | None) -> str:
    """Return what the rows of a config are learned by (`Splits.loss`)."""
    return loss or ("completion" if data.task is None else load_task(data.task).loss)


def named_sources(data: DataConfig) -> dict[str, list[TrainFile]]:
    """Return what the keys of a config name: the task and the files of rows, with their weights."""
    found = {f"data.{key}": getattr(data, key) for key in ("task", "validation", "test")}
    named = {key: [TrainFile(path=path)] for key, path in found.items() if isinstance(path, str)}
    if data.rehearse:
        named["data.rehearse"] = []
    return named | ({"data.train": data.train_files} if data.train_files else {})


def source_digest(key: str, path: str, data: DataConfig) -> str:
    """Return what names the content of a task or of a file of rows, wherever it lies."""
    if key == "data.task":
        return hashlib.sha256(load_task(path).model_dump_json().encode()).hexdigest()
    split = key.removeprefix("data.")
    return find_source(path, split, getattr(data, f"num_{split}")).identity()


def rows_of_an_epoch(data: DataConfig, most: int) -> int:
    """Return how many rows of its files an epoch reads, `most` or more if it is that many."""
    found = 0
    for file, source in zip(data.train_files, _file_sources(data)["train"], strict=True):
        limit = ceil(most / file.weight)
        limit = limit if source.limit is None else min(limit, source.limit)
        found += ceil(file.weight * replace(source, limit=limit).num_rows())
    return found


def check_files(data: DataConfig, loss: str | None) -> None:
    """Look for a task and for rows, and at the first row of each file; a task's are not rendered.

    Warns of rows to score that are plain text while those trained on are not, or the other way
    round. Raises ConfigError for no such task, DataError for rows that are not there or suit no
    format.
    """
    task = None if data.task is None else load_task(data.task)
    if task is not None and data.dir is not None:
        check_split_files(task, data.dir)
    elif task is not None and data.train is None:
        split_source(task, None, "train")
    kinds: dict[str, set[str]] = {}
    for split, sources in _file_sources(data).items():
        for source in sources:
            source.check_fields()
            first = next(iter(source))
            if task is None and (loss in PAIR_LOSSES or data.format == "auto"):
                kinds.setdefault(split, set()).add(detect_format([first], loss))
    trained = kinds.pop("train", set())
    for split, found in kinds.items():
        if trained and {kind == "text" for kind in found} - {kind == "text" for kind in trained}:
            _log.warning(
                "%s: rows are %s, and those trained on %s: of text all tokens are scored, else "
                "the answers alone; to read all files as one format, set data.format",
                split,
                *(", ".join(sorted(each)) for each in (found, trained)),
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
    shapes = data is not None and (data.max_length or data.truncation or data.shots)
    if data is not None and data.task and shapes and load_task(data.task).name == task.name:
        train = _task_sources(task, data)["train"] if data.shots else []
        before, _ = _demonstrations(task, data, train)
        limit = length_limit(data, context)
        options = replace(options, max_length=limit, truncation=data.truncation, before=before)
    source = ListSource(rows) if isinstance(rows, Sequence) else rows
    return _encode("scored", source, tokenizer, task, options, None)


def _encode(
    split: str,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    options: Options,
    progress: SplitProgress | None,
    *,
    say_lost: bool = True,
) -> Rows:
    """Encode rows, and say how they were read, and what was cut and left out."""
    if say_lost:
        source.tell_remark()
    tell = None if progress is None else partial(progress, split)
    rows = make_rows(source, tokenizer, task, options, progress=tell)
    check_pairs(rows.summary, source)
    if say_lost:
        tell_lost(split, rows.summary)
    return rows


def _demonstrations(
    task: Task, data: DataConfig, train: Sequence[Source]
) -> tuple[str, list[Source]]:
    """Return the training rows that are shown, as text, and the sources without them."""
    if not data.shots or not train:
        return "", list(train)
    first, *others = train
    rows = list(islice(first, data.shots + 1))
    if len(rows) < data.shots:
        raise ConfigError(
            "`data.shots` must be at most the number of training rows (got "
            f"{data.shots} for {len(rows)}); lower it or give more rows"
        )
    rest = [replace(first, skip=data.shots)] if len(rows) > data.shots else []
    return task.demonstrations(rows[: data.shots]), [*rest, *others]


def _reserve(task: Task) -> int:
    """Tokens to keep free for a generated answer."""
    return task.max_new_tokens if task.completion is not None and task.metric in WORD_METRICS else 0


def length_limit(data: DataConfig, context: int) -> int:
    """Return the most tokens of a row. Raises ConfigError for more than the model's context."""
    if data.max_length is not None and data.max_length > context:
        raise ConfigError(
            f"`data.max_length` must fit the model's context of {context} tokens (got "
            f"{data.max_length}); lower it"
        )
    return data.max_length or context


def _task_sources(task: Task, data: DataConfig) -> dict[str, list[Source]]:
    if data.train is not None:
        return {
            split: [flat(source, task.name) for source in found]
            for split, found in _file_sources(data).items()
        }
    sizes = (data.num_train, data.num_validation, data.num_test)
    drawn = sample_splits(task, data.dir, *sizes, data.data_seed, data.sampling)
    return {split: [ListSource(rows)] if rows else [] for split, rows in drawn.items()}


def _file_sources(data: DataConfig) -> dict[str, list[Source]]:
    """The user's own files, in file order; `num_…` takes the first rows of each."""
    train = [each.path for each in data.train_files]
    named: dict[str, list[Any]] = {"train": train}
    named |= {"validation": [data.validation], "test": [data.test]}
    return {
        split: [
            replace(find_source(each, split, getattr(data, f"num_{split}")), fields=data.fields)
            for each in found
            if each and isinstance(each, str)
        ]
        for split, found in named.items()
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
    return f"2:{found.hexdigest()[:12]}"


def task_split_source(task: Task, data: str | None, split: str, limit: int | None) -> Source:
    """Return the first `limit` rows of a task's split; `data` is its folder or one file."""
    if data is None or not Path(data).is_file():
        return unseen_source(task, data, split, limit)
    return replace(flat(find_source(data), task.name), limit=limit)

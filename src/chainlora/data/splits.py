"""Prepare the training, validation and test rows of a run from a config's `data` section."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainlora.config.data import TrainFile
from chainlora.config.schema import PAIR_LOSSES, DataConfig
from chainlora.data.division import aligned, divide, pick, rows_again
from chainlora.data.encoding import FORMATS, Options, detect_format, with_usual_columns
from chainlora.data.encoding.translated import FIELDS as TRANSLATED
from chainlora.data.kept import ASKED, SAMPLE, SPLITS, Kept, answer_hashes, newest
from chainlora.data.mixture import Mixture, example_hashes, prompt_hashes
from chainlora.data.preparing import make_rows
from chainlora.data.row_warnings import (
    check_pairs,
    check_scorable,
    warn_of_lost_rows,
    warn_of_seen_rows,
    warn_of_shared_rows,
    warn_of_unread,
)
from chainlora.data.rows import COUNTED, MemoryRows, Rows, joined
from chainlora.data.sources import ListSource, Row, Source, find_source
from chainlora.data.tasks import REPORTED_OF_TEXT, WORD_METRICS, Task, load_task
from chainlora.data.templates import set_chat_template
from chainlora.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

_TASK_FIELDS = ("loss", "metrics", "reported", "metric", "stop", "max_new_tokens")  # of `Splits`
_REPORTED_OF_PAIRS = ("loss", "accuracy", "margin")

SplitProgress = Callable[[str, int, float], None]
"""Called with (split, rows encoded so far, share of the split in 0…1) for a large split."""


@dataclass(frozen=True)
class Splits:
    """The encoded rows of a run by use, and how they are trained on and scored."""

    train: Rows
    validation: Rows
    test: Rows
    loss: str = "completion"  # the objective of a training step
    metrics: tuple[str, ...] = ("loss",)  # the metrics that an evaluation is called with
    reported: tuple[str, ...] = REPORTED_OF_TEXT  # the metrics that an evaluation returns
    metric: str = "loss"  # selects the best point
    stop: str | None = None  # ends a generated answer
    max_new_tokens: int = 50  # of a generated answer
    digest: str = ""  # names the rows as text, before demonstrations and cuts
    mixture: Mixture | None = None  # the rows of an epoch; None: every row of `train` once
    bound: int | None = None  # of the rows that `data.validation` holds out (`held_out_bound`)
    moved: Mapping[str, int] = field(default_factory=dict)  # `Division.counts`

    @property
    def own(self) -> Rows:
        """Return the training rows without the rows of earlier stages that `data.replay` adds."""
        count = len(self.train) if self.mixture is None else self.mixture.num_rows
        return pick(self.train, np.arange(len(self.train)) < count)

    def kept(self, keep_rows: bool | int = True) -> Kept:
        """Return the rows to keep (`data.keep_rows`), without rows of earlier stages."""
        most = SAMPLE if keep_rows is True else keep_rows
        own = self.own
        hashes, answers = example_hashes(own), answer_hashes(own)
        smallest = np.argsort(hashes, kind="stable")[:most].tolist()
        sample = [own[index] for index in smallest]
        return Kept(
            MemoryRows(sample),
            MemoryRows([*self.validation.spread(SAMPLE)]),  # files may be sorted by answer or date
            MemoryRows([*self.test.spread(SAMPLE)]),
            counts={name: len(getattr(self, name)) for name in SPLITS} | {"train": len(own)},
            prompts=prompt_hashes(sample),
            seen=np.unique(hashes),
            held_out=np.unique(prompt_hashes(self.validation)),
            answers=answers[np.unique(answers[:, 1], return_index=True)[1]],
            asked={name: getattr(self, name) for name in ASKED},
            bound=self.bound,
        )

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the summary of each split: rows, tokens, cuts, unread columns."""
        summaries = {name: getattr(self, name).summary.as_dict() for name in SPLITS}
        # held-out rows are in the counts of the training files
        of_files = (*COUNTED, "recognised", "columns")
        for name, summary in summaries.items():
            is_held_out = name == "validation" and self.bound is not None
            for key in ("digest", *(of_files if is_held_out else ())):
                summary.pop(key, None)
        summaries["train"] |= self.moved
        if self.mixture is not None and set(self.mixture.weights) != {1.0}:
            summaries["train"]["weights"] = list(self.mixture.weights)
        return {name: summary for name, summary in summaries.items() if summary}


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
    """Read, sample, check and tokenise the rows that a config names.

    Args:
        data: the config's `data` section.
        tokenizer: gets the config's chat template, if the config names one.
        context: the most tokens that the model reads.
        progress: called while a large split is encoded.
        to_score: prepare only this split, encoded for scoring. Of "train" these are the rows that
            the run trains on.
        loss: `train.loss` of the config; None is the task's.
        earlier: the rows that earlier stages kept, by stage.
        bound: the bound of the run to be scored (`held_out_bound`), if it has one already.
        compare: warn of scored rows that are training rows too. This reads all rows.

    Raises:
        DataError, ConfigError: before training, for rows or keys that cannot work.
    """
    set_chat_template(tokenizer, data)
    encoding = _SplitEncoding(data, tokenizer, context, progress, loss)
    fields = _task_fields(encoding.task, loss)
    parts: dict[str, list[Rows]] = {split: [] for split in SPLITS}
    to_train, earlier = to_score is None, earlier or {}

    # 1. Divide the training files: rows to train on, rows held out for validation.
    if to_train or (data.holds_out and to_score != "test") or (earlier and to_score == "train"):
        division = _divided(encoding, list(earlier.values()), bound, to_score)
        parts["train"], parts["validation"], fields_of_division = division
        fields |= fields_of_division

    # 2. Encode the splits that have files of their own.
    for split in SPLITS if to_score is None else (to_score,):
        parts[split] = parts[split] or encoding.encode(split, encoding.scored)
    rows = {split: joined(part) for split, part in parts.items()}
    warn_of_unread(rows)
    if to_train and compare:
        warn_of_shared_rows(data, rows, encoding.sources)
        if earlier:
            warn_of_seen_rows(rows, earlier)

    # 3. Add rows of earlier stages to the training rows.
    if to_train and data.replay and parts["train"]:
        limit = length_limit(data, context)
        again, fields_of_mix = _rows_of_earlier(data, loss, rows, earlier, limit, fields)
        rows["train"] = joined([rows["train"], *again])
        fields |= fields_of_mix
    fields["digest"] = _digest(rows, encoding.scored.before)
    return Splits(rows["train"], rows["validation"], rows["test"], **fields)


class _SplitEncoding:
    """The sources of each split, and how they are encoded for training and for scoring."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        progress: SplitProgress | None,
        loss: str | None,
    ) -> None:
        self.data, self._tokenizer, self._progress = data, tokenizer, progress
        learned = scored = Options(length_limit(data, context), data.truncation, objective=loss)
        self.task = task = None if data.task is None else load_task(data.task)
        self.sources = _file_sources(data)
        if task is not None:
            before, self.sources["train"] = _demonstrations(task, data, self.sources["train"])
            learned = replace(learned, objective=loss or task.loss, before=before)
            scored = replace(learned, reserve=_reserve(task))
            if task.completion is None:
                scored = replace(scored, objective="candidates")
        self.learned, self.scored = learned, scored

    @property
    def needs_room(self) -> bool:
        """Whether a row of a task is refused if it is too long only when it is scored."""
        if self.task is None or self.scored == self.learned:
            return False
        return (self.scored.truncation or self.task.truncation) == "error"

    def encode(self, split: str, options: Options, *, warn: bool = True) -> list[Rows]:
        """Encode each source of a split."""
        kind = self.task or self.data.format
        return [
            _encode(split, source, self._tokenizer, kind, options, self._progress, warn=warn)
            for source in self.sources[split]
        ]


def check_metric(metric: str | None, reported: Sequence[str]) -> None:
    """Raise ConfigError for a `select_metric` that is not reported."""
    if metric is not None and metric not in reported:
        rule = f"`select_metric` must be one of {', '.join(reported)} here"
        raise ConfigError(rule, repr(metric))


def reported_of(data: DataConfig, loss: str | None) -> tuple[str, ...]:
    """Return the metrics that rows of a config are scored by."""
    task = None if data.task is None else load_task(data.task)
    reported: tuple[str, ...] = _task_fields(task, loss).get("reported", REPORTED_OF_TEXT)
    return reported


def _task_fields(task: Task | None, loss: str | None) -> dict[str, Any]:
    """Return the fields of `Splits` that the task and the loss decide."""
    fields = {} if task is None else {name: getattr(task, name) for name in _TASK_FIELDS}
    if loss is not None:
        fields["loss"] = loss
    if loss in PAIR_LOSSES:
        fields["reported"] = _REPORTED_OF_PAIRS
    return fields


def _divided(
    encoding: _SplitEncoding, earlier: Sequence[Kept], bound: int | None, to_score_split: str | None
) -> tuple[list[Rows], list[Rows], dict[str, Any]]:
    """Return the rows to train on, the rows held out, encoded for scoring, and other fields."""
    data, learned, scored = encoding.data, encoding.learned, encoding.scored
    to_train = to_score_split is None
    files = to_score = encoding.encode("train", learned)
    division = divide(files, data, earlier, bound)
    needs_room = encoding.needs_room and to_score_split != "train"
    if needs_room:  # only held-out rows need it: others are dropped there
        scored = replace(scored, truncation="drop")
    if scored != learned and (data.holds_out or not to_train):
        to_score = encoding.encode("train", scored, warn=False)
    held_out: list[Rows] = []
    if data.holds_out:
        validation = list(map(aligned, to_score, files, division.validation))
        check_scorable(division.validation, validation, need_all=needs_room)
        held_out = list(map(pick, to_score, validation))
    if to_train:
        train = list(map(pick, files, division.train))
    else:  # to score them
        train = list(map(pick, to_score, map(aligned, to_score, files, division.train)))
    fields: dict[str, Any] = {"bound": division.bound, "moved": division.counts}
    if train:
        weights = [file.weight for file in data.train_files] or [1.0]
        weights = weights[-len(train) :]  # the first file is missing if all its rows are shown
        fields["mixture"] = Mixture(tuple(map(len, train)), tuple(weights))
    return train, held_out, fields


def _rows_of_earlier(
    data: DataConfig,
    loss: str | None,
    rows: Mapping[str, Rows],
    earlier: Mapping[str, Kept],
    max_length: int,
    fields: Mapping[str, Any],
) -> tuple[list[Rows], dict[str, Any]]:
    """Return the rows of earlier stages that are read again, and the fields that mix them in."""
    if not data.keep_conflicts:
        earlier = newest(earlier, answer_hashes(rows["train"]))
    again = rows_again(earlier, learned_by(data, loss), rows["validation"], max_length)
    count = sum(map(len, again))
    mixture = replace(fields["mixture"], num_earlier=count, replay=data.replay)
    return again, {"mixture": mixture, "moved": fields["moved"] | {"replayed": count}}


def learned_by(data: DataConfig, loss: str | None) -> str:
    """Return the objective by which the rows of a config are learned (`Splits.loss`)."""
    return loss or ("completion" if data.task is None else load_task(data.task).loss)


def named_sources(data: DataConfig) -> dict[str, list[TrainFile]]:
    """Return the sources of a config by key: the task, data files with weights."""
    values = {f"data.{key}": getattr(data, key) for key in ("task", "validation", "test")}
    named = {key: [TrainFile(path=path)] for key, path in values.items() if isinstance(path, str)}
    return named | ({"data.train": data.train_files} if data.train_files else {})


def source_digest(key: str, path: str, data: DataConfig) -> str:
    """Return a digest of a task or of a data file, by content."""
    if key == "data.task":
        return hashlib.sha256(load_task(path).model_dump_json().encode()).hexdigest()
    split = key.removeprefix("data.")
    return find_source(path, split, getattr(data, f"num_{split}")).identity()


def rows_of_an_epoch(data: DataConfig, most: int) -> int:
    """Return how many rows an epoch reads of the files. Counting stops at about `most`."""
    count = 0
    for file, source in zip(data.train_files, _file_sources(data)["train"], strict=True):
        limit = ceil(most / file.weight)
        limit = limit if source.limit is None else min(limit, source.limit)
        count += ceil(file.weight * replace(source, limit=limit).num_rows())
    return count


def check_files(data: DataConfig, loss: str | None) -> None:
    """Check that the task and the data files exist, and read the first row of each file.

    Rows of a task are not rendered. Warns if some splits are plain text and others are not. Raises
    ConfigError if the task file is missing, DataError if rows are missing or of no known format.
    """
    task = None if data.task is None else load_task(data.task)
    kinds: dict[str, set[str]] = {}
    for split, sources in _file_sources(data).items():
        for source in sources:
            source.check_fields()
            first = next(iter(source))
            if task is None and (loss in PAIR_LOSSES or data.format == "auto"):
                first = next(iter(with_usual_columns(source, loss)))
                kinds.setdefault(split, set()).add(detect_format([first], loss))
    trained = kinds.pop("train", set())
    for split, scored in kinds.items():
        if trained and {kind == "text" for kind in scored} - {kind == "text" for kind in trained}:
            _log.warning(
                "%s: rows are %s, but training rows are %s. In text all tokens are scored, "
                "otherwise only the answers. To read all files as one format, set data.format",
                split,
                *(", ".join(sorted(formats)) for formats in (scored, trained)),
            )


def has_columns(data: DataConfig, loss: str | None) -> bool:
    """Return whether the first row of every file has the columns of `data.fields` and format.

    True if a file cannot be read, which `check_files` refuses.
    """
    fields = {*data.fields}
    if data.format != "auto" and loss not in PAIR_LOSSES:
        fields |= {*(FORMATS | TRANSLATED)[data.format]}
    try:
        sources = [source for named in _file_sources(data).values() for source in named]
        return all(next(iter(source)).keys() >= fields for source in sources)
    except DataError:
        return True


def encode_split(
    task: Task,
    rows: Source | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    data: DataConfig | None = None,
) -> Rows:
    """Tokenise rows of a task for scoring, as the section `data` of a run on it would."""
    options = Options(context, reserve=_reserve(task))
    shapes = data is not None and (data.max_length or data.truncation or data.shots)
    if data is not None and data.task and shapes and load_task(data.task).name == task.name:
        files = data.model_copy(update={"validation": None, "test": None})
        train = _file_sources(files)["train"] if data.shots else []
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
    warn: bool = True,
) -> Rows:
    """Encode rows, and warn of unusual files and of rows that were cut or left out."""
    if warn and (remark := source.remark()):
        _log.warning("%s", remark)
    split_progress = None if progress is None else partial(progress, split)
    rows = make_rows(source, tokenizer, task, options, progress=split_progress)
    check_pairs(rows.summary, source)
    if warn:
        if rows.summary.columns:
            _log.warning("%s: %s", source, rows.summary.columns)
        warn_of_lost_rows(split, rows.summary)
    return rows


def _demonstrations(
    task: Task, data: DataConfig, train: Sequence[Source]
) -> tuple[str, list[Source]]:
    """Return the demonstrations as text, and the training sources without these rows."""
    if not data.shots or not train:
        return "", list(train)
    first, *others = train
    rows = list(islice(first, data.shots + 1))
    if len(rows) < data.shots:
        rule = "`data.shots` must be at most the number of training rows"
        raise ConfigError(rule, f"{data.shots} for {len(rows)}", "lower it or give more rows")
    rest = [replace(first, skip=data.shots)] if len(rows) > data.shots else []
    return task.demonstrations(rows[: data.shots]), [*rest, *others]


def _reserve(task: Task) -> int:
    """Return how many tokens to keep free for a generated answer."""
    return task.max_new_tokens if task.completion is not None and task.metric in WORD_METRICS else 0


def length_limit(data: DataConfig, context: int) -> int:
    """Return the most tokens of a row. Raises ConfigError for more than the model's context."""
    if data.max_length is not None and data.max_length > context:
        rule = f"`data.max_length` must fit the model's context of {context} tokens"
        raise ConfigError(rule, data.max_length, "lower it")
    return data.max_length or context


def _file_sources(data: DataConfig) -> dict[str, list[Source]]:
    """Return the sources of a user's data files; `num_SPLIT` takes the first rows of each."""
    paths: dict[str, list[Any]] = {"train": [file.path for file in data.train_files]}
    paths |= {"validation": [data.validation], "test": [data.test]}
    return {
        split: [
            replace(find_source(path, split, getattr(data, f"num_{split}")), fields=data.fields)
            for path in split_paths
            if path and isinstance(path, str)
        ]
        for split, split_paths in paths.items()
    }


def _digest(rows: Mapping[str, Rows], before: str) -> str:
    """Return a digest of the rows of all splits: its version and twelve hex digits.

    Version 2 has three levels of SHA-256. Row: the content that its task or format reads, as JSON
    with sorted keys. Split: the hashes of its rows in order. Run: `before` (the demonstrations),
    then the name and hash of each split. Hashes are computed while rows are streamed.
    """
    digest = hashlib.sha256(before.encode())
    for split in SPLITS:
        digest.update(f"\n{split} {rows[split].summary.digest}".encode())
    return f"2:{digest.hexdigest()[:12]}"

"""Score a run or a model on a task, on a file of rows, or on the rows a run was configured with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from chainlora.config.schema import DataConfig, RunConfig
from chainlora.data.examples import Example
from chainlora.data.kept import SPLITS, Kept
from chainlora.data.sources import Source, find_source
from chainlora.data.splits import (
    Splits,
    encode_split,
    named_sources,
    prepare_splits,
    source_digest,
    task_split_source,
)
from chainlora.data.tasks import Task, load_task
from chainlora.engine.engine import Engine, Speedups
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.evaluation.evaluate import Evaluation, evaluate
from chainlora.evaluation.generation import to_accelerator
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs
from chainlora.evaluation.training_rows import config_of, divided_by
from chainlora.files import check_writable, make_folder, write_text
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.exported import load_run_or_model
from chainlora.runs.paths import is_run, need_apart
from chainlora.runs.state import OpenState
from chainlora.showing import Shown

logger = logging.getLogger(__name__)

Encode = Callable[[Any, int], tuple[Task | Splits, Sequence[Example]]]
"""From a tokenizer and the model's context to what is asked, and the rows as tokens."""


def evaluate_task(
    run_or_model: Address,
    task: Task | str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str = "validation",
    limit: int | None = None,
    num_links: int | None = None,
    dtype: str | torch.dtype | None = None,
    predictions: str | Path | None = None,
    speedups: Speedups = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return `task`, `split`, `rows` and `metrics` of a run directory's chain, or of any model,
    and as `stage` whose rows they are, of a run with several.

    Args:
        run_or_model: a run directory, a model as `load_model` takes it, or an export: an adapter is
            scored on the base that it names, and rows are read as its run reads them.
        task: what is asked, or its name or file. A run reads its own task as it did in training:
            length, truncation and demonstrations. None: the run's own rows, read as in training.
        data: a folder or file of rows; None: the run's, or the Hub's. Without a task, rows of the
            run's task if it has one, else of its format; a model reads them by the default format.
        split: which rows of those.
        limit: the first so many rows, in file order.
        num_links: the chain as it was then.
        dtype: of the weights; defaults to the run's own, or float32.
        predictions: a file for one JSON line a row.
        speedups: ``off`` runs plain transformers: no packing, no faster forwards, one thread.
        progress: called as ``progress(rows_done, rows)``.
    """
    if limit is not None and limit < 1:
        raise ConfigError("`limit` must be at least 1", limit, "leave it out for all rows")
    data = None if data is None else expanduser(data)
    if predictions is not None:
        predictions = Path(predictions).expanduser()
        check_writable(predictions.parent)  # before the work
        need_apart(predictions, "predictions")
    if isinstance(task, str | Path):
        task = load_task(task)
    config = config_of(run_or_model)
    encode, named = rows_to_score(run_or_model, task, data=data, split=split, limit=limit)
    if named is None and config is not None and config.train.loss == "dpo":
        _need_start(run_or_model)
    keys: Any = {"num_links": num_links, "dtype": dtype, "speedups": speedups}
    asked, rows, found = _scored(run_or_model, config, encode, progress, **keys)
    if predictions is not None:
        _write_predictions(Path(predictions), found)
    metrics = dict(found.metrics)
    if asked.metric in INDEX_METRICS:
        metrics["majority"] = majority_rate(rows, asked.metric)
    is_file = data is not None and not Path(data).is_dir()
    shown: dict[str, Any] = {"task": named and named.name, "split": data if is_file else split}
    if task is None and data is None and len((state := open_run(run_or_model)).shares) > 1:
        shown = {"stage": state.with_rows.configured.key} | shown
    return Shown(shown | {"rows": found.num_rows, "metrics": metrics})


def _scored(
    run_or_model: Address,
    config: RunConfig | None,
    encode: Encode,
    progress: Callable[[int, int], None] | None,
    *,
    num_links: int | None,
    dtype: Any,
    speedups: Speedups,
) -> tuple[Task | Splits, Sequence[Example], Evaluation]:
    """Load a run or a model; return what is asked, the rows as tokens, and what they came to."""
    model, tokenizer = load_run_or_model(run_or_model, num_links=num_links, dtype=dtype)
    asked, rows = encode(tokenizer, context_length(model))
    with Engine(to_accelerator(model), speedups=speedups, training=False) as engine:
        if asked.loss == "orpo":
            assert config is not None
            return asked, rows, judge_odds(engine, rows, config.train.orpo_beta, progress)
        if asked.loss != "dpo":
            found = evaluate(
                model,
                rows,
                engine=engine,
                metrics=asked.metrics,
                tokenizer=tokenizer,
                stop=asked.stop,
                max_new_tokens=asked.max_new_tokens,
                progress=progress,
            )
            return asked, rows, found
        scores = engine.scores(rows, progress=progress)
    assert config is not None
    del model, engine  # one model in memory
    # Pairs are judged by their scores in what the run began on.
    model, _ = load_run_or_model(open_run(run_or_model).with_rows.parent, dtype=dtype)
    with Engine(to_accelerator(model), speedups=speedups, training=False) as engine:
        reference = engine.scores(rows, progress=progress)
    return asked, rows, judge_pairs(rows, scores, reference, config.train.dpo_beta)


def _need_start(run_or_model: Address) -> None:
    """Raise RunError for an export, of which nobody knows what its pairs are judged by."""
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        rule = "pairs are judged by what their stage began on, which a run has"
        raise RunError(rule, f"an export, {run_or_model}", "score the run, or name a task")


def rows_to_score(
    run_or_model: Address,
    task: Task | None = None,
    *,
    data: str | None = None,
    split: str = "validation",
    limit: int | None = None,
) -> tuple[Encode, Task | None]:
    """Find rows as `evaluate_task` names them; return what tokenises them, and their task."""
    config = config_of(run_or_model)
    own = None if config is None else config.data
    own_task = None
    if task is None and own is not None and own.task:
        try:
            own_task = load_task(own.task)
        except ConfigError as error:  # an export knows its task file by the last part of its path
            error.args = (f"{error}, or name the task file by --task",)
            raise
    asked = own_task if task is None and data is not None else task
    if asked is None:
        return _own_rows(run_or_model, config, data, split, limit), own_task
    source = task_split_source(asked, data, split, limit)
    return partial(_rows_of_task, asked, source, own), asked


def _write_predictions(file: Path, found: Evaluation) -> None:
    make_folder(file.parent)
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in found.predictions]
    write_text(file, "".join(lines))


def _rows_of_task(
    task: Task, source: Source, config: DataConfig | None, tokenizer: Any, context: int
) -> tuple[Task, Sequence[Example]]:
    return task, encode_split(task, source, tokenizer, context, config)


def _own_rows(
    run: Address, whole: RunConfig | None, data: str | None, split: str, limit: int | None
) -> Encode:
    """Find a run's own rows, or those of a file in its format; return what tokenises them."""
    config = whole.data if whole is not None else DataConfig(train=data or "")
    loss = whole.train.loss if whole is not None else None
    if split not in SPLITS:
        raise ConfigError(
            f"`split` of a run's own rows must be one of {', '.join(SPLITS)} (got {split!r}); name "
            "one, or a task"
        )
    from_files = config.task is None or config.train is not None
    if from_files and data is None and not getattr(config, split):
        raise RunError(
            f"a run scored on its own rows must have some (got no data.{split} in the config of "
            f"{run}); name another split, or a file as data, or take --matrix (kept rows)"
        )
    if data is not None:
        given: dict[str, Any] = {"train": data, "num_train": None, "validation": None, "test": None}
        given |= {split: data, f"num_{split}": limit}  # the run's own files may be gone
        config = config.model_copy(update=given)
        find_source(data, split)  # before the model is loaded
    bound, earlier = None, dict[str, Kept]()
    if data is None and (config.holds_out or split == "train"):
        bound, earlier = divided_by(run)
    if data is None and from_files and not (config.holds_out or earlier or config.shots):
        counts = [n for n in (getattr(config, f"num_{split}"), limit) if n is not None]
        config = config.model_copy(update={f"num_{split}": min(counts, default=None)})

    def encode(tokenizer: Any, context: int) -> tuple[Splits, Sequence[Example]]:
        try:
            if data is None and whole is not None:
                _warn_of_change(run, whole.data, split)
            splits = prepare_splits(
                config, tokenizer, context, None, split, loss, earlier=earlier, bound=bound
            )
        except DataError as error:
            if data is None and open_run(run).keepers:
                error.args = (f"{error}, or score those that the run kept: --matrix",)
            raise
        return splits, getattr(splits, split)[:limit]

    return encode


def _warn_of_change(run: Address, data: DataConfig, split: str) -> None:
    """Warn of a task or rows whose content is not what the run was trained with."""
    known = open_run(run).with_rows.configured.training.sources
    rows = "train" if split == "validation" and data.holds_out else split
    named = named_sources(data)
    for key in ("data.task", f"data.{rows}"):
        now = [source_digest(key, each.path, data) for each in named.get(key, ())]
        if now != known.get(key, now):
            logger.warning(
                "%s has changed since the run was trained (%s): the scores are of what is there "
                "now; --matrix scores the rows that the run kept",
                key,
                ", ".join(each.path for each in named[key]),
            )

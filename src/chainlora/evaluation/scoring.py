"""Score a run or a model: on a task, a file of rows, or the rows in the run's config."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from chainlora.config.schema import DataConfig, RunConfig
from chainlora.data.examples import Example
from chainlora.data.kept import SPLITS, Kept
from chainlora.data.sources import find_source
from chainlora.data.splits import (
    Splits,
    encode_split,
    named_sources,
    prepare_splits,
    source_digest,
)
from chainlora.data.tasks import Task, load_task
from chainlora.engine.engine import Engine, ScoringProgress, Speedups
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.evaluation.evaluate import Evaluation, evaluate
from chainlora.evaluation.generation import to_accelerator
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs
from chainlora.evaluation.training_rows import config_of, divided_by
from chainlora.files import check_writable, make_folder, write_text
from chainlora.models.text_config import context_length
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.exported import load_run_or_model, sources_of_export
from chainlora.runs.paths import is_run, need_apart
from chainlora.runs.state import OpenState
from chainlora.showing import Shown

logger = logging.getLogger(__name__)

Encode = Callable[[Any, int], tuple[Task | Splits, Sequence[Example]]]
"""Returns a task (or splits, with its metrics) and tokenised rows; called with the tokenizer and
the model's context in tokens."""


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
    """Score a run or a model on rows.

    Args:
        run_or_model: a run or a state (`open_run`), a model (`load_model`), or an export. An
            adapter is scored on the base that it names, with rows read as in its run.
        task: a task or its file, for `data`. A run reads its own task as in training, with the same
            length limit, truncation and demonstrations. By default the run's own rows are scored.
        data: a file, folder or Hub dataset of rows; by default those of the run. Without a task,
            they are rows of the run's task, or of its format; for a model, of the default format.
        split: train, validation or test.
        limit: score only the first rows, in file order.
        num_links: use only the first links of a run.
        dtype: dtype of the weights; by default that of the run, or float32.
        predictions: a file to write predictions to, one JSON line per row.
        speedups: ``off`` runs plain transformers: no packing, no fast paths, one thread.
        progress: called as ``progress(rows_done, rows)``.

    Returns:
        A mapping with ``task``, ``split``, the number of ``rows`` and ``metrics``; ``stage`` names
        the stage of the rows, in a run with several.

    Raises:
        ConfigError: an invalid argument, an unknown task, or a metric that does not fit the rows.
        DataError: rows that cannot be read.
        RunError: the run is damaged, or has no such rows.
    """
    if limit is not None and limit < 1:
        raise ConfigError("`limit` must be at least 1", limit, "leave it out for all rows")
    if task is None and data is None:
        _need_own_rows(run_or_model)
    data = None if data is None else expanduser(data)
    if predictions is not None:
        predictions = Path(predictions).expanduser()
        check_writable(predictions.parent)  # before the long work
        need_apart(predictions, "predictions")
    if isinstance(task, str | Path):
        task = load_task(task)
    config = config_of(run_or_model)
    encode, row_task = rows_to_score(run_or_model, task, data=data, split=split, limit=limit)
    if row_task is None and config is not None and config.train.loss == "dpo":
        _need_reference(run_or_model)
    keys: Any = {"num_links": num_links, "dtype": dtype, "speedups": speedups}
    settings, rows, evaluation = _scored(run_or_model, config, encode, progress, **keys)
    if predictions is not None:
        _write_predictions(Path(predictions), evaluation)
    metrics = dict(evaluation.metrics)
    if settings.metric in INDEX_METRICS:
        metrics["majority"] = majority_rate(rows, settings.metric)
    is_file = data is not None and not Path(data).is_dir()
    name = row_task and row_task.name
    result: dict[str, Any] = {"task": name, "split": data if is_file else split}
    if task is None and data is None and len((state := open_run(run_or_model)).stages) > 1:
        result = {"stage": state.with_rows.configured.key} | result
    return Shown(result | {"rows": evaluation.num_rows, "metrics": metrics})


def _need_own_rows(run_or_model: Address) -> None:
    """Raise ConfigError for a model or an export, which has no rows of its own."""
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        got = f"{run_or_model} without `task` and `data`"
        raise ConfigError("only a run has rows of its own to score", got, "give one of them")


def _scored(
    run_or_model: Address,
    config: RunConfig | None,
    encode: Encode,
    progress: ScoringProgress | None,
    *,
    num_links: int | None,
    dtype: Any,
    speedups: Speedups,
) -> tuple[Task | Splits, Sequence[Example], Evaluation]:
    """Load a run or a model; return the task or splits, the tokenised rows, and their scores."""
    model, tokenizer = load_run_or_model(run_or_model, num_links=num_links, dtype=dtype)
    settings, rows = encode(tokenizer, context_length(model))
    with Engine(to_accelerator(model), speedups=speedups, training=False) as engine:
        if settings.loss == "orpo":
            assert config is not None
            return settings, rows, judge_odds(engine, rows, config.train.orpo_beta, progress)
        if settings.loss != "dpo":
            asked: Any = {"stop": settings.stop, "max_new_tokens": settings.max_new_tokens}
            asked |= {"metrics": settings.metrics, "tokenizer": tokenizer, "progress": progress}
            return settings, rows, evaluate(model, rows, engine=engine, **asked)
        scores = engine.scores(rows, progress=progress)
    assert config is not None
    del model, engine  # keep only one model in memory
    # DPO: the reference is the state that the stage began on
    model, _ = load_run_or_model(open_run(run_or_model).with_rows.parent, dtype=dtype)
    with Engine(to_accelerator(model), speedups=speedups, training=False) as engine:
        reference = engine.scores(rows, progress=progress)
    return settings, rows, judge_pairs(rows, scores, reference, config.train.dpo_beta)


def _write_predictions(file: Path, evaluation: Evaluation) -> None:
    make_folder(file.parent)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions]
    write_text(file, "".join(lines))


def _need_reference(run_or_model: Address) -> None:
    """Raise RunError for pairs of an export, which does not have the reference of DPO."""
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        rule = "pairs need the model before their stage as a reference, which only a run has"
        raise RunError(rule, f"an export, {run_or_model}", "score the run, or name a task")


def rows_to_score(
    run_or_model: Address,
    task: Task | None = None,
    *,
    data: str | None = None,
    split: str = "validation",
    limit: int | None = None,
) -> tuple[Encode, Task | None]:
    """Find the rows of `evaluate_task`; return a function that tokenises them, and their task."""
    config = config_of(run_or_model)
    data_config = None if config is None else config.data
    run_task = None
    if task is None and data_config is not None and data_config.task:
        try:
            run_task = load_task(data_config.task)
        except ConfigError as error:  # an export has only the last part of the path
            error.args = (f"{error}, or name the task file by --task",)
            raise
    chosen = run_task if task is None and data is not None else task
    if chosen is None:
        return _own_rows(run_or_model, config, data, split, limit), run_task
    if data is None:
        rule, remedy = f"task {chosen.name!r} needs rows", "name a file or folder of them as data"
        raise ConfigError(rule, "none", remedy)
    source = find_source(data, split, limit)

    def encode(tokenizer: Any, context: int) -> tuple[Task, Sequence[Example]]:
        if task is None and data_config is not None:
            _warn_of_change(run_or_model, data_config, "train" if data_config.shots else None)
        return chosen, encode_split(chosen, source, tokenizer, context, data_config)

    return encode, chosen


def _own_rows(
    run: Address, run_config: RunConfig | None, data: str | None, split: str, limit: int | None
) -> Encode:
    """Find a run's own rows, or a file in its format; return a function that tokenises them."""
    config = run_config.data if run_config is not None else DataConfig(train=data or "")
    loss = run_config.train.loss if run_config is not None else None
    if split not in SPLITS:
        rule = f"`split` of a run's own rows must be one of {', '.join(SPLITS)}"
        raise ConfigError(rule, repr(split), "name one, or a task")
    bound, earlier = None, dict[str, Kept]()
    if data is not None:  # the only rows to read: the run's own files may be gone
        find_source(data, split)  # raises before the model is loaded
        keys: dict[str, Any] = {"train": data, "num_train": None, "validation": None, "test": None}
        config = config.model_copy(update=keys | {split: data, f"num_{split}": limit})
    else:
        if not getattr(config, split):
            raise RunError(
                f"a run scored on its own rows must have some (got no data.{split} in the config "
                f"of {run}); name another split, or a file as data, or take --matrix (kept rows)"
            )
        if config.holds_out or split == "train":
            bound, earlier = divided_by(run)
        if not (config.holds_out or earlier or config.shots):
            counts = [n for n in (getattr(config, f"num_{split}"), limit) if n is not None]
            config = config.model_copy(update={f"num_{split}": min(counts, default=None)})

    def encode(tokenizer: Any, context: int) -> tuple[Splits, Sequence[Example]]:
        try:
            if data is None and run_config is not None:
                _warn_of_change(run, run_config.data, split)
            splits = prepare_splits(
                config, tokenizer, context, None, split, loss, earlier=earlier, bound=bound
            )
        except DataError as error:
            if data is None and open_run(run).keepers:
                error.args = (f"{error}, or score the kept rows: --matrix",)
            raise
        return splits, getattr(splits, split)[:limit]

    return encode


def _warn_of_change(place: Address, data: DataConfig, split: str | None) -> None:
    """Warn if the task of a run or an export, or rows of a split, have changed since training."""
    if isinstance(place, OpenState) or is_run(place):
        known = open_run(place).with_rows.configured.training.sources
    else:
        known = sources_of_export(place)
    rows = "train" if split == "validation" and data.holds_out else split
    sources = named_sources(data)
    for key in ("data.task", f"data.{rows}"):
        digests = [source_digest(key, source.path, data) for source in sources.get(key, ())]
        if digests != known.get(key, digests):
            logger.warning(
                "%s has changed since the run was trained (%s): the scores are for the current "
                "content; --matrix scores the rows that the run kept",
                key,
                ", ".join(source.path for source in sources[key]),
            )

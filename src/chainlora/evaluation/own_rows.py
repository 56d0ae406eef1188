"""Score a run on the rows that it was configured with, or a run or model on any file of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainlora.config.schema import DataConfig
from chainlora.data.splits import SPLITS, prepare_splits
from chainlora.data.tasks import Task, load_task
from chainlora.engine.engine import Speedups
from chainlora.errors import ConfigError, RunError
from chainlora.evaluation.scoring import evaluate_task, score_rows
from chainlora.files import check_writable
from chainlora.models.text_config import context_length
from chainlora.runs.opening import load_run_or_model
from chainlora.runs.reading import RunReader


def evaluate_rows(
    run_or_model: str | Path,
    task: Task | None = None,
    *,
    data: str | None = None,
    split: str = "validation",
    limit: int | None = None,
    num_links: int | None = None,
    dtype: str | None = None,
    predictions: str | Path | None = None,
    speedups: Speedups = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return what `evaluate_task` returns; without a `task`, of the run's own rows.

    They are read as in training, so that the scores are those of the run.

    `data` names other rows than those: of the run's task if it has one, else of its format. A model
    that is no run scores rows of a file by the default of `data.format`.
    """
    own = _own_data(run_or_model, data)
    if task is None and data is not None and own.task is not None:
        task = load_task(own.task)
    if task is not None:
        return evaluate_task(
            run_or_model,
            task,
            data=data,
            split=split,
            limit=limit,
            num_links=num_links,
            dtype=dtype,
            predictions=predictions,
            speedups=speedups,
            progress=progress,
        )
    if predictions is not None:
        check_writable(Path(predictions).parent)  # before the work
    _check_split(own, split, data, run_or_model)
    if own.task is None or own.train is not None:
        own = own.model_copy(update=_changes(own, split, data, limit))
    model, tokenizer = load_run_or_model(run_or_model, num_links=num_links, dtype=dtype)
    splits = prepare_splits(own, tokenizer, context_length(model), to_score=split)
    rows = getattr(splits, split)[:limit]
    count, metrics = score_rows(
        model,
        tokenizer,
        rows,
        splits,
        predictions=predictions,
        speedups=speedups,
        progress=progress,
    )
    name = load_task(own.task).name if own.task is not None else None
    shown = data if data is not None and not Path(data).is_dir() else split
    return {"task": name, "split": shown, "rows": count, "metrics": metrics}


def _own_data(run_or_model: str | Path, data: str | None) -> DataConfig:
    """Return what a run says of its rows; of a model or a saved chain, that they are `data`."""
    if (Path(run_or_model) / "chain.json").is_file():
        reader = RunReader(run_or_model)
        if reader.manifest().has_run:
            return reader.config().data
    return DataConfig(train=data or "")


def _changes(own: DataConfig, split: str, data: str | None, limit: int | None) -> dict[str, Any]:
    """Return the keys of `data` that say which rows of a file are read."""
    if data is not None:
        return {split: data, f"num_{split}": limit}
    known = getattr(own, f"num_{split}")
    counts = [count for count in (known, limit) if count is not None]
    return {f"num_{split}": min(counts, default=None)}


def _check_split(own: DataConfig, split: str, data: str | None, run: str | Path) -> None:
    if split not in SPLITS:
        raise ConfigError(
            f"`split` of a run's own rows must be one of {', '.join(SPLITS)} (got {split!r}); name "
            "one, or a task"
        )
    from_files = own.task is None or own.train is not None
    if from_files and data is None and not getattr(own, split):
        raise RunError(
            f"a run scored on its own rows must have some (got no data.{split} in the config of "
            f"{run}); name another --split, or a file as --data"
        )

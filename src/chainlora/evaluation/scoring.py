"""Score a run or a model on a task: from a name to metrics, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from chainlora.data.examples import Example
from chainlora.data.splits import Splits, encode_split, task_split_source
from chainlora.data.tasks import Task
from chainlora.engine.engine import Engine, Speedups
from chainlora.evaluation.evaluate import evaluate, write_predictions
from chainlora.evaluation.metrics import INDEX_METRICS, majority_rate
from chainlora.files import check_writable
from chainlora.models.loading import load_model
from chainlora.models.text_config import context_length
from chainlora.runs.export import load_run
from chainlora.runs.reading import RunReader


def evaluate_task(
    run_or_model: str | Path,
    task: Task,
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
    """Return `task`, `split`, `rows` and `metrics` of a run directory's chain, or of any model.

    The first `limit` rows of the split are scored, in file order, from the folder or file `data` or
    the Hub. A run reads its own task as it did in training: length, truncation and demonstrations.
    `num_links` takes a run's chain as it was then; `dtype` defaults to the run's own, or float32.
    `predictions` names a file for one JSON line a row. ``speedups="off"`` runs plain transformers:
    no packing, no faster forwards, one thread.
    """
    if predictions is not None:
        check_writable(Path(predictions).parent)  # before the work
    path_of_run = Path(run_or_model)
    run = RunReader(path_of_run) if (path_of_run / "chain.json").is_file() else None
    rows = task_split_source(task, data, split, limit)
    if run is not None:
        model, tokenizer = load_run(run_or_model, num_links=num_links, dtype=dtype, as_trained=True)
    else:
        model, tokenizer = load_model(run_or_model, getattr(torch, dtype or "float32"))
    own = run.config().data if run is not None and run.manifest().has_run else None
    examples = encode_split(task, rows, tokenizer, context_length(model), own)
    count, metrics = score_rows(
        model,
        tokenizer,
        examples,
        task,
        predictions=predictions,
        speedups=speedups,
        progress=progress,
    )
    return {"task": task.name, "split": split, "rows": count, "metrics": metrics}


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    asked: Task | Splits,
    *,
    predictions: str | Path | None,
    speedups: Speedups,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, float]]:
    """Return the number of rows and their metrics, as a task or a run's rows ask for them."""
    with Engine(model, speedups=speedups, training=False) as engine:
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
    if predictions is not None:
        write_predictions(predictions, found)
    metrics = dict(found.metrics)
    if asked.metric in INDEX_METRICS:
        metrics["majority"] = majority_rate(rows)
    return found.num_rows, metrics

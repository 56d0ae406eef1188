"""Loss against steps: how often a run is evaluated on its way, and what that found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.data.tasks import load_task


def with_curve(config: RunConfig, num_points: int) -> RunConfig:
    """Return the config with evaluations at some `num_points` steps, where it leaves that open.

    Evaluations change no weight, so a cell's id is that of the config without them. A config that
    decides by them (`keep_best`, `early_stop`), sets its own `eval_every` or says
    `eval_at_knots: false` is left alone.
    """
    train, steps = config.train, training_steps(config)
    decided = train.eval_every or train.keep_best or train.early_stop or not train.eval_at_knots
    if not num_points or decided or not steps or (config.chain.tune == "full" and steps < 2):
        return config
    every = max(1, round(steps / num_points))
    return config.model_copy(update={"train": train.model_copy(update={"eval_every": every})})


def training_steps(config: RunConfig) -> int | None:
    """Return the steps of a run, as far as its config tells; None where only the rows could."""
    chain, train = config.chain, config.train
    if chain.steps is not None:
        return sum(chain.steps)
    rows = _num_rows(config)
    if chain.epochs is None or rows is None:
        return None
    per_epoch = math.ceil(rows / (train.batch_size * train.gradient_accumulation))
    return round(sum(chain.epochs) * per_epoch)


def _num_rows(config: RunConfig) -> int | None:
    data = config.data
    if data.num_train is not None:
        return data.num_train
    if data.train is not None:
        path = Path(data.train)
        return _count_lines(path) if path.suffix == ".jsonl" and path.is_file() else None
    return load_task(data.task).sampling.train.count(data.sampling) if data.task else None


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def curve(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations of a run in order: step, link, where, and the validation metrics."""
    kept = ("event", "seconds")
    return [
        {key: value for key, value in record.items() if key not in kept}
        for record in records
        if record["event"] == "eval"
    ]

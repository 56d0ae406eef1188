"""A run while it runs: all that its loop holds, and how it is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.data.splits import Splits
from chainlora.engine.hidden_states import Path
from chainlora.engine.threads import Lanes
from chainlora.evaluation.evaluate import Evaluation
from chainlora.runs.directory import Progress, RunDirectory
from chainlora.training.plan import Plan

Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class Run:
    """All that a run holds while it runs."""

    config: RunConfig
    plan: Plan
    splits: Splits
    chain: Chain
    tokenizer: Any
    accelerator: Accelerator
    path: Path
    lanes: Lanes
    directory: RunDirectory | None
    progress: Progress
    base: dict[str, Any]
    listener: Listener
    best_link: Link | None = None
    optimizer: torch.optim.Optimizer | None = None
    last_scored: Evaluation | None = (
        None  # of the model as it is now; None once it may have changed
    )
    kept_moments: dict[str, Tensor] | None = None  # ReLoRA: what the last link's optimizer knew


def record(run: Run, values: dict[str, Any]) -> None:
    """Send a record to ``metrics.jsonl``, the listener and the trackers."""
    if run.directory is not None:
        run.directory.record(values, run.progress)
    run.listener(values)
    if run.config.train.trackers:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        run.accelerator.log(
            {f"{values['event']}/{k}": v for k, v in numbers.items()}, step=values["step"]
        )


def write_manifest(run: Run) -> None:
    """Write ``chain.json`` for the links there are."""
    if run.directory is not None:
        run.directory.write_manifest(run.base, run.config, run.chain.links, run.progress)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as ``{"train.lr": "0.001", …}``, as trackers take it."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return flat

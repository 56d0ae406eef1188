"""What a finished run cost and reached: from its run directory to the fields of a cell's result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainlora.config.schema import RunConfig
from chainlora.data.tasks import load_task
from chainlora.experiments.execution.checksums import sealed
from chainlora.experiments.execution.costs import run_costs, tokens_by_link
from chainlora.experiments.execution.curves import curve
from chainlora.experiments.execution.digests import BASE_VERSION, digest
from chainlora.experiments.execution.environment import accelerator, base_file, commit
from chainlora.experiments.execution.records import FORMAT


def summarise(config: RunConfig, result: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Return the fields of a cell (see `records.py`) from what `train` returned and wrote."""
    records = read_metrics(run)
    steps = [record for record in records if record["event"] == "step"]
    start_tokens = tokens_by_link(
        [record for record in records if record["event"] == "gradient"], config
    )
    metrics = result["metrics"]
    split = "test" if "test" in metrics else "validation"
    metric = task_metric(config)
    best = result.get("best")
    fields = {
        "format": FORMAT,
        "status": "done",
        "metric": metric,
        "score_split": split,
        "score": metrics.get(split, {}).get(metric),
        "validation": metrics.get("validation"),
        "test": metrics.get("test"),
        "validation_best": None if best is None else best["value"],
        "majority": metrics.get(split, {}).get("majority"),
        "train_loss": last_loss(steps),
        "steps": result["steps"],
        "tokens": result["tokens"] + sum(start_tokens),
        "start_tokens": sum(start_tokens),
        "rows": result.get("rows"),
        **run_costs(config, result, run, steps, start_tokens),
        "wall_s": result["wall_s"],
        "peak_rss_mb": result["peak_memory_mb"],
        "ranks": list(config.chain.ranks),
        "link_steps": _link_steps(steps, len(config.chain.ranks)),
        "link_scores": [
            record.get(metric)
            for record in records
            if record["event"] == "eval" and record.get("where") == "knot"
        ],
        "curve": curve(records),
        "config": compact_config(config),
        "rows_digest": digest(result["rows_digest"], 1),
        "base_fingerprint": digest(result["base_fingerprint"], BASE_VERSION),
        "base_file": base_file(config.model),
        "versions": result["versions"],
        "commit": commit(),
        "hardware": result["hardware"] | accelerator(result["hardware"]["device"]),
    }
    return sealed(fields)


def diverged(config: RunConfig, message: str) -> dict[str, Any]:
    """Return the fields of a cell whose loss stopped being finite: a result while tuning."""
    fields = {
        "format": FORMAT,
        "status": "diverged",
        "metric": task_metric(config),
        "message": message,
        "ranks": list(config.chain.ranks),
        "config": compact_config(config),
        "commit": commit(),
    }
    return sealed(fields)


def compact_config(config: RunConfig) -> dict[str, Any]:
    """Return the config's values other than the defaults, without the places of this machine."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree.pop("output", None)
    tree["data"].pop("dir", None)
    return tree


def task_metric(config: RunConfig) -> str:
    """Return the metric a run is judged by: the task's own, the loss for a user's files."""
    return load_task(config.data.task).metric if config.data.task is not None else "loss"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run's ``metrics.jsonl``; none if it has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def last_loss(steps: list[dict[str, Any]]) -> float | None:
    """Return the mean training loss over the last tenth of the steps; None if there were none."""
    tail = steps[-max(1, len(steps) // 10) :]
    return sum(step["loss"] for step in tail) / len(tail) if tail else None


def _link_steps(steps: list[dict[str, Any]], num_links: int) -> list[int]:
    return [sum(step["link"] == link for step in steps) for link in range(num_links)]

"""Results as records: one JSON line a cell, enough to make every table and figure from.

    {"format": 2, "kind": "experiment", "name": …, "methods": …, "pairs": …}       the first line
    {"format": 2, "kind": "choice", "task": …, "chosen": …, "tried": […]}    a task and method tuned
    {"format": 2, "kind": "cell", "cell": id, "phase": …, "task": …, "seed": …, …}          a cell

A cell line is a cell's labels and its ``result.json``:

    status, metric, score_split, score        done or diverged; judged by what, on which rows
    validation, test, majority                metrics of the final model; share of one label
    validation_best                           best value met at knots and evaluations
    curve                                     validation metrics along the run: step, link, where, …
    train_loss                                mean over the last tenth of the steps
    steps, tokens, start_tokens, rows         start_tokens: those that gradient starts read
    flops, flops_6nd, wall_s, peak_rss_mb     counted, by the paper's rule; time and memory
    trainable_parameters, ranks, link_steps, link_scores
    config                                    values other than the defaults
    rows_digest, base_fingerprint             ``version:value`` (digests.py)
    base_file                                 the GGUF file that the base was dequantised from
    versions, commit, hardware                packages, commit of this one, kernels, threads
    checksum                                  of all of it but the labels
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chainlora.experiments.design.expansion import Cell
from chainlora.experiments.design.schema import Experiment
from chainlora.files import write_text

FORMAT = 2
LABELS = ("kind", "cell", "phase", "task", "method", "seed", "point")


def experiment_line(experiment: Experiment) -> dict[str, Any]:
    """Return the first line: what a report must know of the experiment beside its cells."""
    return {
        "format": FORMAT,
        "kind": "experiment",
        "name": experiment.name,
        "description": experiment.description,
        "model": experiment.base.get("model"),
        "tasks": list(experiment.tasks),
        "methods": {name: experiment.describe_method(name) for name in experiment.methods},
        "pairs": [list(pair) for pair in experiment.pairs],
        "primary": list(experiment.primary) if experiment.primary else None,
        "gap": list(experiment.gap) if experiment.gap else None,
        "seeds": list(experiment.seeds),
        "seed_keys": list(experiment.seed_keys),
        "tuning_seeds": list(experiment.tuning_seeds),
        "grid": {k: list(v) for k, v in experiment.tune.grid.items()},
        "extend": dict(experiment.tune.extend),
        "figures": list(experiment.figures),
        "paper": experiment.paper,
    }


def choice_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a choice."""
    return {"format": FORMAT, "kind": "choice"} | dict(record)


def cell_line(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a cell from its labels and its ``result.json``."""
    values = ("cell", cell.id, cell.phase, cell.task, cell.method, cell.seed, dict(cell.point))
    labels = {"format": FORMAT} | dict(zip(LABELS, values, strict=True))
    return labels | {key: value for key, value in result.items() if key != "format"}


def result_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``result.json`` that a cell's line was made from."""
    return {key: value for key, value in line.items() if key not in LABELS}


def write_results(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a results file atomically, one compact JSON object a line."""
    text = "".join(
        json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines
    )
    write_text(path, text)

"""Results as records: one JSON line a cell, enough to make every table and figure from.

    {"format": 1, "kind": "experiment", "name": …, "methods": …, "pairs": …}      the first line
    {"format": 1, "kind": "choice", "task": …, "method": …, "chosen": …, "tried": […]}   one a task
    and method tuned {"format": 1, "kind": "cell", "cell": id, "phase": …, "task": …, "method": …,
    "seed": …, …}   one a cell

A cell line has: `status` (done, diverged), `metric` and `score_split`; `validation`, `test`
(metrics of the final model: score, loss, majority rate); `validation_best` (best value met at knots
and evaluations); `train_loss` (mean over the last tenth of the steps); `steps`, `tokens` (with
`start_tokens`, those that gradient starts read), `rows`; `flops` (counted) and `flops_6nd`;
`wall_s`, `peak_rss_mb`; `trainable_parameters`; `ranks`, `link_steps`, `link_scores`; `config`
(values other than the defaults); `rows_digest` and `base_fingerprint`, of the rows drawn and the
weights trained on; `versions`, `hardware`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainlora.errors import RunError
from chainlora.experiments.design.expansion import Cell
from chainlora.experiments.design.schema import Experiment

FORMAT = 1
_LABELS = ("kind", "cell", "phase", "task", "method", "seed", "point")


@dataclass(frozen=True)
class Results:
    """What a results file holds."""

    experiment: dict[str, Any]
    choices: list[dict[str, Any]]
    cells: list[dict[str, Any]]

    @property
    def finals(self) -> list[dict[str, Any]]:
        """Cells of the final phase that trained to their end."""
        return [
            cell for cell in self.cells if cell["phase"] == "final" and cell["status"] == "done"
        ]


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
        "seeds": list(experiment.seeds),
        "seed_keys": list(experiment.seed_keys),
        "tuning_seeds": list(experiment.tuning_seeds),
        "grid": {k: list(v) for k, v in experiment.tune.grid.items()},
        "figures": list(experiment.figures),
        "paper": experiment.paper,
    }


def cell_line(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a cell from its labels and its ``result.json``."""
    values = ("cell", cell.id, cell.phase, cell.task, cell.method, cell.seed, dict(cell.point))
    labels = {"format": FORMAT} | dict(zip(_LABELS, values, strict=True))
    return labels | {key: value for key, value in result.items() if key != "format"}


def result_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``result.json`` that a cell's line was made from."""
    return {key: value for key, value in line.items() if key not in _LABELS}


def write_results(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a results file atomically, one compact JSON object a line."""
    text = "".join(
        json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines
    )
    write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a kill at any instant leaves the old one or the new one."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def read_results(path: str | Path) -> Results:
    """Read a results file, or ``results.jsonl`` in a folder.

    Raises RunError: no such file, a line that is not JSON, or a format of another version.
    """
    path = Path(path)
    path = path / "results.jsonl" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"results file must be readable (got {path}: {error.strerror}); it is what `chainlora "
            "experiment run` writes"
        ) from None
    lines = [
        _read_line(path, number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    heads = [line for line in lines if line["kind"] == "experiment"]
    if len(heads) != 1:
        raise RunError(
            f"results file must have one line of kind experiment (got {len(heads)} in {path})"
        )
    return Results(heads[0], _of_kind(lines, "choice"), _of_kind(lines, "cell"))


def _read_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RunError(
            f"results file must hold one JSON object a line (got {path} line {number}: {error})"
        ) from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise RunError(
            f"results must be of format {FORMAT} (got {got!r} in {path} line {number}); read "
            "them with the "
            "version of chainlora that wrote them, or run the experiment again"
        )
    if value.get("kind") not in ("experiment", "choice", "cell"):
        raise RunError(
            "a line of results must be of kind experiment, choice or cell (got "
            f"{value.get('kind')!r} in "
            f"{path} line {number}); run the experiment again"
        )
    return value


def check_alike(cells: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where cells of the same data or model settings are of different rows or
    weights.

    A cell's id knows places by name only; what was found there is in its `rows_digest` and
    `base_fingerprint` (missing in results older than these). A number in front of a digest is the
    version of its definition; digests of other versions say nothing of each other.
    """
    first: dict[tuple[str, str, str], tuple[str, str]] = {}
    for cell in cells:
        config = cell["config"]
        data = {
            k: v
            for k, v in config.get("data", {}).items()
            if k not in ("shots", "max_length", "truncation")
        }
        model = {"model": config.get("model"), "dtype": config.get("train", {}).get("dtype")}
        for field, what, settings in (
            ("rows_digest", "rows", data),
            ("base_fingerprint", "base model", model),
        ):
            found = cell.get(field)
            if found is None:
                continue
            name = f"{cell['task']} {cell['method']} seed {cell['seed']}"
            version = found.rpartition(":")[0]
            key = (field, version, json.dumps(settings, sort_keys=True))
            before, of = first.setdefault(key, (found, name))
            if found != before:
                raise RunError(
                    f"cells of one experiment must be of the same {what} (got {before} in {of}, "
                    f"{found} in "
                    f"{name}): they have changed in between; use a new output folder, without "
                    "--reuse"
                )


def _of_kind(lines: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]

"""Results: one JSON object a line, enough to make every table and figure from.

    {"format": 2, "kind": "experiment", "name": …, "methods": …, "pairs": …}       the first line
    {"format": 2, "kind": "choice", "task": …, "chosen": …, "tried": […]}    a task and method tuned
    {"format": 2, "kind": "cell", "cell": id, "phase": …, "task": …, "seed": …, …}          a cell

A cell's line is its labels and its ``result.json``:

    status, metric, score_split, score        done or diverged; judged by what, on which rows
    validation, test, majority                metrics of the final model; share of one label
    validation_best                           best value met at knots and evaluations
    curve                                     validation metrics along the run: step, link, where, …
    train_loss                                mean over the last tenth of the steps
    steps, tokens, start_tokens, rows         start_tokens: those that gradient starts read
    link_steps, link_tokens, scored_tokens    what benchmarks/paper counts operations from
    wall_s, peak_rss_mb                       time and memory
    trainable_parameters, ranks, link_scores
    config                                    values other than the defaults
    rows_digest, base_fingerprint             what was trained on; compared between cells
    base_file                                 the GGUF file that the base was dequantised from
    versions, commit, hardware                packages, commit of this one, kernels, threads
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chainlora.config.messages import problems
from chainlora.errors import RunError
from chainlora.experiments.expansion import Cell
from chainlora.experiments.lines import model_of
from chainlora.experiments.schema import Experiment
from chainlora.files import write_text

logger = logging.getLogger(__name__)

FILE = "results.jsonl"
FORMAT = 2
READABLE = (1, FORMAT)
LABELS = ("kind", "cell", "phase", "task", "method", "seed", "point")
_REBUILD = "remove the line: `chainlora experiment run` writes it again from its cell"


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


# --- writing ---


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


# --- reading ---


def read_results(path: str | Path) -> Results:
    """Read a results file, or ``results.jsonl`` in a folder.

    A last line that is torn is left out, with a warning. Raises RunError: no such file, another
    line that is not whole, or a format of another version.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    lines = _read_lines(path)
    heads = [line for line in lines if line["kind"] == "experiment"]
    if len(heads) != 1:
        raise RunError(
            f"results file must have one line of kind experiment (got {len(heads)} in {path}); "
            f"{_REBUILD}"
        )
    of_kind = {kind: [x for x in lines if x["kind"] == kind] for kind in ("choice", "cell")}
    return Results(heads[0], of_kind["choice"], of_kind["cell"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunError(
            f"results file must be readable (got {path}: {error.strerror}); it is what "
            "`chainlora experiment run` writes"
        ) from None
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for number, line in numbered:
        where = f"{path} line {number}"
        try:
            value = parse_object(line)
        except ValueError as error:
            if number > 1 and number == numbered[-1][0]:
                logger.warning("%s is torn and left out (%s)", where, error)
                break
            raise RunError(
                f"results must hold JSON objects (got {where}: {error}); {_REBUILD}"
            ) from None
        found.append(_checked(where, value))
    return found


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError: it is none."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates can be read, not written
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def check_format(where: str, value: Mapping[str, Any]) -> None:
    """Raise RunError for a format of another version."""
    if value.get("format") not in READABLE or value.get("format") is True:
        raise RunError(
            f"results must be of format 1 or {FORMAT} (got {value.get('format')!r} in {where}); "
            "read them with the version of chainlora that wrote them, or run the experiment again"
        )


def _checked(where: str, line: dict[str, Any]) -> dict[str, Any]:
    model = model_of(line)
    if model is None:
        raise RunError(
            "a line of results must be of kind experiment, choice or cell "
            f"(got {line.get('kind')!r} in {where}); {_REBUILD}"
        )
    check_format(where, line)
    try:
        model.model_validate(line)
    except ValidationError as error:
        raise RunError(
            f"a line of results must have what reports read ({problems(error, model)}; got "
            f"{where}); {_REBUILD}"
        ) from None
    return line


def results_by_id(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Return the results of cells in results files, by id. Raises RunError: damaged."""
    return {line["cell"]: result_of(line) for path in paths for line in read_results(path).cells}


# --- what goes together ---


def check_alike(cells: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where cells of the same settings are of different rows or weights.

    A cell's id knows places by name only; what was found there is in its digests (missing in the
    oldest results). A digest may name its definition, ``2:b903…``; others are not compared with it.
    """
    first: dict[tuple[str, str, str], tuple[str, str]] = {}
    for cell in cells:
        name = f"{cell['task']} {cell['method']} seed {cell['seed']}"
        for field, what, settings in _identities(cell):
            found = cell.get(field)
            if found is None:
                continue
            key = (field, found.rpartition(":")[0], settings)
            before, of = first.setdefault(key, (found, name))
            if found != before:
                raise RunError(
                    f"cells of one experiment must be of the same {what} (got {before} in {of}, "
                    f"{found} in {name}): they have changed in between; use a new output folder, "
                    "without --reuse"
                )


def _identities(cell: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (field, what it names, the settings that decide it)."""
    config = cell["config"]
    cuts = ("max_length", "truncation")  # rows are cut after they are digested
    data = {k: v for k, v in config.get("data", {}).items() if k not in cuts}
    model = {"model": config.get("model"), "dtype": config.get("train", {}).get("dtype")}
    return [
        ("rows_digest", "rows", json.dumps(data, sort_keys=True)),
        ("base_fingerprint", "base model", json.dumps(model, sort_keys=True)),
    ]

"""Results: one JSON object a line, enough to make every table and figure from.

    {"format": 2, "kind": "experiment", "name": …, "methods": …, "pairs": …}       the first line
    {"format": 2, "kind": "choice", "task": …, "chosen": …, "tried": […]}    a task and method tuned
    {"format": 2, "kind": "cell", "cell": id, "phase": …, "task": …, "seed": …, …}          a cell

A cell's line is its labels and its ``result.json``:

    status, metric, score_split, score        done or diverged; judged by what, on which rows
    validation, test, majority                metrics of the final model; share of one label
    curve                                     validation metrics along the run: step, link, where, …
    train_loss                                mean over the last tenth of the steps
    steps, tokens, start_tokens, rows         start_tokens: those that gradient starts read
    link_steps, link_tokens, scored_tokens    what benchmarks/paper counts operations from
    soft_knots                                how many were tied
    wall_s, peak_rss_mb                       time and memory
    trainable_parameters, ranks
    config                                    values other than the defaults
    stages, general                           of a sequence: scores of each stage's rows, right
                                              after it (own) and at the end; loss of general rows
    exported_rank, adapters                   of a sequence: the rank is None where it is full
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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from chainlora.errors import RunError
from chainlora_lab.expansion import Cell
from chainlora_lab.experiment import Experiment
from chainlora_lab.outputs import write_whole, wrong

logger = logging.getLogger(__name__)

FILE = "results.jsonl"
FORMAT = 2
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
        return self._final("done")

    @property
    def diverged(self) -> list[dict[str, Any]]:
        """Cells of the final phase whose loss stopped being finite."""
        return self._final("diverged")

    def _final(self, status: str) -> list[dict[str, Any]]:
        return [c for c in self.cells if c["phase"] == "final" and c["status"] == status]


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


def cell_line(cell: Cell, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a cell from its labels and its ``result.json``."""
    values = ("cell", cell.id, cell.phase, cell.task, cell.method, cell.seed, dict(cell.point))
    labels = {"format": FORMAT} | dict(zip(LABELS, values, strict=True))
    return labels | {key: value for key, value in result.items() if key != "format"}


def write_results(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a results file atomically, one compact JSON object a line."""
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
    write_whole(path, "".join(compact.encode(line) + "\n" for line in lines))


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
        got = f"{len(heads)} in {path}"
        raise RunError("results file must have one line of kind experiment", got, _REBUILD)
    of_kind = {kind: [x for x in lines if x["kind"] == kind] for kind in ("choice", "cell")}
    return Results(heads[0], of_kind["choice"], of_kind["cell"])


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunError(
            "results file must be readable",
            f"{path}: {error.strerror}",
            "it is what `chainlora experiment run` writes",
        ) from None
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    found = []
    for number, line in numbered:
        where = f"{path} line {number}"
        try:
            found.append(_checked(where, parse_object(line)))
        except ValueError as error:
            if number == 1 or number < numbered[-1][0]:
                rule, got = "results must hold JSON objects", f"{where}: {error}"
                of_ours = "name the folder of `experiment run`, or its results.jsonl"
                remedy = _REBUILD if path.suffix == ".jsonl" else of_ours
                raise RunError(rule, got, remedy) from None
            logger.warning("%s is torn and left out (%s)", where, error)
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
    if value.get("format") != FORMAT:
        raise RunError(
            f"results must be of format {FORMAT}",
            f"{value.get('format')!r} in {where}",
            "read them with the version of chainlora that wrote them, or run the experiment again",
        )


def _checked(where: str, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line as it is. Raises RunError unless it has what reports rely on."""
    is_done = line.get("status") == "done"
    cell = _Done if is_done else _Cell
    models: dict[str, type[_Line]] = {"experiment": _Experiment, "choice": _Choice, "cell": cell}
    model = models.get(str(line.get("kind")))
    if model is None:
        got = f"{line.get('kind')!r} in {where}"
        raise RunError(
            "a line of results must be of kind experiment, choice or cell", got, _REBUILD
        )
    check_format(where, line)
    try:
        model.model_validate(line)
    except ValidationError as error:
        rule = f"a line of results must have what reports read ({wrong(error, model)}; got {where})"
        raise RunError(rule, "", _REBUILD) from None
    return line


def results_by_id(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Return the ``result.json`` of cells in results files, by id. Raises RunError: damaged."""
    return {
        line["cell"]: {key: value for key, value in line.items() if key not in LABELS}
        for path in paths
        for line in read_results(path).cells
    }


# --- what lines must hold: keys that code relies on; others pass, for later versions ---

_Name = Annotated[str, Field(max_length=200, pattern=r"^[^\n]*$")]
_Pair = Annotated[list[_Name], Field(min_length=2, max_length=2)]
_Count = Annotated[int, Field(ge=0)]
_Metrics = dict[str, float]


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Experiment(_Line):
    name: _Name
    description: str
    model: str | None
    tasks: list[_Name] = Field(min_length=1)
    methods: dict[str, str] = Field(min_length=1)
    pairs: list[_Pair]
    primary: _Pair | None = None
    seeds: list[int] = Field(min_length=1)
    seed_keys: list[_Name] = ["train.seed"]
    tuning_seeds: list[int]
    figures: list[_Name]
    paper: _Name | None

    @model_validator(mode="after")
    def _check(self) -> _Experiment:
        for key in ("tasks", "seeds"):  # one that is there twice would count as more pairs
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"`{key}` must differ from each other")
        if self.primary is not None and self.primary not in self.pairs:
            raise ValueError(f"`primary` must be one of `pairs` (got {self.primary})")
        return self


class _Tried(_Line):
    point: dict[str, Any]
    mean: float | None
    runs: _Count
    values: list[float | None] | None = None


class _Choice(_Line):
    task: _Name
    method: _Name
    metric: _Name
    chosen: dict[str, Any] | None
    tried: list[_Tried] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> _Choice:
        points = [each.point for each in self.tried]
        if any(point.keys() != points[0].keys() for point in points):
            raise ValueError("`tried` must have points of the same keys")
        if self.chosen is not None and self.chosen not in points:
            raise ValueError(f"`chosen` must be one of `tried` (got {self.chosen})")
        return self


class _Config(_Line):
    model: str | None = None
    data: dict[str, Any] = {}
    chain: dict[str, Any] = {}
    train: dict[str, Any] = {}
    loop: str | None = None


class _Cell(_Line):
    """A cell that diverged, or what is common to all."""

    cell: str = Field(pattern=r"^[0-9a-f]{12}$")
    phase: Literal["tune", "final"]
    task: _Name
    method: _Name
    seed: int
    point: dict[str, Any]
    status: Literal["done", "diverged"]
    metric: _Name
    ranks: list[Annotated[int, Field(ge=1)]]
    config: _Config
    rows_digest: _Name | None = None
    base_fingerprint: _Name | None = None
    base_file: _Name | None = None
    commit: _Name | None = None


class _Point(_Line):
    step: _Count
    loss: float | None = None


class _Done(_Cell):
    """A cell that trained to its end."""

    score_split: Literal["validation", "test"]
    score: FiniteFloat
    validation: _Metrics | None
    test: _Metrics | None
    majority: float | None
    train_loss: float | None
    steps: _Count
    tokens: _Count
    trainable_parameters: _Count
    wall_s: FiniteFloat
    peak_rss_mb: FiniteFloat | None
    link_steps: list[_Count] = []
    curve: list[_Point] = []
    versions: dict[str, str]
    hardware: dict[str, Any]


# --- what goes together ---


def check_alike(cells: Sequence[Mapping[str, Any]]) -> None:
    """Raise RunError where cells of the same settings are of different rows or weights.

    A cell's id knows places by name only; what was found there is in its digests (missing in the
    oldest results). A digest may name its definition, ``2:b903…``; others are not compared with it.
    """
    first: dict[tuple[str, str, str], tuple[str, str]] = {}
    for cell in cells:
        name, config = f"{cell['task']} {cell['method']} seed {cell['seed']}", cell["config"]
        cuts = ("max_length", "truncation")  # rows are cut after they are digested
        data = {k: v for k, v in config.get("data", {}).items() if k not in cuts}
        model = {"model": config.get("model"), "dtype": config.get("train", {}).get("dtype")}
        model["quantize"] = config.get("quantize")
        if isinstance(data.get("validation"), int | float):  # rows are held out by their tokens
            data["model"] = config.get("model")
        for field, what, settings in (
            ("rows_digest", "rows", data),
            ("base_fingerprint", "base model", model),
        ):
            if (found := cell.get(field)) is None:
                continue
            key = (field, found.rpartition(":")[0], json.dumps(settings, sort_keys=True))
            before, of = first.setdefault(key, (found, name))
            if found != before:
                raise RunError(
                    f"cells of one experiment must be of the same {what}",
                    f"{before} in {of}, {found} in {name}",
                    "they have changed in between; use a new output folder, without --reuse",
                )

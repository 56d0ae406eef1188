"""The matrix of a run: the rows of every stage scored in every state that the run has been in.

    RUN/matrix.jsonl    a JSON object a cell: digests of state and rows, stage, metric, value, …

A state is the base, the end of a stage, or the mix that the run is now. The rows are those that the
run kept, so that the data files may have changed or gone. The file is a cache: a cell is found by
the digests of all that its value depends on, and a line that cannot be read is scored again. What
matrices say in one number is in `evaluation.matrix`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError

from chainlora import files
from chainlora.chain.chain import Chain
from chainlora.chain.holding import hold_for
from chainlora.chain.showing import table
from chainlora.config.stages import split_address
from chainlora.data.kept import Kept
from chainlora.data.rows import Rows
from chainlora.engine.engine import Engine, Speedups
from chainlora.errors import FileError, RunError
from chainlora.evaluation.acceptance import standard_error, values, weights_of
from chainlora.evaluation.evaluate import Evaluation, evaluate
from chainlora.evaluation.matrix import MatrixSummary, summarise_matrix
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.preferences import judge_odds, judge_pairs
from chainlora.evaluation.streaming import to_accelerator
from chainlora.models.finding import resolve_model
from chainlora.runs.manifest import BASE, LinkEntry, Manifest, kept_rows, state_digest
from chainlora.runs.opening import load_run
from chainlora.runs.reading import RunReader
from chainlora.runs.stages import (
    first_is_open,
    folder_of,
    open_run,
    read_stages,
    reader_of,
    readers_of_stages,
    run_around,
)

logger = logging.getLogger(__name__)

MATRIX = "matrix.jsonl"
NOW = "now"

Progress = Callable[[str, int, int], None]
"""Told (state and stage, rows done, rows) as cells are scored."""
Strengths = Mapping[int, float]  # by link id


@dataclass(frozen=True)
class Cell:
    """The score of a stage's rows in a state: `rows` of the `of` that there were.

    `error` is the standard error over the rows, 0 where a metric has none. `state` is the digest of
    the state, `scored_on` that of the kept rows and, for DPO, of the state of their reference.
    """

    state: str
    stage: str
    scored_on: str
    split: str
    metric: str
    value: float
    error: float
    rows: int
    of: int


_CELL = TypeAdapter(Cell)


@dataclass(frozen=True)
class StageMatrix:
    """Scores by state and stage.

    `states` are the base, the ends of stages, and ``now`` where the run is another mix than the
    last end; `grid` has a row for each, and a column for each stage, None where it kept no rows.
    The first column is ``start`` where there are rows for what the run began on.
    """

    stages: list[str]
    states: list[str]
    grid: list[list[Cell | None]]

    def __repr__(self) -> str:
        lines = [self._heads(), *self._lines()]
        (width, *widths) = (max(map(len, column)) for column in zip(*lines, strict=True))
        texts = [
            "  ".join([state.ljust(width), *map(str.rjust, values, widths)])
            for state, *values in lines
        ]
        return "\n".join([*texts, *self.notes()])

    def _repr_html_(self) -> str:
        columns = [shades_of(column) for column in zip(*self.grid, strict=True)]
        shades = [[0.0, *row] for row in zip(*columns, strict=True)]
        notes = [Markup("<p>{}</p>").format(each) for each in self.notes()]
        return Markup("").join([table(self._heads(), self._lines(), shades=shades), *notes])

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.grid for cell in row if cell is not None]

    def _heads(self) -> list[str]:
        scored = {cell.stage: f"{cell.metric}, {_rows_of(cell)}" for cell in self.cells}
        return ["after", *(f"{name} ({scored.get(name, 'no rows kept')})" for name in self.stages)]

    def _lines(self) -> list[list[str]]:
        return [
            [state, *("–" if cell is None else f"{cell.value:.4f}" for cell in row)]
            for state, row in zip(self.states, self.grid, strict=True)
        ]

    def notes(self) -> list[str]:
        """Return the summaries in words. They are of the last end, also where the run is a mix."""
        of = f"after {self.states[-2]}, " if self.states[-1:] == [NOW] else ""
        return [f"{of}{summary}" for summary in self.summaries()]

    def summaries(self) -> list[MatrixSummary]:
        """Return average, backward transfer and forgetting; none where cells are missing."""
        ends = [row for state, row in zip(self.states, self.grid, strict=True) if state != NOW]
        whole = [[cell for cell in row if cell is not None] for row in ends]
        if not self.stages or any(len(row) < len(self.stages) for row in whole):
            return []
        values = [[cell.value for cell in row] for row in whole]
        learned = [self.states.index(s) if s in self.states else 0 for s in self.stages]
        metrics = [cell.metric for cell in whole[0]]
        return summarise_matrix(values, self.stages, metrics, learned)

    def as_dict(self) -> dict[str, Any]:
        cells = [[cell and asdict(cell) for cell in row] for row in self.grid]
        rows = dict(zip(self.states, cells, strict=True))
        return {
            "stages": self.stages,
            "states": rows,
            "summaries": [asdict(summary) for summary in self.summaries()],
        }


def shades_of(column: Sequence[Cell | None]) -> list[float]:
    """Return how dark each cell of a stage is shown: from 0 for its worst score to a half."""
    known = [cell for cell in column if cell is not None and math.isfinite(cell.value)]
    values = [cell.value for cell in known]
    if not known or min(values) == max(values):
        return [0.0] * len(column)
    worst = min(values) if is_higher_better(known[0].metric) else max(values)
    span = 2 * (max(values) - min(values))
    return [abs(cell.value - worst) / span if cell in known else 0.0 for cell in column]


def _rows_of(cell: Cell) -> str:
    some = f"{cell.rows}" if cell.rows == cell.of else f"{cell.rows} of {cell.of}"
    return f"{some} {cell.split} rows"


def stage_matrix(
    run: str | Path,
    *,
    speedups: Speedups = "auto",
    progress: Progress | None = None,
    compute: bool = True,
) -> StageMatrix:
    """Return the matrix of a run; cells that were never scored are, if `compute`, and are kept.

    That of ``RUN@STAGE`` ends with that stage.

    Raises RunError for a run that kept no rows, and what loading it raises.
    """
    folder, _ = split_address(run)
    reader = open_run(run) if compute else reader_of(run)
    kept, states = reader.kept(), dict(states_of(folder, reader))
    known = {_key(cell): cell for cell in _read(folder)}
    names = reader.manifest().columns
    stages = [stage for stage in names if stage in kept]
    if compute and not stages:
        raise RunError(
            "a matrix scores the rows that stages with links kept",
            f"no {'links' if kept else 'rows'} in {folder}",
            "tie a link first" if kept else "train with data.keep_rows: true",
        )
    digests = {name: _digest(reader, strengths) for name, strengths in states.items()}
    rows = {stage: _scored_on(reader, stage, kept[stage]) for stage in stages}
    missing = [
        (name, stage)
        for name, digest in digests.items()
        for stage in stages
        if (digest, stage, rows[stage]) not in known
    ]
    if compute and missing:
        scorer = Scorer(reader, kept, speedups, progress)
        try:
            for name in dict.fromkeys(name for name, _ in missing):
                wanted = [stage for state, stage in missing if state == name]
                for cell in scorer.score(name, states[name], wanted):
                    known[_key(cell)] = cell
        finally:  # a signal loses one cell at most
            if not first_is_open(folder):  # its best point may be a part of a link of the same id
                _write(folder, list(known.values()))
    grid = [
        [known.get((digest, stage, rows.get(stage, ""))) for stage in names]
        for digest in digests.values()
    ]
    return StageMatrix(names, list(digests), grid)


def chain_on_base(reader: RunReader, hold: str | None = None) -> tuple[Chain, Any]:
    """Return a chain of no links on the base of a run, and the tokenizer of its rows."""
    model, tokenizer = load_run(reader, num_links=0, as_trained=True)
    base = resolve_model(reader.manifest().base.model)
    return Chain(to_accelerator(model), hold=hold or hold_for(model), checkpoint=base), tokenizer


class Scorer:
    """Scores the kept rows of stages in states of one run, whose base is loaded once.

    `hold` is that of its chain; by default what suits the model.
    """

    def __init__(
        self,
        reader: RunReader,
        kept: Mapping[str, Kept],
        speedups: Speedups = "auto",
        progress: Progress | None = None,
        hold: str | None = None,
    ) -> None:
        self.reader, self.kept, self.speedups = reader, kept, speedups
        self.progress = progress or (lambda what, done, rows: None)
        self.chain, self.tokenizer = chain_on_base(reader, hold)
        self.chain.add(*RunReader(reader.path).load_links())
        self._references: dict[str, list[list[float]]] = {}

    def score(self, name: str, strengths: Strengths, stages: Sequence[str]) -> Iterator[Cell]:
        """Yield a cell for each of `stages`, in the state of these strengths (others are 0)."""
        state = _digest(self.reader, strengths)
        for stage, found in self.evaluations(name, strengths, stages):
            kept = self.kept[stage]
            split, metric = kept.scored[0], kept.metric
            each, weights = values(found, metric), weights_of(found, metric)
            error = standard_error(each, weights) if len(each) > 1 else 0.0
            counts = len(found.predictions), kept.counts[split]
            on = _scored_on(self.reader, stage, kept)
            yield Cell(state, stage, on, split, metric, found.metrics[metric], error, *counts)

    def evaluations(
        self, name: str, strengths: Strengths, stages: Sequence[str]
    ) -> Iterator[tuple[str, Evaluation]]:
        """Yield what the rows of each of `stages` come to, in the state of these strengths."""
        for stage in stages:
            if self.kept[stage].loss == "dpo" and stage not in self._references:
                self._references[stage] = self._reference(stage)
        with self._engine(strengths) as engine:
            for stage in stages:
                yield stage, self._evaluate(engine, f"{name}: {stage}", stage)

    def model_at(self, strengths: Strengths) -> Any:
        """Return the model, put into the state of these strengths (others are 0)."""
        self.chain.set_strengths({id: strengths.get(id, 0.0) for id in self.chain.strengths})
        return self.chain.model

    def _engine(self, strengths: Strengths) -> Engine:
        return Engine(self.model_at(strengths), speedups=self.speedups, training=False)

    def _evaluate(self, engine: Engine, what: str, stage: str) -> Evaluation:
        kept = self.kept[stage]
        rows = kept.scored[1]

        def tell(done: int, total: int) -> None:
            self.progress(what, done, total)

        if kept.loss == "orpo":
            return judge_odds(engine, rows[:], 1.0, tell)
        if kept.loss == "dpo":
            scores = engine.scores(rows[:], progress=tell)
            return judge_pairs(rows, scores, self._references[stage], 1.0)
        return evaluate(
            engine.model,
            rows[:],
            engine=engine,
            metrics=[kept.metric],
            tokenizer=self.tokenizer,
            stop=kept.asked["stop"],
            max_new_tokens=kept.asked["max_new_tokens"],
            progress=tell,
        )

    def _reference(self, stage: str) -> list[list[float]]:
        """Return what pairs score in the state that their stage began on."""
        rows: Rows = self.kept[stage].scored[1]
        with self._engine(_reference_of(self.reader, stage)) as engine:
            return engine.scores(rows[:])


def _reference_of(reader: RunReader, stage: str) -> Strengths:
    """Return the state that the pairs of a stage are compared to: the one that it began on."""
    run = run_around(reader.path)
    own = readers_of_stages(run).get(stage) or RunReader(run)
    return _tuned_on(own.manifest(), stage)


def _scored_on(reader: RunReader, stage: str, kept: Kept) -> str:
    """Return the digest of what a score of a stage depends on beside the state that is scored."""
    rows = reader.manifest().files[kept_rows(stage)]
    reference = _digest(reader, _reference_of(reader, stage)) if kept.loss == "dpo" else ""
    return hashlib.sha256(f"{rows} {reference}".encode()).hexdigest()[:16]


def states_of(run: Path, reader: RunReader) -> Iterator[tuple[str, Strengths]]:
    """Yield the states of a run by name: the base, the end of each stage, the mix it is now."""
    yield BASE, {}
    found, begun = read_stages(run), RunReader(run).manifest()
    last: Strengths = {}
    for name in reader.manifest().stages:
        if name in found.names and name not in found.here:
            again = f"call chainlora prune {run} {name} --yes again"
            raise RunError("a stage must be pruned to the end", f"{name!r}, half pruned", again)
        if name in found.names:
            folder = folder_of(run, found, found.names.index(name))
            last = _strengths(RunReader(folder).manifest().loaded)
        else:
            own = [entry.id for entry in begun.links if entry.stage == name]
            last = _tuned_on(begun, name) | dict.fromkeys(own, 1.0)  # where it was forked from
        yield name, last
    now = _strengths(reader.manifest().loaded)
    if now != last:
        yield NOW, now


def _tuned_on(begun: Manifest, stage: str) -> dict[int, float]:
    """Return the state that a stage was tuned on.

    Of a stage before a fork, that is all links before it at full strength where the fork began on
    another mix than that.
    """
    place = next(place for place, entry in enumerate(begun.links) if entry.stage == stage)
    below, first = begun.links[:place], begun.links[place]
    is_known = state_digest(begun.base.fingerprint, below) == first.tuned_on
    if is_known or stage == begun.stage:
        return _strengths(below)
    return {entry.id: 1.0 for entry in below}


def _strengths(entries: Sequence[LinkEntry]) -> dict[int, float]:
    return {entry.id: entry.strength for entry in entries if entry.strength}


def _digest(reader: RunReader, strengths: Strengths) -> str:
    """Return the digest of a state: of the links that add something to it."""
    manifest = reader.manifest()
    entries = [
        entry.model_copy(update={"strength": strengths[entry.id]})
        for entry in manifest.loaded
        if strengths.get(entry.id)
    ]
    return state_digest(manifest.base.fingerprint, entries)


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.state, cell.stage, cell.scored_on


def _read(run: Path) -> Iterator[Cell]:
    """Yield the cells that were kept, but for lines that are damaged or of another version."""
    try:
        lines = (run / MATRIX).read_bytes().splitlines()
    except OSError:  # there is none, or it cannot be read
        return
    for line in lines:
        with suppress(ValidationError):
            yield _CELL.validate_json(line, strict=True)


def _write(run: Path, cells: Sequence[Cell]) -> None:
    """Keep the cells; numbers of a run that cannot be written are numbers too."""
    try:
        files.remove_scratch(run, MATRIX)
        files.write_text(run / MATRIX, "".join(f"{json.dumps(asdict(cell))}\n" for cell in cells))
    except FileError as error:
        logger.warning("the scores are not kept: %s", error)

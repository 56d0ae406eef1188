"""The matrix of a run: rows scored in the base, at the end of each stage and in the current mix.

    RUN/matrix.jsonl    a JSON object a cell: digests of state and rows, stage, metric, value, …,
                        and a checksum of these

The rows are those that the run kept, so that the data files may have changed or gone. The file is a
cache: a cell is found by the digests of all that its value depends on, and a line that is not as it
was written is scored again.

R[i, j] is the score of stage j's rows in state i: after i stages, so that row 0 is the base. With T
stages (Lopez-Paz & Ranzato, arXiv 1706.08840; Chaudhry et al., arXiv 1801.10112):

    average             mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] − R[j, j]
    forgetting          mean over j < T of max over 0 < i < T of R[i, j], less R[T, j]

Rows of what was there before the first stage are a column of their own, learned in row 0: ``base``,
or ``start`` where that is an imported adapter.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from pydantic import TypeAdapter

from chainlora import files
from chainlora.data.kept import Kept
from chainlora.engine.engine import Engine, Speedups
from chainlora.errors import FileError, RunError
from chainlora.evaluation.evaluate import Evaluation, evaluate, standard_error, values, weights_of
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.changes import MATRIX
from chainlora.runs.documents import Digest, short_digest
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import BASE, START, State
from chainlora.runs.history_file import read_history
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.state import OpenState
from chainlora.showing import table

logger = logging.getLogger(__name__)

NOW = "now"
WORSE = 1.1  # times a score: general ability has fallen
HARM = "general ability has fallen"  # of the warning, which the board looks for

Progress = Callable[[str, int, int], None]
"""Told (state and stage, rows done, rows) as cells are scored."""


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
    The first column is ``base``, or ``start`` after an imported adapter, where there are rows for
    what the run began on.
    """

    stages: list[str]
    states: list[str]
    grid: list[list[Cell | None]]

    def __repr__(self) -> str:
        return "\n".join([self.in_lines(), *self.notes()])

    def in_lines(self) -> str:
        """Return the scores as a table, without summaries."""
        lines = [self._heads(), *self._lines()]
        (width, *widths) = (max(map(len, column)) for column in zip(*lines, strict=True))
        texts = (
            "  ".join([state.ljust(width), *map(str.rjust, values, widths)])
            for state, *values in lines
        )
        return "\n".join(texts)

    def _repr_html_(self) -> str:
        columns = [shades_of(column) for column in zip(*self.grid, strict=True)]
        shades = [[0.0, *row] for row in zip(*columns, strict=True)]
        notes = [Markup("<p>{}</p>").format(each) for each in self.notes()]
        return Markup("").join([table(self._heads(), self._lines(), shades=shades), *notes])

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.grid for cell in row if cell is not None]

    def _heads(self) -> list[str]:
        scored = {}
        for cell in self.cells:
            some = f"{cell.rows}" if cell.rows == cell.of else f"{cell.rows} of {cell.of}"
            scored[cell.stage] = f"{cell.metric}, {some} {cell.split} rows"
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

    def of(self, stages: Collection[str]) -> StageMatrix:
        """Return this with some columns alone."""
        places = [place for place, name in enumerate(self.stages) if name in stages]
        grid = [[row[place] for place in places] for row in self.grid]
        return StageMatrix([self.stages[place] for place in places], self.states, grid)

    def harm(self) -> str:
        """Say how much worse the rows of what the run began on score now, if that is a tenth: of a
        loss, of its perplexity. Else nothing."""
        name = next((each for each in self.stages if each in (BASE, START)), None)
        if name is None or name not in self.states:
            return ""
        column = self.stages.index(name)
        before, now = self.grid[self.states.index(name)][column], self.grid[-1][column]
        if before is None or now is None:
            return ""
        metric, first, last = before.metric, before.value, now.value
        if metric == "loss":
            metric, first, last = "perplexity", math.exp(min(first, 700)), math.exp(min(last, 700))
        low, high = (last, first) if is_higher_better(before.metric) else (first, last)
        if not high > WORSE * low:
            return ""
        verb = "rose" if last > first else "fell"
        return f"{metric} of {name}'s rows {verb} from {first:.3g} to {last:.3g}"

    def as_dict(self) -> dict[str, Any]:
        cells = [[cell and asdict(cell) for cell in row] for row in self.grid]
        return {
            "stages": self.stages,
            "states": dict(zip(self.states, cells, strict=True)),
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


def stage_matrix(
    run: Address,
    *,
    speedups: Speedups = "auto",
    progress: Progress | None = None,
    compute: bool = True,
    of: Collection[str] | None = None,
    base: OpenBase | None = None,
) -> StageMatrix:
    """Return the matrix of a run; cells that were never scored are, if `compute`, and are kept.

    That of ``RUN@STAGE`` ends with that stage. `of` are the columns, by default all. The base is
    opened here unless it is given.

    Raises RunError for a run that kept no rows, and what loading it raises.
    """
    run = open_run(run)
    kept, states = run.kept(), dict(states_of(run))
    known = {_key(cell): cell for cell in _read(run.run)}
    columns = {name: key for name, key in run.columns.items() if of is None or name in of}
    stages = [stage for stage in columns.values() if stage in kept]
    if compute and not stages:
        remedy = "train with data.keep_rows: true, and push with --rows"
        if kept:
            remedy = "tie a link first"
        elif run.entry is None and run.history.entries:
            remedy = f"leave the base by chainlora undo {run.run} --to NAME"
        rule = "a matrix scores the rows that stages with links kept"
        raise RunError(rule, f"no {'links' if kept else 'rows'} in {run.run}", remedy)
    rows = {stage: _scored_on(run, stage, kept[stage]) for stage in stages}
    missing = {
        name: due
        for name, state in states.items()
        if (due := [each for each in stages if (state.digest, each, rows[each]) not in known])
    }
    if compute and missing:
        scorer = Scorer(run, kept, speedups, progress, base=base)
        try:
            for name, due in missing.items():
                for cell in scorer.score(name, states[name], due):
                    known[_key(cell)] = cell
        finally:  # a signal loses one cell at most
            _write(run.run, known)
    grid = [
        [
            cell and replace(cell, stage=name)
            for name, stage in columns.items()
            for cell in [known.get((state.digest, stage, rows.get(stage, "")))]
        ]
        for state in states.values()
    ]
    return StageMatrix(list(columns), list(states), grid)


def columns_after_training(run: OpenState) -> list[str] | None:
    """Return the columns that are scored after training, None for all: of a run of one stage, which
    has scored its own rows, those of the start alone. An adapter that was added has scored none."""
    start = [name for name, key in run.columns.items() if key == START]
    is_trained = all(e.kind != "import" for e in run.lineage if e.key in run.shares)
    return start if START in run.keepers and len(run.columns) == 2 and is_trained else None


def states_of(run: OpenState) -> Iterator[tuple[str, State]]:
    """Yield the states of a run by name: the base, the end of each stage, the mix it is now."""
    yield BASE, run.history.empty
    last, shares = run.history.empty, run.shares
    for entry in run.lineage:
        if entry.kind == "combine" or entry.key in shares:
            last = entry.state
            yield entry.key, last
    if run.state.digest != last.digest:
        yield NOW, run.state


class Scorer:
    """Scores the kept rows of stages in states of one run, whose base is loaded once.

    `hold` is that of its chain; by default what suits the model. `base` is opened here by default.
    """

    def __init__(
        self,
        run: OpenState,
        kept: Mapping[str, Kept],
        speedups: Speedups = "auto",
        progress: Progress | None = None,
        hold: str | None = None,
        base: OpenBase | None = None,
    ) -> None:
        self.run, self.kept, self.speedups = run, kept, speedups
        self.progress = progress or (lambda what, done, rows: None)
        self.chain, self.tokenizer = chain_on_base(run, hold, base)
        self._ids: dict[Digest, int] = {}  # of links on the chain
        self._references: dict[str, list[list[float]]] = {}
        self._add(run.state)

    def score(self, name: str, state: State, stages: Sequence[str]) -> Iterator[Cell]:
        """Yield a cell for each of `stages` in a state, which is shown by its name."""
        for stage, found in self.evaluations(name, state, stages):
            kept = self.kept[stage]
            split, metric = kept.scored[0], kept.metric
            each, weights = values(found, metric), weights_of(found, metric)
            error = standard_error(each, weights) if len(each) > 1 else 0.0
            counts = len(found.predictions), kept.counts[split]
            score, on = found.metrics[metric], _scored_on(self.run, stage, kept)
            yield Cell(state.digest, stage, on, split, metric, score, error, *counts)

    def evaluations(
        self, name: str, state: State, stages: Sequence[str]
    ) -> Iterator[tuple[str, Evaluation]]:
        """Yield what the rows of each of `stages` come to in a state."""
        for stage in stages:
            if self.kept[stage].loss == "dpo" and stage not in self._references:
                # what pairs score in the state that their stage began on
                with self._engine(self.run.at(stage).parent.state) as engine:
                    self._references[stage] = engine.scores(self.kept[stage].scored[1][:])
        with self._engine(state) as engine:
            for stage in stages:
                yield stage, self._evaluate(engine, f"{name}: {stage}", stage)

    def model_at(self, state: State) -> Any:
        self._add(state)
        on = {self._ids[term.link]: term.strength for term in state.terms}
        self.chain.set_strengths({id: on.get(id, 0.0) for id in self.chain.strengths})
        return self.chain.model

    def _add(self, state: State) -> None:
        due = [term for term in state.terms if term.link not in self._ids]
        first = len(self._ids)
        links = [replace(link, id=n) for n, link in enumerate(self.run.read(due), first)]
        self._ids |= {term.link: first + n for n, term in enumerate(due)}
        self.chain.add(*links)

    def _engine(self, state: State) -> Engine:
        return Engine(self.model_at(state), speedups=self.speedups, training=False)

    def _evaluate(self, engine: Engine, what: str, stage: str) -> Evaluation:
        kept, tell = self.kept[stage], partial(self.progress, what)
        rows = kept.scored[1][:]
        if kept.loss == "orpo":
            return judge_odds(engine, rows, 1.0, tell)
        if kept.loss == "dpo":
            scores = engine.scores(rows, progress=tell)
            return judge_pairs(rows, scores, self._references[stage], 1.0)
        return evaluate(
            engine.model,
            rows,
            engine=engine,
            metrics=[kept.metric],
            tokenizer=self.tokenizer,
            stop=kept.asked["stop"],
            max_new_tokens=kept.asked["max_new_tokens"],
            progress=tell,
        )


def _scored_on(run: OpenState, stage: str, kept: Kept) -> str:
    """Return the digest of what a score of a stage depends on beside the state that is scored."""
    reference = run.at(stage).parent.state.digest if kept.loss == "dpo" else ""
    return short_digest([run.keepers[stage], reference])


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.state, cell.stage, cell.scored_on


def _read(run: Path) -> Iterator[Cell]:
    """Yield the cells that were kept, but for lines that are damaged or of another version."""
    try:
        lines = (run / MATRIX).read_bytes().splitlines()
    except OSError:  # there is none, or it cannot be read
        return
    for line in lines:
        with suppress(ValueError, AttributeError, LookupError, RecursionError):
            values = json.loads(line)
            if values.pop("checksum") == short_digest(values):
                yield _CELL.validate_json(line, strict=True)


def line_of(cell: Cell) -> str:
    """Return what is kept of a cell: its values and their checksum."""
    values = asdict(cell)
    return json.dumps(values | {"checksum": short_digest(values)}) + "\n"


def _write(run: Path, known: Mapping[tuple[str, str, str], Cell]) -> None:
    """Keep the cells beside those that others have scored meanwhile, but for rows that were pruned;
    numbers of a run that cannot be written are numbers too."""
    cells = ({_key(cell): cell for cell in _read(run)} | {**known}).values()
    try:
        history = read_history(run)
        stages = {entry.key for entry in history.entries} | drafts_in(run, history).keys()
        lines = [line_of(cell) for cell in cells if cell.stage in stages]
        files.remove_scratch(run, MATRIX)
        files.write_text(run / MATRIX, "".join(lines))
    except (FileError, RunError) as error:
        logger.warning("the scores are not kept: %s", error)


@dataclass(frozen=True)
class MatrixSummary:
    """The numbers of the columns of one metric; None where they have no stage before the last.

    Of a loss, the sign of every score is turned (`is_turned`): a higher average or transfer is
    always better, a higher forgetting worse.
    """

    metric: str
    stages: tuple[str, ...]
    is_turned: bool
    average: float
    backward_transfer: float | None
    forgetting: float | None

    def __str__(self) -> str:
        parts = [f"average {self.average:.4f}"]
        if self.backward_transfer is not None:
            parts.append(f"backward transfer {self.backward_transfer:+.4f}")
        if self.forgetting is not None:
            parts.append(f"forgetting {self.forgetting:+.4f}")
        return f"{'minus the ' * self.is_turned}{self.metric}: {', '.join(parts)}"


def summarise_matrix(
    scores: Sequence[Sequence[float]],
    stages: Sequence[str],
    metrics: Sequence[str],
    learned: Sequence[int],
) -> list[MatrixSummary]:
    """Return a summary for each metric, those of which more is better before losses.

    Args:
        scores: R, [T + 1][columns].
        stages: the name of each column.
        metrics: what each column is scored by; numbers of different ones are never averaged.
        learned: the row in which each column is learned.
    """
    found, last = [], len(scores) - 1
    for metric in dict.fromkeys(metrics):
        sign = 1 if is_higher_better(metric) else -1
        own = [j for j, each in enumerate(metrics) if each == metric]
        column = {j: [sign * row[j] for row in scores] for j in own}
        before = [j for j in own if learned[j] < last]
        transfers = [column[j][last] - column[j][learned[j]] for j in before]
        losses = [max(column[j][min(learned[j], 1) : last]) - column[j][last] for j in before]
        average, names = fmean(column[j][last] for j in own), tuple(stages[j] for j in own)
        means = [fmean(values) if values else None for values in (transfers, losses)]
        found.append(MatrixSummary(metric, names, sign < 0, average, *means))
    return sorted(found, key=lambda each: each.is_turned)

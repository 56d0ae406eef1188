"""The matrix of a run: kept rows of each stage, scored in the base, after each stage, and now.

    RUN/matrix.jsonl    a JSON object per cell: digests of state and rows, stage, metric, value, …,
                        and a checksum of these

The rows are kept in the run, so the data files may change or disappear. ``matrix.jsonl`` is a
cache: a cell is found by the digests of everything its value depends on. A damaged line is scored
again.

R[i, j] is the score of stage j's rows in state i: after i stages, so that row 0 is the base. With T
stages (Lopez-Paz & Ranzato, arXiv 1706.08840; Chaudhry et al., arXiv 1801.10112):

    average             mean over j of R[T, j]
    backward transfer   mean over j < T of R[T, j] − R[j, j]
    forgetting          mean over j < T of (max over 0 < i < T of R[i, j]) − R[T, j]

Rows of the start are a column of their own, learned in row 0: ``base``, or ``start`` if an adapter
was imported.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from chainlora import files
from chainlora.data.kept import Kept, need_embedded
from chainlora.engine.engine import Engine, Speedups
from chainlora.errors import FileError, RunError
from chainlora.evaluation.evaluate import Evaluation, evaluate, standard_error, values, weights_of
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.pair_scores import judge_odds, judge_pairs
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.changes import MATRIX, scored_on
from chainlora.runs.documents import Digest, short_digest
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import BASE, START, State
from chainlora.runs.history_file import read_history
from chainlora.runs.open_base import OpenBase
from chainlora.runs.opening import chain_on_base
from chainlora.runs.state import OpenState
from chainlora.showing import table

logger = logging.getLogger(__name__)

WORSE = 1.1  # a score that is worse by this factor is reported as harm
HARM = "general ability has fallen"  # text of the warning; the board searches for it

Progress = Callable[[str, int, int], None]
"""Called with (state and stage, rows done, rows) while cells are scored."""


@dataclass(frozen=True)
class Cell:
    """The score of a stage's rows in a state."""

    state: str  # digest
    stage: str
    scored_on: str  # digest of the kept rows and, for DPO, of the state of their reference
    split: str
    metric: str
    value: float
    error: float  # standard error over the rows, 0 if the metric has none
    rows: int  # scored
    of: int  # rows in the split when the stage was trained

    @property
    def shown(self) -> float:
        """Return the value, of a loss the perplexity."""
        return math.exp(min(self.value, 700)) if self.metric == "loss" else self.value


_CELL = TypeAdapter(Cell)


@dataclass(frozen=True)
class StageMatrix:
    """Scores by state and stage."""

    stages: list[str]  # columns: ``base`` or ``start`` if there are rows of the start, then stages
    states: list[str]  # rows: ``base``, ends of stages, ``now`` if it differs from the last end
    grid: list[list[Cell | None]]  # [states][stages]; None: not scored

    def __repr__(self) -> str:
        return "\n".join([self.in_lines(), *self.notes()])

    def in_lines(self) -> str:
        """Return the scores as a text table, without summaries."""
        lines = [self._heads(), *self._lines()]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        rows = ([name.ljust(first), *map(str.rjust, row, others)] for name, *row in lines)
        return "\n".join(map("  ".join, rows))

    def _repr_html_(self) -> str:
        columns = [shades_of(column) for column in zip(*self.grid, strict=True)]
        shades = [[0.0, *row] for row in zip(*columns, strict=True)]
        return table(self._heads(), self._lines(), shades=shades, below=self.notes())

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.grid for cell in row if cell is not None]

    def _heads(self) -> list[str]:
        details = {}
        for cell in self.cells:
            count = f"{cell.rows}" if cell.rows == cell.of else f"{cell.rows} of {cell.of}"
            details[cell.stage] = f"{cell.metric}, {count} {cell.split} rows"
        return ["after", *(f"{name} ({details.get(name, 'no rows kept')})" for name in self.stages)]

    def _lines(self) -> list[list[str]]:
        return [
            [state, *("–" if cell is None else f"{cell.value:.4f}" for cell in row)]
            for state, row in zip(self.states, self.grid, strict=True)
        ]

    def notes(self) -> list[str]:
        """Return the summaries as text. They are about the last stage."""
        return [str(summary) for summary in self.summaries()]

    def summaries(self) -> list[MatrixSummary]:
        """Return average, backward transfer and forgetting; [] if a cell is missing."""
        cells = [[cell for cell in row if cell is not None] for row in self.grid]
        if not self.stages or any(len(row) < len(self.stages) for row in cells):
            return []
        values = [[cell.value for cell in row] for row in cells]
        learned = [self.states.index(s) if s in self.states else 0 for s in self.stages]
        metrics = [cell.metric for cell in cells[0]]
        return summarise_matrix(values, self.stages, metrics, learned)

    def of(self, stages: Collection[str]) -> StageMatrix:
        """Return the matrix with some columns only."""
        places = [place for place, name in enumerate(self.stages) if name in stages]
        grid = [[row[place] for place in places] for row in self.grid]
        return StageMatrix([self.stages[place] for place in places], self.states, grid)

    def harm(self, place: int = -1) -> str:
        """Return a sentence if a state scores rows of the start worse by a factor of `WORSE`.

        The state is by default the last. Losses are compared by their perplexity.
        """
        if BASE not in self.stages:
            return ""
        column = self.stages.index(BASE)
        before, after = self.grid[self.states.index(BASE)][column], self.grid[place][column]
        if before is None or after is None:
            return ""
        first, last = before.shown, after.shown
        low, high = (last, first) if is_higher_better(before.metric) else (first, last)
        if not high > WORSE * low:
            return ""
        metric = "perplexity" if before.metric == "loss" else before.metric
        verb = "rose" if last > first else "fell"
        return f"{metric} of {BASE}'s rows {verb} from {first:.3g} to {last:.3g}"

    def restored(self) -> str:
        """Return a sentence if the last state does not harm rows of the start as earlier ones."""
        harms = [self.harm(place) for place in range(len(self.states))]
        last = next((place for place in reversed(range(len(harms))) if harms[place]), None)
        if last is None or harms[-1]:
            return ""
        now = self.grid[-1][self.stages.index(BASE)]
        back = "" if now is None else f", and is back at {now.shown:.3g} in {self.states[-1]}"
        return f"{harms[last]} in {self.states[last]}{back}"

    def as_dict(self) -> dict[str, Any]:
        cells = [[cell and asdict(cell) for cell in row] for row in self.grid]
        return {
            "stages": self.stages,
            "states": dict(zip(self.states, cells, strict=True)),
            "summaries": [asdict(summary) for summary in self.summaries()],
        }


def shades_of(column: Sequence[Cell | None]) -> list[float]:
    """Return the shade of each cell of a column: from 0 for the worst score to 0.5 for the best."""
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
    """Return the matrix of a run; score missing cells and save them.

    Args:
        run: a run, or ``RUN@STAGE`` for the matrix up to this stage.
        speedups: ``off`` runs plain transformers.
        progress: called as ``progress(state and stage, rows_done, rows)``.
        compute: False: only read saved cells.
        of: names of columns; by default all.
        base: the base, if it is open already.

    Returns:
        The matrix.

    Raises:
        RunError: no kept rows, no links, or a damaged run.
        ModelError: the base cannot be loaded.
    """
    run = open_run(run)
    kept, states = run.kept(), dict(states_of(run))
    known = {_key(cell): cell for cell in _read(run.run)}
    columns = {name: key for name, key in run.columns.items() if of is None or name in of}
    stages = [stage for stage in columns.values() if stage in kept]
    if compute and not stages:
        raise _nothing_to_score(run, has_rows=bool(kept))
    scored_on = {stage: _scored_on(run, stage, kept[stage]) for stage in stages}
    missing = {
        name: unscored
        for name, state in states.items()
        if (unscored := [s for s in stages if (state.digest, s, scored_on[s]) not in known])
    }
    if compute and missing:
        scorer = Scorer(run, kept, speedups, progress, base=base)
        try:
            for name, unscored in missing.items():
                for cell in scorer.score(name, states[name], unscored):
                    known[_key(cell)] = cell
        finally:  # a signal loses at most one cell
            _write(run.run, known)
    grid = [
        [
            cell and replace(cell, stage=name)
            for name, stage in columns.items()
            for cell in [known.get((state.digest, stage, scored_on.get(stage, "")))]
        ]
        for state in states.values()
    ]
    return StageMatrix(list(columns), list(states), grid)


def _nothing_to_score(run: OpenState, *, has_rows: bool) -> RunError:
    """Return the error for a run without kept rows, or without links."""
    remedy = "train with data.keep_rows: true, and push with --rows"
    if has_rows:
        remedy = "tie a link first"
    elif run.entry is None and run.history.entries:
        remedy = f"leave the base by chainlora undo {shlex.quote(str(run.run))} --to NAME"
    rule = "a matrix scores kept rows of stages with links"
    return RunError(rule, f"no {'links' if has_rows else 'rows'} in {run.run}", remedy)


def columns_after_training(run: OpenState) -> list[str] | None:
    """Return the columns to score after training, None for all."""
    # A run of one stage has scored its own rows already, so only rows of the start are left. An
    # imported adapter has scored none.
    start = [name for name, key in run.columns.items() if key == START]
    is_trained = all(e.kind != "import" for e in run.lineage if e.key in run.stages)
    return start if START in run.keepers and len(run.columns) == 2 and is_trained else None


def states_of(run: OpenState) -> Iterator[tuple[str, State]]:
    """Yield the states of a run by name: the base, and the end of each stage and combination."""
    yield BASE, run.history.empty
    stages = run.stages
    for entry in run.lineage:
        if entry.kind == "combine" or entry.key in stages:
            yield entry.key, entry.state


class Scorer:
    """Score kept rows of stages in states of one run; the base is loaded once.

    All links are put on the model, and those of a state are switched on. `hold` is by default
    chosen by the model (`hold_for`), `base` is opened here by default.
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
        need_embedded(kept, self.chain.model)
        self._ids: dict[Digest, int] = {}  # of the links on the chain
        self._references: dict[str, list[list[float]]] = {}  # DPO: scores of pairs, by stage
        self._add(run.state)

    def score(self, name: str, state: State, stages: Sequence[str]) -> Iterator[Cell]:
        """Yield a cell for each of `stages` in a state; `name` is for progress."""
        for stage, evaluation in self.evaluations(name, state, stages):
            kept = self.kept[stage]
            split, metric = kept.scored[0], kept.metric
            numbers, weights = values(evaluation, metric), weights_of(evaluation, metric)
            yield Cell(
                state=state.digest,
                stage=stage,
                scored_on=_scored_on(self.run, stage, kept),
                split=split,
                metric=metric,
                value=evaluation.metrics[metric],
                error=standard_error(numbers, weights) if len(numbers) > 1 else 0.0,
                rows=len(evaluation.predictions),
                of=kept.counts[split],
            )

    def evaluations(
        self, name: str, state: State, stages: Sequence[str]
    ) -> Iterator[tuple[str, Evaluation]]:
        """Yield the evaluation of the kept rows of each of `stages` in a state."""
        for stage in stages:
            if self.kept[stage].loss == "dpo" and stage not in self._references:
                # the reference of DPO is the state that the stage began on
                with self._engine(self.run.at(stage).parent.state) as engine:
                    self._references[stage] = engine.scores(self.kept[stage].scored[1][:])
        with self._engine(state) as engine:
            for stage in stages:
                yield stage, self._evaluate(engine, f"{name}: {stage}", stage)

    def model_at(self, state: State) -> Any:
        """Return the model with the links of a state on, and all others off."""
        self._add(state)
        on = {self._ids[link] for link in state.links}
        self.chain.set_strengths({id: float(id in on) for id in self.chain.strengths})
        return self.chain.model

    def _add(self, state: State) -> None:
        """Add the links of a state that are not on the chain yet."""
        new = [link for link in state.links if link not in self._ids]
        first = len(self._ids)
        links = [replace(link, id=n) for n, link in enumerate(self.run.read(new), first)]
        self._ids |= {link: first + n for n, link in enumerate(new)}
        self.chain.add(*links)

    def _engine(self, state: State) -> Engine:
        return Engine(self.model_at(state), speedups=self.speedups, training=False)

    def _evaluate(self, engine: Engine, what: str, stage: str) -> Evaluation:
        """Score the kept rows of a stage by the metric of its loss; `what` is for progress."""
        kept, report = self.kept[stage], partial(self.progress, what)
        rows = kept.scored[1][:]
        if kept.loss == "orpo":
            return judge_odds(engine, rows, 1.0, report)
        if kept.loss == "dpo":
            scores = engine.scores(rows, progress=report)
            return judge_pairs(rows, scores, self._references[stage], 1.0)
        keys: Any = {key: kept.asked[key] for key in ("stop", "max_new_tokens")}
        keys |= {"metrics": [kept.metric], "tokenizer": self.tokenizer, "progress": report}
        return evaluate(engine.model, rows, engine=engine, **keys)


def _scored_on(run: OpenState, stage: str, kept: Kept) -> str:
    """Return a digest of the kept rows of a stage and, for DPO, of their reference."""
    reference = run.at(stage).parent.state.digest if kept.loss == "dpo" else ""
    return scored_on(run.keepers[stage], reference)


def _key(cell: Cell) -> tuple[str, str, str]:
    return cell.state, cell.stage, cell.scored_on


def _read(run: Path) -> Iterator[Cell]:
    """Yield saved cells; skip lines that are damaged or of another version."""
    try:
        lines = (run / MATRIX).read_bytes().splitlines()
    except OSError:  # the file is missing or cannot be read: it is only a cache
        return
    for line in lines:
        with suppress(ValueError, AttributeError, LookupError, RecursionError):
            values = json.loads(line)
            if values.pop("checksum") == short_digest(values):
                yield _CELL.validate_json(line, strict=True)


def line_of(cell: Cell) -> str:
    """Return the line of a cell in ``matrix.jsonl``: its values and their checksum."""
    values = asdict(cell)
    return json.dumps(values | {"checksum": short_digest(values)}) + "\n"


def _write(run: Path, known: Mapping[tuple[str, str, str], Cell]) -> None:
    """Save cells, with those that other processes have saved meanwhile, without pruned stages."""
    cells = ({_key(cell): cell for cell in _read(run)} | {**known}).values()
    try:
        history = read_history(run)
        stages = {entry.key for entry in history.entries} | drafts_in(run, history).keys()
        lines = [line_of(cell) for cell in cells if cell.stage in stages]
        files.remove_scratch(run, MATRIX)
        files.write_text(run / MATRIX, "".join(lines))
    except (FileError, RunError) as error:  # the scores are still valid
        logger.warning("the scores are not kept: %s", error)


@dataclass(frozen=True)
class MatrixSummary:
    """The summary of the columns of one metric.

    Scores that are losses have their sign changed (`is_turned`), so a higher average or transfer is
    always better, and a higher forgetting always worse. Transfer and forgetting are None if no
    column was learned before the last state.
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
    """Return a summary for each metric; losses come last.

    Args:
        scores: R, [T + 1][columns].
        stages: the name of each column.
        metrics: the metric of each column; different metrics are never averaged.
        learned: the row in which each column is learned.
    """
    summaries, last = [], len(scores) - 1
    for metric in dict.fromkeys(metrics):
        sign = 1 if is_higher_better(metric) else -1
        of_metric = [j for j, name in enumerate(metrics) if name == metric]
        column = {j: [sign * row[j] for row in scores] for j in of_metric}
        before = [j for j in of_metric if learned[j] < last]
        transfers = [column[j][last] - column[j][learned[j]] for j in before]
        losses = [max(column[j][min(learned[j], 1) : last]) - column[j][last] for j in before]
        average = fmean(column[j][last] for j in of_metric)
        names = tuple(stages[j] for j in of_metric)
        means = [fmean(values) if values else None for values in (transfers, losses)]
        summaries.append(MatrixSummary(metric, names, sign < 0, average, *means))
    return sorted(summaries, key=lambda summary: summary.is_turned)

"""Run the cells of an experiment: skip what is done, keep what fails apart, go on after a kill.

    OUT/experiment.yaml      what was asked
    OUT/cells/<id>/          config.yaml, run/ (a run directory), log.txt, result.json or error.txt
    OUT/results.jsonl        one line a cell (see records.py), rewritten whenever a cell ends

A cell is done when its result.json is there, and that file is written last. Nothing else is state:
to run again is to go on. Tuning cells come first; the final cells of a task and method are known
once its tuning cells have ended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from chainlora.config.loading import dump_config
from chainlora.errors import ConfigError, RunError
from chainlora.experiments.design.choice import Trial, choose, chosen_points
from chainlora.experiments.design.expansion import Cell, Point, expand, expand_tuning, points
from chainlora.experiments.design.power import undecidable
from chainlora.experiments.design.schema import Experiment, load_experiment
from chainlora.experiments.execution.cells import CONFIG, ERROR, RESULT, STATUS
from chainlora.experiments.execution.executors import executor
from chainlora.experiments.execution.records import (
    FORMAT,
    cell_line,
    check_alike,
    experiment_line,
    read_results,
    result_of,
    write_atomically,
    write_results,
)
from chainlora.experiments.execution.worker_pool import Workers

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment. `failed` maps a cell's words to its one-line error."""

    out: Path
    num_cells: int
    num_run: int
    failed: dict[str, str]

    @property
    def results(self) -> Path:
        """The results file."""
        return self.out / "results.jsonl"


def run_experiment(
    path: str | Path,
    out: str | Path,
    *,
    workers: Workers = 1,
    backend: Literal["local", "inline", "ray"] = "local",
    overrides: Sequence[tuple[str, str]] = (),
    listener: Listener | None = None,
    max_cells: int | None = None,
    reuse: Sequence[str | Path] = (),
) -> Outcome:
    """Run an experiment file and return what became of it.

    Args:
        path: the experiment file. out: folder for cells and results; one that holds some of them is
        gone on with. workers: cells at a time (processes on this machine, or Ray tasks). Threads
        are divided among them. "auto":
            one, and once its peak memory is known as many as fit beside each other (see
            `room.Room`).
        backend: "local"; "inline", cells one by one in this process (no start-up, but its peak
        memory is this
            process's); "ray" for a cluster (extra `ray`).
        overrides: ``("base.data.dir", "rows")`` pairs that replace values of the file. listener:
        gets ``{"event": "plan"|"cell"|"poll"|"end", …}`` as work goes on. max_cells: stop after so
        many cells; the rest is for another call. reuse: results files of other runs, of this
        machine or another; cells of the same config found there are
            taken as done.

    Raises:
        ConfigError, DataError: a file or a cell that cannot work, or rows that are not there,
        before anything runs; an
            unknown backend; Ray not installed.
        RunError: cells of other rows or weights than the rest (see `records.check_alike`).
        RunError: at the end, if cells failed: how many, the first one's error and where its log is.
    """
    experiment = load_experiment(path, overrides)
    outcome = run_cells(
        experiment,
        Path(out),
        workers=workers,
        backend=backend,
        listener=listener,
        max_cells=max_cells,
        reuse=reuse,
    )
    raise_on_failure(outcome)
    return outcome


def raise_on_failure(outcome: Outcome) -> None:
    """Raise RunError if cells failed."""
    if outcome.failed:
        name, message = next(iter(outcome.failed.items()))
        raise RunError(
            f"every cell must end (got {len(outcome.failed)} of {outcome.num_cells} failed, "
            f"first {name}: "
            f"{message}); logs are in {outcome.out / 'cells'}, the next run tries again those "
            "that did not diverge"
        )


def run_cells(
    experiment: Experiment,
    out: Path,
    *,
    workers: Workers = 1,
    backend: str = "local",
    listener: Listener | None = None,
    max_cells: int | None = None,
    reuse: Sequence[str | Path] = (),
) -> Outcome:
    """Run an experiment as `run_experiment` does, but return failures instead of raising them."""
    execute = executor(backend, workers)
    expand(experiment)  # refuses what cannot work before anything runs
    known = {cell["cell"]: result_of(cell) for path in reuse for cell in read_results(path).cells}
    session = _Session(experiment, out, listener or (lambda record: None), known)
    out.mkdir(parents=True, exist_ok=True)
    _adopt_results(out)
    write_atomically(
        out / "experiment.yaml", yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
    )
    left = max_cells
    try:
        session.gather()  # what is there must go together, before more is computed
        for phase in (session.tuning_cells, session.final_cells):
            cells = phase()
            if not cells:
                continue
            todo = [cell for cell in _one_each(cells) if not session.is_done(cell)]
            todo = todo[:left] if left is not None else todo
            session.begin(cells, todo, workers)
            for cell, error in execute(
                [(cell, session.prepare(cell)) for cell in todo], session.poll
            ):
                session.end(cell, error)
                left = None if left is None else left - 1
        session.gather()
    finally:
        session.listener({"event": "end", "failed": session.failed})
    return Outcome(out, len(session.asked), session.num_run, session.failed)


def _adopt_results(out: Path) -> None:
    """Give results that came without their cells (a clone of committed ones) a folder each, so that
    none is lost."""
    for line in read_results(out).cells if (out / "results.jsonl").is_file() else ():
        if not (out / "cells" / line["cell"]).is_dir():
            _write_result(out / "cells" / line["cell"], result_of(line))


def _write_result(directory: Path, result: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _one_each(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one config are computed once, whatever they are called."""
    return list({cell.id: cell for cell in reversed(cells)}.values())[::-1]


def _read_result(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("format") != FORMAT:
        raise RunError(
            f"results must be of format {FORMAT} (got {result.get('format')!r} in {path}); to "
            "compute "
            "the cell again delete that folder, and results.jsonl, which is made again from the "
            "others"
        )
    return dict(result)


class _Session:
    """One call of the runner: where things are, what failed, whom to tell."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        listener: Listener,
        known: dict[str, dict[str, Any]],
    ) -> None:
        self.experiment, self.out, self.listener = experiment, out, listener
        self.failed: dict[str, str] = {}
        self.num_run = 0
        self._told = False
        self.asked: dict[tuple[str, str, int, str], Cell] = {}
        self._tuning: list[Cell] | None = None
        self._known = known  # by id
        self._results = dict[str, dict[str, Any]]()  # by id; as the cells' folders have them

    def directory(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.id

    def is_done(self, cell: Cell) -> bool:
        """Say whether a cell has its result; one known from elsewhere is given its folder."""
        if (
            cell.id not in self._results
            and cell.id in self._known
            and not (self.directory(cell) / RESULT).is_file()
        ):
            _write_result(self.prepare(cell), self._known[cell.id])
        return cell.id in self._results or (self.directory(cell) / RESULT).is_file()

    def result(self, cell: Cell) -> dict[str, Any]:
        if cell.id not in self._results:
            self._results[cell.id] = _read_result(self.directory(cell) / RESULT)
        return self._results[cell.id]

    def prepare(self, cell: Cell) -> Path:
        directory = self.directory(cell)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / CONFIG, dump_config(cell.config))
        (directory / ERROR).unlink(missing_ok=True)
        return directory

    def tuning_cells(self) -> list[Cell]:
        if self._tuning is None:
            self._tuning = expand_tuning(self.experiment)
        return self._tuning

    def choices(self) -> list[dict[str, Any]]:
        """Choose from the tuning cells; a (task, method) chooses once all of its cells are done,
        none failed."""
        cells = self.tuning_cells()
        waiting = {(cell.task, cell.method) for cell in cells if not self.is_done(cell)}
        trials = []
        for cell in cells:
            if (cell.task, cell.method) in waiting:
                continue
            result = self.result(cell)
            metrics = result["validation"] if result["status"] == "done" else None
            if metrics is None and result["status"] == "done":
                raise ConfigError(
                    f"hyper-parameters are chosen on validation rows (got none for {cell}); give "
                    "data.validation or leave `tune` out"
                )
            trials.append(Trial(cell.task, cell.method, cell.point, metrics, result["metric"]))
        return choose(trials, self.experiment.tune.metric)

    def chosen(self) -> dict[tuple[str, str], Point]:
        """Return the point of each (task, method) that is known; one without a grid has only
        one."""
        fixed: dict[tuple[str, str], Point] = {}
        for method in self.experiment.methods:
            grid = points(self.experiment, method)
            if len(grid) == 1:
                fixed |= {(task, method): grid[0] for task in self.experiment.tasks}
        return fixed | chosen_points(self.choices())

    def final_cells(self) -> list[Cell]:
        chosen = self.chosen()
        for record in self.choices():
            if record["chosen"] is None:
                self.failed[f"{record['task']} {record['method']}"] = (
                    "every point of its grid diverged"
                )
        return expand(self.experiment, chosen)

    def begin(self, cells: Sequence[Cell], todo: Sequence[Cell], workers: Workers) -> None:
        self.asked |= {(cell.task, cell.method, cell.seed, cell.id): cell for cell in cells}
        note = None if self._told else undecidable(self.experiment)
        self._told = True
        later = 0 if cells and cells[0].phase == "final" else self._num_finals()
        self.listener(
            {
                "event": "plan",
                "phase": cells[0].phase if cells else "final",
                "cells": len(cells),
                "todo": [str(cell) for cell in todo],
                "later": later,
                "workers": 1 if workers == "auto" else workers,
                "tasks": [cell.task for cell in todo],
                "note": note,
            }
        )

    def _num_finals(self) -> int:
        """Count the final cells still to run after the tuning cells, most of them of points not
        chosen yet."""
        first = {
            (task, method): points(self.experiment, method)[0]
            for task in self.experiment.tasks
            for method in self.experiment.methods
        }
        tuned = {cell.id for cell in self.tuning_cells()}
        finals = _one_each(expand(self.experiment, first | self.chosen()))
        return sum(cell.id not in tuned and not self.is_done(cell) for cell in finals)

    def poll(self, running: Sequence[Cell]) -> None:
        """Tell the listener how far the running cells are."""
        shares = {}
        for cell in running:
            try:
                status = json.loads((self.directory(cell) / STATUS).read_text(encoding="utf-8"))
                shares[str(cell)] = status["step"] / max(status["num_steps"], 1)
            except (OSError, ValueError, KeyError):
                shares[str(cell)] = 0.0
        self.listener({"event": "poll", "running": shares})

    def end(self, cell: Cell, error: str | None) -> None:
        self.num_run += 1
        record: dict[str, Any] = {
            "event": "cell",
            "cell": str(cell),
            "task": cell.task,
            "error": error,
        }
        if error is None:
            result = self.result(cell)
            record |= {key: result.get(key) for key in ("status", "metric", "score", "wall_s")}
        else:
            self.failed[str(cell)] = error
        self.listener(record)
        self.gather()

    def gather(self) -> None:
        """Write the results file from all cells asked for so far that are done."""
        cells = [
            cell_line(cell, self.result(cell)) for cell in self.tuning_cells() if self.is_done(cell)
        ]
        choices = self.choices()
        done = [cell for cell in expand(self.experiment, self.chosen()) if self.is_done(cell)]
        finals = [cell_line(cell, self.result(cell)) for cell in done]
        check_alike([*cells, *finals])
        self.failed |= {
            str(cell): line["message"]
            for cell, line in zip(done, finals, strict=True)
            if line["status"] == "diverged"
        }
        lines = [{"format": 1, "kind": "choice"} | record for record in choices]
        write_results(
            self.out / "results.jsonl", [experiment_line(self.experiment), *lines, *cells, *finals]
        )

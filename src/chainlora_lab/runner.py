"""Run the cells of an experiment: skip what is done, keep failures apart, resume after a kill.

A cell is done when its ``result.json`` is there, and that file is written last. Nothing else is
state: to run again is to resume. Tuning cells come first; the final cells of a task and method are
known once its tuning cells have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from chainlora.errors import ConfigError, DataError, ModelError, RunError
from chainlora.models.finding import resolve_model
from chainlora.runs.paths import need_apart
from chainlora.training.objectives import check_names
from chainlora_lab.expansion import Cell, expand
from chainlora_lab.experiment import Experiment, load_experiment
from chainlora_lab.outputs import write_whole
from chainlora_lab.planning import run_notes
from chainlora_lab.protocol import check_rows, with_task_file
from chainlora_lab.results import FILE
from chainlora_lab.sequences import way_of
from chainlora_lab.session import Listener, Session
from chainlora_lab.worker import run_inline, run_processes


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment: of `num_cells` that are known, `num_done` are done by now, and
    `num_run` were run by this call; `failed` has the errors by the words of cells."""

    out: Path
    num_cells: int
    num_done: int
    num_run: int
    failed: dict[str, str]

    @property
    def results(self) -> Path:
        return self.out / FILE

    def check(self) -> None:
        """Raise RunError if cells failed: how many, the first one's error and where its log is."""
        for name, message in self.failed.items():
            raise RunError(
                "every cell must end",
                f"{len(self.failed)} of {self.num_cells} failed, first {name}: {message}",
                f"logs are in {self.out / 'cells'}, the next run tries again those that did not "
                "diverge",
            )


def run_experiment(
    path: str | Path, out: str | Path, *, overrides: Sequence[tuple[str, str]] = (), **options: Any
) -> Outcome:
    """Run an experiment file and return what became of it.

    `overrides` are ``("base.data.dir", "rows")`` pairs that replace values of the file; the rest is
    as for `run_cells`. Raises what that raises, and RunError at the end if cells failed.
    """
    outcome = run_cells(load_experiment(path, overrides), Path(out), **options)
    outcome.check()
    return outcome


def run_cells(
    experiment: Experiment,
    out: Path,
    *,
    workers: int = 1,
    backend: str = "local",
    listener: Listener | None = None,
    max_cells: int | None = None,
    reuse: Sequence[str | Path] = (),
) -> Outcome:
    """Run an experiment and return what became of it; cells that failed are in the outcome.

    Args:
        experiment: what to run.
        out: folder for cells and results; one that holds some of them is resumed.
        workers: cells at a time, each a process of this machine; threads are divided among them.
        backend: "local", or "inline": cells one by one in this process (no start-up, but its peak
            memory is this process's).
        listener: gets ``{"event": "plan"|"poll"|"cell"|"end", …}`` while cells run.
        max_cells: stop after so many cells; the rest is for another call.
        reuse: results files of other runs, of this machine or another; cells of the same config
            found there are taken as done.

    Raises:
        ConfigError, DataError, ModelError: a cell that cannot work, rows or a model that are not
            there, before anything runs; an unknown backend.
        RunError: cells of other rows or weights than the rest (see `results.check_alike`).
    """
    if workers < 1:
        raise ConfigError("`workers` must be at least 1", workers)
    if backend not in ("local", "inline"):
        raise ConfigError("`backend` must be local or inline", repr(backend))
    if backend == "inline" and workers > 1:
        rule = "the backend `inline` runs one cell at a time"
        raise ConfigError(rule, f"{workers} workers", "leave out either")
    run = run_inline if backend == "inline" else partial(run_processes, workers=workers)
    expand(experiment)  # refuses what cannot work before anything runs
    need_apart(out / FILE)
    session = Session(experiment, out, reuse, listener)
    _check_at_hand(cell for cell in session.all_cells() if not session.is_done(cell))
    asked = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
    write_whole(out / "experiment.yaml", asked)
    try:
        session.gather()  # results must go together before more are computed
        notes = run_notes(experiment, session.results())
        for todo in _rounds(session, max_cells, notes):
            work = [(cell, session.prepare(cell)) for cell in todo]
            for cell, error in run(work, session.poll):
                session.end(cell, error)
        session.gather()
    finally:
        session.listener({"event": "end", "failed": session.failed})
    num_done, num_cells = session.num_done()
    return Outcome(out, num_cells, num_done, session.num_run, session.failed)


def _rounds(session: Session, max_cells: int | None, notes: Sequence[str]) -> Iterator[list[Cell]]:
    """Yield what a phase needs, then what its results ask for in turn: a grid that is extended."""
    for phase in ("tune", "final"):
        told = not session.cells(phase)
        while True:
            todo = session.todo(phase)
            if max_cells is not None:
                todo = todo[: max(0, max_cells - session.num_run)]
            if todo or not told:
                session.begin(phase, todo, notes)
                notes, told = (), True  # notes are said once
            if not todo:
                break
            yield todo


def _check_at_hand(cells: Iterable[Cell]) -> None:
    """Raise unless model, rows and plug-ins of every cell are there, before any of them runs."""
    checked: set[tuple[str, str]] = set()
    for cell in cells:
        try:
            for config in cell.config.parts:
                on_file = with_task_file(config.data)
                check_names(config.model_copy(update={"data": on_file}))
                if ("model", config.model) not in checked:
                    resolve_model(config.model)
                if ("data", repr(config.data)) not in checked:
                    check_rows(config.data, config.train.loss)
                checked |= {("model", config.model), ("data", repr(config.data))}
            if cell.config.stages:
                way_of(cell.config)
        except (ConfigError, DataError, ModelError) as error:
            what = f"task {cell.task}, method {cell.method}: {error}"
            raise type(error)(what) from None

"""Run the cells of an experiment: skip what is done, keep failures apart, resume after a kill.

A cell is done when its ``result.json`` is there, and that file is written last. Nothing else is
state: to run again is to resume. Tuning cells come first; the final cells of a task and method are
known once its tuning cells have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from chainlora.data.sources import find_source
from chainlora.data.splits import SPLITS
from chainlora.errors import DataError, ModelError, RunError
from chainlora.experiments.expansion import Cell, expand
from chainlora.experiments.plan import run_notes
from chainlora.experiments.results import FILE, results_by_id
from chainlora.experiments.schema import Experiment, load_experiment
from chainlora.experiments.session import Listener, Session
from chainlora.experiments.store import Store
from chainlora.experiments.workers import check_workers, run_all
from chainlora.files import check_writable, make_folder, write_text
from chainlora.models.finding import resolve_model


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment.

    Attributes:
        out: its folder.
        num_cells: cells that it consists of, as far as is known.
        num_done: those that are done by now.
        num_run: those that this call ran.
        failed: a cell's words → its one-line error.
    """

    out: Path
    num_cells: int
    num_done: int
    num_run: int
    failed: dict[str, str]

    @property
    def results(self) -> Path:
        """The results file."""
        return self.out / FILE


def run_experiment(
    path: str | Path,
    out: str | Path,
    *,
    workers: int = 1,
    backend: Literal["local", "inline"] = "local",
    overrides: Sequence[tuple[str, str]] = (),
    listener: Listener | None = None,
    max_cells: int | None = None,
    reuse: Sequence[str | Path] = (),
) -> Outcome:
    """Run an experiment file and return what became of it.

    Args:
        path: the experiment file.
        out: folder for cells and results; one that holds some of them is resumed.
        workers: cells at a time, each a process of this machine; threads are divided among them.
        backend: "local", or "inline": cells one by one in this process (no start-up, but its peak
            memory is this process's).
        overrides: ``("base.data.dir", "rows")`` pairs that replace values of the file.
        listener: gets ``{"event": "plan"|"poll"|"cell"|"end", …}`` while cells run.
        max_cells: stop after so many cells; the rest is for another call.
        reuse: results files of other runs, of this machine or another; cells of the same config
            found there are taken as done.

    Raises:
        ConfigError, DataError, ModelError: a file or a cell that cannot work, rows or a model that
            are not there, before anything runs; an unknown backend.
        RunError: cells of other rows or weights than the rest (see `results.check_alike`); at the
            end, if cells failed: how many, the first one's error and where its log is.
    """
    outcome = run_cells(
        load_experiment(path, overrides),
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
            f"first {name}: {message}); logs are in {outcome.out / 'cells'}, the next run tries "
            "again those that did not diverge"
        )


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
    """Run an experiment as `run_experiment` does, but return failures instead of raising them."""
    check_workers(workers, backend)
    expand(experiment)  # refuses what cannot work before anything runs
    check_writable(out)
    store = Store(out, results_by_id(reuse), experiment.curve_points)
    session = Session(experiment, store, listener or (lambda record: None))
    make_folder(out)
    store.keep_gathered()
    write_text(
        out / "experiment.yaml", yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
    )
    try:
        session.gather()  # results must go together before more are computed
        _check_at_hand(c for c in session.all_cells().values() if not store.is_done(c))
        notes = run_notes(experiment, session.results())
        for phase in ("tune", "final"):
            _run_phase(session, phase, workers, backend, max_cells, notes)
        session.gather()
    finally:
        session.listener({"event": "end", "failed": session.failed})
    every = session.all_cells().values()
    num_done = sum(store.is_done(cell) for cell in every)
    return Outcome(out, len(every), num_done, session.num_run, session.failed)


def _check_at_hand(cells: Iterable[Cell]) -> None:
    """Raise unless the model and the files of every cell are there, before any of them runs."""
    checked: set[tuple[str, str]] = set()
    for cell in cells:
        data, wanted = cell.config.data, [("model", str(cell.config.model))]
        wanted += [(split, value) for split in SPLITS if (value := getattr(data, split))]
        for kind, spec in wanted:
            if (kind, spec) in checked:
                continue
            checked.add((kind, spec))
            try:
                if kind == "model":
                    resolve_model(spec)
                else:
                    find_source(spec, kind)
            except (DataError, ModelError) as error:
                problem = f"task {cell.task}, method {cell.method}: {error}"
                raise type(error)(problem) from None


def _run_phase(
    session: Session,
    phase: str,
    workers: int,
    backend: str,
    max_cells: int | None,
    notes: list[str],
) -> None:
    """Run what a phase needs, and what its results ask for in turn (a grid that is extended)."""
    told = not session.cells(phase)
    while True:
        todo = session.todo(phase)
        if max_cells is not None:
            todo = todo[: max(0, max_cells - session.num_run)]
        if todo or not told:
            session.begin(phase, todo, notes)
            notes.clear()  # they are said once
            told = True
        if not todo:
            return
        work = [(cell, session.store.prepare(cell)) for cell in todo]
        for cell, error in run_all(work, session.poll, workers, backend):
            session.end(cell, error)

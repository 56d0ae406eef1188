"""One call of the runner: what is known so far, what comes next, what failed, whom to tell.

OUT/experiment.yaml      what was asked
OUT/cells/<id>/          config.yaml, run/, log.txt, result.json or error.txt
OUT/results.jsonl        one line a cell (results.py), rewritten whenever a cell ends
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora.errors import ConfigError
from chainlora_lab.choice import Trial, choose, extensions
from chainlora_lab.expansion import Cell, Expansion, Pair, Point
from chainlora_lab.experiment import Experiment
from chainlora_lab.measure import with_curve
from chainlora_lab.outputs import write_whole
from chainlora_lab.results import (
    FILE,
    FORMAT,
    Results,
    cell_line,
    check_alike,
    check_format,
    experiment_line,
    parse_object,
    results_by_id,
    write_results,
)
from chainlora_lab.worker import CONFIG, ERROR, RESULT, RUN, dumped, load_cell

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]
Phase = str  # "tune" or "final"


class Session:
    """What is done is in the folder `out`; what follows from it is computed at every call.

    Cells count as done that have a result, or that OUT/results.jsonl or a file of `reuse` has.
    """

    def __init__(
        self,
        experiment: Experiment,
        out: Path | None,
        reuse: Iterable[str | Path] = (),
        listener: Listener | None = None,
    ) -> None:
        self.experiment, self.out = experiment, out
        self.listener = listener or (lambda record: None)
        self.expansion = Expansion(experiment)
        self.failed: dict[str, str] = {}
        self.num_run = 0
        self._attempted: set[str] = set()
        self._left = 0
        own = [] if out is None else [out / FILE]
        self._gathered = results_by_id(f for f in own if f.is_file() and f.stat().st_size)
        self._results = results_by_id(reuse) | self._gathered

    # --- what is done ---

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the cell's result; None if it has none. Raises RunError for another format."""
        if cell.id not in self._results and self.out is not None:
            found = _read(self.out / "cells" / cell.id / RESULT)
            if found is None:
                return None
            self._results[cell.id] = found
        return self._results.get(cell.id)

    def is_done(self, cell: Cell) -> bool:
        return self.result(cell) is not None

    def _done(self, cells: Iterable[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
        return [(cell, found) for cell in cells if (found := self.result(cell)) is not None]

    def num_done(self) -> tuple[int, int]:
        cells = self.all_cells()
        return len(self._done(cells)), len(cells)

    # --- what is known ---

    def cells(self, phase: Phase) -> list[Cell]:
        """Return the cells of a phase that are known by now."""
        return self._tuning()[0] if phase == "tune" else self.expansion.finals(self._chosen())

    def choices(self) -> list[dict[str, Any]]:
        """Return what is chosen: for each (task, method) once all of its tuning cells are done."""
        return self._tuning()[1]

    def _tuning(self) -> tuple[list[Cell], list[dict[str, Any]]]:
        """Return the tuning cells, grids extended as far as results ask for it, and the choices."""
        added: dict[Pair, list[Point]] = {}
        while True:
            cells = self.expansion.tuning(added)
            waiting = {(cell.task, cell.method) for cell in cells if not self.is_done(cell)}
            trials = [
                Trial(cell.task, cell.method, cell.point, found.get("validation"), found["metric"])
                for cell, found in self._done(cells)
                if (cell.task, cell.method) not in waiting
            ]
            records = choose(trials, self.experiment.tune.metric)
            grown = False
            for record in records:
                grid = self.experiment.grid(record["method"])
                new = extensions(record, grid, self.experiment.tune.extend)
                added.setdefault((record["task"], record["method"]), []).extend(new)
                grown = grown or bool(new)
            if not grown:
                return cells, records

    def _chosen(self) -> dict[Pair, list[Point]]:
        """Return the point of each (task, method) that is known; without a grid there is one."""
        alone = {pair: found for pair, found in self.expansion.points.items() if len(found) == 1}
        return alone | {
            (record["task"], record["method"]): [tuple(record["chosen"].items())]
            for record in self.choices()
            if record["chosen"] is not None
        }

    def all_cells(self) -> list[Cell]:
        """Return all cells, one a config; where nothing is chosen yet, as many stand-ins."""
        first = {pair: found[:1] for pair, found in self.expansion.points.items()}
        cells = [*self.cells("tune"), *self.expansion.finals(first | self._chosen())]
        return _one_a_config(cells)

    def results(self) -> Results:
        """Return the results so far, as a report reads them."""
        known = [cell for phase in ("tune", "final") for cell in self.cells(phase)]
        lines = [cell_line(cell, result) for cell, result in self._done(known)]
        choices = [{"format": FORMAT, "kind": "choice"} | record for record in self.choices()]
        return Results(experiment_line(self.experiment), choices, lines)

    # --- what comes next ---

    def todo(self, phase: Phase) -> list[Cell]:
        """Return the cells of a phase to run: not done, not tried by this call, one a config."""
        cells = [cell for cell in self.cells(phase) if cell.id not in self._attempted]
        return _one_a_config(cell for cell in cells if not self.is_done(cell))

    def begin(self, phase: Phase, todo: Sequence[Cell], notes: Sequence[str]) -> None:
        """Tell the listener what this phase will run."""
        cells = self.cells(phase)
        left_out = len(self.todo(phase)) - len(todo)
        self._attempted |= {cell.id for cell in todo}
        self._left = len(todo)
        record = {"event": "plan", "phase": phase, "cells": len(cells), "left_out": left_out}
        record |= {"done": len(self._done(cells)), "todo": [str(cell) for cell in todo]}
        self.listener(record | {"notes": list(notes)})

    def prepare(self, cell: Cell) -> Path:
        """Write the cell's config into its folder and return the folder."""
        assert self.out is not None
        directory = self.out / "cells" / cell.id
        directory.mkdir(parents=True, exist_ok=True)
        if self.is_done(cell):  # by another runner of this folder, meanwhile
            return directory
        config = with_curve(cell.config, self.experiment.curve_points)
        if (directory / RUN).exists():  # with the evaluations that this run started with
            try:
                every = load_cell(directory).train.eval_every
                train = config.train.model_copy(update={"eval_every": every})
                config = config.model_copy(update={"train": train})
            except ConfigError:  # of another version: the cell says so, and the others run
                logger.warning("%s cannot be read and is written again", directory / CONFIG)
        told = config.model_dump(mode="json", exclude_defaults=True)
        write_whole(directory / CONFIG, dumped(told))
        for name in (ERROR, RESULT):  # a result that is not whole
            (directory / name).unlink(missing_ok=True)
        return directory

    # --- while cells run ---

    def poll(self, running: Sequence[Cell]) -> None:
        self.listener({"event": "poll", "running": list(map(str, running))})

    def end(self, cell: Cell, error: str | None) -> None:
        """Take note of a cell that ended, tell the listener, and rewrite the results file."""
        self.num_run += 1
        self._left -= 1
        record = {"event": "cell", "cell": str(cell), "error": error, "left": self._left}
        if error is None:
            record |= self._outcome(cell)
        else:
            self.failed[str(cell)] = error
        self.listener(record)
        self.gather()

    def _outcome(self, cell: Cell) -> dict[str, Any]:
        """Return what is shown of a cell: of a tuning cell validation rows, never test rows."""
        result = self.result(cell)
        assert result is not None, cell
        shown = {"status": result["status"], "wall_s": result.get("wall_s")}
        if cell.phase == "final":
            split, score = result.get("score_split"), result.get("score")
            return shown | {"metric": result["metric"], "split": split, "score": score}
        metric = self.experiment.tune.metric or result["metric"]
        score = (result.get("validation") or {}).get(metric)
        return shown | {"metric": metric, "split": "validation", "score": score}

    def gather(self) -> None:
        """Write the results file from all cells that are done, and note what has failed.

        Cells that this file alone had get a folder first: committed results have no others. Raises
        RunError: cells of other rows or weights than the rest.
        """
        assert self.out is not None
        for name, result in self._gathered.items():
            if not (self.out / "cells" / name / RESULT).is_file():
                write_whole(self.out / "cells" / name / RESULT, dumped(result))
        self._gathered = {}
        found = self.results()
        check_alike(found.cells)
        for choice in found.choices:
            if choice["chosen"] is None:
                values = [each for tried in choice["tried"] for each in tried.get("values", ())]
                some = " under some seed" if any(each is not None for each in values) else ""
                self.failed[f"{choice['task']} {choice['method']}"] = (
                    f"every point of its grid diverged{some}"
                )
        for cell, result in self._done(self.cells("final")):
            if result["status"] == "diverged":
                self.failed[str(cell)] = result["message"]
        write_results(self.out / FILE, [found.experiment, *found.choices, *found.cells])


def _one_a_config(cells: Iterable[Cell]) -> list[Cell]:
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.id, cell)
    return list(found.values())


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = parse_object(path.read_bytes().decode("utf-8", errors="replace"))
    except ValueError as error:
        logger.warning("%s is no result (%s): its cell is computed again", path, error)
        return None
    check_format(str(path), result)
    return result

"""One call of the runner: what is known so far, what comes next, what failed, whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chainlora.errors import ConfigError
from chainlora.experiments.choice import Trial, choose, extensions
from chainlora.experiments.expansion import Cell, Expansion, Point
from chainlora.experiments.results import (
    Results,
    cell_line,
    check_alike,
    choice_line,
    experiment_line,
    write_results,
)
from chainlora.experiments.schema import Experiment
from chainlora.experiments.store import Store

Listener = Callable[[Mapping[str, Any]], None]
Phase = str  # "tune" or "final"


class Session:
    """What is done is in the store; what follows from it is computed at every call."""

    def __init__(self, experiment: Experiment, store: Store, listener: Listener) -> None:
        self.experiment, self.store, self.listener = experiment, store, listener
        self.expansion = Expansion(experiment)
        self.failed: dict[str, str] = {}
        self.num_run = 0
        self._attempted: set[str] = set()
        self._left = 0

    # --- what is known ---

    def cells(self, phase: Phase) -> list[Cell]:
        """Return the cells of a phase that are known by now."""
        if phase == "tune":
            return self._tuning()[0]
        return self.expansion.finals(self.chosen())

    def choices(self) -> list[dict[str, Any]]:
        """Return what is chosen: for each (task, method) once all of its tuning cells are done."""
        return self._tuning()[1]

    def _tuning(self) -> tuple[list[Cell], list[dict[str, Any]]]:
        """Return the tuning cells, grids extended as far as results ask for it, and the choices."""
        added: dict[tuple[str, str], list[Point]] = {}
        while True:
            cells = self.expansion.tuning(added)
            records = self._choose(cells)
            grown = False
            for record in records:
                grid = self.experiment.grid(record["method"])
                new = extensions(record, grid, self.experiment.tune.extend)
                added.setdefault((record["task"], record["method"]), []).extend(new)
                grown = grown or bool(new)
            if not grown:
                return cells, records

    def _choose(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        waiting = {(cell.task, cell.method) for cell in cells if not self.store.is_done(cell)}
        trials = [self._trial(cell) for cell in cells if (cell.task, cell.method) not in waiting]
        return choose(trials, self.experiment.tune.metric)

    def _trial(self, cell: Cell) -> Trial:
        result = self._result(cell)
        metrics = result["validation"] if result["status"] == "done" else None
        if metrics is None and result["status"] == "done":
            raise ConfigError(
                f"hyper-parameters are chosen on validation rows (got none for {cell}); give "
                "data.validation or leave `tune` out"
            )
        return Trial(cell.task, cell.method, cell.point, metrics, result["metric"])

    def _result(self, cell: Cell) -> dict[str, Any]:
        result = self.store.result(cell)
        assert result is not None, cell
        return result

    def chosen(self) -> dict[tuple[str, str], Point]:
        """Return the point of each (task, method) that is known; without a grid there is one."""
        chosen = {
            (record["task"], record["method"]): tuple(record["chosen"].items())
            for record in self.choices()
            if record["chosen"] is not None
        }
        return self.expansion.first_points(only=True) | chosen

    def all_cells(self) -> dict[str, Cell]:
        """Return all cells by id; where nothing is chosen yet, stand-ins of the same number."""
        points = self.expansion.first_points() | self.chosen()
        cells = [*self.cells("tune"), *self.expansion.finals(points)]
        return {cell.id: cell for cell in reversed(cells)}

    def results(self) -> Results:
        """Return the results so far, as a report reads them."""
        done = [cell for phase in ("tune", "final") for cell in self.cells(phase)]
        lines = [cell_line(cell, self._result(cell)) for cell in done if self.store.is_done(cell)]
        choices = [choice_line(record) for record in self.choices()]
        return Results(experiment_line(self.experiment), choices, lines)

    # --- what comes next ---

    def todo(self, phase: Phase) -> list[Cell]:
        """Return the cells of a phase to run: not done, not tried by this call, one a config."""
        cells = {cell.id: cell for cell in reversed(self.cells(phase))}
        return [
            cell
            for cell in reversed(cells.values())
            if cell.id not in self._attempted and not self.store.is_done(cell)
        ]

    def begin(self, phase: Phase, todo: Sequence[Cell], notes: Sequence[str]) -> None:
        """Tell the listener what this phase will run."""
        cells = self.cells(phase)
        left_out = len(self.todo(phase)) - len(todo)
        self._attempted |= {cell.id for cell in todo}
        self._left = len(todo)
        self.listener(
            {
                "event": "plan",
                "phase": phase,
                "cells": len(cells),
                "done": sum(self.store.is_done(cell) for cell in cells),
                "todo": [str(cell) for cell in todo],
                "left_out": left_out,
                "notes": list(notes),
            }
        )

    def note_failures(self) -> None:
        """Take note of what a choice or a final run could not give."""
        for record in self.choices():
            if record["chosen"] is None:
                self.failed[f"{record['task']} {record['method']}"] = (
                    "every point of its grid diverged"
                )
        for cell in self.cells("final"):
            result = self.store.result(cell)
            if result is not None and result["status"] == "diverged":
                self.failed[str(cell)] = result["message"]

    # --- while cells run ---

    def poll(self, running: Sequence[Cell]) -> None:
        """Tell the listener which cells run."""
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
        result = self._result(cell)
        shown = {"status": result["status"], "wall_s": result.get("wall_s")}
        if cell.phase == "final":
            return shown | {
                "metric": result["metric"],
                "split": result.get("score_split"),
                "score": result.get("score"),
            }
        metric = self.experiment.tune.metric or result["metric"]
        score = (result.get("validation") or {}).get(metric)
        return shown | {"metric": metric, "split": "validation", "score": score}

    def gather(self) -> None:
        """Write the results file from all cells that are done.

        Raises RunError: cells of other rows or weights than the rest.
        """
        found = self.results()
        check_alike(found.cells)
        self.note_failures()
        write_results(self.store.results_file, [found.experiment, *found.choices, *found.cells])

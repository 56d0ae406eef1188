"""A gate: what a command has added to a run is undone if earlier rows score worse with it.

The row of the matrix (`evaluation.stage_scores`) of the new state is compared with that of the
state before, in each column that this has.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Collection
from pathlib import Path

from chainlora.errors import ConfigError, ForgettingError, RunError
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.stage_scores import Cell, Progress, stage_matrix
from chainlora.runs.addresses import state_at
from chainlora.runs.changes import undo
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history
from chainlora.runs.open_base import OpenBase

logger = logging.getLogger(__name__)


def need_scored_rows(run: Path, history: History, limit: float) -> None:
    """Raise ConfigError for a limit that is none, and RunError for a run, as it is before a command
    adds to it, that has no rows to compare scores of."""
    if not 0 <= limit < math.inf:
        raise ConfigError("--max-forgetting must be 0 or more", limit, "give 0.02, for example")
    state = state_at(run, history)
    if not state.keepers.keys() & {*state.columns.values()}:
        rule = "--max-forgetting compares scores of rows that the run kept before"
        got = f"none in {run}" if history.entries else "a new run"
        raise RunError(rule, got, "leave it out, or train earlier stages with data.keep_rows: true")


def check_forgetting(
    run: Path,
    names: Collection[str],
    limit: float,
    progress: Progress | None = None,
    base: OpenBase | None = None,
) -> str:
    """Compare a run before and after the last of some stages, and say that it held.

    `limit` is the most that a column may lose (`loss_of`). Without such a stage at the head of the
    run, or just undone there, nothing is compared, and nothing said.

    Raises ForgettingError where a column has lost more; the run is then what it was before.
    """
    history = read_history(run)
    before, after = _before_and_after(history, names)
    if before is None or after is None:
        return ""
    rows = [
        stage_matrix(state_at(run, history, key), progress=progress, base=base, of=columns).grid[-1]
        for columns in [list(state_at(run, history, before).columns)]
        for key in (before, after)
    ]
    pairs = [(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
    fallen = [_in_words(a, b) for a, b in pairs if not loss_of(a, b) <= limit]
    what = f"{after} instead of {before}"
    if not fallen:
        columns = ", ".join(a.stage for a, _ in pairs)
        return f"no column of {columns} lost more than {limit:g} by {what}"
    if read_history(run).head == after:
        undo(run)
    raise ForgettingError(
        f"{what} forgets more than --max-forgetting {limit:g}",
        "; ".join(fallen),
        f"{run} is {before}, as before; chainlora redo {shlex.quote(str(run))} takes {after}",
    )


def _before_and_after(history: History, names: Collection[str]) -> tuple[str | None, str | None]:
    """Return the states of a run before and after stages of these names, if they are its head or
    were undone last."""

    def is_of_them(key: str) -> bool:
        entry = history.find(key)
        return entry is not None and entry.unit in names

    if is_of_them(history.head):
        return (history.past[-1] if history.past else None), history.head
    undone = history.future[0] if history.future else None
    return (history.head, undone) if undone and is_of_them(undone) else (None, None)


def loss_of(before: Cell, after: Cell) -> float:
    """Return how much worse a score has become: the difference of an accuracy, or of a loss the
    relative rise of its perplexity."""
    if is_higher_better(before.metric):
        return before.value - after.value
    if before.metric == "loss":
        return math.expm1(min(after.value - before.value, 700))
    return after.value / before.value - 1


def _in_words(before: Cell, after: Cell) -> str:
    verb = "fell" if is_higher_better(before.metric) else "rose"
    rise = "" if verb == "fell" else f", perplexity by {loss_of(before, after):.1%}"
    values = f"from {before.value:.4f} to {after.value:.4f}"
    return f"{before.metric} of {before.stage} {verb} {values}{rise}"

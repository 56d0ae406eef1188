"""Change what a run is, without training: `undo`, `redo`. `log` lists what it has been.

Each is one replacement of ``history.json``. None deletes anything.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from chainlora.errors import RunError
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.draft import drafts_in
from chainlora.runs.history import BASE, History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.paths import split_address
from chainlora.runs.state import OpenState

MATRIX = "matrix.jsonl"  # scores by digests of states (`evaluation.stage_scores`)


def whole_run(run: str | Path) -> Path:
    """Return the folder of a run. Raises RunError for ``RUN@NAME``, and without a run."""
    folder, name = split_address(run)
    if name is not None:
        raise RunError("This command needs the whole run", run, f"leave @{name} out")
    open_run(folder)  # raises RunError for a folder without a run
    return folder


def undo(run: str | Path, to: str | None = None) -> OpenState:
    """Move the head back to the state before the last stage or combination, or to the entry `to`.

    Nothing is deleted: rows and links stay in the run. `redo` takes an `undo` back; an `undo` with
    `to` is taken back by another `undo`. Returns the new state.

    Raises RunError if there is nothing to undo.
    """
    run = whole_run(run)

    def change(history: History) -> History:
        if to is not None:
            return history.moved(state_at(run, history, to).key)
        if not history.past:
            states = f"chainlora log {shlex.quote(str(run))} lists its states"
            raise RunError(f"Nothing to undo in {run}. {states}.")
        *past, head = history.past
        future = (history.head, *history.future)
        update = {"head": head, "past": tuple(past), "future": future, "target": None}
        return history.model_copy(update=update)

    update_history(run, change)
    return open_run(run)


def redo(run: str | Path) -> OpenState:
    """Take back the last `undo` without `to`. Returns the new state.

    Raises RunError if there is nothing to redo.
    """
    run = whole_run(run)

    def change(history: History) -> History:
        if not history.future:
            states = f"chainlora log {shlex.quote(str(run))} lists its states"
            raise RunError(f"Nothing to redo in {run}. {states}.")
        head, *future = history.future
        past = (*history.past, history.head)
        update = {"head": head, "past": past, "future": tuple(future), "target": None}
        return history.model_copy(update=update)

    update_history(run, change)
    return open_run(run)


def log(run: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a run, the latest first.

    Unbuilt entries come first, with a ``name`` and the ``kind`` "declared" or "training". A built
    entry has its ``name``, ``kind``, ``state`` (a digest), ``parents``, the names of its
    ``stages``, the number of its ``links``, whether it kept ``rows``, and when it ``ended``;
    ``now`` marks the head, ``before`` its ancestors. If the head is the base and an entry is
    built, the base comes last, as the ``kind`` "base" without the time when it ``ended``.
    """
    folder, _ = split_address(run)
    history = read_history(folder)
    before = {entry.key for entry in history.lineage(history.head)}
    built = [
        {
            "name": entry.key,
            "kind": entry.kind,
            "state": entry.state.digest,
            "parents": list(entry.parents),
            "stages": history.stages_of(entry.key),
            "links": len(entry.state.links),
            "rows": entry.kept is not None,
            "ended": entry.ended,
            "now": entry.key == history.head,
            "before": entry.key in before and entry.key != history.head,
        }
        for entry in reversed(history.entries)
    ]
    if history.head == BASE and history.entries:
        base = {"name": BASE, "kind": BASE, "state": history.empty.digest, "parents": []}
        counts = {"stages": [], "links": 0, "rows": False, "ended": None}
        built.append({**base, **counts, "now": True, "before": False})
    begun = drafts_in(folder, history)
    unbuilt: list[dict[str, Any]] = [
        {"name": entry.key, "kind": "training" if entry.key in begun else "declared"}
        for entry in reversed(history.unbuilt)
    ]
    return unbuilt + built

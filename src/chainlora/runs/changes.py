"""Change what a run is, without training: `undo`, `redo`. `log` lists what it has been.

Each is one replacement of ``history.json``. None deletes anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chainlora.errors import RunError
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.documents import short_digest
from chainlora.runs.draft import drafts_in
from chainlora.runs.entries import BASE, Entry
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.keys import Made
from chainlora.runs.locks import Scratch, writing
from chainlora.runs.paths import split_address
from chainlora.runs.recipes import How, Recipe
from chainlora.runs.state import OpenState

MATRIX = "matrix.jsonl"  # scores by digests of states (`evaluation.stage_scores`)


def scored_on(kept: str, reference: str) -> str:
    """Return a digest of kept rows, by their SHA-256, and for DPO of the state of their reference.

    A score in the matrix is of a state and of this digest.
    """
    return short_digest([kept, reference])


def whole_run(run: str | Path) -> Path:
    """Return the folder of a run. Raises RunError for ``RUN@NAME``, and without a run."""
    folder, name = split_address(run)
    if name is not None:
        raise RunError("This command needs the whole run", run, f"leave @{name} out")
    open_run(folder)  # raises RunError for a folder without a run
    return folder


def undo(run: str | Path, to: str | None = None) -> OpenState:
    """Go back to the state before the last command, or make the run the entry `to`.

    A stage in training is dropped, with its checkpoint. Otherwise nothing is deleted: rows and
    links stay in the run. `redo` takes an `undo` back; an `undo` with `to` is taken back by another
    `undo`. Returns the new state.

    Raises RunError if there is nothing to undo.
    """
    run = whole_run(run)
    with writing(run):
        history = read_history(run)
        if to is not None:
            update_history(run, lambda now: _become(run, now, to))
        elif drafts := drafts_in(run, history):
            for folder in drafts.values():
                Scratch(run, folder).undo()
            update_history(run, lambda now: now.dropped())
        else:
            _move(run, earlier_of(history), "undo")
    return open_run(run)


def work_left(history: History) -> list[str]:
    """Return what a run lacks of its plan, such as "train facts", in the order of the work."""
    made, wanted = Made(history), history.recipes().wanted
    return [_named(r) for r in dict.fromkeys(r for each in wanted for r in made.unmade(each))]


def _named(recipe: Recipe) -> str:
    if recipe.stage is not None:
        return f"train {recipe.stage.name}"
    parts = ", ".join(part.stage.name for part in recipe.parents if part.stage is not None)
    return f"combine {parts}" if recipe.kind == "combine" else "keep rows of the base"


def earlier_of(history: History) -> dict[str, int]:
    """Return what a run was before, the newest first: entries, each with the place of a version."""
    return _others(history, history.ancestors())


def later_of(history: History) -> dict[str, int]:
    """Return what `redo` goes to, the next first: entries, each with the place of a version."""
    made_from = {version.before: place for place, version in enumerate(history.versions)}
    places, at = list[int](), history.at
    while at in made_from:  # the version that was made from it last
        places.append(at := made_from[at])
    return _others(history, places)


def _others(history: History, places: Iterable[int]) -> dict[str, int]:
    """Return the entries that versions come to and that are not the head, as they are named now."""
    found, made = dict[str, int](), Made(history)
    for place in places:
        root = history.recipes(place).root
        if made.is_made(root):
            entry = made.entry(root)
            found.setdefault(BASE if entry is None else entry.key, place)
    found.pop(history.head, None)
    return found


def _become(run: Path, history: History, name: str) -> History:
    """Return the history of a run that is an entry, as a new version."""
    entry = state_at(run, history, name).entry
    key, how = (BASE, How()) if entry is None else (entry.key, entry.how)
    return history.edited(history.plan_of([key], how), f"undo --to {key}")


def _move(run: Path, places: Mapping[str, int], verb: str) -> None:
    """Go to the first of the versions. Raises RunError without one."""
    if not places:
        states = f"chainlora log {shlex.quote(str(run))} lists its states"
        raise RunError(f"Nothing to {verb} in {run}. {states}.")
    at = next(iter(places.values()))
    update_history(run, lambda now: now.moved(at))


def redo(run: str | Path) -> OpenState:
    """Go to the version that was made last from the current one. Returns the new state.

    Raises RunError if there is nothing to redo.
    """
    run = whole_run(run)
    with writing(run):
        _move(run, later_of(read_history(run)), "redo")
    return open_run(run)


def log(run: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a run, the latest first.

    Unfinished stages come first, with a ``name`` and the ``kind`` "declared" or "training". An
    entry has its ``name``, ``kind``, ``state`` (a digest), ``parents``, the names of its
    ``stages``, the number of its ``links``, whether it kept ``rows``, and when it ``ended``;
    ``now`` marks the head, ``before`` its ancestors. If the head is the base and an entry is
    built, the base comes last, as the ``kind`` "base" without the time when it ``ended``.
    """
    folder, _ = split_address(run)
    history = read_history(folder)
    before = {entry.key for entry in history.lineage(history.head)}
    shown, base = [*reversed(history.entries)], Entry(key=BASE, kind="import", state=history.empty)
    if history.head == BASE and shown:
        shown.append(base)
    built = [
        {
            "name": entry.key,
            "kind": BASE if entry is base else entry.kind,
            "state": entry.state.digest,
            "parents": list(entry.parents),
            "stages": history.stages_of(entry.key),
            "links": len(entry.state.links),
            "rows": entry.kept is not None,
            "ended": entry.ended or None,
            "now": entry.key == history.head,
            "before": entry.key in before and entry.key != history.head,
        }
        for entry in shown
    ]
    begun = drafts_in(folder, history)
    names = [name for name in reversed(history.plan().names) if history.find(name) is None]
    unbuilt: list[dict[str, Any]] = [
        {"name": name, "kind": "training" if name in begun else "declared"} for name in names
    ]
    return unbuilt + built

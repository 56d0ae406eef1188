"""Delete a stage or a combination of a run for good.

`without_stage` edits the plan: the stage goes, with all that stands on it, and is marked. When what
is left has been computed, `purge` deletes every file that the history without the marks does not
name, and then replaces the history. So a kill leaves the run as it was, or with the marks, and the
next command deletes the rest.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from chainlora import files
from chainlora.errors import FileError, RunError
from chainlora.runs.changes import MATRIX, scored_on, whole_run
from chainlora.runs.draft import drafts_in, ended_leftovers
from chainlora.runs.entries import CONTENT, START
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.keys import Made
from chainlora.runs.paths import HISTORY

_SHOWN = ("chain.png", "report.html")  # pictures of a whole run


@dataclass(frozen=True)
class Pruning:
    """What a pruning deletes and changes."""

    stage: str
    gone: list[Path]  # files and folders to delete
    with_it: list[str]  # entries to delete, since they were computed from it: combinations, …
    later: list[str]  # stages on top of it, which are deleted too
    left: list[str]  # the stages that the run is made of then
    again: bool  # whether these must be combined again
    now: str | None  # the new head, if it is known and changes


def plan_pruning(run: str | Path, name: str) -> Pruning:
    """Return what deleting a stage or a combination would delete; change nothing.

    Raises RunError for an unknown one, for the only stage, for a combination that the current state
    or a stage stands on, and while a stage is in training.
    """
    run = whole_run(run)
    return pruning_of(run, read_history(run), name)


def pruning_of(run: Path, history: History, name: str) -> Pruning:
    """Return what deleting an entry deletes; see `plan_pruning`."""
    edited = without_stage(run, history, name)
    version = edited.versions[edited.at]
    after = edited.erased(version.marks) if version.marks else edited
    deleted = {e.key for e in history.entries} - {e.key for e in after.entries}
    later = [s for s in history.plan().standing_on([name]) if s != name] if version.marks else []
    made, root = Made(after), after.recipes().root
    is_made = made.is_made(root)
    return Pruning(
        stage=name,
        gone=_gone(run, after, name),
        with_it=sorted(deleted - {name, *later}),
        later=later,
        left=after.plan().parts(after.plan().active),
        again=not is_made,
        now=after.head if is_made and after.head != history.head else None,
    )


def without_stage(run: Path, history: History, name: str) -> History:
    """Return the history without a stage, which is marked; or without a combination."""
    if begun := [folder for key, folder in drafts_in(run, history).items() if key != name]:
        rule = f"Cannot prune: stage {begun[0].name} is unfinished"
        raise RunError(rule, begun[0], f"finish it, or prune {begun[0].name} first")
    entry, plan = history.find(name), history.plan()
    if entry is not None and entry.kind == "combine":
        _need_unused(run, history, name)
        return history.without_entries([name])
    if entry is not None and entry.identity in history.former:  # it has been changed since
        return history.marked([entry.identity])
    known = {identity for identity, stage in history.stages.items() if stage.name == name}
    if not known:
        leftovers = {path.name.partition(".")[0] for path in (run / "stages").glob("*")}
        if name in leftovers - {e.key for e in history.entries}:  # of a kill
            return history
        names = ", ".join(e.key for e in history.entries if e.key != START)
        rule = f"an entry to prune must be one of {names}"
        raise RunError(rule, f"{name!r} for {run}", "name one")
    gone = plan.standing_on([name])
    if not {s.name for s in history.stages.values()} - {name, *gone}:
        raise RunError("a run must keep a stage", f"{name!r}, its only one", f"delete {run}")
    marks = {s.identity for s in plan.stages if s.name in gone} | known
    after = history.edited(plan.without([name]), f"prune {name}").marked(marks)
    _need_rows(run, after, name)
    return after


def _need_unused(run: Path, history: History, name: str) -> None:
    """Raise RunError if the current state or a stage stands on a combination."""
    needed = [history.head, *(e.key for e in history.entries if e.has_config)]
    if above := [key for key in needed if name in history.below(key)]:
        got, place = above[0], shlex.quote(str(run))
        remedy = f"keep it, or prune that one first: chainlora prune {place} {got} --yes"
        if got == history.head:
            got += ", the current state"
            remedy = f"keep it, or leave that state first: chainlora undo {place}"
        raise RunError(f"Cannot prune {name}: an entry is computed from it", got, remedy)


def _need_rows(run: Path, history: History, name: str) -> None:
    """Raise RunError if what is left cannot be combined again, since stages have no kept rows."""
    made, root = Made(history), history.recipes().root
    due = [recipe for recipe in made.unmade(root) if recipe.kind == "combine"]
    stages = [stage for recipe in due for stage in recipe.lineage]
    entries = [made.entry(stage) for stage in stages]
    without = [e.key for e in entries if e is not None and e.kept in (None, *history.unsent)]
    if without:
        place = shlex.quote(str(run))
        raise RunError(
            "Cannot prune: the combination of what is left reads kept rows (got none of "
            f"{', '.join(without)}). Use a copy with rows (chainlora push --rows sends them), or "
            f"leave the combination first: chainlora undo {place} --to {without[0]}, then "
            f"chainlora prune {place} {name} --yes."
        )


def purge(run: Path, name: str = "") -> History:
    """Delete what the current version marks, with all that was computed from it.

    The files go first, the folder of `name` last: while it exists, a kill is seen. Raises FileError
    for a file that cannot be deleted.
    """
    history = read_history(run)
    after = history.erased(history.versions[history.at].marks)
    _keep_scores(run, after)
    for path in _gone(run, after, name):
        files.remove(path)
        if path.exists():
            remedy = "check its permissions and the free space, and repeat the command"
            raise FileError("a file must be deleted", path, remedy)
        with files.reported(path.parent, "deleted"):  # at once: the folder of the stage is last
            files.remove_scratch(path.parent)
            files.sync_folder(path.parent)
    return update_history(run, lambda history: after)


def _gone(run: Path, history: History, name: str) -> list[Path]:
    """Return what to delete, in order: what the history does not name, and outdated pictures."""
    named = {"/".join(file.split("/")[:2]) for file in history.files}
    folders = (*CONTENT, "stages")
    gone = [path for folder in folders for path in (run / folder).glob("*")]
    gone = [path for path in gone if path.relative_to(run).as_posix() not in named]
    gone += ended_leftovers(run, history)
    gone += [run / shown for shown in _SHOWN if (run / shown).exists()]
    # scratch files of a killed report may hold rows; those of the history go when it is replaced
    scratch = (path for path in run.iterdir() if files.is_scratch(path.name))
    gone += [path for path in scratch if not path.name.startswith(f"{HISTORY}.")]
    return sorted(gone, key=lambda path: (path == run / "stages" / name, path))


def _keep_scores(run: Path, history: History) -> None:
    """Delete scores of states and rows that were deleted."""
    path = run / MATRIX
    files.remove_scratch(run, MATRIX)
    if not path.is_file():
        return
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    rows = {
        scored_on(entry.kept, reference)
        for entry in history.entries
        if entry.kept is not None
        for reference in ("", history.state_of(entry.parent).digest)
    }
    with files.reported(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _is_valid(line, states, rows)]
    files.write_text(path, "".join(f"{line}\n" for line in kept))


def _is_valid(line: str, states: Collection[str], rows: Collection[str]) -> bool:
    """Say whether the state and the rows of a score exist."""
    try:
        cell = json.loads(line)
        return cell["state"] in states and cell["scored_on"] in rows
    except (ValueError, LookupError, TypeError):
        return False

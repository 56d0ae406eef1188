"""Delete a stage or a combination of a run for good; combine the other stages again.

It is one replacement of ``history.json``; then files that the history does not name are deleted:
scores of the matrix, links, rows and pictures.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.errors import FileError, RunError
from chainlora.runs.addresses import state_at
from chainlora.runs.changes import MATRIX, whole_run
from chainlora.runs.draft import drafts_in, ended_leftovers
from chainlora.runs.history import (
    BASE,
    CONTENT,
    START,
    Entry,
    History,
    Recipe,
    Unbuilt,
)
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.paths import HISTORY

_SHOWN = ("chain.png", "report.html")  # pictures of a whole run
Solve = Callable[[Path, History, Unbuilt], Callable[[History], History]]
"""Solves a combination of a history, and returns a function that builds its entry."""

_WITH_LINKS = ("stage", "import")  # kinds of entries that links or rows were saved for


@dataclass(frozen=True)
class Pruning:
    """What a pruning deletes and changes."""

    stage: str
    gone: list[Path]  # files and folders to delete
    with_it: list[str]  # entries to delete, since they used its rows: combinations, …
    later: list[str]  # stages on top of it, which continue without its links
    before: str  # the entry that the stage began on
    left: list[str]  # parts to combine again
    again: list[Unbuilt]  # the combination of these parts
    now: str | None  # the new head, if it changes


def plan_pruning(run: str | Path, name: str) -> Pruning:
    """Return what deleting a stage or a combination would delete; change nothing.

    Raises RunError for an unknown one, for the only stage, for a combination that the current state
    or a stage stands on, and while a stage is in training.
    """
    run = whole_run(run)
    return _planned(run, read_history(run), name)[0]


def _planned(run: Path, history: History, name: str) -> tuple[Pruning, History]:
    """Return what deleting a stage deletes, and the history without it."""
    _need_idle(run, history, name)
    _need_prunable(run, history, name)
    entry, declared = history.find(name), history.find_unbuilt(name)
    after, with_it = _without(history, name)
    remaining = [e.key for e in after.entries if e.has_config]
    remaining += [e.key for e in after.unbuilt if declared is not None and e.has_config]
    begun = declared if entry is None else entry if entry.has_config else None
    if begun is not None and begun.kind in _WITH_LINKS and not remaining:
        raise RunError("a run must keep a stage", f"{name!r}, its only one", f"delete {run}")
    on_top = [key for key in remaining if name in {below.key for below in history.lineage(key)}]
    before = BASE if entry is None else entry.parent
    top = _top(history, after)
    parts: list[str] = []
    if declared is None or declared.kind != "combine":  # which must not be declared again
        after, parts = _with_combination(history, after, top)
    new_head = None if after.head == history.head else after.head
    again = [entry for entry in after.unbuilt if entry not in history.unbuilt]
    if again:
        _need_rows(run, history, name, parts)
    gone = _gone(run, after, name)
    done = (name, gone, with_it, on_top, before, parts, again, new_head)
    return Pruning(*done), after


def _need_prunable(run: Path, history: History, name: str) -> None:
    """Raise RunError unless a name is that of an entry to prune, or of leftovers of one."""
    entry = history.find(name)
    if entry is not None and entry.kind == "combine":
        _need_unused(run, history, name)
        return
    leftovers = {path.name.partition(".")[0] for path in (run / "stages").glob("*")}  # of a kill
    leftovers |= {unbuilt.key for unbuilt in history.unbuilt}
    if name.startswith("after-") and {p.name for p in (run / "links").glob("*")} - {*history.links}:
        leftovers.add(name)  # a combination has no folder of its own
    is_leftover = entry is None and name in leftovers
    if not is_leftover and (entry is None or entry.kind not in _WITH_LINKS):
        names = ", ".join(e.key for e in history.entries)
        rule = f"an entry to prune must be one of {names}"
        raise RunError(rule, f"{name!r} for {run}", "name one")


def _need_unused(run: Path, history: History, name: str) -> None:
    """Raise RunError if the current state, its target or a stage stands on a combination."""
    entries = [*history.entries, *history.unbuilt]
    stages = [entry.key for entry in entries if entry.has_config]
    needed = [history.head, history.target or BASE, history.origin, *stages]
    if above := [key for key in needed if name in history.below(key)]:
        got, place = above[0], shlex.quote(str(run))
        remedy = f"keep it, or prune that one first: chainlora prune {place} {got} --yes"
        if got in (history.head, history.target):
            got += ", the current state" if got == history.head else ", which is to be built"
            remedy = f"keep it, or leave that state first: chainlora undo {place}"
        elif got == history.origin:
            got, remedy = f"{got}, on which the run began", "keep it"
        raise RunError(f"Cannot prune {name}: an entry is computed from it", got, remedy)


def _top(history: History, after: History) -> str:
    """Return the head, or what was to become the head if that was deleted before it was built."""
    is_withdrawn = history.target is not None and after.target is None
    return history.target if is_withdrawn and history.target is not None else history.head


def _need_rows(run: Path, history: History, name: str, parts: Sequence[str]) -> None:
    """Raise RunError if what is left cannot be combined again, since parts have no kept rows."""
    stages = [key for key in parts if key != START and history.find(key) is not None]
    if without := [key for key in stages if not history.keepers([key]).keys() - {START}]:
        place = shlex.quote(str(run))
        raise RunError(
            "Cannot prune: the combination of what is left reads kept rows (got none of "
            f"{', '.join(without)}). Use a copy with rows (chainlora push --rows sends them), or "
            f"leave the combination first: chainlora undo {place} --to {without[0]}, then "
            f"chainlora prune {place} {name} --yes."
        )


def _with_combination(history: History, after: History, top: str) -> tuple[History, list[str]]:
    """Declare a combination of the surviving parts of `top`; return the history and these parts.

    No parts are returned if the new head consists of them already. `after` is the pruned history.
    """
    parts = history.without_ancestors(
        survivor
        for part in history.parts(top)
        for survivor in _surviving_parts(part, history, after)
    )
    if {*parts} == {*after.parts(after.head)}:
        return after, []
    if len(parts) > 1:
        recipe, key = _recipe_below(history, top).of_parts(parts), after.name_after(parts)
        known = after.combination(parts, recipe)
        if known is None:
            known = Unbuilt(key=key, kind="combine", parents=tuple(parts), unit=key, recipe=recipe)
            after = after.declared([known], None)
        after = after.declared([], known.key)
    elif top != history.head != after.head and after.find(parts[0]) is not None:
        after = after.model_copy(update={"head": parts[0]})
    return after, parts


def _recipe_below(history: History, key: str) -> Recipe:
    """Return the recipe of a combination, or of the nearest one that an entry stands on."""
    entry = history.known(key)
    while entry is not None and entry.kind != "combine":
        entry = history.known(entry.parent)
    return Recipe() if entry is None else entry.recipe


def _surviving_parts(key: str, history: History, after: History) -> list[str]:
    """Return a part, or if it was pruned, its nearest surviving ancestors."""
    entry = history.known(key)
    if entry is None or after.known(key) is not None:
        return [key]
    below = (part for parent in entry.parents for part in history.parts(parent))
    return [survivor for part in below for survivor in _surviving_parts(part, history, after)]


def prune_stage(run: str | Path, name: str, solve: Solve) -> Pruning:
    """Delete a stage for good: links, rows, config, records, result, scores. Return what went.

    What is left is checked and combined first. Then the history is replaced, and last, files that
    it does not name are deleted. So an error or a kill leaves the run as it was, or without the
    stage; the same call again deletes the rest.

    Raises what `plan_pruning` and `solve` raise, RunError if what is left is damaged, and FileError
    for a file that cannot be deleted.
    """
    run = whole_run(run)
    before = read_history(run)
    plan, after = _planned(run, before, name)
    left = [key for key in plan.left or [after.head] if after.find(key) is not None]
    for key in left:
        state_at(run, after, key).verify()
    due = [e for e in plan.again if e.kind == "combine" and {*e.parents} <= {*left}]
    builds = [solve(run, after, entry) for entry in due]

    update_history(
        run,
        lambda history: reduce(lambda left, build: build(left), builds, after),
        lambda: _delete_unnamed(run, name),
    )
    return plan


def _delete_unnamed(run: Path, name: str) -> None:
    """Delete the scores and files that belong to no entry of the history."""
    history = read_history(run)
    _keep_scores(run, history)
    gone = _gone(run, history, name)
    for path in gone:
        files.remove(path)
        if path.exists():
            remedy = "check its permissions and the free space, and repeat the command"
            raise FileError("a file must be deleted", path, remedy)
        with files.reported(path.parent, "deleted"):  # at once: the folder of the stage is last
            files.remove_scratch(path.parent)
            files.sync_folder(path.parent)


def _need_idle(run: Path, history: History, name: str) -> None:
    """Raise RunError if another stage is unfinished."""
    if begun := [folder for key, folder in drafts_in(run, history).items() if key != name]:
        rule = f"Cannot prune: stage {begun[0].name} is unfinished"
        raise RunError(rule, begun[0], f"finish it, or prune {begun[0].name} first")


def _without(history: History, name: str) -> tuple[History, list[str]]:
    """Return a history without a stage, and the keys of the entries that were deleted with it."""
    if history.find(name) is None:
        after = history.withdrawn([name])
        left = {name, *(entry.key for entry in after.unbuilt)}
        return after, [entry.key for entry in history.unbuilt if entry.key not in left]
    deleted = _deleted_with(history, name)
    cut = _Cut(history, name, deleted)
    entries = tuple(cut.without_links(e) for e in history.entries if e.key not in deleted)
    used = {d for e in entries for d in (*e.tied, *e.state.links)}
    *past, head = cut.heads([*history.past, history.head])
    update = {
        "entries": entries,
        "links": {d: facts for d, facts in history.links.items() if d in used},
        "head": head,
        "origin": cut.survivors([history.origin])[0],
        "past": tuple(past),
        "future": tuple(cut.heads([head, *history.future])[1:]),
    }
    unbuilt = [e.key for e in history.unbuilt if deleted.keys() & history.below(e.key)]
    after = history.withdrawn(unbuilt).model_copy(update=update)
    return after, [*(key for key in deleted if key != name), *unbuilt]


def _deleted_with(history: History, name: str) -> dict[str, tuple[str, ...]]:
    """Return a stage and all entries that must go with it, each with its parents.

    A combination cannot be shortened: its link was solved from rows and links of all its parts.
    Every entry on a deleted combination goes too.
    """
    deleted, combined = dict[str, tuple[str, ...]](), set[str]()
    for entry in history.entries:
        has_read = name in entry.reads and entry.kind != "stage"
        is_above = name in {below.key for below in history.lineage(entry.key)}
        is_combination = entry.kind == "combine" and (has_read or is_above)
        if {*entry.parents} & combined or is_combination:
            combined.add(entry.key)
        if entry.key == name or has_read or entry.key in combined:
            deleted[entry.key] = entry.parents
    return deleted


@dataclass(frozen=True)
class _Cut:
    """A history, and the entries to delete from it, each with its parents."""

    history: History
    stage: str
    deleted: Mapping[str, tuple[str, ...]]

    def survivors(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return entries; deleted ones are replaced by their nearest surviving ancestors."""
        kept: list[str] = []
        for key in keys:
            is_deleted = key in self.deleted
            kept += self.survivors(self.deleted[key] or (BASE,)) if is_deleted else [key]
        return tuple(dict.fromkeys(kept))

    def without_links(self, entry: Entry) -> Entry:
        """Return a surviving entry without deleted parents and links."""
        links = self.history.links
        left = tuple(link for link in entry.state.links if links[link].stage not in self.deleted)
        is_shorter = len(left) < len(entry.state.links)
        update: dict[str, Any] = {
            "parents": tuple(key for key in self.survivors(entry.parents) if key != BASE),
            "reads": tuple(key for key in entry.reads if key != self.stage),
            "state": entry.state.model_copy(update={"links": left}),
            "pruned": entry.pruned or is_shorter,
            "unit": entry.key if entry.unit in self.deleted else entry.unit,
        }
        return entry.model_copy(update=update)

    def heads(self, keys: Iterable[str]) -> list[str]:
        """Return heads in their order, with surviving entries, without repetitions.

        States that went with a pruned combination are left out: nothing else is equal to them.
        """
        entry = self.history.find(self.stage)
        if entry is not None and entry.kind == "combine":
            keys = (key for key in keys if key not in self.deleted)
        return [key for key, _ in groupby(map(self._head, keys))]

    def _head(self, key: str) -> str:
        """Return an entry; for a deleted one, what it was without the pruned stage, if it exists.

        That is the combination of the same parts by the same recipe, else the first of them.
        """
        entry = self.history.find(key)
        if entry is None or key not in self.deleted:
            return key
        kept = [e for e in self.history.entries if e.key not in self.deleted]
        survivors = (survivor for survivor in self.survivors([key]) if survivor != BASE)
        left = self.history.without_ancestors(survivors) or [BASE]
        wanted = ("combine", _recipe_below(self.history, key).of_parts(left), {*left})
        same = (e.key for e in kept if (e.kind, e.recipe, {*e.parents}) == wanted)
        return next(same, left[0])


def _gone(run: Path, history: History, name: str) -> list[Path]:
    """Return what to delete, in order: while the folder of the stage exists, a kill is seen."""
    return sorted(_unnamed(run, history), key=lambda path: (path == run / "stages" / name, path))


def _unnamed(run: Path, history: History) -> Iterator[Path]:
    """Yield files and folders that the history does not name, and outdated pictures of the run."""
    named = {"/".join(name.split("/")[:2]) for name in history.files}
    for folder in (*CONTENT, "stages"):
        for path in (run / folder).glob("*"):
            if f"{folder}/{path.name}" not in named:
                yield path
    yield from ended_leftovers(run, history)
    yield from (run / name for name in _SHOWN if (run / name).exists())
    # scratch files of a killed report may hold rows; those of the history go when it is replaced
    names = (path.name for path in run.iterdir() if files.is_scratch(path.name))
    yield from (run / name for name in names if not name.startswith(f"{HISTORY}."))


def _keep_scores(run: Path, history: History) -> None:
    """Delete scores of states and rows that were deleted."""
    path = run / MATRIX
    files.remove_scratch(run, MATRIX)
    if not path.is_file():
        return
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    stages = {entry.key for entry in history.entries}
    with files.reported(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _is_valid(line, states, stages)]
    files.write_text(path, "".join(f"{line}\n" for line in kept))


def _is_valid(line: str, states: Collection[str], stages: Collection[str]) -> bool:
    """Say whether the state and the rows of a score exist."""
    try:
        cell = json.loads(line)
        return cell["state"] in states and cell["stage"] in stages
    except (ValueError, LookupError, TypeError):
        return False

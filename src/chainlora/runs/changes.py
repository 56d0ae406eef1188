"""What changes a run without training: `mix`, `undo`, `redo`, `prune`.

Each is one replacement of ``history.json``. All but `prune` delete nothing; that deletes after it:
scores of the matrix, then links, rows and pictures.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.checks import check_strengths
from chainlora.errors import FileError, RunError
from chainlora.runs.addresses import open_run, state_at
from chainlora.runs.draft import drafts_in, ended_leftovers
from chainlora.runs.history import BASE, CONTENT, Entry, History, Unbuilt
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.locks import is_in_use
from chainlora.runs.paths import HISTORY, split_address
from chainlora.runs.state import OpenState

MATRIX = "matrix.jsonl"  # scores by digests of states (`evaluation.stage_scores`)
_SHOWN = ("chain.png", "report.html")  # pictures of a whole run
_WITH_LINKS = ("stage", "import")  # kinds of entries that links or rows were saved for


def whole_run(run: str | Path) -> Path:
    """Return the folder of a run that is to be changed.

    Raises RunError for one of its states, and for a saved chain.
    """
    folder, name = split_address(run)
    if name is not None:
        raise RunError("This command needs the whole run", run, f"leave @{name} out")
    open_run(folder)  # refuses what is no run
    return folder


# --- moving the head ---


def mix_stages(run: str | Path, strengths: Mapping[str, float], of: str | None = None) -> OpenState:
    """Give stages of a run other strengths, 0 for off; the others keep theirs.

    From then on the run is this mix wherever it is loaded; 1 gives back what was, to the bit.
    With `of`, an entry of its history is mixed, as after `undo` to it; one `undo` takes both back.
    Returns the state.

    Raises RunError: a stage that is not there, or that has no one strength, a strength that its
    links cannot have, or a run whose first stage has not ended.
    """
    run = whole_run(run)
    if open_run(run).draft is not None:
        rule = "Cannot mix: the first stage has not ended"
        raise RunError(rule, run, "finish it by the command that began it")

    def change(history: History) -> History:
        there = history if of is None else history.moved(state_at(run, history, of).key)
        found = state_at(run, there)
        mixed = found.with_strengths(strengths)
        found.need_one_strength([*strengths])
        check_strengths(mixed.outlines())
        done = there.mixed(mixed.state)
        return (
            done if of is None else done.model_copy(update={"past": history.moved(done.head).past})
        )

    update_history(run, change)
    return open_run(run)


def build_mix(run: Path, key: str) -> None:
    """Give a mix that was declared its state."""

    def change(history: History) -> History:
        declared = history.find_unbuilt(key)
        if declared is None:
            return history
        below = state_at(run, history, declared.parent)
        state = below.with_strengths(declared.strengths).state
        return history.built(declared.built(state), {})

    update_history(run, change)


def undo(run: str | Path, to: str | None = None) -> OpenState:
    """Make a run what it was before its last `mix` or stage, or what an entry of its history is.

    Nothing is deleted: the rows and links of what is undone stay in the run. `redo` goes forward
    again; after an `undo` with `to`, `undo` goes back. Returns the state that the run is now.

    Raises RunError where there is nothing to undo.
    """
    run = whole_run(run)

    def change(history: History) -> History:
        if to is not None:
            return history.moved(state_at(run, history, to).key)
        if not history.past:
            remedy = f"chainlora log {run} lists its states"
            raise RunError("there must be something to undo", f"nothing in {run}", remedy)
        *past, head = history.past
        future = (history.head, *history.future)
        update = {"head": head, "past": tuple(past), "future": future, "target": None}
        return history.model_copy(update=update)

    update_history(run, change)
    return open_run(run)


def redo(run: str | Path) -> OpenState:
    """Take the last `undo` without `to` back. Raises RunError where there is none."""
    run = whole_run(run)

    def change(history: History) -> History:
        if not history.future:
            remedy = f"chainlora log {run} lists its states"
            raise RunError("there must be something to redo", f"nothing in {run}", remedy)
        head, *future = history.future
        past = (*history.past, history.head)
        update = {"head": head, "past": past, "future": tuple(future), "target": None}
        return history.model_copy(update=update)

    update_history(run, change)
    return open_run(run)


def log(run: str | Path) -> list[dict[str, Any]]:
    """Return the entries of a run, the latest first; before them those that are ``declared`` and
    not built, and stages in ``training``.

    Each has its ``name``, ``kind``, ``state`` (a digest), ``parents``, ``strengths`` of the stages
    in it, the number of ``links``, whether it kept ``rows``, when it ``ended``, whether it is what
    the run is ``now``, and whether it is ``before`` that: part of how that came about.
    """
    folder, _ = split_address(run)
    history = read_history(folder)
    before = {entry.key for entry in history.lineage(history.head)}
    found = [
        {
            "name": entry.key,
            "kind": entry.kind,
            "state": entry.state.digest,
            "parents": list(entry.parents),
            "strengths": history.strengths_of(entry.state),
            "links": len(entry.state.terms),
            "rows": entry.kept is not None,
            "ended": entry.ended,
            "now": entry.key == history.head,
            "before": entry.key in before and entry.key != history.head,
        }
        for entry in reversed(history.entries)
    ]
    begun = drafts_in(folder, history)
    due: list[dict[str, Any]] = [
        {"name": entry.key, "kind": "training" if entry.key in begun else "declared"}
        for entry in reversed(history.unbuilt)
    ]
    return due + found


# --- deleting ---


@dataclass(frozen=True)
class Pruning:
    """What a pruning deletes, and what was trained on top of it.

    `gone` are files and folders, `with_it` the entries that its rows have changed:
    combinations and what was trained on one, rehearsals. `later` are the stages that
    go on without the links, `before` is the entry that the stage began on, `left` are the states
    that `RUN` is no combination of any more, and `now` is the entry that it becomes, if another.
    """

    stage: str
    gone: list[Path]
    with_it: list[str]
    later: list[str]
    before: str
    left: list[str] = field(default_factory=list)
    now: str | None = None
    rehearsed: bool = False


def plan_pruning(run: str | Path, name: str) -> Pruning:
    """Say what deleting a stage would delete; change nothing.

    Raises RunError for one that is not there, for the only one, and where a stage is half trained
    or is no sum without the links.
    """
    run = whole_run(run)
    return _planned(run, read_history(run), name)[0]


def _planned(run: Path, history: History, name: str) -> tuple[Pruning, History]:
    """Return what deleting a stage deletes, and the history without it."""
    _need_idle(run, history, name)
    entry = history.find(name)
    left_over = {path.name.partition(".")[0] for path in (run / "stages").glob("*")}
    left_over |= {each.key for each in history.unbuilt}
    is_left_over = entry is None and name in left_over  # by a kill, perhaps by a scratch name
    if not is_left_over and (entry is None or entry.kind not in _WITH_LINKS):
        names = ", ".join(e.key for e in history.entries if e.kind in _WITH_LINKS)
        raise RunError(f"a stage must be one of {names}", f"{name!r} for {run}", "name one")
    after, with_it = _without(history, name)
    stay = [each.key for each in after.entries if each.has_config]
    declared = history.find_unbuilt(name)
    stay += [each.key for each in after.unbuilt if declared is not None and each.has_config]
    begun = declared if entry is None else entry if entry.has_config else None
    if begun is not None and begun.kind in _WITH_LINKS and not stay:
        raise RunError("a run must keep a stage", f"{name!r}, its only one", f"delete {run}")
    on_top = [key for key in stay if name in {below.key for below in history.lineage(key)}]
    before = BASE if entry is None else entry.parent
    ends = history.ends(history.head)
    left = history.outer(end for key in ends for end in _left_of(key, history, after))
    left = left if left != after.ends(after.head) else []
    if len(left) > 1:  # what is left is combined again
        key = after.name_after(left)
        recipe = history.recipe_of(history.head).of_parts(left)
        again = Unbuilt(key=key, kind="combine", parents=tuple(left), unit=key, recipe=recipe)
        after = after.declared([again], key)
    now, head = None if after.head == history.head else after.head, history.find(history.head)
    rehearsed = head is not None and head.is_rehearsal
    # its own folder last: as long as that is there, the same command goes on after a kill
    gone = sorted(_unnamed(run, after), key=lambda path: (path == run / "stages" / name, path))
    return Pruning(name, gone, with_it, on_top, before, left, now, rehearsed), after


def _left_of(key: str, history: History, after: History) -> list[str]:
    """Return what is left of an end of a combination: it, or the ends of what it began on."""
    entry = history.find(key)
    if entry is None or after.find(key) is not None:
        return [key]
    below = (end for parent in entry.parents for end in history.ends(parent))
    return [left for end in below for left in _left_of(end, history, after)]


def prune_stage(run: str | Path, name: str) -> Pruning:
    """Delete a stage for good: links, rows, config, records, result, scores. Return what went.

    The history is replaced first, then what it does not name is deleted. So a kill leaves a run
    that can be read, and the same call again deletes what is left.

    Raises what `plan_pruning` does, and FileError for what cannot be deleted.
    """
    plan, (folder, _) = plan_pruning(run, name), split_address(run)

    def change(history: History) -> History:
        nonlocal plan
        plan, after = _planned(folder, history, name)  # another process may have changed it
        return after

    def delete() -> None:
        _keep_scores(folder, read_history(folder))
        for path in plan.gone:
            files.remove(path)
            if path.exists():
                raise FileError("a file must be deleted", path, "check its permissions")
        for parent in {path.parent for path in plan.gone}:
            with files.reported(parent, "deleted"):
                files.remove_scratch(parent)
                files.sync_folder(parent)

    update_history(folder, change, delete)
    return plan


def _need_idle(run: Path, history: History, name: str) -> None:
    """Raise RunError where a stage is half trained that is not the one to be deleted, or a process
    is about to begin one."""
    others = (p for p in (run / "stages").glob("[!.]*") if history.find(p.name) is None)
    half = [folder for key, folder in drafts_in(run, history).items() if key != name]
    begun = [*half, *filter(is_in_use, others)]
    if begun:
        rule = f"Cannot prune: stage {begun[0].name} is half trained"
        raise RunError(rule, begun[0], f"finish it, or prune {begun[0].name} first")


def _without(history: History, name: str) -> tuple[History, list[str]]:
    """Return a history that names nothing of a stage, and the entries that went with it."""
    entry = history.find(name)
    if entry is None:
        after = history.withdrawn([name])
        left = {name, *(each.key for each in after.unbuilt)}
        return after, [each.key for each in history.unbuilt if each.key not in left]
    gone, combined = {name: entry.parents}, set[str]()
    for each in history.entries:
        has_read = name in each.reads and (each.kind != "stage" or each.is_rehearsal)
        # A combination cannot be cut: its link was solved from rows and links of all its parts.
        is_trained_on = name in {e.key for e in history.lineage(each.key)}
        if {*each.parents} & combined or (each.kind == "combine" and (has_read or is_trained_on)):
            combined.add(each.key)
        if has_read or each.key in combined:
            gone[each.key] = each.parents
    own = {digest for digest, facts in history.links.items() if facts.stage in gone}

    def stays(keys: Iterable[str]) -> tuple[str, ...]:
        """Return entries, those that go replaced by what they were computed from."""
        found: list[str] = []
        for key in keys:
            found += stays(gone[key] or (BASE,)) if key in gone else [key]
        return tuple(dict.fromkeys(found))

    def cut(entry: Entry) -> Entry:
        terms = tuple(term for term in entry.state.terms if term.link not in own)
        is_shorter = len(terms) < len(entry.state.terms)
        update: dict[str, Any] = {
            "parents": tuple(key for key in stays(entry.parents) if key != BASE),
            "reads": tuple(key for key in entry.reads if key != name),
            "state": entry.state.model_copy(update={"terms": terms}),
            "pruned": entry.pruned or is_shorter,
        }
        return entry.model_copy(update=update)

    def nearest(key: str) -> str:
        """Return an entry, or if it goes, what is left of it: a combination of all that it was
        computed from, or the first of these."""
        left = history.outer(key for key in stays([key]) if key != BASE) or [BASE]
        same = (e.key for e in history.entries if e.kind == "combine" and [*e.parents] == left)
        return next((key for key in same if key not in gone), left[0])

    def path(keys: Iterable[str]) -> list[str]:
        """Return heads in their order, one for each run of equal ones."""
        return [key for key, _ in groupby(map(nearest, keys))]

    way = path([*history.past, history.head])
    entries = tuple(cut(e) for e in history.entries if e.key not in gone)
    used = {d for e in entries for d in (*e.tied, *(term.link for term in e.state.terms))}
    update = {
        "entries": entries,
        "links": {d: facts for d, facts in history.links.items() if d in used},
        "head": way[-1],
        "origin": stays([history.origin])[0],
        "past": tuple(way[:-1]),
        "future": tuple(path([way[-1], *history.future])[1:]),
    }
    due = [each.key for each in history.unbuilt if gone.keys() & history.below(each.key)]
    found = history.withdrawn(due).model_copy(update=update)
    return found, [*(key for key in gone if key != name), *due]


def _unnamed(run: Path, history: History) -> Iterator[Path]:
    """Yield what of a run its history does not name, and pictures of what it was."""
    named = {"/".join(name.split("/")[:2]) for name in history.files}
    for folder in (*CONTENT, "stages"):
        for path in (run / folder).glob("*"):
            if f"{folder}/{path.name}" not in named:
                yield path
    yield from ended_leftovers(run, history)
    yield from (run / name for name in _SHOWN if (run / name).exists())
    # of a killed report, which may hold rows; the history's own go where it is replaced
    names = (path.name for path in run.iterdir() if files.is_scratch(path.name))
    yield from (run / name for name in names if not name.startswith(f"{HISTORY}."))


def _keep_scores(run: Path, history: History) -> None:
    """Delete the scores of states and rows that are not there any more."""
    path = run / MATRIX
    files.remove_scratch(run, MATRIX)
    if not path.is_file():
        return
    states = {history.empty.digest, *(entry.state.digest for entry in history.entries)}
    stages = {entry.key for entry in history.entries}
    with files.reported(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _is_of(line, states, stages)]
    files.write_text(path, "".join(f"{line}\n" for line in kept))


def _is_of(line: str, states: Collection[str], stages: Collection[str]) -> bool:
    """Say whether a line of scores is of a state and of rows that are there."""
    try:
        cell = json.loads(line)
        return cell["state"] in states and cell["stage"] in stages
    except (ValueError, LookupError, TypeError):
        return False

"""Copy a state of a run, what it was computed from and their files into another run.

A fork gets a copy of what its first state was computed from; a combination takes in what stages of
other runs were computed from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.staging import RUN_WIDE, is_name
from chainlora.data.kept import Kept, write_kept
from chainlora.errors import RunError
from chainlora.models.identity import tokenizer_files
from chainlora.runs.documents import need_file, now, write_part
from chainlora.runs.history import (
    BASE,
    CONFIG,
    CONTENT,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Entry,
    History,
    rows_file,
)
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.paths import HISTORY
from chainlora.runs.state import OpenState


def closure(state: OpenState) -> History:
    """Return the history of a state alone: the entries that it needs, with their links."""
    due = {*state.keepers, *(entry.key for entry in state.lineage)}
    found = _part(state.history, [e for e in state.history.entries if e.key in due])
    moves = {"head": state.key, "origin": state.key, "past": (), "future": (), "target": None}
    return found.model_copy(update={**moves, "unbuilt": ()})


def _part(history: History, entries: Sequence[Entry]) -> History:
    """Return a history of some entries, with their links."""
    digests = (d for e in entries for d in (*(term.link for term in e.state.terms), *e.tied))
    links = {digest: history.links[digest] for digest in digests}
    return history.model_copy(update={"entries": tuple(entries), "links": links})


def own_closure(state: OpenState) -> History:
    """Return the history of a state alone as another run begins with it."""
    found = closure(state)
    return found.model_copy(update={"entries": tuple(map(_own, found.entries)), "tokenizer": {}})


def fork(state: OpenState, folder: Path) -> None:
    """Write a run that is in a state of another one; the other is not needed any more."""
    history = own_closure(state)
    origin = START if history.find(START) is not None else BASE
    update: dict[str, Any] = {"base": state.base, "origin": origin}
    if (own := state.tokenizer()) is not None:
        update["tokenizer"] = copy_tokenizer(own, folder)
    copy_files(state.run, folder, history)
    write_part(folder / HISTORY, history.model_copy(update=update))


def need_same_base(own: OpenState, state: OpenState) -> None:
    """Raise RunError where a state of another run cannot be combined or compared with one."""
    history, other = own.history, state.history
    data, others = own.config().data, state.config().data
    differing = [
        name
        for name, here, there in (
            ("base model", history.empty.base, other.empty.base),
            ("train.dtype", history.base.dtype, other.base.dtype),  # of one digest, too
            ("quantize", history.base.quantize, other.base.quantize),
            ("tokenizer", _own_tokenizer(history), _own_tokenizer(other)),
            ("chain.hold", history.hold, other.hold),
            *(
                (f"data.{key}", getattr(data, key), getattr(others, key))
                for key in RUN_WIDE["data"]
            ),
        )
        if here != there
    ]
    if differing:
        rule = "such runs must share their base, its precision and the chat template"
        raise RunError(rule, f"another {differing[0]} in {state.run}", "train one of them again")


def _own_tokenizer(history: History) -> dict[str, str]:
    """Return the files of a tokenizer that is not the base's; an adapter may come with that."""
    is_of_base = history.tokenizer.items() <= (history.base.files or {}).items()
    return {} if is_of_base else history.tokenizer


def take_in(run: Path, state: OpenState) -> str:
    """Copy a state of another run, and what it was computed from, beside the entries of a run.

    Returns the name of its entry there: its own, or that of the other run's folder where a stage of
    this run has the name.
    """
    history, other = read_history(run), state.history
    state.verify()
    names: dict[str, str] = {}
    for entry in state.lineage:
        names[entry.key] = _name_there(entry, history, run, state.run, names)
    new = [_own(entry) for entry in state.lineage if history.find(names[entry.key]) is None]
    part = _part(other, new).model_copy(update={"tokenizer": {}})
    copy_files(state.run, run, part, names=names)

    def change(history: History) -> History:
        entries = (entry.renamed(names) for entry in new)
        renamed = {
            digest: facts.model_copy(update={"stage": names.get(facts.stage, facts.stage)})
            for digest, facts in part.links.items()
        }
        update = {"entries": (*history.entries, *entries), "links": {**renamed, **history.links}}
        return history.model_copy(update=update)

    update_history(run, change)
    return names[state.key]


def _name_there(
    entry: Entry, history: History, run: Path, other: Path, taken: Mapping[str, str]
) -> str:
    """Return the name that an entry of another run gets, or has where it is there already.

    Raises RunError for a stage of this run in another state: a copy of which other links were
    pruned. A link is of one stage.
    """
    for each in history.entries if entry.tied else ():
        if (each.kind, each.state, each.tied) == (entry.kind, entry.state, entry.tied):
            return each.key
        if {*each.tied} & {*entry.tied}:
            raise RunError(
                "runs that are combined must hold a stage in one state",
                f"{each.key} in {run} and {entry.key} in {other}, of which others were pruned",
                "prune the same stages in both",
            )
    known = history.find(entry.key)
    is_there = known is not None and (known.kind, known.state) == (entry.kind, entry.state)
    is_base = not entry.state.terms  # whose rows are those of the run, if it has some
    has_rows = is_base or entry.key != START or (known is not None and known.kept == entry.kept)
    if known is not None and is_there and has_rows:
        return entry.key
    used = {START, *taken.values(), *(each.key for each in history.entries)}
    used |= {each.key for each in history.unbuilt}
    folder = other.resolve().name + f"-{entry.key}" * is_base
    names = chain([entry.key, folder], (f"{entry.key}-{k}" for k in count(2)))
    return next(name for name in names if is_name(name) and name not in used)


def _own(entry: Entry) -> Entry:
    """Return an entry with the files that go with it into another run."""
    names = [name for name in (CONFIG, RECORDS, RESULT) if name in entry.files]
    return entry.model_copy(update={"files": {name: entry.files[name] for name in names}})


def copy_files(
    source: Path,
    target: Path,
    history: History,
    there: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Copy what a history names from one run into another, each file checked; return the files.

    `there` are files that the other run names, each with its SHA-256, and `names` are those that
    entries get in it.
    """
    copied = []
    for name, digest in history.files.items():
        kind, key, *rest = name.split("/")
        own = "/".join((kind, (names or {}).get(key, key) if kind == "stages" else key, *rest))
        is_known = kind in CONTENT and _holds(target / own, digest)
        is_gone = rest == [RECORDS] and not (source / name).is_file()  # which records may be
        if is_known or is_gone or (there or {}).get(own) == digest:
            continue
        files.copy_file(need_file(source, name, digest), target / own)
        copied.append(name)
    return copied


def _holds(path: Path, digest: str) -> bool:
    """Say whether a file is there, and what its name says."""
    return path.is_file() and files.sha256(path).startswith(digest)


def with_start_rows(history: History, kept: str) -> History:
    """Return a history that keeps rows for what the run began on, in place of earlier ones."""
    start = history.find(START)
    if start is not None:
        new = start.model_copy(update={"kept": kept})
        entries = tuple(new if entry.key == START else entry for entry in history.entries)
        return history.model_copy(update={"entries": entries})
    new = Entry(key=START, kind="import", state=history.empty, kept=kept, ended=now())
    if history.origin == history.head == BASE and not history.entries:
        history = history.model_copy(update={"origin": START})
    return history.built(new, {})


def save_rows(run: Path, kept: Kept, stage: str) -> str:
    """Write rows that a stage keeps into a run, named by their SHA-256, and return that."""
    files.make_folder(run / "rows")
    with files.new_folder(run / "rows", stage) as scratch:
        write_kept(scratch / "rows", kept)
        digest = files.sha256(scratch / "rows")
        (scratch / "rows").replace(run / rows_file(digest))
        files.sync_folder(run / "rows")
    return digest


def copy_tokenizer(folder: Path, run: Path) -> dict[str, str]:
    """Copy the files of a tokenizer into a run; return their checksums."""
    with files.replaced_folder(run / TOKENIZER) as scratch:
        for path in tokenizer_files(folder):
            (scratch / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, scratch / path.relative_to(folder))
    return files.checksums(run / TOKENIZER)

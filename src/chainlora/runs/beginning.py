"""Copy entries and their files into another run: a fork, or a run that is joined to another."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from itertools import chain, count
from pathlib import Path

from chainlora import files
from chainlora.config.staging import RUN_WIDE, is_name
from chainlora.data.kept import Kept, write_kept
from chainlora.errors import RunError
from chainlora.models.finding import resolve_model
from chainlora.models.identity import tokenizer_files
from chainlora.models.loading import are_same_tokenizers, load_tokenizer
from chainlora.runs.documents import need_file, now
from chainlora.runs.entries import (
    CONFIG,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Entry,
    rows_file,
)
from chainlora.runs.history import History
from chainlora.runs.keys import Made
from chainlora.runs.recipes import Stage
from chainlora.runs.state import OpenState


def fork_of(state: OpenState) -> History:
    """Return the history of a new run that begins with a state; `fill_fork` copies its files."""
    history = state.history.only(state.key)
    entries = tuple(map(_with_copied_files, history.entries))
    return history.model_copy(update={"base": state.base, "entries": entries})


def fill_fork(folder: Path, state: OpenState, history: History) -> History:
    """Copy the files of a fork into its folder; return its history with its own tokenizer."""
    copy_files(state.run, folder, history)
    if history.tokenizer or (tokenizer := state.tokenizer()) is None:
        return history
    return history.model_copy(update={"tokenizer": copy_tokenizer(tokenizer, folder)})


def need_same_base(own: OpenState, state: OpenState) -> None:
    """Raise RunError unless a state has base, precision, tokenizer and chat template of `own`."""
    history, other = own.history, state.history
    data, others = own.config().data, state.config().data
    differing = [
        name
        for name, here, there in (
            ("base model", history.empty.base, other.empty.base),
            ("train.dtype", history.base.dtype, other.base.dtype),  # the digest does not cover it
            ("quantize", history.base.quantize, other.base.quantize),
            ("chain.hold", history.hold, other.hold),
            *(
                (f"data.{key}", getattr(data, key), getattr(others, key))
                for key in RUN_WIDE["data"]
            ),
        )
        if here != there
    ]
    if not differing and not _have_same_tokenizer(own, state):
        differing = ["tokenizer"]
    if differing:
        rule = "such runs must share their base, its precision and the chat template"
        raise RunError(rule, f"another {differing[0]} in {state.run}", "train one of them again")


def _have_same_tokenizer(own: OpenState, state: OpenState) -> bool:
    """Compare the tokenizers of two runs on one base: their files, or else what they give."""
    if own.history.tokenizer == state.history.tokenizer:
        return True
    # the bases are equal, and that of another person's run may be in no such place here
    folders = [run.tokenizer() or resolve_model(own.base.model) for run in (own, state)]
    return are_same_tokenizers(*map(load_tokenizer, folders))


def take_in(run: Path, history: History, state: OpenState) -> tuple[History, str]:
    """Copy a state of another run and its ancestors into a run.

    Returns the history of the run with these entries, and with their stages at the end of its plan;
    and the new name of its entry. An entry that the run has already is not copied. Others keep
    their names if these are free; otherwise they get the name of the other run's folder.
    """
    state.verify()
    # a former version of a stage has a number behind its name there
    other, made = state.history.only(state.key).named(), {e.digest: e.key for e in history.entries}
    names = {e.key: made[e.digest] for e in other.entries if e.digest in made}
    used = {START, *history.plan().names}
    used |= {name for entry in history.entries for name in (entry.key, entry.place)}
    for entry in other.entries:
        if entry.key != START and entry.key not in names:
            names[entry.key] = _free_name(entry.key, state.run, used)
            used.add(names[entry.key])
    plan, stages = history.plan(), dict[str, Stage]()
    for stage in other.plan().stages:
        stages[stage.identity] = stage.renamed(names)
        if plan.find(names[stage.name]) is None:
            plan = plan.with_stage(stages[stage.identity])
    new = [e for e in other.entries if e.digest not in made and e.key != START]
    part = other.model_copy(update={"entries": tuple(map(_with_copied_files, new))}).tidied()
    places = {entry.place: names[entry.key] for entry in part.entries}
    copy_files(state.run, run, part.model_copy(update={"tokenizer": {}}), places=places)
    history, part = history.edited(plan, "combine"), part.renamed(names)
    for entry in part.entries:
        known = None if entry.identity is None else stages[entry.identity].identity
        update = {"identity": known, "folder": ""}
        history = history.added(entry.model_copy(update=update), part.links | history.links)
    (own,) = [e.key for e in other.entries if state.entry and e.digest == state.entry.digest]
    return _with_keys_of(history, {stage.name for stage in stages.values()}), names[own]


def _with_keys_of(history: History, names: Collection[str]) -> History:
    """Return a history whose entries of some stages have the keys of its own plan.

    The other run has the same base, perhaps with files of its tokenizer that were saved again.
    """
    for name in history.plan().names:
        recipe, made = history.recipes().state(name), Made(history)
        entry, key = history.find(name), made.key(recipe)
        reads_rows = any(parent.kind == "start" for parent in recipe.parents)
        if name in names and entry is not None and key is not None and not reads_rows:
            new = entry.model_copy(update={"digest": key})
            entries = tuple(new if e is entry else e for e in history.entries)
            history = history.model_copy(update={"entries": entries})
    return history


def _free_name(name: str, other: Path, used: set[str]) -> str:
    folder = other.resolve().name
    names = chain([name, folder], (f"{name}-{k}" for k in count(2)))
    return next(free for free in names if is_name(free) and free not in used)


def _with_copied_files(entry: Entry) -> Entry:
    """Return an entry with only the files that are copied into another run."""
    names = [name for name in (CONFIG, RECORDS, RESULT) if name in entry.files]
    return entry.model_copy(update={"files": {name: entry.files[name] for name in names}})


def copy_files(
    source: Path,
    target: Path,
    history: History,
    existing: Mapping[str, str] | None = None,
    places: Mapping[str, str] | None = None,
) -> list[str]:
    """Copy the files that a history names from one run into another, checked; return their names.

    `existing` are files that the target has, each with its SHA-256. `places` are new names of
    folders of entries.
    """
    copied = []
    for name, digest in history.files.items():
        kind, key, *rest = name.split("/")
        new = "/".join((kind, (places or {}).get(key, key) if kind == "stages" else key, *rest))
        if (existing or {}).get(new) != digest:
            files.copy_file(need_file(source, name, digest), target / new)
            copied.append(name)
    return copied


def with_start_rows(history: History, kept: str) -> History:
    """Return a history whose entry ``start`` has these kept rows, in place of earlier ones."""
    start = history.find(START)
    if start is None:
        start = Entry(key=START, kind="import", state=history.empty, kept=kept, ended=now())
        return history.added(start, {})
    new = start.model_copy(update={"kept": kept})
    entries = tuple(new if entry.key == START else entry for entry in history.entries)
    return history.model_copy(update={"entries": entries})


def save_rows(run: Path, kept: Kept, stage: str) -> str:
    """Write kept rows of a stage into a run, named by their SHA-256; return the SHA-256."""
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

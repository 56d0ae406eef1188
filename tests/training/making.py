"""Entries without a model: a link is a text that says how it was computed, rows are a text too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.errors import RunError, TrainingError
from chainlora.runs.addresses import state_at
from chainlora.runs.documents import write_part
from chainlora.runs.draft import DRAFT, Draft, Records
from chainlora.runs.entries import (
    RESULT,
    START,
    WEIGHTS,
    Base,
    Due,
    Entry,
    LinkFacts,
    State,
    link_folder,
    rows_file,
)
from chainlora.runs.history import History
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.locks import Scratch
from chainlora.runs.paths import HISTORY, stage_folder
from chainlora.runs.recipes import How, Stage

BASE_FILES = {"model.safetensors": "0"}


def begin(run: Path) -> Path:
    """Write a run without stages, which keeps rows of its base."""
    run.mkdir(parents=True)
    base = Base(model="m", fingerprint="base", files=BASE_FILES)
    write_part(run / HISTORY, History(base=base, hold="tied", general={"sources": {}}))
    return run


def stage(
    name: str, names: Sequence[str] = (), how: How | None = None, fails: str = "", edit: int = 0
) -> Stage:
    """Return a stage whose training may fail, `early` or `late`; `edit` is that of its file."""
    config = {"data": {"train": f"/data/{name}.jsonl"}, "train": {"loss": fails or None}}
    own: Any = {"name": name, "names": tuple(names), "how": how or How(), "config": config}
    return Stage(**own, sources={"data.train": [content_of(name, edit)]})


def content_of(name: str, edit: int) -> str:
    """Return what a file of rows holds after edits."""
    return f"{name}.jsonl-{edit}."


def text_of(run: Path, state: State) -> list[str]:
    """Return the links of a state, in the order in which they are summed."""
    return [(run / link_folder(link) / WEIGHTS).read_text() for link in state.links]


def _link(run: Path, stage: str, text: str) -> tuple[str, LinkFacts]:
    files.make_folder(run / "links")
    files.remove_scratch(run / "links")
    with files.new_folder(run / "links", stage) as scratch:
        files.write_text(scratch / WEIGHTS, text)
        sums = {WEIGHTS: files.sha256(scratch / WEIGHTS)}
        facts = LinkFacts(stage=stage, rank=1, num_steps=1, config={}, files=sums)
        files.put_folder(scratch, run / link_folder(facts.digest))
    return facts.digest, facts


def _rows(run: Path, name: str, text: str) -> str:
    files.make_folder(run / "rows")
    files.remove_scratch(run / "rows")
    with files.new_folder(run / "rows", name) as scratch:
        files.write_text(scratch / "rows", text)
        digest = files.sha256(scratch / "rows")
        (scratch / "rows").replace(run / rows_file(digest))
        files.sync_folder(run / "rows")
    return digest


def _train(run: Path, due: Due) -> None:
    fails, folder = due.stage.config["train"]["loss"], stage_folder(run, due.place)
    if fails == "early":
        raise RunError("Cannot train: it was to fail.")
    scratch = Scratch(run, folder)
    if not (folder / DRAFT).is_file():
        scratch.clear()
        files.write_text(folder / RESULT, f"result of {due.key}")
        records = Records(count=0, sha256="0")
        draft = Draft(digest=due.digest, training=due.training, records=records)
        write_part(folder / DRAFT, draft)
    if fails == "late":
        raise TrainingError("it was to fail in training")
    scratch.remove_scratch()
    (content,) = due.stage.sources["data.train"]
    kept = _rows(run, due.key, f"rows of {content}")
    text = json.dumps(["train", content, text_of(run, due.below)])
    link, facts = _link(run, due.stage.draws or due.key, text)
    state = due.below.model_copy(update={"links": (*due.below.links, link)})
    sums = {RESULT: files.sha256(folder / RESULT)}
    entry = due.entry(state, tied=(link,), kept=kept, files=sums)
    update_history(run, lambda now: now.added(entry, {link: facts}))
    scratch.remove_passing()


def _start(run: Path, due: Due) -> None:
    entry = due.entry(due.below, kept=_rows(run, START, "rows of the base"))
    update_history(run, lambda now: now.added(entry, {}))


def _combine(run: Path, due: Due) -> None:
    history = read_history(run)
    weights = due.recipe.weights
    parts: list[Any] = [
        [text_of(run, history.state_of(key)), weight]
        for key, weight in zip(due.parents, weights, strict=False)
    ]
    parts += [["base", weights[-1]]] * (len(weights) > len(due.parents))
    kept = history.keepers(due.parents)
    rows = [(run / rows_file(kept[key])).read_text() for key in kept if key != START]
    text = json.dumps(["combine", dict(due.recipe.own), sorted(parts, key=str), rows])
    link, facts = _link(run, "combined", text)
    entry = due.entry(history.empty.model_copy(update={"links": (link,)}))
    update_history(run, lambda now: now.added(entry, {link: facts}))


EXECUTE = {"start": _start, "stage": _train, "combine": _combine}


def is_now(run: Path) -> list[str]:
    """Return the links of what a run is."""
    return text_of(run, state_at(run, read_history(run)).state)


# --- the same, worked out from a list ---


@dataclass(frozen=True)
class Wanted:
    """What a run should be: stages as (name, names below, rank of these), and how they are put
    together."""

    stages: tuple[tuple[str, tuple[str, ...], int | None], ...] = ()
    off: frozenset[str] = frozenset()
    rank: int | None = None
    always: bool = False
    edits: Mapping[str, int] = field(default_factory=dict)  # of files that were changed

    def content(self, name: str) -> str:
        return content_of(name, self.edits.get(name, 0))

    def below(self, name: str) -> set[str]:
        (names,) = [names for own, names, _ in self.stages if own == name]
        return {name}.union(*map(self.below, names))

    def without(self, name: str) -> Wanted:
        gone = {own for own, _, _ in self.stages if name in self.below(own)}
        left = tuple(stage for stage in self.stages if stage[0] not in gone)
        return replace(self, stages=left, off=self.off - gone)

    def texts(self) -> list[str]:
        names = [name for name, _, _ in self.stages if name not in self.off]
        return self.whole(names, self.rank, self.always)

    def whole(self, names: Sequence[str], rank: int | None, always: bool = False) -> list[str]:
        covered = {below for name in names for below in self.below(name) - {name}}
        parts = [name for name, _, _ in self.stages if name in {*names} - covered]
        if not parts:
            return []
        if len(parts) == 1 and not always:
            return self.state(parts[0])
        needed = {below for name in parts for below in self.below(name)}
        rows = [f"rows of {self.content(name)}" for name, _, _ in self.stages if name in needed]
        both = [[self.state(name), None] for name in parts] + [["base", None]]
        own = {"rank": rank, "keep_conflicts": False, "steps": 0}
        return [json.dumps(["combine", own, sorted(both, key=str), rows])]

    def state(self, name: str) -> list[str]:
        ((names, rank),) = [(names, rank) for own, names, rank in self.stages if own == name]
        below = self.whole(names, rank) if names else []
        return [*below, json.dumps(["train", self.content(name), below])]


def everything_in(run: Path) -> dict[str, bytes]:
    """Return the files of a run, without its history and lock."""
    found = (path for path in run.rglob("*") if path.is_file() and path.parent != run)
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def names_in(run: Path, word: str) -> list[str]:
    """Return the files of a run that hold a word, in their names or contents."""
    inside = {**everything_in(run), HISTORY: (run / HISTORY).read_bytes()}
    return [name for name, content in inside.items() if word in name or word.encode() in content]


def entries_of(run: Path) -> list[Entry]:
    """Return the entries of a run but for their times, in the order of their names."""
    entries = [entry.model_copy(update={"ended": ""}) for entry in read_history(run).entries]
    return sorted(entries, key=lambda entry: entry.key)

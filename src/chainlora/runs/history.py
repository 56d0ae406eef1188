"""``history.json``: every state that a run has been in, and which of them it is now.

    RUN/history.json              this file; it is replaced as a whole
    RUN/links/DIGEST/             a link: an ordinary PEFT adapter, stored once
    RUN/derived/DIGEST.safetensors  A of a link in a combination, stored once
    RUN/rows/DIGEST.safetensors   the rows that a stage kept
    RUN/stages/NAME/              what a stage wrote: its config, records and result; while it is
                                  trained, its checkpoint too (`runs.work`)
    RUN/tokenizer/                one that is not the base's, if the run began with it

Rows are named by their content, links by their stage, config and tensors; they are never
overwritten. What a new entry needs is written first; then this file is replaced under a lock. So a
kill leaves the history before or after, and readers never meet half an entry. A file that no entry
names is ignored until `prune` deletes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chainlora import files
from chainlora.config.schema import LinkConfig
from chainlora.config.staging import HISTORY
from chainlora.errors import ConfigError, RunError
from chainlora.knots.numbers import Numbers
from chainlora.runs.documents import (
    DAMAGED,
    Count,
    Digest,
    Document,
    Name,
    Part,
    Sums,
    now,
    read_part,
    short_digest,
    write_part,
)
from chainlora.runs.locks import locked, need_own

CAUSAL = "CAUSAL_LM"  # PEFT's name of the task of causal language models
MAIN = "main"  # the stage of links where none was named
START = "start"  # what a run began on: an imported adapter, or rows given for it
BASE = "base"  # the state of no links
REHEARSED = "data.rehearse"  # what stands for the rows of a stage that has none of its own
CONFIG, RECORDS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
TOKENIZER = "tokenizer"
WEIGHTS = "adapter_model.safetensors"
CONTENT = ("links", "derived", "rows")  # folders whose files are named by their content


class Term(Part):
    """A link in a state, at a strength; with a factor A of its own where it was `derived`."""

    link: Digest
    strength: float = 1.0
    derived: Digest | None = None


class State(Part):
    """What a model is: a base and the links on it. Its digest is of what adds to the weights."""

    base: str
    terms: tuple[Term, ...] = ()

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits. States of one digest are equal to the bit."""
        on = [[t.link, t.strength, t.derived] for t in self.terms if t.strength]
        return short_digest([self.base, on])


# --- what the history says ---


class Base(Part):
    """The model that links belong to. `files` are hashes of all that makes it what it is; a chain
    saved without a run has none.
    """

    model: str
    fingerprint: str
    task_type: str | None = CAUSAL
    dtype: Annotated[str, Field(pattern=r"^b?float(16|32|64)$")] = "float32"
    files: dict[str, str] | None = None
    fan_in_fan_out: bool = False
    quantize: str | None = None


class LinkFacts(Part):
    """What is known of a link beside its tensors; `files` are those of its folder."""

    stage: Name
    rank: Count
    num_steps: Count
    error: float = 0.0
    config: dict[str, Any]
    files: Sums

    @property
    def digest(self) -> str:
        """Return the digest of the stage, config and tensors. The link has the one of its first
        stage: another run may have taken it in under another name."""
        return short_digest([self.stage, self.config, self.files.get(WEIGHTS)])

    def link_config(self) -> LinkConfig:
        try:
            return LinkConfig(**self.config)
        except (ConfigError, TypeError) as error:
            raise RunError("a link's config must be valid", error, DAMAGED) from None


class Change(Part):
    """A config key that a resume changed, and from which step on: where something lies, or a key
    that `resuming.CHANGEABLE` names. A run may come from somebody else."""

    key: Annotated[
        str,
        Field(pattern=r"^(model|data\.(task|train|validation|test)|train\.(lr|max_grad_norm))$"),
    ]
    before: Any
    after: Any
    step: Count


class Training(Part):
    """What a stage was trained with: `rows` is the digest of its rows in their order, `sources` are
    digests of the task and the files of rows by the keys that name them, `plugins` their SHA-256,
    `numbers` what was decided at its start."""

    rows: str | None = None
    sources: dict[str, list[str]] = Field(default={})
    plugins: dict[str, str] = Field(default={})
    changes: tuple[Change, ...] = ()
    numbers: Numbers | None = None
    versions: dict[str, str] = Field(default={})


class Entry(Part):
    """A state that the run has been in, and how it came about.

    `parents` are the entries that it was computed from, `reads` those whose rows or scores it used.
    `tied` are the links that a stage tied, in their order: `state` may end at an earlier, best
    point. `kept` names a file in ``rows``, `files` lie in ``stages/KEY``. With `pruned`, links that
    the state was trained on were deleted since.
    """

    key: Name
    kind: Literal["stage", "mix", "combine", "import"]
    parents: tuple[Name, ...] = ()
    reads: tuple[Name, ...] = ()
    state: State
    tied: tuple[Digest, ...] = ()
    kept: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    files: Sums = Field(default={})
    training: Training = Training()
    ended: str = ""  # when, in UTC
    pruned: bool = False

    def renamed(self, names: Mapping[str, str]) -> Entry:
        """Return this with other names of entries."""
        update = {
            "key": names.get(self.key, self.key),
            "parents": tuple(names.get(key, key) for key in self.parents),
            "reads": tuple(names.get(key, key) for key in self.reads),
        }
        return self.model_copy(update=update)

    @property
    def parent(self) -> str:
        """Return the entry that a stage or a mix began on."""
        return self.parents[0] if self.parents else BASE

    @property
    def is_rehearsal(self) -> bool:
        """Say whether it was trained on nothing but rows that earlier stages kept."""
        return REHEARSED in self.training.sources


class History(Document):
    """All entries of a run in the order in which they ended.

    `head` is the entry that the run is now, ``base`` for none; `past` and `future` are the heads
    that `undo` and `redo` go to. `origin` is the entry that the run began on, with its ancestors,
    of another run or imported.
    """

    base: Base
    hold: str
    seed: int = 0
    tokenizer: Sums = Field(default={})
    links: dict[Digest, LinkFacts] = Field(default={})
    entries: tuple[Entry, ...] = ()
    origin: Name = BASE
    head: Name = BASE
    past: tuple[Name, ...] = ()
    future: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> History:
        self.need_names()
        return self

    def need_names(self) -> None:
        """Raise ValueError for links and entries that are not there; parents end earlier."""
        known = {BASE}
        for entry in self.entries:
            links = {*entry.tied, *(term.link for term in entry.state.terms)} - self.links.keys()
            if wrong := [*links, *({*entry.parents} - known), *({entry.key} & known)]:
                raise ValueError(f"{wrong[0]} must be there before {entry.key}, once")
            known.add(entry.key)
        if wrong := [*({self.head, self.origin, *self.past, *self.future} - known)]:
            raise ValueError(f"{wrong[0]} must be an entry")

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key, None where there is none."""
        return next((entry for entry in self.entries if entry.key == key), None)

    @property
    def empty(self) -> State:
        """Return the state of no links."""
        return State(base=self.base.fingerprint)

    def state_of(self, key: str) -> State:
        """Return the state of an entry, or of the base."""
        entry = self.find(key)
        return self.empty if entry is None else entry.state

    def lineage(self, key: str) -> list[Entry]:
        """Return an entry and all that it was computed from, in the order in which they ended."""
        found, due = set[str](), [key]
        while due:
            name = due.pop()
            entry = self.find(name)
            if entry is not None and name not in found:
                found.add(name)
                due += entry.parents
        return [entry for entry in self.entries if entry.key in found]

    def keepers(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of rows kept by the start, and by what some entries come from."""
        read = {START, *(entry.key for key in keys for entry in self.lineage(key))}
        return {e.key: e.kept for e in self.entries if e.key in read and e.kept is not None}

    @property
    def own(self) -> list[Entry]:
        """Return what came after the state that the run began on, and its rows."""
        begun_with = {entry.key for entry in self.lineage(self.origin)} | {START}
        return [entry for entry in self.entries if entry.key not in begun_with]

    @property
    def own_stages(self) -> list[str]:
        """Return the names of the stages that the run trained itself, in their order."""
        return [entry.key for entry in self.own if entry.kind == "stage"]

    def in_order(self, terms: Iterable[Term]) -> list[Term]:
        """Return terms in the order in which their stages ended. A combination, whose sums depend
        on no time, has another one."""
        places = {entry.key: place for place, entry in enumerate(self.entries)}
        return sorted(terms, key=lambda term: places.get(self.links[term.link].stage, -1))

    def strengths_of(self, state: State) -> dict[str, float]:
        """Return the strength of each stage in a state, in the order in which they ended."""
        terms = self.in_order(state.terms)
        return {self.links[term.link].stage: term.strength for term in terms}

    @property
    def files(self) -> dict[str, str]:
        """Return all files that the history names, each with its SHA-256 or the first digits."""
        found = {f"{TOKENIZER}/{name}": digest for name, digest in self.tokenizer.items()}
        for key, facts in self.links.items():
            found |= {f"{link_folder(key)}/{name}": d for name, d in facts.files.items()}
        for entry in self.entries:
            found |= {f"stages/{entry.key}/{name}": d for name, d in entry.files.items()}
            found |= {derived_file(t.derived): t.derived for t in entry.state.terms if t.derived}
            found |= {} if entry.kept is None else {rows_file(entry.kept): entry.kept}
        return found

    def ends(self, key: str) -> list[str]:
        """Return the entries that an entry is combined of; itself, where it is no combination."""
        entry = self.find(key)
        if entry is None:
            return []
        if entry.kind == "combine":
            return list(entry.parents)
        if entry.kind == "mix" or entry.is_rehearsal:
            return [end for parent in entry.parents for end in self.ends(parent)]
        return [key]

    def moved(self, key: str) -> History:
        """Return this with another head, from which `undo` comes back."""
        if key == self.head:
            return self
        past = (*self.past, self.head)
        return self.model_copy(update={"head": key, "past": past, "future": ()})

    def published(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return this with one more entry, which becomes the head if the head is its parent."""
        update = {"entries": (*self.entries, entry), "links": {**self.links, **links}}
        grown = self.model_copy(update=update)
        parents = entry.parents or (BASE,)
        return grown.moved(entry.key) if self.head in parents else grown

    def mixed(self, state: State) -> History:
        """Return this as a run of that state: a `mix` of its head, or as it is.

        Where an entry that the head was computed from is that state already, the head moves there.
        """
        if state == self.state_of(self.head):
            return self
        same = (each.key for each in self.lineage(self.head) if each.state == state)
        key = next(same, BASE if state == self.empty else None)
        if key is not None:
            return self.moved(key)
        return self._at(self._computed("mix", () if self.head == BASE else (self.head,), state, ()))

    def combined(self, state: State, ends: Iterable[str]) -> History:
        """Return this as a run of that state, a combination of entries; a known one is kept."""
        chosen = {*ends}
        parents = tuple(entry.key for entry in self.entries if entry.key in chosen)
        return self._at(self._computed("combine", parents, state, tuple(self.keepers(parents))))

    def _at(self, entry: Entry) -> History:
        """Return this with an entry, which may be there already, as its head."""
        known = self.find(entry.key)
        return (self if known is not None else self.published(entry, {})).moved(entry.key)

    def _computed(
        self,
        kind: Literal["mix", "combine"],
        parents: tuple[str, ...],
        state: State,
        reads: tuple[str, ...],
    ) -> Entry:
        """Return an entry that nothing was trained for: its key is of its content."""
        shown = [[t.link, t.strength, t.derived] for t in state.terms]
        key = f"{kind}-{short_digest([[*parents], shown, [*reads]])[:8]}"
        while (known := self.find(key)) is not None:
            if (known.parents, known.state, known.reads) == (parents, state, reads):
                return known
            key = f"{kind}-{short_digest(key)[:8]}"  # that one was another before a prune
        return Entry(key=key, kind=kind, parents=parents, reads=reads, state=state, ended=now())


# --- the file ---


def read_history(run: Path) -> History:
    """Read and check ``history.json``.

    Every command begins with it, so it refuses folders that lead out of the run, too: nothing there
    is written or deleted. Raises RunError for these, and for no history, a damaged one, or one of
    another format.
    """
    for places in ("*", "stages/*", "stages/*/*"):
        for path in run.glob(places):
            if path.is_dir():  # linked files are safe, since writes replace them
                need_own(path)
    return read_part(run / HISTORY, History)


def update_history(run: Path, change: Callable[[History], History]) -> History:
    """Replace the history of a run by what `change` makes of it, and return that.

    Other processes wait meanwhile: milliseconds. `change` does nothing long.
    """
    with locked(run):
        before = read_history(run)
        after = change(before)
        if after != before:
            try:
                after.need_names()
            except ValueError as error:  # of what another process has deleted meanwhile
                raise RunError("a run was changed meanwhile", error, "start again") from None
            with files.reported(run):
                files.remove_scratch(run, HISTORY)
            write_part(run / HISTORY, after)
    return after


# --- places ---


def link_folder(digest: str) -> str:
    """Return where a link lies in the run."""
    return f"links/{digest}"


def derived_file(digest: str) -> str:
    """Return where A of a link in a combination lies in the run; its SHA-256 begins so."""
    return f"derived/{digest}.safetensors"


def rows_file(digest: str) -> str:
    """Return where kept rows of this SHA-256 lie in the run."""
    return f"rows/{digest[:16]}.safetensors"

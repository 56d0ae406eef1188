"""``history.json``: every state that a run has been in, which of them it is now, and what it is to
become.

    RUN/history.json              this file; it is replaced as a whole
    RUN/links/DIGEST/             a link: an ordinary PEFT adapter, stored once
    RUN/rows/DIGEST.safetensors   the rows that a stage kept
    RUN/stages/NAME/              what a stage wrote: its config, records and result; while it is
                                  trained, its checkpoint too (`runs.work`)
    RUN/tokenizer/                one that is not the base's, if the run began with it

An entry is declared before it is computed: it then has a recipe and no state, and is `unbuilt`.
Rows are named by their content, links by their stage, config and tensors; they are never
overwritten. What a state needs is written first; then this file is replaced under a lock. So a
kill leaves the history before or after, and readers never meet half an entry. A file that no entry
names is ignored until `prune` deletes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chainlora.config.schema import LinkConfig
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
    short_digest,
)

CAUSAL = "CAUSAL_LM"  # PEFT's name of the task of causal language models
MAIN = "main"  # the stage of links where none was named
START = "start"  # what a run began on: an imported adapter, or rows given for it
BASE = "base"  # the state of no links
REHEARSED = "data.rehearse"  # what stands for the rows of a stage that has none of its own
CONFIG, RECORDS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
TOKENIZER = "tokenizer"
WEIGHTS = "adapter_model.safetensors"
COMBINED = "combined"  # the stage of the link of every combination: equal parts give equal bits
CONTENT = ("links", "rows")  # folders whose files are named by their content


class Term(Part):
    """A link in a state, at a strength."""

    link: Digest
    strength: float = 1.0


class State(Part):
    """What a model is: a base and the links on it. Its digest is of what adds to the weights."""

    base: str
    terms: tuple[Term, ...] = ()

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits. States of one digest are equal to the bit."""
        on = [[t.link, t.strength] for t in self.terms if t.strength]
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


class Recipe(Part):
    """What a combination depends on beside its parts.

    `rank` is by default the largest of a part, at least 16. `importance` multiplies what rows of a
    part count. With `general`, what the run began on is a part, by the rows of the entry ``start``.
    With `keep_conflicts`, rows count whose prompt has another answer in a later stage.
    """

    rank: Annotated[int, Field(gt=0)] | None = None
    importance: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    general: bool = True
    keep_conflicts: bool = False

    def of_parts(self, keys: Collection[str]) -> Recipe:
        """Return this for some parts: without the importance of others."""
        own = {key: value for key, value in self.importance.items() if key in (START, *keys)}
        return self.model_copy(update={"importance": own})


class Declared(Part):
    """What an entry is from the moment it is declared.

    `parents` are the entries that it is computed from. Entries of one `unit`, a stage and what
    follows from it, are undone together. Of a stage, `training` has the digests of its rows and
    plug-ins; of a combination, `recipe` says how it is made.
    """

    key: Name
    kind: Literal["stage", "mix", "combine", "import"]
    parents: tuple[Name, ...] = ()
    unit: str = ""
    training: Training = Training()
    recipe: Recipe = Recipe()

    @property
    def parent(self) -> str:
        """Return the entry that a stage or a mix begins on."""
        return self.parents[0] if self.parents else BASE

    @property
    def is_rehearsal(self) -> bool:
        """Say whether it is trained on nothing but rows that earlier stages kept."""
        return REHEARSED in self.training.sources

    @property
    def has_config(self) -> bool:
        """Say whether it is a stage, or an adapter that is added like one (`runs.adding`)."""
        return self.kind == "stage" or (self.kind == "import" and self.key != START)


class Unbuilt(Declared):
    """An entry without a state. `config` is that of a stage or of an import, `strengths` are those
    of a mix."""

    config: dict[str, Any] = Field(default={})
    strengths: dict[Name, float] = Field(default={})

    def built(self, state: State, **more: Any) -> Entry:
        """Return the entry with its state, and more of its fields; it ends now."""
        known = {name: getattr(self, name) for name in Declared.model_fields}
        return Entry(**known | {"state": state, "ended": now()} | more)


class Entry(Declared):
    """A state that the run has been in, and how it came about.

    `reads` are the entries whose rows or scores it used. `tied` are the links that a stage tied, in
    their order: `state` may end at an earlier, best point. `kept` names a file in ``rows``, `files`
    lie in ``stages/KEY``. With `pruned`, links that the state was trained on were deleted since.
    `distances`, of a combination, are those from its parts (`chain.combining.Combined`).
    """

    reads: tuple[Name, ...] = ()
    state: State
    tied: tuple[Digest, ...] = ()
    kept: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    files: Sums = Field(default={})
    ended: str = ""  # when, in UTC
    pruned: bool = False
    distances: dict[Name, float] = Field(default={})

    @property
    def has_config(self) -> bool:
        """Say whether it is a stage, or an adapter that was added like one (`runs.adding`)."""
        return CONFIG in self.files

    def renamed(self, names: Mapping[str, str]) -> Entry:
        """Return this with other names of entries."""
        update = {
            "key": names.get(self.key, self.key),
            "parents": tuple(names.get(key, key) for key in self.parents),
            "reads": tuple(names.get(key, key) for key in self.reads),
            "distances": {names.get(k, k): value for k, value in self.distances.items()},
        }
        return self.model_copy(update=update)


class History(Document):
    """All entries of a run in the order in which they ended, then those that are `unbuilt` in the
    order in which they were declared.

    `head` is the entry that the run is now, ``base`` for none; `target` is an unbuilt one that is
    to become the head. `past` and `future` are the heads that `undo` and `redo` go to. `origin` is
    the entry that the run began on, with its ancestors, of another run or imported.
    """

    base: Base
    hold: str
    seed: int = 0
    tokenizer: Sums = Field(default={})
    links: dict[Digest, LinkFacts] = Field(default={})
    entries: tuple[Entry, ...] = ()
    unbuilt: tuple[Unbuilt, ...] = ()
    origin: Name = BASE
    head: Name = BASE
    target: Name | None = None
    past: tuple[Name, ...] = ()
    future: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _checked(self) -> History:
        self.need_names()
        return self

    def need_names(self) -> None:
        """Raise ValueError for links and entries that are not there; parents end earlier."""
        known = {BASE}
        for entry in (*self.entries, *self.unbuilt):
            used = set[str]()
            if isinstance(entry, Entry):
                used = {*entry.tied, *(term.link for term in entry.state.terms)}
            missing = used - self.links.keys()
            if wrong := [*missing, *({*entry.parents} - known), *({entry.key} & known)]:
                raise ValueError(f"{wrong[0]} must be there before {entry.key}, once")
            known.add(entry.key)
        ahead = {self.origin, *([] if self.target is None else [self.target])} - known
        built = {BASE, *(entry.key for entry in self.entries)}
        if wrong := [*ahead, *({self.head, *self.past, *self.future} - built)]:
            raise ValueError(f"{wrong[0]} must be an entry")

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key that has a state, None where there is none."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def find_unbuilt(self, key: str) -> Unbuilt | None:
        return next((entry for entry in self.unbuilt if entry.key == key), None)

    def known(self, key: str) -> Entry | Unbuilt | None:
        """Return the entry of a key, built or not."""
        return self.find(key) or self.find_unbuilt(key)

    @property
    def empty(self) -> State:
        """Return the state of no links."""
        return State(base=self.base.fingerprint)

    def state_of(self, key: str) -> State:
        """Return the state of an entry, or of the base."""
        entry = self.find(key)
        return self.empty if entry is None else entry.state

    def below(self, key: str) -> set[str]:
        """Return the key of an entry, and those of all that it is computed from, built or not."""
        found, due = set[str](), [key]
        while due:
            name = due.pop()
            entry = self.known(name)
            if entry is not None and name not in found:
                found.add(name)
                due += entry.parents
        return found

    def lineage(self, key: str) -> list[Entry]:
        """Return an entry and all that it was computed from, in the order in which they ended."""
        found = self.below(key)
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
        """Return terms in the order in which their stages ended, that of a combination first."""
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
            found |= {} if entry.kept is None else {rows_file(entry.kept): entry.kept}
        return found

    def outer(self, keys: Iterable[str]) -> list[str]:
        """Return those of some entries that no other of them is computed from, once each."""
        found = [*dict.fromkeys(keys)]
        inside = {below for key in found for below in self.below(key) - {key}}
        return [key for key in found if key not in inside]

    def ends(self, key: str) -> list[str]:
        """Return the entries that an entry is combined of; itself, where it is no combination."""
        entry = self.known(key)
        if entry is None:
            return []
        if entry.kind == "combine":
            return list(entry.parents)
        if entry.kind == "mix" or entry.is_rehearsal:
            return [end for parent in entry.parents for end in self.ends(parent)]
        return [key]

    def recipe_of(self, key: str) -> Recipe:
        """Return how the combination that an entry is, or was trained on, is made."""
        entry = self.known(key)
        if entry is not None and (entry.kind == "mix" or entry.is_rehearsal):
            return self.recipe_of(entry.parent)
        return Recipe() if entry is None else entry.recipe

    # --- moving the head, and adding entries ---

    def moved(self, key: str) -> History:
        """Return this with another head, from which `undo` comes back, and no target."""
        if key == self.head:
            return self.model_copy(update={"target": None})
        past = (*self.past, self.head)
        update = {"head": key, "past": past, "future": (), "target": None}
        return self.model_copy(update=update)

    def declared(self, new: Iterable[Unbuilt], target: str | None) -> History:
        """Return this with more unbuilt entries, in place of those of the same keys and of what
        was to be computed of these.

        `target` is what the run is to become; it becomes that now if the entry has a state. An
        unbuilt combination is dropped where a new one has all its parts and more, or belongs to the
        same unit, unless another entry is to be computed from it.
        """
        new = [*new]
        before = self.withdrawn(e.key for e in new if self.find_unbuilt(e.key) not in (None, e))
        more = {entry.key: entry for entry in new if before.find_unbuilt(entry.key) is None}
        whole = (*before.unbuilt, *more.values())
        combined = [entry for entry in more.values() if entry.kind == "combine"]
        old = {
            e.key
            for e in whole
            for one in combined
            if e.kind == "combine" and ({*e.parents} < {*one.parents} or e.unit == one.unit)
        } - more.keys()
        old |= {e.key for e in whole if e.is_rehearsal and old & {*e.parents}}
        left = tuple(entry for entry in whole if entry.key not in old)
        if any(old & {*entry.parents} for entry in left):  # something else stands on one
            left, old = whole, set()
        kept = None if before.target in old else before.target
        grown = self.model_copy(update={"unbuilt": left, "target": target or kept})
        return grown.moved(target) if target is not None and self.find(target) else grown

    def withdrawn(self, keys: Iterable[str]) -> History:
        """Return this without some unbuilt entries, and those that were to be computed of them."""
        gone = {*keys} & {entry.key for entry in self.unbuilt}
        gone |= {entry.key for entry in self.unbuilt if gone & self.below(entry.key)}
        left = tuple(entry for entry in self.unbuilt if entry.key not in gone)
        target = None if self.target in gone else self.target
        origin = BASE if self.origin in gone else self.origin
        return self.model_copy(update={"unbuilt": left, "target": target, "origin": origin})

    def added(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return this with one more entry that has a state. The entry `start` comes first."""
        unbuilt = tuple(each for each in self.unbuilt if each.key != entry.key)
        entries = (entry, *self.entries) if entry.key == START else (*self.entries, entry)
        update = {"entries": entries, "links": {**self.links, **links}}
        return self.model_copy(update=update | {"unbuilt": unbuilt})

    def built(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return this with one more entry; the head moves there or not.

        It moves to the target, and on the way there from an entry to one computed from it. `undo`
        takes a unit back as a whole.
        """
        grown, target = self.added(entry, links), self.target
        is_next = self.head in (entry.parents or (BASE,))
        if entry.key == self.origin:
            return grown.model_copy(update={"head": entry.key}) if self.head == BASE else grown
        if target is None or (
            entry.key != target and not (is_next and entry.key in self.below(target))
        ):
            return grown
        before = self.find(self.head)
        moved = grown.moved(entry.key)
        update: dict[str, Any] = {"target": None if entry.key == target else target}
        if before is not None and before.unit and before.unit == entry.unit:
            update["past"] = self.past
        return moved.model_copy(update=update)

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
        parents = () if self.head == BASE else (self.head,)
        shown = [[term.link, term.strength] for term in state.terms]
        key = f"mix-{short_digest([[*parents], shown, []])[:8]}"
        while (known := self.known(key)) is not None:
            if isinstance(known, Entry) and (known.parents, known.state) == (parents, state):
                return self.moved(key)
            key = f"mix-{short_digest(key)[:8]}"  # that one was another before a prune
        entry = Entry(key=key, kind="mix", parents=parents, state=state, ended=now())
        return self.added(entry, {}).moved(key)

    def name_after(self, parts: Sequence[str]) -> str:
        """Return the name of a combination: ``after-`` the last of its parts, a number where that
        is taken."""
        name = f"after-{parts[-1]}"[:72]
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        return next(each for each in names if self.known(each) is None)

    def combination(self, parts: Iterable[str], recipe: Recipe) -> Entry | Unbuilt | None:
        """Return the entry that is the combination of these by a recipe, built or not."""
        wanted = {*parts}
        known: list[Entry | Unbuilt] = [*self.entries, *self.unbuilt]
        asked = ("combine", recipe, wanted)
        return next((e for e in known if (e.kind, e.recipe, {*e.parents}) == asked), None)


# --- places ---


def link_folder(digest: str) -> str:
    """Return where a link lies in the run."""
    return f"links/{digest}"


def rows_file(digest: str) -> str:
    """Return where kept rows of this SHA-256 lie in the run."""
    return f"rows/{digest[:16]}.safetensors"

"""The history of a run, ``history.json``: all its states, the current one and the planned one.

    RUN/history.json              this file; it is replaced as a whole
    RUN/links/DIGEST/             a link: an ordinary PEFT adapter, stored once
    RUN/rows/DIGEST.safetensors   the kept rows of a stage
    RUN/stages/NAME/              config, records and result of a stage; in training, its checkpoint
                                  too (`runs.work`)
    RUN/tokenizer/                only if the run began with another tokenizer than the base's

The words: an *entry* has a state, and was computed from its *parents*: a stage, a combination or an
import. The *head* is the entry that the run is now. The *origin* is the entry that it
began on. An entry is declared before it is computed: until then it is *unbuilt* and has no state.
The *target* is an unbuilt entry that will become the head.

Rows are named by their content, links by their stage, config and tensors; they are never
overwritten. The files of a state are written first; then this file is replaced under a lock. So a
kill leaves the history before or after the change, and readers never see half an entry. Files that
no entry names are ignored, and deleted by `prune`.
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
MAIN = "main"  # the name of a stage without one
START = "start"  # the entry of rows of the base
BASE = "base"  # the state without links
CONFIG, RECORDS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
TOKENIZER = "tokenizer"
WEIGHTS = "adapter_model.safetensors"
COMBINED = "combined"  # the stage of the link of every combination: equal parts give equal bits
CONTENT = ("links", "rows")  # folders whose files are named by their content


class State(Part):
    """A base and the links on it, in the order in which they are summed."""

    base: str
    links: tuple[Digest, ...] = ()

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits. States with equal digests are equal to the bit."""
        # 1.0: digests stay as they were, since sums of combinations follow their order
        return short_digest([self.base, [[link, 1.0] for link in self.links]])


# --- the parts of the history ---


class Base(Part):
    """The model that links belong to.

    `files` are the hashes of its files; they are None for a chain saved without a run.
    """

    model: str
    fingerprint: str
    task_type: str | None = CAUSAL
    dtype: Annotated[str, Field(pattern=r"^b?float(16|32|64)$")] = "float32"
    files: dict[str, str] | None = None
    fan_in_fan_out: bool = False
    quantize: str | None = None


class LinkFacts(Part):
    """The facts of a link beside its tensors; `files` are the SHA-256 of its adapter's files."""

    stage: Name
    rank: Count
    num_steps: Count
    error: float = 0.0
    config: dict[str, Any]
    files: Sums

    @property
    def digest(self) -> str:
        """Return the digest of stage, config and tensors.

        A link that was copied into another run keeps its name there, although its stage may have
        got another name; then this digest differs from its name.
        """
        return short_digest([self.stage, self.config, self.files.get(WEIGHTS)])

    def link_config(self) -> LinkConfig:
        """Return the config. Raises RunError for an invalid one."""
        try:
            return LinkConfig(**self.config)
        except (ConfigError, TypeError) as error:
            raise RunError("a link's config must be valid", error, DAMAGED) from None


class Training(Part):
    """The inputs of a stage's training."""

    rows: str | None = None  # digest of the rows in their order
    # digests of task and row files, by config key
    sources: dict[str, list[str]] = Field(default={})
    plugins: dict[str, str] = Field(default={})  # SHA-256 of each
    numbers: Numbers | None = None  # decided before the first step (`training.deciding`)
    versions: dict[str, str] = Field(default={})


class Recipe(Part):
    """The settings of a combination, beside its parts.

    `rank` is by default the sum of the ranks of all links of the parts, at least 16. `importance`
    weights the rows of a part. With `general`, the origin is a part too, by the rows of the entry
    ``start``. With `keep_conflicts`, rows are used even if their prompt has another answer in a
    later stage. The combined link is then trained for `steps` (`evaluation.combined_steps`).
    """

    rank: Annotated[int, Field(gt=0)] | None = None
    importance: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default={})
    general: bool = True
    keep_conflicts: bool = False
    steps: Count = 0

    def of_parts(self, keys: Collection[str]) -> Recipe:
        """Return the recipe with the importance of these parts only."""
        importance = {key: value for key, value in self.importance.items() if key in (START, *keys)}
        return self.model_copy(update={"importance": importance})


class Declared(Part):
    """The part of an entry that is known when it is declared."""

    key: Name
    kind: Literal["stage", "combine", "import"]
    parents: tuple[Name, ...] = ()  # the entries that it is computed from; none: the base
    unit: str = ""  # a stage with its combination: `undo` takes them back together
    training: Training = Training()  # of a stage or an import
    recipe: Recipe = Recipe()  # of a combination

    @property
    def parent(self) -> str:
        """Return the entry that a stage begins on."""
        return self.parents[0] if self.parents else BASE

    @property
    def has_config(self) -> bool:
        """Say whether it is a stage, or an adapter that is added like one (`runs.adding`)."""
        return self.kind == "stage" or (self.kind == "import" and self.key != START)


class Unbuilt(Declared):
    """An entry without a state."""

    config: dict[str, Any] = Field(default={})  # of a stage or an import

    def built(self, state: State, **more: Any) -> Entry:
        """Return the entry with its state, other fields, and the current time as its end."""
        declared = {name: getattr(self, name) for name in Declared.model_fields}
        return Entry(**declared | {"state": state, "ended": now()} | more)


class Entry(Declared):
    """A built entry: a state, and how it was computed."""

    reads: tuple[Name, ...] = ()  # entries whose kept rows were used
    state: State
    # all links of a stage; its state may end at an earlier, best point
    tied: tuple[Digest, ...] = ()
    kept: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # SHA-256 of its kept rows
    files: Sums = Field(default={})  # in ``stages/KEY``
    ended: str = ""  # when, in UTC
    pruned: bool = False  # links below it were deleted after it was trained
    distances: dict[Name, float] = Field(default={})  # of a combination, from each part

    @property
    def has_config(self) -> bool:
        """Say whether it is a stage, or an adapter that was added like one (`runs.adding`)."""
        return CONFIG in self.files

    def renamed(self, names: Mapping[str, str]) -> Entry:
        """Return the entry with new names of entries; `names` maps old ones to new ones."""
        update = {
            "key": names.get(self.key, self.key),
            "parents": tuple(names.get(key, key) for key in self.parents),
            "reads": tuple(names.get(key, key) for key in self.reads),
            "distances": {names.get(k, k): value for k, value in self.distances.items()},
        }
        return self.model_copy(update=update)


class History(Document):
    """All entries of a run, and its current state. Methods return changed copies."""

    base: Base
    hold: str
    seed: int = 0
    tokenizer: Sums = Field(default={})
    links: dict[Digest, LinkFacts] = Field(default={})
    entries: tuple[Entry, ...] = ()  # in the order in which they were built
    unbuilt: tuple[Unbuilt, ...] = ()  # in the order in which they were declared
    origin: Name = BASE  # copied from another run with its ancestors, or imported
    head: Name = BASE
    target: Name | None = None
    past: tuple[Name, ...] = ()  # earlier heads, for `undo`: the latest is last
    future: tuple[Name, ...] = ()  # heads for `redo`: the next is first

    @model_validator(mode="after")
    def _checked(self) -> History:
        self.need_names()
        return self

    def need_names(self) -> None:
        """Raise ValueError unless all named links and entries exist, parents before children."""
        known = {BASE}
        for entry in (*self.entries, *self.unbuilt):
            used = set[str]()
            if isinstance(entry, Entry):
                used = {*entry.tied, *entry.state.links}
            missing = used - self.links.keys()
            if wrong := [*missing, *({*entry.parents} - known), *({entry.key} & known)]:
                raise ValueError(f"{wrong[0]} must be there before {entry.key}, once")
            known.add(entry.key)
        ahead = {self.origin, *([] if self.target is None else [self.target])} - known
        built = {BASE, *(entry.key for entry in self.entries)}
        if wrong := [*ahead, *({self.head, *self.past, *self.future} - built)]:
            raise ValueError(f"{wrong[0]} must be an entry")

    def find(self, key: str) -> Entry | None:
        """Return the built entry of a key, or None."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def find_unbuilt(self, key: str) -> Unbuilt | None:
        """Return the unbuilt entry of a key, or None."""
        return next((entry for entry in self.unbuilt if entry.key == key), None)

    def known(self, key: str) -> Entry | Unbuilt | None:
        """Return the entry of a key, built or unbuilt, or None."""
        return self.find(key) or self.find_unbuilt(key)

    @property
    def empty(self) -> State:
        """Return the state without links."""
        return State(base=self.base.fingerprint)

    def state_of(self, key: str) -> State:
        """Return the state of an entry, or of the base."""
        entry = self.find(key)
        return self.empty if entry is None else entry.state

    def below(self, key: str) -> set[str]:
        """Return the keys of an entry and of all its ancestors, built or unbuilt."""
        below, due = set[str](), [key]
        while due:
            name = due.pop()
            entry = self.known(name)
            if entry is not None and name not in below:
                below.add(name)
                due += entry.parents
        return below

    def lineage(self, key: str) -> list[Entry]:
        """Return an entry and its ancestors that are built, in the order of `entries`."""
        below = self.below(key)
        return [entry for entry in self.entries if entry.key in below]

    def keepers(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of the kept rows of entries and their ancestors, and of the start."""
        read = {START, *(entry.key for key in keys for entry in self.lineage(key))}
        return {e.key: e.kept for e in self.entries if e.key in read and e.kept is not None}

    @property
    def own(self) -> list[Entry]:
        """Return the entries of this run alone: without the origin, its ancestors and its rows."""
        copied = {entry.key for entry in self.lineage(self.origin)} | {START}
        return [entry for entry in self.entries if entry.key not in copied]

    @property
    def own_stages(self) -> list[str]:
        """Return the names of the stages that the run trained itself, in their order."""
        return [entry.key for entry in self.own if entry.kind == "stage"]

    def in_order(self, links: Iterable[str]) -> list[str]:
        """Return links in the order of their stages; the link of a combination comes first."""
        places = {entry.key: place for place, entry in enumerate(self.entries)}
        return sorted(links, key=lambda link: places.get(self.links[link].stage, -1))

    def stages_of(self, key: str) -> list[str]:
        """Return the stages with links in an entry, those of a combination too, in their order."""
        kinds = ("stage", "import")
        return [e.key for e in self.lineage(key) if e.kind in kinds and e.state.links]

    @property
    def files(self) -> dict[str, str]:
        """Return all files that the history names, each with its SHA-256 or its first digits."""
        named = {f"{TOKENIZER}/{name}": digest for name, digest in self.tokenizer.items()}
        for key, facts in self.links.items():
            named |= {f"{link_folder(key)}/{name}": d for name, d in facts.files.items()}
        for entry in self.entries:
            named |= {f"stages/{entry.key}/{name}": d for name, d in entry.files.items()}
            named |= {} if entry.kept is None else {rows_file(entry.kept): entry.kept}
        return named

    def without_ancestors(self, keys: Iterable[str]) -> list[str]:
        """Return the keys once each, without ancestors of another one of them."""
        unique = [*dict.fromkeys(keys)]
        ancestors = {below for key in unique for below in self.below(key) - {key}}
        return [key for key in unique if key not in ancestors]

    def parts(self, key: str) -> list[str]:
        """Return the parts of a combination; else the key itself, nothing for the base."""
        entry = self.known(key)
        if entry is None:
            return []
        return list(entry.parents) if entry.kind == "combine" else [key]

    def recipe_of(self, key: str) -> Recipe:
        """Return the recipe of a combination."""
        entry = self.known(key)
        return Recipe() if entry is None else entry.recipe

    # --- moving the head, and adding entries ---

    def moved(self, key: str) -> History:
        """Return the history with another head and no target; `undo` returns to the old head."""
        if key == self.head:
            return self.model_copy(update={"target": None})
        past = (*self.past, self.head)
        update = {"head": key, "past": past, "future": (), "target": None}
        return self.model_copy(update=update)

    def declared(self, new: Iterable[Unbuilt], target: str | None) -> History:
        """Return the history with new unbuilt entries and a new target.

        New entries replace unbuilt ones with the same keys, and the descendants of these. If the
        target is built already, it becomes the head. An unbuilt combination is dropped if a new one
        has all its parts and more, or belongs to the same unit, unless another entry descends from
        it.
        """
        new = [*new]
        before = self.withdrawn(e.key for e in new if self.find_unbuilt(e.key) not in (None, e))
        added = {entry.key: entry for entry in new if before.find_unbuilt(entry.key) is None}
        unbuilt = (*before.unbuilt, *added.values())
        combined = [entry for entry in added.values() if entry.kind == "combine"]
        dropped = {
            old.key
            for old in unbuilt
            for one in combined
            if old.kind == "combine" and ({*old.parents} < {*one.parents} or old.unit == one.unit)
        } - added.keys()
        left = tuple(entry for entry in unbuilt if entry.key not in dropped)
        if any(dropped & {*entry.parents} for entry in left):
            left, dropped = unbuilt, set()
        old_target = None if before.target in dropped else before.target
        after = self.model_copy(update={"unbuilt": left, "target": target or old_target})
        return after.moved(target) if target is not None and self.find(target) else after

    def withdrawn(self, keys: Iterable[str]) -> History:
        """Return the history without some unbuilt entries and their descendants."""
        gone = {*keys} & {entry.key for entry in self.unbuilt}
        gone |= {entry.key for entry in self.unbuilt if gone & self.below(entry.key)}
        left = tuple(entry for entry in self.unbuilt if entry.key not in gone)
        target = None if self.target in gone else self.target
        origin = BASE if self.origin in gone else self.origin
        return self.model_copy(update={"unbuilt": left, "target": target, "origin": origin})

    def added(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return the history with one more built entry. The entry ``start`` is placed first."""
        unbuilt = tuple(other for other in self.unbuilt if other.key != entry.key)
        entries = (entry, *self.entries) if entry.key == START else (*self.entries, entry)
        update = {"entries": entries, "links": {**self.links, **links}}
        return self.model_copy(update=update | {"unbuilt": unbuilt})

    def built(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return the history with one more built entry, and move the head if it must.

        The head moves to the target, and on the way to the target to a child of the head. Moves
        inside a unit are not recorded, so that `undo` takes the whole unit back.
        """
        after, target = self.added(entry, links), self.target
        if entry.key == self.origin:
            return after.model_copy(update={"head": entry.key}) if self.head == BASE else after
        is_child = self.head in (entry.parents or (BASE,))
        if target is None or (
            entry.key != target and not (is_child and entry.key in self.below(target))
        ):
            return after
        before = self.find(self.head)
        moved = after.moved(entry.key)
        update: dict[str, Any] = {"target": None if entry.key == target else target}
        # the start has the unit of the first stage, whose lock it uses; `undo` returns to it
        is_start = self.head == self.origin
        if before is not None and before.unit and before.unit == entry.unit and not is_start:
            update["past"] = self.past
        return moved.model_copy(update=update)

    def name_after(self, parts: Sequence[str]) -> str:
        """Return a free name for a combination: ``after-`` and its last part, perhaps a number."""
        return self.free_name(f"after-{parts[-1]}"[:72])

    def free_name(self, name: str) -> str:
        """Return a name that no entry has: this one, or this one and a number."""
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        return next(free for free in names if self.known(free) is None)

    def combination(self, parts: Iterable[str], recipe: Recipe) -> Entry | Unbuilt | None:
        """Return the combination of these parts by a recipe, built or unbuilt, or None."""
        known: list[Entry | Unbuilt] = [*self.entries, *self.unbuilt]
        wanted = ("combine", recipe, {*parts})
        return next((e for e in known if (e.kind, e.recipe, {*e.parents}) == wanted), None)


# --- places ---


def link_folder(digest: str) -> str:
    """Return the folder of a link in a run."""
    return f"links/{digest}"


def rows_file(digest: str) -> str:
    """Return the file of kept rows in a run, by their SHA-256."""
    return f"rows/{digest[:16]}.safetensors"

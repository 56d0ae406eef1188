"""The history of a run, ``history.json``: the versions of its plan, and what was computed for them.

    RUN/history.json              this file; it is replaced as a whole
    RUN/links/DIGEST/             a link: an ordinary PEFT adapter, stored once
    RUN/rows/DIGEST.safetensors   the kept rows of a stage, or of the base
    RUN/stages/NAME/              config, records and result of a stage; in training, its checkpoint
                                  too (`runs.work`)
    RUN/tokenizer/                only if the run began with another tokenizer than the base's

A *version* is a plan (`runs.recipes`), and the command that made it out of the version `before`.
Commands write versions; `training.reconcile` computes the *entries* that a version needs. An entry
has a state; its `digest` is the key of its recipe (`Made`), so the plan finds it whatever happened
in between. The *head* is the entry that the run is now: that of the newest version, from `at`
backwards, which is complete.

Rows are named by their content, links by their stage, config and tensors; they are never
overwritten. The files of an entry are written first; then this file is replaced under a lock. So a
kill leaves the history before or after the change, and readers never see half an entry. Files that
no entry names are ignored, and deleted by `prune`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, count
from typing import Any

from pydantic import Field, model_validator

from chainlora.runs.documents import Digest, Document, Name, Part, Sums, now
from chainlora.runs.entries import (
    BASE,
    START,
    TOKENIZER,
    Base,
    Due,
    Entry,
    LinkFacts,
    Sha,
    State,
    link_folder,
    rows_file,
)
from chainlora.runs.keys import Made
from chainlora.runs.recipes import How, Plan, Recipe, Recipes, Stage


class Version(Part):
    """A plan as it is stored, each stage by its identity, and how it came about.

    `marks` are stages to erase, with all that was computed from them, once the plan is complete.
    """

    stages: tuple[Digest, ...] = ()
    off: tuple[Name, ...] = ()
    how: How = How()
    before: int = -1  # the place of the version that it was made from
    command: str = ""
    time: str = ""
    marks: tuple[Digest, ...] = ()

    @classmethod
    def of(cls, plan: Plan, **keys: Any) -> Version:
        """Return a version of a plan; `keys` are the other fields."""
        stages = tuple(stage.identity for stage in plan.stages)
        return cls(stages=stages, off=plan.off, how=plan.how, **keys)

    @property
    def plan(self) -> tuple[object, ...]:
        """Return what two versions of one plan have in common."""
        return self.stages, self.off, self.how


class History(Document):
    """The versions and entries of a run. Methods return changed copies."""

    base: Base
    hold: str
    seed: int = 0
    tokenizer: Sums = Field(default={})
    general: dict[str, Any] | None = None  # how rows of the base are got; None: there are none
    links: dict[Digest, LinkFacts] = Field(default={})
    entries: tuple[Entry, ...] = ()  # in the order in which they were computed
    stages: dict[Digest, Stage] = Field(default={})  # of all versions
    versions: tuple[Version, ...] = (Version(),)
    at: int = 0
    unsent: tuple[Sha, ...] = ()  # kept rows that this copy of the run does not have

    @model_validator(mode="after")
    def _checked(self) -> History:
        self.need_names()
        return self

    def need_names(self) -> None:
        """Raise ValueError unless all named links, stages and entries exist, parents first."""
        known = {BASE}
        for entry in self.entries:
            missing = {*entry.tied, *entry.state.links} - self.links.keys()
            if wrong := [*missing, *({*entry.parents} - known), *({entry.key} & known)]:
                raise ValueError(f"{wrong[0]} must be there before {entry.key}, once")
            known.add(entry.key)
        for place, version in enumerate(self.versions):
            if wrong := [*({*version.stages} - self.stages.keys())]:
                raise ValueError(f"{wrong[0]} must be a stage")
            if version.before >= place or not 0 <= self.at < len(self.versions):
                raise ValueError("a version must be made from an earlier one")

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key, or None."""
        return next((entry for entry in self.entries if entry.key == key), None)

    @property
    def empty(self) -> State:
        """Return the state without links."""
        return State(base=self.base.fingerprint)

    def state_of(self, key: str) -> State:
        """Return the state of an entry, or of the base."""
        entry = self.find(key)
        return self.empty if entry is None else entry.state

    def below(self, key: str) -> set[str]:
        """Return the keys of an entry and of all its ancestors."""
        below = {key}
        for entry in reversed(self.entries):  # parents come first
            if entry.key in below:
                below |= {*entry.parents}
        return below & {entry.key for entry in self.entries}

    def lineage(self, key: str) -> list[Entry]:
        """Return an entry and its ancestors, in the order of `entries`."""
        below = self.below(key)
        return [entry for entry in self.entries if entry.key in below]

    def keepers(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of the kept rows of entries and their ancestors, and of the base.

        They are in the order of the plan, by which later answers are newer.
        """
        read = {START, *(entry.key for key in keys for entry in self.lineage(key))}
        known = [e for e in self.entries if e.key in read and e.kept not in (None, *self.unsent)]
        return {entry.key: str(entry.kept) for entry in self._in_order(known)}

    def _in_order(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return entries in the order of the plan; others come last."""
        order = {name: place for place, name in enumerate((START, *self.plan().names))}
        return sorted(entries, key=lambda entry: order.get(self.name_of(entry), len(order)))

    def name_of(self, entry: Entry) -> str:
        """Return the name of an entry's stage in the plan, else its key."""
        stage = None if entry.identity is None else self.stages.get(entry.identity)
        return entry.key if stage is None else stage.name

    def in_order(self, links: Iterable[str]) -> list[str]:
        """Return links in the order of their stages; the link of a combination comes first."""
        places = {entry.key: place for place, entry in enumerate(self.entries)}
        return sorted(links, key=lambda link: places.get(self.links[link].stage, -1))

    def stages_of(self, key: str) -> list[str]:
        """Return the stages with links in an entry, those of a combination too."""
        kinds = ("stage", "import")
        known = self._in_order(self.lineage(key))
        return [e.key for e in known if e.kind in kinds and e.state.links]

    @property
    def files(self) -> dict[str, str]:
        """Return all files that the history names, each with its SHA-256 or its first digits."""
        named = {f"{TOKENIZER}/{name}": digest for name, digest in self.tokenizer.items()}
        for key, facts in self.links.items():
            named |= {f"{link_folder(key)}/{name}": d for name, d in facts.files.items()}
        for entry in self.entries:
            named |= {f"stages/{entry.place}/{name}": d for name, d in entry.files.items()}
            if entry.kept is not None and entry.kept not in self.unsent:
                named[rows_file(entry.kept)] = entry.kept
        return named

    def parts(self, key: str) -> list[str]:
        """Return the parts of a combination; else the key itself, nothing for the base."""
        entry = self.find(key)
        if entry is None:
            return []
        return list(entry.parents) if entry.kind == "combine" else [key]

    # --- versions ---

    def plan(self, at: int | None = None) -> Plan:
        """Return the plan of a version, by default of the current one."""
        version = self.versions[self.at if at is None else at]
        stages = tuple(self.stages[identity] for identity in version.stages)
        return Plan(stages=stages, off=version.off, how=version.how)

    def recipes(self, at: int | None = None) -> Recipes:
        """Return the recipes of a version."""
        base = {"files": self.base.files, "tokenizer": self.tokenizer, "dtype": self.base.dtype}
        general = self.general
        if general is not None:  # the paths of its files decide no bits
            general = {key: general.get(key) for key in ("bits", "sources")}
        return Recipes(self.plan(at), base | {"quantize": self.base.quantize}, general)

    @property
    def head(self) -> str:
        """Return the key of the entry that the run is now, or `BASE`."""
        made = Made(self)
        roots = (self.recipes(place).root for place in self.ancestors())
        found = next(root for root in roots if made.is_made(root))
        entry = made.entry(found)
        return BASE if entry is None else entry.key

    def ancestors(self) -> Iterator[int]:
        """Yield the place of the current version and of those before it, the newest first."""
        place = self.at
        while place >= 0:
            yield place
            place = self.versions[place].before

    def only(self, key: str) -> History:
        """Return the history of an entry alone: its ancestors, and one version that comes to it."""
        entry, needed = self.find(key), {START, *self.below(key)}
        entries = tuple(each for each in self.entries if each.key in needed)
        wanted = [each.identity for each in entries if each.identity is not None]
        places = (p for p in reversed(range(len(self.versions))) if p != self.at)
        lists = (self.versions[place].stages for place in (self.at, *places))
        order = next((each for each in lists if {*wanted} <= {*each}), tuple(wanted))
        how = entry.how if entry is not None and entry.kind == "combine" else How()
        stages = tuple(identity for identity in order if identity in wanted)
        versions = (Version(), Version(stages=stages, how=how, before=0))[: 1 + bool(stages)]
        update = {"entries": entries, "versions": versions, "at": len(versions) - 1}
        return self.model_copy(update=update).tidied()

    def plan_of(self, keys: Iterable[str], how: How) -> Plan:
        """Return the plan of a run that is made of some entries; undone stages come back for it."""
        plan, names = self.plan(), list[str]()
        for entry in (entry for key in keys for entry in self.lineage(key)):
            stage = self.stages.get(entry.identity or "")
            if stage is not None:
                names.append(stage.name)
                plan = plan if plan.find(stage.name) is not None else plan.with_stage(stage)
        return plan.combined(names, how)

    @property
    def is_blank(self) -> bool:
        """Say whether a run has no stage, and never had one; its first command was killed."""
        return not self.stages and all(entry.key == START for entry in self.entries)

    @property
    def copied(self) -> tuple[Name, ...]:
        """Return the stages with which a fork began."""
        is_fork = len(self.versions) > 1 and not self.versions[1].command
        return self.plan(1).names if is_fork else ()

    def complete(self) -> History:
        """Return the history at the newest version that is complete, without unfinished ones."""
        made, history = Made(self), self
        while not made.is_made(history.recipes().root):
            is_last = history.at == len(history.versions) - 1
            history = (
                history.dropped() if is_last else history.moved(history.versions[history.at].before)
            )
        return history

    def edited(self, plan: Plan, command: str) -> History:
        """Return the history with one more version, or as it is if the plan is the current one."""
        if plan == self.plan():
            return self
        version = Version.of(plan, before=self.at, command=command, time=now())
        update = {
            "stages": self.stages | {stage.identity: stage for stage in plan.stages},
            "versions": (*self.versions, version),
            "at": len(self.versions),
        }
        return self.model_copy(update=update).named()

    @property
    def former(self) -> list[Digest]:
        """Return the identities that stages of the current plan had before they were changed."""
        now = {stage.name: stage.identity for stage in self.plan().stages}
        return [
            identity
            for identity, stage in self.stages.items()
            if now.get(stage.name, identity) != identity
        ]

    def marked(self, marks: Iterable[Digest]) -> History:
        """Return the history whose current version marks stages to erase."""
        versions = list(self.versions)
        new = versions[self.at].model_copy(update={"marks": tuple(sorted(marks))})
        versions[self.at] = new
        return self.model_copy(update={"versions": tuple(versions)})

    def moved(self, at: int) -> History:
        """Return the history at another version."""
        return self.model_copy(update={"at": at}).named()

    def dropped(self) -> History:
        """Return the history without its last version, at the one before it."""
        *versions, last = self.versions
        update = {"versions": tuple(versions), "at": last.before}
        return self.model_copy(update=update).tidied().named()

    # --- entries ---

    def named(self) -> History:
        """Return the history in which the stages of the current plan have its names.

        The entry of another version of such a stage gets a number behind the name.
        """
        made, recipes, names = Made(self), self.recipes(), dict[str, str]()
        for name in self.plan().names:
            entry, old = made.entry(recipes.state(name)), self.find(name)
            if old is not None and old != entry:
                names[old.key] = self.free_name(name, {*names.values(), *self.plan().names})
            if entry is not None:
                names[entry.key] = name
        return self.renamed({old: new for old, new in names.items() if old != new})

    def renamed(self, names: Mapping[str, str]) -> History:
        """Return the history with new names of entries; their folders stay where they are."""
        if not names:
            return self
        entries = list[Entry]()
        for entry in self.entries:
            new = entry.renamed(names)
            if new.key != entry.key and entry.files:
                folder = "" if entry.place == new.key else entry.place
                new = new.model_copy(update={"folder": folder})
            entries.append(new)
        links = {
            link: facts.model_copy(update={"stage": names.get(facts.stage, facts.stage)})
            for link, facts in self.links.items()
        }
        return self.model_copy(update={"entries": tuple(entries), "links": links})

    def added(self, entry: Entry, links: Mapping[str, LinkFacts]) -> History:
        """Return the history with one more entry. The entry ``start`` is placed first."""
        entries = (entry, *self.entries) if entry.key == START else (*self.entries, entry)
        return self.model_copy(update={"entries": entries, "links": {**self.links, **links}})

    def without_entries(self, keys: Collection[str]) -> History:
        """Return the history without some entries, all computed from them, and their links."""
        gone = {*keys}
        entries = tuple(e for e in self.entries if not self.below(e.key) & gone)
        if START in gone:  # combinations read its rows, and are not its children
            entries = tuple(e for e in entries if not (e.kind == "combine" and e.how.general))
        return self.model_copy(update={"entries": entries}).tidied()

    def tidied(self) -> History:
        """Return the history without links and stages that nothing names."""
        used = {link for e in self.entries for link in (*e.state.links, *e.tied)}
        named = {identity for version in self.versions for identity in version.stages}
        update = {
            "links": {link: facts for link, facts in self.links.items() if link in used},
            "stages": {key: stage for key, stage in self.stages.items() if key in named},
        }
        return self.model_copy(update=update)

    def erased(self, stages: Collection[Digest]) -> History:
        """Return the history as if some stages, by identity, had never been there.

        In earlier versions, the current stage of the same name takes the place of such a stage.
        Without one, all that stands on it goes too, and a command that names it is cut to its verb.
        Versions that become equal are one.
        """
        now = {stage.name: stage for stage in self.plan().stages}
        names = {self.stages[identity].name for identity in stages} - now.keys()
        versions, places = list[Version](), dict[int, int]()
        for place, version in enumerate(self.versions):
            plan, before = self.plan(place), places.get(version.before, -1)
            marked = [stage.name for stage in plan.stages if stage.identity in stages]
            plan = plan.with_changed(now[name] for name in marked if name in now)
            is_named = any(name in version.command for name in names)
            command = version.command.partition(" ")[0] if is_named else version.command
            plan = plan.without({*marked} & names)
            new = Version.of(plan, before=before, command=command, time=version.time)
            if before >= 0 and new.plan == versions[before].plan:
                places[place] = before
            else:
                places[place] = len(versions)
                versions.append(new)
        left = {identity for version in versions for identity in version.stages}
        gone = [entry.key for entry in self.entries if entry.identity not in (None, *left)]
        update = {"versions": tuple(versions), "at": places[self.at]}
        return self.model_copy(update=update).without_entries(gone)._with_first_names()

    def _with_first_names(self) -> History:
        """Return the history with the names that combinations would have had without others."""
        names, taken = dict[str, str](), {e.key for e in self.entries if e.kind != "combine"}
        for entry in self.entries:
            if entry.kind == "combine":
                first = f"after-{entry.parents[-1]}"[:72]
                numbered = (f"{first}-{number}" for number in count(2))
                names[entry.key] = next(n for n in chain([first], numbered) if n not in taken)
                taken.add(names[entry.key])
        return self.renamed({old: new for old, new in names.items() if old != new})

    def due(self, recipe: Recipe, made: Made | None = None) -> Due | None:
        """Return a recipe with what is known of its entry; None before its parents are made."""
        made = made or Made(self)
        digest, parents = made.key(recipe), [made.entry(parent) for parent in recipe.parents]
        if digest is None:
            return None
        keys = [entry.key for entry in parents if entry is not None and entry.key != START]
        key = START if recipe.stage is None else recipe.stage.name
        if recipe.kind == "combine":
            key = self.free_name(f"after-{keys[-1]}"[:72])
        below = self.state_of(keys[0]) if keys else self.empty
        is_taken = key in {entry.place for entry in self.entries}
        folder = f"{key[:63]}-{digest[:8]}" if is_taken else ""
        return Due(recipe, digest, key, tuple(keys), below, folder)

    def due_stage(self, name: str) -> Due | None:
        """Return a stage of the current plan that has no entry yet, None before it can begin."""
        if self.plan().find(name) is None or self.find(name) is not None:
            return None
        return self.due(self.recipes().state(name))

    def folder_of(self, name: str) -> str:
        """Return the name of the folder of an entry, or of a stage that has none yet."""
        entry = self.find(name) or self.due_stage(name)
        return name if entry is None else entry.place

    def free_name(self, name: str, taken: Collection[str] = ()) -> str:
        """Return a name that no entry has: this one, or this one and a number."""
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        return next(free for free in names if self.find(free) is None and free not in taken)

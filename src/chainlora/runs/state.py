"""The state of a run that a command is about: found once (`runs.addresses`), frozen, and taken by
all that loads, scores, shows, exports or goes on from it. Every file is checked before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.checks import check_strengths
from chainlora.chain.link import Link
from chainlora.chain.showing import table
from chainlora.config.reading import make_config, read_tree
from chainlora.config.schema import RunConfig
from chainlora.config.staging import stage_folder
from chainlora.config.template_names import is_resolved
from chainlora.data.kept import Kept, read_kept
from chainlora.errors import RunError
from chainlora.models.finding import from_above
from chainlora.models.identity import changed_files
from chainlora.runs.draft import Draft, read_draft
from chainlora.runs.history import (
    BASE,
    CONFIG,
    DAMAGED,
    INCOMPLETE,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Change,
    Entry,
    History,
    LinkFacts,
    State,
    Term,
    derived_file,
    link_folder,
    rows_file,
)
from chainlora.runs.links import outline_of, read_link, with_derived
from chainlora.runs.records import Record, check_records, read_records, read_result

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False, eq=False)
class OpenState:
    """A state of a run: the base, or what an `entry` of its history is, perhaps at other strengths.

    Of a stage that is trained, it is what has been tied so far, with its `draft`; the history then
    holds the entry that the stage would get.
    """

    run: Path
    history: History
    state: State
    entry: Entry | None = None
    draft: Draft | None = field(default=None)

    def __str__(self) -> str:
        return str(self.run) if self.entry is None else f"{self.run}@{self.entry.key}"

    def __repr__(self) -> str:
        known = ", ".join(f"{name}={value:g}" for name, value in self.strengths.items())
        return f"<OpenState: {self}{f', {known}' if known else ''}>"

    def _repr_html_(self) -> str:
        """Return the links of the state."""
        heads = ("link", "stage", "rank", "steps", "strength")
        rows = [
            (place, facts.stage, facts.rank, facts.num_steps, term.strength)
            for place, (term, facts) in enumerate(zip(self.state.terms, self.facts, strict=True))
        ]
        return table(heads, rows, str(self))

    # --- what it is ---

    @property
    def base(self) -> Base:
        """Return the base, named as it is found from here."""
        base = self.history.base
        return base.model_copy(update={"model": from_above(base.model, self.run)})

    @property
    def facts(self) -> list[LinkFacts]:
        """Return what is known of each link of the state."""
        return [self.history.links[term.link] for term in self.state.terms]

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages that links are of, in their order."""
        return self.history.stages_in(self.state)

    @property
    def strengths(self) -> dict[str, float]:
        """Return the strength of each stage."""
        return self.history.strengths_of(self.state)

    @property
    def lineage(self) -> list[Entry]:
        """Return the entries that the state was computed from, and its own."""
        return [] if self.entry is None else self.history.lineage(self.entry.key)

    @property
    def trained(self) -> Entry | None:
        """Return the entry whose training or import ended in this state, before any `mix`."""
        found = self.entry
        while found is not None and found.kind == "mix":
            found = self.history.find(found.parents[0]) if found.parents else None
        return found

    @property
    def stage(self) -> str:
        """Return the name of the stage that was trained last, before any `mix`."""
        return BASE if self.trained is None else self.trained.key

    @property
    def has_run(self) -> bool:
        """Say whether a run trained it; a saved chain has no config."""
        return any(entry.kind == "stage" for entry in self.history.entries)

    @property
    def is_before_training(self) -> bool:
        """Say whether it is what a run began on, of which the config of the run tells nothing."""
        return self.entry is None or self.entry.key in (self.history.origin, START)

    @property
    def is_off(self) -> bool:
        """Say whether the links of the stage that was trained last are all switched off."""
        own = [strength for name, strength in self.strengths.items() if name == self.stage]
        return bool(own) and not any(own)

    @property
    def is_as_trained(self) -> bool:
        """Say whether it is what the stage scored when it was trained: no mix, nothing pruned."""
        trained = self.trained
        if trained is None or trained.pruned:
            return trained is None
        return trained.state.digest == self.state.digest

    @property
    def is_whole_model(self) -> bool:
        """Say whether every weight was fine-tuned."""
        return self.entry is not None and self.entry.is_whole_model

    @property
    def parent(self) -> State:
        """Return the state that the stage began on."""
        trained = self.trained
        if trained is None or not trained.parents:
            return self.history.empty
        return self.history.state_of(trained.parents[0])

    @property
    def first(self) -> int:
        """Return how many links are below those of the stage that was trained last."""
        return sum(facts.stage != self.stage for facts in self.facts)

    @property
    def sequence(self) -> list[Term]:
        """Return the links in the order in which they were tied, also those beyond the best point
        that the state ends at."""
        trained = self.trained
        if trained is None or not trained.tied:
            return list(self.state.terms)
        known = {term.link: term for term in self.state.terms}
        strength = self.strengths.get(trained.key, 1.0)
        below = [
            term
            for term, facts in zip(self.state.terms, self.facts, strict=True)
            if facts.stage != trained.key
        ]
        own = [known.get(link, Term(link=link, strength=strength)) for link in trained.tied]
        return [*below, *own]

    # --- other states ---

    def at(self, key: str) -> OpenState:
        """Return the state of another entry of the run, by its key, or of the base."""
        history = self.history
        return OpenState(self.run, history, history.state_of(key), history.find(key))

    def of(self, state: State) -> OpenState:
        """Return this with other links or strengths."""
        return replace(self, state=state)

    def with_strengths(self, strengths: Mapping[str, float]) -> OpenState:
        """Return this with the links of these stages at other strengths.

        Raises RunError for stages that are not there.
        """
        known = self.stages
        for name in strengths:
            if name not in known:
                rule = f"a stage must be one of {', '.join(known)}"
                raise RunError(
                    rule if known else "there must be a stage, and this state has no links",
                    f"{name!r} for {self.run}",
                    "name one" if known else "name another state",
                )
        terms = tuple(
            term.model_copy(update={"strength": float(strengths[facts.stage])})
            if facts.stage in strengths
            else term
            for term, facts in zip(self.state.terms, self.facts, strict=True)
        )
        return self.of(self.state.model_copy(update={"terms": terms}))

    def need_one_strength(self, names: Sequence[str]) -> None:
        """Raise RunError for a stage to which 1 would not give back what was: a chain that was
        saved with links of several strengths."""
        for name in names:
            pairs = zip(self.facts, self.state.terms, strict=True)
            found = {term.strength for facts, term in pairs if facts.stage == name}
            if len(found) > 1:
                shown = ", ".join(f"{each:g}" for each in sorted(found))
                raise RunError(
                    "Cannot weigh a stage whose links have different strengths",
                    f"{shown} in {name!r} of {self.run}",
                    "take Chain.set_strengths, and save the chain",
                )

    # --- what it holds, read and checked ---

    def links(self, num_links: int | None = None) -> list[Link]:
        """Read the links of the state, or of the first `num_links` that were tied."""
        terms: Sequence[Term] = self.state.terms
        if num_links is not None:
            terms = self.sequence
            if not 0 <= num_links <= len(terms):
                rule = f"the number of links must be 0 to {len(terms)} for this run"
                raise RunError(f"{rule} (got {num_links})")
            terms = terms[:num_links]
        links = self.read(terms)
        check_strengths(links)
        return links

    def read(self, terms: Sequence[Term]) -> list[Link]:
        """Read links, each checked; their places and ids are those in `terms`."""
        for term in terms:
            self._check(term)
        found = []
        for place, term in enumerate(terms):
            facts, folder = self.history.links[term.link], self.run / link_folder(term.link)
            link = read_link(folder, facts, place, term.strength)
            if term.derived is not None:
                link = with_derived(link, self.run / derived_file(term.derived))
            found.append(link)
        return found

    def outlines(self) -> list[Link]:
        """Return the links without their tensors."""
        pairs = enumerate(zip(self.facts, self.state.terms, strict=True))
        return [outline_of(facts, place, term.strength) for place, (facts, term) in pairs]

    def keepers(self) -> list[Entry]:
        """Return the entries that kept rows, what the run began on first."""
        start = self.history.find(START)
        known = [start, *self.lineage] if start is not None else self.lineage
        return list({entry.key: entry for entry in known if entry.kept is not None}.values())

    def kept(self) -> dict[str, Kept]:
        """Read the rows that the stages of the state kept, by stage in their order."""
        found = {}
        for entry in self.keepers():
            assert entry.kept is not None
            name = rows_file(entry.kept)
            found[entry.key] = read_kept(self._need(self.run / name, name, entry.kept))
        return found

    @property
    def columns(self) -> list[str]:
        """Return what a matrix scores: the rows given for the start, and those of each stage."""
        start = [START] if START in {entry.key for entry in self.keepers()} else []
        own = [name for name in self.stages if not self._is_rehearsal(name)]
        return list(dict.fromkeys([*start, *own]))

    def _is_rehearsal(self, name: str) -> bool:
        entry = self.history.find(name)
        return entry is not None and entry.is_rehearsal

    @property
    def folder(self) -> Path:
        """Return where the files of the stage lie that was trained last."""
        return stage_folder(self.run, self.stage)

    def config(self) -> RunConfig:
        """Return the config of the stage that was trained last, with what resumes have changed; of
        what a run began on, that of its first stage; of a combination, that of its last one."""
        entry = self.trained
        if entry is None or CONFIG not in entry.files:
            known = [e for e in self.lineage if CONFIG in e.files]
            known = known[-1:] or [e for e in self.history.entries if CONFIG in e.files]
            entry = next(iter(known), None)
        if entry is None:
            raise RunError("a saved chain has no config", self.run, "name a run")
        path = stage_folder(self.run, entry.key) / CONFIG
        tree = read_tree(self._need(path, f"{entry.key}/{CONFIG}", entry.files[CONFIG]))
        refuse_paths(tree, path)
        return _changed(make_config(tree), entry.training.changes)

    def records(self) -> list[Record]:
        """Read ``metrics.jsonl`` of the stage that was trained last; links count within it."""
        path = self.folder / RECORDS
        if self.draft is not None:
            check_records(path, self.draft.records)
        elif self.trained is not None and RECORDS in self.trained.files and path.is_file():
            self._need(path, f"{self.stage}/{RECORDS}", self.trained.files[RECORDS])
        return read_records(path)

    def result(self) -> Record | None:
        """Read ``result.json`` of the stage that was trained last; None of one that has none."""
        entry = self.trained
        if entry is None or RESULT not in entry.files:
            return None
        path = self.folder / RESULT
        return read_result(self._need(path, f"{entry.key}/{RESULT}", entry.files[RESULT]))

    def model_folder(self) -> Path:
        """Return the folder of a model of which every weight was fine-tuned, its files checked."""
        assert self.entry is not None
        for name, digest in _within(self.entry.files, "model").items():
            self._need(self.folder / name, f"{self.stage}/{name}", digest)
        return self.folder / "model"

    def tokenizer(self) -> Path | None:
        """Return the folder of the run's own tokenizer; None where it has the base's."""
        if not self.history.tokenizer:
            return None
        return self._need_folder(TOKENIZER, self.history.tokenizer)

    def verify(self) -> OpenState:
        """Check every file that the state depends on, and return it.

        A damaged checkpoint is left out with a warning: a stage can resume from its last knot.
        """
        for term in {(t.link, t.derived): t for t in (*self.state.terms, *self.sequence)}.values():
            self._check(term)
        for entry in self.keepers():
            assert entry.kept is not None
            name = rows_file(entry.kept)
            self._need(self.run / name, name, entry.kept)
        for entry in self.lineage:
            folder = stage_folder(self.run, entry.key)
            for name, digest in entry.files.items():
                if name != RECORDS or (folder / name).is_file():
                    self._need(folder / name, f"{entry.key}/{name}", digest)
        self.tokenizer()
        if self.draft is None:
            return self
        try:
            return self._with_files_of(self.draft)
        except RunError:
            now = read_draft(self.run, self.stage)
            if now == self.draft:
                raise
            return replace(self, draft=now)._with_files_of(now)  # it goes on, and has removed some

    def _with_files_of(self, draft: Draft) -> OpenState:
        check_records(self.folder / RECORDS, draft.records)
        point = draft.checkpoint
        inside = {} if point is None else _within(draft.files, point.directory)
        for name in draft.files.keys() - inside.keys():
            self._need(self.folder / name, f"{self.stage}/{name}", draft.files[name])
        if point is None:
            return self
        try:
            if not inside:
                raise RunError("its checksums are missing")
            for name, digest in inside.items():
                self._need(self.folder / name, f"{self.stage}/{name}", digest)
        except RunError as error:
            logger.warning(
                "the checkpoint at step %d cannot be used (%s); the run resumes from step %d",
                point.progress.step,
                error,
                draft.progress.step,
            )
            return replace(self, draft=draft.model_copy(update={"checkpoint": None}))
        return self

    def _check(self, term: Term) -> None:
        self._need_folder(link_folder(term.link), self.history.links[term.link].files)
        if term.derived is not None:
            name = derived_file(term.derived)
            self._need(self.run / name, name, term.derived)

    def _need_folder(self, folder: str, sums: Mapping[str, str]) -> Path:
        for name, digest in sums.items():
            self._need(self.run / folder / name, f"{folder}/{name}", digest)
        return self.run / folder

    def _need(self, path: Path, name: str, digest: str) -> Path:
        """Return a path. Raises RunError unless the file there is as the run wrote it, whose
        SHA-256 begins with `digest`."""
        if not path.is_file():
            raise RunError(f"a run must hold {name}", f"none in {self.run}", INCOMPLETE)
        with files.reported(path, "read"):
            found = files.sha256(path)
        if not found.startswith(digest):
            raise RunError(
                f"{name} must be as the run wrote it", f"other bytes in {self.run}", DAMAGED
            )
        return path


# --- what files say ---


def _within(sums: Mapping[str, str], folder: str) -> dict[str, str]:
    return {name: digest for name, digest in sums.items() if name.startswith(f"{folder}/")}


def refuse_paths(tree: Mapping[str, Any], path: Path) -> None:
    """Raise RunError where a saved config would have a file of this machine read."""
    data = tree.get("data")
    template = data.get("chat_template") if isinstance(data, Mapping) else None
    if isinstance(template, str) and not is_resolved(template):
        raise RunError(
            "`data.chat_template` of a run must be a name or a text",
            f"the path {template!r:.60} in {path}",
            "restore the file from a copy, or start over",
        )


def _changed(config: RunConfig, changes: Sequence[Change]) -> RunConfig:
    """Return a config with the keys that resumes have changed."""
    if not changes:
        return config
    tree = config.model_dump(mode="json")
    for change in changes:
        *section, key = change.key.split(".")
        (tree[section[0]] if section else tree)[key] = change.after
    return make_config(tree)


def check_base(
    before: Base,
    run: Path | str,
    *,
    files: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Raise RunError unless the model at hand is the one the run was trained on.

    It is known by its `files` (`models.identity`), or in chains without a run by its `fingerprint`.
    """
    wrong = ""
    if before.files is not None and files is not None:
        if changed := changed_files(before.files, files):
            wrong = f"another {changed[0]}" + " and more" * bool(changed[1:])
    elif fingerprint is not None and fingerprint != before.fingerprint:
        wrong = f"fingerprint {fingerprint[:12]} for {before.fingerprint[:12]}"
    if wrong:
        name = f", {before.model}" if before.model else ""
        raise RunError(
            f"the base model must be the one {run} was trained on{name} (got {wrong}); restore it, "
            "or start over"
        )

"""`OpenState`: a state of a run, for code that loads, scores, shows, exports or continues it.

`runs.addresses` finds it once for a command. It is frozen, and every file is checked before use.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chainlora.chain.checks import check_strengths
from chainlora.chain.link import Link
from chainlora.config.reading import make_config, read_tree
from chainlora.config.schema import RunConfig
from chainlora.config.staging import section_of
from chainlora.config.template_names import refuse_paths
from chainlora.data.kept import Kept, read_kept
from chainlora.errors import RunError
from chainlora.models.finding import from_above
from chainlora.models.identity import has_tokenizer
from chainlora.runs.documents import need_file
from chainlora.runs.draft import Draft, read_draft
from chainlora.runs.history import (
    BASE,
    COMBINED,
    CONFIG,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Entry,
    History,
    LinkFacts,
    State,
    Term,
    link_folder,
    rows_file,
)
from chainlora.runs.links import read_link
from chainlora.runs.paths import stage_folder
from chainlora.runs.records import Record, check_records, read_records, read_result
from chainlora.showing import table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False, eq=False)
class OpenState:
    """A state of a run: the base, or the state of an `entry`, perhaps at other strengths.

    For a stage in training, the state has the links tied so far, `draft` is set, and `history` also
    has the entry that the stage would get now.
    """

    run: Path
    history: History
    state: State
    entry: Entry | None = None
    draft: Draft | None = None

    def __str__(self) -> str:
        return str(self.run) if self.entry is None else f"{self.run}@{self.key}"

    def __repr__(self) -> str:
        known = ", ".join(f"{name}={value:g}" for name, value in self.strengths.items())
        return f"<OpenState: {self}{f', {known}' if known else ''}>"

    def _repr_html_(self) -> str:
        heads = ("link", "stage", "rank", "steps", "strength")
        rows = []
        for number, term in enumerate(self.history.in_order(self.state.terms)):
            facts = self.history.links[term.link]
            rows.append((number, facts.stage, facts.rank, facts.num_steps, term.strength))
        return table(heads, rows, str(self))

    # --- base, links and entries ---

    @property
    def base(self) -> Base:
        """Return the base; a relative name is resolved from the run's folder."""
        base = self.history.base
        return base.model_copy(update={"model": from_above(base.model, self.run)})

    @property
    def key(self) -> str:
        return BASE if self.entry is None else self.entry.key

    @property
    def pairs(self) -> list[tuple[Term, LinkFacts]]:
        """Return each link of the state with its facts."""
        return [(term, self.history.links[term.link]) for term in self.state.terms]

    @property
    def facts(self) -> list[LinkFacts]:
        """Return the facts of each link of the state."""
        return [facts for _, facts in self.pairs]

    @property
    def stages(self) -> list[str]:
        """Return the names of the stages with links in the state, in the order of the history."""
        return list(self.strengths)

    @property
    def strengths(self) -> dict[str, float]:
        return self.history.strengths_of(self.state)

    @property
    def shares(self) -> dict[str, float]:
        """Return the strength of each stage, in order; parts have that of their combination."""
        strengths = self.strengths
        combined = strengths.pop(COMBINED, None)
        entries = [e for e in self.lineage if e.kind in ("stage", "import") and e.state.terms]
        shares = {e.key: strengths.pop(e.key, combined) for e in entries}
        return {key: share for key, share in shares.items() if share is not None} | strengths

    @property
    def lineage(self) -> list[Entry]:
        """Return the entry of the state and its ancestors, in the order of the history."""
        return self.history.lineage(self.key)

    @property
    def trained(self) -> Entry | None:
        """Return the entry of the state, or the one below if that is a mix; None for the base."""
        entry = self.entry
        while entry is not None and entry.kind == "mix":
            entry = self.history.find(entry.parent)
        return entry

    @property
    def stage(self) -> str:
        """Return the key of the `trained` entry, ``base`` for none."""
        return BASE if self.trained is None else self.trained.key

    @property
    def has_run(self) -> bool:
        """Say whether the folder is a run; a saved chain has no config."""
        return any(e.has_config for e in (*self.history.entries, *self.history.unbuilt))

    @property
    def is_before_training(self) -> bool:
        """Say whether it is the base or the origin, which the run's config does not describe."""
        return self.key in (BASE, self.history.origin, START)

    @property
    def is_combined(self) -> bool:
        """Say whether the `trained` entry is a combination."""
        return self.trained is not None and self.trained.kind == "combine"

    @property
    def is_as_trained(self) -> bool:
        """Say whether recorded scores hold for this state: it is no mix, and nothing was pruned."""
        trained = self.trained
        return trained is None or (not trained.pruned and trained.state.digest == self.state.digest)

    @property
    def parent(self) -> OpenState:
        """Return the state that the `trained` entry began on."""
        return self.at(BASE if self.trained is None else self.trained.parent)

    @property
    def with_rows(self) -> OpenState:
        """Return the state of the last stage with rows of its own."""
        keys = [e.key for e in self.lineage if e.has_config]
        return self.at(keys[-1]) if keys and self.draft is None else self

    @property
    def first(self) -> int:
        """Return the number of links below the links of the `trained` entry."""
        return sum(facts.stage != self.stage for facts in self.facts)

    @property
    def sequence(self) -> list[Term]:
        """Return the links in the order of tying, with those after the best point."""
        trained = self.trained
        if trained is None or not trained.tied:
            return self.history.in_order(self.state.terms)
        known = {term.link: term for term in self.state.terms}
        strength = self.strengths.get(trained.key, 1.0)
        below = [term for term, facts in self.pairs if facts.stage != trained.key]
        tied = [known.get(link, Term(link=link, strength=strength)) for link in trained.tied]
        return [*self.history.in_order(below), *tied]

    def terms(self, num_links: int | None = None) -> Sequence[Term]:
        """Return the links of the state, or the first `num_links` of `sequence`.

        Their order is that in which they are summed. Raises RunError for more links than exist.
        """
        terms = self.state.terms
        if num_links is None:
            return terms
        first = self.sequence
        if not 0 <= num_links <= len(first):
            rule = f"the number of links must be 0 to {len(first)} for this run"
            raise RunError(f"{rule} (got {num_links})")
        places = {term.link: place for place, term in enumerate(terms)}
        return sorted(first[:num_links], key=lambda term: places.get(term.link, len(terms)))

    # --- other states ---

    def at(self, key: str) -> OpenState:
        """Return the state of another entry of the run, by its key, or of the base."""
        history = self.history
        return OpenState(self.run, history, history.state_of(key), history.find(key))

    def with_strengths(self, strengths: Mapping[str, float]) -> OpenState:
        """Return the state with the links of these stages at other strengths.

        Raises RunError for unknown stages, and for parts of a combination.
        """
        known = self.stages
        for name in strengths:
            if name in self.shares and name not in known:
                rule = "a stage in a combination has no strength of its own"
                others = [key for key in self.history.parts(self.key) if key != name]
                rest = f"chainlora combine {shlex.join([str(self.run), *others])} makes the rest"
                if len(others) == 1:
                    rest = f"{self.run}@{others[0]} is the rest"
                remedy = f"{self.run}@{name} is this stage alone, {rest}"
                raise RunError(rule, f"{name!r} for {self.run}", remedy)
            if name not in known:
                rule = f"a stage must be one of {', '.join(known)}"
                raise RunError(
                    rule if known else "this state has no links, and so no stages",
                    f"{name!r} for {self.run}",
                    "name one" if known else "name another state",
                )
        terms = tuple(
            term.model_copy(update={"strength": float(strengths.get(facts.stage, term.strength))})
            for term, facts in self.pairs
        )
        return replace(self, state=self.state.model_copy(update={"terms": terms}))

    def need_one_strength(self, names: Sequence[str]) -> None:
        """Raise RunError for a stage whose links have different strengths.

        Only a chain saved by Python code can have one. Strength 1 would not restore such a stage.
        """
        for name in names:
            strengths = {term.strength for term, facts in self.pairs if facts.stage == name}
            if len(strengths) > 1:
                shown = ", ".join(f"{strength:g}" for strength in sorted(strengths))
                raise RunError(
                    "Cannot weigh a stage whose links have different strengths",
                    f"{shown} in {name!r} of {self.run}",
                    "set them by Chain.set_strengths, and save the chain",
                )

    # --- files, read and checked ---

    def links(self, num_links: int | None = None) -> list[Link]:
        """Read the links of the state, or its first `num_links` tied links."""
        links = self.read(self.terms(num_links))
        check_strengths(links)
        return links

    def read(self, terms: Sequence[Term]) -> list[Link]:
        """Read and check links; `Link.index` is the place in `terms`."""
        folders = [self._link_folder(term) for term in terms]  # all are checked before one is read
        return [
            read_link(folder, self.history.links[term.link], place, term.strength)
            for place, (folder, term) in enumerate(zip(folders, terms, strict=True))
        ]

    def outlines(self) -> list[Link]:
        """Return the links of the state without tensors."""
        pairs = enumerate(self.pairs)
        return [
            Link(place, facts.link_config(), {}, strength=term.strength)
            for place, (term, facts) in pairs
        ]

    @property
    def keepers(self) -> dict[str, str]:
        """Return the SHA-256 of the kept rows of the state's entries."""
        return self.history.keepers([self.key])

    def kept(self, keys: Sequence[str] = ()) -> dict[str, Kept]:
        """Read the kept rows of the state's entries, in the order of the history.

        `keys` name other entries of the run, whose ancestors are read too.
        """
        keepers = self.history.keepers(keys or [self.key])
        return {key: read_kept(self._rows(digest)) for key, digest in keepers.items()}

    @property
    def columns(self) -> dict[str, str]:
        """Return the columns of the matrix of scores: the entry with the rows, by column name.

        Rows of the start come first, in a column named `base` unless they belong to an imported
        adapter; then each stage.
        """
        start = [START] if START in self.keepers else []
        is_base = not self.history.state_of(START).terms
        return {BASE if key == START and is_base else key: key for key in (*start, *self.shares)}

    @property
    def folder(self) -> Path:
        """Return the folder of the `trained` entry."""
        return stage_folder(self.run, self.stage)

    @property
    def configured(self) -> Entry:
        """Return the latest entry of the lineage with a config; for an origin, the run's first.

        Raises RunError for a saved chain.
        """
        others = [*reversed(self.lineage), *self.history.entries]
        entry = next((e for e in others if e.has_config), None)
        if entry is None and self.has_run:
            rule, remedy = "a run must have begun a stage", "repeat the command that declared it"
            raise RunError(rule, f"none in {self.run}", remedy)
        if entry is None:
            raise RunError("a saved chain has no config", self.run, "name a run")
        return entry

    def config(self) -> RunConfig:
        """Return the config of the `configured` entry, with changes by resumes."""
        entry = self.configured
        path = self._need_own(entry, CONFIG)
        tree = read_tree(path)
        for change in entry.training.changes:
            section, _, key = change.key.rpartition(".")
            changed = {key: change.after}
            tree |= {section: section_of(tree, section) | changed} if section else changed
        refuse_paths(tree, path)  # after the changes, which may come from somebody else too
        return make_config(tree)

    def records(self) -> list[Record]:
        """Read ``metrics.jsonl`` of the `trained` entry; links count from its first one."""
        path = self.folder / RECORDS
        if self.draft is not None:
            check_records(path, self.draft.records)
        elif self.trained is not None and RECORDS in self.trained.files and path.is_file():
            self._need_own(self.trained, RECORDS)
        return read_records(path)

    def result(self) -> Record | None:
        """Read ``result.json`` of the `trained` entry, None without one."""
        entry = self.trained
        if entry is None or RESULT not in entry.files:
            return None
        return read_result(self._need_own(entry, RESULT))

    def tokenizer(self) -> Path | None:
        """Return the folder of the run's own tokenizer, None if it uses the base's.

        That of a chain in a trainer's save is the folder around it, if the trainer saved one there.
        """
        if self.history.tokenizer:
            return self._need_folder(TOKENIZER, self.history.tokenizer)
        around = self.run.absolute().parent
        is_inside = not self.has_run and (around / "adapter_config.json").is_file()
        return around if is_inside and has_tokenizer(around) else None

    def verify(self) -> OpenState:
        """Check every file that the state depends on, and return the state.

        A damaged checkpoint is left out with a warning, because a stage can resume from its last
        knot.
        """
        for term in {t.link: t for t in (*self.state.terms, *self.sequence)}.values():
            self._link_folder(term)
        for digest in self.keepers.values():
            self._rows(digest)
        for entry in self.lineage:
            for name in entry.files:
                if name != RECORDS or (stage_folder(self.run, entry.key) / name).is_file():
                    self._need_own(entry, name)
        self.tokenizer()
        if self.draft is None:
            return self
        try:
            return self._with_files_of(self.draft)
        except RunError:
            # another process trains the stage, and has replaced some files meanwhile
            current = read_draft(self.run, self.stage)
            if current == self.draft:
                raise
            return replace(self, draft=current)._with_files_of(current)

    def _with_files_of(self, draft: Draft) -> OpenState:
        """Check the files of a stage in training; leave a damaged checkpoint out."""
        check_records(self.folder / RECORDS, draft.records)
        point, folder = draft.checkpoint, f"stages/{self.stage}"
        inside = {
            n: d for n, d in draft.files.items() if point and n.startswith(f"{point.directory}/")
        }
        self._need_folder(folder, {n: d for n, d in draft.files.items() if n not in inside})
        if point is None:
            return self
        try:
            if not inside:
                raise RunError("its checksums are missing")
            self._need_folder(folder, inside)
        except RunError as error:
            logger.warning(
                "the checkpoint at step %d cannot be used (%s); the run resumes from step %d",
                point.progress.step,
                error,
                draft.progress.step,
            )
            return replace(self, draft=draft.model_copy(update={"checkpoint": None}))
        return self

    def _link_folder(self, term: Term) -> Path:
        return self._need_folder(link_folder(term.link), self.history.links[term.link].files)

    def _rows(self, digest: str) -> Path:
        return need_file(self.run, rows_file(digest), digest)

    def _need_own(self, entry: Entry, name: str) -> Path:
        return need_file(self.run, f"stages/{entry.key}/{name}", entry.files[name])

    def _need_folder(self, folder: str, sums: Mapping[str, str]) -> Path:
        for name, digest in sums.items():
            need_file(self.run, f"{folder}/{name}", digest)
        return self.run / folder

"""`OpenState`: a state of a run, for code that loads, scores, shows, exports or continues it.

`runs.addresses` finds it once for a command. It is frozen, and every file is checked before use.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chainlora.chain.link import Link
from chainlora.config.reading import make_config, read_tree
from chainlora.config.schema import RunConfig
from chainlora.config.template_names import refuse_paths
from chainlora.data.kept import Kept, read_kept
from chainlora.errors import RunError
from chainlora.models.finding import from_above
from chainlora.models.identity import has_tokenizer
from chainlora.runs.documents import need_file
from chainlora.runs.draft import Draft, read_draft
from chainlora.runs.entries import (
    BASE,
    CONFIG,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Entry,
    LinkFacts,
    State,
    link_folder,
    rows_file,
)
from chainlora.runs.history import History
from chainlora.runs.links import read_link
from chainlora.runs.paths import stage_folder
from chainlora.runs.records import Record, check_records, read_records, read_result
from chainlora.showing import table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False, eq=False)
class OpenState:
    """A state of a run: the base, or the state of an `entry`.

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
        return f"<OpenState: {', '.join([str(self), *self.stages])}>"

    def _repr_html_(self) -> str:
        links = [self.history.links[link] for link in self.history.in_order(self.state.links)]
        rows = [(n, facts.stage, facts.rank, facts.num_steps) for n, facts in enumerate(links)]
        return table(("link", "stage", "rank", "steps"), rows, str(self))

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
    def facts(self) -> list[LinkFacts]:
        """Return the facts of each link of the state."""
        return [self.history.links[link] for link in self.state.links]

    @property
    def stages(self) -> list[str]:
        """Return the stages with links in the state, those of a combination too."""
        return self.history.stages_of(self.key)

    @property
    def lineage(self) -> list[Entry]:
        """Return the entry of the state and its ancestors, in the order of the history."""
        return self.history.lineage(self.key)

    @property
    def has_run(self) -> bool:
        """Say whether the folder is a run; a saved chain has no config."""
        stages = self.history.stages.values()
        return any(e.has_config for e in self.history.entries) or any(s.config for s in stages)

    @property
    def is_before_training(self) -> bool:
        """Say whether it is the base, which no config of a stage describes."""
        return self.key in (BASE, START)

    @property
    def is_combined(self) -> bool:
        """Say whether the entry is a combination."""
        return self.entry is not None and self.entry.kind == "combine"

    @property
    def parent(self) -> OpenState:
        """Return the state that the entry began on."""
        return self.at(BASE if self.entry is None else self.entry.parent)

    @property
    def with_rows(self) -> OpenState:
        """Return the state of the last stage with rows of its own."""
        keys = [e.key for e in self.lineage if e.has_config]
        return self.at(keys[-1]) if keys and self.draft is None else self

    @property
    def first(self) -> int:
        """Return the number of links below the links of the entry."""
        return sum(facts.stage != self.key for facts in self.facts)

    @property
    def sequence(self) -> list[str]:
        """Return the links in the order of tying, with those after the best point."""
        links = self.state.links
        if self.entry is None or not self.entry.tied:
            return self.history.in_order(links)
        below = [link for link in links if self.history.links[link].stage != self.key]
        return [*self.history.in_order(below), *self.entry.tied]

    def summed(self, num_links: int | None = None) -> Sequence[str]:
        """Return the links of the state, or the first `num_links` of `sequence`.

        Their order is that in which they are summed. Raises RunError for more links than exist.
        """
        links = self.state.links
        if num_links is None:
            return links
        first = self.sequence
        if not 0 <= num_links <= len(first):
            rule = f"the number of links must be 0 to {len(first)} for this run"
            raise RunError(f"{rule} (got {num_links})")
        places = {link: place for place, link in enumerate(links)}
        return sorted(first[:num_links], key=lambda link: places.get(link, len(links)))

    # --- other states ---

    def at(self, key: str) -> OpenState:
        """Return the state of another entry of the run, by its key, or of the base."""
        history = self.history
        return OpenState(self.run, history, history.state_of(key), history.find(key))

    # --- files, read and checked ---

    def links(self, num_links: int | None = None) -> list[Link]:
        """Read the links of the state, or its first `num_links` tied links."""
        return self.read(self.summed(num_links))

    def read(self, links: Sequence[str]) -> list[Link]:
        """Read and check links; `Link.index` is the place in `links`."""
        folders = [self._link_folder(link) for link in links]  # all are checked before one is read
        return [
            read_link(folder, self.history.links[link], place)
            for place, (folder, link) in enumerate(zip(folders, links, strict=True))
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

        Rows of the start come first, in a column named `base`; then each stage.
        """
        start = {BASE: START} if START in self.keepers else {}
        return start | {key: key for key in self.stages}

    @property
    def folder(self) -> Path:
        """Return the folder of the entry."""
        return stage_folder(self.run, self.history.folder_of(self.key))

    @property
    def configured(self) -> Entry:
        """Return the latest entry of the lineage with a config; for the base, the run's first.

        Raises RunError for a saved chain.
        """
        others = [*reversed(self.lineage), *self.history.entries]
        entry = next((e for e in others if e.has_config), None)
        if entry is None:
            remedy = "chainlora train RUN trains one" if self.has_run else "a saved chain has none"
            raise RunError("a run must have ended a stage", f"none in {self.run}", remedy)
        return entry

    def config(self) -> RunConfig:
        """Return the config of the `configured` entry."""
        path = self._need_own(self.configured, CONFIG)
        tree = read_tree(path)
        refuse_paths(tree, path)
        return make_config(tree)

    def records(self) -> list[Record]:
        """Read ``metrics.jsonl`` of the entry; links count from its first one."""
        path = self.folder / RECORDS
        if self.draft is not None:
            check_records(path, self.draft.records)
        elif self.entry is not None and RECORDS in self.entry.files:
            self._need_own(self.entry, RECORDS)
        return read_records(path)

    def result(self) -> Record | None:
        """Read ``result.json`` of the entry, None without one."""
        entry = self.entry
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
        for link in dict.fromkeys((*self.state.links, *self.sequence)):
            self._link_folder(link)
        for digest in self.keepers.values():
            self._rows(digest)
        for entry in self.lineage:
            for name in entry.files:
                self._need_own(entry, name)
        self.tokenizer()
        if self.draft is None:
            return self
        try:
            return self._with_files_of(self.draft)
        except RunError:
            # another process trains the stage, and has replaced some files meanwhile
            current = read_draft(self.folder)
            if current == self.draft:
                raise
            return replace(self, draft=current)._with_files_of(current)

    def _with_files_of(self, draft: Draft) -> OpenState:
        """Check the files of a stage in training; leave a damaged checkpoint out."""
        check_records(self.folder / RECORDS, draft.records)
        point, folder = draft.checkpoint, f"stages/{self.folder.name}"
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

    def _link_folder(self, link: str) -> Path:
        return self._need_folder(link_folder(link), self.history.links[link].files)

    def _rows(self, digest: str) -> Path:
        return need_file(self.run, rows_file(digest), digest)

    def _need_own(self, entry: Entry, name: str) -> Path:
        return need_file(self.run, f"stages/{entry.place}/{name}", entry.files[name])

    def _need_folder(self, folder: str, sums: Mapping[str, str]) -> Path:
        for name, digest in sums.items():
            need_file(self.run, f"{folder}/{name}", digest)
        return self.run / folder

"""One stage on disk while it is trained: what is written, in which order.

    RUN/stages/NAME/config.yaml              resolved config
    RUN/stages/NAME/stage.json               where to resume, hashes of all that counts
    RUN/stages/NAME/moments/000.safetensors  optimizer state kept over the last knot
    RUN/stages/NAME/reference.safetensors    scores of pairs before the first step (train.loss: dpo)
    RUN/stages/NAME/best/00000120/           the best point, when it lies inside a link
    RUN/stages/NAME/checkpoints/00000120/    the live link and its optimizer
    RUN/stages/NAME/metrics.jsonl            one JSON object a line
    RUN/stages/NAME/result.json              written last
    RUN/stages/NAME/.lock                    held by the process that trains

The history declares the stage before it begins. Nothing that ``stage.json`` names is ever
overwritten. What a new point needs is written under names of its own and flushed; then
``stage.json`` is replaced; then what it does not name is deleted. So at any instant the stage can
resume. Links and kept rows go into the run at once, where nothing looks at them until the history
names them: `end` gives the entry its state, as the last act of a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.chain.adapters import load_adapter
from chainlora.chain.link import Link
from chainlora.config.reading import dump_config
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.data.kept import Kept
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.runs.addresses import state_of_draft
from chainlora.runs.beginning import save_rows
from chainlora.runs.claim import Claim
from chainlora.runs.costs import versions
from chainlora.runs.documents import write_part
from chainlora.runs.draft import DRAFT, PASSING, REFERENCE, Checkpoint, Draft, Progress
from chainlora.runs.history import (
    CONFIG,
    RECORDS,
    RESULT,
    Base,
    History,
    LinkFacts,
    Term,
    Unbuilt,
)
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.links import save_link, write_adapter_of
from chainlora.runs.opening import check_base
from chainlora.runs.paths import stage_folder
from chainlora.runs.records import RecordLog, resumed_log
from chainlora.runs.resuming import check_resumed, compare, source_digests
from chainlora.runs.state import OpenState

# Of a checkpoint: the live link (`Chain.live_state`), and its optimizer.
_LINK, _OPTIMIZER = "link.safetensors", "optimizer.safetensors"


class Work:
    """A stage that this process trains, or with `writes` false sees another process write.

    `open` comes before anything is loaded, `begin` once base and rows are known, `close` at the
    end.
    """

    def __init__(self, run: str | Path, stage: str, *, writes: bool = True) -> None:
        self.run, self.stage, self.writes = Path(run), stage, writes
        self.folder = stage_folder(self.run, stage)
        self._claim = Claim(self.run, stage)
        self._draft: Draft | None = None
        self._is_new = False  # begun by this process
        self._hashes: dict[str, str] = {}  # of files that this process has written or verified
        self._links: dict[str, LinkFacts] = {}  # that this process has written
        self._tied: list[str] = []
        self._log = RecordLog(self.folder / RECORDS)
        self.base: Base  # that the stage is tuned on, once it began

    @property
    def draft(self) -> Draft:
        """The point that this process has read or written last. There is one once it began."""
        assert self._draft is not None
        return self._draft

    def opened(self) -> OpenState:
        """Return what has been tied so far."""
        return state_of_draft(self.run, self.stage)

    def begun(self) -> OpenState | None:
        """Return the stage where it was begun and has not ended."""
        return self.opened() if self._claim.is_begun else None

    # --- opening and closing ---

    def open(self, config: RunConfig, change: Collection[str] = ()) -> None:
        """Lock the stage, and check it where it is to be resumed, before anything is loaded.

        `change` names config keys that a resume may change.
        """
        if not self.writes:
            return
        self._claim.take()
        if read_history(self.run).find_unbuilt(self.stage) is None:
            rule = "Another process has changed this run"
            raise RunError(rule, f"{self.stage} of {self.run}", "give the same command again")
        begun = self.begun()
        if begun is None:
            return
        begun = begun.verify()
        assert begun.draft is not None
        changes = begun.draft.training.changes + tuple(compare(begun, config, change))
        self._take(begun.draft.with_training(changes=changes), begun.history.base)

    def _take(self, draft: Draft, base: Base) -> None:
        self._draft, self.base = draft, base
        self._tied, self._links = list(draft.tied), dict(draft.links)
        self._hashes = dict(draft.files)

    def begin(
        self, config: RunConfig, base: Base, *, rows: str, keep: Callable[[], Kept] | None
    ) -> Progress:
        """Begin the stage, or find the point to resume from.

        Args:
            rows: digest of the rows (`Splits.digest`).
            keep: makes the rows that a stage keeps which begins. None keeps none.

        Raises RunError for other rows than those that it was begun with.
        """
        if not self.writes:
            return self._follow()
        if self._draft is not None:
            return self._resume(self._draft, base, rows)
        declared = self._declared(read_history(self.run))
        if source_digests(config) != declared.training.sources:
            rule = "files of rows must stay as they are until their stage begins"
            remedy = f"give its command again, or chainlora prune {self.run} {self.stage}"
            raise RunError(rule, f"others for {self.stage}", remedy)
        self._is_new = True
        self._claim.clear()
        self.base = base
        files.write_text(self.folder / CONFIG, dump_config(config))
        self._hash(CONFIG)
        kept = None if keep is None else save_rows(self.run, keep(), self.stage)
        training = declared.training.model_copy(update={"rows": rows})
        self._draft = Draft(training=training, kept=kept, records=self._log.flushed())
        self._replace()
        return deepcopy(self.draft.progress)

    def _declared(self, history: History) -> Unbuilt:
        found = history.find_unbuilt(self.stage)
        if found is None:
            rule = "a run was changed meanwhile"
            raise RunError(rule, f"{self.run} without {self.stage}", "give the same command again")
        return found

    def tidy(self) -> None:
        """Remove what the training of a stage needed that has ended, where a kill left it."""
        if self.writes:
            self._claim.tidy()

    def close(self, *, undo: bool = False) -> None:
        """Let other processes use the folder.

        With `undo`, the files of a stage that this process began, and that has no link and no
        checkpoint yet, are removed: what was refused late must not be in the way of the corrected
        config.
        """
        if undo and self._is_new and not (self._draft is not None and self._draft.has_learned):
            self._claim.undo()
        self._claim.release()

    def _follow(self) -> Progress:
        """Read where the first process begins or resumes; call it after that one's `begin`."""
        found = self.opened().verify()
        assert found.draft is not None
        self._take(found.draft, found.history.base)
        return deepcopy(self.draft.position)

    def _resume(self, draft: Draft, base: Base, rows: str) -> Progress:
        check_resumed(draft.training, rows)
        self.base = base
        draft = self._draft = draft.with_training(rows=rows)
        self._claim.remove_scratch()
        progress = deepcopy(draft.position)
        self._log = resumed_log(self._log.path, draft.records, progress.num_records)
        progress.num_records = self._log.count
        self._replace()  # before records are cut that ``stage.json`` may know
        self._log.cut()
        return progress

    # --- what a resume reads ---

    def check_base_files(self, found: Mapping[str, str]) -> None:
        """Refuse to resume on another base than the run's, before it is loaded."""
        if self._draft is not None:
            check_base(self.base, self.run, files=found)

    def load_checkpoint(
        self, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the live link's and the optimizer's state at this progress, None at a knot."""
        found = self.draft.checkpoint
        if found is None or not self.draft.has_checkpoint(progress):
            return None
        folder = self.folder / found.directory
        return load_file(folder / _LINK), load_file(folder / _OPTIMIZER)

    def load_moments(self) -> dict[str, Tensor]:
        """Read the optimizer state that the last link's knot kept."""
        assert self.draft.moments is not None
        return load_file(self.folder / self.draft.moments)

    def load_reference(self) -> dict[str, Tensor] | None:
        """Read what the pairs of each split scored before the first step; None where it is due."""
        return load_file(self.folder / REFERENCE) if REFERENCE in self.draft.files else None

    def load_links(self) -> list[Link]:
        return self.opened().read([Term(link=digest) for digest in self.draft.tied])

    def load_best(self, config: LinkConfig, directory: str) -> Link:
        return Link(0, config, load_adapter(self.folder / directory))

    # --- writing a point: its files, and then ``stage.json``, which names them ---

    def save_point(self, progress: Progress, numbers: Numbers) -> None:
        """Write ``stage.json`` at a knot: last, after all that it names."""
        if not self.writes:
            return
        moments = f"moments/{progress.link - 1:03d}.safetensors"
        self._draft = self.draft.with_training(numbers=numbers)
        self._replace(
            tied=tuple(self._tied),
            moments=moments if moments in self._hashes else None,
            checkpoint=None,
            progress=deepcopy(progress),
        )

    def save_link(self, link: Link) -> None:
        if self.writes:
            self._tied.append(self._save_link(link))

    def _save_link(self, link: Link) -> str:
        digest, self._links[digest] = save_link(self.run, link, self.base, self.stage)
        return digest

    def save_best(self, link: Link, progress: Progress) -> None:
        """Write the best point, a part of a link, and note in the progress where it lies."""
        if not self.writes:
            return
        assert progress.best is not None
        directory = f"best/{progress.best['step']:08d}"
        with files.replaced_folder(self.folder / directory) as scratch:
            write_adapter_of(scratch, link, self.base)
        self._hash_folder(directory)
        progress.best["directory"] = directory

    def save_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the optimizer state of the link that is being tied over its knot."""
        if self.writes:
            self._write_tensors(f"moments/{len(self._tied) - 1:03d}.safetensors", tensors)

    def save_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the pairs of each split score before the first step."""
        if self.writes:
            self._write_tensors(REFERENCE, tensors)
            self._replace()

    def save_checkpoint(
        self, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], progress: Progress
    ) -> None:
        """Write the live link's and the optimizer's state, and name them as the point to resume."""
        if not self.writes or self.draft.has_checkpoint(progress):
            return
        directory = f"checkpoints/{progress.step:08d}"
        with files.replaced_folder(self.folder / directory) as scratch:
            files.save_tensors(scratch / _LINK, state)
            files.save_tensors(scratch / _OPTIMIZER, optimizer)
        self._hash_folder(directory)
        self._replace(checkpoint=Checkpoint(directory=directory, progress=deepcopy(progress)))

    def record(self, values: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.writes:
            self._log.append(values)
            progress.num_records += 1

    def end(self, result: Mapping[str, Any], best: tuple[int, Link | None] | None) -> None:
        """Write the result, then give the entry of the stage its state.

        `best` are the links of the stage up to its best point, where the state ends there: whole
        ones, and a part of the next. A kill before the history is replaced leaves the stage as its
        last point did: the resume scores again, and ends it.
        """
        if not self.writes:
            return
        own = self._tied
        if best is not None:
            num_links, partial = best
            own = self._tied[:num_links]
            if partial is not None:
                own = [*own, self._save_link(partial)]
        files.write_json(self.folder / RESULT, result)
        self._hash(RESULT)
        records = self._log.flushed()
        sums = {n: digest for n, digest in self._hashes.items() if not _is_in(n, PASSING)}
        sums |= {RECORDS: records.sha256} if records.count else {}
        draft = self.draft.model_copy(update={"tied": tuple(self._tied)})

        def change(history: History) -> History:
            known = history.model_copy(update={"base": self.base})
            declared = self._declared(known)
            entry = draft.entry(declared, known, own, files=sums)
            return known.built(entry, self._links)

        update_history(self.run, change)
        self._claim.remove_passing()

    def _replace(self, **changed: Any) -> None:
        """Replace ``stage.json`` by one that has `changed`, and delete what it does not name."""
        draft = self.draft.model_copy(update=changed)
        update = {
            "links": dict(self._links),
            "records": self._log.flushed(),
            "files": {name: sha for name, sha in self._hashes.items() if _is_in(name, draft.named)},
        }
        draft = draft.model_copy(update=update).with_training(versions=versions())
        write_part(self.folder / DRAFT, draft)
        self._draft = draft
        self._claim.remove_all_but(draft.named)

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        files.make_folder((self.folder / name).parent)
        files.write_tensors(self.folder / name, tensors)
        self._hash(name)

    def _hash(self, name: str) -> None:
        self._hashes[name] = files.sha256(self.folder / name)

    def _hash_folder(self, directory: str) -> None:
        found = files.checksums(self.folder / directory)
        self._hashes |= {f"{directory}/{name}": digest for name, digest in found.items()}


def _is_in(name: str, named: Collection[str]) -> bool:
    """Say whether a file, or a folder that it lies in, is among those named."""
    return name in named or any(str(parent) in named for parent in PurePosixPath(name).parents)

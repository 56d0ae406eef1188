"""A stage on disk while it is trained: its files, and the order in which they are written.

    RUN/stages/NAME/config.yaml              resolved config
    RUN/stages/NAME/stage.json               where to resume, and hashes of the files for it
    RUN/stages/NAME/moments/000.safetensors  optimizer state kept over the last knot
    RUN/stages/NAME/reference.safetensors    scores of pairs before the first step (train.loss: dpo)
    RUN/stages/NAME/best/00000120/           the best point, when it lies inside a link
    RUN/stages/NAME/checkpoints/00000120/    the live link and its optimizer
    RUN/stages/NAME/metrics.jsonl            one JSON object a line
    RUN/stages/NAME/result.json              written last

The plan has the stage before it begins. A file that ``stage.json`` names is never
overwritten. A new point is saved in three steps:
1. write its files under new names, and flush them;
2. replace ``stage.json``;
3. delete the files that it does not name.
So the stage can resume after a kill at any moment. Links and kept rows are written into the run at
once; nothing reads them before the history names them. Last of all, `end` writes the entry of the
stage into the history.
"""

from __future__ import annotations

import json
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
from chainlora.knots.numbers import Numbers
from chainlora.runs.addresses import state_of_draft
from chainlora.runs.beginning import save_rows
from chainlora.runs.costs import versions
from chainlora.runs.documents import write_part
from chainlora.runs.draft import DRAFT, PASSING, REFERENCE, Checkpoint, Draft, Progress
from chainlora.runs.entries import CONFIG, RECORDS, RESULT, Base, Due, LinkFacts
from chainlora.runs.history_file import folder_in, read_history, update_history
from chainlora.runs.links import save_link, write_adapter_of
from chainlora.runs.locks import Scratch
from chainlora.runs.opening import check_base
from chainlora.runs.records import RecordLog, check_records
from chainlora.runs.resuming import check_resumed, need_pinned, source_digests
from chainlora.runs.state import OpenState

# The files of a checkpoint: the live link (`Chain.live_state`), and its optimizer.
_LINK, _OPTIMIZER = "link.safetensors", "optimizer.safetensors"


class Work:
    """A stage in training, which this process writes, or only reads if `writes` is false.

    Call `open` before anything is loaded, `begin` when base and rows are known, `close` at the end.
    """

    def __init__(self, run: str | Path, stage: str, *, writes: bool = True) -> None:
        self.run, self.stage, self.writes = Path(run), stage, writes
        self.folder = folder_in(self.run, stage)
        self._scratch = Scratch(self.run, self.folder)
        self._draft: Draft | None = None
        self._is_new = False  # begun by this process
        self._hashes: dict[str, str] = {}  # of files that this process has written or verified
        self._links: dict[str, LinkFacts] = {}  # of links that this process has written
        self._tied: list[str] = []
        self._log = RecordLog(self.folder / RECORDS)
        self.base: Base  # set when the stage begins

    @property
    def draft(self) -> Draft:
        """Return the point that this process has read or written last, after `begin`."""
        assert self._draft is not None
        return self._draft

    def opened(self) -> OpenState:
        """Return the state with the links tied so far."""
        return state_of_draft(self.run, self.stage)

    def begun(self) -> OpenState | None:
        """Return the state of the stage, None if it was not begun."""
        return self.opened() if (self.folder / DRAFT).is_file() else None

    # --- opening and closing ---

    def open(self, base_files: Mapping[str, str]) -> None:
        """If the stage was begun, check its files. Raises RunError for damage and another base."""
        if self.writes and (begun := self.begun()) is not None:
            self._take(begun)
            check_base(self.base, self.run, files=base_files)

    def _take(self, state: OpenState) -> None:
        """Check the files of a state and continue from its point."""
        state = state.verify()
        assert state.draft is not None
        self._draft, self.base = state.draft, state.history.base
        self._tied, self._links = list(state.draft.tied), dict(state.draft.links)
        self._hashes = dict(state.draft.files)

    def begin(
        self, config: RunConfig, base: Base, *, rows: str, keep: Callable[[], Kept] | None
    ) -> Progress:
        """Begin the stage, or find the point to resume from. Return its progress.

        `rows` is the digest of the rows (`Splits.digest`). `keep` returns the rows that a new stage
        keeps; None keeps no rows. Raises RunError if rows changed after the stage was declared.
        """
        if not self.writes:  # continue from the point that the first process has written
            self._take(self.opened())
            return deepcopy(self.draft.position)
        if self._draft is not None:
            return self._resume(self._draft, base, rows)
        due = self.due()
        need_pinned(self.run, self.stage, due.stage.sources, source_digests(config))
        self._is_new = True
        self._scratch.clear()
        self.base = base
        files.write_text(self.folder / CONFIG, dump_config(config))
        self._hash(CONFIG)
        kept = None if keep is None else save_rows(self.run, keep(), self.stage)
        training = due.training.model_copy(update={"rows": rows})
        known: Any = {"digest": due.digest, "training": training, "kept": kept}
        self._draft = Draft(**known, records=self._log.flushed())
        self._replace()
        return deepcopy(self.draft.progress)

    def due(self) -> Due:
        """Return the stage with what is known of its entry."""
        due = read_history(self.run).due_stage(self.stage)
        assert due is not None
        return due

    def close(self, *, undo: bool = False) -> None:
        """End the work: with `undo`, remove a stage that this process began without a point.

        Otherwise a stage that was refused late would be in the way of the corrected config.
        """
        has_learned = self._draft is not None and (self._draft.tied or self._draft.checkpoint)
        if undo and self._is_new and not has_learned:
            self._scratch.undo()

    def _resume(self, draft: Draft, base: Base, rows: str) -> Progress:
        """Return the progress to resume from; cut the records that came after it."""
        check_resumed(draft.training, rows)
        self.base = base
        draft = self._draft = draft.with_training(rows=rows)
        self._scratch.remove_scratch()
        progress = deepcopy(draft.position)
        lines = check_records(self._log.path, draft.records)
        self._log = RecordLog(self._log.path, lines[: progress.num_records])
        progress.num_records = self._log.count
        # Replace ``stage.json`` first: the old one may count the records that are cut.
        self._replace()
        self._log.cut()
        return progress

    # --- files that a resume reads ---

    def load_checkpoint(
        self, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the state of the live link and of the optimizer; None if the progress is a knot."""
        checkpoint = self.draft.checkpoint
        if checkpoint is None or not self.draft.has_checkpoint(progress):
            return None
        folder = self.folder / checkpoint.directory
        return load_file(folder / _LINK), load_file(folder / _OPTIMIZER)

    def load_moments(self) -> dict[str, Tensor]:
        """Read the optimizer state at the end of the last link."""
        assert self.draft.moments is not None
        return load_file(self.folder / self.draft.moments)

    def load_reference(self) -> dict[str, Tensor] | None:
        """Read the scores of each split's pairs before the first step, None if not computed yet."""
        return load_file(self.folder / REFERENCE) if REFERENCE in self.draft.files else None

    def load_links(self) -> list[Link]:
        return self.opened().read(self.draft.tied)

    def load_best(self, config: LinkConfig, directory: str) -> Link:
        return Link(0, config, load_adapter(self.folder / directory))

    # --- writing a point: its files first, then ``stage.json``, which names them ---

    def save_point(self, progress: Progress, numbers: Numbers) -> None:
        """Write ``stage.json`` at a knot, after all files that it names."""
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
        """Write a tied link into the run."""
        if self.writes:
            self._tied.append(self._save_link(link))

    def _save_link(self, link: Link) -> str:
        digest, self._links[digest] = save_link(self.run, link, self.base, self.stage)
        return digest

    def save_best(self, link: Link, progress: Progress) -> None:
        """Write the partial link of the best point, and note its folder in the progress."""
        if not self.writes:
            return
        assert progress.best is not None
        directory = f"best/{progress.best['step']:08d}"
        with files.replaced_folder(self.folder / directory) as scratch:
            write_adapter_of(scratch, link, self.base)
        self._hash_folder(directory)
        progress.best["directory"] = directory

    def save_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the optimizer state of the link that is being tied, for the next optimizer."""
        if self.writes:
            self._write_tensors(f"moments/{len(self._tied) - 1:03d}.safetensors", tensors)

    def save_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the scores of each split's pairs before the first step."""
        if self.writes:
            self._write_tensors(REFERENCE, tensors)
            self._replace()

    def save_checkpoint(
        self, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], progress: Progress
    ) -> None:
        """Write the state of the live link and the optimizer as the point to resume from."""
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
        """Write the result, then the entry of the stage into the history.

        `best` is the best point, if the state ends there: the number of whole links of the stage,
        and a part of the next one. After a kill before the history is replaced, a resume scores
        again and ends the stage.
        """
        if not self.writes:
            return
        links = self._tied
        if best is not None:
            num_links, partial = best
            links = self._tied[:num_links]
            if partial is not None:
                links = [*links, self._save_link(partial)]
        text = json.dumps(result, indent=2, ensure_ascii=False)
        files.write_text(self.folder / RESULT, f"{text}\n")
        self._hash(RESULT)
        records = self._log.flushed()
        sums = {n: digest for n, digest in self._hashes.items() if not _is_in(n, PASSING)}
        sums |= {RECORDS: records.sha256} if records.count else {}
        update_history(self.run, lambda now: now.model_copy(update={"base": self.base}))
        draft = self.draft.model_copy(update={"tied": tuple(self._tied)})
        entry = draft.entry(self.due(), links, files=sums)
        update_history(self.run, lambda now: now.added(entry, self._links))
        self._scratch.remove_passing()

    def _replace(self, **changed: Any) -> None:
        """Replace ``stage.json`` with `changed` fields, then delete files that it does not name."""
        draft = self.draft.model_copy(update=changed)
        update = {
            "links": dict(self._links),
            "records": self._log.flushed(),
            "files": {name: sha for name, sha in self._hashes.items() if _is_in(name, draft.named)},
        }
        draft = draft.model_copy(update=update).with_training(versions=versions())
        write_part(self.folder / DRAFT, draft)
        self._draft = draft
        self._scratch.remove_all_but(draft.named)

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        files.make_folder((self.folder / name).parent)
        files.write_tensors(self.folder / name, tensors)
        self._hash(name)

    def _hash(self, name: str) -> None:
        self._hashes[name] = files.sha256(self.folder / name)

    def _hash_folder(self, directory: str) -> None:
        sums = files.checksums(self.folder / directory)
        self._hashes |= {f"{directory}/{name}": digest for name, digest in sums.items()}


def _is_in(name: str, named: Collection[str]) -> bool:
    """Say whether `named` has a file, or a folder that contains it."""
    return name in named or any(str(parent) in named for parent in PurePosixPath(name).parents)

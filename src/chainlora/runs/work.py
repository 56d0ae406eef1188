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

Nothing that ``stage.json`` names is ever overwritten. What a new point needs is written under names
of its own and flushed; then ``stage.json`` is replaced; then what it does not name is deleted. So
at any instant the stage can resume. Links and kept rows go into the run at once, where nothing
looks at them until the history names them: `publish` does, as the last act of a stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.chain.link import Link
from chainlora.config.reading import dump_config
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.config.staging import HISTORY, stage_folder
from chainlora.data.kept import Kept
from chainlora.errors import ChainLoRAError, RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.checkpoint import save_model
from chainlora.registry import plugin_digest
from chainlora.runs.addresses import state_of_draft
from chainlora.runs.beginning import begun_history, save_rows
from chainlora.runs.costs import versions
from chainlora.runs.draft import (
    DRAFT,
    PASSING,
    REFERENCE,
    Checkpoint,
    Draft,
    Progress,
)
from chainlora.runs.history import (
    BASE,
    CONFIG,
    DAMAGED,
    RECORDS,
    RESULT,
    START,
    TOKENIZER,
    Base,
    Entry,
    History,
    LinkFacts,
    Term,
    Training,
    exists_in,
    link_folder,
    now,
    read_history,
    update_history,
    write_part,
)
from chainlora.runs.links import (
    read_checkpoint,
    read_partial,
    save_link,
    write_adapter_of,
    write_checkpoint,
)
from chainlora.runs.locks import LOCK, is_in_use, locked, refuse_links, take_lock
from chainlora.runs.records import RecordLog, resumed_log
from chainlora.runs.resuming import (
    check_rows,
    compare,
    compare_versions,
    refuse_if_other,
    refuse_if_taken,
    source_digests,
)
from chainlora.runs.start import Start
from chainlora.runs.state import OpenState, check_base

logger = logging.getLogger(__name__)

_GROWING = ("moments", "best", "checkpoints")  # folders whose entries ``stage.json`` names


class Work:
    """A stage that this process trains, or with `writes` false sees another process write.

    `open` comes before anything is loaded, `begin` once base and rows are known, `close` at the
    end.
    """

    def __init__(self, run: str | Path, stage: str, *, writes: bool = True) -> None:
        self.run, self.stage, self.writes = Path(run), stage, writes
        self.folder = stage_folder(self.run, stage)
        self._lock: FileLock | None = None
        self._draft: Draft | None = None
        self._hashes: dict[str, str] = {}  # of files that this process has written or verified
        self._links: dict[str, LinkFacts] = {}  # that this process has written
        self._tied: list[str] = []
        self._log = RecordLog(self.folder / RECORDS)
        self._base: Base | None = None
        self._is_new_run = self._is_new = False  # begun by this process
        self._is_changed = False  # this resume changes keys of the config

    @property
    def exists(self) -> bool:
        """Say whether the stage was begun and has not ended."""
        return exists_in(self.run) and (self.folder / DRAFT).is_file()

    @property
    def draft(self) -> Draft:
        """The point that this process has read or written last. There is one once it began."""
        assert self._draft is not None
        return self._draft

    @property
    def base(self) -> Base:
        """The base that the stage is tuned on."""
        assert self._base is not None
        return self._base

    def opened(self) -> OpenState:
        """Return what has been tied so far."""
        return state_of_draft(self.run, self.stage)

    # --- opening and closing ---

    def open(self, config: RunConfig, *, resume: bool, change: Collection[str] = ()) -> None:
        """Refuse what can be refused before anything is loaded; lock a stage that is to be resumed.

        `resume` resumes a stage that is here, and begins one where nothing is. `change` names
        config keys that a resume may change.
        """
        if not self.writes:
            return
        files.check_writable(self.run)
        if not resume:
            refuse_if_taken(self.run)
            return
        refuse_if_other(self.run)
        refuse_links(self.run)
        if not self.folder.is_dir():
            return
        self._take_lock()
        if not self.exists:
            return
        begun = self.opened().verify()
        assert begun.draft is not None
        new = compare(begun, config, change)
        self._is_changed = bool(new)
        changes = (*begun.draft.entry.training.changes, *new)
        self._take(_with_training(begun.draft, changes=changes), begun.history.base)

    def _take(self, draft: Draft, base: Base) -> None:
        self._draft, self._base = draft, base
        self._tied, self._links = list(draft.entry.tied), dict(draft.links)
        self._hashes = dict(draft.files)

    @contextmanager
    def claimed(self, config: RunConfig) -> Iterator[None]:
        """Hold a stage that was trained, to publish it."""
        try:
            self.open(config, resume=True)
            if self._draft is None:
                rule, remedy = "a stage is judged by one process", "give the same command again"
                raise RunError(rule, self.folder, remedy)
            yield
        finally:
            self.close()

    def begin(
        self,
        config: RunConfig,
        base: Base,
        *,
        rows: str,
        start: Start,
        keep: Callable[[], Kept] | None,
    ) -> Progress:
        """Claim the folder for a stage, or find the point to resume from.

        Args:
            rows: digest of the rows (`Splits.digest`).
            start: what the stage begins on. A new run gets all that this state needs.
            keep: makes the rows that a stage keeps which begins. None keeps none.

        Raises RunError: not empty; other rows; in use by another process.
        """
        if not self.writes:
            return self._follow()
        if self._draft is not None:
            return self._resume(self._draft, base, rows)
        self._is_new_run = not exists_in(self.run)
        files.make_folder(self.folder)
        self._take_lock()
        known = None if self._is_new_run else read_history(self.run)
        if self.exists or (known is not None and known.find(self.stage) is not None):
            rule = "Another process has begun this stage"
            raise RunError(rule, self.folder, "give the same command again")
        self._is_new, self._base = True, base
        self._remove_passing(scratch_only=False)  # of a process that was killed before
        for name in (RECORDS, RESULT):  # of a stage that was pruned
            files.remove(self.folder / name)
        files.write_text(self.folder / CONFIG, dump_config(config))
        self._hashes = {CONFIG: files.sha256(self.folder / CONFIG)}
        kept = None if keep is None else save_rows(self.run, keep(), self.stage)
        history = known or begun_history(self.run, config, base, start, self.stage)
        parent, state = history.origin, history.state_of(history.origin)
        if known is not None and start.state is not None:
            state = start.state.state
            parent = BASE if start.state.entry is None else start.state.entry.key
        entry = Entry(
            key=self.stage,
            kind="stage",
            parents=() if parent == BASE else (parent,),
            reads=_reads(history, parent),
            state=state,
            kept=kept,
            files={CONFIG: self._hashes[CONFIG]},
            training=Training(
                rows=rows,
                sources=source_digests(config),
                plugins={name: plugin_digest(name) for name in config.plugins},
            ),
        )
        with locked(self.run):
            if exists_in(self.run):
                now = read_history(self.run)
                if known is None or now.state_of(parent) != state:
                    rule = "what a stage begins on must stay as it is"
                    raise RunError(rule, f"another {self.run} now", "give the same command again")
            self._draft = Draft(entry=entry)
            self._replace()
            if known is None:
                write_part(self.run / HISTORY, history)
        return deepcopy(self.draft.progress)

    def tidy(self) -> None:
        """Remove what the training of a stage needed that has ended, where a kill left it."""
        has_ended = read_history(self.run).find(self.stage) is not None
        left = [name for name in PASSING if (self.folder / name).exists()]
        if not (self.writes and has_ended and left):
            return
        try:
            self._take_lock()
        except ChainLoRAError:  # whoever publishes it does so, or nobody can write here
            return
        self._remove_passing(scratch_only=False)
        self.close()

    def close(self, *, undo: bool = False) -> None:
        """Let other processes use the folder.

        With `undo`, a stage that this process began, and that has no link and no checkpoint yet, is
        removed: what was refused late must not be in the way of the corrected config.
        """
        if undo and self._is_new and self._lock is not None:
            draft = self._draft
            if draft is None or not (draft.entry.tied or draft.checkpoint):
                self._remove_all()
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _follow(self) -> Progress:
        """Read where the first process begins or resumes; call it after that one's `begin`."""
        found = self.opened().verify()
        assert found.draft is not None
        self._take(found.draft, found.history.base)
        return deepcopy(self.draft.position)

    def _resume(self, draft: Draft, base: Base, rows: str) -> Progress:
        check_rows(draft.entry.training.rows, rows)
        compare_versions(draft.entry.training.versions, versions())
        self._base = base
        draft = self._draft = _with_training(draft, rows=rows)
        self._remove_passing(scratch_only=True)
        self._remove_unnamed()
        progress, known = deepcopy(draft.position), draft.records
        self._log = resumed_log(self._log.path, known, progress.num_records)
        progress.num_records = self._log.count
        if self._is_changed or (known is not None and known.count != self._log.count):
            self._replace()  # before records are cut that ``stage.json`` may know
        self._log.cut()
        return progress

    def _take_lock(self) -> None:
        if self._lock is None:
            self._lock = take_lock(self.folder)

    # --- what a resume reads ---

    def check_base_files(self, found: Mapping[str, str]) -> None:
        """Refuse to resume on another base than the run's, before it is loaded."""
        if self._draft is not None and self._base is not None:
            check_base(self._base, self.run, files=found)

    def has_checkpoint(self, progress: Progress) -> bool:
        """Whether there is a checkpoint of exactly this progress."""
        found = self.draft.checkpoint
        here = (progress.step, progress.link)
        return found is not None and (found.progress.step, found.progress.link) == here

    def load_checkpoint(
        self, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the live link's and the optimizer's state at this progress, None at a knot."""
        found = self.draft.checkpoint
        if found is None or not self.has_checkpoint(progress):
            return None
        return read_checkpoint(self.folder / found.directory)

    def load_moments(self) -> dict[str, Tensor]:
        """Read the optimizer state that the last link's knot kept."""
        assert self.draft.moments is not None
        return load_file(self.folder / self.draft.moments)

    def load_reference(self) -> dict[str, Tensor] | None:
        """Read what the pairs of each split scored before the first step; None where it is due."""
        path, draft = self.folder / REFERENCE, self.draft
        if REFERENCE not in draft.files and not draft.position.step:
            return None
        if REFERENCE not in draft.files or not path.is_file():
            raise RunError("a stage of dpo must hold its reference", f"none at {path}", DAMAGED)
        with safe_open(path, "pt") as file:
            found = file.metadata()
        if found != self._begun_on():
            raise RunError(
                f"{REFERENCE} must be of the rows and the state that its stage began on",
                f"those of {found} in {self.folder}",
                DAMAGED,
            )
        return load_file(path)

    def load_links(self) -> list[Link]:
        """Read the links that the stage has tied."""
        found = self.opened()
        return found.read([Term(link=digest) for digest in self.draft.entry.tied])

    def load_best(self, config: LinkConfig, directory: str) -> Link:
        """Read the partial link of the best point."""
        return read_partial(self.folder / directory, 0, config)

    def _begun_on(self) -> dict[str, str]:
        """Return what a reference is bound to."""
        entry = self.draft.entry
        below = read_history(self.run).state_of(entry.parents[0] if entry.parents else BASE)
        return {"begun_on": f"rows {entry.training.rows}, state {below.digest}"}

    # --- writing a point: its files, and then ``stage.json``, which names them ---

    def save_point(self, progress: Progress, numbers: Numbers) -> None:
        """Write ``stage.json`` at a knot: last, after all that it names."""
        if not self.writes:
            return
        tied = self._tied = self._tied[: progress.link]
        moments = f"moments/{progress.link - 1:03d}.safetensors"
        self._draft = _with_training(self.draft, numbers=numbers)
        self._replace(
            entry=self._entry(tied, tied),
            moments=moments if moments in self._hashes else None,
            checkpoint=None,
            progress=deepcopy(progress),
        )

    def save_link(self, link: Link) -> None:
        """Write a link that was tied."""
        if self.writes:
            digest, facts = save_link(self.run, link, self.base, self.stage)
            self._links[digest] = facts
            self._tied.append(digest)

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
        if not self.writes:
            return
        name = f"moments/{len(self._tied) - 1:03d}.safetensors"
        files.make_folder(self.folder / "moments")
        files.write_tensors(self.folder / name, tensors)
        self._hashes[name] = files.sha256(self.folder / name)

    def save_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the pairs of each split score before the first step."""
        if self.writes:
            files.write_tensors(self.folder / REFERENCE, tensors, self._begun_on())
            self._hashes[REFERENCE] = files.sha256(self.folder / REFERENCE)
            self._replace()

    def save_checkpoint(
        self, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], progress: Progress
    ) -> None:
        """Write the live link's and the optimizer's state, and name them as the point to resume."""
        if not self.writes or self.has_checkpoint(progress):
            return
        directory = f"checkpoints/{progress.step:08d}"
        with files.replaced_folder(self.folder / directory) as scratch:
            write_checkpoint(scratch, state, optimizer)
        self._hash_folder(directory)
        self._replace(checkpoint=Checkpoint(directory=directory, progress=deepcopy(progress)))

    def record(self, values: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.writes:
            self._log.append(values)
            progress.num_records += 1

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write a whole model, the result of full fine-tuning."""
        if self.writes:
            with files.replaced_folder(self.folder / "model") as scratch:
                save_model(model, tokenizer, scratch)
            self._hash_folder("model")

    def end(
        self, result: Mapping[str, Any], progress: Progress, best: tuple[int, Link | None] | None
    ) -> None:
        """Write the result. `best` are the links of the stage up to its best point, where the state
        ends there: whole ones, and a part of the next."""
        if not self.writes:
            return
        own = self._tied
        if best is not None:
            num_links, partial = best
            own = self._tied[:num_links]
            if partial is not None:
                digest, facts = save_link(self.run, partial, self.base, self.stage)
                self._links[digest] = facts
                own = [*own, digest]
        files.write_json(self.folder / RESULT, result)
        self._hashes[RESULT] = files.sha256(self.folder / RESULT)
        records = self._log.flushed()
        sums = {n: digest for n, digest in self._hashes.items() if not is_in(n, PASSING)}
        sums |= {RECORDS: records.sha256} if records.count else {}
        entry = self._entry(self._tied, own).model_copy(update={"files": sums})
        self._replace(entry=entry, progress=deepcopy(progress), checkpoint=None, trained=True)

    def publish(self, strength: float = 1.0, reads: Sequence[str] = ()) -> None:
        """Make the stage an entry of the history, and what the run is now unless that has moved.

        A `strength` other than 1, which the rows of the stages `reads` have chosen, becomes a mix
        on top of it.
        """
        if not self.writes:
            return
        draft = self.draft
        entry = draft.entry.model_copy(update={"ended": now()})

        def change(history: History) -> History:
            after = history.model_copy(update={"base": self.base})
            after = after.published(entry, draft.links)
            if strength != 1:
                found = OpenState(self.run, after, entry.state, entry)
                weak = found.with_strengths({entry.key: strength}).state
                after = after.published(after.mix_of(entry.key, weak, reads), {})
            return after

        update_history(self.run, change)
        self._remove_passing(scratch_only=False)

    def _entry(self, tied: Sequence[str], own: Sequence[str]) -> Entry:
        """Return the entry with these links: those that were tied, and those that it ends in."""
        entry = self.draft.entry
        below = [term for term in entry.state.terms if term.link not in self._links]
        terms = (*below, *(Term(link=digest) for digest in own))
        state = entry.state.model_copy(update={"terms": terms})
        return entry.model_copy(update={"tied": tuple(tied), "state": state})

    def _replace(self, **changed: Any) -> None:
        """Replace ``stage.json`` by one that has `changed`, and delete what it does not name."""
        draft = self.draft.model_copy(update=changed)
        named = {*draft.named, RESULT} if draft.trained else draft.named
        used = {*draft.entry.tied, *(term.link for term in draft.entry.state.terms)}
        hashes = {name: digest for name, digest in self._hashes.items() if is_in(name, named)}
        update = {
            "links": {digest: facts for digest, facts in self._links.items() if digest in used},
            "records": self._log.flushed(),
            "files": hashes,
        }
        draft = _with_training(draft.model_copy(update=update), versions=versions())
        write_part(self.folder / DRAFT, draft)
        self._draft = draft
        self._remove_unnamed()

    def _hash_folder(self, directory: str) -> None:
        found = files.checksums(self.folder / directory)
        self._hashes = {k: v for k, v in self._hashes.items() if not is_in(k, {directory})}
        self._hashes |= {f"{directory}/{name}": digest for name, digest in found.items()}

    # --- removing ---

    def _remove_unnamed(self) -> None:
        """Remove what ``stage.json`` names no more, and links that were dropped."""
        named = self.draft.named
        for folder in (self.folder / name for name in _GROWING):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            with suppress(OSError):  # there is none, or it holds what is named
                folder.rmdir()
        for digest in self._links.keys() - self.draft.links.keys():
            files.remove(self.run / link_folder(digest))
            del self._links[digest]

    def _remove_passing(self, *, scratch_only: bool) -> None:
        """Remove what killed writes left; of a stage that has ended, what its training needed."""
        is_alone = self._is_new_run and self._draft is None
        own = {self.folder, *(self.folder / name for name in _GROWING)}
        shared = {self.run / "links", self.run / "rows"}  # others write there meanwhile
        for folder in own | shared | ({self.run} if is_alone else set()):
            with files.reported(folder):
                name = self.stage if folder in shared and not is_alone else ""
                files.remove_scratch(folder, name)
        for name in () if scratch_only else PASSING:
            files.remove(self.folder / name)

    def _is_shared(self) -> bool:
        """Say whether another process has begun or ended a stage in this run."""
        others = set((self.run / "stages").glob("[!.]*")) - {self.folder}
        if any((path / DRAFT).exists() or is_in_use(path) for path in others):
            return True
        try:
            return exists_in(self.run) and bool(read_history(self.run).own)
        except RunError:
            return True

    def _remove_all(self) -> None:
        """Remove what `begin` made, the run first where it is new: then nothing names the rest.

        The lock goes last. Where something could not be removed, it says that the rest is a run's.
        """
        is_alone = self._is_new_run and not self._is_shared()
        made = [self.run / name for name in (HISTORY, "links", "rows", TOKENIZER)]
        for path in made if is_alone else ():
            files.remove(path)
        for name in (DRAFT, RECORDS, REFERENCE, CONFIG):
            files.remove(self.folder / name)
        if is_alone and any(path.exists() for path in made):
            return
        with suppress(OSError):
            if [entry.name for entry in self.folder.iterdir()] == [LOCK]:
                files.remove(self.folder / LOCK)
                self.folder.rmdir()
            if is_alone:
                for path in set((self.run / "stages").iterdir()) - {self.folder}:
                    files.remove(path)  # copied for a fork
                (self.run / "stages").rmdir()
                files.remove(self.run / LOCK)
                self.run.rmdir()


def _with_training(draft: Draft, **changed: Any) -> Draft:
    training = draft.entry.training.model_copy(update=changed)
    return draft.model_copy(update={"entry": draft.entry.model_copy(update={"training": training})})


def is_in(name: str, named: Collection[str]) -> bool:
    """Say whether a file, or a folder that it lies in, is among those named."""
    return name in named or any(str(parent) in named for parent in PurePosixPath(name).parents)


def _reads(history: History, parent: str) -> tuple[str, ...]:
    """Return the entries whose kept rows a stage reads that begins there: what they held out is
    left out of its own rows."""
    found = [history.find(START), *history.lineage(parent)]
    return tuple(dict.fromkeys(e.key for e in found if e is not None and e.kept is not None))

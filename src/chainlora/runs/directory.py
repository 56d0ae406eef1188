"""The run directory: what is on disk, in which order it gets there, and how a run is resumed.

    RUN/config.yaml              resolved config
    RUN/chain.json               manifest: links, where to resume, hashes of all that counts
    RUN/links/000/ …             each an ordinary PEFT adapter
    RUN/rows/main.safetensors    rows kept of the run's stage, and of each stage before it
    RUN/tokenizer/               one that is not the base's, if the run began with it
    RUN/moments/000.safetensors  optimizer state kept over the last knot (optimizer_reset: prune)
    RUN/reference.safetensors    scores of pairs before the first step (train.loss: dpo)
    RUN/best/00000120/           the best point, when it lies inside a link (a PEFT adapter)
    RUN/checkpoints/00000120/    the live link and its optimizer
    RUN/metrics.jsonl            one JSON object a line
    RUN/result.json              written last, and named by the manifest then
    RUN/.lock                    held by the process that trains

Nothing that the manifest names is ever overwritten. What a new state needs is written under names
of its own and flushed; then the manifest is replaced; then what no manifest names is deleted. So at
any instant the manifest on disk describes a state from which the run can resume.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from chainlora import __version__, files
from chainlora.chain.link import Link
from chainlora.config.loading import dump_config
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.data.kept import Kept, write_kept
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.checkpoint import save_model
from chainlora.models.identity import tokenizer_files
from chainlora.runs.links import (
    load_tensors,
    read_checkpoint,
    read_partial,
    write_checkpoint,
    write_link,
)
from chainlora.runs.manifest import (
    DAMAGED,
    FORMAT,
    INCOMPLETE,
    REFERENCE,
    RESULT,
    TOKENIZER,
    Base,
    Checkpoint,
    Manifest,
    Progress,
    Selection,
    encode_manifest,
    kept_rows,
    link_directory,
    link_entries,
    link_entry,
)
from chainlora.runs.reading import RunReader, check_base
from chainlora.runs.records import RecordLog, resumed_log
from chainlora.runs.resuming import (
    changes,
    check_rows,
    refuse_if_nothing,
    refuse_if_taken,
    take_lock,
)
from chainlora.runs.start import NOTHING, Start

# Folders whose entries the manifest names.
GROWING = ("links", "rows", "moments", "best", "checkpoints")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numerics matter."""
    found = {"python": platform.python_version(), "chainlora": __version__}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class RunDirectory(RunReader):
    """One run on disk, to be written.

    `open` comes before anything is loaded, `begin` once base and rows are known, `close` at the
    end.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._lock: FileLock | None = None
        self._current: Manifest | None = None  # what this process has read or written last
        self._hashes: dict[str, str] = {}  # of files that this run has written or verified
        self._rows: str | None = None
        self._log = RecordLog(self / "metrics.jsonl")
        self._begun_on = NOTHING
        self._kept: list[str] = []  # stages whose rows are kept, of a run that begins
        self._is_new = False  # begun by this process
        self._is_changed = False  # this resume changes keys of the config

    # --- opening and closing ---

    def open(self, config: RunConfig, *, resume: bool, change: Collection[str] = ()) -> None:
        """Refuse what can be refused before anything is loaded; lock a run that is to be resumed.

        `change` names config keys that a resume may change.
        """
        files.check_writable(self.path)
        if not resume:
            refuse_if_taken(self)
            return
        refuse_if_nothing(self)
        self._take_lock()
        if not self.exists:
            return
        manifest = self.verify()
        if manifest.is_pruned:
            raise RunError("a stage that was pruned stays so", self.path, "choose another output")
        new = changes(self.config(), config, change, manifest.position.step)
        self._is_changed = bool(new)
        self._read(manifest.model_copy(update={"changes": [*manifest.changes, *new]}))

    def check_base_files(self, found: Mapping[str, str]) -> None:
        """Refuse to resume on another base than the run's, before it is loaded."""
        if self._current is not None:
            check_base(self._current.base, {"files": found}, self.path)

    def begin(
        self,
        config: RunConfig,
        base: Mapping[str, Any],
        *,
        resume: bool,
        rows: str | None = None,
        start: Start = NOTHING,
        keep: Callable[[], Kept] | None = None,
    ) -> Progress:
        """Claim the directory for a run, or find the state to resume from.

        Args:
            base: the base model, as `manifest.Base` has it.
            rows: digest of the rows (`Splits.digest`).
            start: the state that the run begins on. Its links and kept rows are written here too.
            keep: makes the rows that a run keeps which begins. None keeps none.

        Raises RunError: non-empty without `resume`; incomplete or damaged; another config, base or
        rows; in use by another process.
        """
        if resume and self._current is None:
            self.open(config, resume=True)
        if self._current is not None:
            return self._resume(self._current, base, rows)
        return self._start(config, base, start, keep, resume=resume, rows=rows)

    def close(self, *, undo: bool = False) -> None:
        """Let other processes use the directory.

        With `undo`, a run that this process began, and that has no link and no checkpoint yet, is
        removed: what was refused late must not be in the way of the corrected run.
        """
        if undo and self._is_new and self._lock is not None:
            current = self._current
            if current is None or not (current.links[current.first :] or current.checkpoint):
                self._remove_all()
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _start(
        self,
        config: RunConfig,
        base: Mapping[str, Any],
        start: Start,
        keep: Callable[[], Kept] | None,
        *,
        resume: bool,
        rows: str | None,
    ) -> Progress:
        """Begin a run; with `resume`, over what one left that was killed before its manifest."""
        if not resume:
            refuse_if_taken(self)
        files.make_folder(self.path)
        self._take_lock()
        if not resume:
            refuse_if_taken(self)  # another process may have begun in the meantime
        self._is_new = True
        self._remove_scratch()
        files.write_text(self / "config.yaml", dump_config(config))
        self._hashes = {"config.yaml": files.sha256(self / "config.yaml")}
        files.make_folder(self / "links")
        self._rows, self._begun_on = rows, start
        if start.tokenizer is not None:
            self._copy_tokenizer(start.tokenizer)
        self._keep({**start.kept, **({start.stage: keep()} if keep is not None else {})})
        for link in start.links:
            self._save_adapter(link_directory(link.id), link, Base(**base))
        progress = Progress(link=len(start.links))
        self.write_manifest(base, config, list(start.links), progress, None, start.next_id)
        return progress

    def _resume(self, manifest: Manifest, base: Mapping[str, Any], rows: str | None) -> Progress:
        check_base(manifest.base, base, self.path)
        check_rows(manifest.rows, rows)
        self._rows = rows or manifest.rows
        self._remove_scratch()
        self._remove_unnamed()  # a link that was written, and then the run was killed
        progress, known = deepcopy(manifest.position), manifest.records
        self._log = resumed_log(self._log.path, known, progress.num_records)
        progress.num_records = self._log.count
        if self._is_changed or (known is not None and known.count != self._log.count):
            self._replace(manifest)  # before records are cut that the manifest on disk may know
        self._log.cut()
        return progress

    def _keep(self, kept: Mapping[str, Kept]) -> None:
        if kept:
            files.make_folder(self / "rows")
        for stage, rows in kept.items():
            write_kept(self / kept_rows(stage), rows)
            self._hashes[kept_rows(stage)] = files.sha256(self / kept_rows(stage))
        self._kept = list(kept)

    def _take_lock(self) -> None:
        if self._lock is None:
            self._lock = take_lock(self.path)

    # --- writing a state: its files, and then the manifest that names them ---

    def write_manifest(
        self,
        base: Mapping[str, Any],
        config: RunConfig,
        links: list[Link],
        progress: Progress,
        numbers: Numbers | None = None,
        next_id: int = 0,
    ) -> None:
        """Write ``chain.json`` at a knot: last, after everything it names.

        `next_id` is the chain's: a link that was rejected has used an id too.
        """
        before, start = self._current, self._begun_on
        known = before.links if before else start.entries
        stage = before.stage if before else start.stage
        entries = link_entries(links, base["fingerprint"], known, stage)
        moments = f"moments/{len(links) - 1:03d}.safetensors"
        self._replace(
            Manifest(
                format=FORMAT,
                base=Base(**base),
                seed=config.train.seed,
                hold=config.chain.hold,
                rows=self._rows,
                links=entries,
                next_id=next_id,
                stage=stage,
                first=before.first if before else len(start.links),
                first_id=before.first_id if before else start.next_id,
                moments=moments if moments in self._hashes else None,
                selected=None,
                progress=deepcopy(progress),
                numbers=numbers,
                kept=before.kept if before else self._kept,
                changes=before.changes if before else [],
            )
        )

    def select(self, num_links: int, step: int, partial: Link | None, progress: Progress) -> None:
        """Name the best point, which the run is then loaded as. All links are kept."""
        current, entry = self._need_current(), None
        if partial is not None:
            assert progress.best is not None
            below, place = current.links[:num_links], progress.best["directory"]
            entry = link_entry(partial, current.base.fingerprint, below, place, current.stage)
        selected = Selection(num_links=num_links, step=step, partial=entry)
        update = {"selected": selected, "progress": deepcopy(progress), "checkpoint": None}
        self._replace(current.model_copy(update=update))

    def save_link(self, link: Link) -> None:
        """Write one link as a PEFT adapter under ``links/``."""
        self._save_adapter(link_directory(link.id), link, self._need_current().base)

    def save_best(self, link: Link, progress: Progress) -> None:
        """Write the best point, a part of a link, and note in the progress where it lies."""
        assert progress.best is not None
        directory = f"best/{progress.best['step']:08d}"
        self._save_adapter(directory, link, self._need_current().base)
        progress.best["directory"] = directory

    def save_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the optimizer state of the link that is being tied over its knot."""
        name = f"moments/{len(self._need_current().links):03d}.safetensors"
        files.make_folder(self / "moments")
        files.write_tensors(self / name, tensors)
        self._hashes[name] = files.sha256(self / name)

    def save_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the pairs of each split score before the first step."""
        manifest = self._need_current()
        files.write_tensors(self / REFERENCE, tensors, _begun_on(manifest))
        self._hashes[REFERENCE] = files.sha256(self / REFERENCE)
        self._replace(manifest)

    def save_checkpoint(
        self, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], progress: Progress
    ) -> None:
        """Write the live link's and the optimizer's state, and name them as the point to resume."""
        if self.has_checkpoint(progress):
            return
        directory = f"checkpoints/{progress.step:08d}"
        with files.replaced_folder(self / directory) as scratch:
            write_checkpoint(scratch, state, optimizer)
        self._hash_folder(directory)
        checkpoint = Checkpoint(directory=directory, progress=deepcopy(progress))
        self._replace(self._need_current().model_copy(update={"checkpoint": checkpoint}))

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write a whole model, the result of full fine-tuning."""
        with files.replaced_folder(self / "model") as scratch:
            save_model(model, tokenizer, scratch)
        self._hash_folder("model")

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``, and name it in the manifest: the last act of a run."""
        files.write_json(self / RESULT, result)
        self._replace(self._need_current(), result=files.sha256(self / RESULT))

    def record(self, values: Mapping[str, Any], progress: Progress) -> None:
        """Append one line to ``metrics.jsonl``."""
        self._log.append(values)
        progress.num_records += 1

    def _save_adapter(self, directory: str, link: Link, base: Base) -> None:
        with files.replaced_folder(self / directory) as scratch:
            write_link(scratch, link, base)
        self._hash_folder(directory)

    def _copy_tokenizer(self, folder: Path) -> None:
        with files.replaced_folder(self / TOKENIZER) as scratch:
            for path in tokenizer_files(folder):
                (scratch / path.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, scratch / path.relative_to(folder))
        self._hash_folder(TOKENIZER)

    def _hash_folder(self, directory: str) -> None:
        found = files.checksums(self / directory)
        self._hashes = {k: v for k, v in self._hashes.items() if not is_in(k, {directory})}
        self._hashes |= {f"{directory}/{name}": digest for name, digest in found.items()}

    def _replace(self, manifest: Manifest, *, result: str | None = None) -> None:
        """Replace the manifest on disk, and delete what the new one does not name.

        A new state has no result yet, so that the result of an earlier one can be overwritten.
        """
        named = manifest.named
        hashes = {name: digest for name, digest in self._hashes.items() if is_in(name, named)}
        hashes |= {RESULT: result} if result else {}
        update = {
            "format": FORMAT,
            "records": self._log.flushed(),
            "files": hashes,
            "versions": versions(),
        }
        manifest = manifest.model_copy(update=update)
        files.write_json(self / "chain.json", encode_manifest(manifest))
        self._current = manifest
        self._remove_unnamed()

    # --- removing ---

    def _remove_unnamed(self) -> None:
        """Remove what of the growing folders the manifest does not name."""
        named = self._need_current().named
        for folder in (self / name for name in GROWING):
            entries = list(folder.iterdir()) if folder.is_dir() else []
            for entry in entries:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            if folder.name != "links":
                with suppress(OSError):  # there is none, or it holds what is named
                    folder.rmdir()

    def _remove_scratch(self) -> None:
        for folder in (self.path, *(self / name for name in GROWING)):
            with files.reported(folder):
                files.remove_scratch(folder)

    def _remove_all(self) -> None:
        """Remove what `begin` made, the manifest before what it names."""
        folders = ("links", "rows", TOKENIZER)
        for name in ("metrics.jsonl", "chain.json", REFERENCE, *folders, "config.yaml", ".lock"):
            files.remove(self / name)
        with suppress(OSError):  # not empty: trackers have written here
            self.path.rmdir()

    # --- the point to resume from ---

    @property
    def numbers(self) -> Numbers | None:
        """Return what was decided when the run began."""
        return self._current.numbers if self._current is not None else None

    @property
    def first(self) -> int:
        """Return how many links of earlier stages the run began on."""
        return self._need_current().first

    @property
    def stage(self) -> str:
        """Return the name of the run's own stage."""
        return self._need_current().stage

    @property
    def next_id(self) -> int:
        """Return the id of the next link, or of the one that a checkpoint is inside of."""
        return self._need_current().next_id

    def load_links(self, num_links: int | None = None) -> list[Link]:
        """Read the chain: as selected (the best point if it was kept), or its first links."""
        return self.links_of(self._current or self.manifest(), num_links)

    def has_checkpoint(self, progress: Progress) -> bool:
        """Whether there is a checkpoint of exactly this progress."""
        found = self._current.checkpoint if self._current is not None else None
        here = (progress.step, progress.link)
        return found is not None and (found.progress.step, found.progress.link) == here

    def load_checkpoint(
        self, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Read the live link's and the optimizer's state at this progress, None at a knot."""
        if not self.has_checkpoint(progress):
            return None
        found = self._need_current().checkpoint
        assert found is not None
        return read_checkpoint(self / found.directory)

    def load_moments(self) -> dict[str, Tensor]:
        """Read the optimizer state that the last link's knot kept."""
        name = self._need_current().moments
        if name is None:
            raise RunError(
                "a run with optimizer_reset: prune must hold the moments of its last link",
                f"none in {self.path}",
                INCOMPLETE,
            )
        return load_tensors(self / name)

    def load_reference(self) -> dict[str, Tensor] | None:
        """Read the scores that `save_reference` kept; None before the first step."""
        manifest = self._need_current()
        if REFERENCE not in manifest.files and not manifest.position.step:
            return None
        self.check_files(manifest, REFERENCE)
        with safe_open(self / REFERENCE, "pt") as file:
            found = file.metadata()
        if found != _begun_on(manifest):
            raise RunError(
                f"{REFERENCE} must be of the rows and the state that its run began on",
                f"those of {found} in {self.path}",
                DAMAGED,
            )
        return load_tensors(self / REFERENCE)

    def load_best(self, index: int, config: LinkConfig, directory: str) -> Link:
        """Read the partial link of the best point."""
        self.check_files(self._need_current(), directory)
        return read_partial(self / directory, index, config)

    def _read(self, manifest: Manifest) -> None:
        self._current = manifest
        self._hashes = {k: v for k, v in manifest.files.items() if k != RESULT}

    def _need_current(self) -> Manifest:
        if self._current is None:
            self._read(self.verify())
        assert self._current is not None
        return self._current


def _begun_on(manifest: Manifest) -> dict[str, str]:
    """Return what a reference is bound to: under one key, since safetensors orders them anyhow."""
    return {"begun_on": f"rows {manifest.rows}, state {manifest.started_on}"}


def is_in(name: str, named: Collection[str]) -> bool:
    """Say whether a file, or a folder that it lies in, is among those named."""
    return name in named or any(str(parent) in named for parent in PurePosixPath(name).parents)

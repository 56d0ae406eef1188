"""The run directory: what is on disk, and in which order it gets there.

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
any instant the manifest on disk describes a state from which the run can resume
(`runs.in_progress`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from torch import Tensor

from chainlora import files
from chainlora.chain.link import Link
from chainlora.config.loading import dump_config
from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept, write_kept
from chainlora.data.splits import named_sources, source_digest
from chainlora.errors import RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.checkpoint import save_model
from chainlora.models.identity import tokenizer_files
from chainlora.registry import plugin_digest
from chainlora.runs.costs import versions
from chainlora.runs.in_progress import RunInProgress, begun_on
from chainlora.runs.links import write_checkpoint, write_link
from chainlora.runs.manifest import (
    FORMAT,
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
from chainlora.runs.records import RecordLog, resumed_log
from chainlora.runs.resuming import (
    LOCK,
    check_rows,
    compare,
    compare_versions,
    refuse_if_other,
    refuse_if_taken,
    refuse_links,
    start_digests,
    take_lock,
)
from chainlora.runs.start import Start

# Folders whose entries the manifest names.
GROWING = ("links", "rows", "moments", "best", "checkpoints")


class RunDirectory(RunInProgress):
    """One run on disk, to be written.

    `open` comes before anything is loaded, `begin` once base and rows are known, `close` at the
    end.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._lock: FileLock | None = None
        self._hashes: dict[str, str] = {}  # of files that this run has written or verified
        self._log = RecordLog(self / "metrics.jsonl")
        self._is_new = False  # begun by this process
        self._is_changed = False  # this resume changes keys of the config

    # --- opening and closing ---

    def open(self, config: RunConfig, *, resume: bool, change: Collection[str] = ()) -> None:
        """Refuse what can be refused before anything is loaded; lock a run that is to be resumed.

        `resume` resumes a run that is here, and begins one where nothing is. `change` names config
        keys that a resume may change.
        """
        files.check_writable(self.path)
        if not resume:
            refuse_if_taken(self)
            return
        refuse_if_other(self)
        if not self.path.is_dir():
            return
        self._take_lock()
        if not self.exists:
            return
        manifest = self.verify()
        if manifest.is_pruned:
            raise RunError("a stage that was pruned stays so", self.path, "choose another output")
        new = compare(self, manifest, config, change)
        self._is_changed = bool(new)
        self._current = manifest.model_copy(update={"changes": [*manifest.changes, *new]})
        self._hashes = {k: v for k, v in manifest.files.items() if k != RESULT}

    def begin(
        self,
        config: RunConfig,
        base: Base,
        *,
        rows: str,
        start: Start,
        keep: Callable[[], Kept] | None,
    ) -> Progress:
        """Claim the directory for a run, or find the state to resume from.

        Args:
            rows: digest of the rows (`Splits.digest`).
            start: the state that the run begins on. Its links and kept rows are written here too.
            keep: makes the rows that a run keeps which begins. None keeps none.

        Raises RunError: not empty; other rows; in use by another process.
        """
        if self._current is not None:
            return self._resume(self._current, base, rows)
        files.make_folder(self.path)
        if self._lock is None:  # another process may have begun in the meantime
            self._take_lock()
            refuse_if_taken(self)
        self._is_new = True
        self._remove_scratch()  # of a run that was killed before its manifest
        files.write_text(self / "config.yaml", dump_config(config))
        self._hashes = {"config.yaml": files.sha256(self / "config.yaml")}
        files.make_folder(self / "links")
        if start.tokenizer is not None:
            self._copy_tokenizer(start.tokenizer)
        kept = {**start.kept, **({start.stage: keep()} if keep is not None else {})}
        self._keep(kept)
        for link in start.links:
            self._save_adapter(link_directory(link.id), link, base)
        self._current = Manifest(
            format=FORMAT,
            base=base,
            seed=config.train.seed,
            hold=config.chain.hold,
            rows=rows,
            sources={
                key: [source_digest(key, each.path, config.data) for each in found]
                for key, found in named_sources(config.data).items()
            }
            | start_digests(config),
            links=link_entries(start.links, base.fingerprint, start.entries, start.stage),
            next_id=start.next_id,
            stage=start.stage,
            first=len(start.links),
            first_id=start.next_id,
            selected=None,
            progress=Progress(link=len(start.links)),
            kept=list(kept),
            plugins={name: plugin_digest(name) for name in config.plugins},
        )
        self._replace()
        return deepcopy(self.current.progress)

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

    def _resume(self, manifest: Manifest, base: Base, rows: str) -> Progress:
        check_rows(manifest.rows, rows)
        compare_versions(manifest.versions, versions())
        manifest = self._current = manifest.model_copy(update={"base": base, "rows": rows})
        self._remove_scratch()
        self._remove_unnamed()  # a link that was written, and then the run was killed
        progress, known = deepcopy(manifest.position), manifest.records
        self._log = resumed_log(self._log.path, known, progress.num_records)
        progress.num_records = self._log.count
        if self._is_changed or (known is not None and known.count != self._log.count):
            self._replace()  # before records are cut that the manifest on disk may know
        self._log.cut()
        return progress

    def _keep(self, kept: Mapping[str, Kept]) -> None:
        if kept:
            files.make_folder(self / "rows")
        for stage, rows in kept.items():
            write_kept(self / kept_rows(stage), rows)
            self._hashes[kept_rows(stage)] = files.sha256(self / kept_rows(stage))

    def _take_lock(self) -> None:
        if self._lock is None:
            refuse_links(self.path)
            self._lock = take_lock(self.path)

    # --- writing a state: its files, and then the manifest that names them ---

    def write_manifest(
        self, links: list[Link], progress: Progress, numbers: Numbers, next_id: int
    ) -> None:
        """Write ``chain.json`` at a knot: last, after everything it names.

        `next_id` is the chain's: a link that was rejected has used an id too.
        """
        current = self.current
        moments = f"moments/{len(links) - 1:03d}.safetensors"
        self._replace(
            links=link_entries(links, current.base.fingerprint, current.links, current.stage),
            next_id=next_id,
            moments=moments if moments in self._hashes else None,
            checkpoint=None,
            selected=None,
            progress=deepcopy(progress),
            numbers=numbers,
        )

    def select(self, num_links: int, step: int, partial: Link | None, progress: Progress) -> None:
        """Name the best point, which the run is then loaded as. All links are kept."""
        current, entry = self.current, None
        if partial is not None:
            assert progress.best is not None
            below, place = current.links[:num_links], progress.best["directory"]
            entry = link_entry(partial, current.base.fingerprint, below, place, current.stage)
        selected = Selection(num_links=num_links, step=step, partial=entry)
        self._replace(selected=selected, progress=deepcopy(progress), checkpoint=None)

    def save_link(self, link: Link) -> None:
        """Write one link as a PEFT adapter under ``links/``."""
        self._save_adapter(link_directory(link.id), link, self.current.base)

    def save_best(self, link: Link, progress: Progress) -> None:
        """Write the best point, a part of a link, and note in the progress where it lies."""
        assert progress.best is not None
        directory = f"best/{progress.best['step']:08d}"
        self._save_adapter(directory, link, self.current.base)
        progress.best["directory"] = directory

    def save_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the optimizer state of the link that is being tied over its knot."""
        name = f"moments/{len(self.current.links):03d}.safetensors"
        files.make_folder(self / "moments")
        files.write_tensors(self / name, tensors)
        self._hashes[name] = files.sha256(self / name)

    def save_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the pairs of each split score before the first step."""
        files.write_tensors(self / REFERENCE, tensors, begun_on(self.current))
        self._hashes[REFERENCE] = files.sha256(self / REFERENCE)
        self._replace()

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
        self._replace(checkpoint=Checkpoint(directory=directory, progress=deepcopy(progress)))

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write a whole model, the result of full fine-tuning."""
        with files.replaced_folder(self / "model") as scratch:
            save_model(model, tokenizer, scratch)
        self._hash_folder("model")

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``, and name it in the manifest: the last act of a run."""
        files.write_json(self / RESULT, result)
        self._replace(result=files.sha256(self / RESULT))

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

    def _replace(self, *, result: str | None = None, **changed: Any) -> None:
        """Replace the manifest on disk by one that has `changed`, and delete what it does not name.

        A new state has no result yet, so that the result of an earlier one can be overwritten.
        """
        manifest = self.current.model_copy(update=changed)
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
        named = self.current.named
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
        """Remove what `begin` made, the manifest before what it names.

        The lock goes last. Where something could not be removed, it says that the rest is a run's.
        """
        folders = ("links", "rows", TOKENIZER)
        for name in ("metrics.jsonl", "chain.json", REFERENCE, *folders, "config.yaml"):
            files.remove(self / name)
        with suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [LOCK]:
                files.remove(self / LOCK)
                self.path.rmdir()


def is_in(name: str, named: Collection[str]) -> bool:
    """Say whether a file, or a folder that it lies in, is among those named."""
    return name in named or any(str(parent) in named for parent in PurePosixPath(name).parents)

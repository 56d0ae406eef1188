"""Reading a run directory: the manifest, the config, the links, each checked before it is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.checks import check_strengths
from chainlora.chain.link import Link
from chainlora.chain.showing import table
from chainlora.config.chat_templates import is_resolved
from chainlora.config.loading import make_config, read_tree
from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept, read_kept
from chainlora.errors import RunError
from chainlora.models.finding import from_above
from chainlora.models.identity import changed_files
from chainlora.runs.links import read_link
from chainlora.runs.manifest import (
    DAMAGED,
    INCOMPLETE,
    RESULT,
    TOKENIZER,
    Base,
    Change,
    Manifest,
    decode_manifest,
    kept_rows,
)
from chainlora.runs.records import Record, check_records, read_records, read_result

logger = logging.getLogger(__name__)


class RunReader:
    """One run on disk, to be read.

    `strengths` of stages stand in for those that the links of these stages had in the run. With
    `num_links`, it is the state of the first links, before those of its own stage.
    """

    def __init__(
        self,
        path: str | Path,
        strengths: Mapping[str, float] | None = None,
        num_links: int | None = None,
    ) -> None:
        self.path, self.strengths, self.num_links = Path(path), strengths or {}, num_links
        with files.reported(path, "read"):
            is_file = self.path.is_file()
        if is_file:
            raise RunError(
                f"a run directory must be a directory (got the file {path}); name another"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        strengths = "".join(f", {name}={value:g}" for name, value in self.strengths.items())
        return f"<RunReader: {self.path}{strengths}>"

    def _repr_html_(self) -> str | None:
        """Return the links that the run is loaded with; None where it has none yet."""
        if not self.exists:
            return None
        heads = ("link", "stage", "rank", "steps", "strength")
        links = self.manifest().loaded
        rows = [(link.id, link.stage, link.rank, link.num_steps, link.strength) for link in links]
        return table(heads, rows, str(self))

    @property
    def exists(self) -> bool:
        """Whether there is a run here."""
        return (self / "chain.json").is_file()

    def manifest(self, *, as_written: bool = False) -> Manifest:
        """Read and check ``chain.json``. The base is named as it is found from here, or, to write
        it again, `as_written`."""
        try:
            manifest = decode_manifest((self / "chain.json").read_bytes(), self.path)
            if as_written:
                return manifest
            place = {"model": from_above(manifest.base.model, self.path)}
            manifest = manifest.model_copy(update={"base": manifest.base.model_copy(update=place)})
            if self.num_links is not None:
                manifest = manifest.until(self.num_links)
            return manifest.at_strengths(self.strengths) if self.strengths else manifest
        except FileNotFoundError:
            raise RunError(
                f"a run directory must hold chain.json (got none in {self.path}); "
                "is this the output of `chainlora train`?"
            ) from None
        except OSError as error:
            raise files.file_error(error, self / "chain.json", "read") from error

    def config(self) -> RunConfig:
        """Return the resolved config of the run, with what resumes have changed."""
        manifest = self.manifest()
        self.check_files(manifest, "config.yaml")
        tree = read_tree(self / "config.yaml")
        _refuse_paths(tree, self.path)
        return _changed(make_config(tree), manifest.changes)

    def records(self) -> list[Record]:
        """Read ``metrics.jsonl``, the records that the manifest knows checked against it.

        Links are numbered as they are now, without those that were pruned.
        """
        manifest = self.manifest()
        check_records(self / "metrics.jsonl", manifest.records)
        found = read_records(self / "metrics.jsonl")
        return [{**r, "link": r["link"] - manifest.pruned} if "link" in r else r for r in found]

    def result(self) -> Record | None:
        """Read ``result.json``, checked; None of a run that has not finished, or a saved chain."""
        manifest = self.manifest()
        if not self.is_finished(manifest):
            return None
        if manifest.format > 2:
            self._check_file(manifest, RESULT)
        return read_result(self / RESULT)

    def is_finished(self, manifest: Manifest) -> bool:
        """Say whether a run has its result. Version 0.2 did not name it in the manifest."""
        by_file = manifest.format == 2 and manifest.has_run and (self / RESULT).is_file()
        return by_file or RESULT in manifest.files

    def is_as_trained(self) -> bool:
        """Say whether the run is loaded as what it scored when it was trained: not mixed or pruned
        since."""
        manifest = self.manifest()
        return not manifest.pruned and manifest.state == RunReader(self.path).manifest().state

    def tokenizer(self, manifest: Manifest) -> Path | None:
        """Return the folder of the run's own tokenizer; None where it has the base's."""
        if not any(name.startswith(f"{TOKENIZER}/") for name in manifest.files):
            return None
        self.check_files(manifest, TOKENIZER)
        return self / TOKENIZER

    def verify(self) -> Manifest:
        """Check every file that the manifest names, and return it.

        A damaged checkpoint is left out with a warning: a run can resume from its last knot.
        """
        manifest = self.manifest()
        try:
            return self._verified(manifest)
        except RunError:
            now = self.manifest()
            if now == manifest:
                raise
            return self._verified(now)  # a run that goes on has removed what it needs no more

    def _verified(self, manifest: Manifest) -> Manifest:
        checkpoint = manifest.checkpoint
        for name in manifest.files:
            if checkpoint is None or not name.startswith(f"{checkpoint.directory}/"):
                self._check_file(manifest, name)
        check_records(self / "metrics.jsonl", manifest.records)
        return self._with_usable_checkpoint(manifest)

    def load_links(self, num_links: int | None = None) -> list[Link]:
        """Read the chain: as selected (the best point if it was kept), or its first links."""
        return self.links_of(self.manifest(), num_links)

    def links_of(self, manifest: Manifest, num_links: int | None = None) -> list[Link]:
        """Read the links that a manifest names, each checked."""
        if num_links is not None and not 0 <= num_links <= len(manifest.links):
            rule = f"the number of links must be 0 to {len(manifest.links)} for this run"
            raise RunError(f"{rule} (got {num_links})")
        entries = manifest.loaded if num_links is None else manifest.links[:num_links]
        for entry in entries:
            self.check_files(manifest, entry.directory)
        links = [read_link(self / entry.directory, entry) for entry in entries]
        if self.strengths:
            check_strengths(links)
        return links

    def kept(self) -> dict[str, Kept]:
        """Read the rows that the run and the stages before it kept, by stage, each file checked."""
        manifest = self.manifest()
        for stage in manifest.kept:
            self._check_file(manifest, kept_rows(stage))
        return {stage: read_kept(self / kept_rows(stage)) for stage in manifest.kept}

    def check_files(self, manifest: Manifest, name: str) -> None:
        """Raise RunError unless a file, or all files of a folder, are as the manifest says."""
        names = [each for each in manifest.files if each == name or each.startswith(f"{name}/")]
        if not names:
            raise RunError(
                f"chain.json must hold the checksums of {name} (got none in {self.path}); {DAMAGED}"
            )
        for each in names:
            self._check_file(manifest, each)

    def _check_file(self, manifest: Manifest, name: str) -> None:
        path = self / name
        if not path.is_file():
            raise RunError(
                f"a run directory must hold {name} (got none in {self.path}); {INCOMPLETE}"
            )
        with files.reported(path, "read"):
            found = files.sha256(path)
        if found != manifest.files[name]:
            raise RunError(
                f"{name} must be as the run wrote it (got other bytes in {self.path}); {DAMAGED}"
            )

    def _with_usable_checkpoint(self, manifest: Manifest) -> Manifest:
        checkpoint = manifest.checkpoint
        if checkpoint is None:
            return manifest
        try:
            self.check_files(manifest, checkpoint.directory)
        except RunError as error:
            logger.warning(
                "the checkpoint at step %d cannot be used (%s); the run resumes from step %d",
                checkpoint.progress.step,
                error,
                manifest.progress.step,
            )
            return manifest.model_copy(update={"checkpoint": None})
        return manifest


def nothing_at(address: object, what: str) -> RunError:
    """Return the error for a name that is neither a run nor `what`, on this machine or the Hub."""
    run, _, stage = str(address).rpartition("@")
    run = run or stage
    return RunError(
        f"a run or {what} must be there",
        f"{address}: no {run}/chain.json, no such {what} on this machine, and none on the Hub "
        "or in its cache",
        "check the path, or for the Hub the connection, HF_HUB_OFFLINE and `hf auth login`",
    )


Address = str | Path | RunReader
"""What names a run: a folder, ``RUN@STAGE`` (`runs.stages`), or what reads it."""


def _refuse_paths(tree: Mapping[str, Any], run: Path) -> None:
    """Raise RunError where a saved config would have a file of this machine read."""
    data = tree.get("data")
    template = data.get("chat_template") if isinstance(data, Mapping) else None
    if isinstance(template, str) and not is_resolved(template):
        raise RunError(
            "`data.chat_template` of a run must be a name or a text",
            f"the path {template!r:.60} in {run / 'config.yaml'}",
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

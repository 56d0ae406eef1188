"""Rows for what a run began on: they are kept as those of an earlier stage named `start`.

A config gives them as `start_data`, and the run then keeps them when it begins; to a run that has
begun they are given by `keep_start_rows`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.config.schema import DataConfig, StartData
from chainlora.data.kept import Kept, write_kept
from chainlora.data.splits import prepare_splits
from chainlora.errors import RunError
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_skeleton
from chainlora.models.text_config import context_length
from chainlora.runs.manifest import START, encode_manifest, kept_rows
from chainlora.runs.opening import tokenizer_of
from chainlora.runs.reading import RunReader
from chainlora.runs.stages import (
    alone_in,
    end_stage,
    first_is_open,
    folder_of,
    half_trained,
    open_run,
    read_stages,
)


def rows_of_start(rows: StartData, own: DataConfig, tokenizer: Any, context: int) -> Kept:
    """Return what a run keeps of rows for its start; `own` are those of its first stage.

    Raises DataError or ConfigError for rows that cannot be read.
    """
    return prepare_splits(rows.as_data(own), tokenizer, context).kept()


def keep_start_rows(run: str | Path, rows: StartData) -> None:
    """Keep rows for what a run began on, in place of those that it has.

    Raises RunError for a saved chain, for a run that has not ended or has a half-trained stage, and
    for one that another process is training.
    """
    run = Path(run).expanduser()
    with alone_in(run):
        reader, found = open_run(run), read_stages(run)
        if not reader.manifest().has_run:
            rule = "rows for the start are kept by a run"
            raise RunError(rule, f"a saved chain, {run}", "begin a run on it, with start_data")
        begun = half_trained(run, found) + [run] * first_is_open(run)
        if begun:
            rule = "a run can be given rows for its start when no stage is half trained"
            raise RunError(rule, begun[0], "finish it by the command that began it")
        base = resolve_model(reader.manifest().base.model)
        tokenizer, context = tokenizer_of(reader, base), context_length(load_skeleton(base))
        kept = rows_of_start(rows, reader.config().data, tokenizer, context)
        end_stage(run, found.names[0])  # so that it is not judged by rows that come later
        for place in range(len(found.names)):
            _keep(RunReader(folder_of(run, found, place)), kept)


def _keep(stage: RunReader, kept: Kept) -> None:
    """Keep the rows in the directory of a stage, which names them last."""
    path = stage / kept_rows(START)
    _name(stage, None)  # what is named is never overwritten
    files.make_folder(path.parent)
    write_kept(path, kept)
    _name(stage, files.sha256(path))


def _name(stage: RunReader, digest: str | None) -> None:
    """Have the manifest of a stage name the rows by their hash, or no such rows."""
    manifest = stage.manifest(as_written=True)
    stages = [each for each in manifest.kept if each != START]
    sums = {name: each for name, each in manifest.files.items() if name != kept_rows(START)}
    if digest is not None:
        stages, sums = [START, *stages], sums | {kept_rows(START): digest}
    changed = manifest.model_copy(update={"kept": stages, "files": sums})
    if changed != manifest:
        with files.reported(stage.path):
            files.remove_scratch(stage.path, "chain.json")
        files.write_json(stage / "chain.json", encode_manifest(changed))

"""A stage that is deleted for good: its links and rows, from its directory and from later stages.

Its name and ids stay taken: ``stages.json`` keeps the name, and its run directory the manifest
and the config. The stages after it, tuned on top of its links, go on without them.

The stage is marked first; then each manifest is replaced by one that names nothing of it; then
what no manifest names is deleted. So a kill leaves a run that can be read, and the same call again
finds what is left to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chainlora import files
from chainlora.chain.checks import check_strengths
from chainlora.errors import ChainError, FileError, RunError
from chainlora.runs.directory import GROWING, is_in
from chainlora.runs.manifest import (
    FORMAT,
    REFERENCE,
    RESULT,
    LinkEntry,
    Manifest,
    Progress,
    encode_manifest,
)
from chainlora.runs.reading import RunReader
from chainlora.runs.stages import (
    Stages,
    alone_in,
    first_is_open,
    folder_of,
    half_trained,
    need_whole,
    open_run,
    read_stages,
    write_stages,
)

_OWN = (REFERENCE, RESULT, "metrics.jsonl", "training.png", "chain.png", "report.html")


@dataclass(frozen=True)
class Pruning:
    """What a pruning deletes, and what was tuned on top of it.

    `gone` are files and folders; `manifests` those that change, by their run directories. `later`
    are the stages that go on without the links, `before` is the stage that was the last one before.
    """

    stage: str
    gone: list[Path]
    manifests: dict[Path, Manifest]
    later: list[str]
    before: str | None


def plan_pruning(run: Path, name: str) -> Pruning:
    """Say what deleting a stage would delete; change nothing.

    It may be a stage of a run that this one was forked from. Raises RunError for one that is not
    there, for the only one, and where a stage is half trained or is no sum without the links.
    """
    need_whole(run)
    found = read_stages(run)
    folders = [folder_of(run, found, place) for place in range(len(found.names))]
    before = {folder: RunReader(folder).manifest(as_written=True) for folder in folders}
    after = {folder: _without(manifest, name) for folder, manifest in before.items()}
    gone = [path for folder in folders for path in _unnamed(folder, after[folder], name)]
    place = found.names.index(name) if name in found.names else -1
    earlier, later = found.names[: max(place, 0)], found.names[place + 1 :]
    plan = Pruning(
        name,
        gone,
        {folder: manifest for folder, manifest in after.items() if manifest != before[folder]},
        [each for each in later if each in found.here],
        next((each for each in reversed(earlier) if each in found.here), None),
    )
    _check(run, found, name, before, is_there=bool(place >= 0 or plan.manifests or gone))
    return plan


def prune_stage(run: Path, name: str) -> Pruning:
    """Delete a stage for good; return what was deleted.

    Raises what `plan_pruning` does, FileError for what cannot be deleted, and RunError for a run
    that another process is training.
    """
    with alone_in(run):
        plan, found = plan_pruning(run, name), read_stages(run)
        stages = [
            entry.model_copy(update={"pruned": entry.pruned or entry.name == name})
            for entry in found.stages
        ]
        write_stages(run, found.model_copy(update={"stages": stages}))
        for folder, manifest in plan.manifests.items():
            with files.reported(folder):
                files.remove_scratch(folder, "chain.json")
            files.write_json(folder / "chain.json", encode_manifest(manifest))
        _delete(plan.gone)
    return plan


def _check(
    run: Path, found: Stages, name: str, manifests: Mapping[Path, Manifest], *, is_there: bool
) -> None:
    begun = half_trained(run, found)
    begun += [run] * first_is_open(run)
    if begun:
        rule = "a stage can be pruned when none is half trained"
        raise RunError(rule, begun[0], "finish it, or delete that folder")
    if not is_there:
        names = ", ".join(open_run(run).manifest().stages)
        raise RunError(f"a stage must be one of {names}", f"{name!r} for {run}", "name one")
    if found.here == [name]:
        raise RunError("a run must keep a stage", f"{name!r}, its only one", f"delete {run}")
    for folder, manifest in manifests.items():
        links = [
            replace(e.outline(), strength=float(e.stage != name))
            for e in ([] if manifest.stage == name else manifest.loaded)
        ]
        try:
            check_strengths(links)
        except ChainError as error:
            raise RunError(
                "a stage can be pruned only where the later ones are a sum without it",
                f"{error} in {folder}",
                "prune the later ones first",
            ) from None


def _without(manifest: Manifest, name: str) -> Manifest:
    """Return a manifest that names no links and rows of a stage."""
    links = [entry for entry in manifest.links if entry.stage != name]
    below = sum(entry.stage == name for entry in manifest.links[: manifest.first])
    is_own, selected = manifest.stage == name, manifest.selected
    if selected is not None:
        partial = selected.partial and _moved(selected.partial, selected.partial.index - below)
        place = {"num_links": selected.num_links - below, "partial": partial}
        selected = selected.model_copy(update=place)
    update: dict[str, Any] = {
        "format": FORMAT if is_own else manifest.format,
        "links": [_moved(entry, index) for index, entry in enumerate(links)],
        "first": manifest.first - below,
        "pruned": manifest.pruned + below,
        "kept": [stage for stage in manifest.kept if stage != name],
        "progress": replace(manifest.progress, link=len(links)),
        "selected": selected,
    }
    if is_own:
        nothing = dict.fromkeys(("selected", "moments", "checkpoint", "records", "numbers"))
        update |= {"progress": Progress(link=len(links)), "is_pruned": True} | nothing
    found = manifest.model_copy(update=update)
    named = (found.named | {RESULT}) - set(_OWN if is_own else ())
    sums = {path: digest for path, digest in manifest.files.items() if is_in(path, named)}
    return found.model_copy(update={"files": sums})


def _moved(entry: LinkEntry, index: int) -> LinkEntry:
    return entry.model_copy(update={"index": index})


def _unnamed(folder: Path, manifest: Manifest, name: str) -> Iterator[Path]:
    """Yield what of a run directory goes: what its new manifest does not name."""
    for each in GROWING:
        for path in sorted((folder / each).glob("*")):
            if f"{each}/{path.name}" not in manifest.named:
                yield path
    if manifest.stage == name:
        yield from (folder / each for each in _OWN if (folder / each).exists())


def _delete(paths: Sequence[Path]) -> None:
    """Delete files and folders. Raises FileError for what is still there then."""
    for path in paths:
        files.remove(path)
        if path.exists():
            raise FileError("a file must be deleted", path, "check its permissions")
    for folder in {path.parent for path in paths}:
        with files.reported(folder, "deleted"):
            files.remove_scratch(folder)
            files.sync_folder(folder)

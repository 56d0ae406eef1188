"""The stages of a run, and the states that they end in.

    RUN/                  the first stage: a run directory
    RUN/stages.json       the order of stages, and their strengths
    RUN/stages/style/     the second stage: a run directory that begins on the first one's links

``RUN@STAGE`` names the state at the end of a stage, as it was then, ``RUN@start`` the one that the
first stage began on, and ``RUN@base`` the model without links; ``RUN`` that of the last stage that
has ended, each stage at the strength that ``stages.json`` gives it. That file is replaced as a
whole when a stage ends or a strength changes, so that readers never meet half a stage. A run of one
stage has none until then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from chainlora import files
from chainlora.chain.checks import check_strengths
from chainlora.chain.link import Link
from chainlora.config.stages import is_run, split_address, stage_folder
from chainlora.errors import ChainError, RunError
from chainlora.runs.manifest import BASE, DAMAGED, START, StageName, checksum
from chainlora.runs.reading import Address, RunReader
from chainlora.runs.resuming import refuse_link, refuse_links, take_lock

STAGES = "stages.json"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class StageEntry(_Part):
    """A stage that has ended; pruned (`runs.pruning`), its name and its links' ids stay taken."""

    name: StageName
    pruned: bool = False


class Stages(_Part):
    """What ``stages.json`` says."""

    format: int = 1
    stages: list[StageEntry]
    strengths: dict[StageName, float] = {}

    @model_validator(mode="after")
    def _check(self) -> Stages:
        if not self.here:
            raise ValueError("no stage that was not pruned")
        if len(set(self.names)) < len(self.names):
            raise ValueError("a stage twice")
        return self

    @property
    def names(self) -> list[str]:
        """Return the names of the stages that have ended, in their order."""
        return [stage.name for stage in self.stages]

    @property
    def here(self) -> list[str]:
        """Return the names of those that were not pruned."""
        return [stage.name for stage in self.stages if not stage.pruned]

    @property
    def last(self) -> int:
        """Return the place of the stage that the run is loaded as."""
        return self.names.index(self.here[-1])


# --- addresses ---


def open_run(
    address: Address,
    stages: str | Sequence[str] | Mapping[str, float] | None = None,
) -> RunReader:
    """Return what reads a state: what loads, scores, inspects or exports a run takes it too.

    Args:
        address: a run, which is its last stage that has ended, ``RUN@STAGE``, or ``RUN@start`` or
            ``RUN@base``, before its first stage.
        stages: the stages that are switched on, or the strength of each; the others are off.

    Raises:
        RunError: a stage that is not there, that has no one strength, or that is not judged yet.
    """
    reader, is_open = reader_of(address), isinstance(address, RunReader)
    if not is_open and reader.exists and (name := unjudged_stage(reader)) is not None:
        raise RunError(
            f"Cannot use {address}: stage {name!r} is trained but not yet judged by accept_links. "
            "Run the command that trained it again."
        )
    if stages is None:
        return reader
    named = [stages] if isinstance(stages, str) else stages
    chosen = named if isinstance(named, Mapping) else dict.fromkeys(named, 1.0)
    strengths = dict.fromkeys(_names_in(reader, chosen, address), 0.0)
    strengths |= {each: float(value) for each, value in chosen.items()}
    need_one_strength(reader.path, [name for name, value in chosen.items() if value])
    return RunReader(reader.path, strengths, reader.num_links)


def reader_of(address: Address) -> RunReader:
    """Return what reads a state as `open_run` does, even where it is not judged yet."""
    if isinstance(address, RunReader):
        return address
    run, name = split_address(address)
    if not is_run(run):
        return RunReader(run)
    found = read_stages(run)
    place = found.last if name is None else place_of(found, name, run)
    if name in (START, BASE) and name not in found.names:
        return RunReader(run, num_links=RunReader(run).manifest().start_links * (name == START))
    return RunReader(folder_of(run, found, place), found.strengths if name is None else {})


def strengths_of(run: Path) -> dict[str, float]:
    """Return the strength of every stage that the run is loaded with, inherited ones too."""
    return {link.stage: link.strength for link in open_run(run).manifest().loaded}


def readers_of_stages(address: Address) -> dict[str, RunReader]:
    """Return what reads each stage of a run that has ended; nothing for a run of one stage."""
    run, _ = split_address(address)
    if not (run / STAGES).is_file():
        return {}
    found = read_stages(run)
    places = {name: place_of(found, name, run) for name in found.here}
    return {name: RunReader(folder_of(run, found, place)) for name, place in places.items()}


def run_around(folder: Path) -> Path:
    """Return the run that a run directory is a later stage of; else the directory itself."""
    around = folder.parent.parent
    is_stage = folder == stage_folder(around, folder.name) and (around / "chain.json").is_file()
    return around if is_stage else folder


def need_whole(run: Path) -> None:
    """Raise RunError for a later stage's own directory, and for symbolic links in a run: a change
    must see the whole run, and nothing else."""
    folder = run.resolve()
    if (around := run_around(folder)) != folder:
        rule = "stages are added, mixed and pruned in the run that they are of"
        raise RunError(rule, f"{run}, a stage of one", f"name {around}")
    refuse_links(run)


def _names_in(reader: RunReader, chosen: Iterable[str], run: Address) -> list[str]:
    """Return the stages that a run has links of. Raises RunError for others among `chosen`."""
    names = reader.manifest().stages
    for name in chosen:
        if name not in names:
            known = ", ".join(names) or "those that have links, and there is none"
            raise RunError(f"a stage must be one of {known}", f"{name!r} for {run}", "name one")
    return names


def place_of(found: Stages, name: str, run: Path) -> int:
    """Return the place of a stage; of what was before the first one, that of the first one.

    Raises RunError for one that has not ended, or was pruned.
    """
    if name in (START, BASE) and name not in found.names:
        return 0
    if name not in found.here:
        is_begun = stage_folder(run, name) in half_trained(run, found)
        why = "was pruned" if name in found.names else "has not ended" if is_begun else ""
        what = f"{name!r}{f', which {why},' if why else ''} for {run}"
        raise RunError(f"a stage must be one of {', '.join(found.here)}", what, "name one")
    return found.names.index(name)


def folder_of(run: Path, found: Stages, place: int) -> Path:
    """Return the run directory of a stage. Raises RunError for one that lies elsewhere."""
    if place == 0:
        return run
    folder = stage_folder(run, found.names[place])
    for path in (folder.parent, folder):
        refuse_link(path)
    return folder


def half_trained(run: Path, found: Stages) -> list[Path]:
    """Return the run directories of stages that were begun and have not ended."""
    begun = [path for path in (run / "stages").glob("[!.]*") if path.is_dir()]
    return [path for path in begun if path.name not in found.names]


def first_is_open(run: Path) -> bool:
    """Say whether the first stage of a run has not ended: is half trained, or not judged yet."""
    first = RunReader(run)
    manifest = first.manifest()
    if (run / STAGES).is_file() or not manifest.has_run:
        return False
    return not first.is_finished(manifest) or unjudged_stage(first) is not None


def unjudged_stage(reader: RunReader) -> str | None:
    """Return the stage of a run directory that is trained, and that `accept_links` has not judged
    yet by the rows of earlier ones; None where there is none. ``stages.json`` names judged ones."""
    manifest, folder = reader.manifest(), reader.path.resolve()
    is_trained = manifest.has_run and reader.is_finished(manifest) and reader.num_links is None
    if len(manifest.columns) < 2 or not is_trained:
        return None
    around = run_around(folder)
    if (around / STAGES).is_file() and manifest.stage in read_stages(around).names:
        return None
    return manifest.stage if isinstance(reader.config().train.accept_links, float) else None


# --- the file ---


def read_stages(run: Path) -> Stages:
    """Read the stages of a run. One without the file has its own stage alone."""
    path = run / STAGES
    if not path.is_file():
        return Stages(stages=[StageEntry(name=RunReader(run).manifest().stage)])
    try:
        tree = json.loads(path.read_bytes())
        known = tree.pop("checksum", None)
        if known != checksum(tree):
            raise ValueError("another checksum")
        return Stages.model_validate(tree)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise RunError(f"{STAGES} must be as it was written", f"{what} in {run}", DAMAGED) from None


def write_stages(run: Path, found: Stages) -> None:
    """Replace the file, whole or not at all."""
    tree: dict[str, Any] = found.model_dump(mode="json")
    files.write_json(run / STAGES, tree | {"checksum": checksum(tree)})


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keep other processes from changing the stages of a run.

    Raises RunError where one is doing so, and for a stage's own directory.
    """
    need_whole(run)
    lock = take_lock(run)
    try:
        with files.reported(run):
            files.remove_scratch(run, STAGES)
        yield
    finally:
        if lock is not None:
            lock.release()


def end_stage(run: Path, name: str, strength: float = 1.0) -> None:
    """Name a stage as ended: from here on it is what the run is loaded as, at this strength."""
    found = read_stages(run)
    if name in found.names and (run / STAGES).is_file():
        return
    entries = found.stages if name in found.names else [*found.stages, StageEntry(name=name)]
    weakened = {name: strength} if strength != 1 else {}
    write_stages(run, Stages(stages=entries, strengths=found.strengths | weakened))


def need_one_strength(folder: Path, names: Iterable[str]) -> None:
    """Raise RunError for a stage to which 1 would not give back what was: a chain that was saved
    with links of several strengths."""
    for name in names:
        loaded = RunReader(folder).manifest().loaded
        found = {entry.strength for entry in loaded if entry.stage == name}
        if len(found) > 1:
            shown = ", ".join(f"{each:g}" for each in sorted(found))
            raise RunError(
                "a stage can be mixed whose links have one strength",
                f"{shown} in {name!r} of {folder}",
                "take Chain.set_strengths, and save the chain",
            )


def _need_sum_later(begun: Path, strengths: Mapping[str, float]) -> None:
    """Raise RunError where a mix would be no sum once a half-trained stage has ended."""
    reader = RunReader(begun, strengths)
    if not reader.exists:
        return
    manifest = reader.manifest()
    links = [entry.outline() for entry in manifest.links[: manifest.first]]
    links += [Link(len(links), each, {}) for each in reader.config().chain.links()]
    try:
        check_strengths(links)
    except ChainError as error:
        raise RunError(
            "a mix must fit the stage that is half trained",
            f"{error} in {begun}",
            "finish it first",
        ) from None


def mix_stages(run: str | Path, strengths: Mapping[str, float]) -> None:
    """Give stages of a run other strengths, 0 for off; the others keep theirs.

    From then on the run is this mix wherever it is loaded; 1 gives back what was, to the bit.

    Raises RunError: a stage that is not there, or that has no one strength, a strength that its
    links cannot have, a run that another process is training, or whose first stage has not ended.
    """
    run = Path(run).expanduser()
    with alone_in(run):
        found = read_stages(run)
        open_run(run)  # refuses a stage that is not judged
        if first_is_open(run):
            rule = "a run can be mixed when its first stage has ended"
            raise RunError(rule, run, "finish it by the command that began it")
        folder = folder_of(run, found, found.last)
        _names_in(RunReader(folder), strengths, run)
        need_one_strength(folder, strengths)
        merged = found.strengths | {name: float(value) for name, value in strengths.items()}
        RunReader(folder, merged).load_links()  # refuses what is not a sum
        for begun in half_trained(run, found):
            _need_sum_later(begun, merged)
        write_stages(run, Stages(stages=found.stages, strengths=merged))

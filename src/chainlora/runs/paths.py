"""Paths of runs: find run directories, split addresses ``RUN@STAGE``, check output folders."""

from __future__ import annotations

from os import PathLike
from os.path import expanduser
from pathlib import Path

from chainlora.errors import ConfigError, RunError
from chainlora.files import reported

HISTORY = "history.json"  # a folder with this file is a run


def exists_in(folder: Path) -> bool:
    """Say whether a folder is a run or a saved chain."""
    return (folder / HISTORY).is_file()


def is_run(address: str | PathLike[str]) -> bool:
    """Say whether an address names a run or a saved chain."""
    return exists_in(split_address(address)[0])


def need_run(address: str | PathLike[str]) -> None:
    """Raise RunError unless an address names a run or a saved chain."""
    run, _ = split_address(address)
    with reported(run, "read"):
        if exists_in(run):
            return
    refuse_older(run)
    if (run / "links").is_dir():
        remedy = "it is incomplete: copy it whole, or start over"
        raise RunError(f"a run directory must hold {HISTORY}", f"none in {run}", remedy)
    problem = f"holds no {HISTORY}" if run.is_dir() else "is a file" if run.exists() else None
    runs = runs_near(run)
    near = ", ".join(runs[:8]) + ", …" * (len(runs) > 8)
    raise RunError(
        f"RUN must be a run directory (got {run}, which {problem or 'does not exist'}); it is the "
        f"`output` of chainlora train{f', here one of {near}' if near else ''}"
    )


def refuse_older(folder: Path) -> None:
    """Raise RunError for a run of an earlier version, which this one cannot read."""
    if (folder / "chain.json").is_file() and not exists_in(folder):
        raise RunError(
            f"Cannot read the run {folder}: version 0.2 or a development version wrote it. Use "
            "that version, or train again into another folder."
        )


def need_apart(output: str | PathLike[str], key: str = "output") -> None:
    """Raise ConfigError for an output folder inside a run, and for the current folder.

    That run could delete the output, or be damaged by it. An existing run inside is accepted. The
    current folder cannot be written, because a new folder replaces the output as a whole.
    """
    place = Path(expanduser(output)).resolve()
    refuse_older(place)
    if Path(expanduser(output)) == Path() and not exists_in(place):
        rule = f"`{key}` must not be the current folder"
        raise ConfigError(rule, output, "name a folder in it, or call the command from above")
    outer_run = next(filter(exists_in, place.parents), None)
    if outer_run is not None and not exists_in(place):
        raise ConfigError(
            f"`{key}` must lie outside other runs",
            f"{output}, inside {outer_run}",
            "choose another place; chainlora extend adds a stage to a run",
        )


def refuse_if_taken(output: Path) -> None:
    """Raise RunError unless a path is free, or an empty folder."""
    problem = "a file"
    with reported(output, "read"):
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
    if output.is_dir():
        problem = f"which is not empty and {'' if exists_in(output) else 'not '}a whole run"
    rule = "`output` must be a new or empty directory"
    raise RunError(rule, f"{output}, {problem}", "choose another output")


def refuse_if_other(run: Path) -> None:
    """Raise RunError unless a folder is a run, new or empty."""
    if not exists_in(run):
        refuse_if_taken(run)


def runs_near(folder: Path) -> list[str]:
    """Return the runs in a folder, or if it does not exist, in its parent."""
    parent = folder if folder.exists() else folder.parent
    return sorted(str(path.parent) for path in parent.glob(f"[!.]*/{HISTORY}"))


def split_address(address: str | PathLike[str]) -> tuple[Path, str | None]:
    """Return the run and the stage of ``RUN@STAGE``; an existing path with an @ is a run."""
    if not isinstance(address, str | PathLike):
        got, remedy = f"a {type(address).__name__}", "save_chain writes a Chain"
        raise ConfigError("a run, or a model, is named by its path", got, remedy)
    path = Path(expanduser(address))
    head, at, name = str(path).rpartition("@")
    if not at or path.exists() or not exists_in(Path(head)):
        return path, None
    return Path(head), name


def stage_folder(run: Path, name: str) -> Path:
    """Return the folder of a stage, with all its files but links and kept rows."""
    return run / "stages" / name

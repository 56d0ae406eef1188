"""Paths of runs: folders that are one, addresses RUN@STAGE, and places for output."""

from __future__ import annotations

from os import PathLike
from os.path import expanduser
from pathlib import Path

from chainlora.errors import ConfigError, RunError
from chainlora.files import reported

HISTORY = "history.json"  # what makes a folder a run


def exists_in(folder: Path) -> bool:
    """Say whether a run, or a saved chain, is in a folder."""
    return (folder / HISTORY).is_file()


def is_run(address: str | PathLike[str]) -> bool:
    """Say whether a run directory, or a saved chain, is there."""
    return exists_in(split_address(address)[0])


def need_run(address: str | PathLike[str]) -> None:
    """Raise RunError for what is neither a run directory nor a saved chain."""
    run, _ = split_address(address)
    with reported(run, "read"):
        if exists_in(run):
            return
    refuse_older(run)
    if (run / "links").is_dir():
        raise RunError(
            f"a run directory must hold {HISTORY} (got none in {run}); it is incomplete: copy it "
            "whole, or start over"
        )
    what = f"holds no {HISTORY}" if run.is_dir() else "is a file" if run.exists() else None
    runs = runs_near(run)
    near = ", ".join(runs[:8]) + ", …" * (len(runs) > 8)
    raise RunError(
        f"RUN must be a run directory (got {run}, which {what or 'does not exist'}); it is the "
        f"`output` of chainlora train{f', here one of {near}' if near else ''}"
    )


def refuse_older(folder: Path) -> None:
    """Raise RunError for a run that an earlier version wrote, which this one does not read."""
    if (folder / "chain.json").is_file() and not exists_in(folder):
        raise RunError(
            f"Cannot read the run {folder}: version 0.2 or a development version wrote it. Use "
            "that version, or train again into another folder."
        )


def need_apart(output: str | PathLike[str], key: str = "output") -> None:
    """Raise ConfigError for an output inside a run, which would take it for its own, or lose a file
    to it. A run of its own there is accepted."""
    place = Path(expanduser(output)).resolve()
    refuse_older(place)
    around = next(filter(exists_in, place.parents), None)
    if around is not None and not exists_in(place):
        raise ConfigError(
            f"`{key}` must lie outside other runs",
            f"{output}, inside {around}",
            "choose another place; chainlora extend adds a stage to a run",
        )


def runs_near(folder: Path) -> list[str]:
    """Return the runs in a folder, or beside one that does not exist."""
    around = folder if folder.exists() else folder.parent
    return sorted(str(path.parent) for path in around.glob(f"[!.]*/{HISTORY}"))


def split_address(address: str | PathLike[str]) -> tuple[Path, str | None]:
    """Return the run and the stage that ``RUN@STAGE`` names; a folder with an @ is itself."""
    if not isinstance(address, str | PathLike):
        got, remedy = f"a {type(address).__name__}", "save_chain writes a Chain"
        raise ConfigError("a run, or a model, is named by its path", got, remedy)
    path = Path(expanduser(address))
    head, at, name = str(path).rpartition("@")
    if not at or path.exists() or not exists_in(Path(head)):
        return path, None
    return Path(head), name


def stage_folder(run: Path, name: str) -> Path:
    """Return where the files of a stage lie that are not links or rows."""
    return run / "stages" / name

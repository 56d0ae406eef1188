"""Read ``history.json`` (`runs.history`), and replace it under the lock of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chainlora import files
from chainlora.runs.documents import read_part, version_of, write_part
from chainlora.runs.history import History
from chainlora.runs.locks import need_own, writing
from chainlora.runs.paths import HISTORY, stage_folder

_READ: dict[Path, tuple[tuple[int, ...], History]] = {}  # cache: version and content by path


def read_history(run: Path) -> History:
    """Read and check ``history.json``, or return the cached one if the file has not changed.

    Every replacement is a new file, so inode, size and times identify a version. Raises RunError
    for a missing or damaged history, another format, and for folders that are symbolic links:
    nothing outside the run may be written or deleted.
    """
    path, version = (run / HISTORY).absolute(), version_of(run / HISTORY)
    cached = _READ.get(path)
    if cached is not None and version is not None and cached[0] == version:
        return cached[1]
    need_own_folders(run)
    history = read_part(run / HISTORY, History)
    if version is not None and version == version_of(run / HISTORY):
        _READ[path] = version, history
    return history


def folder_in(run: Path, name: str) -> Path:
    """Return the folder of a stage, with all its files but links and kept rows."""
    return stage_folder(run, read_history(run).folder_of(name))


def need_own_folders(run: Path) -> None:
    """Raise RunError if a folder in a run is a symbolic link."""
    for pattern in ("*", "stages/*", "stages/*/*"):
        for path in run.glob(pattern):
            if path.is_dir():  # linked files are safe, because writes replace the link
                need_own(path)


def update_history(run: Path, change: Callable[[History], History]) -> History:
    """Replace the history of a run with the result of `change`, under the lock; return the result.

    Raises RunError if another process writes the run.
    """
    with writing(run):
        need_own_folders(run)
        before = read_history(run)
        after = change(before)
        if after != before:
            after.need_names()
            with files.reported(run):
                files.remove_scratch(run, HISTORY)
            write_part(run / HISTORY, after)
            if (version := version_of(run / HISTORY)) is not None:
                _READ[(run / HISTORY).absolute()] = version, after
    return after

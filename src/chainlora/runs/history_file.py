"""Read and replace ``history.json``: the file of `runs.history`, under the lock of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chainlora import files
from chainlora.errors import RunError
from chainlora.runs.documents import read_part, write_part
from chainlora.runs.history import RECORDS, History
from chainlora.runs.locks import locked, need_own
from chainlora.runs.paths import HISTORY

_READ: dict[Path, tuple[tuple[int, ...], History]] = {}  # what was read last, and its version


def read_history(run: Path) -> History:
    """Read and check ``history.json``, unless it is as this process has read or written it last.

    Each version is a file of its own, known by number, size and the time that its writer gave it.
    Folders that lead out of the run are refused: nothing there is written or deleted. Raises
    RunError for these, and for no history, a damaged one, or one of another format.
    """
    path, version = (run / HISTORY).absolute(), _version(run)
    known = _READ.get(path)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    need_own_folders(run)
    history = read_part(run / HISTORY, History)
    if version is not None and version == _version(run):
        _READ[path] = version, history
    return history


def write_history(run: Path, history: History) -> None:
    """Replace ``history.json``; the caller holds the run's lock."""
    write_part(run / HISTORY, history)
    if (version := _version(run)) is not None:
        _READ[(run / HISTORY).absolute()] = version, history


def _version(run: Path) -> tuple[int, ...] | None:
    try:
        found = (run / HISTORY).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def need_own_folders(run: Path) -> None:
    """Raise RunError for folders in a run that lead out of it."""
    for places in ("*", "stages/*", "stages/*/*"):
        for path in run.glob(places):
            if path.is_dir():  # linked files are safe, since writes replace them
                need_own(path)


def update_history(
    run: Path,
    change: Callable[[History], History],
    then: Callable[[], object] = lambda: None,
) -> History:
    """Replace the history of a run by what `change` makes of it, and return that.

    Other processes wait meanwhile: milliseconds. `change` does nothing long; `then` deletes what is
    not named any more, before others can name it. Raises RunError where a file that the history is
    to name was deleted meanwhile.
    """
    with locked(run):
        need_own_folders(run)
        before = read_history(run)
        after = change(before)
        if after != before:
            new = after.files.keys() - before.files.keys()
            gone = [name for name in new if not (run / name).exists()]
            try:
                after.need_names()
                if gone := [name for name in gone if not name.endswith(f"/{RECORDS}")]:
                    raise ValueError(f"{gone[0]} must be there")
            except ValueError as error:  # of what another process has deleted meanwhile
                raise RunError("a run was changed meanwhile", error, "start again") from None
            with files.reported(run):
                files.remove_scratch(run, HISTORY)
            write_history(run, after)
        then()
    return after

"""One writer: a command that writes a run holds its lock until it ends; readers need none.

The operating system releases the lock of a process that ends, so a kill leaves none.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chainlora import files
from chainlora.errors import FileError, RunError
from chainlora.runs.documents import now
from chainlora.runs.draft import GROWING, PASSING
from chainlora.runs.entries import CONFIG, CONTENT, RECORDS, RESULT
from chainlora.runs.paths import exists_in

LOCK, HOLDER = ".lock", ".lock.json"
_PATIENCE = 0.2  # seconds: `is_held` holds the lock for a moment
_HELD: set[Path] = set()  # by this process


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Hold the lock of a run; a call inside this context does nothing, nor does one without a run.

    Raises RunError if another process holds it, and names its command. Raises FileError on a disk
    without file locks: the marker file that filelock would use there stays after a kill.
    """
    place = run.resolve()
    if place in _HELD or not exists_in(run):
        yield
        return
    lock = _acquired(run, _PATIENCE)
    _HELD.add(place)
    try:
        name = Path(sys.argv[0]).name.replace("__main__.py", "chainlora")
        command = shlex.join([name, *sys.argv[1:2]])
        holder = {"command": command, "process": os.getpid(), "since": now()}
        with files.reported(run / HOLDER):
            (run / HOLDER).write_text(json.dumps(holder), encoding="utf-8")  # only a message
        yield
    finally:
        _HELD.discard(place)
        with suppress(FileError):  # a kill leaves it; the next command replaces it
            files.remove(run / HOLDER)
        lock.release()


def _acquired(run: Path, wait: float) -> FileLock:
    for name in (LOCK, HOLDER):
        need_own(run / name)
    lock = FileLock(str(run / LOCK), timeout=wait, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"Cannot write {run}: {_holder(run)}. Wait for it, or stop it.") from None
    except OSError as error:
        raise files.file_error(error, run / LOCK, "locked") from error
    return lock


def _holder(run: Path) -> str:
    """Return which command holds a run, and since when."""
    try:
        told = json.loads((run / HOLDER).read_text(encoding="utf-8"))
        return "{command} (process {process}) has been writing it since {since}".format(**told)
    except (OSError, ValueError, LookupError, TypeError):
        return "another process is writing it"


def is_held(run: Path) -> bool:
    """Say whether another process writes a run."""
    if run.resolve() in _HELD or not (run / LOCK).is_file() or (run / LOCK).is_symlink():
        return False
    try:
        _acquired(run, 0).release()
    except RunError:
        return True
    except FileError:  # no permission to lock, so the lock cannot be tested
        pass
    return False


def need_own(path: Path) -> None:
    """Raise RunError for a symbolic link, by which a change could reach files outside the run."""
    if path.is_symlink():
        raise RunError(
            "a run must hold no symbolic links",
            f"{path} -> {os.readlink(path)}",
            "delete the link, or put a copy in its place",
        )


class Scratch:
    """The files of a stage in training, which this process writes."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder

    def clear(self) -> None:
        """Remove leftovers of a kill or of a pruned stage of this name, before the stage begins."""
        files.make_folder(self.folder)
        self.remove_passing(RECORDS, RESULT)

    def undo(self) -> None:
        """Remove the files of a stage that this process has begun, and its folder."""
        self.remove_passing(RECORDS, RESULT, CONFIG)
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()

    def remove_passing(self, *more: str) -> None:
        """Remove files that only training needs, and more files of the stage."""
        self.remove_scratch()
        for name in (*PASSING, *more):
            files.remove(self.folder / name)

    def remove_scratch(self) -> None:
        """Remove scratch files that a kill has left."""
        own = [self.folder, *(self.folder / name for name in GROWING)]
        for folder in (*own, *(self.run / name for name in CONTENT)):
            with files.reported(folder):
                files.remove_scratch(folder)

    def remove_all_but(self, named: Collection[str]) -> None:
        """Remove checkpoints, moments and best points that ``stage.json`` does not name."""
        for folder in (self.folder / name for name in GROWING):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            with suppress(OSError):  # the folder does not exist, or is not empty
                folder.rmdir()

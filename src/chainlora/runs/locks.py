"""Locks: one process trains a stage, and one process at a time replaces the history.

The operating system releases the locks of a process that ends.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chainlora import files
from chainlora.errors import ChainLoRAError, FileError, RunError
from chainlora.runs.draft import GROWING, PASSING
from chainlora.runs.history import CONFIG, CONTENT, RECORDS, RESULT, History
from chainlora.runs.paths import stage_folder

LOCK = ".lock"
_PATIENCE = 60.0  # seconds to wait for the history, whose replacement takes milliseconds


def take_lock(
    folder: Path, wait: float = 0.2, advice: str = "Wait for it, or give the stage another name."
) -> FileLock:
    """Lock a folder for this process.

    Raises RunError if another process holds the lock for longer than `wait` seconds (`is_in_use`
    holds it for a moment). Raises FileError on a disk without file locks: the marker file that
    filelock would use there stays after a kill.
    """
    need_own(folder / LOCK)
    lock = FileLock(str(folder / LOCK), timeout=wait, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"Cannot lock {folder}: another process is using it. {advice}") from None
    except OSError as error:
        raise files.file_error(error, folder / LOCK, "locked") from error
    return lock


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run inside the context, which must be short."""
    lock = take_lock(run, _PATIENCE, "Wait for it.")
    try:
        yield
    finally:
        lock.release()


def is_in_use(folder: Path) -> bool:
    """Say whether another process holds the lock of a folder."""
    if not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        return False
    try:
        take_lock(folder, wait=0).release()
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


class Claim:
    """A stage of a run, for one process to train.

    Links and kept rows of all stages share folders, in which other processes may write at the same
    time. Only files of this stage are removed there.
    """

    def __init__(self, run: Path, stage: str) -> None:
        self.run, self.stage = run, stage
        self.folder = stage_folder(run, stage)
        self._lock: FileLock | None = None

    def take(self) -> None:
        """Lock the stage. Raises RunError if another process trains it."""
        if self._lock is None:
            files.make_folder(self.folder)
            self._lock = take_lock(self.folder)

    def clear(self) -> None:
        """Remove leftovers of a kill or of a pruned stage of this name, before the stage begins."""
        self.remove_passing(RECORDS, RESULT)

    def undo(self) -> None:
        """Remove the files of a stage that this process has begun."""
        for name in (*PASSING, RECORDS, CONFIG):
            files.remove(self.folder / name)

    def release(self) -> None:
        """Release the lock; remove the folder if it contains only the lock."""
        if self._lock is None:
            return
        with suppress(OSError):
            if [entry.name for entry in self.folder.iterdir()] == [LOCK]:
                files.remove(self.folder)
        self._lock.release()
        self._lock = None

    def tidy(self, history: History) -> None:
        """Remove training files of a finished stage that a kill has left."""
        has_ended = history.find(self.stage) is not None
        if not has_ended or not any((self.folder / name).exists() for name in PASSING):
            return
        with suppress(ChainLoRAError):  # another process holds the stage, or the disk is read-only
            self.take()
            self.remove_passing()
        self.release()

    def remove_passing(self, *more: str) -> None:
        """Remove files that only training needs, and more files of the stage."""
        self.remove_scratch()
        for name in (*PASSING, *more):
            files.remove(self.folder / name)

    def remove_scratch(self) -> None:
        """Remove scratch files of this stage that a kill has left."""
        own = [self.folder, *(self.folder / name for name in GROWING)]
        shared = [self.run / name for name in CONTENT]  # other stages write there at the same time
        for folder in (*own, *shared):
            with files.reported(folder):
                files.remove_scratch(folder, self.stage if folder in shared else "")

    def remove_all_but(self, named: Collection[str]) -> None:
        """Remove checkpoints, moments and best points that ``stage.json`` does not name."""
        for folder in (self.folder / name for name in GROWING):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            with suppress(OSError):  # the folder does not exist, or is not empty
                folder.rmdir()

"""Locks: one process trains a stage, and one process at a time replaces the history.

The operating system releases the locks of a process that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from chainlora import files
from chainlora.errors import FileError, RunError

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

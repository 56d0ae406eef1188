"""Locks: one process trains a stage, and one at a time replaces the history. The system unlocks
what a process held that has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from chainlora import files
from chainlora.errors import FileError, RunError

LOCK = ".lock"
_PATIENCE = 60.0  # seconds for a history, which is replaced in milliseconds


def take_lock(
    folder: Path, wait: float = 0.2, advice: str = "Wait for it, or give the stage another name."
) -> FileLock:
    """Lock a folder for this process.

    Raises RunError where another process holds it for longer than `wait` seconds: one that checks
    whether it is in use holds it for a moment. Raises FileError on a disk without file locks. The
    marker file that filelock takes there instead outlives a killed process.
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
    """Keep a run locked for a moment."""
    lock = take_lock(run, _PATIENCE, "Wait for it.")
    try:
        yield
    finally:
        lock.release()


def is_in_use(folder: Path) -> bool:
    """Say whether another process holds a folder."""
    if not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        return False
    try:
        take_lock(folder, wait=0).release()
    except RunError:
        return True
    except FileError:  # not ours to write in: nobody here can tell
        pass
    return False


def need_own(path: Path) -> None:
    """Raise RunError for a symbolic link in a run: changes must not leave the run."""
    if path.is_symlink():
        raise RunError(
            "a run must hold no symbolic links",
            f"{path} -> {os.readlink(path)}",
            "delete the link, or put a copy in its place",
        )

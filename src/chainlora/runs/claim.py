"""Lock a stage for one process, and remove its training files.

Links and kept rows of all stages share folders, in which other processes may write at the same
time. Only files of this stage are removed there.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from chainlora import files
from chainlora.errors import ChainLoRAError
from chainlora.runs.draft import GROWING, PASSING
from chainlora.runs.history import CONFIG, CONTENT, RECORDS, RESULT
from chainlora.runs.history_file import read_history
from chainlora.runs.locks import LOCK, take_lock
from chainlora.runs.paths import stage_folder


class Claim:
    """A stage of a run, for one process to train."""

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

    def tidy(self) -> None:
        """Remove training files of a finished stage that a kill has left."""
        has_ended = read_history(self.run).find(self.stage) is not None
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

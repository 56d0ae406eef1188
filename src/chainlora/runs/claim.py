"""Lock a stage for one process, and remove its files when that process gives it up.

Links and kept rows are shared by all stages of a run, which others may train meanwhile: only what
this stage wrote is removed there.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from chainlora import files
from chainlora.errors import ChainLoRAError
from chainlora.runs.draft import DRAFT, GROWING, PASSING
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

    @property
    def is_begun(self) -> bool:
        """Say whether the stage was begun, or has ended and left what only its training needed."""
        return (self.folder / DRAFT).is_file()

    def take(self) -> None:
        """Lock the stage. Raises RunError where another process trains it."""
        if self._lock is None:
            files.make_folder(self.folder)
            self._lock = take_lock(self.folder)

    def clear(self) -> None:
        """Remove what a process that was killed before left of a stage that begins, or one of the
        same name that was pruned."""
        self.remove_scratch()
        for name in (*PASSING, RECORDS, RESULT):
            files.remove(self.folder / name)

    def undo(self) -> None:
        """Remove the files of a stage that this process has begun."""
        for name in (*PASSING, RECORDS, CONFIG):
            files.remove(self.folder / name)

    def release(self) -> None:
        """Let other processes train the stage; a folder with nothing but the lock goes."""
        if self._lock is None:
            return
        with suppress(OSError):
            if [entry.name for entry in self.folder.iterdir()] == [LOCK]:
                files.remove(self.folder)
        self._lock.release()
        self._lock = None

    def tidy(self) -> None:
        """Remove what the training of a stage needed that has ended, where a kill left it."""
        has_ended = read_history(self.run).find(self.stage) is not None
        if not has_ended or not any((self.folder / name).exists() for name in PASSING):
            return
        with suppress(ChainLoRAError):  # another process ends the stage, or nobody can write here
            self.take()
            self.remove_passing()
        self.release()

    def remove_passing(self) -> None:
        """Remove what only the training of the stage needed."""
        self.remove_scratch()
        for name in PASSING:
            files.remove(self.folder / name)

    def remove_scratch(self) -> None:
        """Remove what killed writes of this stage left."""
        own = [self.folder, *(self.folder / name for name in GROWING)]
        shared = [self.run / name for name in CONTENT]  # others write there meanwhile
        for folder in (*own, *shared):
            with files.reported(folder):
                files.remove_scratch(folder, self.stage if folder in shared else "")

    def remove_all_but(self, named: Collection[str]) -> None:
        """Remove what ``stage.json`` names no more."""
        for folder in (self.folder / name for name in GROWING):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            with suppress(OSError):  # there is none, or it holds what is named
                folder.rmdir()

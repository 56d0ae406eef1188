"""Who may train a stage: one process, which holds a lock, and what goes when it gives the stage up.

Links and kept rows are shared by all stages of a run, which others may train meanwhile: only what
this stage wrote is removed there.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from chainlora import files
from chainlora.config.staging import HISTORY, exists_in, stage_folder
from chainlora.errors import ChainLoRAError, RunError
from chainlora.runs.draft import DRAFT, GROWING, PASSING, REFERENCE
from chainlora.runs.history import (
    CONFIG,
    CONTENT,
    RECORDS,
    RESULT,
    TOKENIZER,
    History,
    read_history,
)
from chainlora.runs.locks import LOCK, is_in_use, take_lock


class Claim:
    """A stage of a run, for one process to train."""

    def __init__(self, run: Path, stage: str) -> None:
        self.run, self.stage = run, stage
        self.folder = stage_folder(run, stage)
        self._lock: FileLock | None = None
        self._is_new_run = self._is_new = False  # begun by this process

    @property
    def exists(self) -> bool:
        """Say whether the stage was begun and has not ended."""
        return exists_in(self.run) and (self.folder / DRAFT).is_file()

    def take(self) -> None:
        """Lock the stage. Raises RunError where another process trains it."""
        if self._lock is None:
            self._lock = take_lock(self.folder)

    def take_new(self) -> History | None:
        """Lock the folder of a stage that begins; return the history of a run that is there.

        Raises RunError where another process has begun the stage.
        """
        self._is_new_run = not exists_in(self.run)
        files.make_folder(self.folder)
        self.take()
        known = None if self._is_new_run else read_history(self.run)
        if self.exists or (known is not None and known.find(self.stage) is not None):
            rule = "Another process has begun this stage"
            raise RunError(rule, self.folder, "give the same command again")
        self._is_new = True
        self.remove_scratch(is_first=self._is_new_run)  # of a process that was killed before
        for name in (*PASSING, RECORDS, RESULT):  # of that one, or of a stage that was pruned
            files.remove(self.folder / name)
        return known

    def release(self, *, undo: bool = False) -> None:
        """Let other processes train the stage; with `undo`, remove one that this process began."""
        if self._lock is None:
            return
        if undo and self._is_new:
            self._remove_all()
        self._lock.release()
        self._lock = None

    def tidy(self) -> None:
        """Remove what the training of a stage needed that has ended, where a kill left it."""
        has_ended = read_history(self.run).find(self.stage) is not None
        if not has_ended or not any((self.folder / name).exists() for name in PASSING):
            return
        with suppress(ChainLoRAError):  # whoever publishes it does so, or nobody can write here
            self.take()
            self.remove_passing()
        self.release()

    def remove_passing(self) -> None:
        """Remove what only the training of the stage needed."""
        self.remove_scratch()
        for name in PASSING:
            files.remove(self.folder / name)

    def remove_scratch(self, *, is_first: bool = False) -> None:
        """Remove what killed writes left; of the whole run, where this is the first in it."""
        own = [self.folder, *(self.folder / name for name in GROWING)]
        shared = [self.run / name for name in CONTENT]  # others write there meanwhile
        for folder in [*own, *shared, *([self.run] if is_first else [])]:
            with files.reported(folder):
                name = self.stage if folder in shared and not is_first else ""
                files.remove_scratch(folder, name)

    def remove_all_but(self, named: Collection[str]) -> None:
        """Remove what ``stage.json`` names no more."""
        for folder in (self.folder / name for name in GROWING):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if f"{folder.name}/{entry.name}" not in named:
                    files.remove(entry)
            with suppress(OSError):  # there is none, or it holds what is named
                folder.rmdir()

    def _is_shared(self) -> bool:
        """Say whether another process has begun or ended a stage in this run."""
        others = set((self.run / "stages").glob("[!.]*")) - {self.folder}
        if any((path / DRAFT).exists() or is_in_use(path) for path in others):
            return True
        try:
            return exists_in(self.run) and bool(read_history(self.run).own)
        except RunError:
            return True

    def _remove_all(self) -> None:
        """Remove the stage, and first the run where it is new: then nothing names the rest.

        The lock goes last. Where something could not be removed, it says that the rest is a run's.
        """
        is_alone = self._is_new_run and not self._is_shared()
        made = [self.run / name for name in (HISTORY, *CONTENT, TOKENIZER)]
        for path in made if is_alone else ():
            files.remove(path)
        for name in (DRAFT, RECORDS, REFERENCE, CONFIG):
            files.remove(self.folder / name)
        if is_alone and any(path.exists() for path in made):
            return
        with suppress(OSError):
            if [entry.name for entry in self.folder.iterdir()] == [LOCK]:
                files.remove(self.folder / LOCK)
                self.folder.rmdir()
            if is_alone:
                for path in set((self.run / "stages").iterdir()) - {self.folder}:
                    files.remove(path)  # copied for a fork
                (self.run / "stages").rmdir()
                files.remove(self.run / LOCK)
                self.run.rmdir()

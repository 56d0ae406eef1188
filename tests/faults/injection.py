"""Faults at file operations: count them, and at the n-th be killed, tear the write, or raise.

Python announces opening, renaming, making and removing to audit hooks *before* it does them, and a
hook may raise. Two operations are not announced and are wrapped: `os.fsync`, and the writer of
safetensors, which is Rust. Only operations below one folder are counted, so that caches and
temporary files of libraries do not move the numbers.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NAMES = {  # audit events that say a path first
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
}  # fmt: skip


@dataclass
class Injection:
    """What happens at operation number `at` (from 0) below `folder`.

    kind: "count" (nothing), "copy" (what a kill at each operation would leave), "kill", "tear"
    (half of what is written is there, then the kill), "power" (only what was flushed is there, then
    the kill), the name of a signal, sent once, or that of an errno to raise.
    lasting: the errno is raised at every later operation too, removals excepted on a full disk.
    """

    folder: Path
    kind: str = "count"
    at: int = -1
    lasting: bool = False
    operations: list[str] = field(default_factory=list)
    histories: list[tuple[str, str]] = field(default_factory=list)  # a run went through: its text
    _is_busy: bool = False
    _copied: dict[str, bytes] = field(default_factory=dict)
    _durable: Durable | None = None

    def install(self) -> None:
        """Start counting. It cannot be taken back: use it in a process that ends."""
        self.folder = self.folder.resolve()
        if self.kind == "power":
            self._durable = Durable(self.folder)
        sys.addaudithook(self._audit)
        self._wrap_fsync()
        self._wrap_tensors()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_busy:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._operation("open", arguments[0])
        elif event in _NAMES:
            self._operation(event, arguments[0])
            if event == "os.rename":
                self._note_history(Path(arguments[0]), Path(arguments[1]))

    def _note_history(self, old: Path, new: Path) -> None:
        """Note a history that a rename makes a run's: it alone, or with the folder of a new run."""
        if new.name == "history.json":
            self.histories.append((new.parent.name, old.read_text()))
        elif (old / "history.json").is_file():
            self.histories.append((new.name, (old / "history.json").read_text()))

    def _operation(self, name: str, path: Any, tear: Callable[[], None] | None = None) -> None:
        found = self._below(path)
        if found is None:
            return
        number = len(self.operations)
        plain = re.sub(r"\.\d+-\d+\.(new|old)", r".\1", found)  # scratch names have process ids
        self.operations.append(f"{name} {plain}")
        if self.kind == "copy":
            self._copy(number)
        if number == self.at or (self.lasting and number > self.at >= 0):
            self._strike(name, Path(os.fsdecode(path)), tear)

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return None
        full = os.path.abspath(os.fsdecode(path))
        inside = full == str(self.folder) or full.startswith(f"{self.folder}/")
        return os.path.relpath(full, self.folder) if inside else None

    def _strike(self, name: str, path: Path, tear: Callable[[], None] | None) -> None:
        self._is_busy = True
        try:
            if self.kind == "tear":
                self._tear(name, path, tear)
            if self.kind == "power":
                assert self._durable is not None
                self._durable.write(self.folder.with_name(f"{self.folder.name}.durable"))
            if self.kind in ("kill", "tear", "power"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.kind))
                return
            if self.kind == "ENOSPC" and name in ("os.remove", "os.rmdir"):
                return
            if self.kind != "count":
                number = getattr(errno, self.kind)
                raise OSError(number, os.strerror(number), str(path))
        finally:
            self._is_busy = False

    def _copy(self, number: int) -> None:
        """Copy the folder to ``FOLDER.NUMBER``, unless it is as it was copied before."""
        self._is_busy = True
        there = self.folder.rglob("*")
        content = {str(path): path.read_bytes() if path.is_file() else b"" for path in there}
        if content != self._copied:
            self._copied = content
            shutil.copytree(self.folder, f"{self.folder}.{number}")
        self._is_busy = False

    def _tear(self, name: str, path: Path, tear: Callable[[], None] | None) -> None:
        """Leave half of the write that is about to be finished."""
        if tear is not None:
            tear()
        elif name == "open" and path.suffix == ".jsonl":
            with path.open("ab") as file:
                file.write(b'{"event": "st')

    def _wrap_fsync(self) -> None:
        fsync = os.fsync

        def counted(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")

            def halve() -> None:  # of what is being written: lines flushed before stay
                if os.path.isfile(path) and ".new" in path:
                    os.truncate(path, os.path.getsize(path) // 2)

            self._operation("fsync", path, halve)
            fsync(handle)
            if self._durable is not None and self._below(path) is not None:
                self._durable.keep(path)

        os.fsync = counted

    def _wrap_tensors(self) -> None:
        import safetensors.torch as module
        from safetensors import SafetensorError

        save_file = module.save_file

        def counted(tensors: Any, path: Any, metadata: Any = None) -> None:
            def halve() -> None:
                save_file(tensors, path, metadata=metadata)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self._operation("tensors", path, halve)
            except OSError as error:  # as the library says it
                raise SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from None
            save_file(tensors, path, metadata=metadata)

        module.save_file = counted


class Durable:
    """What a disk holds that lost its power: flushed contents, and names as of the last flush.

    A file that was never flushed is empty, a folder that was never flushed has no entries. Handles
    are kept open so that the system reuses no inode.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, tuple[int, bool]]] = {}
        self._handles: list[int] = []
        for path in [folder, *folder.rglob("*")]:
            self.keep(str(path))

    def keep(self, path: str) -> None:
        """Note a file or folder as it is now: it has just been flushed."""
        handle = os.open(path, os.O_RDONLY)
        self._handles.append(handle)
        inode = os.fstat(handle).st_ino
        if os.path.isdir(path):
            entries = os.scandir(path)
            self._folders[inode] = {e.name: (e.inode(), e.is_dir()) for e in entries}
        else:
            with open(path, "rb") as file:
                self._files[inode] = file.read()

    def write(self, target: Path) -> None:
        """Write what is left into a new folder."""
        shutil.rmtree(target, ignore_errors=True)
        self._write(target, os.stat(self.folder).st_ino)

    def _write(self, target: Path, inode: int) -> None:
        target.mkdir()
        for name, (child, is_folder) in self._folders.get(inode, {}).items():
            if is_folder:
                self._write(target / name, child)
            else:
                (target / name).write_bytes(self._files.get(child, b""))

"""Atomic writes, checksums and safe deletion: a file is complete or absent.

A write goes to a scratch file beside its target, is flushed to disk and renamed to the target; then
the folder is flushed. So a kill at any time leaves the old or the new file, and after the call has
returned, so does a power loss. Folders are written in the same way, and renamed before they are
deleted, so a folder under its name is always complete. If a folder replaces another one, for an
instant there is neither.

Scratch names look like ``NAME.123-4.new`` or ``.old``, with the number of the process;
`remove_scratch` deletes those that a killed process left.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chainlora.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

_SCRATCH = re.compile(r"\.(\d+)-\d+\.(new|old)$")  # the first number is the process
_counter = itertools.count()

# Remedies by error number. Other errors have only the system's message.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written, or change its permissions",
    errno.EPERM: "choose a folder that can be written, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTEMPTY: "choose another folder",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EIO: "check the disk",
    errno.EBUSY: "choose a folder inside it",  # a mount point cannot be renamed
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP), "choose a folder on a disk with file locks"
    ),
}


@contextmanager
def reported(path: str | Path, verb: str = "written") -> Iterator[None]:
    """Turn an OSError inside the block into a FileError that names `path`."""
    try:
        yield
    except OSError as error:
        raise file_error(error, path, verb) from error


def file_error(error: OSError, path: str | Path, verb: str) -> FileError:
    """Return a FileError with a remedy for an OSError about `path`."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path")
    reason = error.strerror or " ".join(str(error).split())
    return FileError(f"a file must be {verb}", f"{reason} for {path}", remedy)


# --- writing ---


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably."""
    with replaced_file(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file atomically and durably."""
    write_bytes(path, text.encode("utf-8"))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file atomically and durably."""
    with replaced_file(path) as scratch:
        save_tensors(scratch, tensors, metadata)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file directly, into a scratch folder that is flushed later."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with reported(path):
            path.touch()
            mode = path.stat().st_mode  # from the umask; safetensors would allow only the owner
            save_file(dict(tensors), path, metadata=metadata)
            path.chmod(mode)
    except SafetensorError as error:  # safetensors reports a full disk with it
        raise unwritable(error, path) from error


def unwritable(error: Exception, path: Path) -> FileError:
    """Return a FileError for an error of safetensors while writing."""
    remedy = "free some space, or choose a folder that can be written"
    return FileError("a file must be written", f"{error} for {path}", remedy)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file to a path, atomically and durably."""
    make_folder(path.parent)
    remove_scratch(path.parent, path.name)
    with replaced_file(path) as scratch:
        shutil.copyfile(source, scratch)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path; flush it and rename it to `path`, or delete it after an error."""
    scratch = _scratch(path, ".new")
    with reported(path):
        try:
            yield scratch
            sync_file(scratch)
            # finer than most file systems' clocks: readers detect changes by it
            stamp = time.time_ns()
            os.utime(scratch, ns=(stamp, stamp))
            scratch.replace(path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def replaced_folder(path: Path, *, only_empty: bool = False) -> Iterator[Path]:
    """Yield an empty scratch folder; rename it to `path` at the end, or delete it after an error.

    Raises FileError if writing failed, or with `only_empty` if `path` exists and is not empty.
    """
    path = path.resolve() if path.is_symlink() else path
    scratch, old = _scratch(path, ".new"), _scratch(path, ".old")
    with reported(path):
        make_folder(path.parent)
        scratch.mkdir()
        try:
            yield scratch
            sync_tree(scratch)
            if path.exists():
                path.rmdir() if only_empty else path.rename(old)
            scratch.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(around: Path, name: str) -> Iterator[Path]:
    """Yield an empty scratch folder inside `around`; delete it at the end, unless it was renamed.

    `remove_scratch` with the same `name` deletes folders that a killed process left.
    """
    scratch = _scratch(around / name, ".new")
    with reported(around):
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def put_folder(scratch: Path, path: Path) -> None:
    """Rename a scratch folder to a name by its content; an equal folder that exists stays."""
    with reported(path):
        if path.is_dir():
            if checksums(path) == checksums(scratch):
                return
            remove(path)
        sync_tree(scratch)
        scratch.rename(path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably, unless they exist."""
    with reported(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


# --- removing ---


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists.

    A folder is renamed first, so it is never incomplete under its name; `remove_scratch` deletes
    files that cannot be deleted now.
    """
    if path.is_dir() and not path.is_symlink():
        old = _scratch(path, ".old")
        with suppress(OSError):
            path.rename(old)
            shutil.rmtree(old, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_scratch(folder: Path, name: str = "") -> None:
    """Delete the scratch files and folders of killed writes directly inside a folder.

    Nobody else may write to the folder now; with `name`, nobody else may write that file, and only
    its scratch files are deleted.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if is_scratch(entry.name) and name in ("", _SCRATCH.sub("", entry.name)):
            is_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_folder else entry.unlink()


def remove_killed(path: Path) -> None:
    """Delete what killed processes left of a file or folder beside it.

    Raises FileError if another process of this machine is writing it. A process that began after
    the last write is not that one: it got the id of a killed process.
    """
    import psutil  # a slow import

    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        match = _SCRATCH.search(entry.name)
        if match is not None and entry.name[: match.start()] == path.name:
            number, is_older = int(match[1]), False
            with suppress(psutil.Error, OSError):  # the process or the file no longer exists
                is_older = psutil.Process(number).create_time() < entry.stat().st_mtime
            if is_older and number != os.getpid():
                rule = f"Cannot write {path}: process {number} writes it"
                raise FileError(f"{rule}. Wait for it, or choose another output.")
    with reported(path):
        remove_scratch(path.parent, path.name)


def is_scratch(name: str) -> bool:
    """Return whether a file name is a scratch name."""
    return _SCRATCH.search(name) is not None


def _scratch(path: Path, ending: str) -> Path:
    """Return an unused scratch path beside `path`.

    Checks that it does not exist: in containers, all processes can have the same id.
    """
    names = (f"{path.name}.{os.getpid()}-{number}{ending}" for number in _counter)
    return next(scratch for scratch in map(path.with_name, names) if not os.path.lexists(scratch))


# --- flushing to disk ---


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("r+b") as file:  # Windows only flushes files opened for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk; does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a new folder with all below it to disk, with permissions by the umask.

    Libraries may write files that only their owner can read.
    """
    mode = folder.stat().st_mode & 0o666
    for entry in folder.iterdir():
        if entry.is_dir():
            sync_tree(entry)
        else:
            entry.chmod(mode)
            sync_file(entry)
    sync_folder(folder)


# --- checking ---


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path within it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def check_writable(path: Path) -> None:
    """Raise FileError unless a folder can be made at `path`, or written to if it exists."""
    with reported(path):
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        got = f"{path}, at or below the file {existing}"
        raise FileError("the parents of a folder must be folders", got, "choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        remedy = "choose another or change its permissions"
        raise FileError("a folder must be writable", f"{existing}, which is not", remedy)

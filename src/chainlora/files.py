"""Files that are whole or absent: atomic writes, checksums, safe deletion.

A write goes to a scratch file beside its target, is flushed to disk, and is renamed into place;
then the folder is flushed. So a kill at any instant leaves the old file or the new one, and after
the call returns a power loss does too. A folder is written in the same way, and renamed before it
is deleted: whoever sees a folder by its name sees all of it. Where a folder replaces another, there
is an instant without either.

Scratch names end as in ``NAME.123-4.new`` or ``.old``; `remove_scratch` clears what a killed
process left.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainlora.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

_SCRATCH = re.compile(r"\.(\d+)-\d+\.(new|old)$")  # of the process of this number
_counter = itertools.count()

# What to do about the errors that users meet; for others the system's own words must do.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written, or change its permissions",
    errno.EPERM: "choose a folder that can be written, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EIO: "check the disk",
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


def file_error(error: OSError, path: str | Path, verb: str = "written") -> FileError:
    """Return a FileError in one line for an OSError about `path`."""
    remedy = _REMEDIES.get(error.errno or 0, "check the path")
    reason = error.strerror or " ".join(str(error).split())
    return FileError(f"a file must be {verb} (got {reason} for {path}); {remedy}")


# --- writing ---


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably."""
    with _replaced(path) as scratch, scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file atomically and durably."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replace a safetensors file atomically and durably."""
    with _replaced(path) as scratch:
        save_tensors(scratch, tensors, metadata)
        sync_file(scratch)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file as it comes: into a scratch folder, which is flushed as a whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with reported(path):
            path.touch()
            mode = path.stat().st_mode  # as the umask has it; safetensors gives others no rights
            save_file(dict(tensors), path, metadata=metadata)
            path.chmod(mode)
    except SafetensorError as error:  # how it reports a full disk
        raise unwritable(error, path) from error


def unwritable(error: Exception, path: Path) -> FileError:
    """Return a FileError for what safetensors raises when it cannot write."""
    return FileError(
        f"a file must be written (got {error} for {path}); free some space, or choose a folder "
        "that can be written"
    )


def copy_file(source: Path, path: Path) -> None:
    """Put a copy of a file at a path, atomically and durably."""
    make_folder(path.parent)
    remove_scratch(path.parent, path.name)
    with _replaced(path) as scratch:
        shutil.copyfile(source, scratch)
        sync_file(scratch)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Give a scratch path; rename it to `path` at the end, or remove it after an error."""
    scratch = _scratch(path, ".new")
    with reported(path):
        try:
            yield scratch
            stamp = time.time_ns()  # finer than most systems' own: readers know versions by it
            os.utime(scratch, ns=(stamp, stamp))
            scratch.replace(path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def replaced_folder(path: Path, *, only_empty: bool = False) -> Iterator[Path]:
    """Give an empty scratch folder; put it in place of `path` at the end, or remove it.

    With `only_empty`, raise FileError at the end for a path that is there and is not empty.
    """
    path = path.resolve() if path.is_symlink() else path
    scratch = _scratch(path, ".new")
    with reported(path):
        make_folder(path.parent)
        scratch.mkdir()
        try:
            yield scratch
            _set_modes(scratch)
            sync_tree(scratch)
            _swap(scratch, path, only_empty)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _set_modes(folder: Path) -> None:
    """Give all files below a new folder the rights that the umask gives: other libraries differ."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _swap(scratch: Path, path: Path, only_empty: bool) -> None:
    old = _scratch(path, ".old")
    if path.exists():
        try:
            path.rmdir() if only_empty else path.rename(old)
        except OSError as error:
            if error.errno != errno.EBUSY or any(path.iterdir()):
                raise
            for entry in list(scratch.iterdir()):  # a mount point keeps its name
                shutil.move(entry, path / entry.name)
            sync_tree(path)
            scratch.rmdir()
            return
    try:
        scratch.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(around: Path, name: str) -> Iterator[Path]:
    """Give an empty scratch folder in a folder; what is left of it at the end is removed.

    `name` says whose it is, so that `remove_scratch` clears what a kill of that one left.
    """
    scratch = _scratch(around / name, ".new")
    with reported(around):
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def put_folder(scratch: Path, path: Path) -> None:
    """Give a folder that was filled its name, which is of its content: one that is there and whole
    stays."""
    with reported(path):
        if path.is_dir():
            if checksums(path) == checksums(scratch):
                return
            remove(path)
        _set_modes(scratch)
        sync_tree(scratch)
        scratch.rename(path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably; one that is there already is left as it is."""
    with reported(path):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync_folder(each.parent)


# --- removing ---


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there. A folder is renamed first, so it is never partial.

    What cannot be deleted stays under a scratch name, for `remove_scratch`.
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
    """Delete what killed writes left directly in a folder that nobody else writes to now.

    With `name`, what writes of that file left, which nobody else writes now.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if is_scratch(entry.name) and name in ("", _SCRATCH.sub("", entry.name)):
            is_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_folder else entry.unlink()


def writer_of(path: Path) -> int | None:
    """Return the number of another process of this machine that writes a file or folder now.

    One that began after the last write is another process, which got the number of a killed one.
    """
    import psutil  # takes a while

    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else ():
        found = _SCRATCH.search(entry.name)
        if found is not None and entry.name[: found.start()] == path.name:
            number = int(found[1])
            with suppress(psutil.Error, OSError):  # neither is there any more
                is_older = psutil.Process(number).create_time() < entry.stat().st_mtime
                if is_older and number != os.getpid():
                    return number
    return None


def is_scratch(name: str) -> bool:
    """Say whether a file name is one that a killed write can leave."""
    return _SCRATCH.search(name) is not None


def _scratch(path: Path, ending: str) -> Path:
    """Return a name beside `path` that no other process or call uses, nor a killed one has used: in
    containers, all have the same number."""
    names = (f"{path.name}.{os.getpid()}-{number}{ending}" for number in _counter)
    return next(each for each in map(path.with_name, names) if not os.path.lexists(each))


# --- flushing to disk ---


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("r+b") as file:  # Windows flushes no file that is open for reading alone
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, where the system can (Windows cannot open a folder)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems sync no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders below `folder`, and itself."""
    for entry in folder.iterdir():
        sync_tree(entry) if entry.is_dir() else sync_file(entry)
    sync_folder(folder)


# --- checking ---


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its path within it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in found}


def check_writable(path: Path) -> None:
    """Raise FileError unless a folder can be made at `path`, or be written to if it is there."""
    with reported(path):
        if path.is_symlink() and not path.exists():
            raise FileError(
                f"a folder must not be a symbolic link to nothing (got {path}); "
                "remove the link or make its target"
            )
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise FileError(
            f"a folder must lie in folders (got {path}, at or below the file {there}); "
            "choose another"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise FileError(
            f"a folder must be writable (got {there}, which is not); choose another or change "
            "its permissions"
        )

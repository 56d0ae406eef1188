"""Hashes of large files, remembered in the cache folder so that a file is read once.

A hash holds for a path as long as the file there has the size and the times that it had. A file
changed less than two seconds ago is not remembered, since a second change within the resolution of
its times could go unseen (Git calls such entries racily clean).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from chainlora.errors import FileError
from chainlora.files import make_folder, sha256, write_text

logger = logging.getLogger(__name__)

_RACY_SECONDS = 2.0


def cache_dir() -> Path:
    """Return ``$CHAINLORA_CACHE``, ``$XDG_CACHE_HOME/chainlora`` or ``~/.cache/chainlora``."""
    if own := os.environ.get("CHAINLORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "chainlora"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, remembered while the file is unchanged."""
    before = _state(path)
    note = cache_dir() / "hashes" / hashlib.sha256(before.encode()).hexdigest()
    with suppress(OSError, ValueError):  # none yet, or a damaged one
        if len(known := note.read_text(encoding="utf-8")) == 64:
            return known
    digest = sha256(path)
    status = path.stat()
    age = time.time() - max(status.st_mtime, status.st_ctime)  # below 0 where the clock was set
    if _state(path) == before and age > _RACY_SECONDS:
        try:
            make_folder(note.parent)
            write_text(note, digest)
        except (FileError, OSError) as error:  # the file is read again next time
            logger.debug("a hash is not remembered: %s", error)
    return digest


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, read in parallel and at most once while it is unchanged."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(hash_file, paths))


def _state(path: Path) -> str:
    found = path.stat()  # with ctime, as an mtime can be copied
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

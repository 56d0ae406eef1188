"""Hashes of large files, remembered in the cache folder so that a file is read once.

A hash holds for a path as long as the file there has the size and the times that it had. A file
changed less than two seconds ago is not remembered, since a second change within the resolution of
its times could go unseen (Git calls such entries racily clean).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chainlora.errors import FileError
from chainlora.files import make_folder, sha256, write_json

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
    return hash_files([path])[0]


def hash_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, read in parallel and at most once while it is unchanged."""
    known = _remembered()
    paths = [path.resolve() for path in paths]
    states = [_state(path) for path in paths]

    def digest(path: Path, state: list[int]) -> str:
        *before, found = known.get(str(path), [None])
        return str(found) if before == state else sha256(path)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        digests = list(pool.map(digest, paths, states))
    found = {
        str(path): [*state, digest]
        for path, state, digest in zip(paths, states, digests, strict=True)
        if state == _state(path) and _age(state) > _RACY_SECONDS
    }
    if any(known.get(path) != entry for path, entry in found.items()):
        _remember(known | found)
    return digests


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # ctime: an mtime can be copied


def _age(state: list[int]) -> float:
    """Return the seconds since a file changed; negative where the clock was set back since."""
    return time.time() - max(state[1:]) / 1e9


def _remembered() -> dict[str, list[Any]]:
    try:
        known = json.loads((cache_dir() / "hashes.json").read_text(encoding="utf-8"))
        return {path: entry for path, entry in known.items() if isinstance(entry, list) and entry}
    except (OSError, ValueError, AttributeError):  # none yet, or a damaged one
        return {}


def _remember(known: dict[str, list[Any]]) -> None:
    """Write what is known of the files that are still there."""
    try:
        make_folder(cache_dir())
        there = {path: entry for path, entry in known.items() if os.path.exists(path)}
        write_json(cache_dir() / "hashes.json", there)
    except (FileError, OSError) as error:  # the files are read again next time
        logger.debug("hashes are not remembered: %s", error)

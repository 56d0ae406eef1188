"""Hashes of large files, remembered in the cache folder so that a file is read once.

A hash is remembered for a path together with size, times, inode and device; whatever writes to the
file changes one of them. A file changed less than two seconds ago is not remembered, since a second
change within the resolution of its times could go unseen (Git calls such entries racily clean).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chainlora.errors import FileError
from chainlora.files import make_folder, sha256, write_json

logger = logging.getLogger(__name__)

_RACY_SECONDS = 2.0
_MOST_ENTRIES = 1000


def cache_dir() -> Path:
    """Return ``$CHAINLORA_CACHE``, ``$XDG_CACHE_HOME/chainlora`` or ``~/.cache/chainlora``."""
    if own := os.environ.get("CHAINLORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "chainlora"


def hash_files(paths: list[Path]) -> list[str]:
    """Return the SHA-256 of each file, read in parallel and at most once while it is unchanged."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return list(pool.map(hash_file, paths))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, from the cache where it is unchanged since it was hashed."""
    path = path.resolve()
    entry = _entry(path)
    state = _state(path)
    if (known := _remembered(entry, state)) is not None:
        return known
    digest = sha256(path)
    if state == _state(path) and _age(state) > _RACY_SECONDS:
        _remember(entry, state, digest)
    return digest


def _age(state: dict[str, Any]) -> float:
    """Return the seconds since a file changed; negative where the clock was set back since."""
    return time.time() - max(state["mtime_ns"], state["ctime_ns"]) / 1e9


def _entry(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path)).hexdigest()
    return cache_dir() / "hashes" / f"{name[:32]}.json"


def _state(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {
        "path": str(path),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,  # a copied mtime does not hide a change
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _remembered(entry: Path, state: dict[str, Any]) -> str | None:
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        digest = known.pop("sha256")
        whole = known.pop("check") == _check(state, digest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest if whole and known == state else None


def _remember(entry: Path, state: dict[str, Any], digest: str) -> None:
    try:
        make_folder(entry.parent)
        write_json(entry, state | {"sha256": digest, "check": _check(state, digest)})
        _forget_old(entry.parent)
    except (FileError, OSError) as error:  # the file is read again next time
        logger.debug("a hash is not remembered: %s", error)


def _forget_old(folder: Path) -> None:
    """Delete the older half of the entries once there are many: their files may be long gone."""
    entries = list(folder.glob("*.json"))
    if len(entries) > _MOST_ENTRIES:
        for entry in sorted(entries, key=lambda each: each.stat().st_mtime)[: len(entries) // 2]:
            entry.unlink(missing_ok=True)


def _check(state: dict[str, Any], digest: str) -> str:
    """Return a checksum of a cache entry, so that a damaged one is not believed."""
    text = json.dumps([state, digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

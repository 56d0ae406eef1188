"""The name of a cell: a hash of what its config computes."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from chainlora.config.schema import RunConfig


def config_id(config: RunConfig) -> str:
    """Return twelve hex digits that name what a config computes.

    Hashed are its values other than the defaults, so that a new key with a default renames no cell;
    places and watchers are left out. A file named by the config (rows, a task of the user's own)
    counts by its content. Of a shipped task only the name counts.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True)
    tree.pop("output", None)
    tree["data"].pop("dir", None)
    for key in ("task", "train", "validation", "test"):
        path = Path(tree["data"].get(key) or "")
        if path.is_file():
            tree["data"][key] = _content(path, path.stat().st_mtime_ns)
    for key in ("save_every", "log_every", "trackers"):
        tree.get("train", {}).pop(key, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> str:
    """Return a hash of a file as it was at the time `changed`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

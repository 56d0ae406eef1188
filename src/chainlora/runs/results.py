"""``result.json``: what a run came to, as far as others read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from chainlora.errors import RunError
from chainlora.files import reported
from chainlora.runs.manifest import DAMAGED


@with_config(ConfigDict(extra="allow"))
class _Result(TypedDict):
    """The keys that reports show."""

    metrics: dict[str, dict[str, float]]
    trainable_parameters: int
    peak_memory_mb: int | None
    hardware: dict[str, Any]
    versions: dict[str, str]


def read_result(path: Path) -> dict[str, Any]:
    """Read a ``result.json``. Raises RunError unless it holds values of the kinds that it must."""
    with reported(path, "read"):
        content = path.read_bytes()
    try:
        return dict(TypeAdapter(_Result).validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RunError(
            "result.json must hold a run's result", f"{first['msg']} at {where} in {path}", DAMAGED
        ) from None

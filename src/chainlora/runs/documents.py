"""The JSON files of a run: frozen pydantic models, written whole, read back with a checksum."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from chainlora import files
from chainlora.errors import RunError

INCOMPLETE = "the run is incomplete: copy it whole, or start over"
DAMAGED = "the run is damaged: restore the file from a copy, or start over"

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,79}$")]
Kind = TypeVar("Kind", bound="Document")


def _inside(name: str) -> str:
    if name[:1] == "/" or ".." in PurePosixPath(name).parts:
        raise ValueError("a file outside")
    return name


Sums = dict[Annotated[str, AfterValidator(_inside)], str]
"""SHA-256 of files by their names in a folder, which none of them leaves."""


class Part(BaseModel):
    """A part of a JSON file that a run writes: frozen, of exact types."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


class Document(Part):
    """All that a JSON file says. `remedy` is for one that is damaged."""

    remedy: ClassVar[str] = DAMAGED
    format: ClassVar[int] = 4


def read_part(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file that `write_part` wrote."""
    name = path.name
    try:
        with files.reported(path, "read"):
            text = path.read_bytes()
        tree = json.loads(text)
        found, known = tree.pop("format"), tree.pop("checksum", None)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        rule = f"{name} must be JSON of a run"
        raise RunError(rule, f"{path}: {error}", kind.remedy) from None
    if found != kind.format:
        raise RunError(
            f"{name} must be of format {kind.format}",
            f"{found!r:.40} in {path.parent}",
            "use the version of chainlora that wrote it",
        )
    if known != checksum(tree):
        raise RunError(
            f"{name} must be as the run wrote it", f"another checksum in {path.parent}", kind.remedy
        )
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        got = f"{first['input']!r:.60} for `{where}` in {path.parent}: {first['msg']}"
        raise RunError(f"{name} must hold valid values", got, kind.remedy) from None


def write_part(path: Path, part: Document, *, indent: int | None = None) -> None:
    """Replace a JSON file, whole or not at all, its format first and its checksum last.

    Defaults are left out: the states of a long run name many links.
    """
    tree = part.model_dump(mode="json", exclude_defaults=True)
    whole = {"format": part.format, **tree, "checksum": checksum(tree)}
    files.write_text(path, json.dumps(whole, ensure_ascii=False, indent=indent) + "\n")


def need_file(run: Path, name: str, digest: str) -> Path:
    """Return the path of a file in a run. Raises RunError unless it is as the run wrote it, its
    SHA-256 beginning with `digest`."""
    path, name = run / name, name.removeprefix("stages/")
    if not path.is_file():
        raise RunError(f"a run must hold {name}", f"none in {run}", INCOMPLETE)
    with files.reported(path, "read"):
        found = _sha256(path)
    if not found.startswith(digest):
        raise RunError(f"{name} must be as the run wrote it", f"other bytes in {run}", DAMAGED)
    return path


_SUMS: dict[Path, tuple[tuple[int, ...], str]] = {}  # of files that this process has read


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read again where it is not as it was."""
    found = path.stat()
    version = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    known = _SUMS.get(path.absolute())
    if known is None or known[0] != version:
        known = _SUMS[path.absolute()] = version, files.sha256(path)
    return known[1]


def short_digest(content: object) -> str:
    """Return 16 hexadecimal digits of what a value says as JSON."""
    return checksum(content)[:16]


def checksum(content: object) -> str:
    """Return the SHA-256 of what a value says as JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """Return the time as a run's files note it."""
    return datetime.now(UTC).isoformat(timespec="seconds")

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
"""SHA-256 of files by their names, all inside one folder."""


class Part(BaseModel):
    """A part of a JSON file of a run: frozen, with strict types."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


class Document(Part):
    """The content of a JSON file of a run; `remedy` is the advice for a damaged one."""

    remedy: ClassVar[str] = DAMAGED
    format: ClassVar[int] = 6


def read_part(path: Path, kind: type[Kind]) -> Kind:
    """Read a file of `write_part`. Raises RunError if it is damaged, or has another format."""
    name = path.name
    try:
        with files.reported(path, "read"):
            text = path.read_bytes()
        tree = json.loads(text)
        file_format, file_checksum = tree.pop("format"), tree.pop("checksum", None)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        rule = f"{name} must be JSON of a run"
        raise RunError(rule, f"{path}: {error}", kind.remedy) from None
    if file_format != kind.format:
        rule = f"{name} must be of format {kind.format}"
        got = f"{file_format!r:.40} in {path.parent}"
        raise RunError(rule, got, "use the version of chainlora that wrote it")
    if file_checksum != checksum(tree):
        got = f"another checksum in {path.parent}"
        raise RunError(f"{name} must be as the run wrote it", got, kind.remedy)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        got = f"{first['input']!r:.60} for `{where}` in {path.parent}: {first['msg']}"
        raise RunError(f"{name} must hold valid values", got, kind.remedy) from None


def write_part(path: Path, part: Document, *, indent: int | None = None) -> None:
    """Replace a JSON file atomically; write its format first and its checksum last.

    Default values are left out, because the states of a long run name many links.
    """
    tree = part.model_dump(mode="json", exclude_defaults=True)
    whole = {"format": part.format, **tree, "checksum": checksum(tree)}
    files.write_text(path, json.dumps(whole, ensure_ascii=False, indent=indent) + "\n")


def need_file(run: Path, name: str, digest: str) -> Path:
    """Return the path of a file in a run. Raise RunError unless `digest` begins its SHA-256."""
    path, name = run / name, name.removeprefix("stages/")
    if not path.is_file():
        raise RunError(f"a run must hold {name}", f"none in {run}", INCOMPLETE)
    with files.reported(path, "read"):
        actual = _sha256(path)
    if not actual.startswith(digest):
        raise RunError(f"{name} must be as the run wrote it", f"other bytes in {run}", DAMAGED)
    return path


# version and SHA-256 of files read before
_SUMS: dict[Path, tuple[tuple[int, ...] | None, str]] = {}


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file; read the file only if it has changed since the last time."""
    version, known = version_of(path), _SUMS.get(path.absolute())
    if known is None or version is None or known[0] != version:
        known = _SUMS[path.absolute()] = version, files.sha256(path)
    return known[1]


def version_of(path: Path) -> tuple[int, ...] | None:
    """Return inode, size and times of a file, which change with it; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def short_digest(content: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a value as JSON."""
    return checksum(content)[:16]


def checksum(content: object) -> str:
    """Return the SHA-256 of a value as JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """Return the current time in UTC, as text for files of a run."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The lab's files: what they may say, checked in one line of words, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from chainlora.errors import ConfigError, nearest
from chainlora.files import make_folder, write_text


class Keys(BaseModel):
    """What a file says: frozen, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Keys)


def checked(kind: type[Kind], tree: Any, prefix: str = "") -> Kind:
    """Return what a mapping says; `prefix` goes before its keys. Raises ConfigError: all wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(wrong(error, kind, prefix)) from None


def wrong(error: ValidationError, kind: type[BaseModel], prefix: str = "") -> str:
    """Return everything that is wrong, in one line."""
    said = []
    for item in error.errors():
        key, within = prefix + ".".join(map(str, item["loc"])), kind
        if item["type"] == "extra_forbidden":
            for part in map(str, item["loc"][:-1]):
                within = getattr(within.model_fields.get(part), "annotation", None) or within
            hint = nearest(str(item["loc"][-1]), within.model_fields)
            said.append(f"unknown key `{key}`{hint}")
        elif item["type"] == "value_error":
            said.append(str(item["ctx"]["error"]))
        elif item["type"] == "missing":
            said.append(f"`{key}` must be given (got none)")
        elif item["type"] == "too_short":
            said.append(f"`{key}` must not be empty (got {item['input']!r:.60})")
        else:
            rule = item["msg"].replace("Input should", "must").replace("a valid tuple", "a list")
            said.append(f"`{key}` {rule} (got {item['input']!r:.60})")
    return "; ".join(said)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file, and make its folder: a kill leaves the old file or the new one.

    Raises FileError: it cannot be written.
    """
    make_folder(path.parent)
    write_text(path, text)

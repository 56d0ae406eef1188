"""Base classes of all config sections: frozen, strict about keys, lenient about lists.

A Markdown docstring below each key explains it. docs/config.md and `chainlora schema` are generated
from these docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import PathLike, fspath
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from chainlora.errors import sentence

# Limit of counts and sizes: far larger integers cannot become floats.
LARGEST = 2**31
Count = Annotated[int, Field(ge=1, lt=LARGEST)]
Number = Annotated[int, Field(ge=0, lt=LARGEST)]
_COMMA_LIST = re.compile(r"[\w.]+(\s*,\s*[\w.]+)+")


class Frozen(BaseModel):
    """A model of a file: frozen, and strict about keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Section(Frozen):
    """A part of a config. `None` means off."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield only keys that differ from their default, for a short repr."""
        for key, value in super().__repr_args__():
            if key is None or value != type(self).model_fields[key].get_default():
                yield key, value

    @field_validator("*", mode="before")
    @classmethod
    def _normalize(cls, value: Any, info: ValidationInfo) -> Any:
        """Accept a scalar for a list, ``a, b`` for a list of names, and a `Path` for a string.

        Refuses ``lr: true``, which pydantic would read as 1.0.
        """
        if isinstance(value, PathLike):
            value = fspath(value)
        field = cls.model_fields[str(info.field_name)]
        kinds = set(types_in(field.annotation))
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(p, bool) for p in parts):
            raise PydanticCustomError("number", "a number")
        if isinstance(value, str) and _COMMA_LIST.fullmatch(value) and _expects_list(field, "a"):
            return [name.strip() for name in value.split(",")]
        return [value] if _expects_list(field, value) else value


def refuse_if(wrong: object, rule: str, got: object, remedy: str = "") -> None:
    """Raise ValueError, for use in validators, if a condition is wrong."""
    if wrong:
        raise ValueError(sentence(rule, got, remedy))


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield the plain types in an annotation such as ``tuple[float, ...] | None``."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def _expects_list(field: Any, value: Any) -> bool:
    """Return whether a scalar must become a list of one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    kinds = set(types_in(field.annotation))
    if Ellipsis not in kinds:
        return False
    members = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
    alone = {kind for part in members if get_origin(part) is not tuple for kind in types_in(part)}
    if isinstance(value, str):  # one that is no plain name can be a pattern, if the field takes one
        return str in kinds and (re.fullmatch(r"[\w.]+", value) is not None or str not in alone)
    return bool(kinds & {int, float}) and not alone & {int, float}

"""What all sections of a config share: frozen, strict about keys, lenient about lists.

What a key means stands below it, in Markdown: docs/config.md and `chainlora schema` are made of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import PathLike, fspath
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from chainlora.errors import sentence

LARGEST = 2**31  # of what counts rows or steps, or sizes a tensor; far larger numbers are no floats
Count = Annotated[int, Field(ge=1, lt=LARGEST)]
Number = Annotated[int, Field(ge=0, lt=LARGEST)]
_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)+")


class Frozen(BaseModel):
    """What a file says: frozen, and strict about keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Section(Frozen):
    """A part of a config. `None` means off."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the keys that are not at their default, for a repr of a few lines."""
        for key, value in super().__repr_args__():
            if key is None or value != type(self).model_fields[key].get_default():
                yield key, value

    @field_validator("*", mode="before")
    @classmethod
    def _as_people_write_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Take ``ranks: 8`` for ``[8]``, and a `Path` for its text; refuse ``lr: true``, which
        pydantic takes for 1.0."""
        if isinstance(value, PathLike):
            value = fspath(value)
        field = cls.model_fields[str(info.field_name)]
        kinds = set(types_in(field.annotation))
        parts = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(p, bool) for p in parts):
            raise PydanticCustomError("number", "a number")
        if isinstance(value, str) and _NAMES.fullmatch(value) and _is_due_a_list(field, "a"):
            return [name.strip() for name in value.split(",")]
        return [value] if _is_due_a_list(field, value) else value


def refuse_if(wrong: object, rule: str, got: object, remedy: str = "") -> None:
    """Raise ValueError, as validators do, where something is wrong."""
    if wrong:
        raise ValueError(sentence(rule, got, remedy))


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield the plain types in an annotation such as ``tuple[float, ...] | None``."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def _is_due_a_list(field: Any, value: Any) -> bool:
    """Say whether a value stands alone where several may stand; a plain name is no pattern."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    kinds = set(types_in(field.annotation))
    if Ellipsis not in kinds:
        return False
    members = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
    alone = {kind for each in members if get_origin(each) is not tuple for kind in types_in(each)}
    if isinstance(value, str):
        return str in kinds and (re.fullmatch(r"[\w.]+", value) is not None or str not in alone)
    return bool(kinds & {int, float}) and not alone & {int, float}

"""What all sections of a config share: frozen, strict about keys, lenient about lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)+")


class Section(BaseModel):
    """A part of a config. `None` means off."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, tree: Any) -> Any:
        """Refuse ``lr: true``, which pydantic would take for 1.0."""
        for key, value in tree.items() if isinstance(tree, Mapping) else ():
            field = cls.model_fields.get(key) if isinstance(key, str) else None
            parts = value if isinstance(value, list | tuple) else [value]
            if field is None or not any(isinstance(part, bool) for part in parts):
                continue
            kinds = _kinds(field.annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"`{key}` must be a number (got {value!r}); give one")
        return tree

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, tree: Any) -> Any:
        """Take ``ranks: 8`` for ``[8]`` and ``target_modules: q_proj, v_proj`` for a list."""
        if not isinstance(tree, Mapping):
            return tree
        return {key: _as_list(cls.model_fields.get(key), value) for key, value in tree.items()}


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types in an annotation such as ``tuple[float, ...] | None``."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


def _as_list(field: Any, value: Any) -> Any:
    """Return a list where one is due; names with commas between them are no pattern."""
    if isinstance(value, str) and _NAMES.fullmatch(value) and _is_due_a_list(field, "a"):
        return [name.strip() for name in value.split(",")]
    return [value] if _is_due_a_list(field, value) else value


def _is_due_a_list(field: Any, value: Any) -> bool:
    """Say whether a value stands alone where several may stand; a plain name is no pattern."""
    if field is None or isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    kinds = _kinds(field.annotation)
    if Ellipsis not in kinds:
        return False
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[\w.]+", value) is not None
        return str in kinds and (is_plain or not _takes(field, str))
    return bool(kinds & {int, float}) and not (_takes(field, int) or _takes(field, float))


def _takes(field: Any, kind: type) -> bool:
    """Say whether a field takes one value of a kind, beside a list of them."""
    is_tuple = get_origin(field.annotation) is tuple
    return not is_tuple and kind in get_args(field.annotation)

"""What pydantic finds wrong with a file or keywords, as one line: rule, value, remedy."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from chainlora.config.foreign import foreign_hint
from chainlora.errors import nearest

_KINDS = {
    "tuple": "a list, e.g. [{input}]",
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "model": "a section of keys",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def problems(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """Say everything that is wrong in one line, the members of a union in one sentence.

    `prefix` goes before every key of `root` (``recipe.`` for a section that is read by itself).
    """
    found: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        keys = [part for part in item["loc"] if isinstance(part, str)]
        if item["type"] in ("extra_forbidden", "invalid_key"):
            keys = [str(part) for part in item["loc"]]
            found[_unknown_key(keys, item["input"], root, prefix), ""] = []
        elif item["type"] == "value_error":
            found[str(item["ctx"]["error"]), ""] = []
        elif item["type"] == "missing":
            found[f"`{prefix}{'.'.join(keys)}` must be given (got none); add it", ""] = []
        else:
            named = [key for key in keys if "[" not in key and key not in ("str", "float", "int")]
            place = "".join(f" at position {part}" for part in item["loc"] if isinstance(part, int))
            values = {"input": item["input"], **item.get("ctx", {})}
            kind = _BOUNDS.get(item["type"]) or _KINDS.get(item["type"].partition("_")[0])
            rule = kind.format(**values) if kind else item["msg"][:1].lower() + item["msg"][1:]
            end = f" (got {item['input']!r:.60}{place})"
            found.setdefault((f"`{prefix}{'.'.join(named)}` must be", end), []).append(rule)
    return "; ".join(
        " ".join([begin, " or ".join(rules)]).strip() + end for (begin, end), rules in found.items()
    )


def _unknown_key(keys: Sequence[str], value: Any, root: type[BaseModel], prefix: str) -> str:
    model = root
    for part in keys[:-1]:
        model = (
            next(_models(model.model_fields[part].annotation))
            if part in model.model_fields
            else model
        )
    known, last = list(model.model_fields), keys[-1]
    elsewhere = [
        f"{name}.{last}"
        for name, field in root.model_fields.items()
        for section in _models(field.annotation)
        if last in section.model_fields
    ]
    hint = f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else None
    if hint is None and {"model", "chain", "train"} <= root.model_fields.keys():
        hint = foreign_hint(last, value)
    hint = nearest(last, known) if hint is None else hint
    return f"unknown key `{prefix}{'.'.join(keys)}`{hint}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation such as ``Section``, also in a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)

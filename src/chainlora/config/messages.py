"""What is wrong with a file or keywords, as one line: rule, value, remedy.

Keys of other tools (Axolotl, LLaMA-Factory, TRL, PEFT, torchtune, litgpt) are told what they are
here (``foreign_keys.yaml``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from chainlora.config.section import Section, types_in
from chainlora.config.yaml_text import one_value, parse_yaml
from chainlora.errors import ConfigError, nearest, sentence

_RULES = {
    "list": "a list",
    "tuple": "a list",
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "bool": "true or false",
    "model": "a section of keys",
    "dict": "a section of keys",
    "finite": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


class Called(Section):
    """A section that scripts make by keywords: what is wrong with them is a ConfigError."""

    if not TYPE_CHECKING:  # type checkers read the keys

        def __init__(self, **keys: Any) -> None:
            try:
                super().__init__(**keys)
            except ValidationError as error:
                raise ConfigError(problems(error, type(self))) from None


def problems(error: ValidationError, root: type[BaseModel]) -> str:
    """Say everything that is wrong in one line, the members of a union in one sentence."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for item in _meant(error.errors()):
        if item["type"] in ("extra_forbidden", "invalid_key"):
            *above, key = map(str, item["loc"])  # members of unions have a "[", as may the key
            keys = [*(part for part in above if "[" not in part), key]
            found[_unknown_key(keys, item["input"], root), "", ""] = []
        elif item["type"] == "value_error":
            found[str(item["ctx"]["error"]), "", ""] = []
        elif item["type"] == "missing":
            keys = [part for part in item["loc"] if isinstance(part, str) and "[" not in part]
            at = item["loc"][-1]
            got = f"none at position {at}" if isinstance(at, int) else "none"
            found[f"`{'.'.join(keys)}` must be given", got, "add it"] = []
        else:
            key, remedy = _named(item["loc"], root)
            place = "".join(f" at position {part}" for part in item["loc"] if isinstance(part, int))
            got = f"{item['input']!r:.60}{place}"
            place_and_value = f"`{key}` must be", got, remedy
            found.setdefault(place_and_value, []).append(_rule(item))
    said = [
        sentence(" ".join([begin, " or ".join(rules)]).strip(), got, remedy)
        for (begin, got, remedy), rules in found.items()
    ]
    lists = [text.partition("; known: ")[2] for text in said]
    return "; ".join(
        text.partition("; known: ")[0] if known and known in lists[place + 1 :] else text
        for place, (text, known) in enumerate(zip(said, lists, strict=True))
    )


def _meant(errors: Sequence[Any]) -> Iterator[Any]:
    """Yield errors, without those of a union's plain members where another one comes closer."""
    for item in errors:
        place, member = item["loc"][:-1], item["loc"][-1:]
        depth = len(place)
        closer = (e for e in errors if e["loc"][:depth] == place and len(e["loc"]) > depth + 1)
        if member not in (("str",), ("int",), ("float",)) or next(closer, None) is None:
            yield item


def _rule(item: Any) -> str:
    rule = _RULES.get(item["type"]) or _RULES.get(item["type"].partition("_")[0])
    values = {"input": item["input"], **item.get("ctx", {})}
    bounds = {key: f"{value:g}" for key, value in values.items() if isinstance(value, float)}
    values |= {key: text for key, text in bounds.items() if key != "input"}
    return rule.format(**values) if rule else item["msg"][:1].lower() + item["msg"][1:]


def _named(place: Sequence[int | str], root: type[BaseModel]) -> tuple[str, str]:
    """Return a key's dotted name, and its default in words."""
    model, keys, remedy = root, [], ""
    for part in place:
        field = model.model_fields.get(str(part))
        if field is None:  # a position, or a member of a union
            continue
        keys.append(str(part))
        model = next(_models(field.annotation), model)
        default = field.get_default(call_default_factory=True)
        is_plain = default is None or isinstance(default, int | float | str | tuple)
        remedy = f"its default is {one_value(default)}" if is_plain else ""
    return ".".join(keys), remedy


def _unknown_key(keys: Sequence[str], value: Any, root: type[BaseModel]) -> str:
    model = root
    for part in keys[:-1]:
        if part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation))
    known, last = list(model.model_fields), keys[-1]
    inside = [
        (key, f"{name}.{key}")
        for name, field in root.model_fields.items()
        for section in _models(field.annotation)
        for key in section.model_fields
    ]
    elsewhere = [place for key, place in inside if key == last]
    if not elsewhere and len(keys) == 1:
        close = difflib.get_close_matches(last, [key for key, _ in inside], n=1, cutoff=0.8)
        elsewhere = [place for key, place in inside if key in close and last not in known]
    hint = f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else None
    foreign = foreign_keys().get(last)
    is_whole = {"model", "chain", "train"} <= root.model_fields.keys()
    if hint is None and foreign is not None and (is_whole or foreign.ours is None):
        hint = foreign_hint(last, value)
    elif hint is None and foreign is not None:
        ours = (foreign.ours or "").rpartition(".")[2]
        meant = [name for name in (ours, ours.removesuffix("s")) if name in known]
        hint = f"; did you mean {meant[0]!r}?" if meant else None
    hint = nearest(last, known) if hint is None else hint
    return f"unknown key `{'.'.join(keys)}`{hint}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Return the models in an annotation such as ``Section``, also in a union or a tuple."""
    kinds = (kind for kind in types_in(annotation) if isinstance(kind, type))
    return (kind for kind in kinds if issubclass(kind, BaseModel))


# --- keys of other tools ---


class ForeignKey(BaseModel):
    """One key of other tools (`foreign_keys.yaml` says what each field means)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tools: tuple[str, ...]
    ours: str | None = None
    values: dict[bool | str, str] = {}
    say: str = ""


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    text = files("chainlora.config").joinpath("foreign_keys.yaml").read_text(encoding="utf-8")
    found = {}
    for row in parse_yaml(text):
        meaning = {name: value for name, value in row.items() if name != "keys"}
        for key, tools in row["keys"].items():
            found[key] = ForeignKey(tools=tools.split(), **meaning)
    return found


def foreign_hint(key: str, value: Any = None) -> str | None:
    """Return what to say of a key of another tool and its value; None for a key of none."""
    found = foreign_keys().get(key)
    if found is None:
        return None
    if found.ours is None:
        return f"; there is no such key here: {found.say}"
    is_known = isinstance(value, bool | str) and value in found.values
    ours = f"{found.ours}: {found.values[value]}" if is_known else found.ours
    return f"; here it is `{ours}`" + (f" ({found.say})" if found.say else "")


def foreign_file(tree: Mapping[Any, Any], known: Iterable[str]) -> str | None:
    """Return which keys of a file are another tool's; None for a file with fewer than three."""
    keys = foreign_keys()
    found = [key for key in _flat(tree) if key in keys and key.split(".")[0] not in set(known)]
    if len(found) < 3:
        return None
    ours = ((key, keys[key].ours) for key in found)
    named = [f"{key} (here {here})" if here else f"{key} (none)" for key, here in ours]
    return f"{len(found)} keys of other tools: {', '.join(named)}"


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree; of a list of sections, those of the first."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = value[0]
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name

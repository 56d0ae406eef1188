"""Error messages for config files and keywords, in one line: rule, value, remedy.

For keys of other tools (Axolotl, LLaMA-Factory, TRL, PEFT, torchtune, litgpt), messages name the
key of chainlora (``foreign_keys.yaml``).
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
    """A section that scripts create by keywords; invalid keywords raise ConfigError."""

    if not TYPE_CHECKING:  # type checkers derive the arguments from the keys

        def __init__(self, **keys: Any) -> None:
            try:
                super().__init__(**keys)
            except ValidationError as error:
                raise ConfigError(problems(error, type(self))) from None


def problems(error: ValidationError, root: type[BaseModel]) -> str:
    """Return all problems in one line; rules for the members of a union share a sentence."""
    rules_of: dict[tuple[str, str, str], list[str]] = {}  # by begin, value and remedy
    for item in _relevant(error.errors()):
        begin_value_remedy, rules = _problem(item, root)
        rules_of.setdefault(begin_value_remedy, []).extend(rules)
    texts = [
        sentence(" ".join([begin, " or ".join(rules)]).strip(), got, remedy)
        for (begin, got, remedy), rules in rules_of.items()
    ]
    # A list of known keys is given once, after the last unknown key.
    lists = [text.partition("; known: ")[2] for text in texts]
    return "; ".join(
        text.partition("; known: ")[0] if known and known in lists[place + 1 :] else text
        for place, (text, known) in enumerate(zip(texts, lists, strict=True))
    )


def _problem(item: Any, root: type[BaseModel]) -> tuple[tuple[str, str, str], list[str]]:
    """Return the begin, value and remedy of a pydantic error, and the rule in words."""
    if item["type"] in ("extra_forbidden", "invalid_key"):
        *above, key = map(str, item["loc"])  # members of unions have a "[", as may the key
        keys = [*(part for part in above if "[" not in part), key]
        return (_unknown_key(keys, item["input"], root), "", ""), []
    if item["type"] == "value_error":
        return (str(item["ctx"]["error"]), "", ""), []
    if item["type"] == "missing":
        keys = [part for part in item["loc"] if isinstance(part, str) and "[" not in part]
        last = item["loc"][-1]
        got = f"none at position {last}" if isinstance(last, int) else "none"
        return (f"`{'.'.join(keys)}` must be given", got, "add it"), []
    key, remedy = _key_and_default(item["loc"], root)
    place = "".join(f" at position {part}" for part in item["loc"] if isinstance(part, int))
    return (f"`{key}` must be", f"{item['input']!r:.60}{place}", remedy), [_rule(item)]


def _relevant(errors: Sequence[Any]) -> Iterator[Any]:
    """Yield errors; skip a union's plain member if the error of another member goes deeper."""
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


def _key_and_default(place: Sequence[int | str], root: type[BaseModel]) -> tuple[str, str]:
    """Return a key's dotted name, and a remedy that names its default."""
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
    hint, foreign = "", foreign_keys().get(last)
    is_run = {"model", "chain", "train"} <= root.model_fields.keys()
    if foreign is not None and (is_run or foreign.ours is None):
        hint = foreign_hint(last, value) or ""
    elif foreign is not None:
        ours = (foreign.ours or "").rpartition(".")[2]
        likely = [name for name in (ours, ours.removesuffix("s")) if name in known]
        hint = f"; did you mean {likely[0]!r}?" if likely else ""
    hint = _other_section(last, known, root, is_top=len(keys) == 1) or hint or nearest(last, known)
    return f"unknown key `{'.'.join(keys)}`{hint}"


def _other_section(
    last: str, known: Sequence[str], root: type[BaseModel], *, is_top: bool
) -> str | None:
    """Return a hint if exactly one section has a key of this name, or nearly of this name."""
    inside = [
        (key, f"{name}.{key}")
        for name, field in root.model_fields.items()
        for section in _models(field.annotation)
        for key in section.model_fields
    ]
    elsewhere = [place for key, place in inside if key == last]
    if not elsewhere and is_top:
        close = difflib.get_close_matches(last, [key for key, _ in inside], n=1, cutoff=0.8)
        elsewhere = [place for key, place in inside if key in close and last not in known]
    return f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation, also inside a union or a tuple."""
    kinds = (kind for kind in types_in(annotation) if isinstance(kind, type))
    return (kind for kind in kinds if issubclass(kind, BaseModel))


# --- keys of other tools ---


class ForeignKey(BaseModel):
    """A key of other tools; `foreign_keys.yaml` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tools: tuple[str, ...]
    ours: str | None = None
    values: dict[bool | str, str] = {}
    say: str = ""


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    """Return all known keys of other tools, by name."""
    text = files("chainlora.config").joinpath("foreign_keys.yaml").read_text(encoding="utf-8")
    foreign = {}
    for row in parse_yaml(text):
        meaning = {name: value for name, value in row.items() if name != "keys"}
        for key, tools in row["keys"].items():
            foreign[key] = ForeignKey(tools=tools.split(), **meaning)
    return foreign


def foreign_hint(key: str, value: Any = None) -> str | None:
    """Return a hint for a key and value of another tool; None if no tool has this key."""
    foreign = foreign_keys().get(key)
    if foreign is None:
        return None
    if foreign.ours is None:
        return f"; there is no such key here: {foreign.say}"
    is_known = isinstance(value, bool | str) and value in foreign.values
    ours = f"{foreign.ours}: {foreign.values[value]}" if is_known else foreign.ours
    return f"; here it is `{ours}`" + (f" ({foreign.say})" if foreign.say else "")


def foreign_file(tree: Mapping[Any, Any], known: Iterable[str]) -> str | None:
    """Return the keys of other tools in a file, as text; None if there are fewer than three."""
    keys = foreign_keys()
    foreign = [key for key in _flat(tree) if key in keys and key.split(".")[0] not in set(known)]
    if len(foreign) < 3:
        return None
    ours = ((key, keys[key].ours) for key in foreign)
    named = [f"{key} (here {here})" if here else f"{key} (none)" for key, here in ours]
    return f"{len(foreign)} keys of other tools: {', '.join(named)}"


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a tree; in a list of sections, only of the first section."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = value[0]
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name

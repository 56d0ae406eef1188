"""Keys that people know from other tools: what they are called here, and whole files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from chainlora.config.yaml_text import dump_yaml, parse_yaml

_MANY = 3  # foreign keys in one file: it was written for another tool
_RECOGNISED = ("alpaca", "sharegpt", "chat_template", "completion")  # types that `auto` finds
_NO_TOOL = "not a key of chainlora, nor of the tools it knows"


class ForeignKey(BaseModel):
    """One key of other tools (`foreign_keys.yaml` says what each field means)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tools: tuple[str, ...]
    ours: str | None = None
    how: Literal["same", "list", "number", "names", "path", "first", "second"] = "same"
    values: dict[bool | str, str] = {}
    nothing: tuple[bool | int | str, ...] = ()
    say: str = ""


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    """Return every known key of other tools."""
    text = files("chainlora.config").joinpath("foreign_keys.yaml").read_text(encoding="utf-8")
    return {key: ForeignKey.model_validate(entry) for key, entry in parse_yaml(text).items()}


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
    """Return what is to say of a file that was written for another tool; None for one of ours."""
    keys = foreign_keys()
    found = [key for key in tree if key in keys and key not in set(known)]
    if len(found) < _MANY:
        return None
    named = [
        f"{key} (here {keys[key].ours})" if keys[key].ours else f"{key} (none)" for key in found
    ]
    return f"{len(found)} keys of other tools: {', '.join(named)}"


def convert(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our tree for a flat config of another tool, and a line for each key that is lost.

    Its one LoRA becomes a chain of one link.
    """
    made: dict[str, str] = {}
    ours: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in tree.items():
        if value is None:
            continue
        reason = _convert_key(str(key), value, ours, made)
        if reason:
            lost.append(f"{key}: {_shown(value)} – {reason}")
    if "quantize" in ours:
        _set(ours, "chain.hold", "carried")  # a quantised weight cannot hold a link
    chain = ours.get("chain", {})
    if "steps" in chain and "epochs" in chain:
        lost.append(f"{made['chain.epochs']}: {_shown(chain.pop('epochs'))} – the steps end it")
    return _ordered(ours), lost


def converted_text(tree: Mapping[str, Any], name: str) -> str:
    """Return our YAML for a flat config of another tool, and a comment for each key lost."""
    ours, lost = convert(tree)
    lines = [f"# Converted from {name}. One LoRA is a chain of one link; give chain.ranks and"]
    lines.append("# chain.epochs (or steps) more entries for a longer one.")
    comments = ["", "# Without an equivalent:"] if lost else []
    comments += [f"# {line}" for line in lost]
    return "\n".join([*lines, dump_yaml(ours).rstrip() if ours else "", *comments]) + "\n"


def keys_page() -> str:
    """Return docs/keys.md."""
    lines = [
        "# Keys people know",
        "",
        "What keys of other tools are called here. `chainlora convert-config FILE` rewrites a",
        "whole file, with a comment for each key that has no equivalent. This page is the output",
        "of `chainlora convert-config --keys`; errors about unknown keys read the same table,",
        "`src/chainlora/config/foreign_keys.yaml`.",
        "",
        "| key | of | here | |",
        "|---|---|---|---|",
    ]
    for key, entry in sorted(foreign_keys().items()):
        here = f"[`{entry.ours}`](config.md)" if entry.ours else "–"
        lines.append(f"| `{key}` | {', '.join(entry.tools)} | {here} | {_notes(entry)} |")
    return "\n".join(lines) + "\n"


def _notes(entry: ForeignKey) -> str:
    values = ", ".join(
        f"`{_shown(theirs)}` is `{ours}`" for theirs, ours in entry.values.items() if theirs != ours
    )
    return "; ".join(filter(None, (entry.say, values)))


def _convert_key(key: str, value: Any, ours: dict[str, Any], made: dict[str, str]) -> str:
    """Set our key, or return why there is none."""
    entry = foreign_keys().get(key)
    if entry is None:
        return _NO_TOOL
    if any(_is_same(value, each) for each in entry.nothing):
        return ""
    if entry.ours is None:
        return entry.say
    if entry.values and not isinstance(value, list):
        known = isinstance(value, bool | str) and value in entry.values
        if not known and entry.how != "names":
            asked = ", ".join(_shown(each) for each in entry.values)
            return f"{entry.ours} knows no such value; convertible: {asked}"
        value = entry.values[value] if known else value
    if entry.how in ("first", "second"):
        pair = _get(ours, entry.ours) or [0.9, 0.999]
        pair[entry.how == "second"] = value
        _set(ours, entry.ours, pair)
        return ""
    if entry.ours in made:
        return f"{entry.ours} is there already, from {made[entry.ours]}"
    converted, rest = _CONVERTED[entry.how](value)
    if converted is None:
        return rest
    _set(ours, entry.ours, converted)
    made[entry.ours] = key
    return rest


def _is_same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _list(value: Any) -> tuple[Any, str]:
    return (value if isinstance(value, list) else [value]), ""


def _number(value: Any) -> tuple[Any, str]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value, ""
    return None, "give a number of steps, 1 or more"


def _names(value: Any) -> tuple[Any, str]:
    if isinstance(value, str) and "," in value:
        return [name.strip() for name in value.split(",")], ""
    return value, ""


def _path(value: Any) -> tuple[Any, str]:
    """Take the first of several data sets."""
    first, *others = value if isinstance(value, list) and value else [value]
    path = first.get("path") if isinstance(first, Mapping) else first
    if not isinstance(path, str):
        return None, "give one file, folder or Hub dataset"
    if others:
        return path, "only the first is taken; put the rows into one file"
    asked = first.get("type") if isinstance(first, Mapping) else None
    if asked is not None and asked not in _RECOGNISED:
        return path, f"the type {_shown(asked)} is not read; see data.format for rows"
    return path, ""


_CONVERTED: Mapping[str, Callable[[Any], tuple[Any, str]]] = {
    "same": lambda value: (value, ""),
    "list": _list,
    "number": _number,
    "names": _names,
    "path": _path,
}


def _get(tree: Mapping[str, Any], dotted: str) -> Any:
    section, _, key = dotted.rpartition(".")
    return (tree.get(section, {}) if section else tree).get(key)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    section, _, key = dotted.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[key] = value


def _ordered(tree: Mapping[str, Any]) -> dict[str, Any]:
    order: Sequence[str] = ("model", "quantize", "data", "chain", "train", "output")
    return {key: tree[key] for key in order if key in tree}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text[1:-1] if isinstance(value, str) and text.isprintable() else text
    return text if len(text) <= 60 else text[:59] + "…"

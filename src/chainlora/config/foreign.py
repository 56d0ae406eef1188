"""Keys of other tools (Axolotl, LLaMA-Factory, TRL, PEFT, torchtune, litgpt), and ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict

from chainlora.config.yaml_text import parse_yaml

_MANY = 3  # foreign keys in one file: it was written for another tool


class ForeignKey(BaseModel):
    """One key of other tools (`foreign_keys.yaml` says what each field means)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tools: tuple[str, ...]
    ours: str | None = None
    values: dict[bool | str, str] = {}
    say: str = ""


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    """Return every known key of other tools."""
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
    if len(found) < _MANY:
        return None
    named = [
        f"{key} (here {keys[key].ours})" if keys[key].ours else f"{key} (none)" for key in found
    ]
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


def keys_table() -> str:
    """Return every known key of other tools and what it is here, as a Markdown table."""
    lines = ["| key | of | here | |", "|---|---|---|---|"]
    for key, entry in sorted(foreign_keys().items()):
        here = f"[`{entry.ours}`](config.md)" if entry.ours else "–"
        values = (f"`{theirs}` is `{ours}`" for theirs, ours in entry.values.items())
        said = "; ".join([*filter(None, [entry.say]), *values])
        lines.append(f"| `{key}` | {', '.join(entry.tools)} | {here} | {said} |")
    return "\n".join(lines) + "\n"

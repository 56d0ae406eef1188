"""Methods as presets: one small YAML file each, and what reads them.

A method is a few config keys over the config of the comparison, never a fork of the training loop;
what differs between two methods is the diff of their files. See `recipe.py` for the section
`recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from chainlora.config.loading import parse_yaml
from chainlora.errors import ConfigError, nearest

_SECTIONS = ("recipe", "data", "chain", "train")


@dataclass(frozen=True)
class Method:
    """A preset: a name, what it is, where it comes from, and the keys it sets."""

    name: str
    description: str
    source: str
    keys: Mapping[str, Any]


def list_methods() -> list[str]:
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files(__package__).iterdir()
        if entry.name.endswith(".yaml")
    )


@cache
def load_method(name: str) -> Method:
    """Read a shipped method. Raises ConfigError for an unknown name (nearest named)."""
    if name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"a method must be a preset's name (got the file {name!r}); write your own under "
            "`methods` of an experiment file, e.g. mine: {preset: chain, recipe: {links: 4}}, "
            "and call `chainlora experiment run`"
        )
    if name not in list_methods():
        raise ConfigError(f"unknown method {name!r}{nearest(name, list_methods())}")
    tree = parse_yaml((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = {section: tree[section] for section in _SECTIONS if section in tree}
    return Method(name, tree["description"], tree["source"], keys)


def merge_trees(*trees: Mapping[str, Any] | None) -> dict[str, Any]:
    """Merge nested mappings into a new one; later ones win, lists and values are replaced."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in (tree or {}).items():
            if isinstance(value, Mapping):
                before = merged.get(key)
                merged[key] = merge_trees(before if isinstance(before, Mapping) else None, value)
            else:
                merged[key] = value
    return merged

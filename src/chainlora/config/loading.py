"""From a YAML file, command-line overrides or a mapping to a checked config, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from chainlora.config.messages import problems
from chainlora.config.schema import LinkConfig, RunConfig
from chainlora.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read a YAML file, apply ``("key.sub", "value")`` overrides (values parsed as YAML), and check
    it.

    Raises:
        ConfigError: unreadable file, unknown key (nearest named), wrong value.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config file must be readable (got {path}: {error.strerror}); check the path"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"config file must be UTF-8 text (got other bytes in {path}); is it a YAML file?"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"config file must be YAML (got {path}{where}: {getattr(error, 'problem', error)}); "
            "correct it there"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file must hold a mapping of keys (got {type(tree).__name__} in {path})"
        )
    for key, value in overrides:
        set_key(tree, key, value)
    return make_config(tree)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; this loader reads it as the number everybody means. A
    key that is there twice is refused: YAML would silently drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if names[position] in names[:position]:
                problem = f"key {names[position]!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML as config files are parsed (``1e-3`` is a number)."""
    return yaml.load(text, _Loader)


def set_key(tree: dict[str, Any], dotted: str, value: str) -> None:
    """Set ``tree["a"]["b"]`` from ``"a.b"``; the value is parsed as YAML."""
    *parents, last = dotted.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise ConfigError(
                f"`{dotted}` must name a key inside a section (got {part!r}, which is a value)"
            )
    try:
        tree[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of `{dotted}` must be YAML (got {value!r}: "
            f"{getattr(error, 'problem', error)}); "
            "quote lists in the shell, e.g. '[8, 8]'"
        ) from None


def make_config(tree: Mapping[str, Any]) -> RunConfig:
    """Check a nested mapping and return the frozen config. Raises ConfigError with every problem in
    one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems(error, RunConfig)) from None


def link_config(**keys: Any) -> LinkConfig:
    """Build a `LinkConfig` with chainlora's one-line errors instead of pydantic's."""
    try:
        return LinkConfig(**keys)
    except ValidationError as error:
        raise ConfigError(problems(error, LinkConfig)) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML; loading it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)

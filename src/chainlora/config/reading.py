"""Read a YAML file, overrides or a mapping into a checked config, and write it as YAML."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from chainlora.config.messages import foreign_file, problems
from chainlora.config.schema import RunConfig, with_flat_model
from chainlora.config.yaml_text import dump_yaml, one_value
from chainlora.config.yaml_text import parse_yaml as parse_yaml
from chainlora.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()
) -> RunConfig:
    """Read a YAML file, override some of its keys, and check it.

    Args:
        path: the file.
        overrides: values by dotted key, as a mapping or as pairs; of equal keys the last one wins:
            ``{"train.lr": 5e-4, "chain.ranks": [8, 4]}``. A string is parsed as YAML, as on the
            command line: ``("chain.ranks", "[8, 4]")``, ``("train.early_stop", "null")``.

    Returns:
        The frozen config.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is wrong.
    """
    tree = read_config(path)
    for key, value in overrides.items() if isinstance(overrides, Mapping) else overrides:
        set_key(tree, key, value)
    return make_config(tree)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the keys of a config file, unchecked. Raises ConfigError for a file of another tool."""
    tree = read_tree(path)
    if tree.keys() >= {"base", "methods"}:
        raise ConfigError(
            "config file must describe one run",
            f"{path}, an experiment",
            f"chainlora experiment run {path} --output DIR",
        )
    unknown = tree.keys() - RunConfig.model_fields.keys() - {"stages"}
    foreign = foreign_file(tree, RunConfig.model_fields) if unknown else None
    if foreign is not None:
        raise ConfigError(
            "config file must have chainlora's keys",
            f"{path} with {foreign}",
            "write a config with chainlora's keys; docs/keys.md lists them by tool",
        )
    if run_of_config(path) is not None:
        leave_out_helpers(tree, path)
    with suppress(ValueError):  # a wrong section is refused with all other problems
        tree = with_flat_model(tree)  # so that options replace its keys
    return tree


def leave_out_helpers(tree: dict[str, Any], path: str | Path) -> None:
    """Remove plug-ins and trackers from a config that another person may have written.

    Plug-ins are code, and trackers send logs with the login of the current user, who must name them
    again.
    """
    tree.pop("plugins", None)
    train = tree.get("train")
    if isinstance(train, dict) and (trackers := train.pop("trackers", None)):
        again = f"--train.trackers '{one_value(trackers):.60}'"
        logger.warning("the trackers in %s are ignored unless you name them again: %s", path, again)


def run_of_config(path: str | Path) -> Path | None:
    """Return the run of a config at ``RUN/stages/NAME/config.yaml``, or None for other paths."""
    path = Path(path).expanduser().absolute()
    run = path.parents[2] if len(path.parents) > 2 else path
    is_inside = path.name == "config.yaml" and path.parent.parent.name == "stages"
    return run if is_inside and (run / "history.json").is_file() else None


def read_tree(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """Read a YAML file with a mapping. Raises ConfigError, which calls the file `what`."""
    path = Path(os.path.expanduser(path))
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        remedy = f"name the rows in a config: data: {{train: {path}}}"
        raise ConfigError(f"{what} must be YAML", f"{path}, rows of data", remedy)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        rule, got = f"{what} must be UTF-8 text", f"other bytes in {path}"
        raise ConfigError(rule, got, "name a YAML file") from None
    except (OSError, ValueError) as error:  # a ValueError: a NUL or half a surrogate in the path
        remedy = "check the path"
        if os.path.isfile(config := path / "stages/main/config.yaml"):
            remedy = f"to use the config of this run: chainlora train {config}"
        got = f"{path}: {getattr(error, 'strerror', error)}"
        raise ConfigError(f"{what} must be readable", got, remedy) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        got = f"{path}{where}: {getattr(error, 'problem', error)}"
        raise ConfigError(f"{what} must be YAML", got, "correct it there") from None
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else "a list" if isinstance(tree, list) else repr(tree)[:40]
        raise ConfigError(f"{what} must hold a mapping of keys", f"{got} in {path}")
    return tree


_NAMES = ("model", "output", "name", "start")


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``tree["a"]["b"]`` from ``"a.b"``; a string is parsed as YAML, without comments."""
    *parents, last = dotted.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            rule = f"`{dotted}` must name a key inside a section"
            raise ConfigError(rule, f"{part!r}, which is a value")
    try:
        parsed = parse_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        got, remedy = getattr(error, "problem", error), "quote lists in the shell, e.g. '[8, 8]'"
        raise ConfigError(
            f"the value of `{dotted}` must be YAML", f"{value!r}: {got}", remedy
        ) from None
    is_text = isinstance(parsed, str) and value.partition(" #")[0].strip() == parsed
    if is_text or (dotted in _NAMES and isinstance(parsed, int | float | date)):
        parsed = str(value).strip()  # a name such as ``runs/try #2``, or ``2026-01-05``
    tree[last] = parsed


def make_config(tree: Mapping[str, Any]) -> RunConfig:
    """Return the frozen config of a mapping. Raises ConfigError with all problems in one line."""
    if "stages" in tree:
        rule = "the config of one run must not have `stages`"
        raise ConfigError(rule, "some", "use `chainlora train`")
    if isinstance(tree, Mapping):  # YAML reads the keys `on:` and `8:` as other types
        tree = {str(key): value for key, value in tree.items()}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems(error, RunConfig)) from None


def dump_config(config: RunConfig) -> str:
    """Return a config as YAML; loading it gives the same config."""
    return dump_yaml(config.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested config as ``{"train.lr": "0.001", …}``, for trackers and tables."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return flat

"""Look up entries of extension tables, load plug-ins, and import optional packages.

A plug-in is a user's file or module that adds entries to the tables; the key `plugins` of a config
names it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from chainlora.errors import ChainLoRAError, ConfigError, nearest
from chainlora.files import sha256

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")


def entry(table: Mapping[str, Entry], key: str, name: str) -> Entry:
    """Return the entry `name` of a table. Raises ConfigError, which names the config key `key`."""
    if name not in table:
        rule, hint = f"`{key}` must be one of {', '.join(sorted(table))}", nearest(name, table)
        got = f"{name!r}{hint}" if "did you mean" in hint else repr(name)
        raise ConfigError(rule, got, "if your own file adds it, name the file in `plugins`")
    return table[name]


def import_optional(
    module: str, needed_by: str, kind: type[ChainLoRAError] = ConfigError
) -> ModuleType:
    """Import a module of an optional package. Raises `kind` if it is not installed or fails."""
    package = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        got = "it is not installed" if isinstance(error, ModuleNotFoundError) else error
        raise kind(
            f"{needed_by} needs the package {package} (got: {got}); "
            f"pip install 'chainlora[{package}]'"
        ) from None


# --- plug-ins ---


def load_plugins(plugins: Iterable[str]) -> None:
    """Import plug-ins, files (``my.py``) and modules (``package.module``), once per process.

    Raises:
        ConfigError: a plug-in cannot be imported.
    """
    for name in plugins:
        _load(name, plugin_digest(name))


def plugin_digest(plugin: str) -> str:
    """Return the SHA-256 of a plug-in's file; empty for a module without a file."""
    try:
        if _is_file(plugin):
            return sha256(Path(plugin).expanduser())
        spec = find_spec(plugin)
        if spec is None:
            raise ModuleNotFoundError("no such module; write a file with its .py")
        return sha256(Path(spec.origin)) if spec.has_location and spec.origin else ""
    except Exception as error:  # `find_spec` imports the parent packages, which can raise anything
        raise _unloadable(plugin, error) from error


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin or "\\" in plugin


@cache
def _load(plugin: str, digest: str) -> None:
    """Import a plug-in; the digest is part of the cache key, so a changed file loads again."""
    try:
        if _is_file(plugin):
            _run(Path(plugin).expanduser().resolve(), f"chainlora_plugin_{digest[:16]}")
        else:
            import_module(plugin)
    except Exception as error:
        raise _unloadable(plugin, error) from error
    logger.warning("loaded plug-in %s", plugin)


def _run(path: Path, name: str) -> None:
    """Import a file as a module of this name, by the recipe in the documentation of importlib."""
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _unloadable(plugin: str, error: Exception) -> ConfigError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return ConfigError(
        f"Cannot load the plug-in {plugin} ({type(error).__name__}: {reason:.200}); correct it, or "
        "leave it out of `plugins`"
    )

"""YAML as chainlora reads it: numbers as people write them, and no key twice.

Everything that a text can do wrong ends as `yaml.YAMLError`: PyYAML's own constructors raise
ValueError, KeyError, AttributeError and more for values such as ``2020-13-45``.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_LARGEST = 2**20  # letters: far more than a person writes, and read in seconds


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; this loader reads it as the number everybody means."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # an alias that stands for itself is then an error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: YAML would silently drop the first."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None):
                raise _problem(f"key {name!r:.40} is not a text", key.start_mark)
            if name in seen:
                raise _problem(f"key {name!r:.40} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number, such as a folder named ``1e5``."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
        list("-+0123456789"),
    )


def _construct_int(loader: _Loader, node: Any) -> int:
    """Refuse ``010``, which YAML 1.1 reads as 8, and ``1:30``, which it reads as 90."""
    if re.match(r"[-+]?0_*[0-9]|.*:", node.value):
        raise _problem(f"{node.value} would be read as another number, or a time", node.start_mark)
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def dump_yaml(tree: Any) -> str:
    """Return a tree as YAML, from which `parse_yaml` gives the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def one_value(value: Any) -> str:
    """Return one value as a line of YAML has it."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says. Raises yaml.YAMLError for all that is wrong with it."""
    if len(text) > _LARGEST:
        raise _problem(f"more than {_LARGEST} characters", None)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of PyYAML's constructors; RecursionError for too many levels
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _problem(f"a value that YAML cannot read: {reason}", None) from None


def _problem(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)

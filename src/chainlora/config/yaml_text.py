"""Read and write YAML: numbers such as ``1e-3`` are numbers, and duplicate keys are errors.

All errors in a text become `yaml.YAMLError`. PyYAML's own constructors also raise ValueError,
KeyError, AttributeError and others, for values such as ``2020-13-45``.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_LARGEST = 2**20  # characters; a text of this size is read in seconds


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number; YAML 1.1 reads it as a string."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # makes a recursive alias an error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys: PyYAML would silently drop the first."""
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None):
                raise _problem(f"key {name!r:.40} is not text", key.start_mark)
            if name in seen:
                raise _problem(f"key {name!r:.40} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as numbers, such as a folder named ``1e5``."""

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
        raise _problem(f"YAML reads {node.value} as another number or a time", node.start_mark)
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def dump_yaml(tree: Any) -> str:
    """Return a tree as YAML text, the inverse of `parse_yaml`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def one_value(value: Any) -> str:
    """Return one value as one line of YAML."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError for every error in it."""
    if len(text) > _LARGEST:
        raise _problem(f"more than {_LARGEST} characters", None)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # from PyYAML's constructors, or RecursionError for deep nesting
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _problem(f"a value that YAML cannot read: {reason}", None) from None


def _problem(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)

"""YAML as chainlora reads it: numbers as people write them, no key twice, no bombs.

Everything that a text can do wrong ends as `yaml.YAMLError`: PyYAML's own constructors raise
ValueError, KeyError, AttributeError and more for values such as ``2020-13-45``.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# More than any file that a person writes; a parser in Python takes a moment for as many.
_MOST_NODES = 100_000  # aliases count as what they stand for
_MOST_LEVELS = 50


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; this loader reads it as the number everybody means."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._count = 0
        self._sizes: dict[int, int] = {}  # of nodes that are whole

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse bombs and circles: an alias counts as all that it stands for."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        before, self._level = self._count, self._level + 1
        if self._level > _MOST_LEVELS:
            raise _problem(f"more than {_MOST_LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise _problem("an alias that stands for itself", mark)
        self._count += self._sizes[id(node)] if is_alias else 1
        if self._count > _MOST_NODES:
            raise _problem(f"more than {_MOST_NODES} values, aliases written out", mark)
        self._sizes.setdefault(id(node), self._count - before)
        self._level -= 1
        return node

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
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of PyYAML's constructors, by the dozen
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _problem(f"a value that YAML cannot read: {reason}", None) from None


def _problem(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)

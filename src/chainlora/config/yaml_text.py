"""YAML as chainlora reads it: numbers as people write them, no key twice, no bombs.

Everything that a text can do wrong ends as `yaml.YAMLError` with a `problem` in words: PyYAML's own
constructors raise ValueError, KeyError, AttributeError and more for values such as ``2020-13-45``.
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
        self._level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _MOST_LEVELS:
            mark = self.peek_event().start_mark
            raise _problem(f"more than {_MOST_LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
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
    """Return what a YAML text says.

    Raises yaml.YAMLError, with a `problem`, for all that is wrong with it.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        reason = f"{error.reason}, #x{error.character:04x} at {error.position}"
        raise _problem(reason, None) from None
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise _problem("too many levels", None) from None
    except Exception as error:  # of PyYAML's constructors, by the dozen
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _problem(f"a value that YAML cannot read: {reason}", None) from None


def _check_size(root: Any) -> None:
    """Count nodes with aliases written out, without writing them out; refuse bombs and circles."""
    sizes: dict[int, int | None] = {}  # None: being counted

    def size(node: Any) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise _problem("an alias that stands for itself", node.start_mark)
        if known:
            return known
        sizes[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
        total = 1 + sum(size(each) for each in flat)
        if total > _MOST_NODES:
            raise _problem(f"more than {_MOST_NODES} values, aliases written out", node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


def _problem(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)

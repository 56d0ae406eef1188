"""What fuzz tests share: how many cases, values of every kind, and what no case may do."""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chainlora.errors import ChainLoRAError

FULL = bool(os.environ.get("CHAINLORA_FULL"))


def fuzz(short: int, full: int):
    """Settings of one test: so many cases, on a busy machine without deadlines."""
    return hypothesis_settings(
        max_examples=full if FULL else short,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def check_error(error: ChainLoRAError) -> None:
    """One line that can be printed, and says what was wrong and what to do."""
    text = str(error)
    assert "\n" not in text, text
    assert any(word in text for word in ("(got ", "(got: ", "unknown ", "give ")), text
    text.encode("utf-8")


@contextmanager
def refusals(*kinds: type[ChainLoRAError]) -> Iterator[None]:
    """Let the block end in an error of these kinds, if it is as `check_error` wants it."""
    try:
        yield
    except kinds as error:
        check_error(error)


# --- what no case may do: write anywhere but where tests write

_watched: list[str] | None = None
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.symlink": 1}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        _watched.append(f"{event} {arguments[0]}")
    is_written = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    place = 0 if is_written else _CHANGES.get(event)
    if place is None or isinstance(path := arguments[place], int):
        return
    folder = arguments[-1] if event in ("os.remove", "os.mkdir", "os.rmdir") else -1
    parent = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    _watched.append(os.path.abspath(os.path.join(parent, os.fsdecode(path))))


sys.addaudithook(_audit)


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Fail where the block writes outside `folder`, or starts another program."""
    global _watched
    allowed = (f"{folder.resolve()}{os.sep}", "/dev/")
    _watched = seen = []
    try:
        yield
    finally:
        _watched = None
    libraries = ("/__pycache__/", "/.hypothesis/")  # what Python and Hypothesis keep
    seen = [path for path in seen if path != str(folder.resolve())]
    outside = [
        p for p in seen if not p.startswith(allowed) and not any(s in f"{p}/" for s in libraries)
    ]
    assert not outside, outside


def guarded(test: Callable[..., None]) -> Callable[..., None]:
    """Run each case of a test `contained` in pytest's folder; the test takes `tmp_path_factory`."""

    @functools.wraps(test)
    def case(*positional: Any, tmp_path_factory: Any, **keys: Any) -> None:
        with contained(tmp_path_factory.getbasetemp()):
            test(*positional, tmp_path_factory=tmp_path_factory, **keys)

    return case


# --- values

WORDS = st.sampled_from(
    ["", "~", "null", "yes", "off", "1e5", "0x_", "2020-13-45", "!!bool foo", "*a", "&a", "<<", "[",
     "{", "- ", "? ", ": ", "'", '"', "|", ">", "%", "@", "`", "\n", "\t", "\x00", "\ud800", "é",
     "all-linear", "auto", "q_proj", "(a+)+$", "../x", "{{ x }}", "1:1:1", ".inf", "-.nan", "1_0"]
)  # fmt: skip
LARGE = st.sampled_from([2**31, 2**63, -(2**64), 10**30, 10**400])
INTEGERS = st.one_of(st.integers(-3, 40), LARGE)
NUMBERS = st.one_of(INTEGERS, st.floats())


def trees(*scalars: Any, names: Any) -> st.SearchStrategy[Any]:
    """Return scalars, and lists and mappings of them."""
    return st.recursive(
        st.one_of(st.none(), st.booleans(), WORDS, *scalars),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=3)
        ),
        max_leaves=6,
    )


TEXTS = st.one_of(st.text(max_size=6), WORDS)
VALUES = trees(NUMBERS, TEXTS, names=st.one_of(TEXTS, st.integers(0, 3)))
# What JSON can say: no infinities, no keys but texts.
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = trees(INTEGERS, FINITE, TEXTS, names=TEXTS)


def plant(tree: Any, path: str, value: Any) -> None:
    """Set a dotted key, whatever is in the way."""
    *parents, last = path.split(".")
    for part in parents:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON tree."""
    found = [path] if path else []
    if not isinstance(tree, dict | list):
        return found
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found += places(value, (*path, key))
    return found


def altered(data: Any, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """Change or delete one or two places of a JSON tree, in place; return it."""
    for _ in range(data.draw(st.integers(1, 2))):
        if found := places(tree):
            *parents, last = data.draw(st.sampled_from(found))
            inner = functools.reduce(operator.getitem, parents, tree)
            inner[last] = data.draw(values)
            if data.draw(st.booleans()):
                del inner[last]
    return tree


def damaged(data: Any, content: bytes, header: int = 300) -> bytes:
    """Change one to three bytes, often of the header, and cut the end off in half of the cases."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        limit = len(changed) if data.draw(st.booleans()) else min(len(changed), header)
        changed[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed) - 1)) :]
    return bytes(changed)

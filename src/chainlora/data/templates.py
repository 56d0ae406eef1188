"""Templates that end: Jinja2's sandbox with a budget of work, and a limit on the clock.

A template comes from somebody else (a task file, a model's folder), and nested loops, recursion or
``10 ** 10 ** 10`` would keep a run busy for ever. Templates of tasks are compiled here and have a
budget, so that they are refused at the same step on every machine. Chat templates are compiled by
transformers, in a sandbox of its own; for them there is the clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from chainlora.config import time_limit as config_time_limit
from chainlora.errors import DataError

MAX_WORK = 4_000_000
"""Turns of loops, and characters or items handed to calls, in one rendering.

The largest rows there are (books) have a million characters or two; Python does this much in a
second or two.
"""
_CALL = 10  # what a call costs beside what is handed to it: about as many turns of a loop
_MAX_BITS = 100_000  # of an integer
_SIZED = (str, bytes, list, tuple, dict)
SECONDS = 20.0
"""For one row of a chat; the longest chats take some hundredths of a second."""


class WorkLimitError(Exception):
    """A template that takes more work than any row should need."""


class _Budget(threading.local):
    left = MAX_WORK


_budget = _Budget()


class LimitedEnvironment(SandboxedEnvironment):
    """A sandbox whose templates must end: loops, calls, filters and operators cost work."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _limited(each) for name, each in self.filters.items()}
        self.filters["_counted"] = _counted
        self.filters["_charged"] = _charged

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = self._filtered("_counted", loop.iter)
        for joined in source.find_all(nodes.Concat):
            joined.nodes = [self._filtered("_charged", each) for each in joined.nodes]
        return super()._generate(source, *args, **options)

    def _filtered(self, name: str, node: Any) -> nodes.Filter:
        found = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        found.set_environment(self)
        return found

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call a function of a template, at a price."""
        _charge_arguments(args, options)
        return super().call(context, function, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator of a template, at the price of what it gives."""
        _charge_operator(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        return _charged(result)


def render_text(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    """Render a template of a `LimitedEnvironment`. Raises WorkLimitError."""
    with budget():
        return "".join(map(_charged, template.generate(context)))


@contextmanager
def budget() -> Iterator[None]:
    """Give templates a new budget of work."""
    _budget.left = MAX_WORK
    yield


def _charge(work: int) -> None:
    _budget.left -= work
    if _budget.left < 0:
        raise WorkLimitError(f"more than {MAX_WORK:,} steps or characters")


def _charged(value: Any) -> Any:
    """Return a value, charging its size."""
    _charge(1 + (len(value) if isinstance(value, _SIZED) else 0))
    return value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of a loop, charging each turn."""
    for item in items:
        _charge(1)
        yield item


def _charge_arguments(args: Iterable[Any], options: Mapping[str, Any]) -> None:
    """Charge a call and the sizes of its arguments, numbers too: they are widths and counts."""
    _charge(_CALL)
    for value in (*args, *options.values()):
        _charged(value)
        if isinstance(value, int) and not isinstance(value, bool):
            _charge(abs(value) if abs(value) > MAX_WORK else 0)


def _charge_operator(operator: str, left: Any, right: Any) -> None:
    """Charge what ``*`` and ``**`` are about to make, before they do."""
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, _SIZED) and isinstance(other, int):
                _charge(len(one) * max(other, 0))
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * right
            if operator == "**"
            else left.bit_length() + right.bit_length()
        )
        if bits > _MAX_BITS:
            raise WorkLimitError(f"an integer of more than {_MAX_BITS:,} bits")


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **options: Any) -> Any:
        _charge_arguments(args, options)
        return function(*args, **options)

    return limited


def time_limit(what: str) -> AbstractContextManager[None]:
    """Raise DataError where `what` takes longer than `SECONDS`.

    Only in the main thread: where rows are encoded, unless a program has a thread for it.
    """

    def error() -> DataError:
        return DataError(
            f"a template must render a row in {SECONDS:g} s (got no end of {what}); simplify it"
        )

    return config_time_limit.time_limit(SECONDS, error)

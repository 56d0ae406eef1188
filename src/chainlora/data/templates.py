"""Templates that end: they are evaluated in a process of their own, which can be killed.

A template comes from somebody else (a task file, a model's folder), and nested loops, recursion or
``'x' * 10**10`` would keep a run busy for ever or fill the memory. No limit inside a process stops
code in C, so another process evaluates them (`template_worker`), in Jinja2's sandbox. It is started
when the first template is needed and kept.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import psutil
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chainlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0
"""For one row; the longest chats take some hundredths of a second."""
MEMORY = 2 << 30
"""Bytes that the process may take; it needs 60 MB."""
_GROUP = 128  # items evaluated at a time: a message costs as much as an item or two
_SCRIPT = Path(__file__).with_name("template_worker.py")
_SYNTAX = ImmutableSandboxedEnvironment()


class Reply(NamedTuple):
    """What the templates of an item gave, or why they did not (and under which key)."""

    value: Any = None
    error: str = ""
    key: str = ""


def evaluate(program: Mapping[str, Any], items: Sequence[Any]) -> list[Reply]:
    """Evaluate the templates of a program for every item (`template_worker` has the forms).

    An item that takes more than `SECONDS` or `MEMORY` gets an error, and so do those behind it.
    Raises DataError for values that are no JSON.
    """
    replies: list[Reply] = []
    for first in range(0, len(items), _GROUP):
        group = items[first : first + _GROUP]
        found = _ask(program, group)
        # Which item it was shows when each is asked for alone; and that the clock was not to blame,
        # which goes on while a process is stopped.
        parts = [found] if found else (_ask(program, [item]) for item in group)
        for part in parts:
            if not part:
                reason = f"no end within {SECONDS:g} s and {MEMORY >> 30} GiB of memory"
                return replies + [Reply(error=reason)] * (len(items) - len(replies))
            replies += part
    return replies


def render_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Mapping[str, Any]]
) -> list[Reply]:
    """Render conversations by the tokenizer's chat template.

    Each is `messages` with arguments of ``apply_chat_template``, such as `tools` and
    `add_generation_prompt`, and of the template. A value is the text, and where the template marks
    the assistant's words the spans of their characters, if `return_assistant_tokens_mask` asks for
    them.
    """
    try:
        templates = {
            name: tokenizer.get_chat_template(tools=[{}] if name else None)
            for name in ("", "tools")
        }
    except ValueError as error:  # none, or several and no default
        return [Reply(error=str(error))] * len(chats)
    items = []
    for chat in chats:
        messages = [{k: v for k, v in each.items() if v is not None} for each in chat["messages"]]
        options = {key: value for key, value in chat.items() if key != "messages"}
        items.append(tokenizer.special_tokens_map | options | {"conversations": [messages]})
    return evaluate({"chat": templates}, items)


def check_template(source: str) -> None:
    """Parse a template. Raises jinja2.TemplateError."""
    _check_names(_SYNTAX.parse(source))


def check_expression(source: str) -> None:
    """Parse an expression. Raises jinja2.TemplateError."""
    parser = Parser(_SYNTAX, source, state="variable")
    found = parser.parse_expression()
    if not parser.stream.eos:
        raise jinja2.TemplateSyntaxError("chunk after expression", parser.stream.current.lineno)
    _check_names(nodes.Template([nodes.Output([found])]))


def _check_names(tree: nodes.Template) -> None:
    """Refuse filters and tests that do not exist; nothing is compiled, as that evaluates parts."""
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        known = _SYNTAX.filters if isinstance(node, nodes.Filter) else _SYNTAX.tests
        if node.name not in known:
            raise jinja2.TemplateAssertionError(f"no filter or test {node.name!r}", node.lineno)


# --- the process ---


class _Worker:
    def __init__(self) -> None:
        self._process: Any = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it
        )

    def ask(self, line: bytes) -> bytes:
        """Return the line that answers, empty or cut where the process ended."""
        done = threading.Event()
        watcher = threading.Thread(target=self._limit_memory, args=(done,), daemon=True)
        watcher.start()
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer: bytes = self._process.stdout.readline()
            return answer
        except OSError:  # it has ended
            return b""
        finally:
            done.set()
            watcher.join()

    def _limit_memory(self, done: threading.Event) -> None:
        with suppress(psutil.Error):  # it has ended
            process = psutil.Process(self._process.pid)
            while not done.wait(0.05):
                if process.memory_info().rss > MEMORY:
                    self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


_lock = threading.Lock()
_worker: _Worker | None = None


def _ask(program: Mapping[str, Any], items: Sequence[Any]) -> list[Reply]:
    """Return what the process replies; nothing where it did not live to reply."""
    global _worker
    message = {"seconds": SECONDS, "program": program, "items": items}
    try:
        line = json.dumps(message, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        rule = "a row must hold texts, numbers, lists and objects"
        raise DataError(rule, error, "correct the row") from None
    with _lock:
        _worker = _worker or _Worker()
        answer = b""
        try:
            answer = _worker.ask(line)
        finally:
            if not answer.endswith(b"\n"):  # it ended, or this was interrupted half-way
                _worker.end()
                _worker = None
    return [Reply(**each) for each in json.loads(answer)] if answer.endswith(b"\n") else []


def _plain(value: Any) -> Any:
    """Return the number of an array's scalar, nothing for bytes, and the text of whatever else is
    no JSON."""
    if isinstance(value, bytes):
        return None
    return value.item() if hasattr(value, "item") else str(value)


def _forget() -> None:
    """Leave the process to the parent after a fork."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


def _end() -> None:
    if _worker is not None:
        _worker.end()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

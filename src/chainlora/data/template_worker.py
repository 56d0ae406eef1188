"""The process that evaluates templates: a script that imports nothing of chainlora.

Every line of its input is a message, ``{"seconds": …, "program": …, "items": […]}``. Every message
gets one line of output, a list of ``{"value": …}`` or ``{"error": …, "key": …}``. A program is one
of

    {"texts": {key: template}, "values": {key: expression}, "each": [key, list, template]}
        of a task's row; `each` renders a template for every item of a list
    {"chat": {"": template, "tools": template}}
        of a conversation, with and without tools

Items that take longer than `seconds` together end this process: a thread in C does so, whatever the
template does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 50_000_000
"""Of what one item gives: a long book, ten times over."""


class _SameDay(datetime):
    """A clock that stands still at the day that Llama 3's templates take where there is none.

    Rows would be other tokens every day, and other rows be held out by the hashes of these.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _SameDay:
        return cls(2024, 7, 26)


def main() -> None:
    """Answer messages until the input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # nobody else writes between the replies
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            program = message["program"]
            if "chat" in program:
                _chat_renderer()  # the import is of nobody's time
            faulthandler.dump_traceback_later(message["seconds"], exit=True, file=nowhere)
            found = [_reply(program, item) for item in message["items"]]
            faulthandler.cancel_dump_traceback_later()  # whoever reads may take its time
            replies.write(b"[" + b",".join(found) + b"]\n")
            replies.flush()


def _reply(program: Mapping[str, Any], item: Any) -> bytes:
    at = {"key": ""}
    random.seed(repr(item))  # the filter `random` gives a row the same text whenever it is read
    try:
        value = _chat(program["chat"], item) if "chat" in program else _row(program, item, at)
        reply = json.dumps({"value": value}, ensure_ascii=False, default=str).encode()
        if len(reply) <= MAX_BYTES:
            return reply
        at["key"], reason = "", f"more than {MAX_BYTES:,} bytes of text"
    except UnicodeEncodeError as error:
        at["key"], reason = "", f"half of a character, {error.object[error.start]!a}"
    except MemoryError:
        at["key"], reason = "", "too little memory"
    except Exception as error:  # whatever the values make the template do
        reason = str(error) or type(error).__name__
    return json.dumps({"error": " ".join(reason.split())[:1000], **at}).encode()


def _chat(templates: Mapping[str, str], item: Mapping[str, Any]) -> Any:
    template = templates["tools" if item.get("tools") else ""]
    found: Any = _chat_renderer()(**item, chat_template=template)
    (text,), spans = found
    return [text, spans[0] if spans else []]


@lru_cache(maxsize=1)
def _chat_renderer() -> Callable[..., Any]:
    """Import the module of transformers that renders chats: alone it takes 0.2 s, not 0.8."""
    found = find_spec("transformers")
    folder = Path(str(found and found.origin)).parent
    for name, path in (("transformers", folder), ("transformers.utils", folder / "utils")):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(path)]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except (ImportError, AttributeError):  # a version in which it needs its packages
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    vars(sys.modules[render_jinja_template.__module__])["datetime"] = _SameDay  # of strftime_now
    return render_jinja_template


def _row(program: Mapping[str, Any], row: Mapping[str, Any], at: dict[str, str]) -> dict[str, Any]:
    """Return what a row gives under each key; `at` says which key is at work."""
    context = {**row, "row": row}
    found: dict[str, Any] = {}
    for key, source in program["texts"].items():
        at["key"] = key
        found[key] = _template(source).render(context)
    for key, source in program["values"].items():
        at["key"] = key
        found[key] = _expression(source)(context)
        if isinstance(found[key], jinja2.Undefined):
            str(found[key])  # raises, with a message that names what is missing
    if "each" in program:
        key, items, source = program["each"]
        at["key"] = key
        each = _template(source)
        values = found[items] if isinstance(found[items], list | tuple) else ()
        found[key] = [each.render({**context, "item": value}) for value in values]
    return found


def _refuse_no_text(value: Any) -> Any:
    if value is None:
        raise jinja2.UndefinedError("a null, or bytes that are no text")
    if isinstance(value, list | tuple | dict):
        raise jinja2.UndefinedError(f"{value!r:.60}, which is no text")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    finalize=_refuse_no_text,
)


@lru_cache(maxsize=1024)
def _template(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=1024)
def _expression(source: str) -> Callable[..., Any]:
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


if __name__ == "__main__":
    main()

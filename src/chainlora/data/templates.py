"""Templates of tasks and chats, in Jinja2's sandbox.

A program is one of

    {"texts": {key: template}, "values": {key: expression}, "each": [key, list, template]}
        of a task's row; `each` renders a template for every item of a list
    {"chat": {"": template, "tools": template}}
        of a conversation, with and without tools

The sandbox keeps templates of other people from running code and from changing a row. It does not
limit time and memory.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chainlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_clock = threading.Lock()  # clock and random state are the program's: one row at a time has them
if hasattr(os, "register_at_fork"):  # a worker is not forked while another thread holds it
    os.register_at_fork(
        before=_clock.acquire, after_in_parent=_clock.release, after_in_child=_clock.release
    )


class _SameDay(datetime):
    """A clock that shows the day that Llama 3's templates take where there is none.

    With the real date, rows would be other tokens every day, and the hashes of their tokens would
    hold out other rows.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _SameDay:
        return cls(2024, 7, 26)


class Reply(NamedTuple):
    """What the templates of an item gave, or why they did not (and under which key)."""

    value: Any = None
    error: str = ""
    key: str = ""


def evaluate(program: Mapping[str, Any], items: Sequence[Any]) -> list[Reply]:
    """Evaluate the templates of a program for every item.

    Raises DataError for values that are no JSON.
    """
    return [_reply(program, _as_json(item)) for item in items]


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


# --- evaluating ---


def _as_json(item: Any) -> Any:
    """Return an item as a JSON file would hold it, so that all readers give a template the same."""
    try:
        return json.loads(json.dumps(item, default=_plain))
    except (TypeError, ValueError, RecursionError) as error:
        rule = "a row must hold texts, numbers, lists and objects"
        raise DataError(rule, error, "correct the row") from None


def _plain(value: Any) -> Any:
    """Return the number of an array's scalar, nothing for bytes, and the text of other objects."""
    if isinstance(value, bytes):
        return None
    return value.item() if hasattr(value, "item") else str(value)


def _reply(program: Mapping[str, Any], item: Any) -> Reply:
    at = {"key": ""}
    try:
        with _clock, _seeded(item):
            value = _chat(program["chat"], item) if "chat" in program else _row(program, item, at)
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
        return Reply(json.loads(text))
    except UnicodeEncodeError as error:
        return Reply(error=f"half of a character, {error.object[error.start]!a}")
    except Exception as error:  # whatever the values make the template do
        reason = str(error) or type(error).__name__
        return Reply(error=" ".join(reason.split())[:1000], key=at["key"])


@contextmanager
def _seeded(item: Any) -> Iterator[None]:
    """Let the filter `random` give an item the same text whenever it is rendered."""
    state = random.getstate()
    random.seed(repr(item))
    try:
        yield
    finally:
        random.setstate(state)


def _chat(templates: Mapping[str, str], item: Mapping[str, Any]) -> Any:
    from transformers.utils import chat_template_utils

    template, names = templates["tools" if item.get("tools") else ""], vars(chat_template_utils)
    names["datetime"], before = _SameDay, names["datetime"]  # `strftime_now` takes no other clock
    try:
        rendered: Any = chat_template_utils.render_jinja_template(**item, chat_template=template)
    finally:
        names["datetime"] = before
    (text,), spans = rendered
    return [text, spans[0] if spans else []]


def _row(program: Mapping[str, Any], row: Mapping[str, Any], at: dict[str, str]) -> dict[str, Any]:
    """Return what a row gives under each key; `at` names the key that is rendered."""
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


# --- checking a source before there are rows ---


def check_template(source: str) -> None:
    """Parse a template. Raises jinja2.TemplateError."""
    _check_names(_ENVIRONMENT.parse(source))


def check_expression(source: str) -> None:
    """Parse an expression. Raises jinja2.TemplateError."""
    parser = Parser(_ENVIRONMENT, source, state="variable")
    found = parser.parse_expression()
    if not parser.stream.eos:
        raise jinja2.TemplateSyntaxError("chunk after expression", parser.stream.current.lineno)
    _check_names(nodes.Template([nodes.Output([found])]))


def _check_names(tree: nodes.Template) -> None:
    """Refuse unknown filters and tests; nothing is compiled, since that evaluates parts."""
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        known = _ENVIRONMENT.filters if isinstance(node, nodes.Filter) else _ENVIRONMENT.tests
        if node.name not in known:
            raise jinja2.TemplateAssertionError(f"no filter or test {node.name!r}", node.lineno)

"""Render the templates of tasks and chats in Jinja2's sandbox; set the chat template of a config.

The sandbox prevents templates from running code and from changing a row. It does not limit time or
memory.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chainlora.config.schema import DataConfig
from chainlora.config.template_names import ENDS, mentions, template_text, with_defaults
from chainlora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_ANSWER = "§answer§"  # a text that no template contains
_clock = threading.Lock()  # clock and random state are global: one row at a time changes them

Part = Callable[[Any, Mapping[str, Any]], Any]
"""Renders one key of an item. Its arguments are the item and the values of earlier keys."""


class Reply(NamedTuple):
    """The values that templates gave for an item, or an error with the key where it occurred."""

    value: Any = None
    error: str = ""
    key: str = ""


def evaluate(parts: Mapping[str, Part], item: Any) -> Reply:
    """Render all parts of an item. Values are converted to JSON types."""
    # Values must not depend on the reader: no bytes, and numbers instead of array scalars.
    item, values, key = json.loads(json.dumps(item, default=_plain)), dict[str, Any](), ""
    try:
        with _clock, _seeded(item):
            for key, part in parts.items():
                text = json.dumps(part(item, values), ensure_ascii=False, default=str)
                values[key] = json.loads(text.encode())
        return Reply(values)
    except Exception as error:  # a template can raise anything
        reason = str(error) or type(error).__name__
        return Reply(error=" ".join(reason.split())[:1000], key=key)


def _plain(value: Any) -> Any:
    """Convert an object for JSON: an array scalar to a number, bytes to None, others to text."""
    if isinstance(value, bytes):
        return None
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def _seeded(item: Any) -> Iterator[None]:
    """Seed the filter `random`, so that an item always renders to the same text."""
    state = random.getstate()
    random.seed(repr(item))
    try:
        yield
    finally:
        random.setstate(state)


# --- tasks ---


def _require_text(value: Any) -> Any:
    if value is None:
        raise jinja2.UndefinedError("a null, or bytes that are not text")
    if isinstance(value, list | tuple | dict):
        raise jinja2.UndefinedError(f"{value!r:.60}, which is not a text")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,
    finalize=_require_text,
)


@lru_cache(maxsize=1024)
def template(source: str) -> jinja2.Template:
    """Compile a template. Raises jinja2.TemplateError."""
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=1024)
def expression(source: str) -> Callable[..., Any]:
    """Compile an expression. Raises jinja2.TemplateError."""
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


# --- chats ---


class _SameDay(datetime):
    """A clock with a fixed day, which is also the default day of Llama 3's templates.

    With the real date, the tokens of a row would change every day, and with their hashes the rows
    that are held out.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _SameDay:
        return cls(2024, 7, 26)


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Mapping[str, Any]) -> Reply:
    """Render a conversation with the tokenizer's chat template.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat: `messages`, arguments of ``apply_chat_template`` such as `tools` and
            `add_generation_prompt`, and arguments of the template.

    Returns:
        A `Reply` whose value is the text and a list of spans of characters. With
        `return_assistant_tokens_mask` these are the spans that the template marks as the
        assistant's, otherwise none.
    """
    from transformers.utils import chat_template_utils

    try:
        template = tokenizer.get_chat_template(tools=[{}] if chat.get("tools") else None)
    except ValueError as error:  # no template, or several without a default
        return Reply(error=str(error))
    messages = [{k: v for k, v in turn.items() if v is not None} for turn in chat["messages"]]
    options = {key: value for key, value in chat.items() if key != "messages"}

    def rendered(item: Mapping[str, Any], values: Mapping[str, Any]) -> list[Any]:
        names = vars(chat_template_utils)
        # `strftime_now` reads this module's `datetime`; no argument replaces it
        names["datetime"], before = _SameDay, names["datetime"]
        try:
            render: Any = chat_template_utils.render_jinja_template
            (text,), spans = render(**item, chat_template=template)
        finally:
            names["datetime"] = before
        return [text, spans[0] if spans else []]

    item = tokenizer.special_tokens_map | options | {"conversations": [messages]}
    reply = evaluate({"chat": rendered}, item)
    return reply if reply.error else Reply(reply.value["chat"])


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Set the chat template of a config and its arguments. Raises ConfigError for unread ones."""
    template = tokenizer.chat_template
    if data.chat_template is not None:
        template = template_text(data.chat_template)
        _warn_of_end(tokenizer, data.chat_template)
    if data.template_arguments and not template:
        rule, got = "`data.template_arguments` need a chat template", "a tokenizer without one"
        raise ConfigError(rule, got, "give data.chat_template, or leave them out")
    for name in data.template_arguments:
        if not mentions(template, name):
            rule = "`data.template_arguments` must be read by the chat template"
            got = f"{name:.40}, which it does not mention"
            raise ConfigError(rule, got, "correct or remove it")
    if isinstance(template, dict):  # one for chats, one for tools, …
        templates = template.items()
        template = {name: with_defaults(t, data.template_arguments) for name, t in templates}
    elif template:
        template = with_defaults(template, data.template_arguments)
    tokenizer.chat_template = template


def _warn_of_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Warn if the end of a turn is several tokens: the model will not stop there by itself."""
    end = ENDS.get(name)
    if end is not None and len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1:
        _log.warning(
            "data.chat_template: %s ends turns with %s, which this tokenizer splits into several "
            "tokens. Chats will not stop there. The templates zephyr and alpaca end turns with "
            "the tokenizer's own %s",
            *(name, end, tokenizer.eos_token),
        )


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token that the chat template writes after an answer: one token or none.

    It often differs from the tokenizer's end of sequence, in particular for base models.
    """
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    reply = render_chat(tokenizer, {"messages": messages})
    text = "" if reply.error else str(reply.value[0])
    _, answer, after = text.rpartition(_ANSWER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []
    return [int(token) for token in ids if token in tokenizer.added_tokens_decoder][:1]


def without_markup(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    """Return the messages of a prompt without the markup of the chat template.

    The result is the user's message alone, or several messages with their roles. It is None if the
    chat template did not write the prompt.
    """
    around = _markup(tokenizer, "user", "assistant", "user")
    if len(around) != 4 or not all(around[1:]) or not prompt.endswith(around[3]):
        return None
    begin, to_assistant, to_user, end = around
    prompt, turns = prompt.removesuffix(end), list[str]()
    # The markup before the first message, with the markup after it if it is a system message.
    begins, system = {begin: ""}, _markup(tokenizer, "system", "user")
    begins |= {system[0]: system[1]} if len(system) == 3 else {}
    longest = max((b for b in begins if prompt.startswith(b)), key=len, default=None)
    if longest is None:
        return None
    prompt = prompt.removeprefix(longest)
    if begins[longest]:
        first, _, prompt = prompt.partition(begins[longest])
        turns.append(f"system: {first}")
    for role, mark in cycle([("user", to_assistant), ("assistant", to_user)]):
        message, is_more, prompt = prompt.partition(mark)
        turns.append(f"{role}: {message}")
        if not is_more:
            break
    return "\n".join(turns) if turns[1:] else turns[0].removeprefix("user: ")


def _markup(tokenizer: PreTrainedTokenizerBase, *roles: str) -> list[str]:
    """Return the text of the chat template before, between and after messages of these roles."""
    messages = [{"role": role, "content": _ANSWER} for role in roles]
    reply = render_chat(tokenizer, {"messages": messages, "add_generation_prompt": True})
    return [] if reply.error else str(reply.value[0]).split(_ANSWER)

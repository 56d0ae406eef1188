"""Templates of tasks and chats, in Jinja2's sandbox, and the chat template that a config gives.

The sandbox keeps templates of other people from running code and from changing a row. It does not
limit time and memory.
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
_ANSWER = "§answer§"  # in no template
_clock = threading.Lock()  # clock and random state are the program's: one row at a time has them

Part = Callable[[Any, Mapping[str, Any]], Any]
"""Renders one key of an item, which it gets with the values of the keys before."""


class Reply(NamedTuple):
    """What the templates of an item gave, or why they did not, and under which key."""

    value: Any = None
    error: str = ""
    key: str = ""


def evaluate(parts: Mapping[str, Part], item: Any) -> Reply:
    """Return what each part gives for an item, as JSON holds it."""
    # All readers give a template the same: no bytes, and numbers instead of scalars of arrays.
    item, found, key = json.loads(json.dumps(item, default=_plain)), dict[str, Any](), ""
    try:
        with _clock, _seeded(item):
            for key, part in parts.items():
                text = json.dumps(part(item, found), ensure_ascii=False, default=str)
                found[key] = json.loads(text.encode())
        return Reply(found)
    except Exception as error:  # whatever the values make the template do
        reason = str(error) or type(error).__name__
        return Reply(error=" ".join(reason.split())[:1000], key=key)


def _plain(value: Any) -> Any:
    """Return the number of an array's scalar, nothing for bytes, and the text of other objects."""
    if isinstance(value, bytes):
        return None
    return value.item() if hasattr(value, "item") else str(value)


@contextmanager
def _seeded(item: Any) -> Iterator[None]:
    """Let the filter `random` give an item the same text whenever it is rendered."""
    state = random.getstate()
    random.seed(repr(item))
    try:
        yield
    finally:
        random.setstate(state)


# --- tasks ---


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
def template(source: str) -> jinja2.Template:
    """Compile a template. Raises jinja2.TemplateError."""
    return _ENVIRONMENT.from_string(source)


@lru_cache(maxsize=1024)
def expression(source: str) -> Callable[..., Any]:
    """Compile an expression. Raises jinja2.TemplateError."""
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)


# --- chats ---


class _SameDay(datetime):
    """A clock that shows the day that Llama 3's templates take where there is none.

    With the real date, rows would be other tokens every day, and the hashes of their tokens would
    hold out other rows.
    """

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _SameDay:
        return cls(2024, 7, 26)


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Mapping[str, Any]) -> Reply:
    """Render a conversation by the tokenizer's chat template.

    It is `messages` with arguments of ``apply_chat_template``, such as `tools` and
    `add_generation_prompt`, and of the template. The value is the text, and where the template
    marks the assistant's words the spans of their characters, if `return_assistant_tokens_mask`
    asks for them.
    """
    from transformers.utils import chat_template_utils

    try:
        template = tokenizer.get_chat_template(tools=[{}] if chat.get("tools") else None)
    except ValueError as error:  # none, or several and no default
        return Reply(error=str(error))
    messages = [{k: v for k, v in each.items() if v is not None} for each in chat["messages"]]
    options = {key: value for key, value in chat.items() if key != "messages"}

    def render(item: Mapping[str, Any], found: Mapping[str, Any]) -> list[Any]:
        names = vars(chat_template_utils)
        # `strftime_now` takes no other clock
        names["datetime"], before = _SameDay, names["datetime"]
        try:
            rendered: Any = chat_template_utils.render_jinja_template(
                **item, chat_template=template
            )
        finally:
            names["datetime"] = before
        (text,), spans = rendered
        return [text, spans[0] if spans else []]

    item = tokenizer.special_tokens_map | options | {"conversations": [messages]}
    reply = evaluate({"chat": render}, item)
    return reply if reply.error else Reply(reply.value["chat"])


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Give a tokenizer the chat template and its arguments of a config, if that has some.

    Raises ConfigError for arguments that no template reads.
    """
    template = tokenizer.chat_template
    if data.chat_template is not None:
        template = template_text(data.chat_template)
        _warn_of_end(tokenizer, data.chat_template)
    if data.template_arguments and not template:
        raise ConfigError(
            "`data.template_arguments` need a chat template (got a tokenizer without one); give "
            "data.chat_template, or leave them out"
        )
    for name in data.template_arguments:
        if not mentions(template, name):
            raise ConfigError(
                f"`data.template_arguments` must be read by the chat template (got {name:.40}, "
                "which it does not mention); correct or remove it"
            )
    if isinstance(template, dict):  # one for chats, one for tools, …
        templates = template.items()
        template = {name: with_defaults(t, data.template_arguments) for name, t in templates}
    elif template:
        template = with_defaults(template, data.template_arguments)
    tokenizer.chat_template = template


def _warn_of_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say that a model will not stop by itself where a turn's end is no token of its own."""
    end = ENDS.get(name)
    if end is not None and len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1:
        _log.warning(
            "data.chat_template: %s ends turns with %s, which is several tokens to this "
            "tokenizer, so that chats do not stop there; zephyr and alpaca end them with its own "
            "%s",
            name,
            end,
            tokenizer.eos_token,
        )


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token that the chat template writes after an answer, if it writes one.

    The model's own end of sequence is often another one, if it is a base model.
    """
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    reply = render_chat(tokenizer, {"messages": said})
    text = "" if reply.error else str(reply.value[0])
    _, found, after = text.rpartition(_ANSWER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [int(token) for token in ids if token in tokenizer.added_tokens_decoder][:1]


def without_markup(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    """Return what is said in a prompt that the chat template wrote, as people read it.

    That is the user's message, or several with their roles. None for another prompt.
    """
    around = _markup(tokenizer, "user", "assistant", "user")
    if len(around) != 4 or not all(around[1:]) or not prompt.endswith(around[3]):
        return None
    begin, to_assistant, to_user, end = around
    prompt, said, begins = prompt.removesuffix(end), list[str](), {begin: ""}
    system = _markup(tokenizer, "system", "user")
    begins |= {system[0]: system[1]} if len(system) == 3 else {}
    found = max((b for b in begins if prompt.startswith(b)), key=len, default=None)
    if found is None:
        return None
    prompt = prompt.removeprefix(found)
    if begins[found]:
        first, _, prompt = prompt.partition(begins[found])
        said.append(f"system: {first}")
    for role, mark in cycle([("user", to_assistant), ("assistant", to_user)]):
        message, is_more, prompt = prompt.partition(mark)
        said.append(f"{role}: {message}")
        if not is_more:
            break
    return "\n".join(said) if said[1:] else said[0].removeprefix("user: ")


def _markup(tokenizer: PreTrainedTokenizerBase, *roles: str) -> list[str]:
    """Return what the chat template writes before, between and after messages of these roles."""
    messages = [{"role": role, "content": _ANSWER} for role in roles]
    reply = render_chat(tokenizer, {"messages": messages, "add_generation_prompt": True})
    return [] if reply.error else str(reply.value[0]).split(_ANSWER)

"""Chats: the model's chat template, loss on what the assistant says."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from chainlora.data.encoding.drafts import Draft, Ids, Span
from chainlora.data.encoding.tokens import TokenReader, common_prefix
from chainlora.data.sources import Row
from chainlora.data.templates import time_limit
from chainlora.errors import DataError

FIELDS = ("messages",)
_READS_TEXT = re.compile(r"arguments\s+is\s+string")  # of a call, by the template itself
_Messages = list[dict[str, Any]]


class ChatEncoder:
    """Rows of `messages`, with `tools` and `chat_template_kwargs` where a row has some."""

    truncation = "error"
    keeps_targets = False

    def __init__(
        self, reader: TokenReader, turns_before: Callable[[Row], int] = lambda row: 0
    ) -> None:
        if not reader.tokenizer.chat_template:
            raise DataError(
                "the tokenizer must have a chat template for rows of `messages` (got none); give "
                "one, as in data.chat_template: zephyr, use a chat model, or write rows of prompt "
                "+ completion"
            )
        self.reader = reader
        self.turns_before = turns_before  # of the assistant, that are read and not learnt
        self.source = str(reader.tokenizer.chat_template)
        self.is_marked = "generation %}" in self.source.replace("-%}", "%}")

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        """Return the rows as tokens. Raises DataError that names a row that cannot be used."""
        chats = [_Chat(self.reader, row) for row in rows]
        for chat in chats:
            chat.check_template_shows_tools()
        skipped = [self.turns_before(row) for row in rows]
        if self.is_marked:
            turns = [chat.marked_turns() for chat in chats]
            return _drafts(chats, turns, skipped)
        texts = [chat.prefix_texts() for chat in chats]
        tokens = iter(self.reader.bare([text for each in texts for text in each]))
        turns = [_prefix_turns([next(tokens) for _ in each]) for each in texts]
        return _drafts(chats, turns, skipped)

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row, and the keys of its messages, that are not read."""
        columns = row.keys() - {"messages", "tools", "chat_template_kwargs", "turns_before"}
        keys = {key for message in row["messages"] for key in message if message[key] is not None}
        return columns | {f"messages[].{key}" for key in keys if key not in self.source}


class _Chat:
    """One conversation, checked, and what the template makes of it."""

    def __init__(self, reader: TokenReader, row: Row) -> None:
        self.reader, self.row = reader, row
        self.messages = _checked_messages(row.get("messages"), row.origin)
        if not _READS_TEXT.search(str(reader.tokenizer.chat_template)):
            self.messages = [_with_parsed_calls(message) for message in self.messages]
        self.tools = _checked_tools(row.get("tools"), row.origin)
        self.arguments = _checked_arguments(row.get("chat_template_kwargs"), reader, row.origin)

    def render(self, messages: _Messages, **options: Any) -> Any:
        """Return what the template makes of messages, as text unless options ask for tokens."""
        place = self.row.origin
        options = self.arguments | {"tokenize": False, "tools": self.tools} | options
        try:
            with time_limit(f"the chat template at {place}"):
                return self.reader.tokenizer.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"messages must suit the model's chat template (got: {reason:.120} at {place}); "
                "correct the row"
            ) from None

    def check_template_shows_tools(self) -> None:
        """Refuse tools and calls that the template would drop in silence."""
        called = [message for message in self.messages if message.get("tool_calls")]
        if not (self.tools or called):
            return
        whole = self.render(self.messages)
        if self.tools and self._renders(whole, self.messages, tools=None):
            self._refuse_ignored("`tools`", "column")
        bare = [
            {key: value for key, value in message.items() if key != "tool_calls"}
            for message in self.messages
        ]
        if called and self._renders(whole, bare):
            self._refuse_ignored("`tool_calls`", "calls")

    def _renders(self, whole: str, messages: _Messages, **options: Any) -> bool:
        """Say whether these give the same text; a template that refuses them does read them."""
        try:
            return bool(self.render(messages, **options) == whole)
        except DataError:
            return False

    def _refuse_ignored(self, what: str, remedy: str) -> None:
        raise DataError(
            f"the model's chat template must show {what} (got a template that ignores them, at "
            f"{self.row.origin}); use a model whose template shows them, or remove the {remedy}"
        )

    def marked_turns(self) -> tuple[Ids, list[Span]]:
        """Return tokens and targets where the template marks turns by ``{% generation %}``."""
        answer = self.render(
            self.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(answer["input_ids"]), [0, *answer["assistant_masks"], 0]
        edges = [at for at in range(1, len(mask)) if mask[at] != mask[at - 1]]
        spans = zip(edges[::2], edges[1::2], strict=True)
        return ids, [(max(begin - 1, 1), stop - 1) for begin, stop in spans]

    def prefix_texts(self) -> list[str]:
        """Return the whole conversation, then for each assistant's turn the text before and after.

        A turn is what the template adds to the conversation before it, if it only adds.
        """
        whole = self.render(self.messages)
        texts = [whole]
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(self.messages[:index], add_generation_prompt=True)
            after = self.render(self.messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    "the chat template must render a conversation as a prefix of the longer one "
                    f"(got other text before turn {index + 1} at {self.row.origin}), or mark turns "
                    "with {% generation %}; end the row with its first assistant turn"
                )
            texts += [before, after.rstrip()]
        return texts

    def draft(self, ids: Ids, spans: list[Span]) -> Draft:
        """Return the row as tokens, its last answer as the reference."""
        spans = [(begin, stop) for begin, stop in spans if stop > begin]
        if not spans:
            raise DataError(
                f"an assistant's turn must tokenise to something (got none at {self.row.origin}); "
                "correct it"
            )
        answers = [each.get("content") for each in self.messages if each["role"] == "assistant"]
        content: Any = [self.messages, self.tools] if self.tools else self.messages
        if self.arguments:
            content = [self.messages, self.tools, self.arguments]
        references = (str(answers[-1] or ""),)
        return Draft(
            self.row.index, self.row.origin, content, [ids], [spans], references=references
        )


def _drafts(
    chats: Sequence[_Chat], turns: Sequence[tuple[Ids, list[Span]]], skipped: Sequence[int]
) -> list[Draft]:
    return [
        chat.draft(ids, spans[skip:])
        for chat, (ids, spans), skip in zip(chats, turns, skipped, strict=True)
    ]


def _prefix_turns(tokens: list[Ids]) -> tuple[Ids, list[Span]]:
    ids, *edges = tokens
    places = [common_prefix(edge, ids) for edge in edges]
    spans = zip(places[::2], places[1::2], strict=True)
    return ids, [(max(begin, 1), stop) for begin, stop in spans]


def _checked_messages(messages: Any, place: str) -> _Messages:
    """Return messages without their nulls, which tables of unlike messages are full of."""
    if not (_is_list(messages) and all(map(_is_message, messages))):
        raise DataError(
            f"`messages` must be a list of objects with role and content (got {messages!r:.80} "
            f"at {place}); correct or remove the row"
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"`messages` must have a turn with role assistant to learn from (got roles "
            f"{[message['role'] for message in messages]} at {place}); remove the row"
        )
    return [_without_parts(message, place) for message in messages]


def _without_parts(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a message without nulls, and with one text for parts of text.

    Templates of language models would write the list itself.
    """
    found = {key: value for key, value in message.items() if value is not None}
    content: Any = found.get("content", "")
    if isinstance(content, str):
        return found
    if not (_is_list(content) and all(map(_is_text_part, content))):
        raise DataError(
            "the content of a message must be a text, or parts of type text (got "
            f"{content!r:.80} at {place}); remove other parts, or the row"
        )
    return found | {"content": "".join(part["text"] for part in content)}


def _is_text_part(part: Any) -> bool:
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
    return is_text and isinstance(part.get("text"), str)


def _with_parsed_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have objects as arguments where they had JSON text.

    A template would quote the text once more.
    """
    calls: Any = message.get("tool_calls")
    if not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        return message
    return message | {"tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return dict(call) | {"function": _parsed_call(inner)}
    try:
        found = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):  # none, or no JSON text
        return dict(call)
    return dict(call) | ({"arguments": found} if isinstance(found, dict) else {})


def _checked_arguments(arguments: Any, reader: TokenReader, place: str) -> dict[str, Any]:
    """Return a row's arguments of the template, which are none of the call that renders it."""
    if not arguments:
        return {}
    of_the_call = inspect.signature(reader.tokenizer.apply_chat_template).parameters
    if not isinstance(arguments, Mapping) or arguments.keys() & of_the_call.keys():
        raise DataError(
            "`chat_template_kwargs` must be an object of names that the template reads (got "
            f"{arguments!r:.80} at {place}); correct or remove it"
        )
    return {key: value for key, value in arguments.items() if value is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and ("content" in message or bool(message.get("tool_calls")))
    )


def _checked_tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, which tables often hold as JSON text; None for none."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools) if tools.strip() else None
        except ValueError:
            found = tools
    if not found:
        return None
    if not (_is_list(found) and all(isinstance(tool, Mapping) for tool in found)):
        raise DataError(
            f"`tools` must be a list of JSON schemas (got {tools!r:.80} at {place}); correct or "
            "remove it"
        )
    return [dict(tool) for tool in found]

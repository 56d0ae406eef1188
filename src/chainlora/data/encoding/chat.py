"""Encode chats with the model's chat template; the assistant's turns are the targets."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from chainlora.config.data import ROW_FIELDS
from chainlora.config.template_names import mentions
from chainlora.data.encoding.tokens import Draft, Ids, Span, TokenReader, common_prefix
from chainlora.data.readers import bad_row, parse_json
from chainlora.data.sources import Row
from chainlora.data.templates import Reply, render_chat
from chainlora.errors import DataError

_COLUMNS = frozenset((*ROW_FIELDS["chat"], "turns_before"))
_NAMES = ("role", "name")  # the keys of a message that are not content
_CHATML = "another chat template, as in data.chat_template: chatml"
_Messages = list[dict[str, Any]]
# tokens, targets, the prompts of the first and the last learned answer (`Draft`)
_Turns = tuple[Ids, list[Span], Ids, Ids]


def need_template(tokenizer: Any) -> None:
    """Raise DataError unless a tokenizer has a chat template."""
    if not tokenizer.chat_template:
        rule = "the tokenizer must have a chat template for rows of `messages`"
        remedy = "begin the run with one, as in data.chat_template: zephyr, use a chat model, or"
        raise DataError(rule, "none", f"{remedy} write rows of prompt + completion")


class ChatEncoder:
    """Encodes rows of `messages`, with optional `tools` and `chat_template_kwargs`.

    If the template marks the assistant's words (``{% generation %}``), the marks are the targets.
    Otherwise the targets are found by rendering prefixes of the conversation.
    """

    truncation = "error"
    keeps_targets = False

    def __init__(
        self, reader: TokenReader, turns_before: Callable[[Row], int] = lambda row: 0
    ) -> None:
        need_template(reader.tokenizer)
        self.reader = reader
        self.turns_before = turns_before  # number of assistant turns that belong to the prompt
        self.source = str(reader.tokenizer.chat_template)
        has_marks = "generation %}" in self.source.replace("-%}", "%}")
        self.is_marked = has_marks and reader.tokenizer.is_fast  # slow ones return no offsets

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        chats = [_Chat(row, self.reader) for row in rows]
        for chat in chats:
            chat.whole, chat.marks = self._whole(chat)
            chat.check_answers(self.turns_before(chat.row))
        turns = self._marked_turns(chats) if self.is_marked else self._prefix_turns(chats)
        return [chat.draft(*turn) for chat, turn in zip(chats, turns, strict=True)]

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row, and keys inside columns, that are not read."""
        given = row.get("chat_template_kwargs") or {}
        parts = {
            f"messages[].{key}": key for m in row["messages"] for key in m if m[key] is not None
        }
        parts |= {f"chat_template_kwargs.{k}": k for k in given if given[k] is not None}
        unread = {place for place, key in parts.items() if not mentions(self.source, key)}
        return (row.keys() - _COLUMNS) | unread

    def _whole(self, chat: _Chat) -> tuple[str, list[Span]]:
        """Return a chat as text, and marked spans. Refuses a template that ignores its tools."""
        reply = chat.render(return_assistant_tokens_mask=self.is_marked)
        if reply.error and chat.fill_contents():
            reply = chat.render(return_assistant_tokens_mask=self.is_marked)
        whole, spans = chat.value(reply)
        without = {"`tools`": chat.render(tools=None)} if chat.tools else {}
        if any(message.get("tool_calls") for message in chat.messages):
            without["`tool_calls`"] = chat.render(
                [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat.messages]
            )
        for name, reply in without.items():
            # A template that fails without the tools does read them.
            if not reply.error and reply.value[0] == whole:
                rule = f"the model's chat template must show {name}"
                got = "a template that ignores them"
                raise bad_row(rule, got, chat.place, f"give {_CHATML}, or remove them")
        return whole, spans

    # --- turns by marks ---

    def _marked_turns(self, chats: Sequence[_Chat]) -> list[_Turns]:
        """Return the turns where ``{% generation %}`` marks them."""
        texts = [chat.whole for chat in chats]
        before = [self._marks_before(chat, self.turns_before(chat.row)) for chat in chats]
        marks = [chat.marks[count:] for chat, count in zip(chats, before, strict=True)]
        encoded = self.reader.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        asked = iter(self.reader.bare([text for chat in chats for text in self._asked(chat)]))
        turns = zip(encoded["input_ids"], encoded["offset_mapping"], marks, strict=True)
        return [
            (list(ids), _covered(offs, spans), next(asked), next(asked))
            for ids, offs, spans in turns
        ]

    def _asked(self, chat: _Chat) -> tuple[str, str]:
        """Return the texts before the first learned turn that answers, and before the last one."""
        first, last = chat.first_answer(self.turns_before(chat.row)), len(chat.turns) - 1
        if first is None:
            return "", ""
        counts = [self._marks_before(chat, place) for place in dict.fromkeys((first, last))]
        starts = [start for count in counts for start, _ in chat.marks[count : count + 1]]
        return (chat.whole[: starts[0]], chat.whole[: starts[-1]]) if starts else ("", "")

    def _marks_before(self, chat: _Chat, count: int) -> int:
        """Return the number of marks in `count` turns of the assistant; a turn can have several."""
        if not count:
            return 0
        messages = chat.messages[: next(iter(chat.turns[count:]), None)]
        reply = chat.render(messages, return_assistant_tokens_mask=True)
        return len(chat.value(reply)[1])

    # --- turns by prefixes ---

    def _prefix_turns(self, chats: Sequence[_Chat]) -> list[_Turns]:
        """Return the turns by comparing prefixes of the conversation."""
        chat_texts = [[chat.whole, *self._edges(chat)] for chat in chats]
        tokens = iter(self.reader.bare([text for texts in chat_texts for text in texts]))
        turns = []
        for chat, texts in zip(chats, chat_texts, strict=True):
            ids, *edges = [next(tokens) for _ in texts]
            begins = [common_prefix(edge, ids) for edge in edges[::2]]
            ends = zip(texts[2::2], edges[1::2], strict=True)
            stops = [self._stop(chat.whole, ids, text, edge) for text, edge in ends]
            before = self.turns_before(chat.row)
            spans = [*zip(begins, stops, strict=True)][before:]
            place = chat.first_answer(before)
            asked = ([], []) if place is None else (edges[2 * place], edges[-2])
            turns.append((ids, [(max(begin, 1), stop) for begin, stop in spans], *asked))
        return turns

    def _stop(self, whole: str, ids: Ids, text: str, edge: Ids) -> int:
        """Return where an answer ends; blanks that share its last token belong to it."""
        if ids[: len(edge)] != edge:
            rest = whole[len(text) :]
            blanks = rest[: len(rest) - len(rest.lstrip())]
            (edge,) = self.reader.bare([text + blanks])
        return common_prefix(edge, ids)

    def _edges(self, chat: _Chat) -> list[str]:
        """Return the text before and after each of the assistant's turns."""

        def text(count: int, **options: Any) -> str:
            return str(chat.value(chat.render(chat.messages[:count], **options))[0])

        edges = []
        for turn in chat.turns:
            after = chat.whole if turn + 1 == len(chat.messages) else text(turn + 1)
            if turn:
                before = text(turn, add_generation_prompt=True)
            else:  # templates do not render an empty conversation
                before = self._before_first(chat, after)
            if not (chat.whole.startswith(after) and after.startswith(before)):
                raise bad_row(
                    "the chat template must only append text for each turn, or mark turns with "
                    "{% generation %}",
                    f"other text before turn {turn + 1}",
                    chat.place,
                    f"end the row with its first assistant turn, or give {_CHATML}",
                )
            edges += [before, after.rstrip()]
        return edges

    def _before_first(self, chat: _Chat, after: str) -> str:
        """Return the text before the words of an assistant who speaks first."""
        # The text that opens an answer marks its end.
        at = after.find(self._opening) if self._opening else -1
        if at < 0:
            raise bad_row(
                "a chat that the assistant begins needs a template that marks {% generation %}",
                "a template without marks",
                chat.place,
                f"give {_CHATML}, or remove the first turn",
            )
        return after[: at + len(self._opening)]

    @cached_property
    def _opening(self) -> str:
        """Return the text that the template writes before an answer; "" if it is unknown."""
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
        closed = render_chat(self.reader.tokenizer, chat)
        opened = render_chat(self.reader.tokenizer, chat | {"add_generation_prompt": True})
        if closed.error or opened.error or not opened.value[0].startswith(closed.value[0]):
            return ""
        return str(opened.value[0][len(closed.value[0]) :])


class _Chat:
    """One conversation, checked."""

    whole: str  # the rendered text
    marks: list[Span]  # the spans of characters of `whole` that the template marks

    def __init__(self, row: Row, reader: TokenReader) -> None:
        self.row, self.place, self._tokenizer = row, row.origin, reader.tokenizer
        self.messages = _checked_messages(row.get("messages"), self.place)
        self.content = self.messages  # for the digest of the rows
        self.tools = checked_tools(row.get("tools"), self.place)
        self.arguments = _checked_arguments(row.get("chat_template_kwargs"), reader, self.place)
        self.turns = [at for at, turn in enumerate(self.messages) if turn["role"] == "assistant"]

    def first_answer(self, before: int) -> int | None:
        """Return the place of the assistant's first turn, of those from `before` on, that answers.

        A turn answers if a user or a tool spoke before it. A greeting does not: only markup or a
        system message is before it, so that all dialogues with one would have the same prompt.
        """
        heard = (at for at, turn in enumerate(self.messages) if turn["role"] in ("user", "tool"))
        first = next(heard, len(self.messages))
        return next((n for n, at in enumerate(self.turns) if n >= before and at > first), None)

    def render(self, messages: _Messages | None = None, **options: Any) -> Reply:
        """Render some messages, by default all."""
        shown = self.messages if messages is None else messages
        chat = {**self.arguments, "tools": self.tools, **options, "messages": shown}
        return render_chat(self._tokenizer, chat)

    def check_answers(self, before: int) -> None:
        """Refuse an assistant's turn behind `before` others with weight 0 or without content."""
        for turn in self.turns[before:]:
            if self.messages[turn].get("weight") == 0:  # as OpenAI and Axolotl write it
                rule = "every turn of the assistant is learned"
                got = f"weight: 0 in turn {turn + 1}"
                remedy = "put the turns up to it into `prompt`, later ones into `completion`"
                raise bad_row(rule, got, self.place, remedy)
            parts = {key: value for key, value in self.messages[turn].items() if key not in _NAMES}
            if not any(parts.values()):  # otherwise only the end of the turn would be learned
                rule, got = "a turn of the assistant must not be empty", f"empty turn {turn + 1}"
                raise bad_row(rule, got, self.place, "write some text, or remove the row")

    def fill_contents(self) -> bool:
        """Add empty content to messages without content. Return whether there were any."""
        before = self.messages
        self.messages = [{"content": "", **message} for message in before]
        return self.messages != before

    def value(self, reply: Reply) -> Any:
        """Return text and marks. Raises DataError if the template failed."""
        if reply.error:
            rule, remedy = "messages must suit the model's chat template", "correct the row"
            raise bad_row(rule, f"{reply.error:.120}", self.place, f"{remedy}, or give {_CHATML}")
        return reply.value

    def draft(self, ids: Ids, spans: list[Span], prompt: Ids, asked: Ids) -> Draft:
        """Return the row as tokens; its last answer is the reference."""
        spans = [(begin, stop) for begin, stop in spans if stop > begin]
        if not spans:
            raise bad_row("an assistant's turn must tokenise to something", "none", self.place)
        content: Any = [self.content, self.tools] if self.tools else self.content
        if self.arguments:
            content = [self.content, self.tools, self.arguments]
        references = (str(self.messages[self.turns[-1]].get("content") or ""),)
        found = Draft(self.row, content, [ids], [spans], references=references)
        found.prompt, found.asked = prompt, asked
        return found


def _covered(offsets: Sequence[Span], marks: Sequence[Span]) -> list[Span]:
    """Return the spans of tokens that overlap marked characters, without the first token."""
    mask = [any(start < last and end > first for first, last in marks) for start, end in offsets]
    mask = [False, *mask, False]
    edges = [at for at in range(len(mask) - 1) if mask[at] != mask[at + 1]]
    return [(max(begin, 1), stop) for begin, stop in zip(edges[::2], edges[1::2], strict=True)]


# --- checks ---


def _checked_messages(messages: Any, place: str) -> _Messages:
    """Return the messages with text as content, without nulls, which tables fill in."""
    if not _are_objects(messages) or not all(
        isinstance(turn.get("role"), str) and ("content" in turn or turn.get("tool_calls"))
        for turn in messages
    ):
        rule = "`messages` must be a list of objects with role and content"
        raise bad_row(rule, f"{messages!r:.80}", place)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        rule = "`messages` must have a turn with the role assistant to learn"
        raise bad_row(rule, f"roles {roles}", place, "rename its role, or remove the row")
    if any(role != "assistant" and role.lower() == "assistant" for role in roles):
        rule = "turns to learn have the role assistant, in lower case"
        raise bad_row(rule, f"roles {roles}", place, "rename their roles")
    return [_with_parsed_calls(_without_parts(message, place), place) for message in messages]


def _without_parts(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Remove nulls from a message; join text parts, as a template would write the list itself."""
    filled = {key: value for key, value in message.items() if value is not None}
    content: Any = filled.get("content", "")
    if isinstance(content, str):
        return filled
    if not _are_objects(content) or not all(
        part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        rule = "the content of a message must be a text, or parts of type text"
        raise bad_row(rule, f"{content!r:.80}", place, "remove other parts, or the row")
    return filled | {"content": "".join(part["text"] for part in content)}


def _with_parsed_calls(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Parse arguments of calls in JSON: a template would quote them again, or write the escapes."""
    calls: Any = message.get("tool_calls")
    if not _are_objects(calls):
        return message
    return message | {"tool_calls": [_parsed_call(call, place) for call in calls]}


def _parsed_call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    inner, text = call.get("function"), call.get("arguments")
    if isinstance(inner, Mapping):
        return dict(call) | {"function": _parsed_call(inner, place)}
    if not isinstance(text, str):
        return dict(call)
    arguments = parse_json(text.encode("utf-8", "surrogatepass"), f"{place}, arguments of a call,")
    if not isinstance(arguments, dict):
        raise bad_row("the arguments of a call must be a JSON object", f"{text!r:.60}", place)
    return dict(call) | {"arguments": arguments}


def _checked_arguments(arguments: Any, reader: TokenReader, place: str) -> dict[str, Any]:
    """Return a row's arguments of the template. They must not be arguments of the renderer."""
    if not arguments:
        return {}
    reserved = inspect.signature(reader.tokenizer.apply_chat_template).parameters
    if not isinstance(arguments, Mapping) or arguments.keys() & reserved.keys():
        rule = "`chat_template_kwargs` must be an object of names that the template reads"
        raise bad_row(rule, f"{arguments!r:.80}", place)
    return {key: value for key, value in arguments.items() if value is not None}


def _are_objects(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(item, Mapping) for item in value)


def checked_tools(tools: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, or None. Tables often store them as JSON text."""
    schemas = tools
    if isinstance(tools, str):
        with suppress(ValueError):
            schemas = json.loads(tools) if tools.strip() else None
    if not schemas:
        return None
    if not _are_objects(schemas):
        raise bad_row("`tools` must be a list of JSON schemas", f"{tools!r:.80}", place)
    return [dict(tool) for tool in schemas]

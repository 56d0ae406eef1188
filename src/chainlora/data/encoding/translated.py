"""Translate rows in formats of other tools, and of questions and answers, to other formats.

sharegpt        {"conversations": [{"from": "human", "value": …}, …]}   to chat; also with role
                                                                        and content
alpaca          {"instruction": …, "input": …, "output": …}             to chat, or to completion
                                                                        without a chat template
question        {"question": …, "answer": …}                            to chat, or to completion
                                                                        with a line break between
conversational  {"prompt": [messages], "completion": [messages]}        to chat, loss on the
                                                                        completion's turns
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chainlora.config.data import ROW_FIELDS
from chainlora.data.encoding.chat import ChatEncoder
from chainlora.data.encoding.texts import CompletionEncoder, render_rows, text_of
from chainlora.data.encoding.tokens import Draft, Encoder, TokenReader
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row

FIELDS: dict[str, tuple[str, ...]] = {
    "conversational": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_CHAT_COLUMNS = ("tools", "chat_template_kwargs")  # in addition to `messages`
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately \
completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_WITH_INPUT = ", paired with an input that provides further context"


class TranslatedEncoder:
    """Translates each row, and encodes it with the encoder of chainlora's format."""

    def __init__(
        self, encoder: Encoder, translate: Callable[[Row], dict[str, Any]], columns: Sequence[str]
    ) -> None:
        self.encoder, self.translate, self.columns = encoder, translate, columns
        self.truncation, self.keeps_targets = encoder.truncation, encoder.keeps_targets

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        return self.encoder([self._row(row) for row in rows])

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row and of its translation, and keys of turns, not read."""
        given = row["conversations"] if "conversations" in self.columns else ()
        turns = [turn for turn in given if "from" in turn]
        keys = {key for turn in turns for key in turn if turn[key] is not None}
        unread = {f"conversations[].{key}" for key in keys - {"from", "value"}}
        return (row.keys() - self.columns) | unread | self.encoder.unread(self._row(row))

    def _row(self, row: Row) -> Row:
        return Row(self.translate(row), row.index, row.origin)


def make_translated(kind: str, reader: TokenReader) -> Encoder:
    """Return the encoder of a format that is translated."""
    columns = ROW_FIELDS[kind]
    if kind == "sharegpt":
        return TranslatedEncoder(ChatEncoder(reader), sharegpt_chat, columns)
    if kind == "conversational":
        chat = ChatEncoder(reader, turns_before=lambda row: int(row["turns_before"]))
        return TranslatedEncoder(chat, _conversational, columns)
    to_chat, to_text = _TO_CHAT_OR_TEXT[kind]
    if reader.tokenizer.chat_template:
        return TranslatedEncoder(ChatEncoder(reader), to_chat, columns)
    columns_of_text = ("prompt", "completion")
    plain = CompletionEncoder(reader, render_rows, fields=columns_of_text, end=reader.end())
    return TranslatedEncoder(plain, to_text, columns[:3])


def sharegpt_chat(row: Row) -> dict[str, Any]:
    """Translate a row of ShareGPT to a chat."""
    turns = row.get("conversations")
    if not (isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)):
        rule = "`conversations` must be a list of objects with from and value"
        raise bad_row(rule, f"{turns!r:.80}", row.origin)
    is_ours = all("role" in turn and "from" not in turn for turn in turns)
    messages = list(turns) if is_ours else [_message(turn, row.origin) for turn in turns]
    return _with_tools(row, _with_system(row, messages))


def _message(turn: Mapping[str, Any], place: str) -> dict[str, Any]:
    role, text = turn.get("from"), turn.get("value")
    if role not in _ROLES or not isinstance(text, str):
        rule = "a turn of `conversations` must have a value and be from one of"
        raise bad_row(f"{rule} {', '.join(_ROLES)}", f"{dict(turn)!r:.80}", place)
    ignored = {"weight": 0} if turn.get("weight") == 0 else {}
    return {"role": _ROLES[role], "content": text} | ignored


def _with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the column `system` in front, unless the messages begin with it."""
    system = row.get("system")
    first = [turn.get("content") for turn in messages[:1] if turn.get("role") == "system"]
    if system and first not in ([], [system]):
        raise bad_row("a chat must have one `system` text", f"{[system, *first]!r:.80}", row.origin)
    return [{"role": "system", "content": system}, *messages] if system and not first else messages


def _with_tools(row: Row, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": messages} | {key: row[key] for key in _CHAT_COLUMNS if row.get(key)}


def _conversational(row: Row) -> dict[str, Any]:
    parts = [row.get("prompt"), row.get("completion")]
    if not all(isinstance(part, list) and part for part in parts):
        rule = "`prompt` and `completion` must both be lists of messages, as in the first row"
        raise bad_row(rule, "other values", row.origin)
    joined = [*row["prompt"], *row["completion"]]
    roles = [message.get("role") for message in row["prompt"] if isinstance(message, Mapping)]
    return _with_tools(row, joined) | {"turns_before": roles.count("assistant")}


def _alpaca_chat(row: Row) -> dict[str, Any]:
    question = [text_of(row, "instruction"), _input(row)]
    messages = _exchange("\n".join(filter(None, question)), text_of(row, "output"))
    return {"messages": _with_system(row, messages)}


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca_text(row: Row) -> dict[str, Any]:
    more = _input(row)
    prompt = _ALPACA.format(
        more=_WITH_INPUT if more else "",
        instruction=text_of(row, "instruction"),
        input=f"### Input:\n{more}\n\n" if more else "",
    )
    return {"prompt": prompt, "completion": text_of(row, "output")}


def _input(row: Row) -> str:
    return text_of(row, "input") if row.get("input") is not None else ""


def _question_chat(row: Row) -> dict[str, Any]:
    return {"messages": _exchange(text_of(row, "question"), text_of(row, "answer"))}


def _question_text(row: Row) -> dict[str, Any]:
    return {"prompt": text_of(row, "question") + "\n", "completion": text_of(row, "answer")}


_TO_CHAT_OR_TEXT = {
    "alpaca": (_alpaca_chat, _alpaca_text),
    "question": (_question_chat, _question_text),
}
"""How rows are translated with a chat template, and without one."""

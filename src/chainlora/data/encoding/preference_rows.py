"""Encode preference pairs for DPO and ORPO; refuse preferences where plain answers are expected.

    completion      {"prompt": …, "chosen": …, "rejected": …}                    texts (TRL)
    conversational  {"prompt": [messages], "chosen": [messages], "rejected": …}  chats (TRL)
    sharegpt        {"conversations": […], "chosen": {…}, "rejected": {…}}       LLaMA-Factory
    alpaca          {"instruction": …, "input": …, "chosen": …, "rejected": …}   LLaMA-Factory

Without a `prompt` column, both answers begin with the prompt (texts and chats). A pair is read as
two rows of the plain format of the same name, so both answers are tokenised like plain answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chainlora.data.encoding.tokens import Draft, Encoder
from chainlora.data.encoding.translated import sharegpt_chat
from chainlora.data.readers import bad_row
from chainlora.data.sources import Row, where

_PAIRS = frozenset(("chosen", "rejected", "chosen_response", "rejected_response"))
_PAIRS |= {"chosen_messages", "rejected_messages"}
_TAGS = frozenset(("label", "labels", "kto_tag"))
_ANSWERS = frozenset(("completion", "completions", "messages", "conversations", "output"))
_ANSWERS |= {"response"}
_KTO = "train on them with TRL's KTOTrainer and chainlora.ChainCallback"
_KINDS = {  # the type of an answer, by format
    "completion": (str, "texts"),
    "alpaca": (str, "texts"),
    "conversational": (list, "lists of messages"),
    "sharegpt": (Mapping, "objects with from and value"),
}


class PairEncoder:
    """Encodes pairs as two sequences with the same prompt, the chosen answer first."""

    truncation = "error"
    keeps_targets = True

    def __init__(self, kind: str, encoder: Encoder) -> None:
        self.kind, self.encoder = kind, encoder

    def __call__(self, rows: Sequence[Row]) -> list[Draft]:
        drafts = self.encoder([plain for row in rows for plain in self._plain(row)])
        return list(map(_pair, drafts[::2], drafts[1::2]))

    def unread(self, row: Row) -> set[str]:
        return self.encoder.unread(self._plain(row)[0])

    def _plain(self, row: Row) -> list[Row]:
        chosen, rejected = row["chosen"], row["rejected"]
        kind, name = _KINDS[self.kind]
        if not (isinstance(chosen, kind) and isinstance(rejected, kind)):
            rule = f"`chosen` and `rejected` must both be {name}, as in the first row"
            raise bad_row(rule, f"{chosen!r:.40} and {rejected!r:.40}", row.origin)
        rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        if self.kind == "alpaca":
            plain = [rest | {"output": answer} for answer in (chosen, rejected)]
        elif self.kind == "sharegpt":
            plain = [_with_last_turn(row, rest, answer) for answer in (chosen, rejected)]
        else:
            prompt = row.get("prompt")
            if not (prompt is None or isinstance(prompt, (str, kind))):
                rule = f"`prompt` must have the type of the answers, which are {name}"
                raise bad_row(rule, f"{prompt!r:.60}", row.origin)
            prompt, chosen, rejected = _parts(prompt, chosen, rejected)
            if kind is list and not (prompt and chosen and rejected):
                rule = "a pair of chats must have messages as `prompt`, or begin with the same ones"
                raise bad_row(rule, "an empty answer" if prompt else "neither", row.origin)
            answers = (chosen, rejected)
            plain = [rest | {"prompt": prompt, "completion": answer} for answer in answers]
        return [Row(values, row.index, row.origin) for values in plain]


def _with_last_turn(row: Row, rest: dict[str, Any], answer: Any) -> dict[str, Any]:
    """Return a row of ShareGPT with an answer as its completion; `rest` are its other columns."""
    turns = row.get("conversations")
    turns = [*turns, answer] if isinstance(turns, list) else turns
    chat = sharegpt_chat(Row(row | {"conversations": turns}, row.index, row.origin))
    *prompt, last = chat["messages"]
    rest = {key: rest[key] for key in rest.keys() - {"conversations", "system"}}
    return rest | {"prompt": prompt, "completion": [last]}


def _parts(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return the prompt and both answers without it."""
    if isinstance(prompt, type(chosen)):
        return prompt, chosen, rejected
    # The prompt is the common beginning of both answers (TRL's `extract_prompt`).
    last = max(min(len(chosen), len(rejected)) - 1, 0)
    at = next((place for place in range(last) if chosen[place] != rejected[place]), last)
    if at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def _pair(chosen: Draft, rejected: Draft) -> Draft:
    """Join two answers into one draft. Both are scored from the earlier of their first targets."""
    answers = (*chosen.scored, *rejected.scored)
    first = min(spans[0][0] for spans in answers)
    prompts = [draft.sequences[0][:first] for draft in (chosen, rejected)]
    if chosen.prompt != rejected.prompt and prompts[0] != prompts[1]:
        rule, got = "both answers of a pair must follow the same turns", "different turns"
        remedy = "begin `chosen` and `rejected` with the assistant's turn"
        raise bad_row(rule, got, chosen.row.origin, remedy)
    return replace(
        chosen,
        content=[chosen.content, rejected.content],
        sequences=[*chosen.sequences, *rejected.sequences],
        scored=[[(first, spans[0][1]), *spans[1:]] for spans in answers],
    )


def detect_pairs(row: Mapping[str, Any]) -> str:
    """Return the format of a row of preferences. Raises DataError for a row without a pair."""
    refuse_plain(row)
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    return "conversational" if isinstance(row["chosen"], list) else "completion"


def refuse_plain(row: Mapping[str, Any]) -> None:
    """Raise DataError for a row without a pair of answers."""
    if row.keys() >= {"chosen", "rejected"}:
        return
    tags = _tags(row)
    got = f"an answer with {tags[0]}: {row[tags[0]]}" if tags else ", ".join(map(str, row))
    rule = "rows for `train.loss: dpo` or orpo must have a `chosen` and a `rejected` answer"
    remedy = _KTO if tags else "correct the row, or set train.loss: null"
    raise bad_row(rule, got, where(row), remedy)


def refuse_preferences(row: Mapping[str, Any]) -> None:
    """Raise DataError for a pair of answers, and for an answer with a true or false tag."""
    if pairs := sorted(map(str, row.keys() & _PAIRS)):
        columns, plain = f"the columns {', '.join(pairs)}", "chosen"
        remedy = "set train.loss: dpo or orpo, which read columns chosen and rejected"
    elif tags := _tags(row):
        columns, plain, remedy = f"an answer with {tags[0]}: {row[tags[0]]}", "good", _KTO
    else:
        return
    remedy = f"{remedy}, or write only the {plain} answers, as prompt + completion"
    raise bad_row("rows must have one right answer", f"preferences, {columns},", where(row), remedy)


def _tags(row: Mapping[str, Any]) -> list[str]:
    """Return the columns that tag an answer as good or bad."""
    return [tag for tag in _TAGS & row.keys() if row.keys() & _ANSWERS and _is_tag(row[tag])]


def _is_tag(value: Any) -> bool:
    """Return whether a value is true or false, also as text (CSV), or a list of these."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_tag, value))
    return isinstance(value, bool | str) and str(value).strip().lower() in ("true", "false")

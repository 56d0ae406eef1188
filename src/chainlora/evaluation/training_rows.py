"""Derive facts about prompts from a run's training rows: their endings, the length of answers."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import Any, NamedTuple

from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept
from chainlora.data.templates import without_markup
from chainlora.errors import RunError
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.exported import config_of_export
from chainlora.runs.paths import is_run
from chainlora.runs.state import OpenState

MOST_TOKENS = 256  # of an answer: the default of text generation in transformers
_FEWEST = 32  # the lowest limit that rows can set
_ROWS = 200  # rows of a stage to read: they are decoded in a fraction of a second


class RowFacts(NamedTuple):
    """Common properties of the kept training rows of a run."""

    endings: tuple[str, ...]  # of the prompts, by stage; without chats, empty if a stage has none
    longest_answer: int  # in tokens, with its end
    is_chat: bool  # a chat template wrote the prompts

    def has(self, prompt: str) -> bool:
        """Say whether a prompt ends like the prompts of a stage."""
        return prompt.endswith(self.endings) if self.endings else not self.is_chat


def training_rows(run_or_model: Address, tokenizer: Any) -> RowFacts | None:
    """Return facts about the kept training rows of a run's stages.

    Returns None for a model, and without kept rows that have prompts.
    """
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        return None
    state = open_run(run_or_model)
    try:
        kept = state.kept()
    except RunError:  # damaged rows must not stop a command that only generates
        return None
    by_stage = [kept[name].train[:_ROWS] for name in state.stages if name in kept]
    prompted = ([row for row in rows if len(row.prompt) > 1] for rows in by_stage)
    stages = [rows for rows in prompted if rows]
    if not stages:
        return None
    texts = [[str(tokenizer.decode(row.prompt)) for row in rows] for rows in stages]
    endings = {common_ending({*prompts}) for prompts in texts}
    answers = [max(map(len, row.sequences)) - len(row.prompt) for rows in stages for row in rows]
    special = tokenizer.all_special_tokens
    is_chat = any(str(token) in ending for ending in endings for token in special)
    # markup can be plain text, as in the templates zephyr and alpaca
    is_chat = is_chat or any(without_markup(tokenizer, prompts[0]) is not None for prompts in texts)
    known = endings - {""} if is_chat or "" not in endings else ()
    return RowFacts(tuple(sorted(known)), max(answers), is_chat)


def answer_limit(facts: RowFacts | None) -> int:
    """Return the most tokens of an answer: twice those of the longest in the rows, at least 32."""
    return limit_for(facts.longest_answer) if facts else MOST_TOKENS


def limit_for(longest: int) -> int:
    """Return the most tokens of an answer if right ones have up to `longest`."""
    return min(MOST_TOKENS, max(_FEWEST, 2 * longest))


def config_of(run_or_model: Address) -> RunConfig | None:
    """Return the config of the last stage with rows of its own, of a run or an export.

    Returns None for a model or a saved chain.
    """
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        return config_of_export(run_or_model)
    state = open_run(run_or_model)
    return state.with_rows.config() if state.has_run else None


def divided_by(run: Address) -> tuple[int | None, dict[str, Kept]]:
    """Return the bound by which the stage of `config_of` held rows out, and earlier kept rows.

    The bound is None if the stage kept no rows.
    """
    state = open_run(run).with_rows
    stage = state.configured.key
    kept = state.at(stage).kept()
    rows = kept.pop(stage, None)
    return None if rows is None else rows.bound, kept


def common_ending(texts: Collection[str]) -> str:
    """Return the longest common ending; "" for a single text, and for blanks only."""
    if len(texts) < 2:
        return ""
    first, last = min(text[::-1] for text in texts), max(text[::-1] for text in texts)
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ending = "".join(letter for letter, _ in pairs)[::-1]
    return ending if ending.strip() else ""

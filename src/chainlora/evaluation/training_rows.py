"""What the rows of a run say about prompts to it: how they end, and how long an answer is."""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import Any, NamedTuple

from chainlora.config.schema import RunConfig
from chainlora.data.kept import Kept
from chainlora.errors import RunError
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.exported import config_of_export
from chainlora.runs.paths import is_run
from chainlora.runs.state import OpenState

MOST_TOKENS = 256  # of an answer, as transformers' own text generation has it
_FEWEST = 32  # that the rows of a run lower it to
_ROWS = 200  # of a stage, which are decoded in a fraction of a second


class RowFacts(NamedTuple):
    """What the training rows that the stages of a run kept have in common."""

    endings: tuple[str, ...]  # of the prompts of each stage; none where those of one share none
    longest_answer: int  # in tokens, its end included
    is_chat: bool  # a chat template wrote the prompts

    def has(self, prompt: str) -> bool:
        """Say whether a prompt ends like those of a stage."""
        return not self.endings or prompt.endswith(self.endings)


def training_rows(run_or_model: Address, tokenizer: Any) -> RowFacts | None:
    """Return what the training rows have in common that the stages of a run kept.

    None for a model, and where no stage that is on kept rows with prompts.
    """
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        return None
    state = open_run(run_or_model)
    try:
        kept = state.kept()
    except RunError:  # nobody asked for them
        return None
    on = [
        kept[name].train[:_ROWS] for name, share in state.shares.items() if share and name in kept
    ]
    stages = [found for rows in on if (found := [row for row in rows if len(row.prompt) > 1])]
    if not stages:
        return None
    texts = [{str(tokenizer.decode(row.prompt)) for row in rows} for rows in stages]
    endings = {common_ending(each) for each in texts}
    answers = [max(map(len, row.sequences)) - len(row.prompt) for rows in stages for row in rows]
    special = tokenizer.all_special_tokens
    is_chat = any(str(token) in ending for ending in endings for token in special)
    return RowFacts(() if "" in endings else tuple(sorted(endings)), max(answers), is_chat)


def answer_limit(facts: RowFacts | None) -> int:
    """Return the most tokens of an answer: twice the longest of the rows, if that is less."""
    return min(MOST_TOKENS, max(_FEWEST, 2 * facts.longest_answer)) if facts else MOST_TOKENS


def config_of(run_or_model: Address) -> RunConfig | None:
    """Return the config of the last stage with rows of its own, of a run or an export of one; None
    for a model or a saved chain."""
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        return config_of_export(run_or_model)
    state = open_run(run_or_model)
    return state.with_rows.config() if state.has_run else None


def divided_by(run: Address) -> tuple[int | None, dict[str, Kept]]:
    """Return what the stage of `config_of` held rows out by, None if it keeps none, and what
    earlier stages kept."""
    state = open_run(run).with_rows
    stage = state.configured.key
    kept = state.at(stage).kept()
    own = kept.pop(stage, None)
    return None if own is None else own.bound, kept


def common_ending(texts: Collection[str]) -> str:
    """Return what all texts end in; nothing where they are one, or share blanks alone."""
    if len(texts) < 2:
        return ""
    first, last = min(text[::-1] for text in texts), max(text[::-1] for text in texts)
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ending = "".join(letter for letter, _ in pairs)[::-1]
    return ending if ending.strip() else ""

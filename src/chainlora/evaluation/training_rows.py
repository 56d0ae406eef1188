"""What the rows of a run say about prompts to it: how they end, and how long an answer is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from chainlora.config.schema import PAIR_LOSSES, RunConfig
from chainlora.config.staging import is_run
from chainlora.data.encoding import Options
from chainlora.data.kept import Kept
from chainlora.data.preparing import make_rows
from chainlora.data.sources import find_source
from chainlora.data.tasks import load_task
from chainlora.errors import ChainLoRAError
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.state import OpenState

MOST_TOKENS = 256  # of an answer, as transformers' own text generation has it
_FEWEST = 32  # that the rows of a run lower it to
_ROWS = 200  # the first of the training file: read and tokenised in a fraction of a second


class RowFacts(NamedTuple):
    """What the first training rows of a run have in common."""

    ending: str  # of all their prompts; empty where those share none
    longest_answer: int  # in tokens, its end included
    is_chat: bool  # a chat template wrote the prompts


def training_rows(run_or_model: Address, tokenizer: Any) -> RowFacts | None:
    """Return what a run's training rows have in common.

    None for a model, for rows without prompts, for those of a stage that is off or comes later, and
    where the rows are not on this machine.
    """
    config = config_of(run_or_model)
    if config is None:
        return None
    state = open_run(run_or_model)
    if state.is_off or state.is_before_training:
        return None
    data, loss = config.data, config.train.loss
    place = data.train_files[0].path if data.train_files else data.dir
    if place is None or not Path(place).exists():
        return None
    try:
        source = replace(find_source(place, "train", _ROWS), fields=data.fields)
        kind = data.format if data.task is None else load_task(data.task)
        options = Options(objective=loss if loss in PAIR_LOSSES else "completion")
        found = make_rows(source, tokenizer, kind, options)
        rows = [row for row in found if len(row.prompt) > 1]
    except (ChainLoRAError, OSError):  # nobody asked for them
        return None
    if not rows:
        return None
    ending = common_ending({str(tokenizer.decode(row.prompt)) for row in rows})
    return RowFacts(
        ending,
        longest_answer=max(max(map(len, row.sequences)) - len(row.prompt) for row in rows),
        is_chat=any(str(token) in ending for token in tokenizer.all_special_tokens),
    )


def answer_limit(facts: RowFacts | None) -> int:
    """Return the most tokens of an answer: twice the longest of the rows, if that is less."""
    return min(MOST_TOKENS, max(_FEWEST, 2 * facts.longest_answer)) if facts else MOST_TOKENS


def config_of(run_or_model: Address) -> RunConfig | None:
    """Return the config of a run, None for a model or a saved chain."""
    if not isinstance(run_or_model, OpenState) and not is_run(run_or_model):
        return None
    state = open_run(run_or_model)
    return state.config() if state.has_run else None


def divided_by(run: Address) -> tuple[int | None, dict[str, Kept]]:
    """Return what a run held rows out by, None if it keeps none, and what earlier stages kept."""
    state = open_run(run)
    kept = state.kept()
    own = kept.pop(state.stage, None)
    return None if own is None else own.bound, kept


def common_ending(texts: Collection[str]) -> str:
    """Return what all texts end in; nothing where they are one, or share blanks alone."""
    if len(texts) < 2:
        return ""
    first, last = min(text[::-1] for text in texts), max(text[::-1] for text in texts)
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ending = "".join(letter for letter, _ in pairs)[::-1]
    return ending if ending.strip() else ""

"""Rows of preferences, which say which answers are bad, are never trained on as plain answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainlora.data.sources import where
from chainlora.errors import DataError

_PAIRS = frozenset(("chosen", "rejected", "chosen_response", "rejected_response"))
_PAIRS |= {"chosen_messages", "rejected_messages"}
_TAGS = frozenset(("label", "labels", "kto_tag"))
_ANSWERS = frozenset(("completion", "completions", "messages", "conversations", "output"))
_ANSWERS |= {"response"}


def refuse_preferences(row: Mapping[str, Any]) -> None:
    """Raise DataError for a row in a form of TRL, LLaMA-Factory or ms-swift for preferences.

    These are pairs of answers, and answers with a true or false `label` or `kto_tag`.
    """
    if pairs := sorted(map(str, row.keys() & _PAIRS)):
        what, trainer, plain = f"the columns {', '.join(pairs)}", "DPOTrainer", "chosen"
    elif row.keys() & _ANSWERS and (tags := [t for t in _TAGS & row.keys() if _is_tag(row[t])]):
        what, trainer, plain = f"an answer with {tags[0]}: {row[tags[0]]}", "KTOTrainer", "good"
    else:
        return
    raise DataError(
        f"rows must have one right answer (got preferences, {what}, at {where(row)}); train on "
        f"them with TRL's {trainer} and chainlora.ChainCallback (docs/trainer.md#dpo), or write "
        f"the {plain} answers alone as prompt + completion"
    )


def _is_tag(value: Any) -> bool:
    """Say whether a value is true or false, as CSV writes them too, or a list of those."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_tag, value))
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in ("true", "false")
    )

"""What a trainer's loader says of the run before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from chainlora.errors import ConfigError
from chainlora.knots.numbers import some_of


def steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    """Return the optimizer steps of an epoch as the trainer counts them; None without a length."""
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        return None
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def learned_a_step(loader: Any, args: TrainingArguments, num_processes: int) -> float:
    """Return how many tokens an optimizer step teaches on average."""
    rows: float = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    if per_epoch := steps_per_epoch(loader, args):
        rows = min(rows, len(loader.dataset) / per_epoch)  # the last step may have few
    return rows * learned_a_row(loader)


def learned_a_row(loader: Any) -> float:
    """Return how many tokens a row teaches on average, by the labels that the collator gives to
    some rows.

    Raises ConfigError where rows cannot be looked at, or do not show what is learned.
    """
    remedy = "give `knots` a time_constant, in steps"
    rows: Any = getattr(loader, "dataset", None)
    try:
        some = some_of(rows)
    except (TypeError, NotImplementedError, KeyError):
        rule = "soft knots count the tokens of some rows, so the data set must have a length"
        raise ConfigError(rule, type(rows).__name__, remedy) from None
    batch = loader.collate_fn(some)
    if "labels" in batch:  # of tokens, or one of a row
        learned = (batch["labels"] != -100).sum()
    elif "completion_mask" in batch:  # TRL's pairs of preferences, chosen answers first
        learned = batch["completion_mask"][: len(some)].sum()
    else:
        rule = "soft knots count learned tokens, so batches must have `labels`"
        got = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigError(rule, got, remedy)
    return max(int(learned), 1) / len(some)

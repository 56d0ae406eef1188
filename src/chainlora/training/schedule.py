"""Learning-rate schedules over a chain, as pure functions of the step.

The factor of a step multiplies the configured rate. The shapes are those of transformers'
``get_linear_schedule_with_warmup`` and its neighbours: a linear rise from 0 over the warm-up, then
a decay to 0. What a chain adds is where they begin: once for the whole chain, or anew at each link;
and ReLoRA's jagged schedule, which goes on over the whole chain and rises again from 0 after each
knot (arXiv 2307.05695, section 3).
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from chainlora.config.schema import TrainConfig

logger = logging.getLogger(__name__)


def rate_factor(config: TrainConfig, lengths: Sequence[int], step: int) -> float:
    """Return the share of `train.lr` at `step` of a chain of links of `lengths` steps.

    Steps count from 0 over the whole chain; step 0 of a warm-up has factor 0, as in transformers.
    With `restart_schedule` each link has the whole schedule for itself. Otherwise later links rise
    from 0, over `restart_warmup_steps`, to where the schedule of the whole chain stands when the
    rise ends (with "cosine", ReLoRA's jagged cosine).
    """
    kind, warmup, rise = config.schedule, config.warmup_steps, restart_warmup(config)
    ends = list(accumulate(lengths))
    link = min(bisect_right(ends, step), len(ends) - 1)  # past the end, the last link goes on
    within = step - (ends[link] - lengths[link])
    if config.restart_schedule:
        return _factor(within, lengths[link], kind, rise if link else warmup)
    if link and within < rise:
        return _factor(step - within + rise, ends[-1], kind, warmup) * within / rise
    return _factor(step, ends[-1], kind, warmup)


def restart_warmup(config: TrainConfig) -> int:
    """Return the steps over which later links warm up."""
    if config.restart_warmup_steps is not None:
        return config.restart_warmup_steps
    return config.warmup_steps if config.restart_schedule else 0


def say_what_stays_low(config: TrainConfig, lengths: Sequence[int]) -> None:
    """Warn of a link that ends before its warm-up does, or of a whole chain."""
    rooms = lengths if config.restart_schedule else [sum(lengths), *lengths[1:]]
    for link, room in enumerate(rooms):
        rise = restart_warmup(config) if link else config.warmup_steps
        if 0 < room <= rise:
            place = f"link {link}" if link or config.restart_schedule else "the chain"
            key = "restart_" if link and config.restart_warmup_steps is not None else ""
            logger.warning(
                f"{place} never reaches `train.lr`: its warm-up takes {rise} of {room} steps; "
                f"lower train.{key}warmup_steps"
            )
            return


def _factor(step: int, num_steps: int, kind: str, warmup_steps: int) -> float:
    """Return the factor of one schedule of ``num_steps`` steps."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0

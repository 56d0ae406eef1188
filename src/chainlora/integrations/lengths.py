"""Where knots fall in a run whose steps somebody else plans: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

from chainlora.errors import ConfigError
from chainlora.knots.numbers import between

Lengths = int | Sequence[int] | None
Epochs = float | Sequence[float] | None


def check_knots(ranks: Sequence[int] | None, steps: Lengths, epochs: Epochs) -> None:
    """Raise ConfigError for what contradicts itself, whatever the trainer will say."""
    if ranks is not None and (not isinstance(ranks, list | tuple) or not ranks):
        raise ConfigError(f"`ranks` must list a rank for each link (got {ranks!r}); e.g. [8, 8]")
    if steps is not None and epochs is not None:
        raise ConfigError("give `steps` or `epochs`, not both (got both); leave one out")
    given: dict[str, Any] = {"steps": steps, "epochs": epochs}
    for key, value in given.items():
        if value is None:
            continue
        is_list = isinstance(value, Collection) and not isinstance(value, str)
        listed = list(value) if is_list else [value]
        is_wrong = not all(isinstance(v, Real) and v is not True and float(v) > 0 for v in listed)
        if not listed or is_wrong or (key == "steps" and any(v % 1 for v in listed)):
            rule = "positive whole numbers" if key == "steps" else "positive"
            raise ConfigError(f"`{key}` must be {rule} (got {value!r})")
        if is_list and ranks is not None and len(ranks) != len(listed):
            raise ConfigError(
                f"`ranks` and `{key}` must be of one length (got {len(ranks)} and {len(listed)}); "
                "give one entry a link"
            )


def link_lengths(
    num_links: int | None,
    steps: Lengths,
    epochs: Epochs,
    num_steps: int,
    steps_per_epoch: int | None,
) -> list[int]:
    """Return the steps of each link of a run of `num_steps` steps.

    A single number is the distance between knots, and the last link has what is left. A list has an
    entry a link. Without either, `num_links` links share the run evenly.

    Raises ConfigError where links and run do not fit.
    """
    if epochs is not None and steps_per_epoch is None:
        raise ConfigError(
            "knots by epochs need a data set with a length (got one without); give `steps`"
        )
    per_epoch = steps_per_epoch or 0
    if steps is not None and not isinstance(steps, Collection):
        lengths = _by_distance(float(steps), num_steps, f"steps={steps}")
    elif epochs is not None and not isinstance(epochs, Collection):
        lengths = _by_distance(epochs * per_epoch, num_steps, f"epochs={epochs:g}")
    elif steps is not None:
        lengths = list(map(int, steps))
    elif epochs is not None:
        lengths = _by_epochs(epochs, per_epoch, num_steps)
    else:
        count = num_links or 1
        lengths = list(between([round(num_steps * (k + 1) / count) for k in range(count)]))
    _check(lengths, num_links, num_steps)
    return lengths


def _by_distance(distance: float, num_steps: int, what: str) -> list[int]:
    if distance >= num_steps:
        raise ConfigError(
            f"a knot must fall before the run ends (got {what} in a run of {num_steps} steps); "
            "tie more often, or train longer"
        )
    ends = [round(distance * (k + 1)) for k in range(math.ceil(num_steps / distance) - 1)]
    return list(between([end for end in ends if end < num_steps] + [num_steps]))


def _by_epochs(epochs: Sequence[float], per_epoch: int, num_steps: int) -> list[int]:
    ends = [round(sum(epochs[: k + 1]) * per_epoch) for k in range(len(epochs))]
    if abs(sum(epochs) * per_epoch - num_steps) < 1:
        ends[-1] = num_steps  # trainers round the last epoch up
    return list(between(ends))


def _check(lengths: Sequence[int], num_links: int | None, num_steps: int) -> None:
    if num_links is not None and len(lengths) != num_links:
        raise ConfigError(
            f"`ranks` must have one entry a link (got {num_links} for {len(lengths)} links of "
            f"{list(lengths)} steps); change either"
        )
    if any(length < 1 for length in lengths):
        raise ConfigError(
            f"every link must have at least one step (got {list(lengths)!r:.60}); tie less often"
        )
    if sum(lengths) != num_steps:
        raise ConfigError(
            f"the links must add up to the run (got {list(lengths)}, together {sum(lengths)}, for "
            f"{num_steps} steps); change them, or the trainer's max_steps or num_train_epochs"
        )

"""The picture of the long sequence: right answers at the end, by arm, with intervals over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from card import EDGE, WIDTH, Card
from evidence import BENCHMARKS, module_of

from chainlora_lab.statistics.intervals import t_interval

FIELD = BENCHMARKS / "field"
NAMES = {  # what a reader calls an arm
    **{"ours": "chainlora", "replay": "links, replay", "mean": "mean of updates"},
    "ours, rank 16": "chainlora, rank 16",
    "replay, no general rows": "replay without general rows",
    **{"ties": "TIES", "one LoRA": "one LoRA in turn", "all at once": "all rows at once"},
}
REFERENCES = {"alone": "each stage alone", "base": "the base"}  # lines, not points
LEFT, RIGHT, ROW, TOP = EDGE + 150, WIDTH - EDGE - 72, 30, 136
Shares = Mapping[str, Sequence[float]]  # percent by arm, a value a seed


def field(results: Path = FIELD / "results.jsonl") -> str:
    """Return the arms as points, best first, over the tasks that each stage alone has learned.

    Raises ValueError where ours has no verdict cell, or no task is known to be learned.
    """
    table = module_of(FIELD / "table.py")
    arms = table.verdicts(table.read(results))
    tasks = table.learned_tasks([*arms.get("alone", {}).values()])
    if not tasks or "ours" not in arms:
        raise ValueError(f"{results} has no verdict cells of `ours`, or no task that is learned")
    shares = {arm: [table.right(cell, tasks) for cell in own.values()] for arm, own in arms.items()}
    ranked = sorted(shares.keys() - REFERENCES.keys(), key=lambda arm: -fmean(shares[arm]))
    notes = _notes([NAMES.get(arm, arm) for arm in table.ARMS if arm not in arms])
    bottom = TOP + ROW * len(ranked)
    card = Card(bottom + 54 + 20 * len(notes), "The long sequence: right answers by arm")
    _heading(card, len(next(iter(arms["ours"].values()))["right"]), len(tasks))
    _axis(card, shares, bottom)
    for place, arm in enumerate(ranked):
        adapters = next(iter(arms[arm].values()))["adapters"]
        name = NAMES.get(arm, arm) + (f", {adapters} adapters" if adapters > 1 else "")
        kind = "blue" if arm == "ours" else "soft"
        _point(card, TOP + ROW * (place + 0.5), name, shares[arm], kind)
    for place, line in enumerate(notes):
        card.text(EDGE, bottom + 52 + 20 * place, line, kind="soft")
    return card.svg()


def _heading(card: Card, tasks: int, learned: int) -> None:
    card.text(EDGE, 28, "Right answers after the long sequence, %", bold=True, size=16)
    text = f"SmolLM2-135M-Instruct after {tasks} tasks with few rows."
    card.text(EDGE, 50, text, kind="soft")
    text = f"Means over the {learned} tasks that a stage alone learns."
    card.text(EDGE, 68, text, kind="soft")


def _notes(missing: Sequence[str]) -> list[str]:
    """Return the lines below the picture: what the marks mean, and what has not run."""
    notes = ["Lines: 95 % t intervals over seeds (their number)."]
    return notes + textwrap.wrap(f"Not run: {'; '.join(missing)}." if missing else "", 54)


def _across(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * min(max(share, 0), 100) / 100


def _axis(card: Card, shares: Shares, bottom: float) -> None:
    """Draw the scale, and a dashed line for each reference."""
    for share in (0, 25, 50, 75, 100):
        x = _across(share)
        card.line(x, TOP, x, bottom, "grid")
        card.text(x, bottom + 20, f"{share}", anchor="middle", kind="soft")
    for place, (arm, name) in enumerate(REFERENCES.items()):
        if arm in shares:
            mean, y = fmean(shares[arm]), TOP - 34 + 20 * place
            x, to_left = _across(mean), mean > 50
            card.path(f"M{x:.5g} {y - 12}V{bottom}", "ink", 1.5, ' stroke-dasharray="5 4"')
            where = {"anchor": "end"} if to_left else {}
            card.text(x + (-6 if to_left else 6), y, f"{name} {mean:.1f}", **where)


def _point(card: Card, y: float, name: str, values: Sequence[float], kind: str) -> None:
    mean, bold = fmean(values), kind == "blue"
    card.text(EDGE, y + 5, name, bold=bold)
    if len(values) > 1:
        low, high = map(_across, t_interval(values))
        card.interval(low, high, y, kind, 5)
    card.dot(_across(mean), y, kind, radius=6, hollow=len(values) == 1)
    card.text(WIDTH - EDGE, y + 5, f"{mean:.1f} ({len(values)})", anchor="end", bold=bold)

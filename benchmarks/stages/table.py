"""Print results.jsonl as the tables of README.md: python benchmarks/stages/table.py"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from chainlora_lab.statistics.intervals import t_interval
from chainlora_lab.statistics.sign_flip import sign_flip_test

HERE = Path(__file__).parent
PRIMARY, BASELINE = "chain", "one LoRA"  # the others were to be given without a verdict
Order = tuple[str, ...]
Scores = dict[str, float]


def main() -> None:
    """Read, and print the gate, what is without an order, and the arms."""
    path = Path(sys.argv[1]) if sys.argv[1:] else HERE / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[str, dict[Order, Scores]] = {}
    for line in lines:
        found.setdefault(line["arm"], {})[tuple(line["order"])] = line["right"]
    majority = {line["order"][0]: line["majority"] for line in lines if line["arm"] == "gate"}
    print("| task | alone | most frequent answer |\n|---|---|---|")
    for (task,), right in found.pop("gate").items():
        print(f"| {task} | {right[task]:.2f} | {majority[task]:.2f} |")
    alone = found.pop("alone", {})
    if alone:
        mean = fmean(right[task] for (task,), right in alone.items())
        print(f"\nEach alone {mean:.3f}", end="")
    for right in found.pop("together", {}).values():
        print(f", all at once {fmean(right.values()):.3f}", end="")
    heads = ["arm", "orders", "average", "backward transfer", "forgetting", "less one LoRA", "p"]
    print(f"\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    arms = {name: summaries(scores, alone, found) for name, scores in found.items()}
    for name, summary in arms.items():
        show(name, summary, arms.get(BASELINE, {}))


def summaries(
    scores: Mapping[Order, Scores],
    alone: Mapping[Order, Scores],
    found: Mapping[str, Mapping[Order, Scores]],
) -> dict[Order, tuple[float, float, float]]:
    """Return average, backward transfer and forgetting of each whole order."""
    summary = {}
    for order, last in scores.items():
        if len(order) < 3:
            continue
        chain = scores if order[:2] in scores else found["chain"]  # strengths: of what was mixed
        states = [(chain if order[:1] in chain else alone)[order[:1]], chain[order[:2]]]
        before = [[s[task] for s in states if task in s] for task in order[:2]]
        learned = [values[0] for values in before]
        most = [max(values) for values in before]
        now = [last[task] for task in order[:2]]
        summary[order] = (
            fmean(last.values()),
            fmean(b - a for a, b in zip(learned, now, strict=True)),
            fmean(a - b for a, b in zip(most, now, strict=True)),
        )
    return summary


def show(
    name: str,
    summary: Mapping[Order, Sequence[float]],
    baseline: Mapping[Order, Sequence[float]],
) -> None:
    """Print an arm's line."""
    columns = list(zip(*summary.values(), strict=True))
    cells = [name, str(len(summary)), *map(interval, columns)]
    both = [order for order in summary if order in baseline]
    if name != BASELINE and both:
        less = [summary[order][0] - baseline[order][0] for order in both]
        cells += [interval(less), f"{sign_flip_test(less):.3f}" if name == PRIMARY else ""]
    else:
        cells += ["", ""]
    print(f"| {' | '.join(cells)} |")


def interval(values: Sequence[float]) -> str:
    """Return a mean and, of two values or more, its 95 % interval over orders."""
    if len(values) < 2:
        return f"{fmean(values):.3f}"
    low, high = t_interval(values)
    return f"{fmean(values):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()

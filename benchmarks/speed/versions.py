"""Compare two versions: ``python benchmarks/speed/versions.py CHECKOUT --only 'rte-*'``.

CHECKOUT is a work tree of the older version (``git worktree add``). Its entry and ours run the same
rows in turns (A B A B), each in a process of its own; the median of the ratios within a turn
counts.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from contests import CONTESTS
from run import HERE, ROOT, Bench, _wanted, parse, say


def main() -> None:
    """Run every wanted contest with both versions and print the ratios."""
    older = Path(sys.argv.pop(1)).resolve()
    options = parse()
    options.results = options.results or HERE / "results" / "versions.jsonl"
    bench = Bench(options)
    for contest in CONTESTS:
        if not _wanted(contest.name, options.only):
            continue
        turns = []
        for turn in range(options.repeats or contest.repeats):
            pair = {}
            for label, checkout in (("older", older), ("this", ROOT)):
                bench.use(checkout)
                pair[label] = bench.measure(contest, contest.entries[0])
                extra = {"measure": contest.measure, "version": label}
                bench.record(contest.name, label, turn, pair[label] | extra)
            turns.append(ratios(contest.measure, pair["older"], pair["this"]))
        speed, memory = (statistics.median(turn[i] for turn in turns) for i in range(2))
        shown = ", ".join(f"{turn[0]:.3f}" for turn in turns)
        say(f"{contest.name:20} times as fast {speed:.3f} ({shown}), memory {memory:.3f}")


def ratios(measure: str, older: dict[str, Any], this: dict[str, Any]) -> tuple[float, float]:
    """Return how many times as fast this version is, and its share of the older one's memory."""
    rate = this[measure] / older[measure]
    speed = rate if measure == "rows_per_second" else 1 / rate
    return speed, this["peak_mb"] / older["peak_mb"]


if __name__ == "__main__":
    main()

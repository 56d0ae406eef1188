"""Sum the JSON lines of results up in a Markdown table: ``python table.py RESULTS.jsonl``.

Of each benchmark, the runs of the code and the settings of the last one count. Ratios are taken
within a turn, and their median is shown with its range. Measurements that other processes disturbed
stay in the file and out of the table.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_LESS_IS_BETTER = ("seconds_per_step", "seconds_per_knot", "seconds")
_UNITS = {
    "rows_per_second": "rows/s",
    "seconds_per_step": "s/step",
    "seconds_per_knot": "s/knot",
    "seconds": "s",
    "share_of_peak": "of peak",
}


def write_table(results: Path) -> Path:
    """Write the table beside the results and return its path."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "failed" not in line and not _disturbed(line)]
    path = results.with_suffix(".md")
    if not lines:
        raise ValueError(f"a table needs a measurement that worked (got none in {results.name})")
    path.write_text(
        "\n".join([*_head(lines), *_contests(lines), *_notes(lines)]) + "\n", encoding="utf-8"
    )
    return path


def _disturbed(line: Line) -> bool:
    """Say whether other processes took cores that the measurement needed (2 threads with half their
    cores taken run several times slower, not half as fast)."""
    needed = line.get("settings", {}).get("threads", 1) + line.get("others_cores", 0)
    return bool(needed > line["machine"]["cores"] + 0.2)


def _head(lines: list[Line]) -> list[str]:
    last = lines[-1]
    machine = last["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    return [
        f"# Speed, {last['time'][:10]}",
        "",
        f"Machine: {machine['cores']} cores, {', '.join(machine['instructions'])}. Versions: "
        f"{versions}.",
        "",
        "Ratios above 1 mean that ours is faster; memory is ours as a share of the peer's peak. "
        "Medians over turns; the range of the ratios in brackets. *Others* is how many cores other "
        "processes kept busy meanwhile, the largest of the contest's measurements.",
        "",
        "| benchmark | ours | peer | ours | theirs | unit | times as fast | goal | peak ours / "
        "theirs (MB) | memory | goal | final loss ours / theirs | rows | threads | turns "
        "| load, others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]


def _contests(lines: list[Line]) -> list[str]:
    rows = []
    names = dict.fromkeys(line["benchmark"] for line in lines)
    for name in [name for name in names if name != "startup"]:
        mine = [line for line in lines if line["benchmark"] == name]
        mine = [line for line in mine if _alike(line, mine)]
        ours = [line for line in mine if line["ours"]]
        if not ours:  # the code changed between the entries
            continue
        for label in dict.fromkeys(line["entry"] for line in mine if not line["ours"]):
            rows.append(_row(name, ours, [line for line in mine if line["entry"] == label]))
        if len({line["entry"] for line in mine}) == 1:
            rows.append(_row(name, ours, ours))
    return rows


def _alike(line: Line, lines: list[Line]) -> bool:
    """Say whether a line is of the same code and settings as the last one of its entry."""
    last = [other for other in lines if other["entry"] == line["entry"]][-1]
    return bool(
        line.get("code") == lines[-1].get("code") and line.get("settings") == last.get("settings")
    )


def _row(name: str, ours: list[Line], theirs: list[Line]) -> str:
    measure = ours[0]["measure"]
    pairs = [(a, b) for a in ours for b in theirs if (a["run"], a["turn"]) == (b["run"], b["turn"])]
    ratios = [a[measure] / b[measure] for a, b in pairs]
    if measure in _LESS_IS_BETTER:
        ratios = [1 / ratio for ratio in ratios]
    goals = theirs[0]["goals"]
    shares = [a["peak_mb"] / b["peak_mb"] for a, b in pairs if "peak_mb" in a and "peak_mb" in b]
    peer, their, fast, peaks, share, final = ["–"] * 6
    if ours is not theirs:
        peer, their, fast = theirs[0]["entry"], _median(theirs, measure), _spread(ratios)
        final = f"{_median(ours, 'final_loss')} / {_median(theirs, 'final_loss')}"
        if shares:
            peaks = f"{_median(ours, 'peak_mb')} / {_median(theirs, 'peak_mb')}"
            share = f"{statistics.median(shares):.2f}"
    cells = [
        name,
        ours[0]["entry"],
        peer,
        _median(ours, measure),
        their,
        _UNITS[measure],
        fast,
        _goal(goals, "speed", "≥") or _goal(goals, "share", "≥"),
        peaks,
        share,
        _goal(goals, "memory", "≤"),
        final,
        str(ours[0]["settings"]["num_rows"]),
        str(ours[0]["settings"]["threads"]),
        str(len(pairs)),
        f"{max(a.get('load_before', 0) for a in ours + theirs):.1f}, "
        f"{max(a.get('others_cores', 0) for a in ours + theirs):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _median(lines: list[Line], measure: str) -> str:
    values = [line[measure] for line in lines if measure in line]
    if not values:
        return "–"
    middle = statistics.median(values)
    return f"{middle:.0f}" if middle >= 100 else f"{middle:.3g}"


def _spread(ratios: list[float]) -> str:
    middle = f"**{statistics.median(ratios):.2f}**"
    return middle if len(ratios) == 1 else f"{middle} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _goal(goals: dict[str, float], kind: str, sign: str) -> str:
    return f"{sign} {goals[kind]}" if kind in goals else ""


def _notes(lines: list[Line]) -> list[str]:
    """Differences of losses and scores, knots, and profiles, of the last run of each benchmark."""
    notes = [
        "",
        "## Same results",
        "",
        *_agreements(lines),
        "",
        "## Knots",
        "",
        *_knots(lines),
        "",
        "## Time to the first step, and start-up",
        "",
        *_starts(lines),
        "",
        "## Where the time goes",
        "",
    ]
    for line in _last(lines, lambda line: "profile" in line):
        profile = line["profile"]
        notes += [
            f"{line['benchmark']}: {line['gflops']:.0f} of {line['peak_gflops']:.0f} GFLOP/s, "
            f"{line['tokens_per_second']:.0f} tokens/s. Model's own shapes: "
            f"{line['matmul_gflops']}.",
            "",
            "| kind | share |",
            "|---|---|",
            *(f"| {kind} | {share:.1%} |" for kind, share in profile["shares"].items()),
            "",
            "Dearest operators: "
            + ", ".join(f"`{op}` {share:.1%}" for op, share in profile["dearest"].items()),
            "",
        ]
    return notes


def _last(lines: list[Line], wanted: Callable[[Line], bool]) -> list[Line]:
    return list({line["benchmark"]: line for line in lines if wanted(line)}.values())


def _last_entries(lines: list[Line], wanted: Callable[[Line], bool]) -> list[Line]:
    found = {(line["benchmark"], line["entry"]): line for line in lines if wanted(line)}
    return list(found.values())


def _agreements(lines: list[Line]) -> list[str]:
    notes = []
    for key, what in (("losses", "losses of a step"), ("scores", "scores")):
        known = [line for line in lines if line.get(key)]
        # other chains have other losses
        comparable = [line for line in known if line["measure"] != "seconds_per_step"]
        for ours in _last(comparable, lambda line: line["ours"]):
            name, run = ours["benchmark"], ours["run"]
            same = [line for line in known if (line["benchmark"], line["run"]) == (name, run)]
            others = {line["entry"]: line for line in same if not line["ours"]}
            for label, other in others.items():
                note = f"- {name}, {label}: largest difference of {what} "
                note += _difference(ours[key], other[key])
                if "accuracy" in ours:
                    note += f"; accuracy {ours['accuracy']:.4f} and {other['accuracy']:.4f}"
                notes.append(note)
    return notes


def _difference(ours: list[Any], theirs: list[Any]) -> str:
    flat = [
        [x for row in side for x in (row if isinstance(row, list) else [row])]
        for side in (ours, theirs)
    ]
    if len(flat[0]) != len(flat[1]):
        return f"not comparable ({len(flat[0])} and {len(flat[1])} of them)"
    return f"{max(abs(a - b) for a, b in zip(*flat, strict=True)):.2g}"


def _knots(lines: list[Line]) -> list[str]:
    notes = []
    for line in _last_entries(lines, lambda line: "seconds_per_knot" in line):
        share = line.get("share_of_100_steps")
        of_steps = "" if share is None else f", {share:.2%} of 100 steps"
        notes.append(
            f"- {line['benchmark']}, {line['entry']}: {line['seconds_per_knot']:.3f} s a knot"
            f"{of_steps}; peak {line['peak_before_first_knot_mb']:.0f} MB before the first knot, "
            f"{line['peak_after_knots_mb']:.0f} MB after the last"
        )
    return notes


def _starts(lines: list[Line]) -> list[str]:
    """From the start of the process to the end of the first optimizer step; and plain start-up
    times."""

    def wanted(line: Line) -> bool:
        return "seconds_to_first_step" in line or line["benchmark"] == "startup"

    return [
        f"- {line['benchmark']}, {line['entry']}: "
        f"{line.get('seconds_to_first_step', line.get('seconds')):.2f} s"
        for line in _last_entries(lines, wanted)
    ]


if __name__ == "__main__":
    print(write_table(Path(sys.argv[1])))

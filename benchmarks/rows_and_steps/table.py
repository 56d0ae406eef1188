"""What the cells came to: python benchmarks/rows_and_steps/table.py [--phase tuning]

One line a cell: right answers, perplexity of other texts divided by the base's, and costs. Below
them, of tuning, the protected and the best setting of each arm; of a verdict, a line for each arm,
means over seeds with intervals of 95 % over them, and the comparisons.
`--draw FILE` draws the frontier of the tuning cells, right answers over perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import run
import yaml

from chainlora_lab.statistics.intervals import t_interval
from chainlora_pages import charts


def report(study: run.Study, phase: str) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    cells = [cell for cell in study.cells.values() if cell["phase"] == phase]
    bases = {cell["seed"]: cell for cell in cells if cell["arm"] == "base"}
    yield "| arm | seed | settings | right | tasks | outside | texts | seconds | GB | rank |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for cell in cells:
        yield row(cell, bases.get(cell["seed"]))
    for arm in dict.fromkeys(cell["arm"] for cell in cells if phase == "tuning"):
        of_arm = study.tuning_cells(arm)
        for point, cell in study.choose(of_arm).items() if of_arm and arm != "base" else ():
            yield f"{arm}, {point} of {len(of_arm)}: {json.dumps(cell['settings'])}"


# --- the frontier ---

DRAWN = {"ours": ("C0", "o"), "replay": ("C1", "s"), "all at once": ("C2", "^")}
WITH = {"none": "without general rows", "text": "general rows by text", "kl": "by KL"}


def draw(study: run.Study, path: Path) -> None:
    """Draw right answers of tuning cells over their perplexity of other texts."""
    cells = [cell for cell in study.cells.values() if cell["phase"] == "tuning"]
    bases = {cell["seed"]: cell for cell in cells if cell["arm"] == "base"}

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        for arm, (colour, marker) in DRAWN.items():
            of_arm = [c for c in cells if c["arm"] == arm and c["seed"] in bases]
            for general in dict.fromkeys(c["settings"].get("general") for c in of_arm):
                some = [c for c in of_arm if c["settings"].get("general") == general]
                x = [run.outside(c, bases[c["seed"]]) for c in some]
                y = [100 * run.mean_right(c) for c in some]
                full = {"none": "none", "text": "left"}.get(general, "full")
                label = f"{arm}, {WITH[general]}" if general else arm
                keys = {"color": colour, "marker": marker, "fillstyle": full, "label": label}
                axes.plot(x, y, linestyle="none", **keys)
        axes.axvline(study.plan["bound"], color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="perplexity of other texts / the base's")
        axes.set_ylabel("right answers, %")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        charts.legend_above(axes)

    charts.save(fill, (6.4, 4.4), path)


# --- a verdict ---

COMPARISONS = {
    "primary": (("ours", "protected"), ("replay", "protected")),
    "second": (("ours", "best"), ("replay", "best")),
    "third": (("ours", "protected"), ("alone", "best")),
    "rule": (("ours", "protected"), ("ours", "default")),
}


def summary(study: run.Study, phase: str) -> Iterator[str]:
    """Yield the lines of a table of arms, at the points that they are judged at."""
    kinds = kinds_of(study, phase)
    of_phase = [cell for cell in study.cells.values() if cell["phase"] == phase]
    bases = {cell["seed"]: cell for cell in of_phase if cell["arm"] == "base"}
    yield f"| arm | seeds | right | {' | '.join(kinds)} | outside | seconds | GB | rank |"
    yield "|---" * (len(kinds) + 7) + "|"
    keys = dict.fromkeys((cell["arm"], cell["kept"]) for cell in of_phase)
    for arm, kept, point in ((*key, point) for key in keys for point in study.points(key[0])):
        if cells := [*verdict(study, phase, arm, point, kept).values()]:
            shares = [
                [fmean(c["right"][t] for t in tasks) for c in cells] for tasks in kinds.values()
            ]
            right = [100 * fmean(of_seed) for of_seed in zip(*shares, strict=True)]
            beside = [run.outside(c, bases[c["seed"]]) for c in cells if c["seed"] in bases]
            costs = [fmean(cell[key] for cell in cells) for key in ("cpu_seconds", "memory_gb")]
            values = [f"{arm}, {point}, {kept} kept", len(cells), interval(right, 1)]
            values += [f"{100 * fmean(each):.1f}" for each in shares]
            values += [interval(beside, 3) if cells[0]["outside"] else "–"]
            values += [f"{costs[0]:.0f}", f"{costs[1]:.1f}", cells[0]["rank"]]
            yield f"| {' | '.join(map(str, values))} |"


def interval(values: Sequence[float], digits: int) -> str:
    """Return the mean of some seeds and its interval, where there are two."""
    if len(values) < 2:
        return f"{fmean(values):.{digits}f}" if values else "–"
    low, high = t_interval([*values])
    return f"{fmean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def kinds_of(study: run.Study, phase: str) -> dict[str, Sequence[str]]:
    """Return the tasks of a verdict by kind; tasks of a phase's own are one kind."""
    of_phase = study.plan["phases"][phase]
    return {phase: of_phase["tasks"]} if "tasks" in of_phase else study.plan["kinds"]


def comparisons(study: run.Study, phase: str) -> Iterator[str]:
    """Yield the differences, each with an interval over seeds and one over seeds and tasks."""
    kinds = kinds_of(study, phase)
    for name, sides in COMPARISONS.items():
        one, other = (verdict(study, phase, *side, study.plan["kept"]) for side in sides)
        if seeds := sorted({*one} & {*other}):
            pairs = [(one[seed]["right"], other[seed]["right"]) for seed in seeds]
            mean, *both = compared(pairs, kinds)
            intervals = [f"[{100 * low:.1f}, {100 * high:.1f}]" for low, high in both]
            less = " less ".join(" ".join(side) for side in sides)
            yield f"{name}, {less}: {100 * mean:+.1f} {' '.join(intervals)} (seeds {seeds})"


def verdict(study: run.Study, phase: str, arm: str, point: str, kept: int) -> dict[int, run.Cell]:
    """Return the cells of a verdict of an arm at a point, by seed."""
    named = (phase, arm, kept, study.settings(phase, arm, point))
    keys = ("phase", "arm", "kept", "settings")
    found = (c for c in study.cells.values() if tuple(map(c.get, keys)) == named)
    return {cell["seed"]: cell for cell in found}


Interval = tuple[float, float]


def compared(
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    kinds: Mapping[str, Sequence[str]],
    draws: int = 10_000,
) -> tuple[float, Interval, Interval]:
    """Return the mean difference over seeds and kinds of task, and its two intervals of 95 %."""
    by_kind = [
        np.array([[one[task] - other[task] for task in tasks] for one, other in pairs])
        for tasks in kinds.values()
    ]
    of_seeds = np.mean([each.mean(1) for each in by_kind], axis=0)
    generator = np.random.default_rng(0)
    seeds = generator.integers(len(pairs), size=(draws, len(pairs), 1))
    means = []
    for each in by_kind:
        tasks = generator.integers(each.shape[1], size=(draws, 1, each.shape[1]))
        means.append(each[seeds, tasks].mean((1, 2)))
    low, high = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    over_seeds = t_interval([*of_seeds]) if len(pairs) > 1 else (-math.inf, math.inf)
    return float(of_seeds.mean()), over_seeds, (float(low), float(high))


def row(cell: run.Cell, base: run.Cell | None) -> str:
    """Return the line of a cell."""
    settings = ", ".join(f"{key} {value}" for key, value in cell["settings"].items())
    right = 100 * run.mean_right(cell)
    tasks = ", ".join(f"{task} {100 * share:.0f}" for task, share in sorted(cell["right"].items()))
    mean, texts = "–", "–"
    if base is not None and cell["outside"]:
        mean = f"{run.outside(cell, base):.3f}"
        kinds: Sequence[str] = run.TEXTS
        texts = ", ".join(f"{cell['outside'][k] / base['outside'][k]:.2f}" for k in kinds)
    values = (cell["arm"], cell["seed"], settings, f"{right:.1f}", tasks, mean, texts)
    costs = cell["cpu_seconds"], cell["memory_gb"], cell["rank"]
    return f"| {' | '.join(map(str, (*values, *costs)))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", default="tuning")
    parser.add_argument("--results", type=Path, default=run.HERE / "results.jsonl")
    parser.add_argument("--draw", type=Path, help="a PNG or SVG file")
    options = parser.parse_args()
    plan = yaml.safe_load((run.HERE / "plan.yaml").read_text())
    study = run.Study(plan, Path(), Path(), options.results)
    print(*report(study, options.phase), sep="\n")
    if options.draw:
        draw(study, options.draw)
    if options.phase not in ("tuning", "gate"):
        print(*summary(study, options.phase), sep="\n")
        print(*comparisons(study, options.phase), sep="\n")


if __name__ == "__main__":
    main()

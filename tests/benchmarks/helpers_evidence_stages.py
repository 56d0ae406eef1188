"""The numbers of stages in docs/evidence.md and other pages, from benchmarks/stages and
benchmarks/combining."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from math import exp
from statistics import fmean
from types import ModuleType
from typing import Any

from benchmarks.helpers_evidence import (
    BENCHMARKS,
    MISSING,
    Rows,
    Values,
    estimate,
    from_yaml,
    less,
    lines,
    number,
    with_interval,
)
from chainlora_lab.statistics.intervals import t_interval


@cache
def script(path: str) -> ModuleType:
    """A module of benchmarks/, under a name that no other folder's has."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), BENCHMARKS / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARMS = {  # of the shared question: a study, how the page names it, its exported rank, and its seeds
    "combined twice rehearsed": ("primary", "beside, combined, rehearsed", 48, 6),
    "combined twice": ("primary", "beside, combined", 40, 6),
    "combined rehearsed": ("primary", "beside, combined in one pass, rehearsed", 48, 6),
    "combined": ("primary", "beside, combined in one pass", 40, 6),
    "replay": ("primary", "on top, replay", 40, 6),
    "on top rehearsed": ("primary", "on top, rehearsed", 48, 6),
    "on top": ("primary", "on top", 40, 6),
    "summed rehearsed": ("other sums", "beside, summed, rehearsed", 48, 3),
    "scaled": ("other sums", "beside, summed, tuned scale", 40, 3),
    "ties": ("other sums", "beside, TIES, tuned scale", 40, 3),
    "summed": ("other sums", "beside, summed", 40, 3),
    "base rehearsed": ("other sums", "the base, rehearsed", 8, 3),
    "one wide LoRA replay": ("one LoRA of rank 40", "one LoRA, replay", 40, 3),
    "one wide LoRA rehearsed": ("one LoRA of rank 40", "one LoRA, rehearsed", 40, 3),
    "one wide LoRA": ("one LoRA of rank 40", "one LoRA", 40, 3),
    "one LoRA replay": ("one LoRA", "one LoRA, replay", 8, 3),
    "one LoRA rehearsed": ("one LoRA", "one LoRA, rehearsed", 8, 3),
    "one LoRA": ("one LoRA", "one LoRA", 8, 3),
    "all at once": ("all at once", "all at once", 40, 3),
    "all at once on kept rows": ("all at once", "all at once on kept rows", 40, 3),
}


def arm(name: str, study: str = "primary", of: int | None = None) -> list[Mapping[str, Any]]:
    """The test cells of an arm with the settings of a study, of its first `of` seeds."""
    plan = from_yaml("stages/plan.yaml")
    named = next(each for each in plan["studies"] if each["name"] == study)
    settings, seeds = plan["defaults"] | named.get("change", {}), named["seeds"][:of]
    found = script("stages/table.py").of_arm(lines("stages/results.jsonl"), named, settings, name)
    assert {*seeds} <= found.keys()
    return [found[seed] for seed in seeds]


def right(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    return [100 * fmean(cell["right"].values()) for cell in cells]


def alone() -> list[float]:
    """Each stage on the test rows of its own task, by seed; arms beside each other share them."""
    found = [
        [100 * fmean(cell["learned"].values()) for cell in arm(name)]
        for name, (study, *_) in ARMS.items()
        if study == "primary" and "combined" in name
    ]
    assert all(each == found[0] for each in found)
    return found[0]


def gaps(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Paired differences, of the same seeds in the same order."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def alone_ahead_of_combined() -> list[str]:
    """How far each stage alone is ahead of the present combination: in the registered study, and
    with facts of six months at the default rank."""
    table = script("combining/table.py")
    five = [table.alone(cell) - table.right(cell) for cell in fresh("layer by layer")]
    own, wide = of_month("alone"), of_month("wide")
    facts = [100 * (own[seed]["score"] - wide[seed]["score"]) for seed in sorted(wide)]
    return [estimate(five, 1, "-"), three_seeds(facts, 1)]


def alone_ahead() -> str:
    return estimate(gaps(alone(), right(arm("combined twice rehearsed"))), 1)


def stages_in_short() -> Rows:
    """The arms without a rehearsal; of the combinations the one of two passes."""
    rehearsed = [name for name in ARMS if "rehearsed" in name]
    return stages([name for name in ARMS if name not in (*rehearsed, "combined", "summed")])


def stages(names: Sequence[str] = tuple(ARMS)) -> Rows:
    """The arms with one shared question; those of three seeds have no interval."""
    forgetting = script("stages/table.py").forgetting
    heads = "arm | right, % | forgotten, points | kept rows trained on | exported rank"
    rows: Rows = [heads.split(" | ")]
    for name in names:
        study, shown, rank, seeds = ARMS[name]
        cells = arm(name, study, seeds)
        lost = [100 * forgetting(cell) for cell in cells if cell["learned"]]
        grams = 32 * 5 if "combined" in name else 0  # of a task, of five, read for Grams
        old = fmean(cell["old_rows"] for cell in cells) - grams
        forgotten = estimate(lost, 1, "-") if lost else MISSING
        rows.append((shown, estimate(right(cells), 1, "-"), forgotten, f"{old:,.0f}", f"{rank}"))
    own = estimate(alone(), 1, "-")
    return [*rows, ("each stage alone, its own rows", own, MISSING, "0", "five of rank 8")]


ALL_KEPT = "second pass, all rows kept"
LENGTHS = {0: "", 40: "", 80: ", 80 steps", 160: ", 160 steps"}  # rehearsal, the study's name


def of_length(steps: int) -> list[Mapping[str, Any]]:
    name = "combined twice rehearsed" if steps else "combined twice"
    return arm(name, f"{ALL_KEPT}{LENGTHS[steps]}")


def behind(steps: int) -> str:
    """How far all at once is ahead of a length of rehearsal, in points, on the same seeds."""
    at_once = right(arm("all at once", "all at once"))
    return number(fmean(gaps(at_once, right(of_length(steps)))), 1, "-")


def all_kept() -> dict[str, list[float]]:
    """By seed: 160 steps of rehearsal, and replay of as many old rows."""
    replay = arm("replay", f"{ALL_KEPT}{LENGTHS[160]}")
    return {"extend": right(of_length(160)), "replay": right(replay)}


def replayed() -> list[str]:
    """What replay has, and by seed; by seed the rehearsal."""
    own, replay = all_kept().values()
    return [number(value, 1, "-") for value in (fmean(replay), *replay, *own)]


def replay_is_ahead() -> list[str]:
    """On how many of the seeds."""
    own, replay = all_kept().values()
    return [WORDS[sum(gap < 0 for gap in gaps(own, replay))], WORDS[len(own)]]


def all_kept_in_short() -> list[str]:
    """Right answers of replay and of the rehearsal, on how many seeds replay is ahead, and right
    answers of all at once."""
    replay, own = (number(fmean(all_kept()[name]), 1, "-") for name in ("replay", "extend"))
    at_once = number(fmean(right(arm("all at once", "all at once"))), 1, "-")
    return [replay, own, *replay_is_ahead(), at_once]


WORDS = ("none", "one", "two", "three", "four", "five", "six")


def planned(*keys: str) -> list[int]:
    plan = from_yaml("stages/plan.yaml")
    steps = plan["rows"]["train"] // plan["batch"]
    return [(plan["defaults"] | {"steps": steps})[key] for key in keys]


def tuned(name: str, **settings: float) -> list[float]:
    """Right validation answers of an arm's trials on the tuning seed."""
    cells = lines("stages/results.jsonl")
    mine = [c for c in cells if (c["arm"], c["split"]) == (name, "validation")]
    return right([c for c in mine if settings.items() <= c["settings"].items()])


def rates_tried(name: str) -> tuple[str, str, str]:
    """How many rates an arm tried, how far apart they are, in points, and what it has."""
    found, chosen = tuned(name), fmean(right(arm(name, ARMS[name][0])))
    return WORDS[len(found)], *(number(x, 1, "-") for x in (max(found) - min(found), chosen))


def tuned_twice() -> list[str]:
    """Trials of two passes at the rate that was chosen, then rehearsed at two rates."""
    again = [tuned("combined twice rehearsed", rate=1e-3, again=rate) for rate in (1e-3, 3e-4)]
    return [number(*each, 1, "-") for each in (tuned("combined twice", rate=1e-3), *again)]


def percent(*values: Sequence[float]) -> list[str]:
    return [number(fmean(each), 0, "-") for each in values]


def kept_32(*names: str, of: int | None = None) -> list[str]:
    return percent(*(right(arm(name, ARMS[name][0], of)) for name in names))


def rehearsals() -> Rows:
    """The combination with all rows kept, by the length of rehearsal."""
    forgetting = script("stages/table.py").forgetting
    heads = "steps of rehearsal | all steps | right, % | forgotten, points | behind all at once"
    rows: Rows = [heads.split(" | ")]
    for steps in LENGTHS:
        cells = of_length(steps)
        lost = [100 * forgetting(cell) for cell in cells]
        shown = (estimate(values, 1, "-") for values in (right(cells), lost))
        rows.append((f"{steps}", f"{cells[0]['steps']}", *shown, behind(steps)))
    return rows


def lead(name: str, other: str, sign: str = "+") -> str:
    """The mean difference of two arms on the seeds of both, in points."""
    seeds = min(ARMS[name][-1], ARMS[other][-1])
    pair = (right(arm(each, ARMS[each][0], seeds)) for each in (name, other))
    return number(fmean(gaps(*pair)), 1, sign)


def own_question(*names: str) -> list[str]:
    return [number(fmean(right(arm(name, "own question"))), 1, "-") for name in names]


def ahead(name: str, other: str) -> str:
    """The mean difference of two arms, in points, and its interval."""
    return estimate(gaps(right(arm(name)), right(arm(other))), 1)


@cache
def trial() -> Mapping[str, Values]:
    """The average of the first trial after the third task, in per cent, by order."""
    found: dict[str, dict[int, float]] = {}
    orders: list[list[str]] = []
    for line in lines("stages/results-2026-11.jsonl"):
        if len(line["right"]) == 3 and line["arm"] != "together":
            if line["order"] not in orders:
                orders.append(line["order"])
            right = found.setdefault(line["arm"], {})
            right[orders.index(line["order"])] = 100 * fmean(line["right"].values())
    return found


def orders_less_one_lora() -> str:
    ours, theirs = (trial()[arm] for arm in ("chain", "one LoRA"))
    return estimate(less(ours, theirs), 1)


# --- combined layer by layer


@cache
def fresh(name: str, study: str = "verdict") -> list[Mapping[str, Any]]:
    """The cells of an arm of benchmarks/combining on the seeds of a study, in their order."""
    seeds = from_yaml("combining/plan.yaml")[study]["seeds"]
    found = script("combining/table.py").arms_of(lines("combining/results.jsonl"), seeds)[name]
    return [found[seed] for seed in sorted(found)]


def combining() -> Rows:
    """The arms of the verdict."""
    table = script("combining/table.py")
    rows: Rows = [["arm", "right, %", "perplexity", "facts", "exported rank"]]
    shown = {"layer by layer": ("layer by layer", 16), "default": ("two passes, rehearsed", 48)}
    for name, (text, rank) in shown.items():
        cells = fresh(name)
        ratios = estimate([*map(table.ratio, cells)], 3, "-")
        facts = number(fmean(map(table.facts, cells)), 2, "-")
        rows.append((text, estimate(right(cells), 1, "-"), ratios, facts, f"{rank}"))
    own = estimate([*map(table.alone, fresh("layer by layer"))], 1, "-")
    return [*rows, ("each stage alone, its own rows", own, MISSING, MISSING, "five of rank 8")]


def layerwise_in_short() -> list[str]:
    table, cells = script("combining/table.py"), fresh("layer by layer")
    shares = percent(right(cells), [*map(table.alone, cells)])
    return [WORDS[len(cells)], *shares]


def worse() -> list[float]:
    """By how many per cent perplexity of other text rises with the combination, by seed."""
    ratio = script("combining/table.py").ratio
    return [100 * (ratio(cell) - 1) for cell in fresh("layer by layer")]


def registered(study: str = "verdict") -> list[str]:
    """The comparisons that were named beforehand: right answers less the earlier default's, less
    each stage alone, and the ratio of perplexity."""
    table = script("combining/table.py")
    cells = fresh("layer by layer", study)
    others = {c["seed"]: c for c in fresh("default", study)}
    pairs = [(cell, others[cell["seed"]]) for cell in cells if cell["seed"] in others]
    primary = [table.right(own) - table.right(other) for own, other in pairs]
    second = [table.right(own) - table.alone(own) for own in cells]
    ratios = estimate([*map(table.ratio, cells)], 3, "-")
    return [estimate(primary, 1), estimate(second, 1, "-"), ratios]


def second_try() -> list[str]:
    """The same of the rule's second try, and the earlier default's ratio of perplexity there."""
    ratios = map(script("combining/table.py").ratio, fresh("default", "second_try"))
    return [*registered("second_try"), estimate([*ratios], 3, "-")]


def ranks_compared() -> list[str]:
    """Rank, right answers and ratio of perplexity of the seeds that have a rank of 40, too."""
    table, found = script("combining/table.py"), list[str]()
    wide = fresh("layer by layer, rank 40")
    both = {cell["seed"] for cell in wide}
    for cells in (wide, [c for c in fresh("layer by layer") if c["seed"] in both]):
        ratio = number(fmean(map(table.ratio, cells)), 3, "-")
        found += [str(cells[0]["settings"]["rank"]), number(fmean(right(cells)), 1, "-"), ratio]
    return found


# --- facts of six months

MONTHS = {  # by the name in results: how the page names it
    "combine": "combined, rank 16",
    "wide": "combined, rank 48",
    "rehearse": "combined, rank 16, rehearsed",
    "replay": "on top, replay",
    "alone": "each stage alone, its own rows",
}


def of_month(name: str) -> dict[int, Mapping[str, Any]]:
    """The cells of a way by seed."""
    cells = [line for line in lines("combining/months.jsonl") if line.get("method") == name]
    return {cell["seed"]: cell for cell in cells}


def three_seeds(values: Sequence[float], digits: int, sign: str = "-") -> str:
    """A mean with its t interval, which this study names for three seeds."""
    return with_interval(fmean(values), *t_interval(values), digits, sign)


def worse_on_general_rows(name: str) -> str:
    """By how many per cent perplexity of held-out general rows rises after six months."""
    losses = [cell["general"] for cell in of_month(name).values()]
    return three_seeds([100 * (exp(each["end"] - each["base"]) - 1) for each in losses], 1)


def facts_kept(name: str) -> str:
    return number(100 * fmean(cell["score"] for cell in of_month(name).values()), 0, "-")


def months() -> Rows:
    rows: Rows = [["way", "right, %", "perplexity of general rows", "exported rank"]]
    for name, text in MONTHS.items():
        cells = [*of_month(name).values()]
        losses = [cell["general"] for cell in cells if cell["general"]]
        ratios = [exp(each["end"] - each["base"]) for each in losses]
        rank = cells[0]["exported_rank"]
        rows.append(
            (
                text,
                three_seeds([100 * cell["score"] for cell in cells], 1),
                three_seeds(ratios, 3) if ratios else MISSING,
                f"{rank}" if rank else "six of rank 8",
            )
        )
    return rows


def after_a_year() -> list[int]:
    """Right answers of replay, of how many, and those of the combination at the default rank."""
    found = {(x["way"], x["state"]): x for x in lines("combining/year.jsonl") if "state" in x}
    replay, ours = found["replay", "now"], found["extend", "now, rank 96"]
    return [sum(replay["right"]), replay["of"], sum(ours["right"])]


def replay_of_facts() -> list[str]:
    """How far replay is ahead of the default rank, and its share of old rows."""
    replay, wide = of_month("replay"), of_month("wide")
    less = [100 * (replay[seed]["score"] - wide[seed]["score"]) for seed in sorted(wide)]
    stages = (stage for cell in replay.values() for _, stage in cell["config"]["stages"])
    (share,) = {stage["data"]["replay"] for stage in stages}
    return [three_seeds(less, 1), {0.5: "half", 1.0: "just"}[share]]


def months_compared() -> list[str]:
    """The registered comparisons: rank 48 less 16, rank 16 less replay, rank 48 less replay."""
    found = []
    for one, other in (("wide", "combine"), ("combine", "replay"), ("wide", "replay")):
        ours, theirs = of_month(one), of_month(other)
        both = sorted({*ours} & {*theirs})
        less = [100 * (ours[seed]["score"] - theirs[seed]["score"]) for seed in both]
        found.append(three_seeds(less, 1, "+"))
    return found

"""Every number of docs/evidence.md, and what README.md takes from that page, is recomputed from the
committed results. After new results, `python tests/test_evidence.py` rewrites the page's tables."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import yaml

pytest.importorskip("scipy", reason="no package scipy")

from chainlora_lab.report.comparisons import compare_all
from chainlora_lab.report.values import by_seed
from chainlora_lab.results import read_results
from chainlora_lab.statistics.intervals import MIN_FOR_INTERVAL, mean_interval

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
EVIDENCE = ROOT / "docs/evidence.md"
MISSING = "–"
Values = dict[int, float]  # by seed
Rows = list[Sequence[str]]


# --- reading and printing ---


@cache
def lines(name: str) -> list[dict[str, Any]]:
    text = (BENCHMARKS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def from_json(name: str) -> Any:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


@cache
def from_yaml(name: str) -> Any:
    return yaml.safe_load((BENCHMARKS / name).read_text(encoding="utf-8"))


def number(value: float, digits: int = 3, sign: str = "+") -> str:
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def estimate(values: Sequence[float], digits: int = 3, sign: str = "+") -> str:
    """A mean with its interval where there are pairs enough for one."""
    if len(values) < MIN_FOR_INTERVAL:
        return number(fmean(values), digits, sign)
    return with_interval(fmean(values), *mean_interval(values), digits, sign)


def with_interval(mean: float, low: float, high: float, digits: int = 3, sign: str = "+") -> str:
    shown = [number(value, digits, sign) for value in (mean, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def less(ours: Values, theirs: Values) -> list[float]:
    """Paired differences, of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def mean(values: Sequence[float]) -> str:
    return number(fmean(values)) if values else MISSING


# --- the lab ---

LAB_PARAMETERS = 5780  # of rank 1 on the 35 linear layers of stories260k


@cache
def lab_cells() -> Mapping[tuple[str, str], Values]:
    found: dict[tuple[str, str], Values] = {}
    for line in lines("lab/results/cells.jsonl"):
        if line["config"]["held_out"] == "results":  # fresh seeds, each arm at its own best rate
            by_arm = found.setdefault((line["study"], line["name"]), {})
            assert by_arm.setdefault(line["config"]["seed"], line["loss"]) == line["loss"]
    return found


def lab(rank: int, steps: int, arm: str = "lora") -> Values:
    return lab_cells().get((f"gsm8k-r{rank}-{steps}", arm), {})


LAB_STUDIES = [
    *((1, steps) for steps in (250, 1000, 4000, 16000)),
    *((2, steps) for steps in (1000, 4000)),
    *((4, steps) for steps in (4000, 16000)),
    *((8, steps) for steps in (4000, 16000)),
]


def soft_less_lora(rank: int, steps: int, by: int) -> list[float]:
    """Soft knots less LoRA of so many times the rank."""
    return less(lab(rank, steps, "auto"), lab(rank * by, steps))


def soft_lab() -> Rows:
    rows: Rows = [("rank r", "steps", "tokens/parameter", "minus LoRA r", "minus 2r", "minus 4r")]
    for rank, steps in LAB_STUDIES:
        per_parameter = steps * 4 * 64 / (LAB_PARAMETERS * rank)
        own, *rivals = (soft_less_lora(rank, steps, by) for by in (1, 2, 4))
        start = (str(rank), f"{steps:,}", f"{per_parameter:.0f}")
        rows.append((*start, estimate(own), *map(mean, rivals)))
    return rows


def all_behind() -> str:
    """How often LoRA of more rank was compared; it is ahead each time, on all six seeds."""
    found = [soft_less_lora(*study, by) for study in LAB_STUDIES for by in (2, 4)]
    found = [values for values in found if values]
    assert all(len(values) == 6 and min(values) > 0 for values in found)
    return str(len(found))


# --- SmolLM2, and the paper's questions ---


@cache
def runs(folder: str, method: str) -> Values:
    """Scores of the final runs on the only task, by seed."""
    results = read_results(BENCHMARKS / folder)
    (task,) = results.experiment["tasks"]
    return by_seed(results, task, method)


def soft_smollm2() -> Rows:
    rows: Rows = [
        ("text", "rank r", "steps", "tokens/parameter", "seeds", "minus LoRA r", "minus 4r")
    ]
    for text, folder, wide in (
        ("translations", "translations", {}),
        ("16 languages", "scripts", {}),
        ("16 languages", "long", runs("smollm2/long_rank4", "lora")),
        ("16 languages", "long_rank4", {}),
    ):
        soft = runs(f"smollm2/{folder}", "soft")
        run = read_results(BENCHMARKS / "smollm2" / folder).finals[-1]
        tokens = run["tokens"]
        if folder == "translations":  # prompts are not learned; one cell has counted the rest
            cells = lines("smollm2/gate/results.jsonl")
            (counted,) = (each for each in cells if "scored_tokens" in each)
            tokens *= counted["scored_tokens"] / counted["tokens"]
        per_parameter = f"{tokens / run['trainable_parameters']:.0f}"
        own = estimate(less(soft, runs(f"smollm2/{folder}", "lora")))
        start = (text, str(run["ranks"][0]), f"{run['steps']:,}", per_parameter, str(len(soft)))
        rows.append((*start, own, mean(less(soft, wide))))
    return rows


def whole() -> Rows:
    """Chains of whole knots by loss; rivals of equal memory, and of equal exported rank."""
    rows: Rows = [("links×r", "text", "steps a link", "seeds", "minus LoRA r", "minus Σr")]

    def add(links: int, rank: int, text: str, steps: int, ours: Values, *rivals: Values) -> None:
        own, total = (less(ours, rival) for rival in rivals)
        start = (f"{links}×{rank}", text, f"{steps // links:,}", str(len(ours)))
        rows.append((*start, estimate(own), mean(total)))

    for rank, steps in ((1, 1000), (1, 4000), (8, 1000)):
        rivals = (lab(rank * by, steps) for by in (1, 4))
        add(4, rank, "GSM8K, lab", steps, lab(rank, steps, "classic4"), *rivals)
    long = (runs(f"smollm2/{folder}", "lora") for folder in ("long", "long_rank4"))
    add(4, 1, "16 languages", 4000, runs("smollm2/long", "whole"), *long)
    for links in (4, 8):
        names = (f"chain{links}_r1", "lora_r1", f"lora_r{links}")
        add(links, 1, "GSM8K", 160, *(runs("paper/rank1", name) for name in names))
    return rows


@cache
def compared(folder: str) -> Mapping[tuple[str, str], Any]:
    """The experiment's own comparisons over all its tasks, or on its only one."""
    found = compare_all(read_results(BENCHMARKS / "paper" / folder))
    return {(each.method, each.rival): each.difference for each in found}


def points(folder: str, method: str, rival: str) -> tuple[str, str, str]:
    """Pairs, difference in points and p of an experiment's own comparison, in either direction."""
    if found := compared(folder).get((method, rival)):
        values = (found.mean, found.low, found.high)
    else:
        found = compared(folder)[rival, method]
        values = (-found.mean, -found.high, -found.low)
    return str(found.num_pairs), with_interval(*values, digits=2), f"{found.p_holm:.2f}"


def classification() -> Rows:
    return [("method", "less", "pairs", "points", "p, Holm")] + [
        (name, rival_name, *points(folder, method, rival))
        for name, rival_name, folder, method, rival in (
            ("two links", "LoRA r", "table1", "chain2", "lora"),
            ("three links", "LoRA r", "table1", "chain3", "lora"),
            ("three links", "LoRA Σr", "table1", "chain3", "lora_sum_rank"),
            ("soft knots", "LoRA r", "soft", "soft", "lora"),
            ("two links", "LoRA r", "step_down", "chain_8_8", "lora"),
        )
    ]


# --- stages ---


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


def stages() -> Rows:
    """The arms with one shared question; those of three seeds have no interval."""
    forgetting = script("stages/table.py").forgetting
    heads = "arm | right, % | forgotten, points | kept rows trained on | exported rank"
    rows: Rows = [heads.split(" | ")]
    for name, (study, shown, rank, seeds) in ARMS.items():
        cells = arm(name, study, seeds)
        lost = [100 * forgetting(cell) for cell in cells if cell["learned"]]
        grams = 32 * 5 if "combined" in name else 0  # of a task, of five, read for Grams
        old = fmean(cell["old_rows"] for cell in cells) - grams
        forgotten = estimate(lost, 1, "-") if lost else MISSING
        rows.append((shown, estimate(right(cells), 1, "-"), forgotten, f"{old:,.0f}", f"{rank}"))
    return rows


ALL_KEPT = "second pass, all rows kept"
LENGTHS = {0: "", 40: "", 80: ", 80 steps", 160: ", 160 steps"}  # rehearsal, the study's name


def of_length(steps: int) -> list[Mapping[str, Any]]:
    name = "combined twice rehearsed" if steps else "combined twice"
    return arm(name, f"{ALL_KEPT}{LENGTHS[steps]}")


def behind(steps: int) -> str:
    """How far all at once is ahead of a length of rehearsal, in points, on the same seeds."""
    pairs = zip(right(arm("all at once", "all at once")), right(of_length(steps)), strict=True)
    return number(fmean(a - b for a, b in pairs), 1, "-")


def replayed() -> list[str]:
    """What replay of as many old rows as 160 steps read has, and by seed; by seed the rehearsal."""
    replay, own = (right(e) for e in (arm("replay", f"{ALL_KEPT}, 160 steps"), of_length(160)))
    return [number(value, 1, "-") for value in (fmean(replay), *replay, *own)]


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
    pairs = zip(*(right(arm(each, ARMS[each][0], seeds)) for each in (name, other)), strict=True)
    return number(fmean(a - b for a, b in pairs), 1, sign)


def own_question(*names: str) -> list[str]:
    return [number(fmean(right(arm(name, "own question"))), 1, "-") for name in names]


def ahead(name: str, other: str) -> str:
    """The mean difference of two arms, in points, and its interval."""
    pairs = zip(right(arm(name)), right(arm(other)), strict=True)
    return estimate([a - b for a, b in pairs], 1)


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


# --- speed, memory, numerics ---


def contest(file: str, benchmark: str, peer: str, ours: str = "chainlora") -> tuple[float, float]:
    """Times as fast as a peer, per processor second where other processes took cores, and the share
    of its memory."""
    entries = {
        line["entry"]: line
        for line in lines(f"speed/results/2026-11-{file}.jsonl")
        if line["benchmark"] == benchmark
    }
    one, other = entries[ours], entries[peer]
    is_busy = max(one["others_cores"], other["others_cores"]) > 1
    rate = "rows_per_processor_second" if is_busy else "rows_per_second"
    return one[rate] / other[rate], one["peak_mb"] / other["peak_mb"]


def times(value: float) -> str:
    return number(value, 1 if value >= 1 else 2, "-")


def speed() -> Rows:
    trainer = "Trainer + PEFT"
    return [("rows", "compared with", "times as fast", "share of its memory")] + [
        (label, peer.removesuffix(" + PEFT"), *map(times, contest(file, benchmark, peer)))
        for label, file, benchmark, peer in (
            ("SST-2, 13 tokens", "26-short", "sst2-bfloat16", trainer),
            ("SST-2, another machine", "25", "sst2-bfloat16", trainer),
            ("4,096 tokens", "26-long", "long-4096-bfloat16", trainer),
            ("1,024 tokens, 1.3B", "26-large", "1.3b-1024-bfloat16", trainer),
            ("GSM8K", "25", "gsm8k-bfloat16", "TRL packing"),
        )
    ]


def checkpointed() -> list[tuple[float, float]]:
    """What `gradient_checkpointing` takes, against a peer without it."""
    return [
        contest(file, f"{name}-bfloat16", "Trainer + PEFT", "chainlora, checkpointed")
        for file, name in (
            ("26-long", "long-1024"),
            ("26-long", "long-4096"),
            ("26-long-7600", "long-7600"),
            ("26-large", "0.5b-1024"),
            ("26-large", "1.3b-1024"),
        )
    ]


def rank_cost() -> str:
    cells = lines("speed/results/2026-11-25.jsonl")
    found = {each["entry"]: each for each in cells if each["benchmark"] == "rank-64"}
    return times(found["rank 64"]["seconds_per_step"] / found["rank 8"]["seconds_per_step"])


def knots(kind: str, dtype_or_links: str | int) -> dict[str, Any]:
    """The row of numerics/ about whole knots (by links), or soft ones (by dtype)."""
    rows = from_json(f"numerics/{kind}.json")["rows"]
    (found,) = [row for row in rows if dtype_or_links in (row.get("dtype"), row.get("links"))]
    return found


# --- sentences ---


def orders_less_one_lora() -> str:
    ours, theirs = (trial()[arm] for arm in ("chain", "one LoRA"))
    return estimate(less(ours, theirs), 1)


def paper_gain() -> str:
    """The paper's gain of three links, in points, over the tasks of table1."""
    scores = from_yaml("paper/printed/tables.yaml")["table1"]["scores"]
    tasks = read_results(BENCHMARKS / "paper/table1").experiment["tasks"]
    return f"{fmean(scores['chain3'][task] - scores['lora'][task] for task in tasks):.2f}"


def faults() -> str:
    classes = from_json("faults/soak.json")["classes"].values()
    ended = {how for each in classes for how in each}
    assert ended == {"right", "detected", "harmless", "refused"}
    return f"{sum(sum(each.values()) for each in classes):,}"


def shared(dtype: str) -> str:
    return f"{100 * knots('soft_knots', dtype)['knot_share_every_10']:.2f}"


def rank16_ahead() -> str:
    ours, theirs = (runs("smollm2/scripts_scout", method) for method in ("soft", "r16"))
    return number(fmean(less(ours, theirs)), sign="-")


def restarted() -> str:
    found = compared("rank1_settings")["chain4_r1_restart", "chain4_r1"]
    return with_interval(found.mean, found.low, found.high)


def detectable() -> tuple[str, str]:
    found = compared("table1")["chain3", "lora"]
    return f"{found.detectable:.2f}", str(found.num_pairs)


def soft_rank() -> tuple[str, str]:
    found = knots("soft_knots", "bfloat16")
    return f"{max(found['stored_ranks']):.0f}", str(found["soft_knots"])


def checkpointing() -> list[str]:
    speeds, shares = zip(*checkpointed(), strict=True)
    return [f"{of(shares):.2f}" for of in (min, max)] + [f"{of(speeds):.1f}" for of in (min, max)]


def errors() -> list[float]:
    whole, soft = knots("knots", 16), [knots("soft_knots", x) for x in ("bfloat16", "float32")]
    return [whole["error_rebuilt"], whole["error_in_place"], *(fmean(x["error"]) for x in soft)]


SENTENCES: list[tuple[str, Callable[[], Iterable[str]]]] = [  # a text of the page, its numbers
    ("Rank 64 takes {} times the time of rank 8", lambda: [rank_cost()]),
    ("adds {} % (float32) or {} % (bfloat16)", lambda: [shared("float32"), shared("bfloat16")]),
    ("has rank {} after {} knots", soft_rank),
    ("ahead in all {} comparisons", lambda: [all_behind()]),
    ("rank 16 is {} ahead", lambda: [rank16_ahead()]),
    (
        "gain {0} points on these six tasks. With 80 % power, {2} pairs detect {1} points",
        lambda: [paper_gain(), *detectable()],
    ),
    ("on top less one LoRA: {} points", lambda: [orders_less_one_lora()]),
    (
        "in one pass, rehearsed, less on top, rehearsed: {} points",
        lambda: [ahead("combined rehearsed", "on top rehearsed")],
    ),
    (
        "(two seeds), they have {} and {} %",
        lambda: own_question("combined rehearsed", "on top rehearsed"),
    ),
    ("two passes, rehearsed, have {} %", lambda: own_question("combined twice rehearsed")),
    ("on top, rehearsed, less replay: {} points", lambda: [ahead("on top rehearsed", "replay")]),
    (
        "both rehearsed: {} points; without rehearsal: {}; two passes, rehearsed, less replay: {}.",
        lambda: [
            ahead("combined twice rehearsed", "combined rehearsed"),
            ahead("combined twice", "combined"),
            ahead("combined twice rehearsed", "replay"),
        ],
    ),
    (
        "on the same seeds: {} points at rank 8 (equal memory), {} at rank 40",
        lambda: [lead(f"one {size}LoRA replay", "replay") for size in ("", "wide ")],
    ),
    (
        "less one LoRA, rehearsed: {} points at rank 8, {} at rank 40",
        lambda: [
            lead("combined twice rehearsed", f"one {size}LoRA rehearsed") for size in ("", "wide ")
        ],
    ),
    (
        "all at once is {} points ahead",
        lambda: [lead("all at once", "combined twice rehearsed", "-")],
    ),
    ("old rows has {} %; by seed {}, {} and {}, the combination {}, {} and {}.", replayed),
    ("takes {} to {} of its memory at {} to {} times its speed", checkpointing),
    (
        "{:.1f} after 16 whole knots (merging in place: {:.1f}), {:.1f} after 400 soft ones "
        "(float32 weights, in their smaller roundings: {:.1f})",
        errors,
    ),
    ("Of {} [faults]), none ended in lost or wrong results", lambda: [faults()]),
    ("a schedule for each ({})", lambda: [restarted()]),
]
NOT_MEASURED = {"0.26M": "the size of stories260k", "2401.04151": "arXiv", "2510.23818": "arXiv"}


# --- the page ---

TABLES: dict[str, Callable[[], Rows]] = {
    table.__name__: table
    for table in (soft_lab, soft_smollm2, whole, classification, stages, rehearsals, speed)
}
NUMBER = re.compile(r"(?<![\w.-])[+−]?\d[\d,]*\.\d+(?:e-\d+)?M?|[+−]\d+")


def markdown(rows: Rows) -> str:
    shown = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([shown[0], f"|{'---|' * len(rows[0])}\n", *shown[1:]])


def flat(text: str) -> str:
    """Text without line ends and link targets."""
    return " ".join(re.sub(r"\]\([^)]*\)", "])", text).split())


def evidence() -> str:
    return EVIDENCE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_results(name):
    assert markdown(TABLES[name]()) in evidence()


@pytest.mark.parametrize(("text", "numbers"), SENTENCES, ids=[text for text, _ in SENTENCES])
def test_the_numbers_of_a_sentence_are_those_of_the_results(text, numbers):
    assert text.format(*numbers()) in flat(evidence())


def test_no_number_of_the_page_is_unchecked():
    rest = flat(re.sub(r"^\|.*\n", "", evidence(), flags=re.MULTILINE))
    for text, numbers in SENTENCES:
        rest = rest.replace(text.format(*numbers()), "")
    assert {*NUMBER.findall(rest)} <= NOT_MEASURED.keys()
    tables = [line for line in evidence().splitlines() if line.startswith("|")]
    assert len(tables) == sum(len(table()) + 1 for table in TABLES.values())


def test_the_readme_has_no_other_results_than_the_page():
    """In each paragraph, with its table, or list that links to results."""
    known = {*NUMBER.findall(evidence()), *NOT_MEASURED}
    for run in read_results(BENCHMARKS / "paper/rank1").finals:  # tokens a parameter
        known.add(f"{run['tokens'] / run['trainable_parameters']:.1f}")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\n\n(?=\|)", "\n", text)  # a table belongs to the paragraph before it
    for block in text.split("\n\n"):
        if re.search(r"\]\((?:benchmarks/|docs/evidence)", block):
            assert {*NUMBER.findall(re.sub(r"\]\([^)]*\)", "", block))} <= known, block


def write_tables() -> None:
    """Put today's tables where the page has one with the same heads."""
    page = evidence()
    for table in TABLES.values():
        rows = table()
        old = re.escape(markdown(rows[:1])) + r"(?:\|.*\n)*"
        page, count = re.subn(old, markdown(rows), page)
        assert count == 1, rows[0]
    EVIDENCE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_tables()

"""The numbers of docs/evidence.md, and the tables of that page, from the committed results."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

pytest.importorskip("scipy", reason="no package scipy")

from chainlora_lab.report.comparisons import compare_all
from chainlora_lab.report.values import by_seed
from chainlora_lab.results import read_results
from chainlora_lab.statistics.intervals import MIN_FOR_INTERVAL, mean_interval

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
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


def soft_lab() -> list[str]:
    """In how many of all studies with fresh seeds the interval of `auto` less LoRA of equal rank is
    below 0, with the means nearest to and farthest from it; then in how many it includes 0, with
    the ends of their means. It is above 0 in none."""
    ahead, level, studies = list[float](), list[float](), 0
    for (study, arm), soft in lab_cells().items():
        if arm == "auto":
            values = less(soft, lab_cells()[study, "lora"])
            low, high = mean_interval(values)
            assert low < 0, study
            studies += 1
            (ahead if high < 0 else level).append(fmean(values))
    of_ahead = (number(each) for each in (max(ahead), min(ahead)))
    of_level = (number(each) for each in (min(level), max(level)))
    return [f"{len(ahead)}", f"{studies}", *of_ahead, f"{len(level)}", *of_level]


def all_behind() -> list[str]:
    """How often LoRA of more rank was compared, and the ends of its mean lead. It is ahead each
    time, on all six seeds."""
    found = []
    for (study, arm), soft in lab_cells().items():
        for by in (2, 4) if arm == "auto" else ():
            wider = re.sub(r"-r(\d+)-", lambda rank: f"-r{by * int(rank[1])}-", study)  # noqa: B023
            if lora := lab_cells().get((wider, "lora")):
                found.append(less(soft, lora))
    assert all(len(values) == 6 and min(values) > 0 for values in found)
    means = [fmean(values) for values in found]
    return [f"{len(found)}", number(min(means)), number(max(means))]


# --- SmolLM2, and the paper's questions ---


@cache
def runs(folder: str, method: str) -> Values:
    """Scores of the final runs on the only task, by seed."""
    results = read_results(BENCHMARKS / folder)
    (task,) = results.experiment["tasks"]
    return by_seed(results, task, method)


def num_steps(folder: str) -> str:
    return f"{read_results(BENCHMARKS / 'smollm2' / folder).finals[-1]['steps']:,}"


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


def classification() -> list[str]:
    """Differences in points and Holm's p of five comparisons, of 30, 30, 30, 10 and 15 pairs."""
    found = [
        points(folder, method, rival)
        for folder, method, rival in (
            ("table1", "chain2", "lora"),
            ("table1", "chain3", "lora"),
            ("table1", "chain3", "lora_sum_rank"),
            ("soft", "soft", "lora"),
            ("step_down", "chain_8_8", "lora"),
        )
    ]
    assert [pairs for pairs, *_ in found] == ["30", "30", "30", "10", "15"]
    return [text for _, *texts in found for text in texts]


# --- speed, memory, numerics ---


def entries(file: str, benchmark: str) -> dict[str, dict[str, Any]]:
    """The lines of a contest, by entry."""
    some = lines(f"speed/results/2026-11-{file}.jsonl")
    return {line["entry"]: line for line in some if line["benchmark"] == benchmark}


def contest(
    file: str, benchmark: str, peer: str, ours: str = "chainlora", *, per_cpu: bool = False
) -> tuple[float, float]:
    """Times as fast as a peer, per processor second where other processes took cores, and the share
    of its memory."""
    one, other = (entries(file, benchmark)[name] for name in (ours, peer))
    is_busy = per_cpu or max(one["others_cores"], other["others_cores"]) > 1
    rate = "rows_per_processor_second" if is_busy else "rows_per_second"
    return one[rate] / other[rate], one["peak_mb"] / other["peak_mb"]


def times(value: float) -> str:
    return number(value, 1 if value >= 1 else 2, "-")


PEERS = ("Trainer + PEFT", "TRL", "TRL packing")
CONTESTS = {  # a file of results, a benchmark: how the page names it
    ("26-short", "sst2-bfloat16"): "SST-2, 13 tokens",
    ("25", "sst2-bfloat16"): "SST-2, another machine",
    ("25", "rte-bfloat16"): "RTE, 85 tokens",
    ("25", "rte-all-linear-bfloat16"): "RTE, all linear layers",
    ("25", "multirc-bfloat16"): "MultiRC, 380 tokens",
    ("26-long", "long-1024-bfloat16"): "1,024 tokens",
    ("26-long", "long-4096-bfloat16"): "4,096 tokens",
    ("26-long-7600", "long-7600-bfloat16"): "7,600 tokens",
    ("26-large", "0.5b-1024-bfloat16"): "1,024 tokens, 0.5B",
    ("26-large", "1.3b-1024-bfloat16"): "1,024 tokens, 1.3B",
    ("25", "gsm8k-bfloat16"): "GSM8K",
    ("25", "chat-bfloat16"): "chat",
}


def contests() -> dict[tuple[str, str, str], tuple[float, float]]:
    """All trainings in bfloat16 against a peer: none is left out."""
    found = {}
    for path in sorted((BENCHMARKS / "speed/results").glob("2026-*.jsonl")):
        file = path.stem.removeprefix("2026-11-")
        for line in lines(f"speed/results/{path.name}"):
            named, peer = line["benchmark"], line["entry"]
            if named.endswith("bfloat16") and peer in PEERS:
                found[file, named, peer] = contest(file, named, peer)
    return found


def speed() -> Rows:
    found = contests()
    assert {key[:2] for key in found} == CONTESTS.keys()
    return [("rows", "compared with", "times as fast", "share of its memory")] + [
        (label, peer.removesuffix(" + PEFT"), *map(times, found[*key, peer]))
        for key, label in CONTESTS.items()
        for peer in PEERS
        if (*key, peer) in found
    ]


def longest() -> list[str]:
    """The longest rows per processor second, though no other process took cores."""
    return [times(contest("26-long-7600", "long-7600-bfloat16", PEERS[0], per_cpu=True)[0])]


def against_trainer() -> list[str]:
    found = [ratios for (*_, peer), ratios in contests().items() if peer == PEERS[0]]
    fast, share = zip(*found, strict=True)
    longer = max(contests()[key][0] for key in contests() if "1024" in key[1] or "long" in key[1])
    ends = (min(fast), max(fast), min(share), max(share), longer)
    return [*map(times, ends), str(len(found))]


def half_a_billion() -> tuple[str, str]:
    found = entries("26-large", "0.5b-1024-bfloat16")["chainlora"]
    return f"{found['peak_mb'] / 1000:.1f}", f"{found['seconds_per_step']:.1f}"


def checkpointed() -> list[tuple[float, float]]:
    """What `gradient_checkpointing` takes, against a peer without it."""
    return [
        contest(file, name, PEERS[0], "chainlora, checkpointed")
        for file, name in CONTESTS
        if file in ("26-long", "26-long-7600", "26-large")
    ]


def rank_cost() -> str:
    found = entries("25", "rank-64")
    return times(found["rank 64"]["seconds_per_step"] / found["rank 8"]["seconds_per_step"])


def knots(kind: str, dtype_or_links: str | int) -> dict[str, Any]:
    """The row of numerics/ about whole knots (by links), or soft ones (by dtype)."""
    rows = from_json(f"numerics/{kind}.json")["rows"]
    (found,) = [row for row in rows if dtype_or_links in (row.get("dtype"), row.get("links"))]
    return found


# --- sentences ---


def paper_gain() -> str:
    """The paper's gain of three links, in points, over the tasks of table1."""
    scores = from_yaml("paper/printed/tables.yaml")["table1"]["scores"]
    tasks = read_results(BENCHMARKS / "paper/table1").experiment["tasks"]
    return f"{fmean(scores['chain3'][task] - scores['lora'][task] for task in tasks):.2f}"


def faults() -> list[str]:
    """The cases of the fuzz; how many lost something or were wrong, and how many were unclear."""
    counts = Counter[str]()
    for of_command in from_json("faults/fuzz.json")["counts"].values():
        for each in of_command.values():
            counts.update(each)
    return [f"{counts.total():,}", str(counts["lost"] + counts["wrong"]), str(counts["unclear"])]


def little_learned() -> list[str]:
    """The most points that a method's mean is above the most frequent answer on four of table1's
    tasks, and how many chosen rates are an end of their grid, of how many."""
    results = read_results(BENCHMARKS / "paper/table1")
    gains: dict[str, dict[str, list[float]]] = {}
    for cell in results.finals:
        own = gains.setdefault(cell["task"], {}).setdefault(cell["method"], [])
        own.append(100 * (cell["score"] - cell["majority"]))
    best = sorted(max(map(fmean, methods.values())) for methods in gains.values())
    rates = results.experiment["grid"]["train.lr"]
    chosen = {(c["task"], c["method"]): c["point"]["train.lr"] for c in results.finals}
    ends = [rate for rate in chosen.values() if rate in (min(rates), max(rates))]
    return [number(best[3], 1, "-"), f"{len(ends)}", f"{len(chosen)}"]


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


def to_combine() -> list[str]:
    """Minutes of the processor for two and for twelve stages of 64 rows."""
    seconds = {row["case"]: row["cpu_seconds"] for row in lines("combining/times.jsonl")}
    return [f"{seconds[case] / 60:.1f}" for case in ("2x64x30", "12x64x30")]


def errors() -> list[float]:
    whole, soft = knots("knots", 16), [knots("soft_knots", x) for x in ("bfloat16", "float32")]
    return [whole["error_rebuilt"], whole["error_in_place"], *(fmean(x["error"]) for x in soft)]

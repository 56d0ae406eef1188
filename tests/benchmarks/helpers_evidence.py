"""The numbers of docs/evidence.md, and the tables of that page, from the committed results."""

from __future__ import annotations

import json
import re
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


LAB_STUDY = re.compile(r"(gsm8k|python)-r(\d+)-(\d+)(?:-rows?(\d+))?")  # rank, steps, blocks a step


def soft_lab() -> Rows:
    """All studies of the lab that have fresh seeds."""
    heads = "rank r | steps | tokens/parameter | minus LoRA r | minus 2r | minus 4r"
    found = []
    for study in (study for study, arm in lab_cells() if arm == "auto"):
        text, *sizes = LAB_STUDY.fullmatch(study).groups("4")
        rank, steps, blocks = map(int, sizes)
        others = (study.replace(f"-r{rank}-", f"-r{rank * by}-") for by in (1, 2, 4))
        soft = lab_cells()[study, "auto"]
        own, *rivals = (less(soft, lab_cells().get((other, "lora"), {})) for other in others)
        per_parameter = f"{steps * blocks * 64 / (LAB_PARAMETERS * rank):.0f}"
        noted = {("gsm8k", 4): "", ("python", 4): " (Python)"}
        named = str(rank) + noted.get((text, blocks), f" ({blocks} block{'s'[blocks == 1 :]})")
        row = (named, f"{steps:,}", per_parameter, estimate(own), *map(mean, rivals))
        found.append(((text, blocks != 4, rank, steps, blocks), row))
    return [heads.split(" | "), *(row for _, row in sorted(found))]


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


def knots(kind: str, dtype_or_links: str | int) -> dict[str, Any]:
    """The row of numerics/ about whole knots (by links), or soft ones (by dtype)."""
    rows = from_json(f"numerics/{kind}.json")["rows"]
    (found,) = [row for row in rows if dtype_or_links in (row.get("dtype"), row.get("links"))]
    return found


# --- sentences ---


def checkpointing() -> list[str]:
    speeds, shares = zip(*checkpointed(), strict=True)
    return [f"{of(shares):.2f}" for of in (min, max)] + [f"{of(speeds):.1f}" for of in (min, max)]


def to_combine() -> list[str]:
    """Minutes of the processor for two and for twelve stages of 64 rows."""
    seconds = {row["case"]: row["cpu_seconds"] for row in lines("combining/times.jsonl")}
    return [f"{seconds[case] / 60:.1f}" for case in ("2x64x30", "12x64x30")]

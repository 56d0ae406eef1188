"""Two pictures of committed results: the study of stages, and speed and memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import yaml
from card import EDGE, WIDTH, Card

from chainlora_lab.statistics.intervals import t_interval

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- stages

ALL_KEPT = "second pass, all rows kept, 160 steps"
Arm = tuple[str, str, str]  # of benchmarks/stages: a study, its arm, what a reader calls it
MANY: tuple[Arm, ...] = (  # of all seeds
    ("primary", "combined twice rehearsed", "two passes, rehearsed"),
    ("primary", "combined twice", "two passes"),
    ("primary", "replay", "on top, replay"),
    ("primary", "on top rehearsed", "on top, rehearsed"),
    ("primary", "on top", "on top"),
)
FEW: tuple[Arm, ...] = (  # of the first three
    ("all at once", "all at once", "one LoRA, all rows at once"),
    (ALL_KEPT, "combined twice rehearsed", "rehearsed, all rows kept"),
    (ALL_KEPT, "replay", "replay, all rows kept"),
    ("primary", "combined twice rehearsed", "rehearsed (as above)"),
    ("one LoRA of rank 40", "one wide LoRA replay", "one LoRA of rank 40, replay"),
    ("one LoRA", "one LoRA rehearsed", "one LoRA of rank 8, rehearsed"),
    ("one LoRA of rank 40", "one wide LoRA rehearsed", "one LoRA of rank 40, rehearsed"),
    ("one LoRA", "one LoRA replay", "one LoRA of rank 8, replay"),
    ("one LoRA of rank 40", "one wide LoRA", "one LoRA of rank 40"),
    ("one LoRA", "one LoRA", "one LoRA of rank 8"),
)
Cells = list[dict[str, Any]]


def stages(results: Path = BENCHMARKS / "stages/results.jsonl") -> str:
    """Return the arms as bars: test rows right at the end, a point a seed, intervals of six.

    Only seeds that all arms of a group have count. Raises ValueError where the first has none.
    """
    plan = yaml.safe_load((BENCHMARKS / "stages/plan.yaml").read_text(encoding="utf-8"))
    cells = lines_of(results)
    (seeds, many), (few_seeds, few) = (_group(plan, cells, arms) for arms in (MANY, FEW))
    if not seeds:
        raise ValueError(f"{results} has no seed with a test cell of each arm of the primary study")
    height = 140 + 42 * (1 + len(many) + len(few)) + 26 * bool(few) + 26
    card = Card(height, f"Stages: right answers, {len(seeds)} and {len(few_seeds)} seeds")
    _heading(card, plan)
    text = f"{len(seeds)} seeds, {plan['defaults']['kept']} kept rows of each task"
    card.text(EDGE, 98, text, bold=True)
    alone = [fmean(cell["learned"].values()) for cell in many[MANY[0][-1]]]
    _bar(card, 120, "each stage alone, on its own rows", "no old rows", alone)
    y = _bars(card, 162, many)
    if few:
        card.text(EDGE, y + 4, f"{len(few_seeds)} of these seeds", bold=True)
        y = _bars(card, y + 26, few)
    card.text(EDGE, y + 4, "Circles: seeds. Lines: 95 % t intervals, of six seeds.", kind="soft")
    text = "Two passes: the combination as it was. Old rows: reads of kept rows."
    card.text(EDGE, y + 24, text, kind="soft")
    return card.svg()


def _heading(card: Card, plan: dict[str, Any]) -> None:
    tasks, rows = len(plan["tasks"]), plan["rows"]
    card.text(EDGE, 28, f"Right answers after {tasks} data sets", bold=True, size=16)
    text = f"SmolLM2-135M-Instruct learns {tasks} tasks with one question, one"
    card.text(EDGE, 50, text, kind="soft")
    text = f"after the other: {rows['train']} training rows and {rows['test']} test rows each"
    card.text(EDGE, 68, text, kind="soft")


def _group(
    plan: dict[str, Any], cells: Cells, arms: tuple[Arm, ...]
) -> tuple[list[int], dict[str, Cells]]:
    """Return the seeds that all arms have, and by what arms are called their cells, best first."""
    of_arm = module_of(BENCHMARKS / "stages/table.py").of_arm
    studies = {study["name"]: study for study in plan["studies"]}
    found = {}
    for study, arm, text in arms:
        settings = plan["defaults"] | studies[study].get("change", {})
        found[text] = of_arm(cells, studies[study], settings, arm)
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    if not seeds:
        return [], {}
    chosen = {text: [by_seed[seed] for seed in seeds] for text, by_seed in found.items()}
    return seeds, dict(sorted(chosen.items(), key=lambda pair: -fmean(_shares(pair[1]))))


def _shares(cells: Cells) -> list[float]:
    return [fmean(cell["right"].values()) for cell in cells]


def _bars(card: Card, y: float, arms: dict[str, Cells]) -> float:
    """Draw arms from a height down; return the height below them."""
    for text, cells in arms.items():
        steps, read = (fmean(cell[key] for cell in cells) for key in ("steps", "old_rows"))
        _bar(card, y, text, f"{steps:.0f} steps, {read:,.0f} old rows", _shares(cells))
        y += 42
    return y


def _bar(card: Card, y: float, text: str, cost: str, shares: list[float]) -> None:
    full = WIDTH - 2 * EDGE - 52
    card.text(EDGE, y, text)
    card.text(WIDTH - EDGE, y, cost, anchor="end", kind="soft")
    card.bar(EDGE, y + 6, full, 18, "grid")
    card.bar(EDGE, y + 6, full * fmean(shares), 18, "blue")
    for share in shares:
        card.dot(EDGE + full * share, y + 11, "ink", radius=3, hollow=True)
    if len(shares) >= 6:
        low, high = (EDGE + full * end for end in t_interval(shares))
        card.interval(low, high, y + 19, "ink", 4)
    card.text(WIDTH - EDGE, y + 20, f"{100 * fmean(shares):.0f} %", anchor="end", bold=True)


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- speed and memory

PEER, OURS, CHECKPOINTED = "Trainer + PEFT", "chainlora", "chainlora, checkpointed"
CONTESTS = (  # file of results, benchmark, name, tokens a row; busy: rows a processor second
    ("2026-11-26-short", "sst2-bfloat16", "SST-2, 13 tokens", False),
    ("2026-11-25", "rte-bfloat16", "RTE, 85 tokens", False),
    ("2026-11-25", "multirc-bfloat16", "MultiRC, 380 tokens", False),
    ("2026-11-26-long", "long-1024-bfloat16", "1,024 tokens *", True),
    ("2026-11-26-long", "long-4096-bfloat16", "4,096 tokens *", True),
    ("2026-11-26-long-7600", "long-7600-bfloat16", "7,600 tokens *", True),
    ("2026-11-26-large", "0.5b-1024-bfloat16", "1,024 tokens, 0.5B", False),
    ("2026-11-26-large", "1.3b-1024-bfloat16", "1,024 tokens, 1.3B", False),
)


Ratio = tuple[float, float]  # times as fast as the peer, share of its memory


def ratios(file: str, benchmark: str, busy: bool = False) -> dict[str, Ratio]:
    """Return what a contest shows of ours, without and with gradient checkpointing."""
    measure = "rows_per_processor_second" if busy else "rows_per_second"
    lines = lines_of(BENCHMARKS / f"speed/results/{file}.jsonl")
    entries = {line["entry"]: line for line in lines if line["benchmark"] == benchmark}
    peer = entries[PEER]
    return {
        name: (entries[name][measure] / peer[measure], entries[name]["peak_mb"] / peer["peak_mb"])
        for name in (OURS, CHECKPOINTED)
        if name in entries
    }


def speed() -> str:
    """Return speed and memory against `transformers.Trainer` with PEFT as bars."""
    rows = [(name, ratios(file, benchmark, busy)) for file, benchmark, name, busy in CONTESTS]
    top, bottom = 96, 96 + 34 * len(rows)
    card = Card(bottom + 102, "Speed and memory against Trainer with PEFT")
    card.text(EDGE, 28, "Against transformers.Trainer with PEFT", bold=True, size=16)
    card.text(EDGE, 50, "LoRA of rank 8 on q and v, CPU, bfloat16, one turn each", kind="soft")
    panels = ((160, 130 / 4.4, "times as fast", "{:.1f}×"), (334, 86, "memory share", "{:.2f}"))
    for place, (left, unit, title, form) in enumerate(panels):
        card.text(left, 82, title, bold=True)
        for (name, found), y in zip(rows, range(top, bottom, 34), strict=True):
            ours, checkpointed = found[OURS][place], found.get(CHECKPOINTED, (0, 0))[place]
            if not place:
                card.text(EDGE, y + 19, name)
            card.bar(left, y + 4, unit * ours, 20, "blue")
            if checkpointed:
                card.diamond(left + unit * checkpointed, y + 14, "ink", hollow=True)
            end = max(unit * max(ours, 1), unit * checkpointed + 8)
            card.text(left + end + 6, y + 19, form.format(ours))
        line = f"M{left + unit:.5g} {top - 4}V{bottom}"
        card.path(line, "ink", 1.5, ' stroke-dasharray="5 4"')
    key = bottom + 26
    card.text(EDGE, key, "SmolLM2-135M-Instruct; 0.5B, 1.3B: random. Dashed: peer.", kind="soft")
    card.diamond(EDGE + 8, key + 16, "ink", hollow=True)
    text = "with gradient_checkpointing, which the peer did not use"
    card.text(EDGE + 24, key + 21, text, kind="soft")
    text = "* by processor seconds: one thread, busy machine; or one step"
    card.text(EDGE, key + 42, text, kind="soft")
    fast, share = ratios("2026-11-25", "sst2-bfloat16")[OURS]
    text = f"(7,600). SST-2 on another machine: {fast:.1f}×, {share:.2f}."
    card.text(EDGE, key + 61, text, kind="soft")
    return card.svg()

"""Two pictures of committed results: the study of stages, and speed and memory."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
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

ARMS = {  # of benchmarks/stages: the commands
    "combined twice rehearsed": "extend",
    "combined twice": "extend --no-rehearsal",
    "replay": "extend with data.replay",
    "on top rehearsed": "extend --on-top, then rehearse",
    "on top": "extend --on-top",
}


NOTED = {  # studies of fewer seeds: the arm, and what it is
    "all at once": ("all at once", "One LoRA on all rows at once"),
    "second pass, all rows kept, 160 steps": (
        "combined twice rehearsed",
        "extend with all rows kept",
    ),
}


def stages(results: Path = BENCHMARKS / "stages/results.jsonl") -> str:
    """Return the arms of the primary study as bars: test rows right at the end, a point a seed.

    Only seeds that all five arms have count. Raises ValueError where there is none.
    """
    table = _module(BENCHMARKS / "stages/table.py")
    plan = yaml.safe_load((BENCHMARKS / "stages/plan.yaml").read_text(encoding="utf-8"))
    study = plan["studies"][0]
    cells = lines_of(results)
    found = {arm: table.of_arm(cells, study, plan["defaults"], arm) for arm in ARMS}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    if not seeds:
        raise ValueError(f"{results} has no seed with a test cell of each arm of the primary study")
    shares = {arm: [table.average(found[arm][seed]) for seed in seeds] for arm in ARMS}
    planned, tasks, rows = len(study["seeds"]), len(plan["tasks"]), plan["rows"]
    done = len(seeds) == planned
    counted = f"{planned} seeds" if done else f"{len(seeds)} of {planned} seeds"
    note = "Lines: 95 % t intervals." if done else "Each has its own order of tasks."
    lines = [
        f"Circles: seeds. {note}",
        f"Old rows: reads of the {plan['defaults']['kept']} kept rows of each task.",
        *_notes(table, cells, plan["studies"], plan["defaults"]),
    ]
    card = Card(
        94 + 56 * len(ARMS) + 12 + 20 * len(lines),
        f"Stages: right answers at the end, {counted}",
    )
    card.text(EDGE, 28, f"Right answers after {tasks} stages, {counted}", bold=True, size=16)
    card.text(EDGE, 50, f"SmolLM2-135M-Instruct learns {tasks} tasks, one after the", kind="soft")
    text = f"other: {rows['train']} training rows and {rows['test']} test rows each"
    card.text(EDGE, 68, text, kind="soft")
    full = WIDTH - 2 * EDGE - 52
    for place, arm in enumerate(sorted(ARMS, key=lambda arm: -fmean(shares[arm]))):
        y, mean = 100 + 56 * place, fmean(shares[arm])
        steps, read = (
            fmean(found[arm][seed][key] for seed in seeds) for key in ("steps", "old_rows")
        )
        card.text(EDGE, y, ARMS[arm])
        text = f"{steps:.0f} steps, {read:.0f} old rows"
        card.text(WIDTH - EDGE, y, text, anchor="end", kind="soft")
        card.bar(EDGE, y + 8, full, 22, "grid")
        card.bar(EDGE, y + 8, full * mean, 22, "blue")
        if done:
            low, high = (EDGE + full * end for end in t_interval(shares[arm]))
            card.line(low, y + 19, high, y + 19, "ink", 3)
        for share in shares[arm]:
            card.dot(EDGE + full * share, y + 19, "ink", radius=4, hollow=True)
        card.text(WIDTH - EDGE, y + 24, f"{100 * mean:.0f} %", anchor="end", bold=True)
    for place, text in enumerate(reversed(lines)):
        card.text(EDGE, card.height - 18 - 20 * place, text, kind="soft")
    return card.svg()


def _notes(
    table: ModuleType, cells: list[dict[str, Any]], studies: list[Any], defaults: dict[str, Any]
) -> Iterator[str]:
    """Yield what studies of fewer seeds have."""
    for study in studies:
        arm, text = NOTED.get(study["name"], ("", ""))
        found = table.of_arm(cells, study, defaults | study.get("change", {}), arm)
        if found:
            mean = fmean(map(table.average, found.values()))
            yield f"{text}: {100 * mean:.0f} % ({len(found)} seeds)."


def _module(path: Path) -> ModuleType:
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

"""Write the lab's tables and curves: ``report.py [--cells FILE] [--out DIR] [--primary ARM]``.

Arms are compared with tuned LoRA of the same rank as pairs: one seed gives both the same order of
blocks and the same start. The first arm of a study is the one that the others are compared with.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curves import draw_curves
from run import HERE, LENGTH, read_cells
from search import best_rate, is_interior

from chainlora_lab.statistics.intervals import scipy_stats, t_interval
from chainlora_lab.statistics.sign_flip import sign_flip_test

MIN_PAIRS = 4  # fewer give no interval and no p
REFERENCE = "lora"


@dataclass
class Results:
    """What is known of one arm in one study."""

    name: str
    tuning: dict[float, list[float]] = field(default_factory=dict)  # losses by rate
    curves: dict[int, list[list[float]]] = field(default_factory=dict)  # by fresh seed
    diverged: int = 0  # fresh seeds, which are in no mean and in no pair
    busy: float = 0.0  # seconds of processor time

    @property
    def tried(self) -> dict[float, float]:
        """Mean loss on the tuning seeds by rate."""
        return {rate: statistics.fmean(losses) for rate, losses in self.tuning.items()}

    def final(self) -> dict[int, float]:
        """Return the final loss by fresh seed."""
        return {seed: curve[-1][1] for seed, curve in self.curves.items()}


def main() -> None:
    """Parse, read, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, default=HERE / "results" / "cells.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--primary", default="soft10", help="arm that controls are compared with")
    options = parser.parse_args()
    write_report(read_cells(options.cells), options.out, options.primary)


def write_report(cells: Sequence[dict[str, Any]], out: Path, primary: str = "soft10") -> None:
    """Write `tables.md` and a PNG of curves a study."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [_header(cells)]
    for study, arms in by_study(cells).items():
        sections.append(section(study, arms, primary))
        finalists = {name: arm.curves for name, arm in arms.items() if len(arm.curves) >= MIN_PAIRS}
        if REFERENCE in finalists and len(finalists) > 1:
            sections.append(f"![{study}]({study}.png)\n")
            draw_curves(study, finalists, gate_lines(arms), REFERENCE, out / f"{study}.png")
    sections.insert(1, rule_table(cells))
    (out / "tables.md").write_text("\n".join(sections), encoding="utf-8")


def by_study(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Results]]:
    """Sort cells by study and arm, in the order of the file."""
    studies: dict[str, dict[str, Results]] = {}
    for cell in cells:
        arms = studies.setdefault(cell["study"], {})
        arm = arms.setdefault(cell["name"], Results(cell["name"]))
        config = cell["config"]
        arm.busy += cell["cpu_seconds"]
        if config["held_out"] == "tuning":
            loss = math.inf if cell["loss"] is None else cell["loss"]
            arm.tuning.setdefault(config["lr"], []).append(loss)
        elif cell["loss"] is not None:
            arm.curves[config["seed"]] = cell["curve"]
        else:
            arm.diverged += 1
    return studies


def section(study: str, arms: dict[str, Results], primary: str) -> str:
    """Return the tables of one study."""
    lines = [f"## {study}\n", _gate_sentence(arms)]
    lines += [
        "| arm | rate (tuning loss) | rates tried | seeds | loss | less LoRA, paired | better in "
        f"| p | sign p | {primary} less this arm | share of the gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gap = _gap(arms)
    lines += [_row(arm, arms, primary, gap) for arm in arms.values()]
    return "\n".join(lines) + "\n"


def _row(arm: Results, arms: dict[str, Results], primary: str, gap: float | None) -> str:
    tried, rate = arm.tried, "–"
    if tried:
        best = best_rate(tried)
        rate = f"{best:g} ({tried[best]:.4f}{'' if is_interior(tried) else ', not interior'})"
    final = arm.final()
    loss = f"{statistics.fmean(final.values()):.4f}" if final else "–"
    seeds = f"{len(final)}" + f" ({arm.diverged} diverged)" * (arm.diverged > 0)
    against = paired(arm, arms.get(REFERENCE))
    rest = paired(arms.get(primary), arm)
    closed = "–"
    if against and gap:
        closed = f"{-statistics.fmean(against) / gap:.0%}"
    return (
        f"| {arm.name} | {rate} | {', '.join(f'{r:g}' for r in sorted(tried)) or '–'} "
        f"| {seeds} | {loss} | {difference(against)} | {_better(against)} "
        f"| {_p(against)} | {_sign_p(against)} | {difference(rest)} | {closed} |"
    )


def paired(one: Results | None, other: Results | None) -> list[float]:
    """Return the differences of two arms' final losses over the seeds that both have."""
    if one is None or other is None or one is other:
        return []
    first, second = one.final(), other.final()
    return [first[seed] - second[seed] for seed in sorted(first) if seed in second]


def difference(values: Sequence[float]) -> str:
    """Return a mean difference with its 95 % t interval."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):+.4f}"
    if len(values) < MIN_PAIRS:
        return f"{mean} ({len(values)} pairs)"
    low, high = t_interval(values)
    return f"{mean} [{low:+.4f}, {high:+.4f}]"


def _better(values: Sequence[float]) -> str:
    return f"{sum(v < 0 for v in values)}/{len(values)}" if values else "–"


def _p(values: Sequence[float]) -> str:
    return f"{sign_flip_test(values):.2g}" if len(values) >= MIN_PAIRS else "–"


def _sign_p(values: Sequence[float]) -> str:
    if len(values) < MIN_PAIRS:
        return "–"
    nonzero = [value for value in values if value]
    found = scipy_stats().binomtest(sum(v < 0 for v in nonzero), len(nonzero)) if nonzero else None
    return "1" if found is None else f"{found.pvalue:.2g}"


def gate_lines(arms: dict[str, Results]) -> dict[str, float]:
    """Return the tuning losses of arms that are there for the gate alone."""
    only = {name: arm.tried for name, arm in arms.items() if arm.tried and not arm.curves}
    return {name: min(tried.values()) for name, tried in only.items() if name in _GATES}


_GATES = ("r1", "r2", "r4", "r8", "r16", "full")


def _gap(arms: dict[str, Results]) -> float | None:
    """Return how far full fine-tuning is below LoRA on the tuning seeds."""
    if REFERENCE not in arms or "full" not in arms:
        return None
    lora, full = arms[REFERENCE].tried, arms["full"].tried
    return min(lora.values()) - min(full.values()) if lora and full else None


def _gate_sentence(arms: dict[str, Results]) -> str:
    lines, lora = gate_lines(arms), arms.get(REFERENCE)
    if not lines or lora is None or not lora.tried:
        return ""
    best = min(lora.tried.values())
    parts = [f"{name} {loss:.4f} ({loss - best:+.4f})" for name, loss in lines.items()]
    return f"Gate, tuning seeds, each at its best rate: lora {best:.4f}, {', '.join(parts)}.\n"


# --- the rule of README.md, "When to expect anything" ---

PARAMETERS = 5780  # that LoRA of rank 1 trains: in + out, summed over the 35 linear layers
Place = tuple[str, int, int, int]  # text, steps, blocks a step, rank


def rule_table(cells: Sequence[dict[str, Any]]) -> str:
    """Return what the second rule says of each study, and what came out."""
    lines = [
        "## When to expect anything\n",
        "Less LoRA of the same rank: `auto`, `root5`, four whole knots (`classic4`). Hours: "
        "processor time of all arms.\n",
        "| study | tokens a parameter | share, by the rule | says | `auto` | pairs | p | hit "
        "| gap to rank 4r | share | `root5` | whole knots | hours |",
        f"|{'---|' * 13}",
    ]
    tuned = plain_lora(cells)
    places = {cell["study"]: _place(cell) for cell in cells if cell["name"] == REFERENCE}
    for study, arms in by_study(cells).items():
        lora = arms.get(REFERENCE)
        found = paired(arms.get("auto"), lora)
        if len(found) >= MIN_PAIRS:
            *where, rank = places[study]
            gap = tuned[*where, rank] - tuned.get((*where, 4 * rank), math.nan)
            row = _rule_row(study, places[study], found, gap)
            row += [difference(paired(arms.get(name), lora)) for name in ("root5", "classic4")]
            row.append(f"{sum(arm.busy for arm in arms.values()) / 3600:.1f}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _rule_row(study: str, place: Place, found: Sequence[float], gap: float) -> list[str]:
    _, steps, rows, rank = place
    tokens = steps * rows * LENGTH / (PARAMETERS * rank)
    share = max(0.0, 0.13 * math.log2(tokens / 11))
    low, high = t_interval(found)
    says = "ahead" if share >= 0.1 else "not behind"
    hit = "yes" if (high < 0 if share >= 0.1 else low <= 0) else "**no**"
    closed = ["–", "–"]
    if not math.isnan(gap):
        closed = [f"{gap:.3f}", f"{-statistics.fmean(found) / gap:+.2f}"]
    rule = [study, f"{tokens:.1f}", f"{share:.2f}", says]
    return [*rule, difference(found), str(len(found)), _p(found), hit, *closed]


def plain_lora(cells: Sequence[dict[str, Any]]) -> dict[Place, float]:
    """Return the best mean tuning loss of one LoRA, whatever the study calls it."""
    losses: dict[Place, dict[float, list[float]]] = {}
    for cell in cells:
        config = cell["config"]
        is_plain = config["arm"].keys() == {"rank"} and config["arm"]["rank"] > 0
        if is_plain and config["held_out"] == "tuning":
            loss = math.inf if cell["loss"] is None else cell["loss"]
            losses.setdefault(_place(cell), {}).setdefault(config["lr"], []).append(loss)
    return {place: min(map(statistics.fmean, rates.values())) for place, rates in losses.items()}


def _place(cell: dict[str, Any]) -> Place:
    config = cell["config"]
    return config["text"], config["steps"], config["rows"], config["arm"]["rank"]


def _header(cells: Sequence[dict[str, Any]]) -> str:
    steps = sum(cell["config"]["steps"] for cell in cells)
    seconds = sum(cell["seconds"] for cell in cells)
    busy = sum(cell["cpu_seconds"] for cell in cells)
    machines = ", ".join(sorted({cell["machine"] for cell in cells}))
    speed = f"{steps / busy:.0f} steps a second of processor time" if busy else "no steps"
    return (
        "# Results of the lab\n\nHeld-out loss in nats a token; differences are paired by seed, "
        "with 95 % t intervals; p is the exact two-sided sign-flip test, sign p the exact sign "
        "test, neither corrected for the number of arms. Rates are chosen on tuning seeds and "
        "other held-out blocks. The share of the gap is that between LoRA and full fine-tuning on "
        "the tuning seeds.\n\n"
        f"{len(cells)} cells, {steps:,} steps in {seconds / 3600:.2f} hours ({speed}, evaluation "
        f"included); {machines}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())

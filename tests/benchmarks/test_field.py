"""The table of benchmarks/field on made-up cells, full and partial, against figures by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.helpers_evidence_stages import script

TASKS = script("field/tasks.py").PAPER
EASY = ("agnews", "dbpedia", "imdb", "sst2", "cb", "wic")  # learned by each stage alone


@pytest.fixture
def table() -> Any:
    return script("field/table.py")


def cell(arm: str, seed: int, right: float, **more: Any) -> dict[str, Any]:
    """A verdict cell: `right` of the easy tasks, chance of all others; 40 % is most frequent."""
    shares = {task: right if task in EASY else 0.4 for task in TASKS} | more.pop("tasks", {})
    perplexity = dict.fromkeys(("gsm8k", "dialogsum", "alpaca form", "boolq"), 20.0)
    found = {"arm": arm, "seed": seed, "split": "test", "settings": {}, "right": shares}
    found |= {"most": dict.fromkeys(TASKS, 0.4), "learned": {}, "cpu_seconds": 3600.0}
    found |= {"rank": 8, "adapters": 1, "steps": 560, "old_rows": 448}
    return found | {"general": {"perplexity": perplexity, "facts": 0.5}} | more


def general(factor: float, facts: float) -> dict[str, Any]:
    kinds = {"gsm8k": 20 * factor, "dialogsum": 20 * factor, "alpaca form": 20, "boolq": 30}
    return {"perplexity": kinds, "facts": facts}


def full() -> list[dict[str, Any]]:
    """All arms on three seeds: ours ahead of replay by 10, 20 and 30 points."""
    cells = [cell("base", 0, 0.1)]
    for seed in range(3):
        cells.append(cell("alone", seed, 0.9, adapters=14))
        learned = {"learned": dict.fromkeys(TASKS, 0.9), "general": general(1.5, 0.25)}
        cells.append(cell("ours", seed, 0.6 + seed / 10, **learned))
        cells.append(cell("replay", seed, 0.5, tasks={"rte": 0.6}))
        cells.append(cell("router", seed, 0.8, adapters=14))
    return cells


def lines_by_arm(lines: list[str]) -> dict[str, list[str]]:
    split = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {words[0]: words for words in split}


def test_a_task_is_learned_from_15_points_on(table: Any) -> None:
    shares = {"right": {"a": 0.71, "b": 0.70}, "most": {"a": 0.56, "b": 0.56}}
    assert table.learned_tasks([shares]) == ["a"]  # 0.71 - 0.56 < 0.15 in floating point
    assert table.learned_tasks([]) == []


def test_figures_of_an_arm(table: Any) -> None:
    """Ours: 60, 70 and 80 % of the learned tasks; of those that any arm learns, one more is at
    40 %. t of two degrees of freedom is 4.303: 4.303 · 10 / √3 = 24.8."""
    lines = [*table.report(full())]
    assert lines[0] == f"learned alone (6 of 14): {', '.join(sorted(EASY))}"
    assert lines[2] == f"learned by any arm (7): {', '.join(sorted((*EASY, 'rte')))}\n"
    ours = lines_by_arm(lines[: lines.index("")])["ours"]
    any_arm = f"{(6 * 70 + 40) / 7:.1f} [{65.7 - 24.84 * 6 / 7:.1f}, {65.7 + 24.84 * 6 / 7:.1f}]"
    assert ours[:6] == [
        "ours",
        "3",
        "70.0 [45.2, 94.8]",
        any_arm,
        "40.0 [40.0, 40.0]",
        "20.0 [-4.8, 44.8]",
    ]
    assert ours[6:9] == ["1.310 [1.310, 1.310]", "1.500 [1.500, 1.500]", "0.50"]  # 1.5 ** (2 / 3)
    assert ours[9:] == ["8", "560", "448", "1.00"]
    router = lines_by_arm(lines[: lines.index("")])["router"]
    assert (router[5], router[9]) == ("–", "14 of rank 8")
    by_task = lines_by_arm(lines[lines.index("") :])
    assert by_task["sst2"][1:3] == ["40 (40 40 40)", "10"]  # the base has one seed
    assert by_task["sst2"][3:5] == ["90 (90 90 90)", "70 (60 70 80)"]


def test_comparisons(table: Any) -> None:
    """Learned: 10, 20 and 30 points. All: 6 of 14 of these, less the 20 points of one task."""
    lines = [line for line in table.report(full()) if ", ours less " in line]
    assert lines[0].startswith(
        "primary, ours less replay, 20.0 [-4.8, 44.8]; over tasks and rows ["
    )
    assert lines[0].endswith("(seeds [0, 1, 2])")
    assert f"without weight: {(6 * 20 - 20) / 14:.1f} [" in lines[1]
    new = "over wic, copa, cb, boolq, multirc, of which 2 are learned: "
    assert f"{new}{2 * 20 / 5:.1f} [" in lines[2]
    assert lines[3].startswith("second, ours less router, -10.0 [-34.8, 14.8]; ")
    assert len(lines) == 5
    more = [cell("ours", 3, 0.9), cell("replay", 3, 0.5)]
    lines = [line for line in table.report(full() + more) if line.startswith("primary, ours")]
    assert [line.split("seeds ")[1] for line in lines] == ["[0, 1, 2, 3])"] * 3 + ["[0, 1, 2])"] * 3
    assert "25.0 [" in lines[0]


@pytest.mark.parametrize(
    ("tasks", "ours", "low", "high"),
    [
        (("sst2", "rte"), (1.0, 0.0), 0.0, 100.0),  # one task of two: a quarter has none, or both
        (("sst2",), (0.5,), -13.9, 13.9),  # 1.96 · 100 · √(2 · 0.25 / 100)
        (("cb",), (0.5,), -18.5, 18.5),  # of 56 rows
    ],
)
def test_the_interval_over_tasks_and_rows(
    table: Any, tasks: tuple[str, ...], ours: tuple[float, ...], low: float, high: float
) -> None:
    one, other = ({"right": dict(zip(tasks, s, strict=True))} for s in (ours, ours))
    if len(tasks) > 1:
        other = {"right": dict.fromkeys(tasks, 0.0)}
    assert table.over_tasks([one], [other], tasks) == pytest.approx((low, high), abs=1.0)
    assert table.over_tasks([one], [other], tasks) == table.over_tasks([one], [other], tasks)

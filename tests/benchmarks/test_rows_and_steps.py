"""Every arm of benchmarks/rows_and_steps makes a cell, on a tiny model and made-up rows; a
comparison against figures by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.test_field_arms import made_up

STUDY = Path(__file__).resolve().parents[2] / "benchmarks" / "rows_and_steps"
NAMES = (
    *("run", "table", "arms", "rows", "training", "combining", "featcal"),
    *("model", "product", "router", "tasks"),
)
TASKS = ["rte", "sst2"]  # 16 rows to train on, 6 to test on
KEPT, BATCH = 8, 4
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "base": [{}],
    "alone": [{}],
    "ours": [{"steps": 0}, {"steps": 3}, {"alpha": 0.3, "anchor": 0.3, "of": "median"}],
    "replay": [{"general": general, "epochs": 1} for general in ("none", "text", "kl")],
    "all at once": [{"general": "none"}, {"general": "kl"}],
    "ours without the base": [{"steps": 2}],
    "ours without the closed form": [{"begin": begin, "steps": 2} for begin in ("base", "mean")],
    "FeatCal": [{"read": 4}],
    "centroid router": [{"layer": 1}],
    "ridge router": [{"layer": 1, "features": 64}],
}
CASES = [(arm, some) for arm, each in SETTINGS.items() for some in each]


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """`benchmarks/rows_and_steps/run.py`; other folders have modules of these names too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
        path = [*sys.path]
        yield importlib.import_module("run")
        sys.path[:] = path
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def study(run: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rows_and_steps")
    plan = run.yaml.safe_load((STUDY / "plan.yaml").read_text())
    keys = {"batch_size": BATCH, "warmup_steps": 0, "lr": 0.01}
    plan |= {"model": str(tiny_folder), "train": plan["train"] | keys, "kept": KEPT}
    plan["rows"] = {"train": 16, "validation": 4, "test": 6}
    plan["phases"]["tuning"] |= {"tasks": TASKS, "outside": [0, 1]}
    return run.Study(plan, made_up(folder / "data"), folder, folder / "results.jsonl")


def cell_of(study: Any, arm: str, some: dict[str, Any]) -> dict[str, Any]:
    settings = study.plan["arms"][arm].get("defaults", {}) | some
    return study.cell("tuning", arm, 5000, settings, KEPT)


@pytest.mark.parametrize(("arm", "some"), CASES)
def test_an_arm_makes_a_cell_that_is_not_computed_again(
    run: Any, study: Any, arm: str, some: dict[str, Any]
) -> None:
    cell = cell_of(study, arm, some)
    assert {*cell["right"]} == {*TASKS}
    assert cell["rows"] == dict.fromkeys(TASKS, 6)
    assert {*(cell["outside"] or ())} == ({*run.TEXTS} if arm != "alone" else set())
    ranks = {"base": 0, "alone": 8, "centroid router": 8, "ridge router": 8, "FeatCal": None}
    assert cell["rank"] == ranks.get(arm, 16)
    again = run.Study(study.plan, Path("nowhere"), Path("nowhere"), study.results)
    assert cell_of(again, arm, some) == json.loads(json.dumps(cell))


def test_the_table_has_a_line_for_each_cell(run: Any, study: Any, tmp_path: Path) -> None:
    for some in ({"steps": 0}, {"steps": 3}):
        cell_of(study, "ours", some)
    study.choose([cell_of(study, "base", {})])
    fresh = run.Study(study.plan, Path(), Path(), study.results)
    table = importlib.import_module("table")
    lines = [*table.report(fresh, "tuning")]
    assert sum(line.startswith("| ours | 5000 |") for line in lines) >= 2
    (base,) = (line for line in lines if line.startswith("| base "))
    assert "| 1.000 | 1.00, 1.00, 1.00 |" in base
    assert any(line.startswith("ours, protected of ") for line in lines)
    table.draw(fresh, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_an_edge_adds_one_value_and_a_finished_grid_none(run: Any) -> None:
    """More steps are better without end: a second run asks for no cell beyond the added one."""
    plan = run.yaml.safe_load((STUDY / "plan.yaml").read_text())
    study = run.Study(plan, Path(), Path(), Path("nowhere"))

    def cell(phase: str, arm: str, seed: int, settings: dict[str, Any], kept: int) -> Any:
        made = {"phase": phase, "arm": arm, "seed": seed, "kept": kept, "settings": settings}
        made |= {"right": {"a": settings.get("steps", 0) / 1000}}
        return made | {"outside": dict.fromkeys(run.TEXTS, 9.0)}

    study.cell = cell
    for _ in range(2):
        cells = study.tuned("ours", 5000, changes=True)
        assert max(each["settings"]["steps"] for each in cells) == 240
        study.cells = {run.key_of(each): each for each in cells}


def test_a_verdict_compares_what_the_first_tuning_seed_chose(run: Any, study: Any) -> None:
    """A repeated tuning seed chooses nothing; a phase has settings of its own."""
    table, cells = importlib.import_module("table"), {}
    plan = study.plan | {"phases": study.plan["phases"] | {"months": {
        "tasks": TASKS, "seeds": [1], "settings": {"replay": {"replay": 1.0}}
    }}}  # fmt: skip
    defaults = {arm: plan["arms"][arm]["defaults"] for arm in ("ours", "replay")}
    none: dict[str, Any] = {}

    def add(phase: str, arm: str, seed: int, right: float, some: dict[str, Any] = none) -> None:
        settings = defaults.get(arm, {}) | some
        cell = {"phase": phase, "arm": arm, "seed": seed, "kept": KEPT, "settings": settings}
        cell |= {"right": dict.fromkeys(TASKS, right), "outside": dict.fromkeys(run.TEXTS, 9.0)}
        cell |= {"cpu_seconds": 5.0, "memory_gb": 2.0, "rank": 8}
        cells[run.key_of(cell)] = cell

    add("tuning", "base", 5000, 0.1)
    for steps, right in ((20, 0.5), (60, 0.7)):
        add("tuning", "ours", 5000, right, {"steps": steps})
        add("tuning", "ours", 5002, 1.2 - right, {"steps": steps})
    add("tuning", "replay", 5000, 0.6, {"replay": 0.5})
    for point in ({"steps": 20}, {"steps": 60}):
        add("months", "ours", 1, 0.9 if point["steps"] == 60 else 0.2, point)
    for share, right in ((0.5, 0.1), (1.0, 0.8)):
        add("months", "replay", 1, right, {"replay": share})
    made = run.Study(plan, Path(), Path(), Path("nowhere"))
    made.cells = cells
    primary, second = table.comparisons(made, "months")
    assert primary.startswith("primary, ours protected less replay protected: +10.0 ")
    assert second.startswith("second, ours best less replay best: +10.0 ")
    add("months", "base", 1, 0.1)
    head, _, *lines = table.summary(made, "months")
    assert head == "| arm | seeds | right | months | outside | seconds | GB | rank |"
    assert f"| ours, protected, {KEPT} kept | 1 | 90.0 | 90.0 | 1.000 | 5 | 2.0 | 8 |" in lines


def test_a_comparison_weighs_kinds_equally_and_gives_both_intervals(run: Any) -> None:
    """Differences of 10 and 30 points in one kind, 0 in the other; then equal seeds and tasks."""
    table, kinds = importlib.import_module("table"), {"one": ["a", "b"], "two": ["c"]}
    zero = dict.fromkeys("abc", 0.0)
    pairs = [({"a": 0.1, "b": 0.3, "c": 0.0}, zero), ({"a": 0.1, "b": 0.1, "c": 0.0}, zero)]
    mean, over_seeds, over_both = table.compared(pairs, kinds)
    assert mean == pytest.approx((0.1 + 0.05) / 2)
    assert over_seeds == pytest.approx((0.075 - 12.706 * 0.025, 0.075 + 12.706 * 0.025), abs=1e-3)
    assert over_both == pytest.approx((0.05, 0.15))  # all draws of a, or b of the first seed
    same = ({"a": 0.2, "b": 0.2, "c": 0.2}, zero)
    assert table.compared([same, same], kinds)[2] == pytest.approx((0.2, 0.2))

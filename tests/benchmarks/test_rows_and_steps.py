"""Every arm of benchmarks/rows_and_steps makes a cell, on a tiny model and made-up rows; rows,
choices and the loss with a teacher, against figures by hand."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_replay_reads_as_many_old_rows_as_new_ones(
    run: Any, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages of four steps of four rows. The rate makes it a new run."""
    training, seen = sys.modules["training"], list[list[Any]]()
    collate = training.LanguageModelling.collate

    def counted(self: Any, engine: Any, examples: Any) -> Any:
        seen.append([*examples])
        return collate(self, engine, examples)

    monkeypatch.setattr(training.LanguageModelling, "collate", counted)
    cell = cell_of(study, "replay", {"general": "none", "rate": 0.02})
    sizes = [len(rows) for rows in seen if rows]
    assert sizes == [BATCH] * 4 + [2 * BATCH] * 4
    assert cell["old_rows"] == 4 * BATCH


def test_the_teacher_weighs_general_rows_by_their_mean(run: Any, study: Any) -> None:
    """The loss of a batch is its mean over answer tokens and weight · mean KL, which is 0 in the
    base; general rows count no terms."""
    from chainlora.engine.engine import Engine

    runs = run.Case(study.plan, study.data, study.work, study.scored, 5000, TASKS, KEPT, {}).runs
    training = sys.modules["training"]
    objective = runs.with_teacher(4.0)
    general = [*runs.general.train][:3]
    row = study.scored.encode([{"prompt": "one", "answer": "good"}])
    with Engine(study.scored.model, training=True, speedups="off") as engine:
        own, taught = objective.collate(engine, [*row, *general])
        assert (objective.count(own), objective.count(taught)) == (row[0].num_learned, 0)
        with torch.no_grad():
            assert float(objective.loss(engine, taught)) == pytest.approx(0, abs=1e-5)
            changed = training.Taught(taught.batch, taught.teacher.flip(0), 1)
            apart = float(objective.loss(engine, changed))
            times = training.Taught(taught.batch, taught.teacher.flip(0), 5)
            assert float(objective.loss(engine, times)) == pytest.approx(5 * apart)
    assert apart > 0


@pytest.mark.parametrize(("of", "alpha", "anchor"), [("mean", 0, 0), ("median", 0.3, 0.5)])
def test_equations_with_another_ridge_target_and_anchor(
    run: Any, of: str, alpha: float, anchor: float
) -> None:
    """ΔW of full rank against the formula, in float64: the rounding of float32 is 1e-5."""
    from chainlora.chain.combining import Sums
    from chainlora.chain.link import Factors

    draw = torch.Generator().manual_seed(0)
    equations = sys.modules["combining"].Tuned(ridge=0.2, of=of, alpha=alpha, anchor=anchor)
    parts = []
    for count in (9, 12):
        x, target, a, b = (
            torch.randn(shape, generator=draw) for shape in ((count, 4), (count, 3), (2, 4), (3, 2))
        )
        sums = Sums()
        sums.add(x, {"w": target})
        equations.add(sums, count, {"w": Factors(a, b)})
        parts.append((x.double(), target.double(), (b @ a).double()))
    s, k = torch.zeros(4, 4).double(), torch.zeros(3, 4).double()
    for x, target, update in parts:
        gram = x.T @ x / len(x)
        ridge = 0.2 * getattr(gram.diagonal(), of)()
        drawn = anchor * sum(each for *_, each in parts) if anchor else update
        s += gram + ridge * torch.eye(4)
        k += ((1 - alpha) * target + alpha * x @ update.T).T @ x / len(x) + ridge * drawn
    found = equations.solve(3)["w"].factors
    assert found.b @ found.a == pytest.approx((k @ s.inverse()).float(), abs=1e-5)


def test_equations_of_featcal(run: Any) -> None:
    """With α = 1, ρ = 1 and one model, it is the least-squares fit of its outputs, drawn to W."""
    draw = torch.Generator().manual_seed(0)
    x, own = (torch.randn(9, 4, generator=draw) for _ in range(2))
    weight = torch.randn(3, 4, generator=draw)
    equations = sys.modules["featcal"].Equations(0.5, 1.0)
    equations.add(x, own, weight)
    gram = x.T @ x / 9
    left = gram / gram.norm() + 0.5 * torch.eye(4)
    right = x.T @ (own @ weight.T) / 9 / gram.norm() + 0.5 * weight.T
    expected = torch.linalg.solve(left, right).T
    assert equations.solve(weight) == pytest.approx(expected, abs=1e-5)  # rounding of float32


def test_steps_that_were_killed_go_on(
    run: Any, study: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the first save, at step 10 of 12, gives the same bits as no kill."""
    combining = sys.modules["combining"]
    case = run.Case(study.plan, study.data, study.work, study.scored, 5000, TASKS, KEPT, {})
    both, keys = case.combination(), {"steps": 12, "rate": 1e-3, "weight": 4.0}
    whole, _ = both.stepped(both.from_mean(), ["whole"], keys, 0)
    write = combining.Point.write

    def die(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(combining.Point, "write", die)
    with pytest.raises(KeyboardInterrupt):
        both.stepped(both.from_mean(), ["killed"], keys, 0)
    monkeypatch.undo()
    resumed, _ = both.stepped(combining.Point(0, {}, 0.0, {}), ["killed"], keys, 0)
    assert all(map(torch.equal, whole.tensors.values(), resumed.tensors.values()))


def made(settings: dict[str, Any], right: float, text: float) -> dict[str, Any]:
    outside = dict.fromkeys(("gsm8k", "dialogsum", "alpaca form"), text)
    named = {"phase": "tuning", "arm": "ours", "seed": 1, "kept": KEPT, "settings": settings}
    return named | {"right": {"a": right, "b": right}, "outside": outside}


def test_choice_and_edges(run: Any, study: Any) -> None:
    """Of those within 1.10 of the base the most right; within four of 400 the smallest outside."""
    base = made({}, 0.1, 10.0) | {"arm": "base"}
    study.cells[run.key_of(base)] = base
    grid = [(3e-4, 0.70, 10.4), (1e-3, 0.705, 10.9), (3e-3, 0.80, 30.0)]
    cells = [made({"rate": rate, "steps": 20}, *rest) for rate, *rest in grid]
    chosen = study.choose(cells)
    assert chosen["protected"]["settings"]["rate"] == 3e-4
    assert chosen["best"]["settings"]["rate"] == 3e-3
    assert study.choose(cells[2:])["protected"] == cells[2]  # none within: the lowest
    assert run.beyond(cells, cells[0]["settings"]) == [{"rate": 9e-5, "steps": 20}]
    assert run.beyond(cells, cells[1]["settings"]) == []
    assert run.beyond(cells, cells[0]["settings"], {"rate": 3e-4}) == []
    steps = [made({"rate": 1e-3, "steps": steps}, 0.5, 10.0) for steps in (0, 60, 120)]
    assert run.beyond(steps, steps[2]["settings"]) == [{"rate": 1e-3, "steps": 240}]
    assert run.beyond(steps, steps[0]["settings"]) == []  # no fewer than none


def test_the_table_has_a_line_for_each_cell(run: Any, study: Any) -> None:
    for some in ({"steps": 0}, {"steps": 3}):
        cell_of(study, "ours", some)
    study.choose([cell_of(study, "base", {})])
    fresh = run.Study(study.plan, Path(), Path(), study.results)
    lines = [*importlib.import_module("table").report(fresh, "tuning")]
    assert sum(line.startswith("| ours | 5000 |") for line in lines) >= 2
    (base,) = (line for line in lines if line.startswith("| base "))
    assert "| 1.000 | 1.00, 1.00, 1.00 |" in base
    assert any(line.startswith("ours, protected of ") for line in lines)


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


def test_rows_of_a_task_are_disjoint(run: Any, shared_data: Path) -> None:
    rows, counts = sys.modules["rows"], {"train": 320, "validation": 100, "test": 100}
    for task in ("times", "subj", "trec", "yelp", "amazon", "imdb", "dbpedia"):
        drawn = rows.draw(shared_data, task, 50, counts)
        assert {split: len(some) for split, some in drawn.items()} == counts
        texts = [row["prompt"] for some in drawn.values() for row in some]
        assert len({*texts}) == len(texts)
        assert drawn != rows.draw(shared_data, task, 51, counts)
    facts = [rows.draw(shared_data, task, 50, counts) for task in rows.FACTS]
    assert [len(each["train"]) for each in facts] == [80, 80]
    assert [len(each["test"]) for each in facts] == [40, 40]
    prompts = [row["prompt"] for each in facts for some in each.values() for row in some]
    assert len({*prompts}) == 240  # the facts of the gate's validation are those that are asked

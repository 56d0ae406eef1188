"""Every arm of benchmarks/field makes a cell, on a tiny model and two tasks of made-up rows."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, write_rows

from benchmarks.helpers_evidence_stages import script
from chainlora.data import splits
from chainlora.evaluation import start_rows

FIELD = Path(__file__).resolve().parents[2] / "benchmarks" / "field"
TASKS = ("rte", "sst2")  # 20 rows to train on, of which 4 validate, and 6 to test on
KEPT, BATCH = 4, 4
NEUTRAL = WORDS[: WORDS.index("yes")]
SETTINGS: dict[str, dict[str, Any]] = {
    **{"base": {}, "alone": {}, "ours": {}, "router": {"layer": 1}},
    **{"replay": {"replay": 0.5, "rate": 0.01}, "all at once": {"rate": 0.01, "rank": 4}},
    **{"mean": {"scale": 2.0}, "ties": {"scale": 1.5}, "one LoRA": {"rate": 0.01}},
    **{"O-LoRA": {"orthogonal": 0.5, "rate": 0.01}, "EWC": {"penalty": 10.0, "rate": 0.01}},
    **{"RegMean++": {"off_diagonal": 0.9}, "IterIS": {"passes": 2}, "ours, rank 16": {}},
    "replay, no general rows": {"replay": 0.5, "rate": 0.01},
}
COSTS = {  # rank, adapters, steps, rows that are read again
    **{"base": (0, 1, 0, 0), "alone": (8, 2, 8, 0), "router": (8, 2, 8, 2 * KEPT)},
    **{"ours": (16, 1, 8, 2 * KEPT + 64), "replay": (16, 1, 8, 16)},
    **{"mean": (None, 1, 8, 0), "ties": (None, 1, 8, 0)},
    **{"one LoRA": (8, 1, 8, 0), "all at once": (4, 1, 8, 0), "O-LoRA": (16, 1, 8, 0)},
    **{"EWC": (8, 1, 8, 2 * KEPT), "RegMean++": (None, 1, 8, 2 * KEPT)},
    **{"IterIS": (None, 1, 8, 2 * KEPT), "ours, rank 16": (16, 1, 8, 2 * KEPT + 64)},
    "replay, no general rows": (16, 1, 8, 8),  # none in the first stage
}


def made_up(data: Path) -> Path:
    """Rows of both tasks, and the texts of general ability, as the data sets have them."""
    draw = random.Random(0)

    def text(length: int = 6) -> str:
        return " ".join(draw.choices(NEUTRAL, k=length))

    for split, count in (("train", 20), ("validation", 6)):
        nli, sentiment = [], []
        for n in range(count):
            word, label = ("no", "yes")[n % 2], ("not_entailment", "entailment")[n % 2]
            nli.append({"premise": f"{split} {n} {text()}", "hypothesis": word, "label": label})
            said = f"{split} {n} {text()} it was {('bad', 'good')[n % 2]}"
            sentiment.append({"sentence": said, "label": n % 2})
        write_rows(data / f"rte/{split}.jsonl", nli)
        write_rows(data / f"sst2/{split}.jsonl", sentiment)
    write_rows(data / "gsm8k/test.jsonl", [{"question": text(), "answer": text()}])
    write_rows(data / "dialogsum/test.jsonl", [{"dialogue": text()}])
    write_rows(data / "boolq/validation.jsonl", [{"passage": text()}])
    asked = {"instruction": "say", "output": text()}
    write_rows(data / "alpaca_demo/train.jsonl", [asked] * 702)
    return data


@pytest.fixture(scope="module")
def field() -> Iterator[Any]:
    """`benchmarks/field/run.py` with two tasks; what it sets in the package is put back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FIELD))
        patch.setattr(splits, "SAMPLE", splits.SAMPLE)
        patch.setattr(start_rows, "general_rows", start_rows.general_rows)
        names = ("run", "tasks", "model", "product", "routed")  # other folders have such files too
        before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        run = importlib.import_module("run")
        patch.setattr(run.T, "PAPER", TASKS)
        yield run
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def runner(field: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("field")
    keys = {"batch_size": BATCH, "warmup_steps": 0, "dtype": "float32", "save_every": None}
    plan = {"model": str(tiny_folder), "epochs": 1, "train": keys, "kept": KEPT, "rate": 0.01}
    plan["tuning"] = {"seed": 1000, "tasks": [*TASKS]}
    return field.Runner(plan, made_up(folder / "data"), folder)


@pytest.mark.parametrize("arm", SETTINGS)
def test_an_arm_makes_a_cell_that_is_not_computed_again(field: Any, runner: Any, arm: str) -> None:
    cell = runner.cell(arm, 0, SETTINGS[arm], "test")
    assert cell["order"] == [*TASKS]
    assert {*cell["right"]} == {*cell["most"]} == {*TASKS}
    assert all(share * 6 == pytest.approx(round(share * 6)) for share in cell["right"].values())
    assert cell["most"] == dict.fromkeys(TASKS, 0.5)
    costs = tuple(cell[key] for key in ("rank", "adapters", "steps", "old_rows"))
    assert costs == COSTS[arm]
    without = arm in ("base", "alone", "all at once")
    assert {*cell["learned"]} == (set() if without else {*TASKS})
    again = field.Runner(runner.plan, Path("nowhere"), runner.results.parent)
    assert again.cell(arm, 0, SETTINGS[arm], "test") == json.loads(json.dumps(cell))


def test_the_share_that_the_router_gives_to_the_right_task_is_computed_afterwards(
    field: Any, runner: Any
) -> None:
    """Their prompts end in other words, so all rows go to their own task's model."""
    cells = [runner.cell(arm, 0, SETTINGS[arm], "test") for arm in ("router", "alone")]
    shares = importlib.import_module("routed").routed(runner, cells[0])
    assert shares == dict.fromkeys(TASKS, 1.0)
    assert cells[0]["right"] == cells[1]["right"]


def test_cells_of_all_arms_make_a_table(field: Any, runner: Any) -> None:
    for arm, settings in SETTINGS.items():
        runner.cell(arm, 0, settings, "test")
    table = script("field/table.py")
    assert {*table.ARMS} == {*field.ARMS} == {*SETTINGS}
    lines = [*table.report(table.read(runner.results), [{"seed": 0, "routed": {"rte": 0.5}}])]
    assert "not run: none" in lines
    assert "router, seed 0: 50.0 % to the right task" in lines
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} >= {*SETTINGS}

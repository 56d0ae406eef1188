"""The rows of benchmarks/field: 14 tasks, no text on two sides, none of an earlier tuning seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.helpers_evidence_stages import script


@pytest.fixture
def tasks() -> Any:
    """`benchmarks/field/tasks.py`."""
    return script("field/tasks.py")


def test_rows_of_a_task_are_disjoint_and_of_the_size_that_the_page_names(
    tasks: Any, shared_data: Path
) -> None:
    for task in tasks.PAPER:
        drawn = tasks.draw(shared_data, task, 0)
        counts = {split: len(rows) for split, rows in drawn.items()}
        small = {"train": 200, "validation": 50, "test": 56}
        assert counts == (small if task == "cb" else tasks.SPLITS)
        texts = [text for rows in drawn.values() for text, _ in rows]
        assert len({*texts}) == len(texts)
        assert max(map(len, texts)) <= tasks.LETTERS + 40  # of names such as `sentence 1: `
        assert {label for rows in drawn.values() for _, label in rows} <= {*tasks.ASKED[task][1]}
        assert drawn == tasks.draw(shared_data, task, 0) != tasks.draw(shared_data, task, 1)


def test_rows_by_which_the_combination_was_chosen_are_left_out(
    tasks: Any, shared_data: Path
) -> None:
    """As `read_pool` and `Case.rows` of revision 9a75c087 drew them for seed 100."""
    for task in ("agnews", "dbpedia"):
        lines = tasks._lines(shared_data / "cl" / task / "train.jsonl")
        pool = [*{row["text"].strip()[:140]: row["label"] for row in lines}]
        chosen = {*random.Random(f"100 {task} rows").sample(pool, len(pool))[:740]}
        found, _ = tasks.pools(shared_data, task)
        assert len(chosen) == 740
        assert not chosen & {text[:140] for text, _ in found}


def test_seed_0_has_the_order_of_the_paper(tasks: Any) -> None:
    assert tasks.order_of(0)[:3] == ["mnli", "cb", "wic"]
    assert sorted(tasks.order_of(1)) == sorted(tasks.PAPER)
    assert tasks.order_of(1) != tasks.order_of(2)

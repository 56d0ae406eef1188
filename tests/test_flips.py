"""Flipped bits in what a run says of itself: named by every verb that shows it, never shown."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import stage_dir

from chainlora.errors import ChainLoRAError, RunError
from chainlora.reports.run_report import report_runs
from chainlora.runs.cards import story_of
from chainlora.runs.history import read_history
from chainlora.runs.inspection import inspect_run

CASES = 25  # a file: every n-th byte


def flipped(path: Path, cases: int = CASES) -> Iterator[int]:
    """Flip a bit of every n-th byte of a file, one at a time."""
    content, draw = path.read_bytes(), random.Random(0)
    for place in range(0, len(content), max(1, len(content) // cases)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        yield place
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_every_flip_is_named_and_none_is_shown(run_copy, tmp_path, name):
    readers = [inspect_run, lambda run: report_runs([run], tmp_path / "r.html")]
    readers += [story_of] if name == "metrics.jsonl" else []  # what a card shows
    for place in flipped(stage_dir(run_copy) / name):
        for read in readers:
            with pytest.raises(ChainLoRAError) as raised:
                read(run_copy)
            assert f"{name} must be as the run wrote it" in str(raised.value), place
    report_runs([run_copy], tmp_path / "r.html")


def test_every_byte_of_the_history_counts(run_copy):
    history = read_history(run_copy)
    for place in flipped(run_copy / "history.json", cases=400):
        try:
            assert read_history(run_copy) == history, place  # a case of hexadecimal digits
        except RunError:
            continue


def test_a_result_that_is_named_must_be_there(run_copy):
    (stage_dir(run_copy) / "result.json").unlink()
    with pytest.raises(ChainLoRAError, match=r"must hold main/result.json \(got none in"):
        inspect_run(run_copy)

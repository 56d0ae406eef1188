"""Flipped bits in what a run says of itself: named by every verb that shows it, never shown."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import as_format_2

from chainlora.errors import ChainLoRAError, RunError
from chainlora.reports.run_report import report_runs
from chainlora.runs.export import story_of
from chainlora.runs.inspection import inspect_run
from chainlora.runs.state import open_run

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
    for place in flipped(run_copy / name):
        for read in readers:
            with pytest.raises(ChainLoRAError) as raised:
                read(run_copy)
            assert f"{name} must be as the run wrote it" in str(raised.value), place
    report_runs([run_copy], tmp_path / "r.html")


def test_a_result_of_version_0_2_without_a_checksum_is_read_or_refused_in_words(
    run_copy, chainlora, tmp_path
):
    as_format_2(run_copy)
    for _ in flipped(run_copy / "result.json", cases=200):
        with suppress(RunError):
            open_run(run_copy).result()
    for place in flipped(run_copy / "result.json", cases=12):
        found = chainlora("report", run_copy, "--output", tmp_path / "r.html")
        assert found.status in (0, 1), f"byte {place}: {found.err}"
        assert "unexpected" not in found.err, f"byte {place}: {found.err}"


def test_a_result_that_the_manifest_does_not_name_is_none(run_copy):
    """Killed between the two, a run has not finished; its resume writes the result again."""
    other = Path(shutil.copytree(run_copy, run_copy.with_name("other")))
    as_format_2(other)
    (other / "result.json").unlink()
    assert not inspect_run(other)["finished"]
    (run_copy / "result.json").unlink()
    with pytest.raises(ChainLoRAError, match=r"must hold result.json \(got none in"):
        inspect_run(run_copy)

"""The matrix of scores, and undo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import Stop, stop_after, train_all
from helpers_stages import one_stage, stage_of

from chainlora import evaluate_task, train
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import RunError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.inspection import inspect_run
from chainlora.training.stages import train_stages


def test_a_stage_that_was_undone_is_named_with_the_entry_that_has_it(three, tmp_path, caplog):
    run = tmp_path / "run"
    undo(run, to="facts")
    assert train_all(three) == [None, None, None]
    assert open_run(run).stages == ["facts"]
    for name in ("style", "law"):
        remedy = f"to take the stage: chainlora undo {run} --to {name}"
        assert f"does not include stage {name}; {remedy}" in caplog.text


def test_the_matrix_is_what_eval_says_and_is_kept(staged, tmp_path):
    """Average, transfer and forgetting have tests of their own (test_metrics.py)."""
    run = tmp_path / "run"
    train_stages(make_stages(staged))
    (run / "matrix.jsonl").unlink()
    (tmp_path / "run@style").mkdir()  # an export named after the state: no state of the run

    def stop(what: str, done: int, rows: int) -> None:
        if what == "style: facts":
            raise Stop

    with pytest.raises(Stop):  # what was scored until then is kept
        stage_matrix(run, progress=stop)
    assert len((run / "matrix.jsonl").read_text().splitlines()) == 4
    found = stage_matrix(run)
    assert found.states == ["base", "facts", "style"]
    for state, row in zip(found.states, found.grid, strict=True):
        links = {"base": 0, "facts": 3, "style": 5}[state]
        score = evaluate_task(run, num_links=links)["metrics"]["accuracy"]
        assert [cell.value for cell in row] == [score, score]  # both stages have these rows
    (summary,) = found.summaries()
    assert (summary.metric, summary.stages) == ("accuracy", ("facts", "style"))
    assert str(found).splitlines()[-1] == str(summary)
    again = found.grid
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(run).grid == again  # to the bit
    for data in ("train", "validation"):  # the rows are the run's own
        Path(staged["stages"][0]["data"][data]).unlink()
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(run).grid == again
    (run / "matrix.jsonl").unlink()
    assert stage_matrix(f"{run}@facts").states == ["base", "facts"]  # as that stage ended
    assert stage_matrix(f"{run}@facts").grid == [row[:1] for row in again[:2]]


@pytest.mark.parametrize(
    "damage", [b"[" * 50000, b"\xff\xfe", b"null", '"value": "high"', '"value": 0.987']
)
def test_a_damaged_line_of_a_matrix_is_scored_again(two, tmp_path, capsys, damage):
    """And is no score of a report meanwhile: one with another digit too."""
    run, path = tmp_path / "run", tmp_path / "run/matrix.jsonl"
    grid, whole = stage_matrix(run, compute=False).grid, path.read_bytes()
    lines = whole.splitlines()
    if isinstance(damage, str):
        damage = re.sub(rb'"value": [^,]+', damage.encode(), lines[2])
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
    assert sum(cell is None for row in stage_matrix(run, compute=False).grid for cell in row) == 1
    stage = stage_of(two, "style")
    words = ["extend", str(run), "--on-top", "--name", "style"]
    for part in ("data", "chain"):
        for key, value in stage[part].items():
            words += [f"--{part}.{key}", json.dumps(value)]
    assert cli(words) == 0
    assert stage_matrix(run, compute=False).grid == grid
    assert sorted(path.read_bytes().splitlines()) == sorted(lines)


def test_a_run_without_links_has_nothing_to_compare(staged, tmp_path):
    staged["stages"][0]["chain"] = {"ranks": [], "steps": []}
    train(make_stages(one_stage(staged))[0].config)
    with pytest.raises(RunError, match=r"got no links in .*; tie a link first"):
        stage_matrix(tmp_path / "run")


def test_a_best_point_scores_as_itself(staged, tmp_path):
    """It is a part of a link that was whole when the run was stopped: another state."""
    facts = {"ranks": [4, 4], "steps": [9, 2]}
    keys = {"keep_best": True, "eval_every": 1, "schedule": "constant", "save_every": 1}
    staged["stages"][0] |= {"chain": facts, "train": keys}
    (stage,) = make_stages(one_stage(staged))
    stop_after(stage.config, 9)
    whole = stage_matrix(tmp_path / "run").grid[-1][0]
    train(stage.config, resume=True)
    selected = inspect_run(tmp_path / "run")["selected"]
    assert selected["num_links"] == 0
    assert selected["step"] < 9
    assert stage_matrix(tmp_path / "run").grid[-1][0].state != whole.state


def test_rows_that_are_not_kept_are_missing_from_the_matrix(staged, tmp_path):
    staged["stages"][0]["data"]["keep_rows"] = False
    train_all(one_stage(staged))
    train_all(staged)
    found = stage_matrix(tmp_path / "run")
    assert [[cell is None for cell in row] for row in found.grid] == [[True, False]] * 3
    assert found.summaries() == []

"""A stage beside others is pruned as if it had never been there, but for names of rehearsals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import train_on

from beside.cases import add, section
from chainlora.cli.main import run as cli
from chainlora.errors import RunError
from chainlora.evaluation.combination import combine
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log, mix_stages, plan_pruning, prune_stage
from chainlora.runs.history_file import read_history
from chainlora.training.stages import rehearsal, train_stages


def test_a_pruned_stage_leaves_no_trace(abc, ac, capsys):
    """Combine, mix, rehearse, score; prune; again: all is as in a run that never had it."""
    for run in (abc, ac):
        mix_stages(run, {"combined": 0.75})
        train_stages(rehearsal(run, {}))
    names = set(plan_pruning(abc, "b").with_it)
    assert cli(["prune", str(abc), "b"]) == 1
    said = capsys.readouterr().out
    assert "would delete rehearsal, computed from it" in said
    assert f"{abc} would be a now\nwould combine the others again: a, c" in said
    assert "rehearsal" in names
    assert {"after-b", "after-c"} <= names  # of a b, and a b c
    gone = open_run(f"{abc}@b")
    prune_stage(abc, "b")
    for run in (abc, ac):
        combine(run)
        mix_stages(run, {"combined": 0.75})
        if run == ac:
            prune_stage(run, "rehearsal")  # so that the next one has the same name
        train_stages(rehearsal(run, {}))
    one, two = open_run(abc), open_run(ac)
    assert one.state == two.state
    folders = ("links", "rows")
    files = [
        {n: d for n, d in checksums(run).items() if n.startswith(folders)} for run in (abc, ac)
    ]
    assert files[0] == files[1]
    assert scores(abc) == scores(ac)
    assert [e["name"] for e in log(abc)] == [e["name"] for e in log(ac)]
    words = ["b", gone.state.digest, *(term.link for term in gone.state.terms), gone.entry.kept]
    for path in abc.rglob("*"):
        assert path.name not in words
        data = path.read_bytes() if path.suffix in (".json", ".jsonl", ".yaml") else b""
        assert not [word for word in words if f'"{word}"'.encode() in data], path


def scores(run: Path) -> dict[tuple[str, str], str]:
    lines = map(json.loads, (run / "matrix.jsonl").read_text().splitlines())
    return {(cell["state"], cell["stage"]): cell["value"] for cell in lines}


def test_a_combination_goes_with_any_stage_that_it_was_computed_from(abc, sentiment):
    """With one whose rows were not kept, and links under another stage, too."""
    stage = section(sentiment, "bare")
    stage["data"]["keep_rows"] = False
    train_on(f"{abc}@start", stage)
    on_top = section(sentiment, "d")
    on_top["data"]["keep_rows"] = True
    train_on(f"{abc}@bare", on_top)
    found = combine(abc, ["a", "d"]).entry.key
    with pytest.raises(RunError, match=f"a stage must be one of a, b, c, bare, d .got '{found}'"):
        prune_stage(abc, found)
    assert found in plan_pruning(abc, "bare").with_it
    assert (plan_pruning(abc, "d").now, plan_pruning(abc, "d").left) == ("a", ["a", "bare"])
    (term,) = open_run(abc).state.terms
    prune_stage(abc, "bare")
    assert not (abc / "links" / term.link).exists()


def test_a_run_becomes_what_is_left_of_its_combination(abc, sentiment):
    found = combine(abc, ["b", "c"]).entry.key
    combine(abc, ["a", "b", "c"])
    assert read_history(prune_stage(abc, "a") and abc).head == found
    prune_stage(abc, "b")
    assert read_history(abc).head == "c"
    # the same command again, of what is the first stage now
    assert train_on(abc, section(sentiment, "c"), beside=True) == [None]


def test_a_fork_becomes_the_stage_that_was_beside_a_pruned_one(abc, sentiment, tmp_path):
    """Not what both began on, which that stage holds."""
    fork = tmp_path / "fork"
    train_on(f"{abc}@a", section(sentiment, "d") | {"output": str(fork)})
    add(sentiment, fork, "b")
    plan = prune_stage(fork, "d")
    assert (plan.now, plan.left, open_run(fork).stages) == ("b", [], ["a", "b"])

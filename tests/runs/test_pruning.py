"""A pruned stage is nowhere, and the others are what they are without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import train_all, train_on
from helpers_stages import files_of, section, stage_of

from chainlora.cli.main import run as cli
from chainlora.errors import RunError
from chainlora.files import checksums
from chainlora.models.identity import cache_dir
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import earlier_of, undo
from chainlora.runs.entries import WEIGHTS, link_folder, rows_file
from chainlora.runs.history_file import read_history
from chainlora.training.stages import combine, prune


def test_a_pruned_stage_is_nowhere_and_what_stands_on_it_goes_too(three, tmp_path):
    run = tmp_path / "run"
    facts = open_run(f"{run}@facts").state
    traces = {"style", "law"}
    for stage in traces.copy():
        own = open_run(f"{run}@{stage}")
        traces |= {str(own.entry.kept)[:16], *own.entry.tied, own.state.digest}
    prune(run, "style")
    for path in (path for path in run.rglob("*") if path.is_file()):
        text = f"{path.relative_to(run)} {path.read_bytes().decode(errors='replace')}"
        assert not [trace for trace in traces if trace in text], path
    assert open_run(run).verify().state == facts
    with pytest.raises(RunError, match=r"a stage must be one of .*name one"):
        open_run(f"{run}@style")
    with pytest.raises(RunError, match="must be one of"):
        prune(run, "style")
    assert train_all(three | {"stages": three["stages"][:1]}) == [None]
    with pytest.raises(RunError, match=r"must keep a stage.*its only one"):
        prune(run, "facts")


def test_pages_of_a_killed_report_go_with_a_pruned_stage(two, tmp_path, capsys):
    """They show rows. The output says what else stays, as JSON too."""
    run = tmp_path / "run"
    names = ("report.html.123-0.new", "other.html.7-12.new", "matrix.jsonl.9-1.new")
    left = [run / name for name in names]
    for path in left:
        path.write_text("rows of style")
    assert cli(["prune", str(run), "style"]) == 1
    assert f"would delete {left[0]}\n" in capsys.readouterr().out
    copy = shutil.copytree(run, tmp_path / "copy")
    assert cli(["prune", str(run), "style", "--yes"]) == 0
    assert not [path for path in left if path.exists()]
    told = [line[7:] for line in capsys.readouterr().out.splitlines() if line.startswith("stays: ")]
    assert cli(["prune", str(copy), "style", "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out)["stays"] == told
    assert str(cache_dir() / "rows") in told[-1]


def test_what_tensorboard_shows_of_a_stage_goes_with_it(staged, tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install tensorboard")
    for stage in staged["stages"]:
        stage["train"] = {"trackers": ["tensorboard"]}
    train_all(staged)
    run = tmp_path / "run"
    found = {path.relative_to(run).parts[:2] for path in run.rglob("events.out.*")}
    assert found == {("stages", "facts"), ("stages", "style")}
    prune(run, "style")
    found = {path.relative_to(run).parts[:2] for path in run.rglob("events.out.*")}
    assert found == {("stages", "facts")}
    assert not any(b"more.jsonl" in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_what_was_done_before_a_stage_was_pruned_is_not_done_again(two, tmp_path):
    """Heads that went are no steps of `undo`."""
    run, style = tmp_path / "run", stage_of(two, "style")
    for _ in range(2):
        undo(run, to="facts")
        undo(run, to="style")
        prune(run, "style")
        heads = [open_run(run).state.digest]
        while earlier_of(open_run(run).history):
            heads.append(undo(run).state.digest)
        assert len(heads) == len(set(heads))
        undo(run, to="facts")
        train_on(run, style)


def test_what_cannot_be_pruned_is_refused_and_the_command_asks_first(three, tmp_path, capsys):
    run = tmp_path / "run"
    before = files_of(run)
    assert cli(["prune", str(run), "style"]) == 1
    shown = capsys.readouterr()
    assert "would delete" in shown.out
    assert "Nothing deleted. Add --yes." in shown.err
    assert cli(["prune", str(run), "nope", "--yes"]) == 1
    assert cli(["prune", f"{run}@style", "style", "--yes"]) == 2
    assert files_of(run) == before
    assert cli(["prune", str(run), "style", "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["again"] == [f"chainlora extend {run} ROWS --on-top --name law"]
    assert not any(Path(path).exists() for path in found["files"])


# --- what a run is afterwards: what it was without the stage, by the same recipe ---


@pytest.mark.parametrize("damaged", ["base", "rows", "links"])
def test_a_prune_that_is_refused_deletes_nothing(abc, ac, tiny_folder, damaged):
    """The combination of the rest is solved before anything is deleted."""
    kept = read_history(abc).find("c")
    places = {
        "base": tiny_folder / "model.safetensors",
        "rows": abc / rows_file(kept.kept),
        "links": abc / link_folder(kept.tied[0]) / WEIGHTS,
    }
    before, whole = checksums(abc), places[damaged].read_bytes()
    places[damaged].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(RunError, match="restore"):
            prune(abc, "b")
    finally:
        places[damaged].write_bytes(whole)
    assert checksums(abc) == before
    prune(abc, "b")
    assert open_run(abc).state == open_run(ac).state


def test_what_cannot_be_combined_again_is_not_pruned(abc, tmp_path, chainlora):
    pulled = tmp_path / "pulled"
    chainlora("push", abc, tmp_path / "pushed")
    chainlora("pull", tmp_path / "pushed", pulled)
    before = checksums(pulled) | {".lock": ""}
    leave = f"chainlora undo {pulled} --to b, then chainlora prune {pulled} a --yes"
    for words in ("--yes", "--json"):
        chainlora("prune", pulled, "a", words).refused("reads kept rows (got none of b, c)", leave)
    assert checksums(pulled) | {".lock": ""} == before
    undo(pulled, to="b")
    prune(pulled, "a")
    assert open_run(pulled).key == "b"


def test_an_earlier_combination_is_deleted_alone(abc, sentiment, chainlora):
    """Disk grows with the square of the stages until this is done."""
    run, head = abc, open_run(abc)
    old = open_run(f"{run}@after-b")
    chainlora("prune", run, "after-c", "--yes").refused("the current state")
    undo(run, to="after-b")  # this undo goes with the combination
    undo(run, to=head.key)
    size = sum(path.stat().st_size for path in (run / "links").rglob("*") if path.is_file())
    assert "would delete" in chainlora("prune", run, "after-b").out
    assert chainlora("prune", run, "after-b", "--yes").status == 0
    left = sum(path.stat().st_size for path in (run / "links").rglob("*") if path.is_file())
    assert left < size
    assert open_run(run).verify().state == head.state
    assert not [entry for entry in read_history(run).entries if "after-b" in entry.parents]
    seen = {undo(run).key for _ in earlier_of(read_history(run))}
    assert "after-b" not in seen
    undo(run, to="after-c")
    assert combine(run, ["a", "b"]).state == old.state  # to the bit
    undo(run, to="after-c")
    again = next(e.key for e in read_history(run).entries if e.state == old.state)
    train_on(f"{run}@{again}", section(sentiment, "d"))
    undo(run, to="after-c")
    chainlora("prune", run, again, "--yes").refused("an entry is computed from it", "got d")

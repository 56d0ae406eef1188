"""Row files that change: their stages are trained again, and former rows can be erased."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_rows
from helpers import train_on
from helpers_stages import begin, section, train_beside

from chainlora import combine, undo, update
from chainlora.cli.main import run as cli
from chainlora.errors import RunError
from chainlora.evaluation.certificate import verify_certificate
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log
from chainlora.runs.history_file import read_history
from chainlora.training.stages import prune


@pytest.fixture(scope="module")
def trained(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """Stages a and b beside each other, and b-top on both, in a folder with their row files."""
    folder = tmp_path_factory.mktemp("updating")
    shutil.copytree(sentiment, folder / "rows")
    run = begin(tiny_folder, folder / "rows", folder / "run")
    train_beside(folder / "rows", run, "b")
    train_on(run, section(folder / "rows", "b-top"), beside=False)
    return folder


@pytest.fixture
def world(trained, tmp_path, monkeypatch) -> SimpleNamespace:
    """A copy of the run, whose configs name files by paths relative to the current folder."""
    folder = Path(shutil.copytree(trained, tmp_path / "world"))
    history = (folder / "run/history.json").read_text()
    assert str(trained) in history
    for path in folder.rglob("*.json*"):
        text = path.read_text(errors="replace")
        if str(trained) in text and path.name == "history.json":
            _resigned(path, text.replace(str(trained), str(folder)))
    return SimpleNamespace(folder=folder, run=folder / "run", a=folder / "rows-a.jsonl")


def _resigned(path: Path, text: str) -> None:
    from chainlora.runs.documents import checksum

    tree = json.loads(text)
    form = tree.pop("format")
    tree.pop("checksum")
    path.write_text(json.dumps({"format": form, **tree, "checksum": checksum(tree)}))


def without_rows(file: Path, numbers: set[int]) -> list[dict]:
    """Take rows out of a file; return them."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [row for n, row in enumerate(rows) if n not in numbers])
    return [row for n, row in enumerate(rows) if n in numbers]


def never_had(world, tiny_folder) -> Path:
    run = begin(tiny_folder, world.folder / "rows", world.folder / "never")
    for name, beside in (("b", True), ("b-top", False)):
        own = section(world.folder / "rows", name)
        train_on(run, own, beside=beside)
    return run


def test_rows_that_are_erased_were_never_there(world, tiny_folder, monkeypatch):
    """Links, kept rows, states and scores are those of a run on the smaller file, the stage on top
    too; nothing else that could tell of the rows is left, and the certificate holds."""
    stage_matrix(world.run)
    former = world.folder / "former"
    shutil.copytree(world.run, former)
    removed = write_rows(world.folder / "removed.jsonl", without_rows(world.a, {2, 5}))
    rest = world.a.read_text()
    place = world.folder / "certificate.json"
    update(world.run, purge=True, certificate=place)
    monkeypatch.setattr("helpers_stages.section", _keeping(rest, section))
    never = never_had(world, tiny_folder)
    now, wanted = read_history(world.run), read_history(never)
    ours, theirs = ({e.key: (e.state, e.kept, e.digest) for e in h.entries} for h in (now, wanted))
    assert ours.items() <= theirs.items()  # but for combinations that it never was
    assert now.head == wanted.head
    assert now.links.items() <= wanted.links.items()
    cells = [[*map(vars, stage_matrix(run).cells)] for run in (world.run, never)]
    states = {e.state.digest for e in now.entries} | {now.empty.digest}
    assert {json.dumps(c) for c in cells[0]} == {
        json.dumps(c) for c in cells[1] if c["state"] in states
    }
    gone = {e.digest for e in read_history(former).entries} - {e.digest for e in now.entries}
    assert len(gone) == 3  # a, its combination with b, the stage on top
    assert verify_certificate(world.run, place, removed) == []
    removed.write_text(removed.read_text() + removed.read_text())  # rows that were there twice
    assert verify_certificate(world.run, place, removed) == []
    told = verify_certificate(former, place, removed)
    assert any("rows that a kept hold row 1" in line for line in told)
    assert any("is there again" in line for line in told)
    kept = write_rows(world.folder / "kept.jsonl", [json.loads(rest.splitlines()[0])])
    told = verify_certificate(world.run, place, kept)
    assert f"{kept} has 1 different rows, and 2 were removed" in told
    assert any("row 1" in line for line in told if "kept" in line)
    place.write_text(place.read_text().replace('"removed": 2', '"removed": 1'))
    with pytest.raises(RunError, match="changed since it was written"):
        verify_certificate(world.run, place)


def _keeping(rest: str, make):
    """Return `section`, with the smaller file in place of the one that it writes."""

    def changed(sentiment: Path, name: str, **keys):
        own = make(sentiment, name, **keys)
        if name == "a":
            sentiment.with_name(f"{sentiment.name}-a.jsonl").write_text(rest)
        return own

    return changed


def test_an_update_can_be_undone_pruned_and_erased_later(world):
    before = open_run(world.run).state
    without_rows(world.a, {1})
    new = update(world.run)
    assert new.state != before
    names = [entry["name"] for entry in log(world.run)]
    assert {"a", "a-2", "b-top", "b-top-2", "b"} <= {*names}
    assert undo(world.run).state == before
    copy = Path(shutil.copytree(world.run, world.folder / "copy"))
    assert update(world.run).state == new.state  # nothing is trained again
    former = open_run(f"{world.run}@a-2").state
    own = section(world.folder / "rows", "c") | {"output": str(world.folder / "fork")}
    train_on(f"{world.run}@a-2", own, beside=False)
    assert open_run(f"{world.folder / 'fork'}@a").state == former  # its name there
    both = combine(world.run, ["b", f"{world.folder / 'fork'}@a"], output=world.folder / "both")
    taken = combine(both.run, ["b", f"{world.run}@a-2"])
    assert taken.state == both.state
    prune(world.run, "a-2")
    assert open_run(world.run).verify().state == new.state
    update(copy, purge=True, certificate=world.folder / "certificate.json")
    assert [e.key for e in read_history(copy).entries] == [
        e.key for e in read_history(world.run).entries
    ]


def test_only_what_has_changed_is_named_and_nothing_is_done_unasked(world, capsys):
    run = str(world.run)
    assert cli(["update", run]) == 0
    assert "no row file has changed" in capsys.readouterr().out
    history = read_history(world.run)
    without_rows(world.a, {0, 1, 2})
    (world.folder / "rows-b.jsonl").unlink()
    assert cli(["update", run, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "a: 0 new rows and 3 removed" in out
    assert "b-top: stands on it" in out
    assert "b: not looked at" in out
    assert cli(["update", run]) == 1
    assert "Add --yes" in capsys.readouterr().err
    assert cli(["update", run, "a", "--purge"]) == 1
    assert cli(["update", run, "b"]) == 1
    assert "--data.train FILE" in capsys.readouterr().err
    assert cli(["update", run, "z"]) == 1
    assert cli(["update", run, "--data.train", str(world.a)]) == 1
    assert read_history(world.run) == history


def test_a_file_that_lies_elsewhere_is_named(world):
    moved = world.a.rename(world.folder / "moved.jsonl")
    before = open_run(world.run).state
    assert update(world.run, "a", rows=moved).state == before
    without_rows(moved, {3})
    assert update(world.run, "a", rows=moved).state != before
    assert read_history(world.run).plan().stages[0].config["data"]["train"] == str(moved)


def test_a_stage_on_top_needs_its_own_rows(world):
    without_rows(world.a, {3})
    own = world.folder / "rows-b-top.jsonl"
    text = own.read_text()
    own.unlink()
    with pytest.raises(RunError, match=r"files of stages cannot be read.*b-top"):
        update(world.run, "a")
    own.write_text(text.partition("\n")[2])
    with pytest.raises(RunError, match="Name b-top as well"):
        update(world.run, "a")


def test_undone_stages_are_named_before_a_purge(world):
    undo(world.run)
    without_rows(world.a, {3})
    with pytest.raises(RunError, match="b-top was undone and is still in"):
        update(world.run, purge=True)
    update(world.run)


def test_a_later_stage_that_answers_a_corrected_row_otherwise_is_named(world, caplog):
    rows = [json.loads(line) for line in world.a.read_text().splitlines()]
    later = [json.loads(x) for x in (world.folder / "rows-b.jsonl").read_text().splitlines()]
    other = later[-1] | {"label": 1 - later[-1]["label"]}
    write_rows(world.a, [*rows, other])
    update(world.run, "a")
    assert any("of b, which is later, count" in m for m in caplog.messages)


def test_a_certificate_names_exports_and_lies_outside(world, capsys):
    out = world.folder / "out"
    assert cli(["export", str(world.run), "--to", "adapter", "--output", str(out)]) == 0
    without_rows(world.a, {3})
    with pytest.raises(RunError, match="outside"):
        update(world.run, purge=True, certificate=world.run / "c.json")
    with pytest.raises(RunError, match=r"is a \.json file"):
        update(world.run, purge=True, certificate=world.folder / "c.md")
    (world.folder / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"notes\.md: it exists"):
        update(world.run, purge=True, certificate=world.folder / "notes.json")
    assert cli(["verify", str(world.run)]) == 2  # a run has no checksums of an export
    place = world.folder / "c.json"
    assert cli(["update", str(world.run), "--purge", "--yes", "--certificate", str(place)]) == 0
    assert str(out) in place.read_text()
    assert str(out) in place.with_suffix(".md").read_text()
    assert cli(["verify", str(world.run), "--certificate", str(place)]) == 0
    without_rows(world.a, {3})
    with pytest.raises(RunError, match="it exists"):
        update(world.run, purge=True, certificate=place)
    assert "c.json" in capsys.readouterr().out

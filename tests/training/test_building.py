"""The rules of decision 43, on a tiny model: a plan is edited, then what it lacks is computed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Injection
from faults.lives import live
from helpers import train_all, train_on
from helpers_stages import at, config_of, killed, section, train_beside, unbuilt

from chainlora import export_adapter
from chainlora.errors import ChainLoRAError, RunError
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log
from chainlora.runs.declaring import write_plan
from chainlora.runs.history_file import read_history
from chainlora.runs.hub import pull_run, push_run
from chainlora.training.plan import make_plan
from chainlora.training.stages import build_run, combine, extension, prune

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")


def test_rule_1_what_is_not_built_is_not_what_the_run_is(only_a, sentiment, tmp_path, chainlora):
    before = open_run(only_a).state
    export_adapter(only_a, tmp_path / "before")
    seen = []

    def look() -> None:
        now = read_history(only_a)
        seen.append((now.head, open_run(only_a).state, unbuilt(only_a)))
        export_adapter(only_a, tmp_path / "meanwhile")

    own = section(sentiment, "b")
    train_on(only_a, own, beside=True, listener=at("step", look))
    assert seen == [("a", before, ["b"])]
    assert checksums(tmp_path / "meanwhile") == checksums(tmp_path / "before")
    assert open_run(only_a).key == "after-b"
    killed("stage", only_a, section(sentiment, "c"))
    words = ("--prompt", "x", "--max-new-tokens", 1)
    finish = f"chainlora train {only_a} finishes it"
    chainlora("generate", f"{only_a}@c", *words).refused("'c', which has not ended,", finish)
    said = chainlora("chat", only_a, *words)  # the run answers as before
    assert (said.status, f"to do: train c; combine a, b, c. {finish}\n" in said.err) == (0, True)
    assert [(each["name"], each["kind"]) for each in log(only_a)][:1] == [("c", "declared")]


def test_rule_2_a_command_finishes_the_stage_that_one_before_has_begun(ac, sentiment, chainlora):
    killed("step", ac, section(sentiment, "b"))
    for command in (("combine", ac), ("prune", ac, "a", "--yes")):
        chainlora(*command).refused("stage b is unfinished")
    train_beside(sentiment, ac, "d")
    assert open_run(ac).entry.parents == ("a", "c", "b", "d")
    assert "nothing left to do" in chainlora("train", ac).out


def test_rule_2_plugins_that_nobody_named_are_not_run(
    only_a, sentiment, tmp_path, chainlora, caplog
):
    """Before anything else is trained; another command drops a stage that has not begun."""
    plugin = tmp_path / "mine.py"
    plugin.write_text("ran = True\n")
    own = section(sentiment, "b") | {"plugins": [str(plugin)]}
    killed("stage", only_a, own)
    before = read_history(only_a)
    chainlora("train", only_a).refused(f"got {plugin} for b); repeat the command that began b")
    assert read_history(only_a) == before
    train_beside(sentiment, only_a, "c")
    assert (open_run(only_a).stages, unbuilt(only_a)) == (["a", "c"], [])
    assert f"b of {only_a} had not begun and is dropped" in caplog.text
    train_on(only_a, own, beside=True)
    assert open_run(only_a).stages == ["a", "c", "b"]


def test_rule_2_trackers_that_nobody_named_are_not_told(only_a, sentiment):
    """A run may come from somebody else. These would be refused: the package is not there."""
    change = make_plan(extension(only_a, section(sentiment, "b"), beside=True))
    for stage in change.history.stages.values():
        stage.config["train"]["trackers"] = ["comet_ml"]
    write_plan(only_a, change.history, change.start)
    build_run(only_a)
    assert open_run(only_a).stages == ["a", "b"]


def test_rule_4_a_stage_is_replaced_until_it_begins(only_a, sentiment):
    killed("stage", only_a, section(sentiment, "b"))
    assert unbuilt(only_a) == ["b"]
    killed("step", only_a, section(sentiment, "b", ranks=[3]))
    declared = read_history(only_a).plan().find("b")
    assert declared.config["chain"]["ranks"] == [3]
    with pytest.raises(RunError, match=r"stage .b.: chain.ranks is .4., was .3."):
        train_on(only_a, section(sentiment, "b", ranks=[4]), beside=True)
    own = section(sentiment, "b", ranks=[3]) | {"train": {"lr": 1e-4}}
    with pytest.raises(RunError, match=r"train\.lr is 0\.0001, was 0\.01"):
        train_on(only_a, own, beside=True)
    assert read_history(only_a).plan().find("b") == declared
    train_on(only_a, section(sentiment, "b", ranks=[3]), beside=True)
    assert open_run(only_a).entry.parents == ("a", "b")


def test_rule_4_what_is_refused_before_it_learns_is_not_declared_any_more(
    only_a, sentiment, tiny_folder, tmp_path
):
    own, before = section(sentiment, "b"), read_history(only_a)
    rows = Path(own["data"]["train"])
    rows.write_text(rows.read_text() + '{"text": "no label"}\n')
    with pytest.raises(ChainLoRAError, match="label"):
        train_on(only_a, own, beside=True)
    assert read_history(only_a) == before
    assert not (only_a / "stages/b").exists()
    config = config_of(tiny_folder, sentiment, tmp_path / "new", own)
    config["stages"] = config["stages"][1:]
    rows.write_text(rows.read_text() + '{"text": "no label"}\n')
    with pytest.raises(ChainLoRAError, match="label"):
        train_all(config)
    assert not (tmp_path / "new").exists()
    train_beside(sentiment, only_a, "b")  # whose rows are written again


def turn_rows(stage: dict[str, Any]) -> None:
    """Put the rows of a stage into the opposite order."""
    rows = Path(stage["data"]["train"])
    rows.write_text("\n".join(rows.read_text().splitlines()[::-1]) + "\n")


def test_rule_5_files_are_digested_before_and_verified_when_the_entry_is_built(only_a, sentiment):
    own = section(sentiment, "b")
    with pytest.raises(RunError, match=r"must not change before it is built .* for b"):
        train_on(only_a, own, beside=True, listener=at("stage", lambda: turn_rows(own)))
    assert unbuilt(only_a) == []
    train_on(only_a, own, beside=True)  # as they are now
    assert open_run(only_a).entry.parents == ("a", "b")


def test_a_file_of_an_ended_stage_that_changed_is_told(only_a, sentiment, caplog):
    own = section(sentiment, "b")
    train_on(only_a, own, beside=True)
    turn_rows(own)
    assert train_on(only_a, own, beside=True) == [None]
    assert "b: data.train has changed since it was trained; the stage stays" in caplog.text


def test_rule_5_rows_of_a_stage_that_was_killed_have_changed(only_a, sentiment):
    """`train RUN` refuses it, the same command takes the rows as they are now."""
    own = section(sentiment, "b")
    killed("stage", only_a, own)
    turn_rows(own)
    with pytest.raises(RunError, match=r"must not change before it is built .* for b"):
        build_run(only_a)
    train_on(only_a, own, beside=True)
    assert open_run(only_a).entry.parents == ("a", "b")


def test_rule_6_an_equal_recipe_is_not_computed_again(abc, ac, sentiment):
    for _ in range(2):
        before = checksums(abc)
        assert train_on(abc, section(sentiment, "b"), beside=True) == [None]
        assert combine(abc, ["c", "a", "b"]).key == "after-c"  # in any order
        assert checksums(abc) == before
    prune(abc, "b")
    combine(abc)
    assert open_run(abc).state == open_run(ac).state
    names = ("links", "derived", "rows")
    one, two = ({k: v for k, v in checksums(r).items() if k.startswith(names)} for r in (abc, ac))
    assert one == two  # equal digests, equal bits


def test_rule_7_a_stage_that_is_not_built_is_pruned(only_a, sentiment, chainlora):
    killed("step", only_a, section(sentiment, "b"))
    found = chainlora("prune", only_a, "b", "--yes")
    assert found.status == 0, found.err
    assert (unbuilt(only_a), open_run(only_a).key) == ([], "a")
    assert not (only_a / "stages/b").exists()
    train_beside(sentiment, only_a, "b")
    assert open_run(only_a).entry.parents == ("a", "b")


def test_rule_8_what_is_complete_is_sent(ac, abc, sentiment, tmp_path):
    killed("step", ac, section(sentiment, "d"))
    before = checksums(ac)
    push_run(ac, str(tmp_path / "pushed"), rows=True)
    assert unbuilt(tmp_path / "pushed") == []
    assert open_run(tmp_path / "pushed").verify().state == open_run(ac).state
    train_on(f"{ac}@c", section(sentiment, "d") | {"output": str(tmp_path / "fork")})
    assert unbuilt(tmp_path / "fork") == []
    combine(abc, [ac])
    now = checksums(ac)
    now.pop("sent.jsonl")  # notes the copy
    assert (unbuilt(abc), now) == ([], before)
    train_beside(sentiment, ac, "d")
    push_run(ac, str(tmp_path / "pushed"), rows=True)
    pull_run(str(tmp_path / "pushed"), tmp_path / "pulled")
    assert open_run(tmp_path / "pulled").state == open_run(ac).state


@pytest.mark.parametrize("event", ["step", "knot"])
def test_a_stopped_stage_goes_on_where_its_run_is_now(ac, sentiment, tmp_path, event):
    """Not where its config says that the run was: that may be somebody else's run."""
    more = section(sentiment, "b", ranks=[2, 2], steps=[2, 1]) | {"train": {"save_every": 1}}
    killed(event, ac, more)
    copy = Path(shutil.copytree(ac, tmp_path / "copy"))
    before = checksums(ac)
    build_run(copy)
    assert open_run(copy).stages == ["a", "c", "b"]
    assert checksums(ac) == before


def test_rule_12_a_rebuild_says_what_is_missing_before_it_begins(
    ac, sentiment, tmp_path, chainlora
):
    export_adapter(ac, tmp_path / "adapter")
    words = ("train", tmp_path / "adapter/lineage.json", "--output", tmp_path / "new")
    chainlora(*words).refused("task file must be readable")
    task = ("--data.task", sentiment / "task.yaml", "--model", open_run(ac).base.model)
    chainlora(*words, *task).refused(f"{sentiment.name}-a.jsonl")
    assert not (tmp_path / "new").exists()


# --- what a run begins on ---


def test_rule_8_a_run_that_has_built_nothing_is_not_sent(
    tiny_folder, sentiment, tmp_path, chainlora
):
    folder, run = tmp_path / "new", tmp_path / "new/run"
    rows = {"task": str(sentiment / "task.yaml"), "train": str(sentiment / "train.jsonl")}
    tree = {"model": str(tiny_folder), "output": str(run), "start_data": rows}
    tree |= {"stages": [section(sentiment, "b")]}
    whole = live(lambda: train_all(tree), Injection(folder))
    shutil.rmtree(folder)
    place = next(n for n, what in enumerate(whole.operations) if "run/rows" in what)
    end = live(lambda: train_all(tree), Injection(folder, "kill", place))
    assert (end.status, unbuilt(run), read_history(run).entries) == (-9, ["b"], ())
    chainlora("push", run, tmp_path / "sent").refused("a run needs a built entry")
    assert chainlora("train", run).status == 0
    assert open_run(run).stages == ["b"]

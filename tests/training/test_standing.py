"""Where a stage stands by default: beside the others or on top, by `extend` and in a config."""

from __future__ import annotations

import json
import re

import pytest
from conftest import make_tiny_folder
from helpers import Stop, stage_dir, stopping, train_all, train_on
from helpers_data import pair_files
from helpers_stages import config_of, killed, section

from chainlora import evaluate_task, extend
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ConfigError, RunError
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.history_file import read_history
from chainlora.training.events import Event, LayerSolved, StageBegins
from chainlora.training.plan import make_plan
from chainlora.training.stages import extension, prune, train_stages


def test_extend_stands_beside(abc, sentiment, capsys, caplog):
    more = section(sentiment, "d")
    assert extend(abc, more, progress=False)["stage"] == "d"
    entries = read_history(abc).entries
    assert [entry.key for entry in entries[-2:]] == ["d", "after-d"]
    assert (entries[-2].parents, set(entries[-1].parents)) == ((), {"a", "b", "c", "d"})
    extend(abc, more, progress=False)
    assert read_history(abc).entries == entries
    assert "does not include stage" not in caplog.text
    undo(abc)  # all of the command at once
    assert read_history(abc).head == entries[-3].key
    extend(abc, more, progress=False)  # takes no stage again that was undone
    assert read_history(abc).entries == entries
    assert (
        f"does not include stage d; to take the stage: chainlora undo {abc} --to after-d"
        in caplog.text
    )
    assert "d" not in open_run(abc).stages
    file = sentiment.with_name("d2.yaml")
    file.write_text('{"name": "broken"}')
    wrong = section(sentiment, "d3") | {"data": {"task": f"{file}", "train": "rows.jsonl"}}
    with pytest.raises(ConfigError, match="task file"):
        extend(abc, wrong, progress=False)
    file.write_text(json.dumps(section(sentiment, "d2")))
    assert cli(["extend", f"{abc}", f"{file}", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(", beside the others, then a combination\n")


@pytest.mark.parametrize("why", ["pairs", "named", "head", "on top"])
def test_what_extend_trains_on_top(why, abc, sentiment, tmp_path):
    stage = section(sentiment, "d")
    if why == "pairs":
        stage |= {"data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    below = open_run(abc).entry.key if why != "named" else "a"
    address = {"named": f"{abc}@a", "head": f"{abc}@{below}"}.get(why, abc)
    (found,) = extension(address, stage, beside=False if why == "on top" else None)
    assert (found.beside, found.after) == (False, below)


def test_what_cannot_be_combined_is_refused_with_the_remedy(abc, sentiment):
    for key, said in (
        ({"replay": 0.5}, r"got data\.replay of d without `beside`.*add --on-top, or --beside"),
        ({"new_rows_only": True}, r"got data\.new_rows_only of d .*beside: false or true"),
        ({"keep_rows": False}, r"got data\.keep_rows: false of d.; leave it out, or train it on"),
    ):
        stage = section(sentiment, "d")
        stage["data"] |= key
        with pytest.raises(ConfigError, match=said):
            extension(abc, stage, beside=None)
        (found,) = extension(abc, stage, beside=False)
        assert found.after == open_run(abc).key
    with pytest.raises(RunError, match=r"'c' must stay where it was begun \(got it began beside"):
        extension(abc, section(sentiment, "c"), beside=False)


def test_a_stage_beside_others_has_its_config_from_the_first(abc, ac, sentiment):
    """Not from siblings: they may be pruned, and differ when the same command is given again."""
    other = section(sentiment, "d") | {"train": {"lr": 1e-4}}
    events: list[Event] = []
    train_on(abc, other, beside=True, listener=events.append)
    solved = [event for event in events if isinstance(event, LayerSolved)]
    assert [event.layer for event in solved] == [*range(solved[0].layers + 1)]
    assert {*solved[0].parts.removesuffix(": layer").split(" + ")} == {"a", "b", "c", "d"}
    for run in (abc, ac):
        (stage,) = extension(run, section(sentiment, "d2"), beside=True)
        assert stage.config.train.lr == 1e-2
        assert train_on(run, section(sentiment, "c"), beside=True) == [None]


def test_a_stage_that_began_on_top_is_not_beside_others(abc, sentiment):
    """Also where the run is what it began on: it was combined, with nothing."""
    stage = section(sentiment, "d")
    train_on(abc, stage)
    undo(abc, "base")
    with pytest.raises(RunError, match=r"stage 'd' must resume on the state that it was begun on"):
        extension(abc, stage, beside=True)


def test_a_fork_without_stages_of_its_own_is_extended(abc, sentiment, tmp_path):
    fork = tmp_path / "fork"
    train_on(f"{abc}@b", section(sentiment, "d") | {"output": str(fork)})
    prune(fork, "d")
    train_on(fork, section(sentiment, "c"), beside=None)
    assert open_run(fork).stages == ["b", "c"]


def test_a_fork_of_a_combination_is_begun_again(abc, sentiment, tmp_path):
    fork = tmp_path / "fork"
    stages = extension(abc, section(sentiment, "d") | {"output": str(fork)})

    def stop(event: Event) -> None:
        if event.name == "plan":
            raise Stop

    with pytest.raises(Stop):
        train_stages(stages, listener=stop)
    assert not fork.exists()
    train_stages(stages, matrix=False)
    assert open_run(fork).stages == ["a", "b", "c", "d"]


def test_a_fork_of_a_damaged_run_is_refused(abc, sentiment, tmp_path):
    fork = tmp_path / "fork"
    result = stage_dir(abc, "a") / "result.json"
    result.write_text(result.read_text() + " ")
    with pytest.raises(RunError, match=r"a/result\.json must be as the run wrote it"):
        train_stages(extension(abc, section(sentiment, "d") | {"output": str(fork)}))
    assert not fork.exists()


def test_a_combination_and_the_base_have_rows_of_a_stage_whose_file_has_grown(abc, sentiment):
    for name in "ac":
        grown = sentiment.with_name(f"{sentiment.name}-{name}.jsonl")
        grown.write_text((sentiment / "train.jsonl").read_text())
    for run, stage in ((abc, "c"), (f"{abc}@base", "a")):
        rows = [evaluate_task(each)["rows"] for each in (run, f"{abc}@{stage}")]
        assert rows[0] == rows[1] > 4
    for name in "ac":
        section(sentiment, name)  # as other tests read it


def test_a_combination_that_a_kill_prevented_is_made_and_told(ac, sentiment, capsys):
    killed("layer", ac, section(sentiment, "d"))
    file = sentiment.with_name("d.yaml")
    file.write_text(json.dumps(section(sentiment, "d")))
    ask = ["extend", f"{ac}", f"{file}"]
    assert cli([*ask, "--dry-run"]) == 0
    assert capsys.readouterr().out == "d: finished, then a combination\n"
    assert cli(["train", f"{ac}", "--dry-run"]) == 0
    assert capsys.readouterr().out == "would combine a, c, d\n"
    assert cli(ask) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{ac} is after-d now")
    assert re.search(r"^combining [acd + ]+: layer 1 of 2$", shown.err, re.MULTILINE)
    assert "distance" not in shown.err  # which --verbose shows
    assert open_run(ac).entry.parents == ("a", "c", "d")
    undo(ac, "base")
    assert cli(["eval", f"{ac}", "--matrix"]) == 1
    assert f"chainlora undo {ac} --to NAME" in capsys.readouterr().err


# --- stages of a config ---


def test_stages_of_a_config_stand_beside_each_other(tiny_folder, sentiment, abc, tmp_path, caplog):
    """As those of `extend`; one of pairs stands on all of them."""
    pairs = {"name": "pairs", "data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    pairs |= {"chain": {"ranks": [2], "steps": [1]}}
    others = section(sentiment, "b"), section(sentiment, "c")
    config = config_of(tiny_folder, sentiment, tmp_path / "run", *others, pairs)

    def stop(event: Event) -> None:
        if isinstance(event, StageBegins) and event.stage == "pairs":
            raise Stop

    with pytest.raises(Stop):
        train_all(config, listener=stop)
    assert len(train_all(config)) == 4
    train_on(abc, pairs)
    assert open_run(config["output"]).state == open_run(abc).state
    assert read_history(tmp_path / "run").find("pairs").parents == ("after-c",)
    before = checksums(tmp_path / "run")
    assert train_all(config) == [None] * 4
    moved = [others[0] | {"beside": False}, *others[1:], pairs]
    with pytest.raises(RunError, match=r"'b' must stay where .* set beside: true"):
        train_all(config | {"stages": [config["stages"][0], *moved]})
    assert checksums(tmp_path / "run") == before


def test_a_config_is_given_again_whatever_the_run_is(tiny_folder, sentiment, tmp_path, caplog):
    """Nothing is trained where all has ended; where something new would begin on less than it has,
    the command that the error names leads there."""
    run, more = tmp_path / "run", section(sentiment, "c")
    config = config_of(tiny_folder, sentiment, run, section(sentiment, "b"))
    train_all(config)
    longer = config | {"stages": [*config["stages"], more]}
    for place in ("b", "a", "after-b"):
        undo(run, to=place)
        assert train_all(config) == [None, None]
    undo(run, to="a")
    with pytest.raises(RunError, match="--to after-b"):
        train_all(longer)
    undo(run, to="after-b")
    extend(run, section(sentiment, "d"), progress=False)
    assert train_all(config) == [None, None]
    again = section(sentiment, "c")
    again["data"] |= {"new_rows_only": True}  # reads what stages kept: not combinations
    make_plan(extension(run, again, beside=False))


def test_a_stopped_stage_is_not_below_itself_or_stages_beside_it(tiny_folder, sentiment, tmp_path):
    """What cannot be done is refused when the first stage goes on, as when it is new."""
    more = section(sentiment, "b") | {"beside": True}
    more["data"] |= {"replay": 0.5}
    stages = make_stages(config_of(tiny_folder, sentiment, tmp_path / "run", more))
    with pytest.raises(RunError, match="got no earlier stage"):
        make_plan(stages)
    with pytest.raises(Stop):
        train_stages(stages[:1], listener=stopping())
    with pytest.raises(RunError, match="got no earlier stage"):
        make_plan(stages)


def test_the_config_of_a_later_stage_is_for_extend_also_in_a_copy(abc, chainlora):
    config = stage_dir(abc, "b") / "config.yaml"
    chainlora("train", config).refused(f"continue it by: chainlora extend {abc} --name b")


def test_stages_with_links_outside_the_layers_are_on_top_of_each_other(sentiment, tmp_path, caplog):
    """All stages were trained, and then the combination was refused."""
    untied = make_tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    run = tmp_path / "run"
    tree = config_of(untied, sentiment, run, section(sentiment, "b"))
    tree["chain"]["target_modules"] = ["q_proj", "lm_head"]
    with pytest.raises(ConfigError, match=r"in decoder layers \(got lm_head\); train it on top"):
        train_all(tree)
    tree["stages"][1]["beside"] = False
    train_all(tree)
    more = section(sentiment, "c")
    with pytest.raises(ConfigError, match="in decoder layers"):  # lm_head of b cannot be combined
        extend(
            run, more | {"chain": more["chain"] | {"target_modules": ["q_proj"]}}, progress=False
        )

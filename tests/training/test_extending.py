"""Stages: one chain over several data sets, the same bits however it is told, and forks."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import write_rows
from helpers import Stop, assert_same_links, links_of, stopping, train_all, train_on
from helpers_stages import files_of, logits, one_stage, stage_of, stopping_after, survey

from chainlora import export_adapter
from chainlora.cli.common import words_and_overrides
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ConfigError, RunError
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.inspection import inspect_run
from chainlora.runs.loading_start import load_start
from chainlora.training.stages import extension, prune, train_stages


def test_extending_a_run_gives_the_bits_of_one_config_with_both_stages(staged, tmp_path):
    train_all(staged)
    later = one_stage(staged) | {"output": str(tmp_path / "later")}
    train_all(later)
    before = files_of(tmp_path / "later")
    train_on(tmp_path / "later", stage_of(staged, "style"))
    assert_same_links(tmp_path / "run", tmp_path / "later")
    after = files_of(tmp_path / "later")
    assert [name for name in before if after[name] != before[name]] == ["history.json"]
    assert len(links_of(tmp_path / "run")) == 5
    ends = [open_run(tmp_path / name).state.digest for name in ("run", "later")]
    assert ends[0] == ends[1]


def test_the_same_call_again_trains_what_is_new_and_a_stage_stays_what_it_was(staged, tmp_path):
    assert [r is None for r in train_all(one_stage(staged))] == [False]
    assert [r is None for r in train_all(staged)] == [True, False]
    before = files_of(tmp_path / "run")
    (tmp_path / "more.jsonl").write_text("no row\n")  # a file that has changed since
    assert train_all(staged) == [None, None]
    assert files_of(tmp_path / "run") == before
    assert [stage.state for stage in survey(make_stages(staged))] == ["finished", "finished"]
    staged["stages"][0]["chain"]["steps"] = [2, 2, 3]
    with pytest.raises(RunError, match=r"stage 'facts': chain.steps.*another name"):
        train_all(staged)
    staged["stages"][0] = staged["stages"][0] | {"name": "other"}
    with pytest.raises(RunError, match="in their order"):
        train_all(staged)


def test_a_fork_resumes_on_the_state_that_it_was_begun_on(two, tmp_path):
    """That state is known by its content: the other run may be renamed."""
    law = stage_of(two, "style") | {"name": "law", "output": str(tmp_path / "fork")}
    train_on(f"{tmp_path / 'run'}@facts", law)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert train_on(f"{moved}@facts", law) == [None]
    before = files_of(tmp_path / "fork")
    with pytest.raises(RunError, match="stage 'law' must resume on the state that it was begun on"):
        train_on(f"{moved}@style", law)
    assert files_of(tmp_path / "fork") == before


def test_keys_of_all_stages_and_of_one():
    """A key without effect is refused; keys of an objective reach the stages that have it."""
    chain = {"ranks": [2], "epochs": [1]}
    first = {"name": "first", "data": {"train": "x"}, "chain": chain, "train": {"lr": 0.5}}
    second = first | {"name": "second-one", "train": {"loss": "dpo"}}
    tree = {"model": "m", "output": "o", "train": {"dpo_beta": 0.3}, "stages": [first, second]}
    _, named = words_and_overrides(["--stages.second-one.train.log-every", "7"])
    trains = [stage.config.train for stage in make_stages(tree, named)]
    assert [(each.dpo_beta, each.log_every) for each in trains] == [(0.1, None), (0.3, 7)]
    with pytest.raises(ConfigError, match=r"`train.orpo_beta` needs loss: orpo .got no stage"):
        make_stages(tree | {"train": {"orpo_beta": 0.3}})
    shared = {"every": 10}  # as an alias of YAML is
    knots = [each | {"chain": chain | {"knots": shared}} for each in (first, second)]
    key = "stages.first.chain.knots.every"
    chains = [stage.config.chain for stage in make_stages(tree | {"stages": knots}, [(key, "5")])]
    assert [each.knots.every for each in chains] == [5, 10]
    assert shared == {"every": 10}
    for key, hidden in {"train.lr": "train.lr", "chain.steps": "chain.epochs"}.items():
        with pytest.raises(ConfigError, match=rf"got `stages.first.{hidden}`.* set stages.first"):
            make_stages(tree, [(key, "5")])


def test_a_fork_leaves_its_parent_alone(two, tmp_path):
    before, parent = files_of(tmp_path / "run"), tmp_path / "run"
    own = stage_of(two, "style") | {"name": "law", "output": str(tmp_path / "fork")}
    for _ in range(2):  # the second time, nothing is new
        train_on(f"{parent}@facts", own)
    assert files_of(parent) == before
    assert open_run(tmp_path / "fork").stages == ["facts", "law"]
    assert "style" not in (tmp_path / "fork/history.json").read_text()  # what the state needs alone
    shutil.rmtree(parent)
    del own["output"]
    train_all(two | {"output": str(tmp_path / "fork"), "stages": [own]})  # without the parent
    assert not torch.equal(logits(tmp_path / "fork"), logits(tmp_path / "fork", num_links=3))


def test_a_base_beside_the_run_is_found_from_another_folder(staged, tmp_path, monkeypatch):
    """To add a stage, in place or as a fork, and to finish one; `load_run` found it already."""
    shutil.copytree(staged["model"], tmp_path / "base")
    staged |= {"model": "base", "output": "run"}
    first, law = one_stage(staged), stage_of(staged, "style")
    with pytest.raises(Stop):
        train_all(first, listener=stopping(3))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_all(first | {"output": "../run"})
    train_on("../run", law | {"name": "fork", "output": "fork"})
    train_on("../run", law)
    monkeypatch.chdir(tmp_path)
    assert [where.state for where in survey(make_stages(staged))] == ["finished"] * 2
    assert open_run("elsewhere/fork").stages == ["facts", "fork"]


def test_in_place_a_stage_begins_on_the_state_that_is_named(two, tmp_path):
    """On a stage as it was trained, though it was undone: it comes back for it."""
    run, law = tmp_path / "run", stage_of(two, "style") | {"name": "law"}
    undo(run)
    (stage,) = extension(f"{run}@style", law)
    assert stage.after == "style"
    assert extension(f"{run}@style", law | {"output": str(tmp_path / "fork")})
    train_stages([stage], matrix=False)
    assert open_run(run).key == "law"
    assert open_run(f"{run}@law").stages == ["facts", "style", "law"]
    for address in (f"{run}@style", run):
        assert train_on(address, law) == [None]
    with pytest.raises(RunError, match="stage 'law' must resume on the state that it was begun on"):
        extension(f"{run}@facts", law)


def test_a_stage_ends_inside_itself_with_its_best_point(staged, tmp_path):
    """The first stage keeps its best point: the second begins there, and not at the last link."""
    staged["stages"][0] |= {
        "chain": {"ranks": [4, 4], "steps": [1, 9]},
        "train": {"keep_best": True, "eval_every": 1, "schedule": "constant"},
    }
    train_all(staged)
    first = open_run(f"{tmp_path / 'run'}@facts")
    selected = inspect_run(first)["selected"]
    assert selected["partial"]
    assert selected["step"] < 10  # every row is right long before the last step
    records = [record for record in first.records() if record["step"] == selected["step"]]
    (loss,) = (record["loss"] for record in records if record["event"] == "step")
    (scores,) = (record for record in records if record["event"] == "eval")
    link = inspect_run(tmp_path / "run")["links"][1]
    assert (link["loss"], link["scores"]["loss"]) == (loss, scores["loss"])
    export_adapter(f"{tmp_path / 'run'}@facts", tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert f"| 1 | 4 | 2 | {selected['step'] - 1} | 1.0000 | {scores['loss']:.4f} |" in card
    export_adapter(tmp_path / "run", tmp_path / "whole")
    card = (tmp_path / "whole/README.md").read_text(encoding="utf-8")
    table = card.partition("## Lineage")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    links = ["| 0 facts", "| 1 facts", "| before", "| 2 style", "| 3 style"]
    assert rows == ["| link", "| ---", *links]  # scores are the last stage's
    assert "Links from 2 on were trained on the task `task`" in card
    begun_on = open_run(tmp_path / "run").parent.state
    assert begun_on == first.state
    assert len(links_of(f"{tmp_path / 'run'}@facts")) == 2  # the links after it are kept too


def test_a_stage_stopped_anywhere_resumes_to_the_same_bits(staged, tmp_path):
    whole = staged | {"output": str(tmp_path / "whole")}
    train_all(whole)
    staged["train"]["save_every"] = 1
    for stop in range(1, 11):
        with pytest.raises(Stop):
            train_all(staged, listener=stopping_after(stop))
    train_all(staged)
    for name in ("facts", "style"):
        stopped, unbroken = (open_run(f"{tmp_path / run}@{name}") for run in ("run", "whole"))
        assert stopped.state == unbroken.state
        assert_same_links(f"{tmp_path / 'run'}@{name}", f"{tmp_path / 'whole'}@{name}")


def test_stages_that_are_half_trained_leave_the_run_alone(staged, tmp_path, caplog):
    """A later command finishes them."""
    run, style = tmp_path / "run", stage_of(staged, "style")
    with pytest.raises(Stop):
        train_all(one_stage(staged), listener=stopping_after(3))
    with pytest.raises(RunError, match="starts from a finished run"):
        load_start(run)
    with pytest.raises(RunError, match="whose first stage has ended"):
        extension(run, style)
    train_all(one_stage(staged))
    facts = logits(run)
    with pytest.raises(Stop):
        train_on(run, style, listener=stopping_after(8))
    for act in (lambda: prune(run, "facts"), lambda: open_run(f"{run}@style")):
        with pytest.raises(RunError, match=r"style is unfinished|'style', which has not ended,"):
            act()
    assert torch.equal(logits(run), facts)
    (run / "stages/.ipynb_checkpoints").mkdir()  # what looks at folders leaves is no stage
    both = staged | {"stages": [*staged["stages"], style | {"name": "law"}]}
    assert [each.state for each in survey(make_stages(both))] == ["finished", "stopped", "new"]
    train_on(run, style | {"name": "law"})  # finishes style first
    assert open_run(run).stages == ["facts", "style", "law"]
    assert open_run(f"{run}@law").entry.parents == ("style",)


def test_a_fork_that_has_begun_does_not_need_its_parent(staged, tmp_path):
    staged["chain"]["hold"] = "carried"  # a key of the whole run, which a fork inherits
    train_all(one_stage(staged))
    style, address = stage_of(staged, "style"), f"{tmp_path / 'run'}@facts"
    style["data"] |= {"replay": 0.25}
    whole, fork = tmp_path / "whole", tmp_path / "fork"
    train_on(address, style | {"output": str(whole)})
    with pytest.raises(Stop):
        train_on(address, style | {"output": str(fork)}, listener=stopping_after(7))
    shutil.rmtree(tmp_path / "run")
    assert cli(["train", str(fork)]) == 0
    assert open_run(fork).stages == ["facts", "style"]
    assert_same_links(fork, whole)
    with pytest.raises(RunError, match=r"got .*run@facts, which does not exist"):
        train_on(address, style | {"output": str(tmp_path / "other")})


def test_an_extension_inherits_how_earlier_rows_are_read_and_says_what_it_does_not(
    two, tmp_path, caplog
):
    run, style = tmp_path / "run", stage_of(two, "style")
    both = style | {"name": "both", "train": {"keep_best": True, "eval_every": 1}}
    rows = [{"text": f"good good {word}", "label": 1} for word in ("cat", "mat", "hill", "two")]
    more = str(write_rows(tmp_path / "new.jsonl", rows))
    both["data"] = style["data"] | {"train": more, "replay": 0.25, "new_rows_only": True}
    both["chain"] = style["chain"] | {"alpha": [8, 4]}
    train_on(run, both)
    assert "stage both does not inherit" not in caplog.text  # it gives all that style had set
    own = {"name": "law", "chain": {"ranks": [2], "epochs": [1]}, "data": {"train": "x.jsonl"}}
    data = extension(run, own)[-1].config.data
    assert (data.replay, data.new_rows_only) == (0.25, True)
    left_out = "data.task, data.validation, chain.alpha, train.keep_best"
    assert caplog.messages[-1] == f"stage law does not inherit {left_out} from both"
    off = own | {"data": own["data"] | {"replay": None}}
    assert extension(run, off)[-1].config.data.replay is None

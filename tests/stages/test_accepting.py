"""A stage that harms earlier ones is weakened by `accept_links`; what needs earlier rows."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import train_all, train_on
from helpers_data import pair_files

from chainlora import export_adapter, train
from chainlora.cli.main import run as cli
from chainlora.errors import ChainLoRAError, ConfigError, RunError, StoppedError
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import mix_stages, prune_stage
from chainlora.training.interrupts import interruptible
from chainlora.training.stages import extension
from stages.cases import flipped, logits, one_stage, stage_of, survey


@pytest.fixture
def harmful(config, tmp_path) -> dict:
    """Return the config with a second stage that learns the opposite of the first."""
    flipped(tmp_path / "rows/train.jsonl", tmp_path / "more.jsonl")
    facts, style = config["stages"]
    facts["chain"] |= {"ranks": [4], "steps": [30]}
    style["chain"] |= {"ranks": [4], "steps": [30]}
    facts["train"] = {"lr": 1e-2}
    style["train"] = {"lr": 1e-2, "accept_links": 0.0}
    return config


def test_a_stage_that_harms_earlier_ones_is_weakened_until_they_lose_no_more(
    harmful, tmp_path, capsys
):
    """The command line says what it did; typed again, it does nothing."""
    run, file = tmp_path / "run", tmp_path / "mine.yaml"
    file.write_text(json.dumps(harmful))
    status = cli(["train", str(file)])
    said, found = capsys.readouterr().err, open_run(run).strengths
    assert found["style"] < 1
    assert f"stage style: strength {found['style']:g} by accept_links" in said
    assert status == (0 if found["style"] else 3)
    assert cli(["train", str(file)]) == 0
    before, full, now = stage_matrix(run).grid[1:]
    if found["style"]:
        assert before[0].value - now[0].value <= before[0].error + now[0].error
    else:
        assert now[0] == before[0]
    assert full[0].value < before[0].value - full[0].error  # there was something to lose
    mix_stages(run, {"style": 1.0})  # what was weakened is not lost
    assert torch.equal(logits(f"{run}@style"), logits(run))


def test_a_stage_within_the_tolerance_keeps_its_strength(harmful, tmp_path):
    harmful["stages"][1]["train"]["accept_links"] = 1.0
    train_all(harmful)
    assert open_run(tmp_path / "run").strengths == {"facts": 1, "style": 1}


def test_a_stage_that_no_strength_makes_harmless_is_off_and_the_exit_status_says_so(
    harmful, tmp_path, capsys
):
    """At a quarter of its strength 60 steps at this rate still overrule the first stage."""
    harmful["stages"][1]["train"]["lr"] = 0.1
    harmful["stages"][1]["chain"]["steps"] = [60]
    (tmp_path / "mine.yaml").write_text(json.dumps(harmful))
    assert cli(["train", str(tmp_path / "mine.yaml"), "--json"]) == 3
    told = capsys.readouterr()
    assert "switched off by accept_links: style" in told.err
    assert json.loads(told.out)["strengths"] == {"facts": 1.0, "style": 0.0}
    assert torch.equal(logits(tmp_path / "run"), logits(f"{tmp_path / 'run'}@facts"))


@pytest.mark.parametrize("is_fork", [False, True])
def test_a_signal_between_training_and_judging_loses_neither(harmful, tmp_path, is_fork, capsys):
    train_all(one_stage(harmful))
    section = stage_of(harmful, "style") | ({"output": str(tmp_path / "fork")} if is_fork else {})
    run = tmp_path / ("fork" if is_fork else "run")

    def listener(event) -> None:
        if event.name == "scored":
            os.kill(os.getpid(), signal.SIGINT)

    with interruptible() as interrupts:
        interrupts.defer()
        with pytest.raises(
            StoppedError, match=r"SIGINT.*before: facts\); the same command goes on"
        ):
            train_on(tmp_path / "run", section, listener=listener)
    not_judged = (
        r"^Cannot use .*: stage 'style' is trained but not yet judged by accept_links\. Run"
    )
    assert open_run(f"{tmp_path / 'run'}").stages == ["facts"]
    capsys.readouterr()
    if is_fork:  # it would pass for judged
        for words in _verbs_on(run, tmp_path):
            assert cli(words) == 1, words
            assert re.search(not_judged, capsys.readouterr().err.removeprefix("chainlora: error: "))
        for verb in ("inspect", "report"):
            assert cli([verb, str(run)]) == 0
        assert "not judged: stage style" in capsys.readouterr().out
        assert "is not judged yet" in (run / "report.html").read_text()
        for start in (run, f"{run}@style"):
            with pytest.raises(RunError, match=rf"{not_judged}|has not ended"):
                survey(extension(start, section | {"name": "law", "output": str(tmp_path / "x")}))
        with pytest.raises(RunError, match=not_judged):
            prune_stage(run, "facts")
    train_on(tmp_path / "run", section)
    assert open_run(run).strengths["style"] < 1
    assert train_on(tmp_path / "run", section) == [None]


def _verbs_on(run: Path, tmp_path: Path) -> list[list[str]]:
    """Return each command that uses a run."""
    to = ["--output", str(tmp_path / "out")]
    verbs = {"generate": ["--prompt", "a"], "eval": [], "export": ["--to", "adapter", *to]}
    found = [[verb, str(run), *words] for verb, words in verbs.items()]
    alone = [["chat", str(run)], ["eval", str(run), "--matrix"]]
    return [*found, *alone, ["mix", str(run), "style=1"]]


def test_what_needs_earlier_stages_is_refused_without(config, tmp_path, capsys):
    plain = {key: value for key, value in config.items() if key != "stages"}
    plain["data"] = config["stages"][0]["data"]
    plain["chain"] |= config["stages"][0]["chain"]
    plain["train"] = {"accept_links": 0.02}
    (tmp_path / "plain.yaml").write_text(json.dumps(plain))
    assert cli(["train", str(tmp_path / "plain.yaml")]) == 1
    assert "0.02 in a run without any" in capsys.readouterr().err
    keys = ["--train.accept_links", "all", "--data.replay", "0.1"]
    assert cli(["train", str(tmp_path / "plain.yaml"), *keys]) == 1
    assert "0.1 in a run without any" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="without any"):
        train(plain)
    assert not (tmp_path / "run").exists()


def test_what_a_tolerance_needs_is_asked_for_before_any_training(harmful, tmp_path):
    harmful["stages"][0]["data"]["keep_rows"] = False
    with pytest.raises(RunError, match=r"accept_links.*none of facts.*keep_rows"):
        train_all(harmful)
    assert not (tmp_path / "run").exists()
    del harmful["stages"][1]["train"]["accept_links"]
    for key, value, off in (("replay", 0.1, "null"), ("new_rows_only", True, "false")):
        harmful["stages"][1]["data"][key] = value
        with pytest.raises(RunError, match=rf"data.{key}.*none of facts.*set data.{key}: {off}"):
            train_all(harmful)


def test_rows_that_no_stage_learns_alike_are_not_replayed(harmful, tmp_path):
    """Refused before any work: in the first stage, a later one, a fork, and beside a stage that
    has ended."""
    facts, style = harmful["stages"]
    del style["train"]["accept_links"]
    pairs = style | {"name": "pairs", "train": {"loss": "dpo", "lr": 1e-3}}
    pairs["data"] = pair_files(tmp_path) | {"replay": 0.1}
    again = facts | {"data": facts["data"] | {"replay": 0.1}}
    for stages, got in (
        ([again, style], "stage 'facts' .*no earlier stage"),
        ([facts, style, pairs], "learned by dpo .got facts: candidates, style: candidates"),
    ):
        with pytest.raises(RunError, match=got):
            train_all(harmful | {"stages": stages})
        assert not (tmp_path / "run").exists()
    facts["chain"]["steps"] = [1]
    train_all(one_stage(harmful))
    for output in ({}, {"output": str(tmp_path / "fork")}):
        with pytest.raises(RunError, match=r"learned by dpo .got facts: candidates"):
            survey(extension(tmp_path / "run", pairs | output))
    rows = tmp_path / "answers.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " was good"}\n')
    answers = style | {"data": {"train": str(rows), "replay": 0.1}}
    assert survey(extension(tmp_path / "run", answers))[-1].state == "new"


def test_what_a_chain_begins_on_is_asked_for_before_any_training(harmful, tmp_path):
    """A PEFT adapter has no rows, and its link a name; a stage that was pruned needs neither."""
    facts, style = harmful["stages"]
    facts["data"]["keep_rows"] = False
    del style["train"]["accept_links"]
    train_all(harmful)
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    begun = harmful | {"start": str(tmp_path / "adapter"), "output": str(tmp_path / "begun")}
    law = style | {"name": "law", "train": {"accept_links": 0.1}}
    for last, message in (
        (law, "none of start"),
        (style | {"name": "start"}, "not base, start or now"),
    ):
        with pytest.raises(ChainLoRAError, match=message):
            train_all(begun | {"stages": [style, last]})
    assert not (tmp_path / "begun").exists()
    with pytest.raises(RunError, match="none of facts"):
        survey(extension(tmp_path / "run", law))
    prune_stage(tmp_path / "run", "facts")
    assert [found.state for found in survey(extension(tmp_path / "run", law))][-1] == "new"


def test_one_row_is_no_excuse(harmful, tmp_path):
    """It has no standard error."""
    for stage in harmful["stages"]:
        stage["data"] |= {"num_validation": 1}
    train_all(harmful)
    assert open_run(tmp_path / "run").strengths["style"] < 1

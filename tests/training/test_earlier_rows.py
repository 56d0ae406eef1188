"""What needs rows of earlier stages, and is refused without."""

from __future__ import annotations

import json

import pytest
from helpers import train_all
from helpers_data import pair_files
from helpers_stages import one_stage, survey

from chainlora import train
from chainlora.cli.main import run as cli
from chainlora.errors import ChainLoRAError, ConfigError, RunError
from chainlora.training.stages import extension, prune


def test_what_needs_earlier_stages_is_refused_without(staged, tmp_path, capsys):
    plain = {key: value for key, value in staged.items() if key != "stages"}
    plain["chain"] |= staged["stages"][0]["chain"]
    plain["data"] = staged["stages"][0]["data"] | {"replay": 0.1}
    (tmp_path / "plain.yaml").write_text(json.dumps(plain))
    assert cli(["train", str(tmp_path / "plain.yaml")]) == 1
    assert "0.1 in a run without earlier stages" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="without earlier stages"):
        train(plain)
    assert not (tmp_path / "run").exists()


def test_rows_that_were_not_kept_are_asked_for_before_any_training(staged, tmp_path):
    staged["stages"][0]["data"]["keep_rows"] = False
    for key, value, off in (("replay", 0.1, "null"), ("new_rows_only", True, "false")):
        staged["stages"][1]["data"][key] = value
        with pytest.raises(RunError, match=rf"data.{key}.*none of facts.*set data.{key}: {off}"):
            train_all(staged)
    assert not (tmp_path / "run").exists()


def test_rows_that_no_stage_learns_alike_are_not_replayed(staged, tmp_path):
    """Refused before any work: in the first stage, a later one, a fork, and beside a stage that
    has ended."""
    facts, style = staged["stages"]
    pairs = style | {"name": "pairs", "train": {"loss": "dpo", "lr": 1e-3}}
    pairs["data"] = pair_files(tmp_path) | {"replay": 0.1}
    again = facts | {"data": facts["data"] | {"replay": 0.1}}
    for stages, got in (
        ([again, style], "stage 'facts' .*no earlier stage"),
        ([facts, style, pairs], "learned by dpo .got facts: candidates, style: candidates"),
    ):
        with pytest.raises(RunError, match=got):
            train_all(staged | {"stages": stages})
        assert not (tmp_path / "run").exists()
    facts["chain"] = {"ranks": [4], "steps": [1]}
    train_all(one_stage(staged))
    for output in ({}, {"output": str(tmp_path / "fork")}):
        with pytest.raises(RunError, match=r"learned by dpo .got facts: candidates"):
            survey(extension(tmp_path / "run", pairs | output))
    rows = tmp_path / "answers.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " was good"}\n')
    answers = style | {"data": {"train": str(rows), "replay": 0.1}}
    assert survey(extension(tmp_path / "run", answers))[-1].state == "new"


def test_what_a_stage_begins_on_is_asked_for_before_any_training(staged, tmp_path):
    """A name that is free, and rows of the stages before; not those of a stage that was pruned."""
    facts, style = staged["stages"]
    with pytest.raises(ChainLoRAError, match="not base, start, now or combined"):
        train_all(staged | {"stages": [facts, style | {"name": "start"}]})
    assert not (tmp_path / "run").exists()
    facts["data"]["keep_rows"] = False
    train_all(staged)
    law = style | {"name": "law", "data": style["data"] | {"new_rows_only": True}}
    with pytest.raises(RunError, match="none of facts"):
        survey(extension(tmp_path / "run", law))
    prune(tmp_path / "run", "facts")
    assert [found.state for found in survey(extension(tmp_path / "run", law))][-1] == "new"

"""`chainlora train` as its users meet it: what it writes, prints and resumes."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import yaml
from conftest import write_rows
from helpers import Stop, assert_same_links, records_of, stage_dir, stop_after, stopping

from chainlora import load_config, train
from chainlora.config.staging import make_stages
from chainlora.files import checksums
from chainlora.training.stages import train_stages


def test_train_writes_a_run_directory_and_shows_its_links(chainlora, config, tmp_path):
    done = chainlora("train", config, "--verbose")
    assert done.status == 0
    assert (stage_dir(tmp_path / "run") / "training.png").read_bytes().startswith(b"\x89PNG")
    for shown in ("validation: accuracy 1.0000", "majority", "11 steps", "‖ΔW‖", "overlap"):
        assert shown in done.out
    assert "32 training rows, 11 steps (4 + 4 + 3)" in done.err  # progress goes to stderr
    assert "after link 2: validation accuracy 1.0000" in done.err
    assert "training rows" not in done.out


def test_a_newcomer_sees_rows_steps_loss_and_scores(chainlora, config, tmp_path):
    """Links, rates, rounding and norms were the first things shown."""
    one = ("train", config, "--chain.ranks", "[2]", "--chain.steps", "[10]")
    brief = chainlora(*one, "--output", tmp_path / "brief")
    said = brief.err.splitlines()
    assert said[0].startswith(f"{config}: one LoRA of rank 2 on ")
    assert "32 training rows, 10 steps" in said
    assert any(re.match(r"step +10  loss [.\d]+ \(smoothed\), [\d,]+ tokens/s$", s) for s in said)
    assert re.match(r"step +10  after training: validation accuracy", said[-1])
    for word in ("link", "tied", "‖ΔW‖", "overlap", "rounding", "lr "):
        assert word not in brief.err + brief.out
    whole = chainlora(*one, "--output", tmp_path / "whole", "--verbose")
    for words in ("link 0: loss", ", lr ", "steps (10)", "link 0 tied (rounding changed the func"):
        assert words in whole.err
    assert "effective rank" in whole.out
    records = (records_of(tmp_path / name) for name in ("brief", "whole"))
    events, same = ([record["event"] for record in run] for run in records)
    assert events == same
    several = chainlora("train", config, "--output", tmp_path / "several").err
    assert "11 steps (4 + 4 + 3)" in several
    assert "link 1: loss " in several
    assert "after link 2: validation " in several


def test_any_key_can_be_set_in_any_order_and_either_spelling(chainlora, config, tmp_path):
    before = "--chain.ranks [2] --json --chain.steps=[2]"
    after = f"--train.batch-size 4 --output {tmp_path}/other --train.max_grad_norm null"
    result = chainlora(f"train {before} {config} {after}").json
    assert (result["steps"], [link["rank"] for link in result["links"]]) == (2, [2])
    written = stage_dir(tmp_path / "other")
    assert result == json.loads((written / "result.json").read_text())
    resolved = yaml.safe_load((written / "config.yaml").read_text())
    assert (resolved["train"]["batch_size"], resolved["train"]["max_grad_norm"]) == (4, None)
    assert not (tmp_path / "run").exists()


def test_a_name_with_a_number_sign_is_taken_whole(chainlora, config, tmp_path):
    shutil.copyfile(config, tmp_path / "config #2.yaml")
    output = f"{tmp_path}/try #2"
    assert chainlora("train", tmp_path / "config #2.yaml", "--output", output).status == 0
    assert (stage_dir(tmp_path / "try #2") / "result.json").is_file()
    assert not (tmp_path / "try").exists()
    lengths = "[1] # a list, and why"
    keys = ("--chain.ranks", lengths, "--chain.steps", lengths, "--output", "'quoted' # so")
    refused = chainlora("train", config, *keys, "--model", f"{tmp_path}/base #1")
    refused.refused(f"{tmp_path}/base #1")
    announced = f"{config}: one LoRA of rank 1 on {tmp_path}/base #1, to quoted"
    assert refused.err.splitlines()[0] == announced


def test_a_chain_of_none_is_the_zero_shot_model(chainlora, config):
    none = f"train {config} --chain.ranks [] --chain.steps [] --json"
    result = chainlora(none).json
    assert (result["steps"], result["links"]) == (0, [])
    blind = f"{none} --data.validation null --output {config.parent}/blind"
    assert chainlora(blind).status == 0  # nothing to draw either


def test_early_stop_and_the_best_point(chainlora, config, tmp_path):
    keys = "--train.eval_every 1 --train.early_stop 2 --train.keep_best true --train.lr 1e-9"
    assert chainlora(f"train {config} {keys} --json").json["steps"] == 3
    assert "selected: best point at step 1" in chainlora(f"inspect {tmp_path}/run").out


def test_the_same_command_does_what_is_left(chainlora, config, tmp_path):
    """It begins, resumes what was killed, and has nothing to do at the end: a job of CI."""
    whole = tmp_path / "the whole"
    done = chainlora("train", config, "--resume", "--output", whole)
    told = done.out.partition("next:\n")[2].splitlines()
    assert [shlex.split(line)[1] for line in told] == ["generate", "eval", "extend", "export"]
    for words in told[1].split("; "):
        assert chainlora(*shlex.split(words)[1:]).status == 0
    stop_after(load_config(config), 6)
    assert "resuming after step 4" in chainlora("train", config).err
    assert_same_links(tmp_path / "run", whole)
    before = checksums(tmp_path / "run")
    for words in (config, f"{config} --resume", stage_dir(tmp_path / "run") / "config.yaml"):
        again = chainlora(f"train {words}")
        assert (again.status, again.out) == (0, f"nothing left to do: {tmp_path}/run has ended\n")
    assert chainlora(f"train {config} --json").json["steps"] == 11
    planned = chainlora(f"train {config} --dry-run").out
    assert planned == "main: finished, nothing to do\n"
    assert checksums(tmp_path / "run") == before


def test_the_config_inside_a_run_goes_on_with_its_stage(chainlora, config, tmp_path):
    """Whatever its first stage is called."""
    tree = yaml.safe_load(config.read_text()) | {"stages": [{"name": "facts"}]}
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(Stop):
        train_stages(make_stages(tree), listener=stopping(5))
    inside = stage_dir(tmp_path / "run", "facts") / "config.yaml"
    assert "resuming after step 4" in chainlora("train", inside).err
    assert chainlora("train", config).out == f"nothing left to do: {tmp_path}/run has ended\n"


def test_a_batch_of_more_rows_than_there_are_is_said(config, caplog):
    for batch, chain in ((32, {"chain.steps": [1]}), (33, {"chain.epochs": [1]})):
        keys = {"chain.ranks": [1], "chain.steps": None, "output": None} | chain
        train(load_config(config, keys | {"train.batch_size": batch}))
        said = "up to 33 rows (train.batch_size), and an epoch has 32: an epoch is one step"
        assert (said in caplog.text) == (batch == 33)


@pytest.mark.parametrize(("template", "questions"), [("null", 2), ("zephyr", 2), ("zephyr", 1)])
def test_what_was_trained_on_conversations_is_to_be_chatted_with(
    chainlora, tiny_folder, tmp_path, template, questions
):
    said = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]
    rows = [{"messages": [{**said[0], "content": word}, said[1]]} for word in ("red", "two")]
    write_rows(tmp_path / "rows.jsonl", rows[:questions])
    keys = f"--chain.ranks 2 --chain.steps 1 --output run --data.chat_template {template}"
    told = chainlora(f"train rows.jsonl --model {tiny_folder} {keys}").out.partition("next:\n")[2]
    assert told.splitlines()[0] == "  chainlora chat run"
    assert "generate" not in told
    asked = ("--prompt", "red", "--max-new-tokens", 8)
    said = chainlora("generate", "run", *asked)
    assert said.out == chainlora("chat", "run", *asked).out
    assert said.err.startswith("chainlora: asked in the chat template, as the run's rows are")
    raw, base = (chainlora("generate", r, *asked, "--raw") for r in ("run", "run@base"))
    assert (raw.err, raw.status, base.status) == ("", 0, 0)

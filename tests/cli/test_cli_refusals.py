"""What `chainlora train` refuses, before any training and leaving nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from conftest import tiny_model
from helpers import stop_after
from helpers_cli import Outcome

from chainlora import load_config

# What only files, the model or the rows can tell; test_config.py has what the config can.
WRONG = {
    "--output null": "`output` must name a directory for the run (got none); add it to the config",
    "--data.train no.jsonl": "data must be a file, a folder or a Hub dataset owner/name (got no.js",
    "--data.train no/such.jsonl": "check the path, relative to /",
    "--data.task no.yaml": "task file must be readable (got no.yaml: No such file or directory)",
    "--data.max_length 200": "must fit the model's context of 128 tokens (got 200); lower",
    "--data.max_length 5": " tokens); shorten it or raise data.max_length, or set data.truncation:",
    "--model nowhere/at/all": "`model` must be a Hub id, an existing folder or a .gguf file (got '",
    "--model no/body": "`model` must be an existing folder or an accessible Hub id (got 'no/body'",
    "--chain.target_modules [query]": "candidates: down_proj, gate_proj, k_proj, o_proj, q_proj, u",
    "--chain.target_modules [q_proj,vproj]": "every name in `target_modules` must match (got 'vpro",
    "--chain.lora_bias true": "`lora_bias` needs adapted layers with a bias (got ",
    "--train.select_metric f1": "`select_metric` must be one of ",
    "--train.trackers [notebook]": "`trackers` must name ",  # nobody knows it
    "--train.trackers [aim]": "`trackers` must name ",  # it is not installed
}
SHOWN = ("--train.select_metric", "--train.trackers")  # by configs alone
AT_ONCE = [key for key in WRONG if key.startswith(SHOWN)]


@pytest.mark.parametrize("keys", WRONG)
def test_what_a_run_cannot_do_is_refused_before_it_begins(chainlora, config, tmp_path, keys):
    chainlora(f"train {config} {keys}").refused(WRONG[keys], "(got ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", AT_ONCE)
def test_what_configs_show_is_refused_before_an_earlier_stage_is_trained(chainlora, config, keys):
    chainlora(f"train {config} {keys} --dry-run").refused(WRONG[keys])


@pytest.mark.parametrize("name", ["runs/none", "runs/none@facts", "no/such/run"])
def test_a_run_that_is_not_there_is_told_with_what_was_looked_for(chainlora, task, name):
    looked = f"(got {name}: no {name.partition('@')[0]}/history.json, no such "
    for words in (f"generate {name} --prompt hi", f"eval {name} {task}", f"chat {name}"):
        chainlora(words).refused("a run or model must be there", f"{looked}model on this machine")
    chainlora(f"add out {name} --rows no.jsonl").refused("a run or adapter must be there", looked)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("--data.task rte", "a task must be a .yaml file"),
        ("--data.train null --data.validation null", "`data` must name a `train` file"),
        ("--data.validation {empty}", "data must hold at least one row"),
        ("--data.train {cut}", "data must be JSON"),
        ("--data.task null --data.train {other}", "rows must have the fields of a format"),
        ("--data.task null --data.format text --data.train {other}", "`model` must be a Hub id"),
    ],
)
def test_rows_are_looked_at_before_the_model(chainlora, config, tmp_path, keys, message):
    files = {"empty": "", "cut": '{"text": "go', "other": '{"a": 1}\n'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    keys = keys.format(**{name: tmp_path / f"{name}.jsonl" for name in files})
    chainlora(f"train {config} --model nowhere/at/all {keys}").refused(message, "(got ")


def test_a_dry_run_refuses_what_the_model_tells(chainlora, config, tmp_path):
    dry = f"train {config} --dry-run"
    for keys in ("--model no/body", "--data.max_length 200", "--chain.target_modules [query]"):
        chainlora(f"{dry} {keys}").refused(WRONG[keys])
    assert chainlora(f"{dry} --resume").status == chainlora(dry).status == 0
    assert chainlora(f"{dry} --output {tmp_path}/new/run").status == 0
    assert not (tmp_path / "new").exists()


def test_output_in_use(chainlora, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for words in (f"train {config}", f"train {config} --dry-run"):
        chainlora(words).refused(
            "`output` must be a new or empty directory (got ",
            "which is not empty and not a whole run); choose another output",
        )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "run")
    assert chainlora("train", config).status == 0
    before = (tmp_path / "run" / "history.json").read_bytes()
    own = "stages/main/config.yaml"
    as_file = f"train {tmp_path}/run/{own}"
    assert chainlora("train", tmp_path / "run").out.startswith("nothing left to do")
    assert chainlora(as_file).out.startswith("nothing left to do")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "a copy")  # it would resume the other one
    chainlora("train", f"{copy}/{own}").refused(f"; add --output '{copy}'")
    chainlora(f"train {config} --train.seed 1").refused(
        f"a run that has ended keeps its config (got train.seed is 1, was 0 in {tmp_path}/run); "
        f"choose another output, or add a stage to it: chainlora extend {tmp_path}/run FILE"
    )
    assert (tmp_path / "run" / "history.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    beyond = f"train {config} --model no/body --output {tmp_path}"  # looked at before the model
    chainlora(f"{beyond}/file").refused("at or below the file ")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    chainlora(f"{beyond}/link").refused("broken symbolic link")
    chainlora(f"{beyond}/{'x' * 300}").refused("File name too long for ", "choose a shorter name")
    for words in ("--output {0}/stages/z", "--output {0}/z --dry-run"):
        inside = chainlora(f"train {config} {words.format(tmp_path / 'run')}")
        inside.refused("`output` must lie outside other runs", f"inside {tmp_path}/run); choose")
    assert (tmp_path / "run" / "history.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["main"]


def test_an_ended_run_is_known_by_content_wherever_things_lie(
    chainlora, config, tiny_folder, sentiment, tmp_path, monkeypatch
):
    """Its data may also grow, or be gone, at their place."""
    here = tmp_path / "here"
    shutil.copytree(tiny_folder, here / "base")
    shutil.copytree(sentiment, here / "rows")
    monkeypatch.chdir(here)
    data = {"task": "rows/task.yaml", "train": "rows/train.jsonl"}
    data["validation"] = "rows/validation.jsonl"

    def again(model: str = "base", output: object = "../run", **names: object) -> Outcome:
        keys = [f"--data.{key} {value}" for key, value in (data | names).items()]
        return chainlora(f"train {config} --model {model} --output {output} {' '.join(keys)}")

    assert "next:" in again().out
    before = (tmp_path / "run" / "history.json").read_bytes()
    shutil.copy("rows/train.jsonl", "may.jsonl")
    shutil.copy("rows/task.yaml", "mine.yaml")
    shutil.copytree("base", "moved")
    for names in (
        {"train": here / "rows/train.jsonl"},
        {"train": "may.jsonl", "task": here / "mine.yaml"},
        {"train": "[may.jsonl]"},
    ):
        assert "nothing left" in again(**names).out
    assert "nothing left" in again(f"{here}/moved").out
    with open("may.jsonl", "a") as file:
        file.write('{"text": "one more", "label": 0}\n')
    shutil.copy("may.jsonl", "rows/train.jsonl")
    assert "nothing left" in again().out
    again(train="may.jsonl").refused("data.train is may.jsonl, was rows/train.jsonl, compared by")
    (here / "mine.yaml").write_text((here / "mine.yaml").read_text().replace("it was", "it is"))
    again(task="mine.yaml").refused("data.task is mine.yaml, was rows/task.yaml, compared by con")
    again(validation=8).refused("data.validation is 8, was rows/validation")
    shutil.rmtree("rows")
    assert "nothing left" in again().out
    assert "nothing left" in again(train=here / "rows/train.jsonl").out
    shutil.rmtree(here / "base")
    assert "nothing left" in again().out
    monkeypatch.chdir(tmp_path)
    assert "nothing left" in again(output="run").out
    tiny_model("llama", vocab_size=131, seed=9).save_pretrained(here / "base")
    again("here/base", "run").refused("the base model must be the one")
    monkeypatch.chdir(here)
    again().refused("the base model must be the one")
    assert (tmp_path / "run" / "history.json").read_bytes() == before


def test_a_resume_has_the_keys_it_began_with(chainlora, config):
    stop_after(load_config(config), 6)
    chainlora(f"train {config} --train.seed 1").refused("resumes with the config", "1, was 0")
    chainlora(f"train {config} --train.lr 1e-3").refused("train.lr is 0.001, was 0.01 in ")
    assert chainlora(f"train {config} --json").json["steps"] == 11


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_what_the_system_refuses_is_one_line(chainlora, config, monkeypatch, error):
    def fail(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    rule = f"chainlora: error: a file must be written (got {os.strerror(error)}"
    assert chainlora("train", config).refused("; ").startswith(rule)


def test_a_run_of_an_earlier_version_is_named_as_one(chainlora, tmp_path):
    (tmp_path / "old/links/000").mkdir(parents=True)
    (tmp_path / "old/chain.json").write_text('{"format": 2}')
    config = {"model": "m", "data": {"train": "x.jsonl"}, "chain": {"ranks": [2], "steps": [1]}}
    (tmp_path / "a.yaml").write_text(json.dumps(config | {"output": "old"}))
    for words in ("eval old", "inspect old", "log old", "train a.yaml"):
        chainlora(words).refused("Cannot read the run ", "version 0.2 or a development version")

"""What commands refuse: in a line that says why, before any work, and leaving all as it was."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model, write_rows
from helpers import settings, stop_after
from helpers_cli import Outcome
from helpers_data import rows_of
from helpers_export import save_lora

from chainlora import load_config
from chainlora.files import checksums


@pytest.fixture(scope="module")
def place(finished, tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A folder with a run, its base, a config, an adapter, rows, and what is none of these."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(finished, folder / "run")
    shutil.copytree(tiny_folder, folder / "base")
    shutil.copytree(tiny_folder, folder / "untold")
    (folder / "untold/chat_template.jinja").unlink()
    shutil.copytree(sentiment, folder / "rows")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(tiny_folder, sentiment, "new")))
    save_lora(folder / "x", tiny_folder)
    rows_of(folder / "ok.jsonl", 0)
    shutil.copytree(finished, folder / "half")  # what is left has the names of a run that begins
    for path in (folder / "half").glob("*.*"):
        path.unlink()
    for number in range(9):  # more than are named
        write_rows(folder / f"many/{number}/history.json", [])
    old = {"model": "m", "data": {"train": "x.jsonl"}, "chain": {"ranks": [2], "steps": [1]}}
    for name, text in {
        "empty.jsonl": "",
        "cut.jsonl": '{"text": "go',
        "other.jsonl": '{"a": 1}\n',
        "wrong/validation.jsonl": '{"text": "good", "label": "goood"}\n',
        "wrong.jsonl": '{"question": "?"}\n',
        "used/notes.txt": "mine",
        "file": "mine",
        "empty.txt": "\n",
        "tool.json": '[{"type": "function", "function": {"name": "count", "parameters": {}}}]',
        "one.json": '{"type": "function"}',
        "broken.json": "[{]",
        "old/chain.json": '{"format": 2}',
        "old/links/000/adapter_config.json": "{}",
        "old.yaml": json.dumps(old | {"output": "old"}),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


LONG = "red birds fly " * 99
NO_MODEL = "train config.yaml --model nowhere/at/all"  # rows are looked at before
# Each command with words that must occur; test_config.py has what a config alone can tell.
REFUSED = {
    "train config.yaml --output null": ("`output` must name", "add it to the config"),
    "train config.yaml --data.train no/such.jsonl": ("must be a file, a folder", "relative to /"),
    "train config.yaml --data.task no.yaml": ("task file must be readable", "got no.yaml"),
    "train config.yaml --data.max_length 200": ("context of 128 tokens", "(got 200); lower"),
    "train config.yaml --data.max_length 5": ("raise data.max_length", "data.truncation"),
    "train config.yaml --model nowhere/at/all": ("`model` must be", ".gguf file"),
    "train config.yaml --model no/body": ("an accessible Hub id", "'no/body'"),
    "train config.yaml --chain.target_modules [query]": ("candidates:", "gate_proj, k_proj"),
    "train config.yaml --chain.target_modules [q_proj,vproj]": ("`target_modules`", "(got 'vpro"),
    "train config.yaml --chain.lora_bias true": ("`lora_bias` needs", "with a bias (got "),
    "train config.yaml --train.select_metric f1": ("`select_metric` must be one of", "(got "),
    "train config.yaml --train.trackers [notebook]": ("`trackers` must name", "notebook"),
    "train config.yaml --dry-run --data.max_length 200": ("context of 128 tokens",),
    "train config.yaml --dry-run --chain.target_modules [query]": ("candidates:",),
    f"{NO_MODEL} --data.task rt": ("a task must be a .yaml file",),
    f"{NO_MODEL} --data.train null --data.validation null": ("must name a `train` file",),
    f"{NO_MODEL} --data.validation empty.jsonl": ("at least one row",),
    f"{NO_MODEL} --data.train cut.jsonl": ("data must be JSON",),
    f"{NO_MODEL} --data.task null --data.train other.jsonl": ("the fields of a format",),
    f"{NO_MODEL} --data.task null --data.format text --data.train other.jsonl": ("a Hub id",),
    "train config.yaml --output used": ("new or empty directory", "not a whole run"),
    "train config.yaml --output run --train.seed 1": (
        "keeps the config it began with",
        "train.seed is 1, was 0",
    ),
    "train config.yaml --resume --output half": ("(got ",),
    "train run/stages/main/config.yaml": ("; add --output",),  # its output is another run
    "train config.yaml --model no/body --output file": ("new or empty directory", "file, a file"),
    f"train config.yaml --model no/body --output {'x' * 300}": ("too long", "a shorter name"),
    "train config.yaml --output run/stages/z": ("must lie outside other runs", "inside "),
    "train old.yaml": ("Cannot read the run", "version 0.2"),
    "generate runs/none --prompt hi": ("a run or model must be there", "runs/none/history.json"),
    "eval runs/none@facts --task rows/task.yaml --data rows": (
        "a run or model must be",
        "no runs/none/history.json",
    ),
    "add out no/such/run --rows no.jsonl": ("a run or adapter must be there", "(got no/such/run:"),
    "generate pip:no-such-package --prompt a": ("the package that holds the model must be",),
    "inspect none": ("RUN must be a run directory", "which does not exist"),
    "inspect rnu": ("which does not exist", "here one of run"),  # a typing error
    "inspect many/none": ("one of many/0", "many/7, …"),
    "inspect rows": ("RUN must be a run directory", "no history.json"),
    "inspect half": ("must hold history.json", "is incomplete"),
    "diff run none": ("none",),
    "export run --output o --to adapter --rank 0": ("`rank` must be 1 to", "got 0"),
    "export run --output o --to adapter --tolerance 0": ("between 0 and 1", "got 0.0"),
    "export run --output o --to adapter --tolerance nan": ("between 0 and 1", "got nan"),
    "export run --output o --to adapter --rank 2 --tolerance 0.1": ("`rank` or a", "got both"),
    "export run --output o --to adapter --links 4": ("links must be 0 to 3", "got 4"),
    "export run --output o --to adapter --links 0": ("at least one link", "chain of none"),
    "export run --to adapter --output o --push-to-hub chain": ("must be OWNER/NAME", "'chain'"),
    "export run --to adapter --output o --push-to-hub me/x": ("others can load", "--base-name"),
    "push run copies/mine": ("must reach the Hub", "./copies/mine"),
    "push run used": ("must be a new or empty directory",),
    "push run run/sub": ("must lie outside other runs",),
    "pull me/nothing out": ("a run or repository must be there",),
    "report run --output run/history.json": ("must lie outside other runs",),
    "eval run --predictions run/history.json": ("must lie outside other runs",),
    "eval run --predictions file/p.jsonl": ("at or below the file",),
    "export run --to merged --output run/exp": ("must lie outside other runs",),
    "export run --to merged --output used": ("`output` must be a new or empty directory",),
    "export run --to adapter --output run": ("`output` must be a new or empty directory",),
    "export run@nope --to merged --output o": ("a stage must be one of main",),
    "report run@nope": ("a stage must be one of main",),
    "export run --to adapter --output .": ("must not be the current folder", "from above"),
    "verify base": ("a file must be read", "lineage.json"),
    "redo run": ("Nothing to redo",),
    "undo run --to mian": ("must be one of main", "chainlora log run"),
    "eval run --task rows/task.yaml": ("needs rows", "name a file or folder"),
    "eval run --task rows/task.yaml --data none": ("must be a file, a folder",),
    "eval run --task rows/task.yaml --data rows --split tset": ("must hold the split 'tset'",),
    "eval run --task rows/task.yaml --data wrong": ("goood", "validation.jsonl line 1"),
    "eval run --split test": ("got no data.test", "--matrix"),
    "eval run --split tset": ("must be one of train, validation, test",),
    "eval no/model --data none.jsonl": ("none.jsonl",),  # looked for first
    "eval base --task sst2 --links 1": ("--links needs a run directory",),
    "eval run --matrix --start-rows none.jsonl": ("none.jsonl",),
    "report run --output x.html --prompts empty.txt": ("must not be empty", "a prompt per line"),
    "report run --output x.html --prompts wrong.jsonl": ("`prompt` of each row", "wrong.jsonl"),
    "report run --output x.html --prompts latin.txt": ("must be UTF-8", "latin.txt"),
    "chat untold --prompt a": ("must have a chat template", "`chainlora generate`"),
    "chat base --prompt a --tools tool.json": ("must show `tools`", "leave --tools"),
    "chat base --prompt a --tools one.json": ("a list of JSON schemas", "one.json"),
    "chat base --prompt a --tools broken.json": ("must be JSON", "broken.json line 1 column 3"),
    f"generate base --prompt '{LONG}'": ("leave room in the context of 128 tokens",),
    "generate base --prompt ''": ("must have tokens", "got an empty one"),
    "generate run --prompt a --links 9": ("links must be 0 to 3",),
    "add run x": ("a combination reads rows", "some of the adapter's"),
    "add run x --rows none.jsonl": ("none.jsonl",),
    "add run x --rows empty.jsonl": ("empty.jsonl",),
    "add run x --rows ok.jsonl --data.max_length 4 --data.truncation drop": ("x",),
    "add run x --rows ok.jsonl --name main": ("a name of its own", "got 'main'"),
    "add run x --rows ok.jsonl --name base": ("a stage must have a `name`",),
    "add run x --rows ok.jsonl --model other": ("`model` must equal the value in the run",),
    "add run x --rows ok.jsonl --train.dtype bfloat16": ("`train.dtype` must equal",),
    "add run x --rows ok.jsonl --train.lr 1": ("as it was trained", "got `train.lr`"),
    "add run x --rows ok.jsonl --data.replay 0.5": ("(got `data.replay`)",),
    "add run x --rows ok.jsonl --data.nonsense 1": ("nonsense",),
    "add new x --rows ok.jsonl --data.train ok.jsonl": ("rows are given once",),
    "add new x --rows cut.jsonl": ("cut.jsonl",),  # before the base writes
    "train ok.jsonl": ("add --model NAME",),
    "train ok.jsonl --model m --name 1": ("must have a `name`",),
    "train none.csv --model m": ("none.csv",),
    "extend run ok.jsonl --data.train ok.jsonl": ("given once", "leave one out"),
}
# Wrong usage: status 2.
MISUSED = {
    "trian": "No such command 'trian'; did you mean `chainlora train`?",
    "train": "Missing argument 'CONFIG', a YAML file",
    # what people who come from other tools type
    "train --config c.yaml": "write the file without --config: c.yaml",
    "train c.yaml --bf16": "--bf16 needs a value; here it is `train.dtype`",
    "train c.yaml d.yaml": "unexpected argument 'd.yaml'; config keys are set with --key.sub VALUE",
    "train c.yaml --chain.ranks 8 8": "unexpected argument '8'",
    "train c.yaml d --train.lr 1 --train.lr 2": "--train.lr given twice; using the last value",
    "train c.yaml --train.lr": "--train.lr needs a value",
    "eval no/run": "'--data': no/run does not exist, and only a run has its own rows",
    "eval run --task rte --limit 0": "0 is not in the range x>=1",
    "eval run --matrix --split test": "leave --split out",
    "eval run --data ok.jsonl --split test": "--data is a file; leave it out",
    "inspect": "Missing argument 'RUN'",
    "inspect run --jsn": "No such option",
    "export run --to adaptor --output x": "'adaptor' is not one of 'merged', 'adapter', 'gguf'",
    "export run --to adapter": "Missing option '--output'",
    "export run --output x": "Missing option '--to'",
    # what development versions had
    "mix run a=0": "No such command 'mix'; use chainlora combine RUN with the names of the stages",
    "eval run --stages a": "No such option --stages; use RUN@STAGE, or chainlora combine RUN with",
    "export run --to adapter --output x --each": "--each; use chainlora export RUN@STAGE for each",
    "eval base": "is not a run, and only a run has its own rows",
    "add run x --rows ok.jsonl --max-forgetting -1": "is not in the range",
    "eval run --start-rows ok.jsonl": "use it with --matrix",
    "eval run --matrix --start-rows ok.jsonl --links 1": "leave --links out",
    "eval run --matrix --links 1": "scores the kept rows in all states; leave --links out",
    "eval run@main --matrix --start-rows ok.jsonl": "leave @main out",
    "export run --output o --to merged --rank 4": "use them with --to adapter",
    "export run --output o --to adapter --private": "use it with --push-to-hub",
    "export run --output o --to adapter --gguf-type q8_0": "--gguf-type is for GGUF files",
    "generate base --prompt a --seed 100000000000000000000": "is not in the range",
    "generate base --prompt a --top-p 0.5": "--top-p needs --temperature above 0",
    "log run@main": "must be a whole run, not run@main",
}


@pytest.mark.parametrize("words", [*REFUSED, *MISUSED])
def test_what_is_refused_changes_nothing(place, chainlora, monkeypatch, words):
    monkeypatch.chdir(place)
    before = files_of(place)
    found = chainlora(*shlex.split(words))
    if words in REFUSED:
        found.refused(*REFUSED[words])
    else:
        found.misused(MISUSED[words])
    assert files_of(place) == before


def files_of(folder: Path) -> dict[str, str]:
    return {name: found for name, found in checksums(folder).items() if ".lock" not in name}


def test_a_dry_run_writes_nothing(chainlora, config, tmp_path):
    dry = f"train {config} --dry-run"
    assert chainlora(f"{dry} --resume").status == chainlora(dry).status == 0
    assert chainlora(f"{dry} --output {tmp_path}/new/run").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


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
    chainlora(f"train {config} --train.seed 1").refused(
        "keeps the config it began with", "1, was 0"
    )
    chainlora(f"train {config} --train.lr 1e-3").refused("train.lr is 0.001, was 0.01 in ")
    assert chainlora(f"train {config} --json").json["steps"] == 11


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_what_the_system_refuses_is_one_line(chainlora, config, monkeypatch, error):
    def fail(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    rule = f"chainlora: error: a file must be written (got {os.strerror(error)}"
    assert chainlora("train", config).refused("; ").startswith(rule)

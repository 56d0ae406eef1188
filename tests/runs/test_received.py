"""A run or an adapter from somebody else reads no file of the receiver but those of its digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_rows
from helpers import entry_of, history_of, settings, sign, signed, stop_after, train_all
from helpers_data import rows_of
from helpers_export import save_lora
from helpers_tasks import write_task
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from chainlora import add
from chainlora.config.reading import make_config
from chainlora.config.staging import make_stages
from chainlora.errors import ChainLoRAError
from chainlora.files import checksums, sha256
from chainlora.runs.declaring import write_plan
from chainlora.runs.entries import rows_file
from chainlora.runs.history_file import read_history
from chainlora.runs.loading_start import NOTHING
from chainlora.training.plan import make_plan
from chainlora.training.reconcile import with_base
from chainlora.training.stages import base_of


@pytest.fixture
def declared(tiny_folder, sentiment, tmp_path) -> Path:
    """A run of a plan alone: neither its general rows nor its stage is computed."""
    general = rows_of(tmp_path / "general.jsonl", 0)
    config = settings(tiny_folder, sentiment, tmp_path / "run") | {"start_data": {"train": general}}
    change = make_plan(make_stages(config))
    write_plan(change.run, with_base(change, base_of(change.stages[0].stage.config)), NOTHING)
    return tmp_path / "run"


@pytest.fixture
def secret(tmp_path) -> Path:
    return write_rows(tmp_path / "secret.jsonl", [{"prompt": "two red", "completion": " birds"}])


def of_template(tree: dict[str, Any], folder: Path) -> None:
    (folder / "secret").write_text("{{ messages }} two red birds")
    (stage,) = tree["stages"].values()
    stage["config"]["data"]["chat_template"] = str(folder / "secret")


def of_rows(tree: dict[str, Any], folder: Path) -> None:
    tree["general"]["start_data"]["train"] = str(folder / "secret.jsonl")


def of_validation(tree: dict[str, Any], folder: Path) -> None:
    secret = str(folder / "secret.jsonl")
    tree["general"]["start_data"] |= {"train": None, "validation": secret}


def of_task(tree: dict[str, Any], folder: Path) -> None:
    tree["general"]["start_data"] |= {"task": str(write_task(folder, prompt="two red birds"))}


@pytest.mark.parametrize("edit", [of_template, of_rows, of_validation, of_task])
def test_its_start_reads_no_other_file(declared, secret, chainlora, edit):
    sign(declared, lambda tree: edit(tree, secret.parent))
    before = history_of(declared)
    chainlora("train", declared).refused()
    assert history_of(declared) == before
    assert not any((declared / folder).exists() for folder in ("rows", "links", "tokenizer"))


def test_general_rows_that_changed_after_a_kill_are_not_kept(declared, chainlora):
    general = declared.parent / "general.jsonl"
    rows = general.read_text()
    general.write_text(rows.replace("say", "tell"))
    chainlora("train", declared).refused("Cannot build start: its files must not change")
    assert not (declared / "rows").exists()
    general.write_text(rows)
    assert chainlora("train", declared).status == 0
    assert read_history(declared).find("main") is not None


def test_a_stage_in_training_reads_no_other_file(
    tiny_folder, sentiment, tmp_path, secret, chainlora
):
    config = settings(tiny_folder, sentiment, tmp_path / "run", train={"save_every": 1})
    stop_after(make_config(config), 2)
    folder = tmp_path / "run/stages/main"
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["data"] |= {"task": None, "train": str(secret), "validation": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    draft = json.loads((folder / "stage.json").read_text())
    del draft["checksum"]
    draft["training"].update(rows=None, sources={})
    draft["files"]["config.yaml"] = sha256(folder / "config.yaml")
    (folder / "stage.json").write_text(signed(draft))
    before = checksums(tmp_path / "run/rows")
    said = chainlora("train", tmp_path / "run")
    assert (said.status, "resumes with the rows it began with" in said.err) == (1, True)
    assert checksums(tmp_path / "run/rows") == before


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "adapter_model.safetensors"])
def test_an_adapter_with_a_link_out_of_its_folder_is_refused(tiny_folder, tmp_path, name):
    save_lora(tmp_path / "x", tiny_folder)
    (tmp_path / "secret").write_text("two red birds")
    (tmp_path / "x" / name).unlink(missing_ok=True)
    (tmp_path / "x" / name).symlink_to(tmp_path / "secret")
    rows = rows_of(tmp_path / "x.jsonl", 0)
    with pytest.raises(ChainLoRAError, match=f"must lie in its folder .*{name}"):
        add(tmp_path / "run", tmp_path / "x", rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("token", [-1, 10**6])
def test_kept_rows_with_other_tokens_are_refused(tiny_folder, tmp_path, chainlora, token):
    run, rows = tmp_path / "run", rows_of(tmp_path / "z.jsonl", 0)
    stage = {"name": "z", "data": {"train": rows}, "chain": {"ranks": [2], "steps": [1]}}
    tree = {"model": str(tiny_folder), "stages": [stage], "start_data": {"train": rows}}
    train_all(tree | {"output": str(run)})
    old = run / rows_file(entry_of(run, "z")["kept"])
    with safe_open(old, "np") as file:
        facts = file.metadata()
    tensors = load_file(old)
    tensors["train.tokens"][-1] = token
    save_file(tensors, tmp_path / "rows", facts)
    new = sha256(tmp_path / "rows")
    (tmp_path / "rows").rename(run / rows_file(new))
    sign(run, lambda tree: next(e for e in tree["entries"] if e["key"] == "z").update(kept=new))
    for command in (f"combine {run}", f"eval {run} --matrix", f"diff {run}@z {run}@base"):
        said = chainlora(command)
        assert (said.status, "error: kept rows must" in said.err) == (1, True), command

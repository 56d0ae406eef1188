"""Exports score what their runs score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_tiny_folder, write_rows
from helpers import settings
from helpers_data import pair_files, rows_of
from helpers_export import save_lora

from chainlora import evaluate_task, export_adapter, export_merged, train
from chainlora.errors import ConfigError
from chainlora.runs.exported import exporter_to

TARGETS = {"adapter": "", "merged": "", "gguf": "/model.gguf"}


@pytest.fixture(scope="module")
def made(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run in bfloat16 on chats of at most 24 tokens, one on a task, and exports of both."""
    folder = tmp_path_factory.mktemp("exports")
    base = shutil.copytree(tiny_folder, folder / "base")
    chat = {"user": "the cat sat on a mat and saw two red birds", "assistant": "good yes no"}
    messages = [{"role": role, "content": text} for role, text in chat.items()]
    rows = [{"messages": messages}] * 4 + [{"messages": messages * 2}] * 4
    write_rows(folder / "chat.jsonl", rows)
    whole = settings(base, sentiment, folder / "task")
    data = {"train": str(folder / "chat.jsonl"), "max_length": 24, "truncation": "left"}
    chain = {"ranks": [4], "steps": [4], "target_modules": "all-linear"}
    own = {"model": str(base), "data": data, "chain": chain, "start_data": "none"}
    train(whole | {"chain": chain}, progress=False)
    keys = {"lr": 3e-2, "batch_size": 4, "dtype": "bfloat16"}
    train(own | {"train": keys, "output": str(folder / "chat")}, progress=False)
    pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    for run in ("task", "chat"):
        for to in TARGETS:
            exporter_to(to)(folder / run, folder / f"{run}-{to}")
    return folder


@pytest.mark.parametrize("run", ["task", "chat"])
@pytest.mark.parametrize("to", TARGETS)
def test_an_export_scores_what_its_run_scores(run, to, made, sentiment, monkeypatch):
    """An adapter was no model, and rows were cut otherwise than in the run."""
    place, rows = made / f"{run}-{to}", made / "chat.jsonl"
    keys = {"data": rows}
    if run == "task":
        monkeypatch.chdir(sentiment)  # the lineage of an export names files by their last part
        keys = {"data": sentiment / "validation.jsonl"}
    wanted = evaluate_task(made / run, **keys)
    found = evaluate_task(f"{place}{TARGETS[to]}", **keys)
    assert found["rows"] == wanted["rows"]
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=5e-3 if run == "chat" else 1e-4)
    if run == "chat":
        plain = evaluate_task(made / run, **keys, num_links=0)["metrics"]["loss"]
        assert abs(plain - wanted["metrics"]["loss"]) > 0.04 * plain


def test_an_adapter_needs_its_base(made, tmp_path, chainlora, monkeypatch):
    place = shutil.copytree(made / "chat-adapter", tmp_path / "adapter")
    words = ("eval", place, "--data", made / "chat.jsonl")
    chainlora(*words).refused("the base of an adapter must be at hand (got base in")
    monkeypatch.setenv("CHAINLORA_MODELS", str(made))
    assert chainlora(*words).status == 0
    make_tiny_folder(tmp_path / "base", num_hidden_layers=1)
    chainlora(*words).refused("the base model must be the one", "another config.json")
    shutil.rmtree(tmp_path / "base")
    monkeypatch.delenv("CHAINLORA_MODELS")
    said = chainlora("generate", made / "chat-adapter", "--prompt", "the cat")
    assert said.status == 0, said.err  # the base lies in a folder above the export


def test_other_adapters_and_what_has_no_scores(made, tiny_folder, sentiment, tmp_path, chainlora):
    rows = rows_of(tmp_path / "rows.jsonl", 0)
    adapter = save_lora(tmp_path / "lora", tiny_folder)
    plain, own = (evaluate_task(each, data=rows)["metrics"] for each in (tiny_folder, adapter))
    assert plain["loss"] != own["loss"]
    with pytest.raises(ConfigError, match="only a run has rows of its own to score"):
        evaluate_task(made / "chat-adapter")
    tree = settings(tiny_folder, sentiment, tmp_path / "pairs", chain={"ranks": [2], "steps": [1]})
    tree["data"] = pair_files(tmp_path)
    train(tree | {"train": {"loss": "dpo", "lr": 1e-3}}, progress=False)
    export_merged(tmp_path / "pairs", tmp_path / "out")
    words = ("eval", tmp_path / "out", "--data", tree["data"]["train"])
    chainlora(*words).refused(
        "pairs need the model before their stage as a reference", "score the run"
    )
    export_adapter(made / "task", tmp_path / "task")
    words = ("eval", tmp_path / "task", "--data", sentiment / "validation.jsonl")
    chainlora(*words).refused("task.yaml", "--task")
    assert json.loads((tmp_path / "task/lineage.json").read_text())["to"] == "adapter"

"""The tutorials run as they stand, on tiny models in the places that they name."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from heads.models import new_model, rows_of_text
from test_docs import HUB_ID, ROOT
from test_docs import blocks as blocks_of

from chainlora.cli.main import run

TUTORIALS = ROOT / "docs/tutorials"


def blocks(file: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return blocks_of(file.read_text(encoding="utf-8"), language)


def commands(name: str) -> list[list[str]]:
    """The arguments of every command of a tutorial, without where its output goes."""
    lines = [line for block in blocks(TUTORIALS / name, "console") for line in block.splitlines()]
    found = [shlex.split(line.removeprefix("$ ").partition(" > ")[0]) for line in lines]
    assert {words[0] for words in found} == {"chainlora"}
    return [words[1:] for words in found]


@pytest.fixture
def checkout(tiny_folder, tmp_path, monkeypatch) -> Path:
    """A folder as a reader has it, with a tiny model where the Hub id points."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / HUB_ID).parent.mkdir()
    (tmp_path / HUB_ID).symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_data(checkout, capsys):
    file = TUTORIALS / "own-data.md"
    (text,) = blocks(file, "yaml")
    (checkout / "run.yaml").write_text(text, encoding="utf-8")
    (row,) = blocks(file, "json")
    rows = (ROOT / "examples/dates/train.jsonl").read_text(encoding="utf-8")
    assert json.loads(row) in [json.loads(line) for line in rows.splitlines()]
    for words in commands("own-data.md"):
        assert run(words) == 0, capsys.readouterr().err
    config = json.loads((checkout / "out/own-adapter/adapter_config.json").read_text())
    assert config["r"] <= 16
    assert (checkout / "out/own-merged/model.safetensors").is_file()


def test_second_data_set(checkout, capsys):
    file = TUTORIALS / "second-data-set.md"
    for name, text in zip(("run.yaml", "times.yaml"), blocks(file, "yaml"), strict=True):
        (checkout / name).write_text(text, encoding="utf-8")
    said = ""
    for words in commands(file.name):
        assert run(words) == 0, capsys.readouterr().err
        said += capsys.readouterr().out
    plan, *_, again = blocks(file, "")  # without numbers, which are another model's
    assert set((plan + again).splitlines()) <= set(said.splitlines())
    for name, rank in {"both": 24, "half": 16}.items():
        config = json.loads((checkout / f"out/{name}/adapter_config.json").read_text())
        assert config["r"] == rank


def test_chat(checkout, monkeypatch, capsys):
    (row,) = blocks(TUTORIALS / "chat.md", "json")
    assert [turn["role"] for turn in json.loads(row)["messages"]] == ["user", "assistant"]
    # the tiny model's context is 128 tokens, its vocabulary bytes
    short = ["--data.max_length", "128", "--data.truncation", "left", "--chain.epochs", "[1, 1]"]
    for words in commands("chat.md"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is a link?\n")))
        extra = short if words[0] == "train" else ["--max-new-tokens", "8"]
        assert run([*words, *extra]) == 0, capsys.readouterr().err


def test_compare(checkout, capsys):
    pytest.importorskip("scipy", reason="needs chainlora[experiments]")
    (text,) = blocks(TUTORIALS / "compare.md", "yaml")
    (checkout / "run.yaml").write_text(text, encoding="utf-8")
    short = ["--seeds", "2", "--chain.steps", "[3]", "--backend", "inline"]
    for words in commands("compare.md"):
        assert run([*words, *short]) == 0, capsys.readouterr().err
    for folder in ("own-compare", "chains", "lion"):
        assert (checkout / "runs" / folder / "report.html").is_file()


def test_classification(tmp_path, capsys):
    name = "BertForSequenceClassification"
    encoder = tmp_path / "encoder"
    new_model(name).base_model.save_pretrained(encoder)
    batch = rows_of_text()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    names: dict[str, Any] = {
        "encoder": str(encoder),
        "output": str(tmp_path),
        "rows": rows,
        "batches": [batch] * 4,
    }
    with_trainer, loading, own_loop = blocks(TUTORIALS / "classification.md", "python")
    exec(with_trainer, names)
    exec(loading, names)
    with torch.no_grad():
        told, again = (names[key].eval()(**batch).logits for key in ("model", "loaded"))
    # one product is summed in another order, in float32 over two layers
    torch.testing.assert_close(again, told, atol=5e-5, rtol=0)
    exec(own_loop, names)
    assert not any("lora" in name for name, _ in names["plain"].named_parameters())
    assert [link.num_steps for link in names["chain"].links] == [4, 4]
    (words,) = commands("classification.md")
    assert run(words) == 0


def test_serving(checkout, capsys):
    lengths = ["--chain.steps", "[2, 2, 2]", "--chain.epochs", "null"]
    assert run(["train", "examples/dates.yaml", *lengths]) == 0, capsys.readouterr().err
    for words in commands("serving.md"):
        assert run(words) == 0, capsys.readouterr().err
    assert json.loads((checkout / "out/dates/adapter_config.json").read_text())["r"] == 32
    (block,) = blocks(TUTORIALS / "serving.md", "python")
    names: dict[str, Any] = {}
    exec(block, names)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():  # bfloat16 rounds the merged weight once, the adapter is added in float32
        merged, adapted = (names[key].float()(ids).logits for key in ("merged", "adapted"))
    torch.testing.assert_close(adapted, merged, atol=5e-2, rtol=0)


def test_the_method_in_code():
    (block,) = blocks(ROOT / "docs/method.md", "python")
    exec(block, {"__name__": "method"})

"""Tutorials, notebooks and docs/trainer.md run as they stand, on tiny models in the places that
they name."""

from __future__ import annotations

import io
import json
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_integrations import chain_of, collator, token_rows
from helpers_trl import conversations, preferences
from test_docs import PYTHON, README, ROOT, as_a_reader_has_it
from test_docs import blocks as blocks_of
from transformers import AutoTokenizer

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
def checkout(tiny_folder, tmp_path) -> Path:
    return as_a_reader_has_it(tmp_path, tiny_folder)


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
    for name, rank in {"both": 16, "times": 8}.items():
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
    texts = blocks(TUTORIALS / "compare.md", "yaml")
    for name, text in zip(("run.yaml", "stages.yaml"), texts, strict=True):
        (checkout / name).write_text(text, encoding="utf-8")
    short = ["--seeds", "1", "--chain.steps", "[3]", "--backend", "inline"]
    lengths = ["--chain.epochs", "null", "--start_data", "none"]
    for words in commands("compare.md"):
        more = lengths if "stages.yaml" in words else []
        assert run([*words, *short, *more]) == 0, capsys.readouterr().err
    for folder in ("own-compare", "chains", "sgd", "both-compare", "ewc"):
        assert (checkout / "runs" / folder / "report.html").is_file()


def test_serving(checkout, capsys):
    lengths = ["--chain.steps", "[6]", "--chain.epochs", "null"]
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
        with names["adapted"].disable_adapter():
            base = names["adapted"](ids).logits
    # 6e-4 was measured between these, 6e-2 to the base
    torch.testing.assert_close(adapted, merged, atol=5e-3, rtol=0)
    assert (base - merged).abs().max() > 1e-2


def test_the_method_in_code():
    runpy.run_path(str(ROOT / "examples/method.py"), run_name="method")


# --- notebooks ---


NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=4)


def cells_of_code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[list[tuple]]:
    """What the cells give, without its text: streams by name, values by how they are shown.

    Log lines (stderr) depend on the model; `make notebooks` leaves them out.
    """
    outputs = [
        [output for output in cell.outputs if output.get("name") != "stderr"]
        for cell in cells_of_code(notebook)
    ]
    return [[(o.get("name"), *sorted(o.get("data", ()))) for o in each] for each in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_runs_again(path, tiny_folder, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("CHAINLORA_MODEL", str(tiny_folder))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for name in ("dates", "shop", "times"):
        shutil.copytree(ROOT / "examples" / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    first, again = read(path), read(path)
    for notebook in (first, again):
        NotebookClient(notebook, resources=place, timeout=600, coalesce_streams=True).execute()
    assert kinds(first) == kinds(read(path))  # the outputs that are committed are of this code


# --- docs/trainer.md, and python.md's own loop ---


def test_the_loop_of_somebody_else_in_python_md_runs(tiny_folder, tmp_path, capsys):
    (block,) = [block for block in blocks_of(PYTHON, "python") if "count_step" in block]
    names: dict[str, Any] = {"folder": tiny_folder, "output": tmp_path}
    exec(block, names | {"batches": [torch.arange(3, 11)[None]] * 3})
    printed = capsys.readouterr().out
    assert "3 steps in the live link" in printed
    assert "'rank': 4" in printed


@pytest.mark.slow
def test_trainer_md_runs(tiny_folder, tmp_path):
    pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    names: dict[str, Any] = {
        "model": str(tiny_folder),
        "output": str(tmp_path),
        "conversations": list(conversations()["messages"]),
        "preferences": preferences().to_list(),
        "rows": token_rows(16),
        "collate": collator(AutoTokenizer.from_pretrained(tiny_folder)),
    }
    for block in blocks(ROOT / "docs/trainer.md", "python"):
        for config in ("SFTConfig(", "DPOConfig("):  # TRL's bfloat16 wants a GPU, or to be told
            block = block.replace(f"args={config}", f"args={config}use_cpu=True, ")
        exec(block, names)
    assert (tmp_path / "sft/final/adapter_model.safetensors").is_file()
    assert isinstance(names["loaded"], peft.PeftModel)
    chain = names["chain"]
    assert ([link.num_steps for link in chain.links], chain.live_steps) == ([2], 2)
    assert type(names["plain"]).__name__ == "LlamaForCausalLM"
    assert names["trainer"].state.global_step == 6


def test_the_one_line_in_the_readme_runs(tiny_folder, tmp_path):
    from datasets import Dataset

    trl = pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, max_length=64, use_cpu=True, report_to=[]
    )
    rows = [{"text": f"the {word} sat on a mat"} for word in ["cat", "hill", "birds"] * 16]
    names: dict[str, Any] = {
        "SFTTrainer": partial(trl.SFTTrainer, args=args),
        "LoraConfig": peft.LoraConfig,
        "model": str(tiny_folder),
        "dataset": Dataset.from_list(rows),
    }
    exec(blocks_of(README, "python")[1], names)
    names["trainer"].train()
    chain = chain_of(names["trainer"])
    assert [(link.config.rank, link.num_steps) for link in chain.links] == [(8, 2), (8, 2), (4, 2)]

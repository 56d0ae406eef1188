"""What the documents say is so: their code runs as it stands, their tables are those of the
package. Their links: `site/build.py` (test_site.py)."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import write_rows
from helpers import settings
from transformers import AutoModelForCausalLM

import chainlora
from chainlora import load_config
from chainlora.cli.main import run
from chainlora.config.reading import parse_yaml
from chainlora.files import checksums
from chainlora.training.events import Event

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs/python.md").read_text(encoding="utf-8")
OURS = ("config", "python", "trainer", "layout", "run-directory", "evidence", "optimizers", "scale")


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [body for name, body in FENCED.findall(text) if name == language]


def arguments(line: str) -> list[str]:
    """The words of a shell command, with bash's $'…' read and comments left out."""
    quoted = re.sub(r"\$'([^']*)'", lambda m: shlex.quote(m[1].replace("\\n", "\n")), line)
    return shlex.split(quoted, comments=True)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def as_a_reader_has_it(folder: Path, tiny_folder: Path) -> Path:
    """Fill a folder with the examples, and a tiny model that lies where the Hub id points."""
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / HUB_ID).parent.mkdir()
    (folder / HUB_ID).symlink_to(tiny_folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tiny_folder, tmp_path_factory) -> Path:
    return as_a_reader_has_it(tmp_path_factory.mktemp("checkout"), tiny_folder)


def test_the_readme_is_short_and_its_python_is_an_example():
    python = blocks(README, "python")[0]
    assert python == (ROOT / "examples/minimal.py").read_text(encoding="utf-8")
    assert len(python.splitlines()) <= 15
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 900


def test_the_examples_extend_by_the_command_of_the_readme():
    (line,) = re.findall(r"^\$ (chainlora extend .+?)(?: +#.*)?$", README, flags=re.MULTILINE)
    assert f"`{line}`" in " ".join((ROOT / "examples/README.md").read_text("utf-8").split())


def test_the_readme_python_runs_and_its_adapter_is_the_model(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    (checkout / "minimal.py").write_text(blocks(README, "python")[0], encoding="utf-8")
    names = runpy.run_path("minimal.py", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert "steps" in printed[0]
    assert "Date: 5 March 2021" in printed[1]
    assert "'rank': 8" in printed[-1]
    base = AutoModelForCausalLM.from_pretrained(HUB_ID)
    adapted = peft.PeftModel.from_pretrained(base, "runs/minimal-adapter")
    with torch.no_grad():  # float32: the same sums in another order
        torch.testing.assert_close(
            adapted(names["ids"]).logits, names["model"](names["ids"]).logits, atol=1e-5, rtol=0
        )


def test_the_listener_in_python_md_runs(tiny_folder, sentiment, capsys):
    (block,) = [block for block in blocks(PYTHON, "python") if "listener" in block]
    exec(block, {"settings": settings(tiny_folder, sentiment)})
    printed = capsys.readouterr().out.splitlines()
    assert sum("tied after step" in line for line in printed) == 3
    assert "accuracy" in printed[-1]


def test_python_md_has_every_event():
    kinds = {kind.__name__: kind.name for kind in Event.__subclasses__()}
    described = re.findall(r"^- `(\w+)` \(`(\w+)`\)", PYTHON, flags=re.MULTILINE)
    assert dict(described) == kinds


def test_the_readme_commands_run_in_order(checkout, monkeypatch, capsys):
    """And print what is shown, but for answers, which are another model's."""
    monkeypatch.chdir(checkout)
    (session,) = blocks(README, "console")
    install, *lines = session.splitlines()
    assert install.startswith("$ pip install ")
    said: set[str] = set()
    for line in lines:
        if line.startswith("$ "):
            program, *words = arguments(line.removeprefix("$ "))
            assert program == "chainlora"
            assert run(words) == 0, f"{line}: {capsys.readouterr().err}"
            said = {*capsys.readouterr().out.splitlines()}
        elif "answered exactly" not in line:
            assert line in said


def test_run_directory_md_has_the_files_of_a_run(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    for words in (
        ["train", "examples/dates.yaml"],
        ["extend", "runs/dates", "examples/times/train.jsonl"],
        ["report", "runs/dates", "--prompts", "2"],
        ["export", "runs/dates", "--to", "adapter", "--output", "out/adapter"],
    ):
        assert run(words) == 0, capsys.readouterr().err
    page = (ROOT / "docs/run-directory.md").read_text(encoding="utf-8")
    (tree,) = [block for block in blocks(page, "") if block.startswith("runs/dates/\n")]
    run_names, stage_names = (
        set(re.findall(rf"^{' ' * depth}([\w.]+)", tree, flags=re.MULTILINE)) for depth in (2, 4)
    )
    assert run_names - names_in(checkout / "runs/dates") == {"chain.png", "tokenizer", ".lock.json"}
    assert names_in(checkout / "runs/dates") <= run_names
    passing = {"stage.json", "checkpoints", "moments", "best", "reference.safetensors"}
    for stage in ("main", "times"):
        found = names_in(checkout / "runs/dates/stages" / stage)
        assert found <= stage_names - passing
        assert stage_names - passing - found <= {"chainlora", "model"}  # of some


def test_a_finished_run_is_resumed_by_its_own_config(checkout, monkeypatch):
    """The command of docs/run-directory.md, after those of the test above."""
    monkeypatch.chdir(checkout)
    text = (ROOT / "docs/run-directory.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    chainlora (.*)$", text, flags=re.MULTILINE)
    if not (checkout / "runs/dates").exists():
        assert run(["train", "examples/dates.yaml"]) == 0
    before = checksums(checkout / "runs/dates/links")
    assert run(shlex.split(command, comments=True)) == 0
    assert checksums(checkout / "runs/dates/links") == before


def test_the_shortest_task_in_tasks_md_runs(tiny_folder, tmp_path):
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    (tmp_path / "headlines.yaml").write_text(blocks(text, "yaml")[0], encoding="utf-8")
    (row,) = re.findall(r'`(\{"headline": .*?\})` \(or `"label": 0`\)', text)
    (tmp_path / "headlines").mkdir()
    rows = [json.loads(row), json.loads(row) | {"label": 0}]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"headlines/{split}.jsonl", rows)
    (command,) = re.findall(r"^chainlora (eval MODEL .*)$", text, flags=re.MULTILINE)
    assert run(shlex.split(command.replace("MODEL", str(tiny_folder)))) == 0


def test_the_sweep_runs(checkout, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="no package optuna")
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "examples/dates.yaml", "2"])
    runpy.run_path("examples/sweep.py", run_name="__main__")
    assert "{'train.lr': 0.0" in capsys.readouterr().out
    configs = [load_config(f"runs/sweep/{trial}/stages/main/config.yaml") for trial in (0, 1)]
    assert configs[0].train.lr != configs[1].train.lr


def test_the_own_loop_runs(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", ["own_loop.py", HUB_ID])
    runpy.run_path("examples/own_loop.py", run_name="__main__")
    losses = [float(found) for found in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses[3] < losses[0]
    assert losses[4] == losses[2]  # the last link dropped


def test_python_md_has_every_public_name():
    rows = re.findall(r"^\| (`.*?`) \|", PYTHON, flags=re.MULTILINE)
    table = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert table | {"ChainLoRAError"} == set(chainlora.__all__)
    assert "`ChainLoRAError`" in PYTHON


def test_the_changelog_and_the_citation_know_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{chainlora.__version__}]" in text
    citation = parse_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == chainlora.__version__
    assert citation["license"] == "Apache-2.0"


def test_files_that_documents_name_exist():
    for document in (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in OURS)):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:examples|docs|tests|src)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
        for name in re.findall(r"`chainlora/([\w/]+)\.py`", text):
            assert importlib.import_module("chainlora." + name.replace("/", "."))

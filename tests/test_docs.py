"""What the documents say is so: their code runs as it stands, their tables are those of the
package."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from transformers import AutoModelForCausalLM

import chainlora
from chainlora.cli.main import cli, run
from chainlora.config import schema as config_module
from chainlora.config.loading import parse_yaml
from chainlora.experiments import expand, load_experiment

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = ("config.md", "python.md")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def block_with(text: str, start: str) -> str:
    """The one fenced block without a language that starts so."""
    (found,) = [block for block in blocks(text, "") if block.startswith(start)]
    return found


@pytest.fixture(scope="module")
def checkout(tiny_folder, tmp_path_factory) -> Path:
    """A folder as the README's reader has it: the examples, and a tiny model that lies where the
    Hub id points."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / HUB_ID).parent.mkdir()
    (folder / HUB_ID).symlink_to(tiny_folder)
    return folder


def test_the_readme_blocks_are_the_example_files_and_short():
    python, yaml = blocks(README, "python")[0], blocks(README, "yaml")[0]
    assert python == (ROOT / "examples/minimal.py").read_text(encoding="utf-8")
    assert yaml == (ROOT / "examples/dates.yaml").read_text(encoding="utf-8")
    assert len(python.splitlines()) <= 15
    assert len(yaml.splitlines()) <= 10


def test_the_readme_python_runs_and_its_adapter_is_the_model(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    (checkout / "minimal.py").write_text(blocks(README, "python")[0], encoding="utf-8")
    names = runpy.run_path("minimal.py", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert "steps" in printed[0]
    assert "Date: 5 March 2021" in printed[1]
    assert "'rank': 16" in printed[-1]
    base = AutoModelForCausalLM.from_pretrained(HUB_ID)
    adapted = peft.PeftModel.from_pretrained(base, "runs/minimal-adapter")
    with torch.no_grad():  # float32: the same sums in another order
        torch.testing.assert_close(
            adapted(names["ids"]).logits, names["model"](names["ids"]).logits, atol=1e-5, rtol=0
        )


def test_the_verbs_in_the_readme_run(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = model.lm_head.weight.clone()
    ids = torch.arange(3, 11)[None]

    def make_update(optimizer):
        def update(batch):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return update

    names = {name: getattr(chainlora, name) for name in chainlora.__all__}
    names |= {"torch": torch, "model": model, "batches": [ids, ids], "make_update": make_update}
    exec(blocks(README, "python")[1], names)
    assert [link.rank for link in names["chain"].links] == [8, 8]
    assert [link.num_steps for link in names["chain"].links] == [2, 2]
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert torch.equal(model.lm_head.weight, before)


def test_the_readme_commands_run_in_order(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    (session,) = blocks(README, "console")
    lines = [shlex.split(line[2:], comments=True) for line in session.splitlines()]
    for line in lines:
        assert line[0] == "chainlora"
        status = run(line[1:])
        assert status == 0, f"{line}: {capsys.readouterr().err}"
        if "--json" in line:
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["task"] == "dates"
    assert {line[1] for line in lines} | {"demo", "experiment", "compare"} == set(cli.commands)
    tree = block_with(README, "runs/dates/\n")
    promised = {name.strip("/") for name in re.findall(r"^  ([\w.]+)", tree, flags=re.MULTILINE)}
    found = {path.name for path in (checkout / "runs/dates").iterdir()}
    assert found <= promised
    assert promised - found <= {"best", "checkpoints"}  # there only in between, or between knots
    AutoModelForCausalLM.from_pretrained("out/merged")


def test_the_own_loop_runs(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "argv", ["own_loop.py", HUB_ID])
    runpy.run_path("examples/own_loop.py", run_name="__main__")
    losses = [float(found) for found in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses[3] < losses[0]
    assert losses[4] == losses[2]  # the last link dropped


def test_the_chat_example_runs(checkout, monkeypatch):
    # gradient checkpointing stays as the file has it; the tiny model's context is 128 tokens, its
    # vocabulary bytes
    monkeypatch.chdir(checkout)
    short = [
        "--data.max_length",
        "128",
        "--data.truncation",
        "left",
        "--chain.epochs",
        "[0.7, 0.4]",
    ]
    assert run(["train", "examples/chat.yaml", *short]) == 0


def sections() -> dict[str, type[BaseModel]]:
    fields = config_module.RunConfig.model_fields
    return {
        "": config_module.RunConfig,
        "chain.knots.": config_module.KnotConfig,
    } | {
        f"{name}.": field.annotation
        for name, field in fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def described_keys() -> dict[str, tuple[str, str]]:
    """Key → (default, meaning) as docs/config.md has it."""
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len({key for key, _, _ in rows}) == len(rows)
    return {key: (default, meaning) for key, default, meaning in rows}


def test_config_md_has_every_key_and_no_other():
    assert set(described_keys()) == {
        prefix + key for prefix, model in sections().items() for key in model.model_fields
    }


def test_config_md_has_every_default_and_choice():
    described = described_keys()
    for prefix, model in sections().items():
        for key, field in model.model_fields.items():
            default, meaning = described[prefix + key]
            if field.default is PydanticUndefined:
                assert default == "required", key
            elif isinstance(field.default, BaseModel):
                assert default == "see below", key
            else:
                assert parse_yaml(default.strip("`")) == plain(field.default), key
            missing = [
                choice for choice in choices(field.annotation) if f"`{choice}`" not in meaning
            ]
            assert missing == [], key


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def choices(annotation: Any) -> list[str]:
    """The strings of a Literal, inside a union or not."""
    found = []
    for argument in get_args(annotation):
        found += [argument] if isinstance(argument, str) else choices(argument)
    return found


def test_the_file_tree_is_the_tree():
    tree = block_with(README, "src/chainlora/\n")
    package = tree.split("\ntests/")[0]
    shown = re.findall(r"^  (\w+\.py|\w+/) +\S", package, flags=re.MULTILINE)
    source = ROOT / "src/chainlora"
    actual = [path.name for path in source.glob("*.py")]
    actual += [f"{path.parent.name}/" for path in source.glob("*/__init__.py")]
    assert sorted(shown) == sorted(actual)
    for top in re.findall(r"^(\w+/)", tree, flags=re.MULTILINE):
        assert (ROOT / top).is_dir()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_python_md_has_every_public_name():
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    table = {
        name
        for row in re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)", row)
    }
    assert table | {"ChainLoRAError"} == set(chainlora.__all__)
    assert "`ChainLoRAError`" in text


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6, 7, 8])
def test_a_decision_says_why_and_what_else(number):
    (file,) = (ROOT / "docs/decisions").glob(f"{number:04d}-*.md")
    text = file.read_text(encoding="utf-8")
    assert text.startswith(f"# {number}. ")
    assert re.findall(r"^## (\w+)", text, flags=re.MULTILINE) == [
        "Context",
        "Decision",
        "Consequences",
        "Rejected",
    ]


def test_the_numbers_of_the_first_decision():
    text = next((ROOT / "docs/decisions").glob("0001-*.md")).read_text(encoding="utf-8")
    (code,) = blocks(text, "python")
    printed: list[str] = []
    exec(
        code.replace("1024", "512"),
        {"print": lambda *values: printed.append(" ".join(map(str, values)))},
    )
    (row,) = re.findall(r"^\| share .*? \| (.*) \|$", text, flags=re.MULTILINE)
    said = [int(cell.strip(" %")) for cell in row.split("|")]
    found = [int(re.findall(r"(\d+)%", line)[0]) for line in printed]
    assert len(said) == len(found)
    # a quarter of the weights: the shares move by a percentage point or two
    assert all(abs(one - other) <= 2 for one, other in zip(said, found, strict=True))


PAPER = ROOT / "benchmarks/paper"


@pytest.mark.parametrize("file", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_measured_experiment_expands_without_data_or_model(file, monkeypatch, tmp_path):
    """Those of experiments/ are held to the same and more by test_experiments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHAINLORA_CACHE", str(tmp_path / "cache"))
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    cells = expand(experiment)
    assert {(cell.task, cell.method) for cell in cells} == set(
        itertools.product(experiment.tasks, experiment.methods)
    )
    for task in experiment.tasks:  # equal epochs or steps for all that train
        chains = [
            cell.config.chain for cell in cells if cell.task == task and cell.config.chain.ranks
        ]
        assert len({sum(chain.epochs or chain.steps) for chain in chains}) == 1
    assert list(tmp_path.iterdir()) == []
    assert f"| `{file.stem}` |" in (PAPER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "results", sorted(PAPER.glob("*/results.jsonl")), ids=lambda path: path.parent.name
)
def test_a_committed_report_is_what_its_results_give(results, tmp_path, capsys):
    copy = shutil.copy(results, tmp_path)
    assert run(["experiment", "report", copy]) == 0, capsys.readouterr().err
    assert (tmp_path / "report.md").read_bytes() == results.with_name("report.md").read_bytes()


def test_the_changelog_knows_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{chainlora.__version__}]" in text


def test_files_that_documents_name_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs" / name for name in OURS)):
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:examples|docs|tests|src)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
        for name in re.findall(r"`chainlora/(\w+)\.py`", text):
            assert importlib.import_module(f"chainlora.{name}")

"""What is in a run directory, and what is said of one that is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import as_format_2, assert_same_links, sign, stop_after
from safetensors.torch import load_file, save_file

from chainlora import export_adapter, inspect_run, load_run, train
from chainlora.errors import ChainLoRAError, RunError
from chainlora.runs.state import open_run

# --- what is there


def test_what_a_run_directory_holds(stored_run, tiny_folder):
    assert {p.name for p in stored_run.iterdir()} - {".lock"} == {
        "config.yaml",
        "chain.json",
        "links",
        "metrics.jsonl",
        "result.json",
        "rows",
    }
    manifest = json.loads((stored_run / "chain.json").read_text())
    assert manifest["format"] == 3
    assert manifest["base"]["model"] == str(tiny_folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(manifest["base"]["files"])
    assert [link["directory"] for link in manifest["links"]] == [f"links/{k:03d}" for k in range(3)]
    assert {"torch", "transformers", "peft", "chainlora", "python"} <= set(manifest["versions"])
    names = {"adapter_config.json", "adapter_model.safetensors"}
    links = {f"links/{k:03d}/{name}" for k in range(3) for name in names}
    assert set(manifest["files"]) == links | {"config.yaml", "result.json", "rows/main.safetensors"}
    for link in manifest["links"]:
        assert {p.name for p in (stored_run / link["directory"]).iterdir()} == names
        stored = json.loads((stored_run / link["directory"] / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == str(tiny_folder)
    resolved = yaml.safe_load((stored_run / "config.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.0  # what the file did not say is there


def test_the_manifest_names_all_that_a_resume_needs_and_nothing_else_stays(rich_config, tmp_path):
    stop_after(rich_config, 6)
    run = tmp_path / "run"
    named = set(json.loads((run / "chain.json").read_text())["files"])
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert found - named == {"chain.json", "metrics.jsonl", ".lock"}
    assert {path.partition("/")[0] for path in named} == {
        "config.yaml", "links", "rows", "moments", "best", "checkpoints",
    }  # fmt: skip
    train(rich_config, resume=True)
    assert not (run / "checkpoints").exists()
    assert [p.name for p in (run / "moments").iterdir()] == ["002.safetensors"]


# --- damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "chain.json").unlink(),
            r"must hold chain.json \(got none in .*\); is this the output of",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 3,'),
            r"chain.json must be JSON \(got .*\); the run directory is incomplete: copy it "
            r"whole, or start over",
        ),
        (
            lambda run: (run / "chain.json").write_text("[" * 100_000),
            r"chain.json must be JSON \(got ",
        ),
        (
            lambda run: (run / "chain.json").write_text("[]"),
            r"must be of format 2 or 3 \(got None in ",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 3}'),
            r"must be as the run wrote it \(got another checksum",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 9}'),
            r"must be of format 2 or 3 \(got 9 in .*\); use the version of chainlora that wrote",
        ),
        (
            lambda run: shutil.rmtree(run / "links" / "001"),
            r"must hold links/001/adapter_config.json \(got none in .*incomplete",
        ),
        (
            lambda run: (run / "links" / "001" / "adapter_model.safetensors").write_bytes(b"a" * 9),
            r"links/001/adapter_model.safetensors must be as the run wrote it \(got other bytes",
        ),
        (
            lambda run: swap(run / "links" / "000", run / "links" / "001"),
            r"links/000/adapter_(config.json|model.safetensors) must be as the run wrote it",
        ),
        (
            lambda run: edit(run / "chain.json", '"num_steps": 4', '"num_steps": 5'),
            r"chain.json must be as the run wrote it \(got another checksum",
        ),
        (
            lambda run: sign(run, files={}),
            r"must hold the checksums of links/000 \(got none in",
        ),
        (
            lambda run: sign(run, files={"../../secret": "0" * 64}),
            r"must agree with itself \(got a file outside, '../../secret'",
        ),
        (
            lambda run: sign(run, progress={"link": 7}),
            r"must agree with itself \(got 3 links and progress of 7 in",
        ),
    ],
    ids=[
        "gone", "torn", "deep", "list", "empty", "format", "no-link", "other-bytes", "swapped",
        "edited", "no-sums", "outside", "progress",
    ],
)  # fmt: skip
def test_damage_is_named(run_copy, damage, message):
    damage(run_copy)
    for act in (load_run, inspect_run):
        with pytest.raises(RunError, match=message) as raised:
            act(run_copy)
        assert "\n" not in str(raised.value)


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# What else a link's tensors cannot be is told of links in memory (test_chain_refusals.py).
TENSORS = {
    "none": (lambda t: {}, "got no factors"),
    "without A": (lambda t: {k: v for k, v in t.items() if k != A}, "without its"),
    "half of A": (lambda t: {**t, A: t[A][:2]}, "no pair of factors"),
    "not finite": (lambda t: {**t, A: t[A] * torch.nan}, "not finite"),
    "a flat A": (lambda t: {**t, A: t[A].flatten()}, "no pair of factors"),
}
TEXTS = {
    "index": ('"index": 1', '"index": 2', "out of order"),
    "id": ('"id": 1', '"id": 7', "out of order"),
    "next id": ('"next_id": 3', '"next_id": 2', "used again"),
    "directory": ('y": "links/001', 'y": "../links', "valid values"),
    "a key": ('"rslora"', '"rslore"', "config must be valid"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_no_such_link_has_are_refused_whatever_the_checksums(
    run_copy, tmp_path, damage
):
    harm, message = TENSORS[damage]
    weights = run_copy / "links" / "001" / "adapter_model.safetensors"
    save_file(harm(load_file(weights)), weights)
    sign(run_copy)
    for act in (load_run, inspect_run, lambda run: export_adapter(run, tmp_path / "a")):
        with pytest.raises(RunError, match=message):
            act(run_copy)


@pytest.mark.parametrize("damage", TEXTS)
def test_texts_that_contradict_each_other_are_refused_whatever_the_checksums(run_copy, damage):
    before, after, message = TEXTS[damage]
    edit(run_copy / "chain.json", before, after)
    sign(run_copy)
    with pytest.raises(RunError, match=message):
        load_run(run_copy)


def test_factors_of_another_size_than_the_base_are_refused_in_one_sentence(run_copy, tmp_path):
    weights = run_copy / "links" / "001" / "adapter_model.safetensors"
    save_file(load_file(weights) | {A: torch.ones(4, 31)}, weights)
    sign(run_copy)
    for act in (load_run, lambda run: export_adapter(run, tmp_path / "a")):
        with pytest.raises(ChainLoRAError, match=r"q_proj") as raised:
            act(run_copy)
        assert "\n" not in str(raised.value)


def test_a_run_of_version_0_2_loads_exports_and_resumes(rich_config, tmp_path, caplog):
    train(rich_config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(rich_config, 6)
    as_format_2(tmp_path / "run")
    train(rich_config, resume=True)
    assert "did not record what it decided" in caplog.text
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    assert RunDirectory(tmp_path / "run").manifest().format == 3
    before, described = load_run(tmp_path / "run")[0].state_dict(), inspect_run(tmp_path / "run")
    as_format_2(tmp_path / "run")
    after = load_run(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert inspect_run(tmp_path / "run") == described | {"numbers": {}}
    assert RunDirectory(tmp_path / "run").result() is not None
    ids = [(e.id, e.stage, e.strength) for e in RunDirectory(tmp_path / "run").manifest().links]
    assert ids == [(0, "main", 1.0), (1, "main", 1.0), (2, "main", 1.0)]
    export_adapter(tmp_path / "run", tmp_path / "adapter")


ESCAPE = "\x1b[31mred"
PRINTED = {
    "base.model": lambda tree: tree["base"].update(model=ESCAPE),
    "base.task_type": lambda tree: tree["base"].update(task_type=ESCAPE),
    "hold": lambda tree: tree.update(hold=ESCAPE),
    "stage": lambda tree: tree.update(stage="../main"),
    "kept.0": lambda tree: tree.update(kept=["a b"]),
    "versions.torch": lambda tree: tree["versions"].update(torch=ESCAPE),
    "links.0.tuned_on": lambda tree: tree["links"][0].update(tuned_on=ESCAPE),
    "links.1.stage": lambda tree: tree["links"][1].update(stage=ESCAPE),
    "links.2.stage": lambda tree: tree["links"][2].update(stage="x" * 65),
}


@pytest.mark.parametrize("place", PRINTED)
def test_names_of_a_received_run_are_names_and_no_terminal_escapes(run_copy, chainlora, place):
    tree = json.loads((run_copy / "chain.json").read_text())
    del tree["checksum"]
    PRINTED[place](tree)
    sign(run_copy, **tree)
    chainlora(f"inspect {run_copy}").refused("chain.json must hold valid values", f"`{place}`")


def test_a_score_of_a_received_run_is_no_terminal_escape(run_copy, chainlora):
    edit(run_copy / "metrics.jsonl", '"accuracy"', json.dumps(ESCAPE))
    sign(run_copy, records=None)
    chainlora(f"inspect {run_copy}").refused("metrics.jsonl", "a key with control characters")


def test_an_absurd_place_in_a_manifest_of_0_2_is_refused_and_takes_no_memory(run_copy):
    as_format_2(run_copy)
    links = json.loads((run_copy / "chain.json").read_text())["links"]
    sign(run_copy, links=[links[0] | {"index": 2**31}, *links[1:]])
    with pytest.raises(RunError, match="out of order"):
        inspect_run(run_copy)


def test_what_is_wrong_with_the_links_is_said_before_the_base_is_loaded(run_copy):
    base = json.loads((run_copy / "chain.json").read_text())["base"]
    sign(run_copy, base=base | {"model": "/nowhere"})
    with pytest.raises(
        RunError, match=r"^the number of links must be 0 to 3 for this run \(got 4\)"
    ):
        load_run(run_copy, num_links=4)
    shutil.rmtree(run_copy / "links" / "002")
    with pytest.raises(RunError, match=r"links/002.*incomplete"):
        load_run(run_copy)

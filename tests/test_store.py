"""The run directory: what is in it, that it is never torn, and what is said of one that is half
there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import settings

from chainlora import load_run, make_config, train
from chainlora.errors import RunError
from chainlora.runs.directory import Progress, RunDirectory, read_json, write_json, write_link


@pytest.fixture(scope="module")
def finished(tiny_folder, sentiment, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("store") / "run"
    train(make_config(settings(tiny_folder, sentiment, output, chain={"rslora": True})))
    return output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_what_a_run_directory_holds(finished, tiny_folder):
    assert {p.name for p in finished.iterdir()} - {"checkpoints"} == {
        "config.yaml",
        "chain.json",
        "links",
        "metrics.jsonl",
        "result.json",
    }
    assert sorted(p.name for p in (finished / "links").iterdir()) == ["000", "001", "002"]
    for folder in (finished / "links").iterdir():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            p.name for p in folder.iterdir()
        }
        assert json.loads((folder / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ] == str(tiny_folder)
    manifest = json.loads((finished / "chain.json").read_text())
    assert manifest["format"] == 1
    assert manifest["base"]["model"] == str(tiny_folder)
    assert len(manifest["base"]["fingerprint"]) == 64
    assert [link["directory"] for link in manifest["links"]] == [
        "links/000",
        "links/001",
        "links/002",
    ]
    assert {"torch", "transformers", "peft", "chainlora", "python"} <= set(manifest["versions"])
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["train"]["weight_decay"] == 0.0  # resolved: what the file did not say is there
    assert not list(finished.rglob("*.new"))


def test_links_come_back_as_they_were(finished, tmp_path):
    link = RunDirectory(finished).load_links()[1]
    assert (link.index, link.rank, link.num_steps) == (1, 4, 4)
    write_link(tmp_path / "again", link, "base")
    stored = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert stored["lora_alpha"] / stored["r"] ** 0.5 == pytest.approx(
        link.config.scaling
    )  # rsLoRA's scaling
    assert len(RunDirectory(finished).load_links(2)) == 2
    assert RunDirectory(finished).load_links(0) == []
    for wrong in (4, -1):
        with pytest.raises(RunError, match=rf"--links must be 0 to 3 for this run \(got {wrong}\)"):
            RunDirectory(finished).load_links(wrong)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "chain.json").unlink(),
            r"must hold chain.json \(got none in .*\); is this the output of",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 1,'),
            r"chain.json must be JSON \(got .*\); the run directory is half there: copy it "
            r"whole, or train anew",
        ),
        (
            lambda run: (run / "chain.json").write_text("[]"),
            r"chain.json must hold .* \(got no `format` in .*half there",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 1}'),
            r"must hold .* \(got no `base` in .*half there",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 9}'),
            r"must be of format 1 \(got 9 in .*\); use the version of chainlora that wrote it",
        ),
        (
            lambda run: shutil.rmtree(run / "links" / "001"),
            r"whole PEFT adapter \(got .*links/001.*half there",
        ),
        (
            lambda run: (run / "links" / "001" / "adapter_config.json").unlink(),
            r"PEFT adapter \(got .*001.*half there",
        ),
        (
            lambda run: (run / "links" / "001" / "adapter_model.safetensors").write_bytes(
                b"abcdefgh" * 9
            ),
            r"link's weights must be readable \(got .*links/001",
        ),
    ],
    ids=["gone", "torn", "list", "empty", "format", "no-link", "no-config", "torn-weights"],
)
def test_half_a_run_directory_is_named(run, damage, message):
    damage(run)
    with pytest.raises(RunError, match=message) as raised:
        load_run(run)
    assert "\n" not in str(raised.value)


def test_what_is_wrong_with_the_links_is_said_before_the_base_is_loaded(run):
    manifest = json.loads((run / "chain.json").read_text())
    manifest["base"]["model"] = "/nowhere"
    (run / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"--links must be 0 to 3 for this run \(got 4\)"):
        load_run(run, num_links=4)
    shutil.rmtree(run / "links" / "002")
    with pytest.raises(RunError, match=r"links/002.*half there"):
        load_run(run)


def test_a_resume_finds_what_is_half_there(tiny_folder, sentiment, run):
    config = make_config(settings(tiny_folder, sentiment, run, chain={"rslora": True}))
    (run / "config.yaml").unlink()
    with pytest.raises(
        RunError, match=r"must hold config.yaml \(got none in .*\); the run directory is half there"
    ):
        train(config, resume=True)
    (run / "chain.json").unlink()
    with pytest.raises(
        RunError,
        match=r"\(got .*run, which is not empty and not a whole run\); choose another output",
    ):
        train(config, resume=True)


def test_a_base_whose_weights_changed_is_refused_everywhere(tiny_folder, sentiment, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    config = make_config(
        settings(base, sentiment, tmp_path / "run", chain={"ranks": [2], "steps": [1]})
    )
    train(config)
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for act in (lambda: load_run(tmp_path / "run"), lambda: train(config, resume=True)):
        with pytest.raises(
            RunError, match=r"\(fingerprint \w{12}, got \w{12}\); its weights have changed: restore"
        ):
            act()


def test_output_that_is_a_file_is_refused(tiny_folder, sentiment, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match=r"must be a directory \(got the file .*run\); name another"):
        train(make_config(settings(tiny_folder, sentiment, tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_killed_before_its_manifest_begins_again(tiny_folder, sentiment, tmp_path):
    config = make_config(
        settings(tiny_folder, sentiment, tmp_path / "run", chain={"ranks": [2], "steps": [1]})
    )
    (tmp_path / "run" / "links").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: half")
    with pytest.raises(RunError, match="not empty and not a whole run"):
        train(config)
    assert train(config, resume=True)["steps"] == 1


def test_watchers_may_change_over_a_resume_and_science_may_not(tiny_folder, sentiment, run):
    base = json.loads((run / "chain.json").read_text())["base"]

    def find(**keys) -> Progress:
        tree = settings(tiny_folder, sentiment, run, chain={"rslora": True}, train=keys)
        return RunDirectory(run).begin(make_config(tree), base, resume=True)

    assert find(save_every=7, trackers=["tensorboard"]).step == 11
    for keys in ({"seed": 1}, {"lr": 1e-4}, {"dtype": "bfloat16"}):
        with pytest.raises(
            RunError,
            match=r"the run began with \(got other values under train\); use .*config.yaml",
        ):
            find(**keys)


def test_the_newest_checkpoint_is_kept_and_found(finished, tmp_path):
    directory = RunDirectory(tmp_path)
    config = RunDirectory(finished).load_links(1)[0].config
    state, optimizer = {"A/q_proj": torch.randn(2, 3)}, {"0.step": torch.ones(())}
    for step in (2, 4):
        directory.save_checkpoint(state, optimizer, Progress(step=step, link=0))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000004"]
    assert directory.load_checkpoint(Progress(step=2), config) is None
    assert directory.load_checkpoint(Progress(step=4, link=1), config) is None  # of another link
    found, tensors = directory.load_checkpoint(Progress(step=4), config) or pytest.fail(
        "no checkpoint"
    )
    assert torch.equal(found["A/q_proj"], state["A/q_proj"])
    assert tensors["0.step"] == 1
    directory.drop_checkpoints()
    assert not (tmp_path / "checkpoints").exists()

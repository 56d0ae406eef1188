"""`chainlora train` as its users meet it: what it writes, prints and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


def test_train_writes_a_run_directory_and_shows_its_links(chainlora, config, tmp_path):
    done = chainlora("train", config)
    assert done.status == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} - {".lock"} == {
        "config.yaml",
        "chain.json",
        "links",
        "metrics.jsonl",
        "result.json",
        "training.png",
    }
    assert sorted(p.name for p in (tmp_path / "run" / "links").iterdir()) == ["000", "001", "002"]
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    for shown in (
        "validation: accuracy 1.0000",
        "majority",
        "11 steps",
        "‖ΔW‖",
        "effective rank",
        "overlap",
    ):
        assert shown in done.out
    assert "32 training rows, 11 steps (4 + 4 + 3)" in done.err  # progress goes to stderr
    assert "after link 2: validation accuracy 1.0000" in done.err
    assert "training rows" not in done.out


def test_train_prints_one_json_object_which_is_the_result(chainlora, config, tmp_path):
    result = chainlora("train", config, "--json").json
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["validation"]["accuracy"] == 1.0


def test_any_key_can_be_set_in_any_order_and_either_spelling(chainlora, config, tmp_path):
    result = chainlora(
        "train",
        "--chain.ranks",
        "[2]",
        "--json",
        "--chain.steps=[2]",
        config,
        "--train.batch-size",
        "4",
        "--output",
        tmp_path / "other",
        "--train.max_grad_norm",
        "null",
    ).json
    assert (result["steps"], [link["rank"] for link in result["links"]]) == (2, [2])
    resolved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert (resolved["train"]["batch_size"], resolved["train"]["max_grad_norm"]) == (4, None)
    assert not (tmp_path / "run").exists()


def test_train_resumes_a_run_that_was_stopped(chainlora, config, tmp_path):
    whole = chainlora("train", config, "--output", tmp_path / "whole", "--json").json
    script = Path(__file__).with_name("killed_run.py")
    died = subprocess.run(
        [sys.executable, "-c", _DIES, script.parent, config], capture_output=True, text=True
    )
    assert died.returncode == -9, died.stderr
    assert len(json.loads((tmp_path / "run" / "chain.json").read_text())["links"]) == 1
    assert (
        len(chainlora("inspect", tmp_path / "run", "--json").json["links"]) == 1
    )  # half-way is fine to look at
    resumed = chainlora("train", config, "--resume", "--json")
    assert "resuming after step" in resumed.err
    assert resumed.json["metrics"] == whole["metrics"]
    for link in ("000", "001", "002"):
        one, two = (
            (tmp_path / name / "links" / link / "adapter_model.safetensors")
            for name in ("run", "whole")
        )
        assert one.read_bytes() == two.read_bytes()
    assert (
        chainlora("train", config, "--resume", "--json").json["metrics"] == whole["metrics"]
    )  # done: nothing to do


_DIES = """
import os, signal, sys
from chainlora.config.loading import load_config
from chainlora.training.loop import train
seen = []
def listener(record):
    seen.append(record)
    if record["event"] == "step" and record["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train(load_config(sys.argv[2]), listener=listener)
"""


def test_a_chain_of_none_is_the_zero_shot_model(chainlora, config):
    result = chainlora("train", config, "--chain.ranks", "[]", "--chain.steps", "[]", "--json").json
    assert (result["steps"], result["links"]) == (0, [])
    assert (
        chainlora(
            "train",
            config,
            "--chain.ranks",
            "[]",
            "--chain.steps",
            "[]",
            "--data.validation",
            "null",
            "--output",
            config.parent / "blind",
            "--json",
        ).status
        == 0
    )  # nothing to draw either


def test_early_stop_and_the_best_point(chainlora, config, tmp_path):
    keys = (
        "--train.eval_every",
        "1",
        "--train.early_stop",
        "2",
        "--train.keep_best",
        "true",
        "--train.lr",
        "1e-9",
    )
    result = chainlora("train", config, *keys, "--json").json
    assert result["steps"] == 3
    shown = chainlora("inspect", tmp_path / "run")
    assert "selected: best point at step 1" in shown.out


def test_a_non_finite_loss_stops_and_says_where_the_last_good_state_is(chainlora, config, tmp_path):
    outcome = chainlora(
        "train", config, "--train.lr", "1e38", "--train.schedule", "constant", "--json"
    )
    assert (outcome.status, outcome.out) == (1, "")
    line = outcome.err.splitlines()[-1]
    assert line.startswith("chainlora: error: the norm of the weights must be finite (got ")
    kept = f"at step 1, link 0); the last good state is kept in {tmp_path / 'run'}; lower train.lr"
    assert kept in line
    assert (
        chainlora("inspect", tmp_path / "run", "--json").json["links"] == []
    )  # whole, and of no link yet


def test_full_fine_tuning_has_weights_in_place_of_links(chainlora, config, sentiment, tmp_path):
    run, keys = (
        tmp_path / "run",
        ("--chain.tune", "full", "--chain.ranks", "[1]", "--chain.steps", "[3]"),
    )
    result = chainlora("train", config, *keys, "--json").json
    task = ("--task", sentiment / "task.yaml", "--data", sentiment, "--json")
    assert chainlora("eval", run, *task).json["metrics"]["loss"] == pytest.approx(
        result["metrics"]["validation"]["loss"], abs=1e-5
    )
    assert chainlora("inspect", run, "--json").json["links"] == []
    assert chainlora("export", run, "--to", "merged", "--output", tmp_path / "m").status == 0
    assert "every weight fine-tuned" in (tmp_path / "m" / "README.md").read_text()
    assert chainlora("eval", tmp_path / "m", *task).json == chainlora("eval", run, *task).json
    chainlora("export", run, "--to", "adapter", "--output", tmp_path / "a").refused(
        "--to adapter needs a chain (got "
    )
    chainlora("eval", run, *task, "--links", "1").refused(
        "--links needs a chain (got ", "leave --links out"
    )
    chainlora("train", config, *keys, "--resume").refused("full fine-tuning cannot resume")

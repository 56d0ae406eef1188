"""Two processes train one chain: the links of one process, on disk once, resumed by any number.

torchrun starts the processes. A start costs seconds, so one launch does the jobs of all tests; four
processes: test_sharing.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import records_of, settings, stage_dir
from helpers_data import pair_files
from helpers_processes import assert_close_links, assert_close_updates, launch, outcome

from chainlora import ChainLoRAError, make_config, train
from chainlora.runs.addresses import open_run
from chainlora.training.processes import find_processes
from chainlora.training.stages import train_run

CHAIN = {"ranks": [4, 4], "steps": [4, 3]}
TRAIN = {"lr": 1e-3, "batch_size": 8, "eval_every": 2, "save_every": 1}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft": {"chain": {"knots": {"every": 2, "share": 0.3}}, "train": {"keep_best": True}},
    "gradient": {
        "chain": {"init": "gradient"},
        "train": {"gradient_accumulation": 2},
    },
    # one row is left for the last batch of an epoch: one of the processes has none
    "uneven": {"train": {"batch_size": 4, "gradient_accumulation": 3}, "data": {"num_train": 29}},
    "answers": {"data": {"num_validation": 5}},
    "pairs": {"train": {"loss": "dpo"}, "data": {"task": None}},
    "replay": {"data": {"replay": 0.4}},
}


def tree_of(name: str, tiny_folder: Path, sentiment: Path, output: Path) -> dict[str, Any]:
    keys = {section: dict(value) for section, value in JOBS.get(name, {}).items()}
    return settings(
        tiny_folder,
        sentiment,
        output,
        chain=CHAIN | keys.get("chain", {}),
        train=TRAIN | keys.get("train", {}),
        data=keys.get("data", {}) | (pair_files(sentiment) if name == "pairs" else {}),
    )


@pytest.fixture(scope="module")
def launched(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """Every job in one process and in two; a run of two, stopped, resumed by one."""
    folder = tmp_path_factory.mktemp("processes")

    def begun(name: str) -> dict[str, Any]:
        return {"start": str(folder / "first")} if name == "replay" else {}

    def job(name: str, output: str, **keys: Any) -> dict[str, Any]:
        tree = tree_of(name, tiny_folder, sentiment, folder / output) | begun(name)
        tree["train"] |= keys.pop("train", {})
        path = folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return {"config": str(path), "outcome": str(folder / f"{output}.json")} | keys

    first = settings(tiny_folder, sentiment, folder / "first", chain={"ranks": [2], "steps": [1]})
    train(make_config(first | {"data": first["data"] | {"num_train": 16}}))
    later = {"replay": {"stage": "later"}}
    for name in JOBS:
        tree = tree_of(name, tiny_folder, sentiment, folder / f"{name}-1")
        train_run(make_config(tree | begun(name)), **later.get(name, {}))
    two = [job(name, f"{name}-2", **later.get(name, {})) for name in JOBS]
    two += [job("soft", "stopped", stop=6)]
    two += [job("plain", "odd", train={"batch_size": 9})]
    two += [{"command": ["train", job("plain", "command")["config"]]}]
    two += [job("plain", "killed", kill=[1, 3])]
    done = launch(2, folder, two)
    assert done.returncode != 0  # the last job kills a process
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    train(tree_of("soft", tiny_folder, sentiment, folder / "stopped"), resume=True)
    return folder


@pytest.mark.parametrize("name", [name for name in JOBS if name != "soft"])
def test_the_chain_is_that_of_one_process(launched, name):
    assert outcome(launched, f"{name}-2")["processes"] == 2
    assert_close_links(launched / f"{name}-1", launched / f"{name}-2")


def test_losses_tokens_and_evaluations_are_those_of_one_process(launched):
    one, many = records_of(launched / "plain-1"), records_of(launched / "plain-2")
    assert [r["event"] for r in one] == [r["event"] for r in many]  # each written once
    for a, b in zip(one, many, strict=True):
        assert a.get("tokens") == b.get("tokens")
        for key in ("loss", "grad_norm", "accuracy"):
            assert a.get(key) == pytest.approx(b.get(key), abs=5e-6)  # float32 sums


def test_links_with_soft_knots_are_those_of_one_process(launched):
    assert_close_updates(launched / "soft-1", launched / "soft-2")


def test_a_run_of_two_is_resumed_by_one(launched):
    assert open_run(launched / "stopped").verify().result()["steps"] == 7  # every checksum
    assert_close_updates(launched / "soft-1", launched / "stopped")


def test_a_batch_that_cannot_be_shared_is_refused_once(launched):
    error = outcome(launched, "odd")["error"]
    assert "must be a multiple of their number (got 9 for 2 processes)" in error
    assert not (launched / "odd").exists()


def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    error = outcome(launched, "killed")["error"]
    assert error.startswith("TrainingError: the 2 processes of a run must go on together")
    assert open_run(launched / "killed").verify().draft.position.step in (2, 3)


def test_the_command_line_prints_once(launched):
    assert (launched / "stdout").read_text().count("7 steps, ") == 1
    assert (launched / "stderr").read_text().count("training rows, 7 steps") == 1
    assert (stage_dir(launched / "command") / "result.json").is_file()


@pytest.mark.parametrize("verb", [["tasks"], ["export", "run", "--to", "merged", "--output", "x"]])
def test_other_verbs_are_refused_in_many_processes(verb, monkeypatch, capsys):
    from chainlora.cli.main import run

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(verb) == 1
    assert f"(got chainlora {verb[0]} in 4)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_to_share_a_model_are_refused(kind):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(ChainLoRAError, match=rf"\(got an Accelerate config for {kind}\); launch"):
        find_processes(accelerator)


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "WORLD_SIZE"])
def test_a_variable_that_a_launcher_has_left_is_named(variable, config, chainlora):
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    with patch.dict(os.environ, {variable: "2"}):  # Accelerate sets others
        chainlora("train", config).refused(
            "Accelerate must find the processes that the environment names",
            "launch with torchrun, or unset LOCAL_RANK and WORLD_SIZE",
        )
    AcceleratorState._reset_state(reset_partial_state=True)


LEAVING = """
import atexit
from torch import distributed
from chainlora.training.processes import leave_processes

leave_processes(5)  # alone, it does nothing
atexit.register(print, "torn down")
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
print("done")
from chainlora.__main__ import main

main()
"""


def test_a_process_of_several_ends_with_its_status_and_without_teardown():
    """Torn down, threads of Gloo that are late can abort it."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, "--wrong"],
        env=os.environ | {"WORLD_SIZE": "2"},  # as a launcher tells the command line
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stdout == "done\n"

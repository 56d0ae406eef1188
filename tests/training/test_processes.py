"""Two processes train one chain: the links of one process, on disk once, resumed by any number.
Before that, what several processes cannot do is refused.

torchrun starts the processes. A start costs seconds, so one launch does the jobs of all tests; four
processes: test_sharing.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState
from faults.lives import live
from helpers import stage_dir
from helpers_processes import (
    TRAIN,
    assert_close_links,
    assert_close_records,
    assert_close_updates,
    assert_ended_by_one_sentence,
    job,
    launch,
    outcome,
    tree_of,
)

from chainlora import ChainLoRAError, make_config, train
from chainlora.__main__ import main
from chainlora.runs.addresses import open_run
from chainlora.training.processes import (
    check_shards,
    leave_processes,
    wants_shards,
)
from chainlora.training.stages import train_run

JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft": {"chain": {"knots": {"every": 2, "share": 0.3}}, "train": {"keep_best": True}},
    # one row is left for the last batch of an epoch: one of the processes has none
    "uneven": {
        "chain": {"init": "gradient"},
        "train": {"batch_size": 4, "gradient_accumulation": 3},
        "data": {"num_train": 29, "num_validation": 5},
    },
    "pairs": {"train": {"loss": "dpo"}, "data": {"task": None}},
    "replay": {"data": {"replay": 0.4}},
}


@pytest.fixture(scope="module")
def launched(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """Every job in one process and in two; a run of two, stopped, resumed by one."""
    folder = tmp_path_factory.mktemp("processes")

    def tree(name: str, output: str) -> dict[str, Any]:
        whole = tree_of(JOBS[name], tiny_folder, sentiment, folder / output)
        rows = {"task": str(sentiment / "task.yaml"), "train": str(sentiment / "train.jsonl")}
        return whole | ({"start_data": rows} if name == "replay" else {})

    for name in JOBS:
        train_run(make_config(tree(name, f"{name}-1")))
    two = [job(tree(name, f"{name}-2")) for name in JOBS]
    two += [
        job(tree("soft", "stopped"), stop=6),
        job(tree("plain", "odd") | {"train": TRAIN | {"batch_size": 9}}),
    ]
    two += [{"command": ["train", job(tree("plain", "command"))["config"]]}]
    two += [job(tree("plain", "killed"), kill=[1, 3])]
    done = launch(2, folder, two)
    assert done.returncode != 0  # the last job kills a process
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    train(tree("soft", "stopped"), resume=True)
    return folder


@pytest.mark.parametrize("name", [name for name in JOBS if name != "soft"])
def test_the_chain_is_that_of_one_process(launched, name):
    assert outcome(launched, f"{name}-2")["processes"] == 2
    assert_close_links(launched / f"{name}-1", launched / f"{name}-2")


def test_losses_tokens_and_evaluations_are_those_of_one_process(launched):
    assert_close_records(launched / "plain-1", launched / "plain-2")


@pytest.mark.parametrize("other", ["soft-2", "stopped"])  # in two processes, and resumed by one
def test_links_with_soft_knots_are_those_of_one_process(launched, other):
    assert open_run(launched / other).verify().result()["steps"] == 7  # every checksum
    assert_close_updates(launched / "soft-1", launched / other)


def test_a_batch_that_cannot_be_shared_is_refused_once(launched):
    error = outcome(launched, "odd")["error"]
    assert "must be a multiple of their number (got 9 for 2 processes)" in error
    assert not (launched / "odd").exists()


def test_a_killed_process_ends_the_others_with_one_sentence(launched):
    assert_ended_by_one_sentence(launched)


def test_the_command_line_prints_once(launched):
    assert (launched / "stdout").read_text().count("7 steps, ") == 1
    assert (launched / "stderr").read_text().count("training rows, 7 steps") == 1
    assert (stage_dir(launched / "command") / "result.json").is_file()


@pytest.mark.parametrize("verb", [["doctor"], ["export", "run", "--to", "merged", "--output", "x"]])
def test_other_verbs_are_refused_in_many_processes(verb, monkeypatch, capsys):
    from chainlora.cli.main import run

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(verb) == 1
    assert f"(got chainlora {verb[0]} in 4)" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "WORLD_SIZE"])
def test_a_variable_that_a_launcher_has_left_is_named(variable, config, chainlora):
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    with patch.dict(os.environ, {variable: "2"}):  # Accelerate sets others
        chainlora("train", config).refused(
            "Accelerate must find the processes that the environment names",
            "launch with torchrun, or unset LOCAL_RANK and WORLD_SIZE",
        )
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_a_process_of_several_ends_with_its_status_and_without_teardown():
    """Torn down, threads of Gloo that are late can abort it."""

    def leave() -> None:
        leave_processes(5)  # alone, it does nothing
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        os.environ["WORLD_SIZE"] = "2"  # as a launcher tells the command line
        sys.argv[1:] = ["--wrong"]
        main()

    end = live(leave)
    assert (end.status, end.message) == (2, "no word")  # nothing ran after it


# --- what is refused, before anything is written

RUN = """\
model: m
data: {train: rows.jsonl}
chain: {ranks: [8, 8], epochs: [1, 1]}
output: out
"""
BY_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}  # what `accelerate launch` sets
BY_FSDP2 = BY_FSDP | {"FSDP_VERSION": "2"}
BY_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
CARRIED = {"hold": "carried"}


@pytest.mark.parametrize(
    ("keys", "says", "variables", "missing"),  # what the launcher has set, and a package
    [
        ("", "set fsdp_version: 2, or launch with torchrun", BY_FSDP, None),
        ("", "(got an Accelerate config with DeepSpeed); launch", BY_DEEPSPEED, None),
        (
            "--train.shard fsdp2",
            "between several processes (got one process); launch with torchrun --nproc-per-node 2",
            {},
            None,
        ),
        (
            "--train.optimizer adamw_8bit",
            "pip install 'chainlora[bitsandbytes]'",
            {},
            "bitsandbytes",
        ),
    ],
)
def test_a_refusal_says_what_to_do(
    keys, says, variables, missing, tiny_folder, chainlora, tmp_path, monkeypatch
):
    (tmp_path / "run.yaml").write_text(RUN.replace("model: m", f"model: {tiny_folder}"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    chainlora(f"train run.yaml {keys}").refused(says)
    assert not (tmp_path / "out").exists()


# --- shared models


def config_of(shard: str | None = "fsdp2", chain: dict[str, Any] = CARRIED, **keys: Any):
    chain = {"ranks": [4], "steps": [2]} | chain
    tree = {"model": "m", "data": {"train": "rows.jsonl"}, "chain": chain}
    return make_config(tree | {"train": {"shard": shard}} | keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantize": "int8"}, r"\(got quantize, which needs whole"),
        ({"chain": {"knots": "auto"}}, r"soft knots on a shared model need hold: carried"),
    ],
)
def test_what_a_shared_model_cannot_do_is_refused(keys, message):
    with pytest.raises(ChainLoRAError, match=message):
        check_shards(config_of(**keys))


@pytest.mark.parametrize(
    ("shard", "variables", "found"),
    [("fsdp2", {}, True), (None, {}, False), (None, BY_FSDP2, True)],
    ids=str,
)
def test_a_config_or_the_launcher_says_how_a_model_is_shared(shard, variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_shards(config_of(shard)) == found

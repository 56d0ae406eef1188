"""What a chain at scale refuses, from the command line, before anything is written."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from chainlora import ChainLoRAError, make_config
from chainlora.training.processes import check_shards, wants_shards

RUN = """\
model: m
data: {train: rows.jsonl}
chain: {ranks: [8, 8], epochs: [1, 1]}
output: out
"""
BY_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}  # what `accelerate launch` sets
BY_FSDP2 = BY_FSDP | {"FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("command", "says", "variables", "missing"),  # what the launcher has set, and a package
    [
        ("train run.yaml", "set fsdp_version: 2, or launch with torchrun", BY_FSDP, None),
        (
            "train run.yaml --train.shard fsdp2",
            "between several processes (got one process); launch with torchrun --nproc-per-node 2",
            {},
            None,
        ),
        (
            "train run.yaml --train.shard zero3",
            "`train.shard` must be 'fsdp2' (got 'zero3'); its default is null",
            {},
            None,
        ),
        (
            "train run.yaml --train.optimizer schedule_free_adamw --train.schedule constant",
            "pip install 'chainlora[schedulefree]'",
            {},
            "schedulefree",
        ),
    ],
)
def test_a_refusal_says_what_to_do(
    command, says, variables, missing, tiny_folder, chainlora, tmp_path, monkeypatch
):
    (tmp_path / "run.yaml").write_text(RUN.replace("model: m", f"model: {tiny_folder}"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    chainlora(command).refused(says)
    assert not (tmp_path / "out").exists()


# --- shared models


def config_of(shard: str | None = "fsdp2", **sections: Any):
    tree = {
        "model": "m",
        "data": {"train": "rows.jsonl"},
        "chain": {"ranks": [4], "steps": [2]} | sections.pop("chain", {}),
        "train": {"shard": shard},
    }
    return make_config(tree | sections)


CARRIED = {"hold": "carried"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"chain": {"init": "pissa"}}, r"\(got chain.init: pissa, which needs whole weights\)"),
        ({"quantize": "int8", "chain": CARRIED}, r"\(got quantize, which needs whole"),
        ({"chain": {"knots": "auto"}}, r"soft knots on a shared model need hold: carried"),
    ],
)
def test_what_a_shared_model_cannot_do_is_refused(sections, message):
    with pytest.raises(ChainLoRAError, match=message):
        check_shards(config_of(**sections))


@pytest.mark.parametrize(
    ("shard", "variables", "found"),
    [("fsdp2", {}, True), (None, {}, False), (None, BY_FSDP2, True)],
    ids=str,
)
def test_a_config_or_the_launcher_says_how_a_model_is_shared(shard, variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_shards(config_of(shard, chain=CARRIED)) == found


def test_another_way_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = r"\(got an Accelerate config with DeepSpeed\); launch"
    with pytest.raises(ChainLoRAError, match=message):
        wants_shards(config_of())

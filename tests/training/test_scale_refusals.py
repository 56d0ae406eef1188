"""What a chain at scale refuses, before anything is written."""

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
            "--train.shard zero3",
            "`train.shard` must be 'fsdp2' (got 'zero3'); its default is null",
            {},
            None,
        ),
        (
            "--train.optimizer schedule_free_adamw --train.schedule constant",
            "pip install 'chainlora[schedulefree]'",
            {},
            "schedulefree",
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
        ({"chain": {"init": "pissa"}}, r"\(got chain.init: pissa, which needs whole weights\)"),
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

"""Whether the processes of a run share the model (FSDP2 or ZeRO-3), and what such a run cannot do.

The links are whole in each process, as in any run of several processes, and so are optimizer,
checkpoints and the run directory.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from chainlora.chain.holding import holding_named
from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError


def wants_shards(config: RunConfig) -> Literal["fsdp2", "zero3"] | None:
    """Return how processes are to share the model, by `train.shard` or by `accelerate launch`.

    Raises ConfigError where Accelerate is set to FSDP1 or DeepSpeed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "processes share a model by `train.shard` (got an Accelerate config with DeepSpeed); "
            "launch with torchrun, and set train.shard: zero3, or fsdp2"
        )
    by_accelerate = _is_set("ACCELERATE_USE_FSDP")
    version = os.environ.get("FSDP_VERSION", "1")
    if by_accelerate and version != "2":
        raise ConfigError(
            f"FSDP must be FSDP2 (got an Accelerate config with fsdp_version: {version}); set "
            "fsdp_version: 2, or launch with torchrun and set train.shard: fsdp2"
        )
    if by_accelerate and config.train.shard == "zero3":
        raise ConfigError(
            "processes share a model in one way (got train.shard: zero3 and an Accelerate config "
            "with FSDP2); leave one of them out"
        )
    return "fsdp2" if by_accelerate else config.train.shard


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def refuse_one_process(config: RunConfig) -> None:
    """Raise ConfigError where one process alone is to share the model."""
    shard = config.train.shard
    if shard is None:
        return
    is_missing = shard == "zero3" and find_spec("deepspeed") is None
    install = "pip install 'chainlora[deepspeed]', " if is_missing else ""
    raise ConfigError(
        f"`train.shard: {shard}` shares the model between several processes",
        "one process",
        f"{install}launch with torchrun --nproc-per-node 2 -m chainlora train CONFIG, or set "
        "train.shard: null",
    )


def check_shards(config: RunConfig) -> None:
    """Raise ConfigError for what a shared model cannot do."""
    chain = config.chain
    refused = {
        "quantize": config.quantize is not None,
        "chain.tune: full": chain.tune == "full",
        "chain.dora": chain.dora,
        "chain.init: pissa": chain.init == "pissa",
        "chain.extra_modules": bool(chain.extra_modules),
    }
    if found := [key for key, is_set in refused.items() if is_set]:
        raise ConfigError(
            f"processes that share a model train plain LoRA on it (got {found[0]}, which needs "
            "whole weights); leave it out, or train.shard: each process then holds the whole model"
        )
    if chain.knots is not None and holding_named(chain.hold).writes_base:
        raise ConfigError(
            "soft knots on a shared model need hold: carried (got hold: tied, whose exact weights "
            "no single process can save); set chain.hold: carried"
        )
    if wants_shards(config) == "zero3":
        _check_zero3(config)


def _check_zero3(config: RunConfig) -> None:
    if holding_named(config.chain.hold).writes_base:
        raise ConfigError(
            "`train.shard: zero3` cuts flattened weights, not rows that a process could merge into "
            "(got hold: tied); set chain.hold: carried, or train.shard: fsdp2"
        )
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "`train.shard: zero3` needs the package deepspeed (got: it is not installed); pip "
            "install 'chainlora[deepspeed]'"
        )

"""A LoRA made elsewhere, as a link has it: factors of one rank, with one scaling.

PEFT gives a module a rank and an alpha of its own (`rank_pattern`, `alpha_pattern`). Here smaller
ranks are filled up with zeros and other scalings are folded into B: the same function to rounding.
Which modules are adapted is read from the weights, whatever pattern chose them. A DoRA adapter
becomes a link where its base is at hand (`runs.loading_start`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import peft
from peft.utils.other import get_pattern_key
from torch import Tensor

from chainlora.chain.adapters.adapter_files import (
    MAGNITUDE,
    MERGE,
    damaged,
    read_adapter,
    read_config,
)
from chainlora.chain.link import Factors, padded
from chainlora.config.schema import LinkConfig
from chainlora.errors import ModelError

# Fields that say nothing of what is computed.
SILENT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "loftq_config",
    "eva_config",
    "runtime_config",
    "qalora_group_size",
}
_READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "lora_dropout",
    "init_lora_weights",
}
# They chose the modules, which the weights name.
_CHOICE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
# These leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others do not.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_CONVERT = (
    "save it as a plain LoRA first (PEFT: save_pretrained with "
    "path_initial_model_for_weight_conversion), or merge it and take the result as the model"
)


@dataclass(frozen=True)
class Imported:
    """A LoRA of PEFT, read from its folder; tensors are by parameter path."""

    config: LinkConfig
    factors: dict[str, Factors]
    kept: dict[str, Tensor]  # of embeddings that PEFT stored beside it, which must be the base's
    magnitudes: dict[str, Tensor]  # of DoRA, by module; of LoRA none
    stored: dict[str, Any]  # PEFT's config

    @property
    def base(self) -> str:
        """Return the name of its base, which may be empty."""
        return str(self.stored.get("base_model_name_or_path") or "")


def import_adapter(folder: Path) -> Imported:
    """Read an adapter that PEFT has saved. Raises ModelError for what cannot become a link."""
    stored = read_config(folder)
    _check(stored, folder)
    factors, beside = read_adapter(folder)
    try:
        config, factors = _as_one(stored, factors)
        scaled = factors if stored.get("use_dora") else {}
        magnitudes = {
            name: beside.pop(f"{name}{MAGNITUDE}").float().expand(share.b.shape[0])
            for name, share in scaled.items()
        }
    except (
        TypeError,
        ValueError,
        RuntimeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        re.error,
    ) as error:
        raise damaged(folder, f"an adapter_config.json with {error}") from None
    kept = {path.replace(".base_layer.", "."): weight for path, weight in beside.items()}
    return Imported(config, factors, kept, magnitudes, stored)


def odd_field(config: Mapping[str, Any], known: set[str]) -> tuple[str, object] | None:
    """Return the first field of a LoRA's config that is neither PEFT's default nor known."""
    plain = {each.name: getattr(peft.LoraConfig(), each.name) for each in fields(peft.LoraConfig)}
    for key, value in config.items():
        is_plain = value == plain.get(key) or (not value and not plain.get(key))
        if not is_plain and key not in known | SILENT:
            return key, value
    return None


def _check(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError("an adapter must be a LoRA", f"{kind!r:.40} in {folder}", MERGE)
    if odd := odd_field(config, _READ | _CHOICE):
        got = f"`{odd[0]}: {odd[1]!r:.60}` in {folder}"
        raise ModelError("an adapter must be LoRA or DoRA and no more", got, MERGE)
    if (init := config.get("init_lora_weights")) not in _INITS:
        got = f"`init_lora_weights: {init!r:.40}` in {folder}"
        raise ModelError("an adapter must be for the base as it is", got, _CONVERT)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ModelError(
            "weights must be safetensors, since pickle can run code",
            f"only {pickles[0]} in {folder}",
            "load a copy that you trust with PEFT, and save it by save_pretrained",
        )


def _as_one(
    stored: Mapping[str, Any], factors: Mapping[str, Factors]
) -> tuple[LinkConfig, dict[str, Factors]]:
    """Return the config of a link, and factors of its rank and scaling."""
    rslora = bool(stored.get("use_rslora"))
    rank = max(share.a.shape[0] for share in factors.values())
    own = stored["r"], stored["lora_alpha"]
    power = 0.5 if rslora else 1.0
    scaling = own[1] / own[0] ** power
    config = LinkConfig(
        rank=rank,
        alpha=own[1] if rank == own[0] else scaling * rank**power,
        rslora=rslora,
        dropout=stored.get("lora_dropout", 0.0),
        lora_bias=bool(stored.get("lora_bias")),
        target_modules=tuple(sorted(factors)),
    )
    found = {}
    for name, share in factors.items():
        ratio = _of(stored, name, share, power) / scaling
        if not math.isclose(ratio, 1.0, rel_tol=1e-12):  # folded into B and its bias
            bias = None if share.bias is None else share.bias * ratio
            share = replace(share, b=share.b * ratio, bias=bias)
        found[name] = padded(share, rank)
    return config, found


def _of(stored: Mapping[str, Any], name: str, share: Factors, power: float) -> float:
    """Return the scaling of a module. Raises ValueError where its factors have another rank."""
    ranks, alphas = stored.get("rank_pattern") or {}, stored.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), stored["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), name), stored["lora_alpha"])
    if rank != share.a.shape[0]:
        raise ValueError(f"rank {rank} for factors of rank {share.a.shape[0]} at {name}")
    return alpha / rank**power

"""Read and write links as PEFT adapters: adapter_config.json and adapter_model.safetensors.

`import_adapter` converts an adapter of PEFT into a link: factors of one rank with one scaling. PEFT
allows a rank and an alpha per module (`rank_pattern`, `alpha_pattern`). The import pads smaller
ranks with zeros and folds other scalings into B: the same function up to rounding. It takes the
adapted modules from the weights, whatever pattern selected them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chainlora.chain.adapters.targets import peft_config
from chainlora.chain.link import Factors, padded
from chainlora.config.schema import LinkConfig
from chainlora.errors import ModelError, RunError
from chainlora.files import reported, save_tensors

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
MERGE = "merge it with PEFT, and use the result as the model"
# Fields without an effect on the function.
_SILENT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "loftq_config", "eva_config"),
    *("runtime_config", "qalora_group_size"),
}
# Fields that links have too, and fields that select modules, which the weights name already.
LINK_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "lora_bias", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# These initializations keep the base weights; PiSSA, OLoRA, CorDA, LoftQ and others change them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Raised for values of other types, sizes or ranges than PEFT writes.
_INVALID = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)
_CONVERT = (
    "save it as a plain LoRA first (PEFT: save_pretrained with "
    "path_initial_model_for_weight_conversion), or merge it and use the result as the model"
)


def save_adapter(
    directory: Path,
    factors: Mapping[str, Factors],
    config: LinkConfig,
    *,
    rank: int,
    alpha: float,
    base: str,
    fan_in_fan_out: bool = False,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a PEFT adapter into a scratch folder; equal links give equal bytes.

    Args:
        factors: A [rank, in] and B [out, rank] by module path.
        config: settings that the link was tuned with.
        rank: rank of the stored factors; that of a link with soft knots can exceed its tuned rank.
        alpha: alpha of the stored factors.
        fan_in_fan_out: whether the adapted layers store their weights as [in, out], as GPT-2 does.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in factors.items():
        tensors[f"{_PREFIX}{name}{_A}"] = _stored(pair.a)
        tensors[f"{_PREFIX}{name}{_B}"] = _stored(pair.b)
        if pair.bias is not None:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = pair.bias
    save_tensors(directory / _WEIGHTS, tensors, metadata={"format": "pt"})
    written = peft_config(
        config,
        r=rank,
        lora_alpha=alpha,
        base_model_name_or_path=base,
        inference_mode=True,
        target_modules=sorted(factors),
        exclude_modules=None,
        init_lora_weights=True,
        fan_in_fan_out=fan_in_fan_out,
        task_type=task_type,
    )
    # The order of sets differs between processes; PEFT's own writer keeps it.
    tree = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in written.to_dict().items()
    }
    with reported(directory):
        text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
        (directory / _CONFIG).write_text(text, encoding="utf-8")


def _stored(factor: Tensor) -> Tensor:
    """Return a factor in float16 if that changes no value (soft knots round to float16)."""
    narrow = factor.half()
    return (narrow if torch.equal(narrow.float(), factor) else factor).contiguous()


def load_adapter(directory: Path) -> dict[str, Factors]:
    """Read the factors of a link by module. Raises RunError if the file has other tensors too."""
    factors, others = read_adapter(directory)
    if others:
        raise damaged(directory, f"weights other than factors, such as {min(others)},")
    return factors


def read_adapter(directory: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Return a saved adapter: its factors by module, and all other tensors by parameter path.

    Raises:
        RunError: the files are missing or damaged, or a module lacks two factors of one rank.
        ModelError: the LoRA adapts an embedding.
    """
    with _damage_reported(directory):
        tensors = load_file(directory / _WEIGHTS)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if embeddings := [name for name in tensors if ".lora_embedding_" in name]:
        rule, got = "an adapter must be on linear layers", f"{embeddings[0]} in {directory}"
        raise ModelError(rule, got, MERGE)
    factors = {}
    for name in [name.removesuffix(_A) for name in tensors if name.endswith(_A)]:
        a, b = tensors.pop(f"{name}{_A}"), tensors.pop(f"{name}{_B}", None)
        if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise damaged(directory, f"no pair of factors for {name}")
        bias = tensors.pop(f"{name}.lora_B.bias", None)
        factors[name] = Factors(a.float(), b.float(), None if bias is None else bias.float())
    if not factors:
        raise damaged(directory, "no factors")
    for name in tensors:
        if ".lora_" in name:
            raise damaged(directory, f"{name} without factors")
    return factors, tensors


def read_config(directory: Path) -> dict[str, Any]:
    """Read PEFT's config of a saved adapter. Raises RunError unless it is a JSON object."""
    with _damage_reported(directory):
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise damaged(directory, "an adapter_config.json that is not an object")
    return config


@contextmanager
def _damage_reported(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise damaged(directory, error.strerror or str(error)) from None
    except (ValueError, RecursionError, SafetensorError) as error:
        raise damaged(directory, error) from None


def damaged(directory: Path, what: object) -> RunError:
    """Return the error of an adapter folder that is incomplete or damaged."""
    return RunError(
        f"a link must be a complete PEFT adapter (got {what} in {directory}); copy the folder "
        "again, or start over"
    )


# --- adapters of PEFT ---


@dataclass(frozen=True)
class Imported:
    """An adapter read from a PEFT folder."""

    config: LinkConfig
    factors: dict[str, Factors]  # A [rank, in] and B [out, rank] by module path
    # Other weights by parameter path, such as embeddings; they must equal those of the base.
    kept: dict[str, Tensor]
    stored: dict[str, Any]  # PEFT's config

    @property
    def base(self) -> str:
        """Name of the base model; may be empty."""
        return str(self.stored.get("base_model_name_or_path") or "")


def import_adapter(folder: Path) -> Imported:
    """Read an adapter saved by PEFT.

    Raises ModelError if it cannot become a link, and RunError if its files are damaged.
    """
    stored = read_config(folder)
    _check(stored, folder)
    factors, others = read_adapter(folder)
    try:
        config, factors = _with_one_rank(stored, factors)
    except (*_INVALID, re.error) as error:
        raise damaged(folder, f"an adapter_config.json with {error}") from None
    kept = {path.replace(".base_layer.", "."): weight for path, weight in others.items()}
    return Imported(config, factors, kept, stored)


def unknown_field(config: Mapping[str, Any], known: set[str]) -> tuple[str, object] | None:
    """Return name and value of the first config field that is not known and not PEFT's default."""
    defaults = peft.LoraConfig()
    plain = {field.name: getattr(defaults, field.name) for field in fields(peft.LoraConfig)}
    for key, value in config.items():
        is_default = value == plain.get(key) or (not value and not plain.get(key))
        if not is_default and key not in known | _SILENT:
            return key, value
    return None


def _check(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError("an adapter must be a LoRA", f"{kind!r:.40} in {folder}", MERGE)
    if odd := unknown_field(config, LINK_FIELDS | {"rank_pattern", "alpha_pattern"}):
        got = f"`{odd[0]}: {odd[1]!r:.60}` in {folder}"
        raise ModelError("an adapter must be a plain LoRA", got, MERGE)
    if (init := config.get("init_lora_weights")) not in _INITS:
        got = f"`init_lora_weights: {init!r:.40}` in {folder}"
        raise ModelError("an adapter must be trained on the unchanged base", got, _CONVERT)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        rule = "weights must be safetensors, since pickle can run code"
        remedy = "load a trusted copy with PEFT and call save_pretrained"
        raise ModelError(rule, f"only {pickles[0]} in {folder}", remedy)


def _with_one_rank(
    stored: Mapping[str, Any], factors: Mapping[str, Factors]
) -> tuple[LinkConfig, dict[str, Factors]]:
    """Return the config of a link, and the factors converted to its rank and scaling."""
    rslora = bool(stored.get("use_rslora"))
    rank = max(pair.a.shape[0] for pair in factors.values())
    stored_rank, stored_alpha = stored["r"], stored["lora_alpha"]
    power = 0.5 if rslora else 1.0
    scaling = stored_alpha / stored_rank**power
    config = LinkConfig(
        rank=rank,
        alpha=stored_alpha if rank == stored_rank else scaling * rank**power,
        rslora=rslora,
        dropout=stored.get("lora_dropout", 0.0),
        lora_bias=bool(stored.get("lora_bias")),
        target_modules=tuple(sorted(factors)),
    )
    converted = {}
    for name, pair in factors.items():
        ratio = _module_scaling(stored, name, pair, power) / scaling
        if not math.isclose(ratio, 1.0, rel_tol=1e-12):  # fold it into B and its bias
            bias = None if pair.bias is None else pair.bias * ratio
            pair = replace(pair, b=pair.b * ratio, bias=bias)
        converted[name] = padded(pair, rank)
    return config, converted


def _module_scaling(stored: Mapping[str, Any], name: str, pair: Factors, power: float) -> float:
    """Return the scaling of a module. Raises ValueError if its factors have another rank."""
    ranks, alphas = stored.get("rank_pattern") or {}, stored.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), stored["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), name), stored["lora_alpha"])
    if rank != pair.a.shape[0]:
        raise ValueError(f"rank {rank} for factors of rank {pair.a.shape[0]} at {name}")
    return alpha / rank**power

"""Read and write links as PEFT adapters: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chainlora.chain.adapters.targets import peft_config
from chainlora.chain.link import Factors
from chainlora.config.schema import LinkConfig
from chainlora.errors import ModelError, RunError
from chainlora.files import reported, save_tensors

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
MERGE = "merge it with PEFT, and use the result as the model"
MAGNITUDE = ".lora_magnitude_vector"  # DoRA


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
        rank: rank of the stored factors; a PiSSA link stores twice its tuned rank.
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
        if ".lora_" in name and name.removesuffix(MAGNITUDE) not in factors:
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

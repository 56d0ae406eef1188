"""A link on disk: an ordinary PEFT adapter, ``adapter_config.json`` and
``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from chainlora.chain.adapters.factors import Factors
from chainlora.chain.adapters.targets import peft_config
from chainlora.config.schema import LinkConfig
from chainlora.errors import RunError

_PREFIX = "base_model.model."


def save_adapter(
    directory: Path,
    factors: Mapping[str, Factors],
    config: LinkConfig,
    *,
    rank: int,
    alpha: float,
    base: str,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an ordinary PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    `rank` and `alpha` are of the stored factors (a PiSSA link stores twice its tuned rank). `extra`
    maps parameter paths of trained extra modules to their weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, share in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = share.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = share.b.contiguous()
        if share.bias is not None:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = share.bias
        if share.magnitude is not None:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = share.magnitude
    for path, weight in (extra or {}).items():
        tensors[f"{_PREFIX}{path}"] = weight.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    written = peft_config(
        config,
        r=rank,
        lora_alpha=alpha,
        base_model_name_or_path=base,
        inference_mode=True,
        target_modules=sorted(factors),
        exclude_modules=None,
        modules_to_save=sorted({path.rpartition(".")[0] for path in extra or {}}) or None,
        init_lora_weights=True,
    )
    written.save_pretrained(str(directory))


def load_adapter(directory: Path) -> tuple[dict[str, Factors], dict[str, Tensor], dict[str, Any]]:
    """Read a saved adapter: factors by module, extra weights by parameter path, and its PEFT config
    as a dict."""
    try:
        tensors = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"a link must be a whole PEFT adapter (got {directory}: {error}); the run directory "
            "is half there"
        ) from None
    except Exception as error:  # safetensors raises its own class for a truncated file
        raise RunError(
            f"a link's weights must be readable (got {directory}: {error}); the run directory is "
            "half there: copy it "
            "whole, or train anew"
        ) from None
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    modules = [
        name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    ]
    factors = {}
    for name in modules:
        factors[name] = Factors(
            tensors.pop(f"{name}.lora_A.weight").float(),
            tensors.pop(f"{name}.lora_B.weight").float(),
            tensors.pop(f"{name}.lora_B.bias", None),
            tensors.pop(f"{name}.lora_magnitude_vector", None),
        )
    return factors, tensors, config

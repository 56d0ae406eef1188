"""A link on disk: an ordinary PEFT adapter, ``adapter_config.json`` and
``adapter_model.safetensors``."""

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
MERGE = "merge it with PEFT, and take the result as the model"
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, which `import_adapter` reads


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
    """Write an ordinary PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Equal links give equal bytes. Write into a scratch folder (`files.replaced_folder`).

    Args:
        rank: of the stored factors; a PiSSA link stores twice its tuned rank.
        alpha: of the stored factors.
        fan_in_fan_out: whether the adapted layers store their weights (in × out), as GPT-2 does.
        task_type: PEFT's name of what the model is for.
    """
    tensors: dict[str, Tensor] = {}
    for name, share in factors.items():
        tensors[f"{_PREFIX}{name}{_A}"] = _stored(share.a)
        tensors[f"{_PREFIX}{name}{_B}"] = _stored(share.b)
        if share.bias is not None:
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = share.bias
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
    # PEFT's own writer lists sets in whatever order the process has them in.
    tree = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in written.to_dict().items()
    }
    with reported(directory):
        text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
        (directory / _CONFIG).write_text(text, encoding="utf-8")


def _stored(factor: Tensor) -> Tensor:
    """Return a factor in float16 if that holds its values, as it does those of soft knots."""
    narrow = factor.half()
    return (narrow if torch.equal(narrow.float(), factor) else factor).contiguous()


def load_adapter(directory: Path) -> dict[str, Factors]:
    """Read the factors of a link by module. Raises RunError unless they are all that is there."""
    factors, beside = read_adapter(directory)
    if beside:
        raise damaged(directory, f"weights beside factors, at {min(beside)}")
    return factors


def read_adapter(directory: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Read a saved adapter: factors by module, and other tensors in it by parameter path.

    Raises RunError unless it is whole: every module has both factors, of one rank. Raises
    ModelError for a LoRA on an embedding.
    """
    with _whole(directory):
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
    modules_left = ((name, name.removesuffix(MAGNITUDE)) for name in tensors if ".lora_" in name)
    left = [name for name, module in modules_left if module not in factors]
    if left:
        raise damaged(directory, f"{left[0]} without its factors")
    return factors, tensors


def read_config(directory: Path) -> dict[str, Any]:
    """Read PEFT's config of a saved adapter. Raises RunError unless it is a JSON object."""
    with _whole(directory):
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise damaged(directory, "an adapter_config.json that is not an object")
    return config


@contextmanager
def _whole(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise damaged(directory, error.strerror or str(error)) from None
    except (ValueError, RecursionError, SafetensorError) as error:
        raise damaged(directory, error) from None


def damaged(directory: Path, what: object) -> RunError:
    return RunError(
        f"a link must be a whole PEFT adapter (got {what} in {directory}); the folder is "
        "incomplete: copy it whole, or start over"
    )

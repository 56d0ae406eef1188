"""Load a model into several processes, each the rows that it holds, read from the checkpoint.

The model is made without weights, its parameters are cut into parts, and each process reads its
rows by memory map. So none ever holds the whole model, and between them they read it once. Where
the tensors of a checkpoint are not the model's parameters one by one (stacked experts, weights
that transformers converts), each process loads the whole model first and then cuts it.

By ZeRO-3 (`models.zero3`) the first process reads each weight and sends it to the others.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from chainlora.errors import ModelError
from chainlora.models import shards, zero3
from chainlora.models.checkpoint import Checkpoint, Stored
from chainlora.models.loading import load_model, make_model, open_folder, settle

log = logging.getLogger(__name__)


def load_shards(
    spec: str | Path,
    dtype: torch.dtype,
    count: int,
    device: torch.device,
    kind: Literal["fsdp2", "zero3"] = "fsdp2",
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)`` as `load_model` does, frozen, cut into `count` parts.

    Raises ModelError as `load_model` does, and where what cuts it does not suit the model.
    """
    folder, config, tokenizer = open_folder(spec)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"processes share weights of 16 or 32 bits (got {folder}, whose config.json has a "
            "quantization_config); leave train.shard out: each process then holds the whole model"
        )
    with init_empty_weights(include_buffers=False):
        model = make_model(config, spec, dtype=dtype)
    model.tie_weights()
    stored, reason = _find_tensors(model, folder, dtype)
    if reason is not None:
        log.warning("each process loads all of %s before it keeps its share: %s", folder, reason)
        model, tokenizer = load_model(spec, dtype)
    else:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        settle(model, tokenizer, folder)
    model.requires_grad_(False)
    if kind == "zero3":
        read = (lambda name: stored[name].read()) if reason is None else None
        zero3.share(model, read, dtype, device)
        return model.eval(), tokenizer
    shards.shard(model, count, device)
    if reason is not None:
        model.to(device)
    else:
        _materialise(model, device)
        with torch.no_grad():
            for name, tensor in _weights(model).items():
                shards.local(tensor).copy_(stored[name].read(shards.rows(tensor)))
    shards.start(model)
    return model.eval(), tokenizer


def _find_tensors(
    model: Any, folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Stored], str | None]:
    """Return the stored tensor of every parameter, or why the rows cannot be read one by one."""
    for change in get_model_conversion_mapping(model):  # most change names alone
        if isinstance(change, WeightConverter):
            kind = type(change).__name__
            return {}, f"its weights are converted while they load ({kind})"
    if dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        return {}, "some of its weights stay in float32"
    checkpoint, found = Checkpoint(folder), {}
    for name, tensor in _weights(model).items():
        match = next(checkpoint.find(name, tuple(tensor.shape)), None)
        if match is None:
            return {}, f"the checkpoint has no tensor of the name and shape of {name}"
        found[name] = match
    return found, None


def _weights(model: Any) -> dict[str, Tensor]:
    """Return the parameters and saved buffers of a model, those that are tied once."""
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _materialise(model: Any, device: torch.device) -> None:
    """Give a model on the meta device memory for the rows that this process holds."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])

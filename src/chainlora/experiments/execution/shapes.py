"""The matmuls of a model, from its config alone: built on the meta device, without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from chainlora.experiments.execution.flops import Matmul, Shapes
from chainlora.models.finding import resolve_model

_BLOCK = re.compile(r"\.(\d+)\.")
_LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_A\b")


def adapted_modules(run: Path) -> frozenset[str]:
    """Return the names of the modules that the first link of a run adapts."""
    files = sorted((run / "links").glob("*/adapter_model.safetensors"))
    if not files:
        return frozenset()
    with safe_open(files[0], framework="pt") as file:
        return frozenset(match[1] for match in map(_LORA_KEY.match, file.keys()) if match)


def model_shapes(model: str, adapted: Iterable[str]) -> Shapes:
    """Return the matmuls of a model, from its config alone."""
    config = AutoConfig.from_pretrained(str(resolve_model(model) or model))
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return shapes_of(built, adapted)


def shapes_of(model: Any, adapted: Iterable[str]) -> Shapes:
    """Return the matmuls of a built model; `adapted` names modules."""
    adapted, head = frozenset(adapted), model.get_output_embeddings()
    matmuls = [
        Matmul(name, *_in_out(module), block=_block(name), adapted=name in adapted)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    blocks = 1 + max(matmul.block for matmul in matmuls)
    after = [
        m.name for m in matmuls if m.block < 0 and m.name.rpartition(".")[2] in ("project_out",)
    ]
    matmuls = [
        m if m.name not in after else Matmul(m.name, m.num_in, m.num_out, blocks, m.adapted)
        for m in matmuls
    ]
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    num_in, num_out = _in_out(head)
    return Shapes(
        tuple(matmuls),
        num_in,
        num_out,
        width * text.num_hidden_layers,
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _in_out(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _block(name: str) -> int:
    match = _BLOCK.search(name)
    return int(match[1]) if match else -1

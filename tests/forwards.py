"""Parts of the engine by themselves, for tests that compare one of them with plain transformers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from chainlora.engine import bf16_matmul, lora_layer
from chainlora.engine.attention import packed_name
from chainlora.engine.decoder_layer import (
    install_fast_layers,
    layers_to_probe,
    why_plain_layers,
)
from chainlora.engine.hidden_states import ForwardPath as Path
from chainlora.engine.hidden_states import packed_hidden, padded_hidden
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import Patches, patched_modules
from chainlora.engine.probes import examine
from chainlora.models.text_config import base_model

__all__ = ["Path"]


def hidden_states(model: nn.Module, batch: PackedBatch, *, path: Path) -> Tensor:
    """Hidden states by one path; under gradient checkpointing the packed one stays set."""
    if path is Path.PADDED:
        return padded_hidden(model, batch)
    patches = Patches()
    patches.set_attention(base_model(model), packed_name)
    try:
        return packed_hidden(model, batch)
    finally:
        if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            patches.restore()


def choose_path(model: nn.Module) -> Path:
    """The path that the probes allow."""
    found = examine(model, training=True, packing=True)
    return Path.PACKED if found.packed is None else Path.PADDED


def accelerate_model(model: nn.Module) -> int:
    """Fast decoder layers where their probe agrees; how many."""
    bf16_matmul.accelerate_linears(model, Patches())
    watch = layers_to_probe(model)
    calls = examine(model, training=True, packing=True, watch=watch).calls
    if why_plain_layers(model, calls, training=True) is None:
        return install_fast_layers(model, Patches())
    return 0


def accelerate_lora(model: nn.Module) -> int:
    """The fused forward for every LoRA layer; how many would take it now."""
    layers = [module for module in model.modules() if lora_layer.is_lora_layer(module)]
    return accelerate_layers(layers)


def accelerate_layers(layers: Iterable[nn.Module]) -> int:
    """The fused forward for these layers; how many would take it now."""
    return lora_layer.accelerate_layers(layers, Patches())


def accelerate_linears(model: nn.Module) -> int:
    """Matmuls of bfloat16 by float32; how many layers."""
    return bf16_matmul.accelerate_linears(model, Patches())


def restore(model: nn.Module) -> int:
    """Every forward of ours taken off; how many."""
    patched = patched_modules(model)
    for module in patched:
        del module.forward
    return len(patched)

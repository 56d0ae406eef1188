"""Parts of the engine by themselves, for tests that compare one of them with plain transformers."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from chainlora.data.examples import Example
from chainlora.engine.fast_path import PACKED
from chainlora.engine.packing import PackedBatch, pack, padded_hidden
from chainlora.engine.patching import installed
from chainlora.engine.probes import examine
from chainlora_fast.decoder_layers import DecoderLayers
from chainlora_fast.linear_layers import (
    Bfloat16Linears,
    LoraLayers,
    is_lora_layer,
    projection_of,
)
from chainlora_fast.packed_rows import PackedSequences, packed_hidden


class Path(StrEnum):
    PACKED = "packed"
    PADDED = "padded"


def hidden_states(model: nn.Module, batch: PackedBatch, *, path: Path) -> Tensor:
    """Hidden states by one path; under gradient checkpointing the packed one stays set."""
    if path is Path.PADDED:
        return padded_hidden(model, batch)
    packed = PackedSequences()
    packed.apply(model)
    try:
        return packed_hidden(model, batch)
    finally:
        if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            packed.undo()


def gradients(model: nn.Module, batch: PackedBatch, path: Path = Path.PACKED) -> Found:
    """Hidden states by one path, and the gradients of a weighted sum of them."""
    model.zero_grad()
    hidden = hidden_states(model, batch, path=path)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads


# Relative differences. float64 and float32: the same sums over at most 64 terms in another order,
# two layers deep; Llama's norm and rotary angles are float32 in a float64 model too. bfloat16: 2⁻⁸
# a rounding, some twenty of them, and a bias's gradient is a running sum over 30 rows.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-4}
Found = tuple[Tensor, dict[str, Tensor]]  # hidden states, and gradients by name


def assert_close(mine: Tensor, theirs: Tensor, dtype: torch.dtype, least: float = 0.0) -> None:
    assert (mine - theirs).norm() <= TOLERANCE[dtype] * max(theirs.norm().item(), least)


def assert_same(mine: Found, theirs: Found, dtype: torch.dtype, floor: float = 0.0) -> None:
    """The same states and gradients; `floor` is a share of the largest gradient."""
    (states, grads), (expected, expected_grads) = mine, theirs
    assert states.shape == expected.shape
    assert_close(states, expected, dtype)
    assert grads.keys() == expected_grads.keys()
    least = floor * max(grad.norm().item() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, dtype, least)


def choose_path(model: nn.Module) -> Path:
    """The path that the probes allow."""
    reason = PackedSequences().probe(model, examine(model, training=True))
    return Path.PACKED if reason is None else Path.PADDED


def accelerate_model(model: nn.Module) -> int:
    """Fast decoder layers where their probe agrees; how many."""
    Bfloat16Linears().apply(model)
    packed, layers = PackedSequences(), DecoderLayers()
    facts = examine(model, training=True)
    facts.watched = list(layers.watched(model))
    if packed.probe(model, facts) is not None:
        return 0
    packed.apply(model)
    facts.taken.append(PACKED)
    reason = layers.probe(model, facts)
    packed.undo()
    if reason is not None:
        return 0
    layers.apply(model)
    return sum(bool(installed(layer)) for layer in model.base_model.layers)


def accelerate_lora(model: nn.Module) -> int:
    """The fused forward for every LoRA layer; how many would take it now."""
    layers = list(filter(is_lora_layer, model.modules()))
    LoraLayers().adapt(layers)
    return sum(bool(installed(layer)) and projection_of(layer) is not None for layer in layers)


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is one of ours."""
    return [module for module in model.modules() if installed(module)]


def accelerate_linears(model: nn.Module) -> int:
    """Matmuls of bfloat16 by float32; how many layers."""
    Bfloat16Linears().apply(model)
    return len(patched_modules(model))


def restore(model: nn.Module) -> int:
    """Every forward of ours taken off; how many."""
    patched = patched_modules(model)
    for module in patched:
        del module.forward
    return len(patched)


# --- what is run

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def example(row: int, *sequences: tuple[int, ...], first: int = -1) -> Example:
    spans = tuple(((len(s) + first if first < 0 else first, len(s)),) for s in sequences)
    return Example(row, sequences, spans, 0)


def flat_batch() -> PackedBatch:
    return pack(
        [example(i, tuple(range(i, i + size))) for i, size in enumerate((2, 5, 17, 9, 9, 3))]
    )


def tree_batch() -> PackedBatch:
    """Trees of depth three, a lone sequence, one inside another, every token scored."""
    root = tuple(range(3, 15))
    branch = (*root, 21, 22, 23)
    examples = [
        example(0, (*branch, 31, 32), (*branch, 41, 42, 43), first=1),
        example(1, (*root, 51, 52, 53, 54), root, first=1),
        example(2, (7, 8, 9), first=1),
    ]
    return pack(examples, min_shared=2)


def text_batch() -> PackedBatch:
    return pack([Example(i, (tuple(range(i, i + n)),), (((1, n),),)) for i, n in enumerate((4, 9))])


BATCHES = {"flat": flat_batch, "tree": tree_batch, "text": text_batch}

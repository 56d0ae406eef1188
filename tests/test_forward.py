"""The packed path equals the plain one, gradients included, on every architecture; when it is not
taken."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from forwards import (
    BATCHES,
    SHAPE,
    Path,
    choose_path,
    example,
    gradients,
    hidden_states,
    tree_batch,
)
from torch import Tensor, nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from chainlora import Chain, LinkConfig
from chainlora.engine.engine import Engine
from chainlora.engine.fast import packed_layout as layout
from chainlora.engine.packing import PackedBatch, pack

# The same sums over at most 64 terms in another order, two layers deep; Llama's norm and rotary
# angles are float32 in a float64 model too. bfloat16: 2⁻⁸ a rounding, and a bias's gradient is a
# running sum over 30 rows.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-4}


def assert_close(
    mine: Tensor, theirs: Tensor, dtype: torch.dtype, scale: float | None = None
) -> None:
    scale = theirs.norm().item() if scale is None else scale
    assert (mine - theirs).norm() <= TOLERANCE[dtype] * scale


def assert_paths_agree(model: nn.Module, batch: PackedBatch, dtype: torch.dtype) -> None:
    plain, plain_grads = gradients(model, batch, Path.PADDED)
    packed, packed_grads = gradients(model, batch, Path.PACKED)
    assert packed.shape == (len(batch.rows), plain.shape[1])
    assert_close(packed, plain, dtype)
    assert packed_grads.keys() == plain_grads.keys()
    # a key's bias moves no softmax: its gradient is zero up to the rounding of the others, hence
    # the floor
    floor = max(g.norm().item() for g in plain_grads.values()) / 100
    for name, grad in plain_grads.items():
        assert_close(packed_grads[name], grad, dtype, max(grad.norm().item(), floor))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded(architecture: str, kind: str, dtype: torch.dtype) -> None:
    assert_paths_agree(tiny_model(architecture, dtype=dtype), BATCHES[kind](), dtype)


@pytest.mark.parametrize("limits", [{"LONGEST_BY_MATMUL_ELSE": 0}, {"LONGEST_KEPT": 0, "PIECE": 3}])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded_for_long_sequences(
    architecture: str, kind: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the first limit attention is SDPA; beyond the second queries are cut into pieces, and
    probabilities are made again in backward."""
    for name, value in limits.items():
        monkeypatch.setattr(layout, name, value)
    assert_paths_agree(
        tiny_model(architecture, dtype=torch.float64), BATCHES[kind](), torch.float64
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing(architecture: str) -> None:
    model, batch = tiny_model(architecture, dtype=torch.float64), tree_batch()
    expected, grads = gradients(model, batch, Path.PACKED)
    model.gradient_checkpointing_enable()
    model.train()  # checkpointing only acts here; every dropout of these models is zero
    got, checkpointed = gradients(model, batch, Path.PACKED)
    torch.testing.assert_close(got, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad)
    plain, _ = gradients(
        model, batch, Path.PADDED
    )  # the name stays set, and a plain call is still plain
    assert_close(plain, expected, torch.float64)


def test_layers_are_probed_under_checkpointing_too() -> None:
    """Where links are on the model it asks for the layer's own forward, which is no probe."""
    config = SmolLM3Config(**SHAPE, no_rope_layers=[1, 0])  # the second one is not turned
    model = SmolLM3ForCausalLM(config).requires_grad_(False)
    Chain(model).extend(LinkConfig(rank=2, target_modules=("q_proj",)))
    model.gradient_checkpointing_enable()
    with Engine(model, training=True) as engine:
        assert any("fast forward of layer 1 differs" in note for note in engine.notes)


def test_a_sequence_beyond_the_window_takes_the_padded_path() -> None:
    # use_sliding_window is Qwen2's word, which Mistral does not read
    config = MistralConfig(**SHAPE, sliding_window=12, use_sliding_window=False)
    torch.manual_seed(0)
    model = MistralForCausalLM(config).double().eval()
    assert choose_path(model) is Path.PACKED
    within = pack([example(0, tuple(range(12))), example(1, tuple(range(40, 47)))])
    beyond = pack([example(0, tuple(range(30))), example(1, tuple(range(40, 47)))])
    assert_paths_agree(model, within, torch.float64)
    with Engine(model, training=False) as engine:
        assert "up to 12 tokens each (its attention window)" in engine.notes[0]
        packed, plain = engine.hidden(beyond), hidden_states(model, beyond, path=Path.PADDED)
    assert torch.equal(packed, plain)
    model.config.sliding_window = 5
    assert choose_path(model) is Path.PADDED

"""Packing: every sequence can be read back. The packed path equals the plain one, gradients
included, on every architecture; when it is not taken."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from forwards import (
    BATCHES,
    SHAPE,
    TOLERANCE,
    Path,
    assert_close,
    assert_same,
    choose_path,
    example,
    gradients,
    hidden_states,
    tree_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from chainlora import Chain, LinkConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.packing import PackedBatch, input_sequences, pack
from chainlora_fast import packed_layout as layout


def visible(batch: PackedBatch, position: int) -> list[int]:
    """Return the packed positions a position sees, by the definition of segments, in sequence
    order."""
    index = next(i for i, (start, end, _) in enumerate(batch.segments) if start <= position < end)
    seen = list(range(batch.segments[index].start, position + 1))
    while (index := batch.segments[index].parent) >= 0:
        seen = list(range(batch.segments[index].start, batch.segments[index].end)) + seen
    return seen


def check_reads_back(batch: PackedBatch, examples: list[Example]) -> None:
    sequences = [s for e in examples for s in e.sequences]
    spans = [s for e in examples for s in e.scored]
    scored = [[p for start, end in each for p in range(start, end)] for each in spans]
    expected = [(i, p) for i, places in enumerate(scored) for p in places]
    assert batch.token_sequence.tolist() == [i for i, _ in expected]
    assert batch.token_target.tolist() == [sequences[i][p] for i, p in expected]
    for n, (i, p) in enumerate(expected):
        seen = visible(batch, int(batch.rows[batch.token_row[n]]))
        assert tuple(batch.input_ids[seen].tolist()) == sequences[i][:p]
        assert batch.position_ids[seen].tolist() == list(range(p))
    assert batch.sequence_length.tolist() == list(map(len, scored))
    assert len(set(batch.rows.tolist())) == len(batch.rows)


tokens = st.lists(st.integers(0, 2), min_size=2, max_size=7).map(tuple)


@st.composite
def some_examples(draw: st.DrawFn) -> list[Example]:
    examples = []
    for row in range(draw(st.integers(1, 4))):
        sequences = draw(st.lists(tokens, min_size=1, max_size=3).map(tuple))
        scored = []
        for sequence in sequences:
            start = draw(st.integers(1, len(sequence) - 1))
            scored.append(((start, draw(st.integers(start + 1, len(sequence)))),))
        examples.append(Example(row, sequences, tuple(scored), draw(st.sampled_from([None, 0]))))
    return examples


@settings(max_examples=150, deadline=None)
@given(some_examples(), st.booleans(), st.integers(1, 4))
def test_every_sequence_reads_back(examples: list[Example], share: bool, min_shared: int) -> None:
    batch = pack(examples, share_prefixes=share, min_shared=min_shared)
    check_reads_back(batch, examples)
    one_by_one = sum(len(tokens) for each in examples for tokens in input_sequences(each))
    assert batch.num_tokens <= one_by_one
    if not share:
        assert batch.num_tokens == one_by_one


# --- the packed path ---


def assert_paths_agree(model: nn.Module, batch: PackedBatch, dtype: torch.dtype) -> None:
    plain, packed = (gradients(model, batch, path) for path in (Path.PADDED, Path.PACKED))
    assert len(packed[0]) == len(batch.rows)
    # a key's bias moves no softmax: its gradient is zero up to the rounding of the others, hence
    # the floor
    assert_same(packed, plain, dtype, floor=0.01)


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
    model = tiny_model(architecture, dtype=torch.float64)
    assert_paths_agree(model, BATCHES[kind](), torch.float64)


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
    # the name stays set, and a plain call is still plain
    plain, _ = gradients(model, batch, Path.PADDED)
    assert_close(plain, expected, torch.float64)


def test_layers_that_differ_are_all_probed_under_checkpointing_too() -> None:
    """Where links are on the model it asks for the layer's own forward, which is no probe.

    Every fourth layer of SmolLM3 has no rotary embedding, here the second one.
    """
    config = SmolLM3Config(**SHAPE | {"num_hidden_layers": 3}, no_rope_layers=[1, 0, 1])
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

"""Every causal language model of transformers trains as plain transformers and peft, or is refused.

A tiny model of each class goes through `train`, scoring and export (`architectures.checks`). A
sample runs always; all of them with ``CHAINLORA_FULL=1``, every third one with ``0/3``. The list of
classes is transformers' own, so that new ones come in by themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from architectures.checks import cases, check, example_config
from architectures.tiny import IMPOSSIBLE, model_types, tiny_model

from chainlora import train
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError, ModelError
from chainlora.models.text_config import base_model, context_length

FULL = os.environ.get("CHAINLORA_FULL")
# Those that take seconds; CI runs a share of all of them beside this.
SAMPLE = ["gpt2", "gemma3_text", "zamba"]
# What is refused, by what it says; everything else trains.
REFUSED = {
    "big_bird": "attention_type: block_sparse",
    "bigbird_pegasus": "attention_type: block_sparse",
    "cpmant": "must be causal",
    "emu3": "must be a causal language model",
    "gemma4_unified_assistant": "must run on token ids alone",
    "mllama": "must be a causal language model",
    "prophetnet": "logits must be the head",
    "reformer": "draws random numbers in evaluation",
    "xlm": "must be causal",
    "xlnet": "must be causal",
    "zamba": "share their weights",
    "zamba2": "share their weights",
}


def chosen() -> list[str]:
    """What is asked for: the sample, all, or a share such as 0/3."""
    if not FULL:
        return SAMPLE
    share, _, of = FULL.partition("/")
    return list(cases())[int(share) :: int(of)] if of else list(cases())


@pytest.mark.parametrize("name", chosen())
def test_trains_as_plain_transformers_and_peft_or_is_refused(name: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # micro-batches side by side, where the engine dares
    try:
        result = check(name, tmp_path)
    finally:
        torch.set_num_threads(threads)
    if name in REFUSED:
        assert result.outcome == "refused", result.why
        assert REFUSED[name] in result.why
    else:
        assert result.outcome == "right", result.why


def test_the_lists_are_of_classes_that_exist() -> None:
    assert set(IMPOSSIBLE) <= set(model_types())
    assert set(REFUSED) | set(SAMPLE) <= set(cases())


@pytest.mark.skipif(not FULL, reason="builds every class (CHAINLORA_FULL=1)")
@pytest.mark.parametrize("name", sorted(IMPOSSIBLE))
def test_what_cannot_be_made_tiny_still_cannot(name: str) -> None:
    try:
        tiny_model(name)
    except Exception:  # whatever transformers says
        return
    pytest.fail("it can now: take it out of IMPOSSIBLE")


RANDOM = {
    "dropout of the residual (Seed-OSS)": ("seed_oss", {"residual_dropout": 0.2}),
    "noise on the router (PhiMoE)": (
        "phimoe",
        {"router_jitter_noise": 0.2, "input_jitter_noise": 0.2},
    ),
    "layers that are skipped (OPT)": ("opt", {"layerdrop": 0.5}),
    "dropout of attention (Llama)": ("llama", {"attention_dropout": 0.2}),
}


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_is_found_whatever_it_is_called(name: str, two_threads: None) -> None:
    """One thread draws from the generator in one order, and the model's own layers draw."""
    model_type, changes = RANDOM[name]
    model = tiny_model(model_type, **changes).requires_grad_(False)
    examples = [Example(i, (tuple(range(30 + i)),), (((5, 30 + i),),)) for i in range(8)]
    with Engine(model, training=True) as engine:
        assert engine.num_threads == 1
        assert "random numbers" in " ".join(engine.notes)
        model.train()
        losses = []
        for _ in range(2):
            torch.manual_seed(0)
            batches = [engine.pack(shard) for shard in engine.split(examples)]
            losses.append([engine.loss(batch, "completion")[0].item() for batch in batches])
        assert losses[0] == losses[1]
        torch.manual_seed(1)
        assert [engine.loss(batch, "completion")[0].item() for batch in batches] != losses[0]


BORDERS = {"roberta": {"pad_token_id": 1}, "whisper": {}, "opt": {}}  # offsets, another name


@pytest.mark.parametrize("name", BORDERS)
def test_the_context_is_what_a_table_of_positions_holds(name: str) -> None:
    model = tiny_model(name, **BORDERS[name])
    row = torch.arange(context_length(model) + 1)[None] % 200 + 3
    base_model(model)(input_ids=row[:, :-1], use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        base_model(model)(input_ids=row, use_cache=False)


def test_attention_that_is_causal_only_beside_padding_is_refused() -> None:
    model = tiny_model("gemma", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=r"must not depend on .*\(got GemmaForCausalLM"):
        Engine(model, training=False)


def test_words_in_a_config_are_no_factors_and_what_is_left_out_is_said() -> None:
    """MPT takes a word as `logit_scale`; the loss of a router is no part of the likelihood."""
    with Engine(tiny_model("mpt", logit_scale="inv_sqrt_d_model"), training=True) as engine:
        assert not any("router" in note for note in engine.notes)
    with Engine(tiny_model("mixtral", output_router_logits=True), training=True) as engine:
        assert engine.notes[0] == "auxiliary loss of the router (`output_router_logits`): not used"


def test_gradient_checkpointing_is_refused_where_a_class_has_none(tmp_path: Path) -> None:
    keys = example_config(tiny_model("ctrl"), tmp_path).model_dump()
    keys["train"]["gradient_checkpointing"] = True
    with pytest.raises(ConfigError, match=r"checkpointing.*\(got CTRLLMHeadModel\); leave it out"):
        train(keys)
    assert not (tmp_path / "run").exists()


def test_nothing_random_is_found_where_nothing_is_drawn(two_threads: None) -> None:
    with Engine(tiny_model("opt", layerdrop=0.0), training=True) as engine:
        assert engine.num_threads == 2

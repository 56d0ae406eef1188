"""A LoRA on an embedding: trains, ties, is undone, saved, exported; and tied weights are tied once.

PEFT adapts an embedding under names of its own, and looks columns of A up by token.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_tiny_folder, tiny_model
from helpers import settings
from helpers_export import logits as logits_of
from helpers_integrations import make_trainer
from helpers_integrations import plain_model as load
from safetensors.torch import load_file
from transformers import AutoTokenizer

from chainlora import (
    Chain,
    ChainCallback,
    LinkConfig,
    carry_moments,
    export_adapter,
    export_merged,
    load_chain,
    save_chain,
    train,
)
from chainlora.errors import ModelError

IDS = torch.tensor([[5, 9, 30, 7, 11, 60], [8, 100, 17, 6, 44, 3]])
LINK = LinkConfig(rank=4, alpha=8, target_modules=("embed_tokens", "q_proj"))
logits = partial(logits_of, ids=IDS)
# A token's row W + s·B·A is summed in another order than W and s·B·A by themselves: float32
# rounding of logits below 10 over two layers.
ROUNDING = 5e-5


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hub") / "untied", tie_word_embeddings=False)


def tune(chain: Chain, steps: int = 3, share: float = 0.0) -> None:
    optimizer = torch.optim.AdamW(chain.parameters(), lr=2e-2)

    def update(_: int) -> None:
        chain.model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if share:
            carry_moments(optimizer, chain.live, chain.tie_share(share))

    chain.tune(range(steps), update)


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["whole knots", "soft knots"])
@pytest.mark.parametrize("hold", ["tied", "carried"])
def test_a_chain_with_an_embedding(untied, tmp_path, hold, share):
    chain = Chain(load(untied), hold=hold, checkpoint=untied)
    start = logits(chain.model)
    for _ in range(2):
        before = logits(chain.model)
        chain.extend(LINK)
        torch.testing.assert_close(logits(chain.model), before, atol=ROUNDING, rtol=0)
        tune(chain, share=share)
        live = logits(chain.model)
        assert (live - before).abs().max() > 0.1
        chain.tie()
        # a link with soft knots is stored to a relative error of 3e-3
        atol = 2e-2 if share else ROUNDING
        torch.testing.assert_close(logits(chain.model), live, atol=atol, rtol=0)
    link = chain.links[-1].factors["model.embed_tokens"]
    assert link.of_embedding
    assert link.a.any()

    end = logits(chain.model)
    save_chain(chain, tmp_path / "chain")
    again = load_chain(tmp_path / "chain", load(untied))
    assert torch.equal(logits(again.model), end)
    export_adapter(chain, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names
    loaded = peft.PeftModel.from_pretrained(load(untied), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), end, atol=ROUNDING, rtol=0)
    chain.drop(2)
    assert torch.equal(logits(chain.model), start)


@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_a_run_and_its_exports(untied, sentiment, tmp_path, speedups):
    keys = {"target_modules": ["embed_tokens", "q_proj"], "ranks": [4, 2], "steps": [4, 3]}
    tree = settings(untied, sentiment, tmp_path / "run", chain=keys, train={"speedups": speedups})
    result = train(tree)
    assert result["steps"] == 7
    export_merged(tmp_path / "run", tmp_path / "merged")
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(untied), tmp_path / "adapter")
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(merged), atol=ROUNDING, rtol=0)
    embedding = load(untied).model.embed_tokens.weight
    assert not torch.equal(merged.model.embed_tokens.weight, embedding)
    assert torch.equal(merged.lm_head.weight, load(untied).lm_head.weight)


def test_a_trainer(untied, tmp_path):
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"])
    model = peft.get_peft_model(load(untied), lora)
    tokenizer = AutoTokenizer.from_pretrained(untied)
    trainer = make_trainer(model, tokenizer, tmp_path, ChainCallback([4, 2]))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = peft.PeftModel.from_pretrained(load(untied), tmp_path / "final")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), atol=ROUNDING, rtol=0)


def test_positions_beside_layers_that_store_in_by_out(tmp_path):
    """GPT-2: PEFT is told of the layout of its Conv1D, which an embedding has whatever it is."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    chain = Chain(model)
    chain.extend(LinkConfig(rank=2, alpha=4, target_modules=("wpe", "c_attn")))
    tune(chain)
    export_adapter(chain, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    live = logits(chain.model)
    torch.testing.assert_close(logits(loaded), live, atol=ROUNDING, rtol=0)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), live, atol=ROUNDING, rtol=0)


# --- tied weights ---


def test_a_tied_model_is_tied_once_and_stays_tied(configure, tiny_folder, tmp_path):
    """All its linear layers are linked; the head, which is the embedding, is not."""
    chain = Chain(load(tiny_folder), checkpoint=tiny_folder)
    chain.extend(LinkConfig(rank=4, alpha=8))
    tune(chain)
    live = logits(chain.model)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), live, atol=ROUNDING, rtol=0)
    model = chain.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load(tiny_folder).lm_head.weight)

    keys = {"target_modules": "all-linear"}
    train(configure(chain=keys))
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_two_that_are_tied_is_refused_until_they_are_not(tiny_folder, tmp_path, target):
    model = load(tiny_folder)
    config = LinkConfig(rank=4, alpha=8, target_modules=(target, "q_proj"))
    with pytest.raises(ModelError, match=r"head or embedding that are tied \(got .*untie") as told:
        Chain(model).extend(config)
    assert len(str(told.value).splitlines()) == 1

    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    chain = Chain(model)
    chain.extend(config)
    tune(chain)
    live = logits(model)
    chain.tie()
    torch.testing.assert_close(logits(model), live, atol=ROUNDING, rtol=0)
    chain.detach().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), live, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"lora_bias": True}, r"takes a plain LoRA \(got lora_bias"),
        ({"init": "gradient"}, r"takes a plain LoRA \(got init: gradient"),
    ],
    ids=str,
)
def test_what_an_embedding_cannot_do(untied, keys, rule):
    with pytest.raises(ModelError, match=rule):
        Chain(load(untied)).extend(LinkConfig(rank=2, target_modules=("embed_tokens",), **keys))


def test_an_embedding_that_computes_something_else():
    """OPT's positions are shifted by two."""
    with pytest.raises(ModelError, match=r"look up rows of its weight .*OPTLearnedPositional"):
        Chain(tiny_model("opt")).extend(LinkConfig(rank=2, target_modules=("embed_positions",)))

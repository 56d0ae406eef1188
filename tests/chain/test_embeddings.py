"""Embeddings are not linked, and a head that is tied to one is not either."""

from __future__ import annotations

import pytest
import torch
from helpers_integrations import plain_model as load
from safetensors.torch import load_file
from test_laws import logits, plain_update

from chainlora import Chain, LinkConfig, export_merged, train
from chainlora.errors import ModelError

# W + s·B·A is summed in another order than W and s·B·A by themselves: float32 rounding of logits
# below 10 over two layers.
ROUNDING = 5e-5


def untied(model) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def test_a_tied_model_is_tied_once_and_stays_tied(configure, tiny_folder, tmp_path):
    """All its linear layers are linked; the head, which is the embedding, is not."""
    chain = Chain(load(tiny_folder), checkpoint=tiny_folder)
    chain.extend(LinkConfig(rank=4, alpha=8))
    chain.tune(range(3), plain_update(chain, lr=2e-2))
    live = logits(chain.model)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), live, atol=ROUNDING, rtol=0)
    model = chain.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load(tiny_folder).lm_head.weight)

    train(configure(chain={"target_modules": "all-linear"}))
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")


def test_a_tied_head_is_refused_until_it_is_not(tiny_folder, tmp_path):
    model = load(tiny_folder)
    config = LinkConfig(rank=4, alpha=8, target_modules=("lm_head", "q_proj"))
    with pytest.raises(ModelError, match=r"head that is tied .*\(got .*untie") as told:
        Chain(model).extend(config)
    assert len(str(told.value).splitlines()) == 1

    untied(model)
    chain = Chain(model)
    chain.extend(config)
    chain.tune(range(3), plain_update(chain, lr=2e-2))
    live = logits(model)
    chain.tie()
    torch.testing.assert_close(logits(model), live, atol=ROUNDING, rtol=0)
    chain.detach().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), live, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_refused_by_name_and_left_out_by_default(tiny_folder, tied):
    model = load(tiny_folder)
    if not tied:
        untied(model)
    chain = Chain(model)
    with pytest.raises(ModelError, match=r"only Linear .*got Embedding at model.embed_tokens\)"):
        chain.extend(LinkConfig(rank=2, target_modules=("embed_tokens", "q_proj")))
    assert "model.embed_tokens" not in chain.extend(LinkConfig(rank=2)).layers

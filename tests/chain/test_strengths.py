"""Strengths of links: where they go with a chain, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from test_laws import config, fit, logits, plain_update, tuned_chain

from chain.test_saved_chain import assert_exported, folder_with
from chainlora import export_adapter, load_chain, save_chain


def test_a_saved_chain_keeps_ids_and_has_its_strengths_in_its_links(tmp_path):
    chain = tuned_chain("opt", 3)
    chain.drop(1)
    chain.set_strengths({0: 0.3, 1: 0})
    chain.extend(config("opt"))
    chain.tune(range(2), plain_update(chain))
    save_chain(chain, tmp_path / "chain")
    loaded = load_chain(tmp_path / "chain", tiny_model("opt"))
    assert loaded.strengths == {0: 1, 1: 1}
    # float32: the strength is rounded into B and not into the update
    torch.testing.assert_close(logits(loaded.model), logits(chain.model), rtol=0, atol=1e-6)
    assert loaded.tie().id == chain.tie().id == 3


def test_a_saved_chain_has_the_strengths_of_biases(tmp_path):
    chain = tuned_chain("opt", 1, target_modules=("q_proj",), lora_bias=True)
    chain.set_strengths({0: 0.3})
    save_chain(chain, tmp_path / "chain")
    loaded = load_chain(tmp_path / "chain", tiny_model("opt"))
    # float32: as above
    torch.testing.assert_close(logits(loaded.model), logits(chain.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("links", ["tied", "carried", "with a bias"])
def test_an_adapter_is_exported_at_the_strengths(links, tmp_path):
    if links == "with a bias":
        # Of other modules: PEFT adapts the bias of all of an adapter's layers, or of none.
        chain = tuned_chain("opt", 1, target_modules=("q_proj",), lora_bias=True)
        fit(chain, [config("opt", target_modules=("k_proj",))])
    else:
        chain = tuned_chain("opt", 3, hold=links)
        chain.set_strengths({0: 0, 1: 0.5})
    folder_with(chain, tmp_path / "base", "opt")
    rank = export_adapter(chain, tmp_path / "adapter")["rank"]
    assert rank == (4 if links == "with a bias" else 8)  # nothing of what is off
    assert_exported(chain, tmp_path / "adapter", "opt")


def test_a_link_is_tuned_on_the_strengths_there_are():
    chain = tuned_chain("opt", 2)
    chain.set_strengths({0: 0})
    before = logits(chain.model)
    chain.extend(config("opt"))
    assert torch.equal(logits(chain.model), before)
    chain.tune(range(2), plain_update(chain))
    chain.tie_share(0.5)
    before = logits(chain.model)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), before, atol=1e-4, rtol=0)

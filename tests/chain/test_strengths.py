"""Strengths of links: where they go with a chain, and where they are refused."""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import tiny_model
from test_laws import config, logits, plain_update, tuned_chain

from chainlora import Chain, ChainLoRAError, export_adapter, load_chain, save_chain
from chainlora.chain.adapters import live_factors


def chain_of(*keys: dict, **settings) -> Chain:
    chain = Chain(tiny_model("opt"), **settings)
    for each in keys:
        chain.extend(config("opt", **each))
        chain.tune(range(2), plain_update(chain))
        chain.tie()
    return chain


def test_a_saved_chain_keeps_ids_and_strengths(tmp_path):
    chain = chain_of({}, {}, {})
    chain.drop(1)
    chain.set_strengths({0: 0.25, 1: 0})
    chain.extend(config("opt"))
    chain.tune(range(2), plain_update(chain))
    save_chain(chain, tmp_path / "chain")
    loaded = load_chain(tmp_path / "chain", tiny_model("opt"))
    assert loaded.strengths == {0: 0.25, 1: 0}
    assert torch.equal(logits(loaded.model), logits(chain.model))
    assert loaded.tie().id == chain.tie().id == 3
    links = [path.read_bytes() for path in sorted((tmp_path / "chain/links").rglob("*"))[1:3]]
    chain.set_strengths({0: 1, 1: 1})
    save_chain(chain, tmp_path / "chain")
    again = [path.read_bytes() for path in sorted((tmp_path / "chain/links").rglob("*"))[1:3]]
    assert links == again  # strength is the manifest's


# Of other modules: PEFT adapts the bias of all of an adapter's layers, or of none.
WITH_BIAS = [{"target_modules": ("q_proj",), "lora_bias": True}, {"target_modules": ("k_proj",)}]


@pytest.mark.parametrize(
    ("links", "hold"), [([{}, {}, {}], "tied"), ([{}, {}, {}], "carried"), (WITH_BIAS, "tied")]
)
def test_an_adapter_is_exported_at_the_strengths(links, hold, tmp_path):
    chain = chain_of(*links, hold=hold)
    tiny_model("opt").save_pretrained(tmp_path / "base")
    chain.model.config._name_or_path = str(tmp_path / "base")
    chain.set_strengths({0: 0, 1: 0.5} if len(links) == 3 else {})
    rank = export_adapter(chain, tmp_path / "adapter")["rank"]
    assert rank == (8 if len(links) == 3 else 4)  # nothing of what is off
    loaded = peft.PeftModel.from_pretrained(tiny_model("opt"), tmp_path / "adapter")
    # float32: the same sums in another order
    torch.testing.assert_close(logits(loaded), logits(chain.model), atol=1e-5, rtol=0)


def test_a_link_is_tuned_on_the_strengths_there_are():
    chain = chain_of({}, {})
    chain.set_strengths({0: 0})
    before = logits(chain.model)
    chain.extend(config("opt"))
    assert torch.equal(logits(chain.model), before)
    chain.tune(range(2), plain_update(chain))
    chain.tie_share(0.5)
    before = logits(chain.model)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("links", "strengths", "words"),
    [
        ([{}], {0: float("nan")}, "must be within ±1e+06 (got nan for link 0)"),
        ([{}], {0: 1e300}, "must be within ±1e+06 (got 1e+300 for link 0)"),
        ([{}], {7: 1}, "strengths are set by link id, one of [0] (got 7)"),
    ],
)
def test_what_is_no_strength_is_refused(links, strengths, words):
    chain = chain_of(*links)
    before = logits(chain.model)
    with pytest.raises(ChainLoRAError) as error:
        chain.set_strengths(strengths)
    assert words in str(error.value)
    assert torch.equal(logits(chain.model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_orthogonal_start_reads_nothing_that_earlier_links_read(architecture):
    chain = tuned_chain(tiny_model(architecture), architecture, num_links=2)
    plain = tuned_chain(tiny_model(architecture), architecture, num_links=2)
    before = logits(chain.model)
    adapter, other = (
        each.extend(config(architecture, init=init))
        for each, init in ((chain, "orthogonal"), (plain, "kaiming"))
    )
    assert torch.equal(logits(chain.model), before)
    for name in adapter.layers:
        a, b = live_factors(adapter, name)
        for link in chain.links:
            # float32: rows of norm 1/√3 and less
            assert (link.factors[name].a @ a.T).abs().max() < 1e-6
        drawn, _ = live_factors(other, name)
        torch.testing.assert_close(a.norm(dim=1), drawn.norm(dim=1))
        assert not b.any()
    chain.tune(range(2), plain_update(chain))
    assert torch.any(chain.tie().delta_weight(name))


def test_an_orthogonal_start_needs_free_directions():
    chain = chain_of({"rank": 20})
    with pytest.raises(ChainLoRAError, match=r"16 input directions .*got 20 of 32 in use at"):
        chain.extend(config("opt", rank=16, init="orthogonal"))
    chain.set_strengths({0: 0})  # what is switched off takes nothing
    chain.extend(config("opt", rank=16, init="orthogonal"))

"""What a chain is shown as, and the one sentence for what it cannot take."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_laws import assert_same_weights, config, every_hold, logits, plain_update, tuned_chain
from test_laws import weights as weights_of
from transformers.integrations.finegrained_fp8 import FP8Linear

from chainlora import Chain, ChainLoRAError, Link, LinkConfig, stack_links
from chainlora.chain.adapters import Factors
from chainlora.errors import ModelError


@pytest.fixture
def chain() -> Chain:
    return tuned_chain("opt", 2)


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return tiny_model("opt")


# Wrong arguments that a user meets, and what is said.
WRONG = [
    (lambda _: Chain("gpt2"), "`model` must be a loaded model (got 'gpt2'); load it first"),
    (lambda c: Chain(on_meta()), "`model` must be a loaded model (got a OPTForCausalLM); load it"),
    (lambda c: Chain(torch.compile(c.model)), "needs the unwrapped model (got a OptimizedModule)"),
    (lambda c: Chain(torch.nn.DataParallel(c.model)), "wrap it after chain.extend"),
    (lambda c: Chain(c.model), "adapters (got a OPTForCausalLM); remove them: chain.detach()"),
    (lambda c: Chain(c.model, hold=1), "`hold` must be tied or carried (got 1)"),
    (lambda c: Chain(c.model, checkpoint="my/model"), "the path of a folder (got 'my/model"),
    (lambda c: c.extend(8), "`config` must be a LinkConfig (got 8); write extend(LinkConfig("),
    (lambda c: c.extend({"rank": 8}), "`config` must be a LinkConfig (got a dict)"),
    (lambda c: c.tie_share(1), "`share` must be in [0, 1) (got 1); use tie() to tie"),
    (lambda c: c.extend(config("opt", init="gradient")), "needs the loss"),
    (lambda c: c.extend(config("opt", target_modules=("x",))), "must match at least one module"),
    (lambda c: c.set_strengths({0: math.nan}), "must be within ±1e+06 (got nan for link 0)"),
    (lambda c: c.set_strengths({0: 1e300}), "must be within ±1e+06 (got 1e+300 for link 0)"),
    (lambda c: c.set_strengths({7: 1}), "strengths are set by link id, one of [0, 1] (got 7)"),
    (lambda c: c.drop(-1), "drop can drop 0 to 2 links (got -1)"),
    (lambda c: c.drop(9), "drop can drop 0 to 2 links (got 9); drop fewer"),
    (lambda c: c.tie(), "tie needs a live link (got none); call extend first"),
    (lambda c: c.discard(), "discard needs a live link"),
    (lambda c: list(c.parameters()), "parameters needs a live link"),
]


@every_hold
def test_wrong_arguments_say_what_to_write(hold):
    """They change nothing, and leave no live link."""
    chain = tuned_chain("opt", 2, hold=hold)
    weights, before = weights_of(chain.model), logits(chain.model)
    for call, words in WRONG:
        with pytest.raises(ChainLoRAError) as error:
            call(chain)
        assert words in str(error.value)
        assert len(str(error.value)) < 300
        assert_same_weights(weights, weights_of(chain.model))
        assert torch.equal(logits(chain.model), before)
    chain.extend(config("opt"))


def damaged(link: Link, **parts) -> Link:
    """Return a link with other tensors at its first module."""
    name = next(iter(link.factors))
    kept = {f: getattr(link.factors[name], f) for f in ("a", "b", "bias")}
    fields = {f: getattr(link, f) for f in ("index", "config", "num_steps")}
    return Link(factors=link.factors | {name: Factors(**kept | parts)}, **fields)


def elsewhere(link: Link) -> Link:
    """Return a link of a module that the model lacks."""
    return Link(0, config("opt"), {"decoder.nowhere": next(iter(link.factors.values()))})


BAD = {
    "an update of 32 × 8 for 32 × 32": lambda link: damaged(link, a=torch.zeros(4, 8)),
    "an update of 8 × 32 for 32 × 32": lambda link: damaged(link, b=torch.zeros(8, 4)),
    "of rank 4 at": lambda link: damaged(link, a=torch.zeros(3, 32), b=torch.zeros(32, 3)),
    "factors [4, 32] and [32, 3]": lambda link: damaged(link, b=torch.zeros(32, 3)),
    "factors [32] and": lambda link: damaged(link, a=torch.zeros(32)),
    "a bias at": lambda link: damaged(link, bias=torch.zeros(32)),
    "infinite or NaN values at": lambda link: damaged(link, a=torch.full((4, 32), math.nan)),
    "which the model lacks": elsewhere,
}


@every_hold
def test_a_link_that_does_not_fit_is_not_added(hold):
    chain = tuned_chain("opt", 1, hold=hold)
    before = logits(chain.model)
    for words, change in BAD.items():
        with pytest.raises(ChainLoRAError) as error:
            chain.add(chain.links[0], change(chain.links[0]))
        assert words in str(error.value)
        assert (len(chain), chain.next_id) == (1, 1)  # nor is the one before it
        assert torch.equal(logits(chain.model), before)


INTERRUPTED = {
    "tie": lambda chain: (chain.extend(config("opt")), chain.tie()),
    "drop": lambda chain: chain.drop(1),
    "set_strengths": lambda chain: chain.set_strengths({0: 0.5}),
    "add": lambda chain: chain.add(chain.links[1]),
}


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_after_an_interrupt_the_next_verb_finds_the_chain_whole(chain, verb, monkeypatch):
    """A cell of a notebook is stopped while weights are written, and the next one goes on."""
    left, write = iter(range(2)), chain.weights.write

    def interrupted(parameter, value):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(parameter, value)

    with monkeypatch.context() as patch:
        patch.setattr(chain.weights, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTED[verb](chain)
    assert chain.live is None
    chain.extend(config("opt"))
    other = Chain(tiny_model("opt"))
    other.add(*chain.links)
    assert torch.equal(logits(chain.model), logits(other.model))


def test_a_chain_fits_into_a_script():
    """Whatever torch mode it is in, however it counts, and what it does with links and model."""
    model = tiny_model("opt")
    model.lm_head.weight.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.inference_mode():
        chain = Chain(model, seed=np.int64(3))
        chain.extend(config("opt"))
    chain.tune(range(2), plain_update(chain))
    link = chain.tie()
    link, again = pickle.loads(pickle.dumps(link)), copy.deepcopy(chain)
    assert link not in chain.links
    assert {chain.links[0]: 0.5}
    again.extend(config("opt"))
    assert (chain.live, len(again)) == (None, 1)
    chain.drop(np.int64(1))
    chain.detach()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_weights_of_one_byte_are_not_merged_into():
    """In float8 they are codes, with a scale a block beside them."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = FP8Linear(32, 32, block_size=(16, 16))
    with pytest.raises(ChainLoRAError, match=r"quantised layer cannot hold .*q_proj\); use hold"):
        Chain(model).extend(LinkConfig(rank=2, target_modules=("q_proj",)))


def test_links_of_other_models_are_not_stacked(chain):
    factors = Factors(torch.zeros(4, 8), torch.zeros(8, 4))
    other = Link(0, config("opt"), dict.fromkeys(chain.links[0].factors, factors))
    with pytest.raises(ChainLoRAError, match="links must belong to one model"):
        stack_links([chain.links[0], other])


@every_hold
def test_the_state_of_another_live_link_is_refused(hold):
    chain, other = (Chain(tiny_model("opt"), hold=hold) for _ in range(2))
    for each in (chain, other):
        each.extend(config("opt"))
    chain.tune(range(2), plain_update(chain))
    chain.tie_share(0.5)
    state, before = {**chain.live_state()}, logits(other.model)
    a, deposit = (next(n for n in state if n.startswith(kind)) for kind in ("A/", "deposit/"))
    for wrong in (
        state | {"A/more": state[a]},
        {name: tensor for name, tensor in state.items() if name != a},
        state | {a: state[a][:, :5]},
        state | {deposit: state[deposit][:, :5]},
    ):
        with pytest.raises(ChainLoRAError, match=r"belongs? to another link"):
            other.load_live_state(wrong, 2, 1)
        assert torch.equal(logits(other.model), before)


def test_a_rank_that_no_layer_can_have_is_said_once(caplog):
    chain = Chain(tiny_model("llama"))
    for _ in range(2):
        chain.extend(LinkConfig(rank=1000, target_modules=("q_proj", "k_proj")))
        chain.discard()
    chain.extend(LinkConfig(rank=16, target_modules=("q_proj", "k_proj")))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage() == (
        "rank 1000 is above the shorter side of 4 of 4 adapted layers (16 at "
        "model.layers.0.self_attn.k_proj), which limits the rank of their update; rank 32 is "
        "enough for them"
    )


class Attending(torch.nn.Module):
    """A model of vectors, which takes no token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.dense = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(self.attention(x, x, x)[0])


def test_a_layer_whose_weight_torch_s_attention_reads_is_not_linked():
    """Its forward is never called, so that a LoRA on it does nothing."""
    chain = Chain(Attending())
    with pytest.raises(ModelError, match=r"must call the adapted layers .got attention.out_proj"):
        chain.extend(LinkConfig(rank=2, target_modules=("out_proj", "dense")))
    chain.extend(LinkConfig(rank=2, target_modules="all-linear"))
    assert [*chain.live.layers] == ["dense"]


def test_torch_s_own_encoder_layer_runs_its_links_without_gradients():
    """Its fast path reads the weights of its linear layers."""
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    chain, x = Chain(model), torch.randn(1, 3, 8)
    with torch.no_grad():
        before = model(x)
        chain.extend(LinkConfig(rank=2, target_modules=("linear1",)))
        for parameter in chain.parameters():
            torch.nn.init.ones_(parameter)
        live = chain.model(x)
        chain.tie()
        assert not torch.equal(live, before)
        # the merge adds in the other order: roundings of sums of some tens
        torch.testing.assert_close(chain.model(x), live)

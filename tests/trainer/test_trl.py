"""A chain in TRL's trainers: their quickstarts plus one line, and DPO's reference model."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import helpers_trl
import pytest
import torch
from helpers_integrations import (
    Recorder,
    StopAt,
    assert_adapter_is_the_model,
    assert_links_agree,
    assert_same_factors,
    chain_of,
    logits,
    own_loop,
    peft_model,
    plain_model,
)
from torch.nn.functional import log_softmax, logsigmoid
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from chainlora import ChainCallback, load_chain
from chainlora.errors import ConfigError
from chainlora_trainer.lengths import learned_a_row

# TRL itself takes seconds to import: each test does.
pytestmark = pytest.mark.skipif(
    find_spec("trl") is None, reason="TRL is an extra: pip install 'chainlora[trl]'"
)
RANKS, LENGTHS = (4, 4, 2), (4, 4, 3)
# W x + s·B A x is summed in another order than (W + s·B A) x
ROUNDING = 2e-5


@pytest.fixture
def sft(tiny_folder, tokenizer):
    return partial(helpers_trl.sft, tiny_folder, tokenizer)


@pytest.fixture
def dpo(tiny_folder, tokenizer):
    return partial(helpers_trl.dpo, tiny_folder, tokenizer)


def record(trainer) -> list:
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    return recorder.batches


# --- the same links ---


def test_sft_gives_the_links_of_our_loop(sft, tiny_folder, tmp_path):
    trainer = sft(tmp_path, ChainCallback(RANKS, steps=LENGTHS))
    batches = record(trainer)
    trainer.train()
    keys = ("input_ids", "attention_mask", "labels")
    batches = [{key: batch[key] for key in keys} for batch in batches[:11]]
    own = own_loop(tiny_folder, batches, RANKS, LENGTHS)
    # TRL's fused head computes the loss in tiles of tokens: rounding, which Adam divides by the
    # size of the gradient.
    assert_links_agree(chain_of(trainer), own, atol=2e-4)


def log_probability(model, batch) -> torch.Tensor:
    """Log probability of each completion: chosen ones first, then rejected ones."""
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logs = log_softmax(found[:, :-1], dim=-1)
    logs = logs.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logs * batch["completion_mask"][:, 1:]).sum(1)


def test_dpo_gives_the_links_of_our_loop(dpo, tiny_folder, tmp_path):
    trainer = dpo(tmp_path, ChainCallback(RANKS, steps=LENGTHS))
    batches = record(trainer)
    trainer.train()

    def loss(model, batch):
        """DPO's loss (arXiv 2305.18290, eq. 7) with TRL's default beta of 0.1."""
        reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        chosen, rejected = (log_probability(model, batch) - reference).chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    own = own_loop(tiny_folder, batches[:11], RANKS, LENGTHS, loss=loss)
    assert_links_agree(chain_of(trainer), own, atol=2e-4)


# --- a second stage, and its reference ---


def test_a_pair_teaches_the_tokens_of_its_chosen_answer():
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
    ]
    loader = DataLoader(rows, collate_fn=DataCollatorForPreference(pad_token_id=0))
    assert learned_a_row(loader) == 1.5
    loader = DataLoader(rows, collate_fn=lambda rows: rows)  # as GRPO has it
    with pytest.raises(ConfigError, match=r"must have `labels` \(got a list\); .*time_constant"):
        learned_a_row(loader)


@pytest.mark.parametrize("how", ["the same model", "what was saved"])
def test_sft_and_then_dpo_are_one_chain_and_one_adapter(how, sft, dpo, tiny_folder, tmp_path):
    first = sft(tmp_path / "sft", ChainCallback([4, 4], steps=[5, 6]))
    first.train()
    first.save_model(str(tmp_path / "sft/final"))
    links = [*chain_of(first).links]
    reference = plain_model(tiny_folder)
    load_chain(tmp_path / "sft/final", reference)

    is_same = how == "the same model"
    callback = ChainCallback([4, 2], start=None if is_same else tmp_path / "sft/final")
    second = dpo(tmp_path / "dpo", callback, first.model if is_same else None)
    batches = record(second)
    second.train()
    with torch.no_grad():
        chosen, rejected = log_probability(reference.eval(), batches[0]).chunk(2)
    torch.testing.assert_close(batches[0]["ref_chosen_logps"], chosen, atol=1e-4, rtol=0)
    torch.testing.assert_close(batches[0]["ref_rejected_logps"], rejected, atol=1e-4, rtol=0)

    second.save_model(str(tmp_path / "both"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "both", second.model, ROUNDING)
    chain = chain_of(second)
    assert [link.id for link in chain.links] == [0, 1, 2, 3]
    assert [link.num_steps for link in chain.links] == [5, 6, 6, 5]
    for before, now in zip(links, chain.links, strict=False):
        assert_same_factors(before, now)


def test_a_reference_that_knots_would_move_is_refused(dpo, tiny_folder, tmp_path):
    for keys in ({"steps": 4}, {"knots": "auto"}):
        trainer = dpo(tmp_path, ChainCallback(**keys), precompute_ref_log_probs=False)
        with pytest.raises(ConfigError, match="precompute_ref_log_probs=True, or give ref_model"):
            trainer.train()
        assert trainer.state.global_step == 0
    args = {"precompute_ref_log_probs": False, "ref_model": plain_model(tiny_folder)}
    trainer = dpo(tmp_path, ChainCallback(steps=6), **args)
    trainer.train()
    with pytest.raises(ConfigError, match="for the base, load it anew"):
        trainer.model.disable_adapter()  # the links that were tied would stay


def test_one_link_has_what_it_began_on_as_its_reference(sft, dpo, tmp_path):
    keys = {"learning_rate": 0.1, "max_steps": 4}
    first = sft(tmp_path / "sft", ChainCallback([4, 4]), **keys)
    first.train()
    first.save_model(str(tmp_path / "final"))
    callback = ChainCallback([4], start=tmp_path / "final")
    trainer = dpo(tmp_path / "dpo", callback, precompute_ref_log_probs=False, **keys)
    trainer.train()
    margins = [r["rewards/margins"] for r in trainer.state.log_history if "rewards/margins" in r]
    assert [abs(margin) < 1e-5 for margin in margins] == [True, False, False, False]


# --- resume ---


@pytest.mark.slow
def test_a_resume_has_the_reference_that_the_run_began_with(dpo, tmp_path):
    """What a save holds, and the best model: test_trainer.py."""
    keys = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}

    def make(name):
        return dpo(tmp_path / name, ChainCallback(RANKS, steps=LENGTHS), **keys)

    whole, killed = make("whole"), make("killed")
    whole.train()
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_dropout_that_trl_switches_off_stays_off(dpo, tiny_folder, tmp_path):
    """DPOTrainer does it on the chain's layers."""
    seen = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seen.update(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))

    model = peft_model(tiny_folder, lora_dropout=0.5)
    trainer = dpo(tmp_path, ChainCallback([4, 2]), model, max_steps=2)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == {0}

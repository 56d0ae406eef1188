"""A chain in transformers' Trainer: the links of a loop of our own, and every save whole."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers_integrations import (
    LR,
    StopAt,
    arguments,
    assert_adapter_is_the_model,
    assert_links_agree,
    assert_same_factors,
    chain_of,
    logits,
    lora,
    own_loop,
    peft_model,
    plain_model,
    trainer_loss,
)
from transformers import TrainerCallback, TrainingArguments, get_scheduler

from chainlora import ChainCallback, load_chain
from chainlora.errors import ChainError, ConfigError, RunError
from chainlora.runs.loading_start import load_start
from chainlora_trainer.restarts import restart_schedule

# One layer's product W x + s·B A x is summed in another order than (W + s·B A) x: float32 rounding
# of logits below 10 over two layers.
ROUNDING = 2e-5
SOFT = {"every": 3, "share": 0.5}


# --- the same links ---


@pytest.mark.parametrize(
    ("restart", "is_added"),
    [(False, False), (True, True)],
    ids=["one schedule", "a schedule a link, added after the trainer was made"],
)
def test_the_same_batches_give_the_same_links(make, tiny_folder, restart, is_added):
    callback = ChainCallback(ranks=[4, 4, 2], steps=[4, 4, 3], restart_schedule=restart)
    trainer = make(None if is_added else callback)
    if is_added:
        trainer.add_callback(callback)
    trainer.train()
    batches = trainer.data_collator.batches[:11]
    keys = {"loss": trainer_loss(trainer), "restart": restart}
    own = own_loop(tiny_folder, batches, (4, 4, 2), (4, 4, 3), **keys)
    assert_links_agree(chain_of(trainer), own, atol=1e-5)
    torch.testing.assert_close(logits(trainer.model), logits(own.model), atol=ROUNDING, rtol=0)


def test_a_schedule_a_link_ends_at_the_rate_that_is_asked_for(run):
    keys = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": LR / 2}}
    rates = []
    for callback, steps in ((None, 4), (ChainCallback(steps=4, restart_schedule=True), 8)):
        records = run(callback, max_steps=steps, **keys).state.log_history
        rates.append([each["learning_rate"] for each in records if "learning_rate" in each])
    assert rates[1] == pytest.approx(rates[0] * 2)
    assert min(rates[0]) > LR / 2


def test_a_schedule_that_lags_begins_with_its_link(tmp_path):
    """A gradient scaler skips steps, and the schedule with them; no rate falls below zero."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler("linear", optimizer, 0, 8)
    optimizer.step()
    schedule.step()
    restart_schedule(schedule, TrainingArguments(**arguments(tmp_path)), first=4, num_steps=4)
    rates = []
    for _ in range(4):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("keys", "lengths"),
    [
        ({"steps": np.int64(4)}, [4, 4, 3]),  # as numpy's arithmetic gives it
        ({"epochs": 0.25}, [3, 3, 3, 2]),
    ],
    ids=str,
)
def test_where_the_knots_fall(run, keys, lengths):
    trainer = run(ChainCallback(**keys))
    assert [link.num_steps for link in chain_of(trainer).links] == lengths
    knots = [record for record in trainer.state.log_history if "knot" in record]
    assert [record["link_steps"] for record in knots] == lengths[:-1]  # the last link is live


def test_soft_knots_are_those_of_our_loop(run, tiny_folder):
    """The shares follow the rate of the step to come."""
    trainer = run(ChainCallback(knots=SOFT | {"follow_rate": True}))
    (link,) = chain_of(trainer).links
    assert link.num_steps == 11
    assert 0 < link.error <= 3e-3
    own = own_loop(tiny_folder, trainer.data_collator.batches[:11], (4,), (11,), soft=(3, 0.5))
    # A compressed link has no factors of its own to compare: the function is.
    torch.testing.assert_close(logits(trainer.model), logits(own.model), atol=5e-3, rtol=0)


def test_a_batch_size_that_is_found_decides_the_soft_knots(make):
    spacings = []
    for batch_size in (2, 4):
        callback = ChainCallback(knots={"every": 2})
        keys = {"max_steps": -1, "num_train_epochs": 0.5, "auto_find_batch_size": True}
        trainer = make(callback, per_device_train_batch_size=batch_size, **keys)
        trainer.model.register_forward_pre_hook(fit_two_rows, with_kwargs=True)
        trainer.train()
        assert sum(callback._knots.numbers.lengths) == 12
        spacings.append(callback._knots.numbers.knots)
    assert spacings[0] == spacings[1]


def fit_two_rows(model, _, batch) -> None:
    if len(batch["input_ids"]) > 2:
        raise RuntimeError("CUDA out of memory.")


def test_the_optimizer_is_new_or_kept(make):
    """The first step of a fresh Adam moves every weight by the rate."""
    moved = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **_):
            steps = {int(values["step"]) for values in optimizer.state.values() if values}
            moved[state.global_step] = steps

    for reset in ("full", "off"):
        trainer = make(ChainCallback(steps=4, optimizer_reset=reset), max_steps=9)
        trainer.add_callback(Look())
        trainer.train()
        assert moved[5] == ({1} if reset == "full" else {5})


# --- records ---


def test_records_say_which_link_they_are_of(run):
    trainer = run(ChainCallback(steps=4), eval_strategy="steps", eval_steps=2)
    history = trainer.state.log_history
    losses = [record["link"] for record in history if "loss" in record]
    assert losses == [0] * 4 + [1] * 4 + [2] * 3
    scores = {record["step"]: record["eval_link"] for record in history if "eval_loss" in record}
    assert scores.pop(11, 2) == 2  # at the end the Trainer evaluates since transformers 5.4
    assert scores == {2: 0, 4: 0, 6: 1, 8: 1, 10: 2}
    assert trainer.evaluate()["eval_link"] == 2


# --- what a chain begins with ---


def trained_adapter(folder, output) -> Path:
    """A LoRA that PEFT has saved, all of it drawn."""
    model = peft_model(folder)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(output)
    return output


def test_a_trained_adapter_is_the_first_link(make, tiny_folder, tmp_path):
    """On the model, or by `start`, which a resume gives again."""
    adapter = trained_adapter(tiny_folder, tmp_path / "adapter")

    def adapted():
        return peft.PeftModel.from_pretrained(plain_model(tiny_folder), adapter, is_trainable=True)

    def started():
        return make(ChainCallback([4, 2], start=adapter), save_strategy="steps", save_steps=7)

    whole, on_model = started(), make(ChainCallback([4, 2]), adapted())
    for each in (whole, on_model):
        torch.testing.assert_close(logits(each.model), logits(adapted()), atol=ROUNDING, rtol=0)
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "final", whole.model, ROUNDING)
    resumed = started()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert torch.equal(logits(resumed.model), logits(whole.model))
    with pytest.raises(RunError, match="of the checkpoint, and its `start`"):
        make(ChainCallback([4, 2])).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

    chain, (link,) = chain_of(whole), load_start(adapter).links
    assert [(each.id, each.num_steps) for each in chain.links] == [(0, 0), (1, 6), (2, 5)]
    for first in (chain.links[0], chain_of(on_model).links[0]):
        assert_same_factors(first, link)
    with pytest.raises(ConfigError, match="`start` needs a model with an untrained adapter"):
        make(ChainCallback(steps=4, start=adapter), adapted())


def test_a_chain_of_one_link_goes_on_in_a_second_trainer(make, run, tiny_folder, tmp_path):
    model = peft_model(tiny_folder, init_lora_weights="gaussian")
    first = run(ChainCallback(knots=SOFT), model=model)
    before = logits(first.model)
    second = make(ChainCallback([4, 2]), first.model)
    # the link that has ended is stored to a relative error of 3e-3
    torch.testing.assert_close(logits(second.model), before, atol=5e-3, rtol=0)
    second.train()
    second.save_model(str(tmp_path / "final"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "final", second.model, ROUNDING)
    links = chain_of(second).links
    assert [link.num_steps for link in links] == [11, 6, 5]
    assert {link.config.init for link in links} == {"gaussian"}


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_a_link_is_on_the_layers_of_the_lora(run, keys, tiny_folder):
    model = peft_model(tiny_folder, **keys)
    layers = {name for name, _ in model.get_base_model().named_modules() if "lora_A" in name}
    layers = {name.partition(".lora_A")[0] for name in layers}
    trainer = run(ChainCallback([4, 2], steps=[2, 2]), model=model, max_steps=4)
    assert [set(link.factors) for link in chain_of(trainer).links] == [layers, layers]


# --- saves ---


def test_a_merged_link_with_soft_knots_is_not_saved_twice_over(run, tiny_folder, tmp_path):
    trainer = run(ChainCallback(knots=SOFT))
    before = logits(trainer.model)
    trainer.model.merge_adapter()
    with pytest.raises(ChainError, match=r"merged by PEFT at .*call unmerge_adapter\(\)"):
        trainer.save_model(str(tmp_path / "final"))
    trainer.model.unmerge_adapter()
    trainer.save_model(str(tmp_path / "final"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "final", trainer.model, 5e-3)
    torch.testing.assert_close(logits(trainer.model), before, atol=ROUNDING, rtol=0)


def test_every_save_is_a_chain_and_an_adapter(make, tiny_folder, tmp_path, chainlora):
    callback = ChainCallback(ranks=[4, 4, 2], steps=[4, 4, 3])
    trainer = make(callback, save_strategy="steps", save_steps=2)
    trainer.save_model(str(tmp_path / "final"))
    trainer.train()
    ranks = {}
    for step in (2, 4, 6, 8, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        config = json.loads((folder / "adapter_config.json").read_text())
        ranks[step] = config["r"]
        chain = load_chain(folder, plain_model(tiny_folder))
        assert sum(link.num_steps for link in chain.links) + chain.live_steps == step
        assert_adapter_is_the_model(tiny_folder, folder, chain.model, ROUNDING)
    assert ranks == {2: 4, 4: 4, 6: 8, 8: 8, 10: 10, 11: 10}  # of links that add something

    trainer.save_model(str(tmp_path / "final"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "final", trainer.model, ROUNDING)
    shown = chainlora("generate", tmp_path / "final", "--prompt", "the", "--max-new-tokens", "2")
    assert shown.status == 0, shown.err  # on the base that the chain names
    assert "3 LoRA link(s) as one adapter of rank 10" in (tmp_path / "final/README.md").read_text()
    trainer.model.save_pretrained(str(tmp_path / "again"))
    snapshot = copy.deepcopy(trainer.model)
    merged = trainer.model.merge_and_unload()
    assert_adapter_is_the_model(tiny_folder, tmp_path / "again", merged, ROUNDING)

    for parameter in callback.chain.parameters():
        parameter.data.zero_()
    snapshot.save_pretrained(str(tmp_path / "snapshot"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "snapshot", snapshot, ROUNDING)


def test_an_adapter_that_plain_peft_has_trained_on_is_not_taken_for_the_chain(
    run, tiny_folder, tmp_path, chainlora
):
    """PEFT leaves the chain beside it, which was read in its place."""
    final = tmp_path / "final"
    run(ChainCallback(ranks=[4])).save_model(str(final))
    later = peft.PeftModel.from_pretrained(plain_model(tiny_folder), final, is_trainable=True)
    for parameter in later.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    later.save_pretrained(final)
    with pytest.raises(RunError, match=r"another adapter in .*, saved later.*delete .*chain"):
        load_chain(final, plain_model(tiny_folder))
    chainlora("generate", final, "--prompt", "the").refused("saved later")
    assert len(load_chain(final / "chain", plain_model(tiny_folder)).links) == 0  # one is live
    shutil.rmtree(final / "chain")
    assert len(load_chain(final, plain_model(tiny_folder)).links) == 1


# --- resume ---


def test_a_killed_run_resumes_across_a_knot(make, run, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 5, "output": tmp_path / "killed"}
    knots = {"ranks": [4, 4, 2], "steps": [4, 4, 3], "restart_schedule": True}
    whole = run(ChainCallback(**knots), output=tmp_path / "whole")

    trainer = make(ChainCallback(**knots), **keys)
    trainer.add_callback(StopAt(9))  # two knots on
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make(ChainCallback(**knots), **keys)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 11
    # to the same bits: state, batches and arithmetic are the same
    assert_links_agree(chain_of(resumed), chain_of(whole), atol=0.0)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_a_checkpoint_of_another_callback_is_resumed(make, tmp_path):
    """Trainer's own for SIGTERM (`enable_jit_checkpoint`) comes before all that users pass."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                trainer._save_checkpoint(trainer.model, trial=None)

    found = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        trainer = make(ChainCallback(ranks=[4, 2], steps=[4, 7]))
        trainer.callback_handler.callbacks.insert(0, Save())
        trainer.train(resume_from_checkpoint=resume)
        found.append(logits(trainer.model))
    assert torch.equal(*found)


def test_a_resume_with_other_knots_is_refused(make, run, tiny_folder, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 3}
    run(ChainCallback(steps=4), **keys)
    checkpoint = str(tmp_path / "checkpoint-6")
    without = {"exclude_modules": ["layers.1.self_attn.v_proj"]}
    for callback, what, lora_keys in (
        (ChainCallback(steps=5), "must have the knots of its checkpoint", {}),
        (ChainCallback([4, 2], steps=[4, 7]), "must have the links of its checkpoint", {}),
        (ChainCallback(steps=4), "must have the links of its checkpoint", without),
    ):
        other = make(callback, peft_model(tiny_folder, **lora_keys), **keys)
        with pytest.raises(Exception, match=what):
            other.train(resume_from_checkpoint=checkpoint)


OTHER_SOFT_KNOTS = [  # of the first training, of the resume, and what is said
    (SOFT, None, "None, stored .*'every': 3, 'share': 0.5"),
    (None, SOFT, "'share': 0.5.*, stored None"),
    (SOFT, SOFT | {"every": 2}, "'every': 2.* stored .*'every': 3"),
    (SOFT, {"share": 0.25}, "'share': 0.25.* stored .*'share': 0.5"),
    (SOFT, {"time_constant": 9.0}, "'time_constant': 9.0.* stored .*'share': 0.5"),
]


def test_a_resume_with_other_soft_knots_is_refused(make, run, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 4, "max_steps": 5}
    for first in (SOFT, None):
        run(ChainCallback([4], knots=first), output=tmp_path / f"{first}", **keys)
    for first, again, got in OTHER_SOFT_KNOTS:
        resumed = make(ChainCallback([4], knots=again), **keys)
        with pytest.raises(RunError, match=f"the soft knots of its checkpoint .got .*{got}"):
            resumed.train(resume_from_checkpoint=str(tmp_path / f"{first}/checkpoint-4"))
    for again in ({"every": 3}, "auto"):  # what is not given stays as it was decided
        resumed = make(ChainCallback([4], knots=again), **keys)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"{SOFT}/checkpoint-4"))
        assert resumed.state.global_step == 5


# --- the best model ---


def test_the_best_model_is_that_of_its_link(run, tiny_folder, tmp_path):
    """The best point lies inside the first link: the highest loss is called the best here."""
    callback = ChainCallback(ranks=[4, 2, 2], steps=[4, 4, 3])
    keys = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "save_total_limit": 2,
    }
    model = peft_model(tiny_folder, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    trainer = run(callback, model=model, **keys)
    scores = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    assert trainer.state.best_global_step == 2
    assert scores[2] > scores[10] + 0.01
    assert trainer.evaluate()["eval_loss"] == scores[2]
    assert (len(callback.chain), callback.chain.live_steps) == (0, 2)
    trainer.save_model(str(tmp_path / "best"))
    assert_adapter_is_the_model(tiny_folder, tmp_path / "best", trainer.model, ROUNDING)


# --- what surrounds it ---


def test_an_optimizer_of_the_user_s_own(run, tiny_folder):
    model = peft_model(tiny_folder)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = run(ChainCallback([4, 2]), model=model, optimizers=(optimizer, None))
    links = chain_of(trainer).links
    assert [link.config.rank for link in links] == [4, 2]
    assert all(share.b.any() for link in links for share in link.factors.values())


def test_embeddings_that_no_save_would_hold_are_warned_of(make, tiny_folder, caplog):
    for more in (0, 3):
        caplog.clear()
        model = plain_model(tiny_folder)
        model.resize_token_embeddings(model.config.vocab_size + more)
        make(ChainCallback([4, 4]), peft.get_peft_model(model, lora()))
        assert ("embeddings were resized after loading" in caplog.text) == bool(more)


def test_a_bfloat16_base_with_checkpointing(run, tiny_folder, tmp_path):
    model = plain_model(tiny_folder, torch.bfloat16)
    model = peft.get_peft_model(model, lora(target_modules=["q_proj"], lora_dropout=0.1))
    callback = ChainCallback([4, 2])
    trainer = run(callback, model=model, bf16=True, gradient_checkpointing=True)
    trainer.save_model(str(tmp_path / "final"))
    chain = load_chain(tmp_path / "final", plain_model(tiny_folder, torch.bfloat16))
    for each in (chain, callback.chain):
        each.tie()
    # without the trainer's autocast around it
    assert torch.equal(logits(chain.model), logits(trainer.model.get_base_model()))

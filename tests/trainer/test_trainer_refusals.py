"""What a chain in a trainer cannot do gets one line, before the first step."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from helpers_integrations import lora, peft_model, plain_model
from transformers import AutoModelForSequenceClassification, TrainerCallback

from chainlora import ChainCallback, ChainLoRAError


class NoStep(TrainerCallback):
    """Fails where a step is made: a refusal comes before it."""

    def on_step_begin(self, *_, **__):
        raise AssertionError("a step was made")


@pytest.fixture
def refused(make):
    """Make a trainer and train, which is refused in one line that has these words."""

    def check(rule, callback, model=None, **keys) -> None:
        def attempt() -> None:
            trainer = make(callback, model, **keys)
            trainer.add_callback(NoStep())
            trainer.train()

        with pytest.raises(ChainLoRAError) as caught:
            attempt()
        (line,) = str(caught.value).splitlines()
        assert "(got " in line or "unknown key" in line
        assert re.search(rule, line), line

    return check


def two_adapters(folder) -> peft.PeftModel:
    model = peft_model(folder)
    model.add_adapter("second", lora(2))
    return model


def merged(folder) -> peft.PeftModel:
    model = peft_model(folder)
    model.merge_adapter()
    return model


def injected(folder):
    """A plain model with LoRA layers, as transformers' own `add_adapter` leaves it."""
    return peft.inject_adapter_in_model(lora(4), plain_model(folder))


def trained_otherwise(folder, name: str, *, is_trained: bool) -> peft.PeftModel:
    model = peft_model(folder)
    for path, parameter in model.named_parameters():
        if name in path:
            parameter.requires_grad_(is_trained)
    return model


MODELS = {  # how a model is made, or keys of its LoRA
    "full fine-tuning": (plain_model, "needs a PeftModel"),
    "no model of PEFT": (injected, "needs a PeftModel .*with an adapter"),
    "two adapters": (two_adapters, "needs one adapter.*; merge or delete the others"),
    "another name": (
        lambda folder: peft.get_peft_model(plain_model(folder), lora(), adapter_name="mine"),
        "needs one adapter.*; leave adapter_name out",
    ),
    "a merged adapter": (merged, "needs an unmerged adapter"),
    "a norm that is trained too": (
        lambda folder: trained_otherwise(folder, "model.norm", is_trained=True),
        r"model\.norm\.weight, which is trained too\); freeze it",
    ),
    "A that is frozen": (
        lambda folder: trained_otherwise(folder, "lora_A", is_trained=False),
        r"lora_A\.default\.weight, which is frozen\); unfreeze it",
    ),
    "the head of a classifier": (
        lambda folder: peft.get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
            peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"]),
        ),
        "modules_to_save=.*leave it out, and a classifier.s task_type",
    ),
    "a module trained whole": (
        {"modules_to_save": ["norm"]},
        r"modules_to_save=\['norm'\].*leave it out",
    ),
    "dora": ({"use_dora": True}, "use_dora=True.*leave it out"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*gaussian"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.*leave it out"),
    "another kind": (
        lambda folder: peft.get_peft_model(
            plain_model(folder),
            peft.IA3Config(
                target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
        ),
        "needs a LoRA",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_models(refused, tiny_folder, what):
    build, rule = MODELS[what]
    model = build(tiny_folder) if callable(build) else peft_model(tiny_folder, **build)
    refused(rule, ChainCallback(steps=4), model)


ON_PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
KNOTS = {  # keys of the callback, what is said, and what the trainer is given
    "beyond the end": ({"steps": 1e2}, "before the end of the run .*steps=100"),
    "epochs beyond the end": ({"epochs": 3}, "before the end of the run .*for 11 steps"),
    "not the run's steps": ({"steps": [4, 4]}, r"add up to the run \(got \[4, 4\]"),
    "too many ranks": ({"ranks": [4, 4], "steps": 4}, "one entry per link"),
    "more links than steps": ({"ranks": [4] * 30}, "at least one step"),
    "another first rank": ({"ranks": [8, 4]}, "begin with the rank of the model's LoRA"),
    "rank 0": ({"ranks": [4, 0]}, "`ranks` must be at least 1"),
    "unequal moments": ({"ranks": [4, 2], "optimizer_reset": "off"}, "all ranks must be equal"),
    "an unknown key": ({"knots": {"often": 3}}, "unknown key `knots.often`"),
    "an optimizer": ({"knots": "auto"}, "moments of AdamW, and of Adam", {"optim": "adafactor"}),
    "a schedule": ({"steps": 4, "restart_schedule": True}, "a function of the step", ON_PLATEAU),
}


@pytest.mark.parametrize("what", KNOTS)
def test_knots(refused, what):
    keys, rule, *more = KNOTS[what]
    refused(rule, ChainCallback(**keys), **(more[0] if more else {}))


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({}, "a chain needs knots"),
        ({"steps": 4, "epochs": 1}, "not both"),
        ({"steps": 0}, "must be positive"),
        ({"steps": [2.5, 4]}, "must be positive whole numbers"),
        ({"steps": "4"}, "must be positive whole numbers"),
        ({"epochs": ["1", 2]}, "must be positive"),
        ({"ranks": 8}, r"must list a rank for each link \(got 8\)"),
        ({"ranks": [4, 4], "steps": [1, 1, 1]}, "must have one length"),
        ({"steps": 4, "optimizer_reset": "prune"}, "must be full or off"),
    ],
)
def test_a_callback_that_contradicts_itself(keys, rule):
    with pytest.raises(ChainLoRAError, match=rule):
        ChainCallback(**keys)


def decaying(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, weight_decay=0.1)


def with_weights(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters, "k": 0}])  # as schedule-free ones do


def of_something_else(_) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


NO_WEIGHTS = r"must store only moments, by parameter \(got 'k'"


@pytest.mark.parametrize(
    ("optimizer", "keys", "rule"),
    [
        (decaying, {"knots": {"time_constant": 5}}, "Adam and SGD without weight_decay"),
        (with_weights, {"knots": {"time_constant": 5, "moments": "new"}}, NO_WEIGHTS),
        (with_weights, {"steps": 4, "optimizer_reset": "off"}, NO_WEIGHTS),
        (of_something_else, {"steps": 4}, "must train exactly the parameters of the LoRA"),
    ],
)
def test_optimizers(refused, tiny_folder, optimizer, keys, rule):
    model = peft_model(tiny_folder)
    own = optimizer([p for p in model.parameters() if p.requires_grad])
    refused(rule, ChainCallback(**keys), model, optimizers=(own, None))


def test_a_schedule_of_the_user_s_own(refused, tiny_folder):
    model = peft_model(tiny_folder)
    own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    half = torch.optim.lr_scheduler.LambdaLR(own, lambda _: 0.5)
    callback = ChainCallback(steps=4, restart_schedule=True)
    refused("other than lr_scheduler_type='linear'", callback, model, optimizers=(own, half))


@pytest.mark.parametrize(
    ("first", "scale", "rule"),
    [
        (None, 1.0, r"must contain a chain .*saved without ChainCallback"),
        ({"steps": 4}, 1.5, "the base model must be the one"),
    ],
    ids=["without a chain", "of another base"],
)
def test_checkpoints(make, run, tiny_folder, first, scale, rule):
    keys = {"save_strategy": "steps", "save_steps": 4}
    run(first and ChainCallback(**first), **keys)
    base = plain_model(tiny_folder)
    base.model.norm.weight.data.mul_(scale)
    trainer = make(ChainCallback(steps=4), peft.get_peft_model(base, lora()), **keys)
    with pytest.raises(ChainLoRAError, match=rule):
        trainer.train(resume_from_checkpoint=True)


def test_weights_that_are_not_finite_are_not_tied(make):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    trainer = make(ChainCallback(steps=4))
    trainer.callback_handler.callbacks.insert(0, Spoil())
    rule = r"weights of a link must be finite .*link 0 after 4 steps"
    with pytest.raises(ChainLoRAError, match=rule):
        trainer.train()


def test_a_second_training_and_a_second_trainer(make, run):
    callback = ChainCallback(steps=4)
    trainer = run(callback)
    with pytest.raises(ChainLoRAError, match="chain and trainer must be at one step"):
        trainer.train()
    trainer = make(ChainCallback(steps=4))
    trainer.add_callback(ChainCallback(steps=4))
    with pytest.raises(ChainLoRAError, match=r"got 2 and 1\); .* one ChainCallback"):
        trainer.train()
    with pytest.raises(ChainLoRAError, match="for one trainer"):
        make(callback)
    with pytest.raises(ChainLoRAError, match="exists once the trainer is made"):
        ChainCallback(steps=4).chain  # noqa: B018

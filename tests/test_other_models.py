"""A chain on encoders, encoder-decoders, speech and experts: trains, ties, is undone, saved,
exported.

Two of them; the other classes of tests/other_models/classes.py are among the slow tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from other_models.checks import CHECKS, save_base, tune
from other_models.classes import KINDS, load, new_model
from transformers import Trainer, TrainingArguments

from chainlora import Chain, ChainCallback, LinkConfig, load_chain, save_chain
from chainlora.errors import ModelError, RunError

QUICK = {
    "own loop": ("T5ForConditionalGeneration",),  # one weight is three embeddings and the head
    "Trainer": ("BertForMaskedLM",),
}


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        pytest.param(engine, name, marks=() if name in QUICK[engine] else pytest.mark.slow)
        for engine in CHECKS
        for name in KINDS
    ],
)
def test_a_chain_on_other_models(engine, name, tmp_path):
    found = CHECKS[engine](name, tmp_path)
    assert [key for key, value in found.items() if not value <= 1.0] == []


@pytest.fixture
def saved(tmp_path) -> Path:
    """Save a tuned chain of a class that is no causal language model; return its base."""
    name = "BertForMaskedLM"
    folder = save_base(name, tmp_path / "base")
    chain = Chain(load(name, folder), checkpoint=folder)
    chain.extend(LinkConfig(rank=4, alpha=8))
    tune(chain, KINDS[name].batch(), 2)
    save_chain(chain, tmp_path / "chain")
    return folder


def test_other_layers_are_another_base(saved, tmp_path):
    load_chain(tmp_path / "chain", load("BertForMaskedLM", saved), checkpoint=saved)
    with pytest.raises(RunError, match=r"must be the one .* was trained on"):
        load_chain(tmp_path / "chain", new_model("BertForMaskedLM", seed=9))


def test_commands_take_a_saved_chain_or_say_what_to_do(saved, tmp_path, chainlora):
    where = tmp_path / "chain"
    assert chainlora(f"inspect {where}").status == 0
    assert chainlora(f"export {where} --to adapter --output {tmp_path}/adapter").status == 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task_type"] is None
    chainlora(f"export {where} --to merged --output {tmp_path}/merged").refused(
        "got one on another model ", "load_chain(", ").detach()"
    )


def test_a_model_without_a_name_is_loaded_by_its_user(tmp_path, chainlora):
    chain = Chain(new_model("MixtralForCausalLM"))
    chain.extend(LinkConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    chain.tie()
    save_chain(chain, tmp_path / "chain")
    for command in ("generate {} --prompt hi", f"export {{}} --to merged --output {tmp_path}/out"):
        found = chainlora(command.format(tmp_path / "chain"))
        found.refused("got one on a model without a name", "load_chain(")


def test_stacked_experts_are_refused_with_what_to_name(tmp_path):
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(new_model("MixtralForCausalLM"), lora)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ModelError, match=r"stacked experts cannot be linked .*q_proj"):
        Trainer(model, arguments, callbacks=[ChainCallback(steps=2)])

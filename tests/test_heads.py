"""A chain on classifiers, encoders, encoder-decoders, vision and experts: trains, ties, is undone,
saved, exported.

One of each kind; the other classes of tests/heads/models.py are among the slow tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from heads.checks import CHECKS, outputs, save_base, tune
from heads.models import KINDS, config_of, load, new_model, next_tokens
from helpers import flip_last_bit
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from chainlora import Chain, ChainCallback, LinkConfig, export_adapter, load_chain, save_chain
from chainlora.errors import ModelError, RunError

QUICK = {
    "own loop": (
        "RobertaForSequenceClassification",  # a head of two layers
        "T5ForConditionalGeneration",  # one weight is three embeddings and the head
    ),
    "Trainer": (
        "DistilBertForSequenceClassification",  # PEFT trains two modules for one name
        "ViTForImageClassification",
    ),
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


def tuned(name: str, folder: Path, **keys) -> Chain:
    """A chain of one live link, tuned for two steps."""
    kind = KINDS[name]
    chain = Chain(load(name, folder, seed=1), checkpoint=folder)
    chain.extend(LinkConfig(rank=4, alpha=8, extra_modules=kind.head, **keys))
    tune(chain, kind.batch(), 2)
    return chain


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("LlamaForSequenceClassification", "all-linear"),
        ("RobertaForTokenClassification", ".*query"),
        ("BertForQuestionAnswering", "all-linear"),
    ],
)
def test_an_adapter_needs_no_head_that_is_trained_whole(name, targets, tmp_path):
    """PEFT would look for one, if the adapter said its task."""
    folder = save_base(name, tmp_path / "base")
    chain = Chain(load(name, folder, seed=1), checkpoint=folder)
    chain.extend(LinkConfig(rank=2, target_modules=targets))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.normal_(std=0.1)
    export_adapter(chain, tmp_path / "adapter")
    found = peft.PeftModel.from_pretrained(load(name, folder, seed=1), tmp_path / "adapter")
    batch = KINDS[name].batch()
    expected = outputs(chain.model, batch)
    torch.testing.assert_close(outputs(found, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a tuned chain of a class; it returns the class's base."""

    def save(name: str) -> Path:
        folder = save_base(name, tmp_path / "base")
        save_chain(tuned(name, folder), tmp_path / "chain")
        return folder

    return save


def test_another_head_is_no_other_base_but_other_layers_are(saved, tmp_path):
    name = "BertForSequenceClassification"
    folder = saved(name)
    load_chain(tmp_path / "chain", load(name, folder, seed=9), checkpoint=folder)
    with pytest.raises(RunError, match=r"must be the one .* was trained on"):
        load_chain(tmp_path / "chain", new_model(name, seed=9))


def test_commands_take_a_saved_chain_or_say_what_to_do(saved, tmp_path, chainlora):
    saved("BertForTokenClassification")
    where = tmp_path / "chain"
    assert chainlora(f"inspect {where}").status == 0
    assert chainlora(f"export {where} --to adapter --output {tmp_path}/adapter").status == 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS"
    chainlora(f"export {where} --to merged --output {tmp_path}/merged").refused(
        "got one on TOKEN_CLS ", "load_chain(", ").detach()"
    )


def test_a_damaged_start_is_refused(saved, tmp_path):
    name = "BertForSequenceClassification"
    folder = saved(name)
    flip_last_bit(tmp_path / "chain/stages/main/start.safetensors")
    with pytest.raises(RunError, match=r"start\.safetensors"):
        load_chain(tmp_path / "chain", load(name, folder), checkpoint=folder)


def test_a_layer_inside_a_trained_module_is_not_adapted_too():
    model = new_model("RobertaForSequenceClassification")
    chain = Chain(model)
    adapter = chain.extend(
        LinkConfig(rank=2, target_modules=("query", "dense"), extra_modules=("classifier",))
    )
    assert not any(name.startswith("classifier") for name in adapter.layers)
    assert set(adapter.extra) == {"classifier"}


def begin_a_trainer(name: str, lora: peft.LoraConfig, folder: Path, change=lambda _: None):
    model = peft.get_peft_model(new_model(name), lora)
    change(model)
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True)
    Trainer(model, arguments, callbacks=[ChainCallback(steps=2)])
    return model


@torch.no_grad()
def test_a_trained_head_is_that_of_the_first_link(tmp_path):
    ids, before = torch.tensor([[5, 6, 7, 8]]), []

    def train(model) -> None:
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        before.append(model.eval()(ids).logits)

    lora = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"])
    model = begin_a_trainer("BertForSequenceClassification", lora, tmp_path, train)
    torch.testing.assert_close(model.eval()(ids).logits, before[0], atol=1e-5, rtol=0)


def test_stacked_experts_are_refused_with_what_to_name(tmp_path):
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    with pytest.raises(ModelError, match=r"stacked experts cannot be linked .*q_proj"):
        begin_a_trainer("MixtralForCausalLM", lora, tmp_path)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)])
def test_an_embedding_is_trained_whole_where_nothing_is_tied_to_it(tmp_path, dtype, atol):
    config, batch = config_of("LlamaForSequenceClassification"), next_tokens()
    whole = LinkConfig(rank=2, target_modules=("q_proj",), extra_modules=("embed_tokens",))
    config.tie_word_embeddings = True
    with pytest.raises(ModelError, match="must not name a tied head or embedding"):
        Chain(LlamaForCausalLM(config)).extend(whole)
    config.tie_word_embeddings = False
    chain = Chain(LlamaForCausalLM(config).to(dtype).eval())
    start = outputs(chain.model, batch)
    chain.extend(whole)
    tune(chain, batch, 1)
    live = outputs(chain.model, batch)
    chain.tie()
    torch.testing.assert_close(outputs(chain.model, batch), live, atol=atol, rtol=0)  # rounding
    export_adapter(chain, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.weight" in names
    chain.drop(1)
    assert torch.equal(outputs(chain.model, batch), start)
    assert not torch.equal(live, start)

"""Keys of other tools: one table behind errors, `convert-config` and docs/keys.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from chainlora import load_config, make_config
from chainlora.config.foreign import foreign_keys, keys_page
from chainlora.config.loading import parse_yaml
from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError
from chainlora.training.optimizers import OPTIMIZERS

DOCS = Path(__file__).resolve().parents[1] / "docs"

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.0
output_dir: ./out
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_modules: [gate_proj, down_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
warmup_ratio: 0.1
special_tokens: {pad_token: "<pad>"}
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Llama-3.2-1B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: rows.jsonl
template: llama3
cutoff_len: 1024
per_device_train_batch_size: 1
num_train_epochs: 3.0
lr_scheduler_type: polynomial
save_steps: 500
bf16: true
output_dir: saves/x
"""
TRAINER_AND_PEFT = """
model_name_or_path: m
train_file: rows.jsonl
r: 8
target_modules: q_proj
init_lora_weights: pissa
use_rslora: true
modules_to_save: lm_head
max_steps: 100
num_train_epochs: 3
adam_beta2: 0.95
weight_decay: 0.01
seed: 3
report_to: tensorboard
load_best_model_at_end: true
validation_file: held_out.jsonl
fp16: false
"""


@pytest.fixture
def converted(chainlora, tmp_path):
    """Convert a text; return what YAML reads of the result, and its comments."""

    def convert(text: str) -> tuple[dict, str]:
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        outcome = chainlora("convert-config", file)
        assert (outcome.status, outcome.err) == (0, "")
        comments = [line for line in outcome.out.splitlines() if line.startswith("# ")]
        return parse_yaml(outcome.out), "\n".join(comments)

    return convert


def test_our_side_of_the_table_exists():
    for key, entry in foreign_keys().items():
        assert entry.tools
        assert entry.ours or entry.say, key
        if entry.ours is None:
            continue
        section, _, name = entry.ours.rpartition(".")
        fields = RunConfig.model_fields
        model = fields[section].annotation if section else RunConfig
        assert name in model.model_fields, key


def test_keys_md_is_the_table(chainlora):
    assert (DOCS / "keys.md").read_text(encoding="utf-8") == keys_page()
    assert chainlora("convert-config", "--keys").out == keys_page()


def test_an_axolotl_file(converted):
    tree, comments = converted(AXOLOTL)
    assert tree == {
        "model": "NousResearch/Llama-3.2-1B",
        "quantize": "nf4",
        "data": {"train": "rows.jsonl", "max_length": 2048},
        "chain": {
            "ranks": [16],
            "alpha": 32,
            "target_modules": ["gate_proj", "down_proj"],
            "epochs": [3],
            "hold": "carried",
        },
        "train": {
            "batch_size": 2,
            "gradient_accumulation": 4,
            "optimizer": "adamw",
            "schedule": "cosine",
            "lr": 2e-4,
            "dtype": "bfloat16",
        },
        "output": "./out",
    }
    make_config(tree)
    for lost in (
        "# sample_packing: true – not needed: rows are packed",
        "# warmup_ratio: 0.1 – give train.warmup_steps",
        '# special_tokens: {"pad_token": "<pad>"} – not a key of chainlora',
    ):
        assert lost in comments
    for kept in ("learning_rate", "val_set_size", "adapter", "lora_model_dir", "Still to do"):
        assert kept not in comments
    assert "the type" not in comments  # alpaca is recognised
    assert "the type pygmalion is not read" in converted(AXOLOTL.replace("alpaca", "pygmalion"))[1]


def test_a_llama_factory_file(converted):
    tree, comments = converted(LLAMA_FACTORY)
    config = make_config(tree)
    assert (config.chain.ranks, config.chain.epochs) == ((8,), (3.0,))
    assert (config.chain.target_modules, config.chain.tune) == ("all-linear", "lora")
    assert (config.train.save_every, config.train.dtype) == (500, "bfloat16")
    assert "# lr_scheduler_type: polynomial – train.schedule knows no such value; convertible" in (
        comments
    )
    assert config.data.chat_template == "llama3"


def test_optimizers_that_other_tools_name(converted):
    found = {}
    for theirs in ("adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "lion_8bit", "lion_32bit"):
        tree, comments = converted(f"optim: {theirs}\nlora_r: 8\nlearning_rate: 1e-3\n")
        assert "without an equivalent" not in comments.lower()
        found[theirs] = tree["train"]["optimizer"]
    assert found == {
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_8bit": "paged_adamw_8bit",
        "adafactor": "adafactor",
        "lion_8bit": "lion",
        "lion_32bit": "lion",
    }
    for key in ("optim", "optimizer"):
        assert set(foreign_keys()[key].values.values()) == set(OPTIMIZERS)
    tree, comments = converted("optim: apollo_adamw\nlora_r: 8\nlearning_rate: 1e-3\n")
    assert "# optim: apollo_adamw – train.optimizer knows no such value; convertible: " in comments


def test_keys_of_trainer_and_peft(converted):
    tree, comments = converted(TRAINER_AND_PEFT)
    config = make_config(tree)
    assert (config.chain.steps, config.chain.epochs) == ((100,), None)
    assert "# num_train_epochs: [3] – the steps end it" in comments
    assert (config.chain.init, config.chain.rslora) == ("pissa", True)
    assert (config.chain.target_modules, config.chain.extra_modules) == (("q_proj",), ("lm_head",))
    assert config.train.betas == (0.9, 0.95)
    assert (config.train.weight_decay, config.train.seed) == (0.01, 3)
    assert (config.train.trackers, config.train.keep_best) == (("tensorboard",), True)
    assert "fp16" not in comments


def test_what_a_converted_file_lacks_is_said(converted):
    tree, comments = converted("learning_rate: 1e-3\nlora_r: 8\n")
    assert tree == {"train": {"lr": 1e-3}, "chain": {"ranks": [8]}}
    assert "# Still to do: `model` must be given (got none); add it" in comments


def test_a_whole_foreign_file_is_told_from_a_wrong_key(chainlora, tmp_path):
    file = tmp_path / "axolotl.yaml"
    file.write_text(AXOLOTL)
    chainlora("train", file).refused(
        "config file must have chainlora's keys (got ",
        " keys of other tools: base_model (here model), load_in_4bit (here quantize), datasets (",
        f"rewrite it: chainlora convert-config {file} > chainlora.yaml",
    )
    file.write_text("model: m\ndata: {train: x}\nchain: {steps: [1], ranks: [8]}\nlora_r: 8\n")
    with pytest.raises(ConfigError, match=r"^unknown key `lora_r`; here it is `chain.ranks`"):
        load_config(file)


def test_what_cannot_be_converted(chainlora, tmp_path):
    assert chainlora("convert-config").status == 2
    chainlora("convert-config", tmp_path / "none.yaml").refused("config file must be readable")
    file = tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "data": {"train": "x"}}))
    chainlora("convert-config", file).refused("must have keys of another tool (got none in ")

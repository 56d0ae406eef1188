"""Configs of other tools: what is converted trains what the tool would train, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from chainlora import RunConfig, load_config, make_config
from chainlora.config.foreign import _table, foreign_keys, keys_table
from chainlora.config.loading import parse_yaml
from chainlora.errors import ConfigError
from chainlora.training.optimizers import OPTIMIZERS

# Whole configs as the tools' own examples have them.
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_8bit
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
warmup_steps: 10
weight_decay: 0.0
special_tokens: {pad_token: "<pad>"}
"""
LLAMA_FACTORY = """
model_name_or_path: meta-llama/Llama-3.2-1B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 64
lora_target: all
dataset: rows.jsonl
template: llama3
cutoff_len: 1024
max_samples: 1000
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
save_steps: 500
bf16: true
output_dir: saves/x
"""
TORCHTUNE = """
output_dir: saves/torchtune
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  lora_rank: 64
  lora_alpha: 128
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: models/Llama-3.2-1B-Instruct/original/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: models/Llama-3.2-1B-Instruct/
  checkpoint_files: [model.safetensors]
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  train_on_input: False
  packed: False
seed: null
shuffle: True
batch_size: 4
optimizer: {_component_: torch.optim.AdamW, fused: True, lr: 3e-4}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
dtype: bf16
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False}
"""
LITGPT = """
checkpoint_dir: checkpoints/meta-llama/Llama-3.2-1B
out_dir: out/finetune
precision: bf16-true
quantize:
devices: 4
lora_r: 32
lora_key: true
data:
  class_path: litgpt.data.JSON
  init_args: {json_path: rows.json, mask_prompt: true, val_split_fraction: 0.05}
train: {save_interval: 200, global_batch_size: 8, micro_batch_size: 2, epochs: 2, max_norm:}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.0002, betas: [0.9, 0.95]}
seed: 1337
"""
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
use_peft: true
lora_target_modules: all-linear
gradient_accumulation_steps: 2
max_steps: 100
num_train_epochs: 3
warmup_ratio: 0.1
packing: true
"""
PEFT = """
base_model_name_or_path: m
train_file: rows.jsonl
r: 16
lora_alpha: 64
use_rslora: true
target_modules: q_proj
modules_to_save: lm_head
adam_beta2: 0.95
weight_decay: 0.01
lr_scheduler_type: constant
report_to: tensorboard
load_best_model_at_end: true
validation_file: held_out.jsonl
fp16: false
"""
COMMON = {"tune": "lora", "quantize": None, "template": None, "steps": None, "clip": 1.0}
LLAMA = ["q_proj", "v_proj"]  # what PEFT adapts where nothing is said
# What each tool would train, on two devices: read from its own code and documents.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "Axolotl": (
        AXOLOTL,
        {
            "rows": "rows.jsonl", "batch": 2 * 4 * 2, "scaling": 0.5, "epochs": (3,), "lr": 2e-4,
            "template": "alpaca", "quantize": "nf4", "schedule": "cosine", "dropout": 0.05,
            "targets": ["gate_proj", "down_proj"], "decay": 0, "warmup": 10, "longest": 2048,
            "held out": 0.05,
        },
    ),
    "LLaMA-Factory": (
        LLAMA_FACTORY,
        {
            "rows": "rows.jsonl", "batch": 1 * 8 * 2, "scaling": 2.0, "epochs": (3,), "lr": 1e-4,
            "template": "llama3", "schedule": "cosine", "dropout": 0, "targets": "all-linear",
            "decay": 0, "warmup": 0, "longest": 1024, "count": 1000,
        },
    ),
    "torchtune": (
        TORCHTUNE,
        {
            "rows": "yahma/alpaca-cleaned", "batch": 4 * 8 * 2, "scaling": 2.0, "epochs": (1,),
            "lr": 3e-4, "schedule": "cosine", "dropout": 0, "clip": None, "decay": 0.01,
            "targets": [*LLAMA, "o_proj", "gate_proj", "up_proj", "down_proj"], "warmup": 100,
            "longest": None,
        },
    ),
    "litgpt": (
        LITGPT,
        {
            "rows": "rows.json", "batch": 8, "scaling": 0.5, "epochs": (2,), "lr": 2e-4,
            "template": "alpaca", "schedule": "cosine", "dropout": 0.05, "clip": None,
            "targets": ["q_proj", "k_proj", "v_proj"], "decay": 0.01, "warmup": 100,
            "longest": None, "held out": 0.05,
        },
    ),
    "TRL": (
        TRL,
        {
            "rows": "trl-lib/Capybara", "batch": 8 * 2 * 2, "scaling": 2.0, "epochs": None,
            "steps": (100,), "lr": 2e-5, "schedule": "linear", "dropout": 0.05,
            "targets": "all-linear", "decay": 0, "warmup": 0, "longest": 1024,
        },
    ),
    "Transformers": (
        PEFT,
        {
            "rows": "rows.jsonl", "batch": 8 * 2, "scaling": 16.0, "epochs": (3,), "lr": 5e-5,
            "schedule": "constant", "dropout": 0, "targets": ["q_proj"], "decay": 0.01,
            "warmup": 0, "longest": None, "held out": "held_out.jsonl",
        },
    ),
}  # fmt: skip


@pytest.fixture
def convert(chainlora, tmp_path):
    """Convert a text by the command line."""

    def convert_text(text: str, *options: Any) -> Any:
        (tmp_path / "theirs.yaml").write_text(text)
        return chainlora("convert-config", tmp_path / "theirs.yaml", *options)

    return convert_text


def trained(config: RunConfig) -> dict[str, Any]:
    """What a config trains, in the words of `TRAINED`."""
    chain, train, data = config.chain, config.train, config.data
    (link,) = chain.links()
    targets = chain.target_modules
    return {
        "rows": data.train,
        "count": data.num_train,
        "held out": data.validation,
        "longest": data.max_length,
        "template": data.chat_template,
        "batch": train.batch_size * train.gradient_accumulation,
        "scaling": link.scaling,
        "targets": targets if isinstance(targets, str) else list(targets),
        "dropout": chain.dropout,
        "epochs": chain.epochs,
        "steps": chain.steps,
        "tune": chain.tune,
        "quantize": config.quantize,
        "lr": train.lr,
        "schedule": train.schedule,
        "warmup": train.warmup_steps,
        "decay": train.weight_decay,
        "clip": train.max_grad_norm,
    }


@pytest.mark.parametrize("tool", TRAINED)
def test_a_converted_config_trains_what_the_tool_would_train(convert, tool):
    text, expected = TRAINED[tool]
    outcome = convert(text, "--processes", 2)
    assert outcome.status == 0
    assert f"read as a config of {tool}." in outcome.out
    assert "still to do" not in outcome.out
    found = trained(make_config(parse_yaml(outcome.out)))
    assert found == {"count": None, "held out": None} | COMMON | expected
    notes = [line for line in outcome.out.splitlines() if line.startswith("# ")][3:]
    assert outcome.err == "".join(f"{line[2:]}\n" for line in notes)
    for key in leaves(parse_yaml(text)):
        assert sum(line.startswith(f"# {key}: ") for line in notes) >= 1, key


def test_a_warmup_of_the_tool_itself_is_named(convert):
    """Axolotl warms up over 3 % of the steps where its file says nothing."""
    assert "warmup_ratio" not in convert(AXOLOTL).out
    silent = convert(AXOLOTL.replace("warmup_steps: 10\n", ""))
    assert "\n# warmup_ratio: 0.03 (what Axolotl does without it) – give train.war" in silent.out


def test_the_loss_of_trl_on_whole_chats_is_named(convert):
    """TRL learns the user's turns of `messages` too, unless its file says otherwise."""
    assert "# assistant_only_loss: false (what TRL does without it) – of chats" in convert(TRL).out
    asked = convert(TRL + "assistant_only_loss: true\n")
    assert asked.out.count("assistant_only_loss") == 1


def test_dpo_is_dpo(convert):
    text = LLAMA_FACTORY.replace("stage: sft", "stage: dpo\npref_beta: 0.3\npref_loss: sigmoid")
    config = make_config(parse_yaml(convert(text).out))
    assert (config.train.loss, config.train.dpo_beta) == ("dpo", 0.3)
    convert(text.replace("sigmoid", "orpo")).refused("pref_loss: orpo – of pairs the loss is DPO's")
    pairs = AXOLOTL.replace("    type: alpaca\n", "") + "rl: orpo\norpo_alpha: 0.3\n"
    config = make_config(parse_yaml(convert(pairs).out))
    assert (config.train.loss, config.train.orpo_beta) == ("orpo", 0.3)


TRL_DPO = TRL + "beta: 0.3\nlabel_smoothing: 0.1\nprecompute_ref_log_probs: true\n"


@pytest.mark.parametrize("loss_type", ["sigmoid", "[sigmoid]"])
def test_dpo_of_trl_is_dpo(convert, loss_type):
    text = f"{TRL_DPO}loss_type: {loss_type}\n"
    outcome = convert(text)
    config = make_config(parse_yaml(outcome.out))
    train = config.train
    assert (train.loss, train.dpo_beta, train.dpo_label_smoothing) == ("dpo", 0.3, 0.1)
    assert (train.lr, config.chain.dropout) == (1e-6, 0.0)  # of `trl dpo`, which has no dropout
    assert "lora_dropout – TRL's DPO switches it off" in outcome.out
    assert "assistant_only_loss" not in outcome.out
    assert "loss_type – read as DPO's; CPO's, without a reference, is not here" in outcome.out
    convert(f"{text}cpo_alpha: 1.0\n").refused("cpo_alpha")
    own = f"{text}lora_dropout: 0.1\nlearning_rate: 5.0e-6\n"
    for said, dropout in (("", 0.0), ("disable_dropout: false\n", 0.1)):
        config = make_config(parse_yaml(convert(own + said).out))
        assert (config.train.lr, config.chain.dropout) == (5e-6, dropout)


def test_of_supervised_training_trl_s_loss_type_asks_for_nothing(convert):
    config = make_config(parse_yaml(convert(TRL + "loss_type: nll\n").out))
    assert (config.train.loss, config.train.lr) == (None, 2e-5)


def test_columns_of_rows_have_fields(convert):
    columns = "\n    field_instruction: ask\n    field_output: reply\n    field_messages: turns"
    config = make_config(parse_yaml(convert(AXOLOTL.replace(ROWS, ROWS + columns)).out))
    fields = {"instruction": "ask", "output": "reply", "conversations": "turns"}
    assert config.data.fields == fields


def leaves(tree: Any, prefix: str = "") -> list[str]:
    """Every key of a config, those inside sections and the first section of lists included."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = tree[0]
    if not isinstance(tree, dict):
        return [prefix]
    return [leaf for key in tree for leaf in leaves(tree[key], f"{prefix}.{key}".strip("."))]


def test_the_batch_of_one_device_is_said_for_several(convert):
    outcome = convert(AXOLOTL)
    assert parse_yaml(outcome.out)["train"]["batch_size"] == 2
    for stream in (outcome.out, outcome.err):
        assert (
            "micro_batch_size counts the rows of one device, train.batch_size those of all: "
            "converted for 1 process(es), a step has 8 rows; for N processes give --processes N, "
            "or train.batch_size: 2·N"
        ) in stream


ROWS = "  - path: rows.jsonl"
REFUSED = {
    "preferences in Axolotl": (
        AXOLOTL + "rl: ipo\n",
        "rl: ipo – train.loss knows no such value; convertible: dpo",
    ),
    "preferences in LLaMA-Factory": (
        LLAMA_FACTORY.replace("sft", "kto"),
        "stage: kto – train.loss knows no such value",
    ),
    "another loss of pairs in TRL": (
        TRL_DPO + "loss_type: ipo\n",
        "loss_type: ipo – train.loss knows no such value; convertible: sigmoid",
    ),
    "several losses of pairs in TRL": (
        TRL_DPO + "loss_type: [sigmoid, sft]\n",
        'loss_type: ["sigmoid", "sft"] – train.loss knows no such value',
    ),
    "a beta that says not of what": (TRL_DPO, "beta – for DPO add loss_type: sigmoid"),
    "another divergence": (
        TRL_DPO + "loss_type: sigmoid\nf_divergence_type: js_divergence\n",
        "f_divergence_type: js_divergence – of pairs",
    ),
    "a slice": (AXOLOTL.replace(ROWS, f"{ROWS}\n    split: train[:10%]"), "split: train[:10%] – "),
    "a shard": (AXOLOTL.replace(ROWS, f"{ROWS}\n    shards: 10"), "datasets.shards: 10 – give"),
    "names of turns": (
        AXOLOTL.replace(ROWS, f"{ROWS}\n    message_property_mappings: {{role: who}}"),
        "datasets.message_property_mappings.role: who – a turn has",
    ),
    "roles": (AXOLOTL.replace(ROWS, f"{ROWS}\n    roles_to_train: [user]"), 'roles_to_train: ["u'),
    "a key that is not known": (AXOLOTL.replace(ROWS, f"{ROWS}\n    x: 1"), "datasets.x: 1 – not"),
    "a type of rows": (AXOLOTL.replace("alpaca", "pygmalion"), "datasets.type: pygmalion – rows"),
    "two data sets": (AXOLOTL.replace(ROWS, f"  - path: a\n{ROWS}"), 'datasets.1: {"path": "rows'),
    "two names": (LLAMA_FACTORY.replace("rows.jsonl", "a,b"), "dataset: a,b – one file, folder"),
    "losses on prompts": (AXOLOTL + "train_on_inputs: true\n", "train_on_inputs: true – the loss"),
    "a default on prompts": (
        TORCHTUNE.replace("train_on_input: False", ""),
        "dataset.train_on_input: true (what torchtune does without it) – the loss",
    ),
    "litgpt's default": (
        LITGPT.replace("mask_prompt: true, ", ""),
        "data.init_args.mask_prompt: false (what litgpt does without it) – ",
    ),
    "an adapter to start from": (AXOLOTL.replace("dir:\n", "dir: x\n"), "lora_model_dir: x – a"),
    "a schedule": (LLAMA_FACTORY.replace("cosine", "polynomial"), "polynomial – train.schedule"),
    "an optimizer": (AXOLOTL.replace("adamw_8bit", "apollo_adamw"), "optimizer: apollo_adamw – "),
    "a batch of no number": (AXOLOTL.replace("size: 2", "size: auto"), "size: auto – give a"),
    "a batch that does not divide": (LITGPT.replace("size: 8", "size: 7"), "must be a multiple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_something_else_is_refused(convert, name):
    text, part = REFUSED[name]
    convert(text).refused("a config to convert must train the same here (got ", part, "; correct")


@pytest.mark.parametrize("key", ["x\ntrain: {lr: 9}\ny", "x\x85model: evil", "x\rmodel: evil"])
def test_a_key_never_leaves_its_comment(convert, key):
    tree = yaml.safe_load(PEFT) | {key: "a\nmodel: evil"}
    outcome = convert(yaml.safe_dump(tree))
    assert parse_yaml(outcome.out) == parse_yaml(convert(PEFT).out)


def test_what_a_converted_file_lacks_is_said(convert):
    outcome = convert("r: 8\nlearning_rate: 1e-3\n")
    assert "# still to do: `model` must be given (got none); add it" in outcome.out


def test_our_side_of_the_table_exists():
    assert len(foreign_keys()) == sum(len(row["keys"]) for row in _table()["rows"])  # none twice
    for key, entry in foreign_keys().items():
        assert entry.tools
        assert entry.ours or entry.say, key
        if entry.ours is None:
            continue
        section, _, name = entry.ours.partition(".fields")[0].rpartition(".")
        fields = RunConfig.model_fields
        model = fields[section].annotation if section else RunConfig
        assert name in model.model_fields, key
    for key in ("optim", "optimizer"):
        assert set(foreign_keys()[key].values.values()) == set(OPTIMIZERS)


def test_the_table_of_keys_is_printed(chainlora):
    assert chainlora("convert-config", "--keys").out == keys_table()


@pytest.mark.parametrize("tool", TRAINED)
def test_a_whole_foreign_file_is_told_from_a_wrong_key(chainlora, tmp_path, tool):
    file = tmp_path / "theirs.yaml"
    file.write_text(TRAINED[tool][0])
    chainlora("train", file).refused(
        "config file must have chainlora's keys (got ",
        f"rewrite it: chainlora convert-config {file} > chainlora.yaml",
    )
    file.write_text("model: m\ndata: {train: x}\nchain: {steps: [1], ranks: [8]}\nlora_r: 8\n")
    with pytest.raises(ConfigError, match=r"^unknown key `lora_r`; here it is `chain.ranks`"):
        load_config(file)


def test_what_cannot_be_converted(chainlora, convert, tmp_path):
    assert chainlora("convert-config").status == 2
    chainlora("convert-config", tmp_path / "none.yaml").refused("config file must be readable")
    convert("model: m\ndata: {train: x}\n").refused("must have keys of another tool (got none)")

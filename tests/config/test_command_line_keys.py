"""Every config key and every preset, through the command line: what works in Python works there."""

from __future__ import annotations

from functools import reduce
from operator import getitem

import pytest
import yaml
from helpers import settings, stage_dir

from chainlora.config.json_schema import config_sections
from chainlora.config.reading import load_config
from chainlora.config.schema import StartData
from chainlora.config.yaml_text import one_value, parse_yaml

# A value of every key that is not its default, in as few runs as they fit into.
RUNS = {
    "factors": """
{chain.ranks: [3, 2], chain.alpha: [4, 2], chain.rslora: true, chain.dropout: 0.1,
chain.init: gradient, chain.init_batches: 1, chain.lora_bias: false,
chain.target_modules: all-linear, chain.exclude_modules: [v_proj], chain.steps: [1, 2],
train.lr: 2e-3, train.schedule: cosine, train.warmup_steps: 1, train.batch_size: 4,
train.gradient_accumulation: 2, train.group_by_length: true, train.seed: 7,
train.weight_decay: 0.1, train.betas: [0.8, 0.99], train.eps: 1e-6, train.max_grad_norm: null,
train.log_every: 1}
""",
    "stops": """
{chain.hold: carried, chain.tokens: [500, 300], chain.steps: null,
train.eval_every: 1,
train.select_metric: loss, train.keep_best: true, train.early_stop: 1, train.save_every: 1,
train.lora_plus_ratio: 4}
""",
    "epochs": """
{chain.ranks: [4, 2], chain.alpha_policy: fixed,
chain.epochs: [0.5, 0.25], chain.steps: null, train.restart_schedule: true,
train.restart_warmup_steps: 1, train.dtype: bfloat16, train.gradient_checkpointing: true}
""",
    "plain": "{train.optimizer: sgd, train.speedups: 'off', chain.knots: auto}",
    "time constant": """
{chain.knots.time_constant: 3, train.optimizer_options: {amsgrad: true}, train.eval_at_knots: false}
""",
    "soft knots and rows": """
{chain.knots.every: 1, chain.knots.share: 0.5, chain.knots.follow_rate: true,
chain.knots.moments: new, chain.knots.policy: spaced,
data.num_train: 16, data.num_validation: 4, data.max_length: 64, data.truncation: left,
data.shots: 1, data.new_rows_only: true, data.keep_rows: false,
data.keep_conflicts: true}
""",
}
# Where the rows and the model come from: given in every run of this file.
GIVEN = {"model", "output", "train.trackers", "data.task", "data.format"}
GIVEN |= {"data.train", "data.validation", "data.test", "data.num_test"}
# test_data_templates.py, test_dpo.py, test_kept_rows.py, test_row_formats.py,
# test_quantized.py, where its packages are, test_start_rows.py, stages, beside
GIVEN |= {"data.chat_template", "data.template_arguments", "train.loss", "train.dpo_beta"}
GIVEN |= {"train.dpo_label_smoothing", "train.orpo_beta", "data.replay"}
GIVEN |= {"data.fields", "quantize", "start", "start_data"}
GIVEN |= {f"start_data.{key}" for key in StartData.model_fields}
GIVEN |= {"train.shard", "plugins"}  # test_sharing.py, test_extension_points.py


# Every key of a config, sections included.
KEYS = [
    f"{prefix}{key}" for prefix, model in config_sections().items() for key in model.model_fields
]


def test_every_key_is_here():
    said = {key for text in RUNS.values() for key in parse_yaml(text)}
    assert said | GIVEN | {"data", "chain", "train"} == {*KEYS}


@pytest.mark.parametrize("name", RUNS)
def test_every_key_by_the_command_line(name, chainlora, tiny_folder, sentiment, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "run")
    tree["chain"] |= {"ranks": [4, 4], "steps": [2, 2]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    said = parse_yaml(RUNS[name])
    words = [f"--{key}={one_value(value)}" for key, value in said.items()]
    result = chainlora("train", tmp_path / "config.yaml", *words, "--json").json
    assert result["metrics"]["validation"]["loss"] > 0
    resolved = yaml.safe_load((stage_dir(tmp_path / "run") / "config.yaml").read_text())
    for key, value in said.items():
        found = reduce(getitem, key.split("."), resolved)
        if isinstance(value, dict):
            assert found.items() >= value.items()
        elif value != "auto":
            assert found == value, key


def test_keys_of_a_model_section_are_replaced_alone(tmp_path):
    """--quantize had no effect on it, and --model dropped its quantize."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {name: m, quantize: nf4}\nchain: {ranks: 8, steps: 9, hold: carried}\n"
        "data: {train: a.jsonl}"
    )
    found = [load_config(path, [keys]) for keys in (("quantize", "int8"), ("model", "n"))]
    assert [(c.model, c.quantize) for c in found] == [("m", "int8"), ("n", "nf4")]

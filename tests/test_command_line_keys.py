"""Every config key and every preset, through the command line: what works in Python works there."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import get_args

import pytest
import yaml
from helpers import settings, stage_dir
from pydantic import BaseModel

from chainlora.config.schema import RunConfig, StartData
from chainlora.config.yaml_text import one_value, parse_yaml

# A value of every key that is not its default.
OTHERS = parse_yaml("""
chain:
  {ranks: [3, 2], alpha: [4, 2], alpha_policy: fixed, rslora: true, dropout: 0.1, init: gradient,
  init_batches: 1, lora_bias: false, dora: true, target_modules: all-linear, train_factors: B,
  exclude_modules: [v_proj], extra_modules: [norm], hold: carried, tune: full, epochs: [0.5, 0.25],
  steps: [1, 2], tokens: [500, 300],
  plateau: {of: loss, patience: 1, min_change: 0.5},
  knots: {every: 1, share: 0.5, time_constant: 3, follow_rate: true, moments: new, policy: spaced}}
data:
  {num_train: 16, num_validation: 4, max_length: 64, truncation: left, shots: 1, data_seed: 3,
  new_rows_only: true, keep_rows: false}
train:
  {lr: 2e-3, lora_plus_ratio: 4, schedule: cosine, restart_schedule: true, warmup_steps: 1,
  restart_warmup_steps: 1, batch_size: 4, gradient_accumulation: 2, group_by_length: true,
  dtype: bfloat16, seed: 7, optimizer: sgd, weight_decay: 0.1, betas: [0.8, 0.99], eps: 1e-6,
  max_grad_norm: null, optimizer_reset: prune, prune_fraction: 0.5, eval_every: 1,
  eval_at_knots: false, select_metric: loss, keep_best: true, early_stop: 1, accept_links: better,
  save_every: 1, log_every: 1, gradient_checkpointing: true, speedups: "off"}
""")
VALUES = {"chain.knots": "auto", "chain.plateau": {"patience": 2}}
VALUES |= {"train.optimizer_options": {"amsgrad": True}}
for name, section in OTHERS.items():
    for key, value in section.items():
        inner = value if isinstance(value, dict) else {"": value}
        VALUES |= {f"{name}.{key}.{part}".rstrip("."): each for part, each in inner.items()}
# What must be said beside some of them.
BESIDE = {
    **{f"chain.{key}": {"chain.steps": None} for key in ("epochs", "tokens")},
    **{f"chain.knots.{key}": {"chain.knots.every": 1} for key in ("share", "follow_rate")},
    **{f"chain.knots.{key}": {"chain.knots.every": 1} for key in ("moments", "policy")},
    "chain.alpha_policy": {"chain.ranks": [4, 2]},
    "chain.init_batches": {"chain.init": "gradient"},
    "chain.exclude_modules": {"chain.target_modules": "all-linear"},
    "train.prune_fraction": {"train.optimizer_reset": "prune"},
    "train.keep_best": {"train.eval_every": 1},
}
# Where the rows and the model come from: given in every run of this file.
GIVEN = {"model", "output", "train.trackers", "data.task", "data.dir", "data.format"}
GIVEN |= {"data.train", "data.validation", "data.test", "data.num_test"}
# test_data_templates.py, test_dpo.py, test_kept_rows.py, test_tasks_splits.py, test_row_formats.py,
# test_quantized.py, where its packages are, stages, test_start_rows.py, test_beside.py
GIVEN |= {"data.chat_template", "data.template_arguments", "train.loss", "train.dpo_beta"}
GIVEN |= {"train.dpo_label_smoothing", "train.orpo_beta", "data.replay", "data.sampling"}
GIVEN |= {"data.fields", "quantize", "start", "start_data", "data.rehearse"}
GIVEN |= {f"start_data.{key}" for key in StartData.model_fields}
GIVEN |= {"train.shard", "plugins"}  # test_sharing.py, test_extension_points.py


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config, sections that may be left out included."""
    found = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        section = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if section and section[0] is not field.annotation:
            found.append(f"{prefix}{name}")
        found += keys(section[0], f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return found


def test_every_key_is_here():
    assert set(VALUES) | GIVEN == set(keys(RunConfig))


@pytest.mark.parametrize("key", VALUES)
def test_every_key_by_the_command_line(key, chainlora, tiny_folder, sentiment, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "run")
    tree["chain"] |= {"ranks": [4, 4], "steps": [2, 2]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    said = {key: VALUES[key]} | BESIDE.get(key, {})
    words = [f"--{name}={one_value(value)}" for name, value in said.items()]
    result = chainlora("train", tmp_path / "config.yaml", *words, "--json").json
    assert result["metrics"]["validation"]["loss"] > 0
    resolved = yaml.safe_load((stage_dir(tmp_path / "run") / "config.yaml").read_text())
    for name, value in said.items():
        found = reduce(getitem, name.split("."), resolved)
        if isinstance(value, dict):
            assert found.items() >= value.items()
        elif value != "auto":
            assert found == value, name

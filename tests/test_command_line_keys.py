"""Every config key and every preset, through the command line: what works in Python works there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers import settings
from pydantic import BaseModel

from chainlora.cli.main import run as command
from chainlora.config.schema import RunConfig

# For every key, the overrides of one run in which it has another value than its default.
VALUES: dict[str, dict[str, Any]] = {
    "chain.ranks": {"chain.ranks": "[3, 2]"},
    "chain.alpha": {"chain.alpha": "[4, 2]"},
    "chain.alpha_policy": {"chain.alpha_policy": "fixed", "chain.ranks": "[4, 2]"},
    "chain.rslora": {"chain.rslora": "true"},
    "chain.dropout": {"chain.dropout": "0.1"},
    "chain.init": {"chain.init": "gradient"},
    "chain.init_batches": {"chain.init": "gradient", "chain.init_batches": "1"},
    "chain.lora_bias": {"chain.lora_bias": "false"},
    "chain.dora": {"chain.dora": "true"},
    "chain.target_modules": {"chain.target_modules": "all-linear"},
    "chain.exclude_modules": {
        "chain.exclude_modules": "[v_proj]",
        "chain.target_modules": "all-linear",
    },
    "chain.extra_modules": {"chain.extra_modules": "[norm]"},
    "chain.train_factors": {"chain.train_factors": "B"},
    "chain.epochs": {"chain.epochs": "[0.5, 0.25]", "chain.steps": "null"},
    "chain.steps": {"chain.steps": "[1, 2]"},
    "chain.tokens": {"chain.tokens": "[500, 300]", "chain.steps": "null"},
    "chain.minutes": {"chain.minutes": "[0.001, 0.001]", "chain.steps": "null"},
    "chain.plateau": {"chain.plateau.patience": "2"},
    "chain.plateau.of": {"chain.plateau.of": "loss"},
    "chain.plateau.patience": {"chain.plateau.patience": "1"},
    "chain.plateau.min_change": {"chain.plateau.min_change": "0.5"},
    "chain.hold": {"chain.hold": "carried"},
    "chain.tune": {"chain.tune": "full"},
    "chain.knots": {"chain.knots": "auto"},
    "chain.knots.every": {"chain.knots.every": "1"},
    "chain.knots.share": {"chain.knots.share": "0.5", "chain.knots.every": "1"},
    "chain.knots.time_constant": {"chain.knots.time_constant": "3"},
    "chain.knots.follow_rate": {"chain.knots.follow_rate": "true", "chain.knots.every": "1"},
    "chain.knots.moments": {"chain.knots.moments": "new", "chain.knots.every": "1"},
    "chain.knots.policy": {"chain.knots.policy": "spaced", "chain.knots.every": "1"},
    "data.num_train": {"data.num_train": "16"},
    "data.num_validation": {"data.num_validation": "4"},
    "data.max_length": {"data.max_length": "64"},
    "data.truncation": {"data.truncation": "left"},
    "data.shots": {"data.shots": "1"},
    "data.data_seed": {"data.data_seed": "3"},
    "data.new_rows_only": {"data.new_rows_only": "true"},
    "data.keep_rows": {"data.keep_rows": "false"},
    "train.lr": {"train.lr": "2e-3"},
    "train.lora_plus_ratio": {"train.lora_plus_ratio": "4"},
    "train.schedule": {"train.schedule": "cosine"},
    "train.restart_schedule": {"train.restart_schedule": "true"},
    "train.warmup_steps": {"train.warmup_steps": "1"},
    "train.restart_warmup_steps": {"train.restart_warmup_steps": "1"},
    "train.batch_size": {"train.batch_size": "4"},
    "train.gradient_accumulation": {"train.gradient_accumulation": "2"},
    "train.group_by_length": {"train.group_by_length": "true"},
    "train.dtype": {"train.dtype": "bfloat16"},
    "train.seed": {"train.seed": "7"},
    "train.optimizer": {"train.optimizer": "sgd"},
    "train.optimizer_options": {"train.optimizer_options": "{amsgrad: true}"},
    "train.weight_decay": {"train.weight_decay": "0.1"},
    "train.betas": {"train.betas": "[0.8, 0.99]"},
    "train.eps": {"train.eps": "1e-6"},
    "train.max_grad_norm": {"train.max_grad_norm": "null"},
    "train.optimizer_reset": {"train.optimizer_reset": "prune"},
    "train.prune_fraction": {"train.optimizer_reset": "prune", "train.prune_fraction": "0.5"},
    "train.eval_every": {"train.eval_every": "1"},
    "train.eval_at_knots": {"train.eval_at_knots": "false"},
    "train.select_metric": {"train.select_metric": "loss"},
    "train.keep_best": {"train.keep_best": "true", "train.eval_every": "1"},
    "train.early_stop": {"train.early_stop": "1"},
    "train.accept_links": {"train.accept_links": "better"},
    "train.save_every": {"train.save_every": "1"},
    "train.log_every": {"train.log_every": "1"},
    "train.shard": {"train.shard": "fsdp2"},
    "train.gradient_checkpointing": {"train.gradient_checkpointing": "true"},
    "train.speedups": {"train.speedups": "off"},
}
# Where the rows and the model come from: given in every run of this file.
GIVEN = {"model", "output", "train.trackers", "data.task", "data.dir", "data.format"}
GIVEN |= {"data.train", "data.validation", "data.test", "data.num_test"}
GIVEN |= {"data.chat_template", "data.template_arguments"}  # test_data_templates.py
GIVEN |= {"train.loss", "train.dpo_beta", "train.dpo_label_smoothing", "train.orpo_beta"}
GIVEN |= {"data.replay"}  # test_kept_rows.py
GIVEN |= {"data.sampling"}  # test_tasks_splits.py
GIVEN |= {"data.fields"}  # test_row_formats.py
GIVEN |= {"quantize"}  # test_quantized.py, where its packages are
GIVEN |= {"start"}  # test_stages.py, test_start.py


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


def train(tree: dict, folder: Path, overrides: dict[str, str], capfd) -> dict:
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    capfd.readouterr()
    status = command(["train", str(folder / "config.yaml"), *words, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_every_key_is_here():
    assert set(VALUES) | GIVEN == set(keys(RunConfig))


@pytest.mark.parametrize("key", VALUES)
def test_every_key_by_the_command_line(key, tiny_folder, sentiment, tmp_path, capfd):
    tree = settings(tiny_folder, sentiment, tmp_path / "run")
    tree["chain"] |= {"ranks": [4, 4], "steps": [2, 2]}
    result = train(tree, tmp_path, VALUES[key], capfd)
    assert result["metrics"]["validation"]["loss"] > 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for name, value in VALUES[key].items():
        section, *rest = name.split(".")
        found = resolved[section]
        for part in rest:
            found = found[part]
        if name == "train.speedups":
            assert found == value
        elif value != "auto":
            assert found == yaml.safe_load(value) or str(found) == str(float(value)), name

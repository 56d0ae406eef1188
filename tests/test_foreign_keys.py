"""Keys of other tools: errors say what they are called here."""

from __future__ import annotations

import pytest

from chainlora import RunConfig, load_config
from chainlora.config.messages import foreign_keys
from chainlora.errors import ConfigError
from chainlora.training.optimizers import OPTIMIZERS

# Beginnings of configs as the tools' own examples have them.
FILES = {
    "Axolotl": "base_model: m\ndatasets:\n  - {path: rows.jsonl, type: alpaca}\nlora_r: 32\n",
    "LLaMA-Factory": "model_name_or_path: m\nlora_rank: 8\nlora_target: all\ncutoff_len: 1024\n",
    "torchtune": "model: {lora_rank: 64, lora_alpha: 128}\ndataset: {packed: false}\nepochs: 1\n"
    "optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}\n",
    "litgpt": "checkpoint_dir: m\nlora_r: 32\nlora_key: true\nprecision: bf16-true\n",
    "TRL": "model_name_or_path: m\ndataset_name: d\nuse_peft: true\nmax_steps: 100\n",
    "PEFT": "base_model_name_or_path: m\nr: 16\nlora_alpha: 64\ntarget_modules: q_proj\n",
}


@pytest.mark.parametrize("tool", FILES)
def test_a_whole_foreign_file_is_told_from_a_wrong_key(chainlora, tmp_path, tool):
    file = tmp_path / "theirs.yaml"
    file.write_text(FILES[tool])
    chainlora("train", file).refused(
        f"config file must have chainlora's keys (got {file} with ", "write these keys in a config"
    )


def test_one_foreign_key_is_named_by_ours(tmp_path):
    file = tmp_path / "mixed.yaml"
    file.write_text("model: m\ndata: {train: x}\nchain: {steps: [1], ranks: [8]}\nlora_r: 8\n")
    with pytest.raises(ConfigError, match=r"^unknown key `lora_r`; here it is `chain.ranks`"):
        load_config(file)


def test_our_side_of_the_table_exists():
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

"""What people who come from other tools type, and the one line that answers."""

from __future__ import annotations

import shlex
from typing import NamedTuple

import pytest

FILES = {
    "run.yaml": "model: m\ndata: {train: rows.jsonl}\nchain: {ranks: [8, 8], epochs: [1, 1]}\n"
    "output: out\n",
    "rows.jsonl": '{"text": "a"}\n',
    "axolotl.yaml": "base_model: m\ndatasets: [{path: x, type: alpaca}]\nlora_r: 8\n"
    "micro_batch_size: 2\n",
    "adapter/adapter_config.json": "{}",
}


class Mistake(NamedTuple):
    """Where it comes from, what is typed, and what the answer must say."""

    tool: str
    command: str
    says: str


MISTAKES = [
    Mistake("TRL", "train --model_name_or_path m --dataset_name d", "a YAML file"),
    Mistake("TRL", "train --config run.yaml", "write the file without --config: run.yaml"),
    Mistake("TRL", "sft run.yaml", "here it is `chainlora train CONFIG`"),
    Mistake("TRL", "dpo run.yaml", "or TRL with `ChainCallback`"),
    Mistake("Axolotl", "train axolotl.yaml", "chainlora convert-config axolotl.yaml"),
    Mistake("Axolotl", "merge-lora out", "export RUN --to merged"),
    Mistake("Axolotl", "train run.yaml --sample_packing true", "not needed"),
    Mistake("LLaMA-Factory", "train run.yaml --chain.target_modules all", "say all-linear"),
    Mistake("LLaMA-Factory", "train run.yaml --data.chat_template qwen", "must be a name, a file"),
    Mistake("PEFT", "train run.yaml --bias all", "biases of the base are not trained"),
    Mistake("PEFT", "export adapter --to merged --output x", "must be a run directory"),
    Mistake("Trainer", "train run.yaml --bf16", "here it is `train.dtype`"),
    Mistake("Trainer", "train run.yaml --optim adamw_bnb_8bit", "`train.optimizer: adamw_8bit`"),
    Mistake("Trainer", "train run.yaml --resume_from_checkpoint out", "give --resume"),
    Mistake("Trainer", "train run.yaml --load_in_4bit true", "here it is `quantize: nf4`"),
    Mistake("Trainer", "train rows.jsonl", "name the rows there"),
    Mistake("a shell", "train run.yaml --chain.ranks 8 8", "a list in quotes"),
]


@pytest.fixture
def answer(chainlora, tmp_path, monkeypatch):
    """Type a mistake in a folder with the files above; return the line of the answer."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)

    def call(mistake: Mistake) -> str:
        outcome = chainlora(*shlex.split(mistake.command))
        assert outcome.status in (1, 2)
        assert outcome.out == ""
        # Wrong usage comes with the line that says how the verb is used.
        lines = [line for line in outcome.err.splitlines() if "rror: " in line]
        (line,) = lines
        return line.partition("rror: ")[2].replace("’", "'")

    return call


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.command)
def test_the_answer_says_what_to_do(answer, mistake):
    assert mistake.says in answer(mistake)

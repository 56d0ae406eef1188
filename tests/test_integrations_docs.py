"""The code of docs/trainer.md and of python.md's own loop runs as it stands."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from helpers_integrations import chain_of, collator, token_rows
from test_docs import README, ROOT, blocks
from transformers import AutoTokenizer


def test_the_loop_of_somebody_else_in_python_md_runs(tiny_folder, tmp_path, capsys):
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (block,) = [block for block in blocks(text, "python") if "count_step" in block]
    names: dict[str, Any] = {"folder": tiny_folder, "output": tmp_path}
    exec(block, names | {"batches": [torch.arange(3, 11)[None]] * 3})
    printed = capsys.readouterr().out
    assert "3 steps in the live link" in printed
    assert "'rank': 4" in printed


@pytest.mark.slow
def test_trainer_md_runs(tiny_folder, tmp_path):
    """All its blocks in order, and what they leave behind."""
    pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    names: dict[str, Any] = {
        "model": str(tiny_folder),
        "output": str(tmp_path),
        "conversations": [
            [
                {"role": "user", "content": f"the {word} sat"},
                {"role": "assistant", "content": "on a mat"},
            ]
            for word in ["cat", "mat", "hill", "birds"] * 8
        ],
        "preferences": [
            {"prompt": f"the {word} was", "chosen": " good", "rejected": " bad"}
            for word in ["cat", "mat", "hill", "birds"] * 8
        ],
        "rows": token_rows(16),
        "collate": collator(AutoTokenizer.from_pretrained(tiny_folder)),
    }
    text = (ROOT / "docs/trainer.md").read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        for config in ("SFTConfig(", "DPOConfig("):  # TRL's bfloat16 wants a GPU, or to be told
            block = block.replace(f"args={config}", f"args={config}use_cpu=True, ")
        exec(block, names)
    assert (tmp_path / "sft/final/adapter_model.safetensors").is_file()
    assert isinstance(names["loaded"], peft.PeftModel)
    chain = names["chain"]
    assert ([link.num_steps for link in chain.links], chain.live_steps) == ([2], 2)
    assert type(names["plain"]).__name__ == "LlamaForCausalLM"
    assert names["trainer"].state.global_step == 6


def test_the_one_line_in_the_readme_runs(tiny_folder, tmp_path):
    from datasets import Dataset

    trl = pytest.importorskip("trl", reason="TRL is an extra: pip install 'chainlora[trl]'")
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, max_length=64, use_cpu=True, report_to=[]
    )
    rows = [{"text": f"the {word} sat on a mat"} for word in ["cat", "hill", "birds"] * 16]
    names: dict[str, Any] = {
        "SFTTrainer": partial(trl.SFTTrainer, args=args),
        "LoraConfig": peft.LoraConfig,
        "model": str(tiny_folder),
        "dataset": Dataset.from_list(rows),
    }
    exec(blocks(README, "python")[1], names)
    names["trainer"].train()
    chain = chain_of(names["trainer"])
    assert [(link.config.rank, link.num_steps) for link in chain.links] == [(8, 2), (8, 2), (4, 2)]

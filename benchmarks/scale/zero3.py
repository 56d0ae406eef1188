"""Chains on a model that two processes share by DeepSpeed's ZeRO-3, beside FSDP2 and DDP:
``python benchmarks/scale/zero3.py``, some minutes on two cores; needs deepspeed.

The chain is carried. Links, resume across a knot, resume by one process, exported adapter and
scores of rows: the largest difference of each, as in run.py. Memory of two processes that share a
0.33 B model, as in run.py, over four steps, after two of which ZeRO-3 knows what to gather ahead.
Writes zero3.md to --out (default: beside this file).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import run as runs
import torch
from safetensors.torch import load_file

from chainlora import export_adapter

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DDP 2": (2, {}),
    "FSDP2 2": (2, {"shard": "fsdp2"}),
    "ZeRO-3 2": (2, {"shard": "zero3"}),
}
CARRIED = {"hold": "carried"}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--large", type=Path, help="folder to keep the model of memory in")
    parser.add_argument("--out", type=Path, default=runs.HERE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = engines(Path(scratch))
        held = memory(Path(scratch), options.large or Path(scratch) / "large")
    (options.out / "zero3.md").write_text(report(found, held))


def engines(folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest differences of each engine to one process."""
    runs.make_model(folder / "model", runs.SMALL, torch.float32)
    runs.make_rows(folder)
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    moves = []
    for name, (count, keys) in ENGINES.items():
        output = runs.slug(name)
        jobs[count] += [runs.job(folder, output, keys, CARRIED)]
        for kind in ("resumed", "moved"):
            at = f"{output}-{kind}"
            jobs[count] += [runs.job(folder, at, keys, CARRIED, stop=runs.STOP)]
        jobs[count] += [runs.job(folder, f"{output}-resumed", keys, CARRIED, resume=True)]
        moves += [runs.job(folder, f"{output}-moved", {}, CARRIED, resume=True)]
    for count in jobs:
        runs.launch(count, folder, jobs[count])
    runs.launch(1, folder, moves)
    return {name: compare(folder, name) for name in ENGINES}


def compare(folder: Path, name: str) -> dict[str, float]:
    """Return the largest differences of an engine's runs."""
    one, mine = folder / "one-process", folder / runs.slug(name)
    exported, scores = [], []
    for run in (one, mine):
        adapter = run.with_name(f"{run.name}-adapter")
        if not adapter.exists():
            export_adapter(run, adapter)
        exported.append(load_file(adapter / "adapter_model.safetensors"))
        scores.append(torch.tensor(json.loads(Path(f"{run}.json.0").read_text())["scores"]))
    links = runs.links_of(mine)
    return {
        "links": runs.largest(runs.links_of(one), links),
        "resume across a knot": runs.largest(links, runs.links_of(Path(f"{mine}-resumed"))),
        "resumed by one process": runs.largest(
            runs.links_of(one), runs.links_of(Path(f"{mine}-moved"))
        ),
        "adapter": runs.largest(*exported),
        "scores of rows": float((scores[0] - scores[1]).abs().max()),
    }


def memory(folder: Path, large: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each of two processes holds of a large model, by engine, in bytes."""
    if not large.is_dir():
        runs.make_model(large, runs.LARGE, torch.bfloat16)
    found = {}
    for name in ("FSDP2 2", "ZeRO-3 2"):
        told = folder / f"held-{runs.slug(name)}.json"
        job = {"hold": str(large), "outcome": str(told), "carried": True, "steps": 4} | ENGINES[
            name
        ][1]
        runs.launch(2, folder, [job], MALLOC_MMAP_THRESHOLD_="1000000")
        found[name] = [
            json.loads(Path(f"{told}.{rank}").read_text())["memory"] for rank in range(2)
        ]
    return found


def report(found: dict[str, dict[str, float]], held: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables."""
    columns = list(found["one process"])
    lines = [
        "# ZeRO-3",
        "",
        f"`python benchmarks/scale/zero3.py`, DeepSpeed {version('deepspeed')}.",
    ]
    lines += ["", f"| engine | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in found.items():
        lines.append(f"| {name} | {' | '.join(f'{row[column]:.1e}' for column in columns)} |")
    lines += ["", "MB in the process that has most, of a model of 668 MB:", ""]
    lines += ["| engine | after loading | most while loading | most in a step | after it |"]
    lines += ["|---|---|---|---|---|"]
    for name, told in held.items():
        phases = (
            ("levels", "loading"),
            ("peaks", "loading"),
            ("peaks", "step"),
            ("levels", "step"),
        )
        cells = [max(each[kind][phase] for each in told) / 10**6 for kind, phase in phases]
        lines.append(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()

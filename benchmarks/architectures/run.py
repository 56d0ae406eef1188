"""The matrix: every causal LM class of transformers, tiny, beside plain transformers and peft.

    python benchmarks/architectures/run.py                what is missing in results.jsonl
    python benchmarks/architectures/run.py NAME [NAME…]   these, again
    python benchmarks/architectures/run.py --table        only results.md, from results.jsonl

What is checked is in tests/architectures/checks.py; `CHAINLORA_FULL=1 pytest
tests/test_architectures.py` fails where a case here would be wrong. Each case runs in a process of
its own, forked from one that has imported everything, so a crash is a result too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from architectures.checks import cases, check  # noqa: E402
from architectures.tiny import IMPOSSIBLE  # noqa: E402

RESULTS = HERE / "results.jsonl"
LONGEST = 900  # seconds of a case


def main() -> None:
    """Run what is wanted and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    results = read()
    if not options.table:
        names = options.names or [name for name in cases() if name not in results]
        for name in names:
            results[name] = run_apart(name)
            print(name, results[name]["outcome"], results[name]["why"][:300], flush=True)
            write(results)
    (HERE / "results.md").write_text(table(list(results.values())), encoding="utf-8")


def run_apart(name: str) -> dict[str, Any]:
    """Run a case in a process of its own; return its result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(name, sender))
    process.start()
    found = receiver.recv() if receiver.poll(LONGEST) else None
    process.kill()
    process.join()
    if found is None:
        found = {"name": name, "outcome": "wrong", "why": f"no result in {LONGEST} s"}
    return found | {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
    }


def run(name: str, sender: Any) -> None:
    """Check a case and send what was found."""
    torch.set_num_threads(2)
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = asdict(check(name, Path(folder)))
    except Exception:
        found = {"name": name, "outcome": "wrong", "why": traceback.format_exc()[-2000:]}
    sender.send(found | {"seconds": round(time.perf_counter() - began, 1)})


def read() -> dict[str, dict[str, Any]]:
    """Return the results there are, by name."""
    if not RESULTS.is_file():
        return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write all results, sorted by name."""
    lines = [json.dumps(results[name]) + "\n" for name in sorted(results)]
    RESULTS.write_text("".join(lines), encoding="utf-8")


def table(results: list[dict[str, Any]]) -> str:
    """Return the table of results."""
    counts = Counter(result["outcome"] for result in results)
    some = results[0]
    lines = [
        "# Every causal language model of transformers",
        "",
        f"transformers {some['transformers']}, peft {some['peft']}, torch {some['torch']}; "
        f"{len(results)} cases in {sum(r.get('seconds', 0) for r in results) / 60:.0f} minutes: "
        f"{counts['right']} right, {counts['refused']} refused, {counts['wrong']} wrong. Not made: "
        + "; ".join(f"{name} ({why})" for name, why in IMPOSSIBLE.items())
        + ".",
        "",
        "*Largest difference* is of what it may be: rounding in float32, some roundings in "
        "bfloat16; above 1 would be wrong. `run.py` says what is compared.",
        "",
        "| case | class | trains | path, and why | export | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, results)]) + "\n"


def _row(result: dict[str, Any]) -> str:
    differences = result.get("differences") or {}
    largest = f"{max(differences.values()):.2f}" if differences else "–"
    path = "; ".join(result.get("notes", [])) if result["outcome"] == "right" else result["why"]
    cells = [result["name"], result.get("kind", ""), result["outcome"], path]
    cells += [result.get("exports") or "–", largest]
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "/") for cell in cells) + " |"


if __name__ == "__main__":
    main()

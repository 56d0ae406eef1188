"""The long tier of the fuzz tests, and how many cases of each kind there were.

    python benchmarks/faults/fuzz.py                       all of it, then fuzz.md beside this file
    python benchmarks/faults/fuzz.py --only "gguf"         tests whose names hold a text
    python benchmarks/faults/fuzz.py --table               fuzz.md of what was run so far

Figures are kept in fuzz.json, a test an entry, so that it can be run in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = ("tests/test_fuzz.py", "tests/test_fuzz_inputs.py")
SEED = 1
BEGIN, END = "<!-- begin: table -->", "<!-- end: table -->"


def run(only: str) -> dict[str, dict[str, Any]]:
    """Run the tests and return what Hypothesis says of each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    command += [f"--hypothesis-seed={SEED}", "--hypothesis-show-statistics"]
    command += ["-k", only] if only else []
    environment = os.environ | {"CHAINLORA_FULL": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "src/"))]
    print("\n".join(said), done.stderr[-2000:], file=sys.stderr)
    return statistics(done.stdout)


def statistics(text: str) -> dict[str, dict[str, Any]]:
    """Return the numbers of passing, failing and invalid cases, and the seconds, of each test."""
    found = {}
    for part in re.split(r"\n(?=tests/test_fuzz\w*\.py::\S+:\n)", text)[1:]:
        name = part.partition("::")[2].partition(":\n")[0]
        phase = part.partition("during generate phase")[2]
        numbers = re.search(r"(\d+) passing, (\d+) failing, and (\d+) invalid", phase)
        seconds = re.search(r"\(([\d.]+) seconds\)", phase)
        if numbers and seconds:
            passing, failing, invalid = map(int, numbers.groups())
            found[name] = {
                "cases": passing + failing,
                "failing": failing,
                "invalid": invalid,
                "seconds": float(seconds[1]),
            }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures in Markdown."""
    names = ("hypothesis", "torch", "transformers", "peft", "pydantic")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    total = {key: sum(each[key] for each in found.values()) for key in ("cases", "failing")}
    lines = ["| what | cases | failing | seconds |", "|---|---:|---:|---:|"]
    for name, each in found.items():
        what = name.removeprefix("test_").replace("_", " ")
        lines.append(f"| {what} | {each['cases']} | {each['failing']} | {each['seconds']:.0f} |")
    lines.append(f"| all | {total['cases']} | {total['failing']} | |")
    lines += ["", f"Seed {SEED}; python {platform.python_version()}, {versions}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="tests whose names hold a text")
    parser.add_argument("--table", action="store_true", help="write fuzz.md without a run")
    options = parser.parse_args()
    path = HERE / "fuzz.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if not options.table:
        found |= run(options.only)
        path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    text = table(found)
    start, rest = (HERE / "fuzz.md").read_text().split(BEGIN)
    (HERE / "fuzz.md").write_text(f"{start}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    print(text)
    return 1 if any(each["failing"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

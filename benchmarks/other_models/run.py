"""Chains on models that are no causal language models: what works, in which loop.

    python benchmarks/other_models/run.py            all; writes results.md
    python benchmarks/other_models/run.py NAME …     these, printed only

What is checked is in tests/other_models/checks.py; tests/test_other_models.py runs a sample of it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from other_models.checks import CHECKS  # noqa: E402
from other_models.classes import KINDS  # noqa: E402


def main() -> None:
    """Run what is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for name in names or KINDS:
        cells = [run(name, engine) for engine in CHECKS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    if not names:
        (HERE / "results.md").write_text(table(rows), encoding="utf-8")


def run(name: str, engine: str) -> str:
    """Return what became of a class in a loop."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = CHECKS[engine](name, Path(folder))
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            return f"wrong: {type(error).__name__}: {first[:300]}".replace("|", "/")
    wrong = [key for key, value in found.items() if not value <= 1.0]
    largest = max(found.values())
    return f"wrong: {', '.join(wrong)}" if wrong else f"right, {largest:.2f}"


def table(rows: list[str]) -> str:
    """Return the page of results."""
    lines = [
        "# Chains on other models",
        "",
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch "
        f"{torch.__version__}. Tiny models with random weights, two links on all linear layers.",
        "",
        "*Right* is: the loss falls; extending and tying change nothing but rounding (the number "
        "is the largest difference, as a share of what it may be); undo, save and load, and the "
        "merged checkpoint in transformers give the same bits; the adapter in PEFT "
        "gives the same outputs to rounding. In the Trainer: resume across a knot gives the same "
        "bits. Only this page is kept, no raw results.",
        "",
        "| class | loop of one's own | `Trainer` with `ChainCallback` |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *rows]) + "\n"


if __name__ == "__main__":
    main()

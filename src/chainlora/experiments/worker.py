"""One cell: from its config to its result, done once, whoever asks and however often it is killed.

CELL_DIR/config.yaml is trained in CELL_DIR/run (a run that was killed is resumed), and
CELL_DIR/result.json is written last and atomically: a cell is done exactly when that file is there.
A lock that dies with its process keeps two runners of one folder from training the same cell twice;
the second waits, then finds the result.

``python -m chainlora.experiments.worker CELL_DIR`` is the process of one cell.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from chainlora.config.loading import load_config
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError, DivergedError
from chainlora.files import make_folder, reported, write_text

logger = logging.getLogger(__name__)

RESULT, CONFIG, ERROR, RUN = "result.json", "config.yaml", "error.txt", "run"


def work_on(directory: Path) -> int:
    """Compute the cell in `directory` unless it is done; return 0 if it has its result, else 1."""
    with reported(directory / "lock"), FileLock(directory / "lock"):
        if (directory / RESULT).is_file():
            return 0
        try:
            write_result(directory, compute(load_config(directory / CONFIG), directory / RUN))
        except Exception as error:
            expected = isinstance(error, ChainLoRAError)
            if not expected:
                logger.exception("cell %s", directory.name)
            kind = "" if expected else f"unexpected {type(error).__name__}: "
            write_text(directory / ERROR, kind + " ".join(str(error).split())[:2000] + "\n")
            return 1
        (directory / ERROR).unlink(missing_ok=True)
    return 0


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's result: from now on the cell is done."""
    make_folder(directory)
    write_text(directory / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def compute(config: RunConfig, run: Path) -> dict[str, Any]:
    """Train a config in `run`, resuming a run that is there, and return the cell's fields."""
    from chainlora.experiments.measure import diverged, summarise
    from chainlora.training.loop import train

    if run.exists() and config.chain.tune == "full":
        logger.warning("full fine-tuning cannot resume: %s starts over", run)
        shutil.rmtree(run)
    config = config.model_copy(update={"output": str(run)})
    try:
        result = train(config, resume=run.exists())
    except DivergedError as error:
        return diverged(config, str(error))
    found = summarise(config, result, run)
    # full fine-tuning keeps its weights there: gigabytes a cell
    shutil.rmtree(run / "model", ignore_errors=True)
    return found


# --- as a process ---


def main() -> int:
    """Compute the cell named on the command line; return 0 when its result is there."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s"
    )
    return work_on(Path(sys.argv[1]))


def _die_with_parent() -> None:
    """End when the runner's end of our standard input closes: no orphan keeps computing.

    `sys.stdin` is not touched: a read of it holds its lock, and processes that are forked
    meanwhile, to encode rows, would wait for that lock for ever as they close it.
    """
    while os.read(0, 1):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())

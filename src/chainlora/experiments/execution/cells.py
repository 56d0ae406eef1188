"""One cell: from its config to its result, done once, whoever asks and however often it is killed.

CELL_DIR/config.yaml is trained in CELL_DIR/run (a run that was killed is resumed), and
CELL_DIR/result.json is written last and atomically: a cell is done exactly when that file is there.
A lock that dies with its process keeps two runners of one folder from training the same cell twice;
the second waits, then finds the result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from chainlora.config.loading import load_config
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError, DivergedError
from chainlora.experiments.execution.rows import Rows, row_scores, write_rows
from chainlora.files import make_folder, write_text

logger = logging.getLogger(__name__)

RESULT, CONFIG, ERROR, STATUS, RUN = "result.json", "config.yaml", "error.txt", "status.json", "run"
_STATUS_SECONDS = 1.0
Listener = Callable[[Mapping[str, Any]], None]


def work_on(directory: Path) -> int:
    """Compute the cell in `directory` unless it is done; return 0 if it has its result, else 1."""
    with FileLock(directory / "lock"):
        if (directory / RESULT).is_file():
            return 0
        try:
            run_cell(directory)
        except Exception as error:
            expected = isinstance(error, ChainLoRAError)
            if not expected:
                logger.exception("cell %s", directory.name)
            kind = "" if expected else f"unexpected {type(error).__name__}: "
            write_text(directory / ERROR, kind + " ".join(str(error).split())[:2000] + "\n")
            return 1
    return 0


def run_cell(directory: Path) -> None:
    """Train the config in `directory` and write its result there."""
    config = load_config(directory / CONFIG)
    result, rows = compute(config, directory / RUN, listener=_status_writer(directory / STATUS))
    write_rows(directory, rows)
    write_result(directory, result)
    for name in (ERROR, STATUS):
        (directory / name).unlink(missing_ok=True)


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write a cell's result: from now on the cell is done."""
    make_folder(directory)
    write_text(directory / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def compute(config: RunConfig, run: Path, listener: Listener) -> tuple[dict[str, Any], Rows]:
    """Train a config in the run directory `run`, resuming one that is there.

    Return the cell's fields, and what each row scored.
    """
    from chainlora.experiments.execution.measure import diverged, summarise
    from chainlora.training.loop import train

    if run.exists() and config.chain.tune == "full":
        logger.warning("full fine-tuning cannot resume: %s starts over", run)
        shutil.rmtree(run)
    config = config.model_copy(update={"output": str(run)})
    rows: Rows = {}

    def listen(record: Mapping[str, Any]) -> None:
        if record["event"] == "scored":
            rows.update(row_scores(record["split"], record["predictions"]))
        else:
            listener(record)

    try:
        result = train(config, resume=run.exists(), listener=listen)
    except DivergedError as error:
        return diverged(config, str(error)), {}
    found = summarise(config, result, run)
    # full fine-tuning keeps its weights there: gigabytes a cell
    shutil.rmtree(run / "model", ignore_errors=True)
    return found, rows


def _status_writer(path: Path) -> Listener:
    """Return a listener that keeps step and number of steps in a small file, for the progress."""
    state = {"step": 0, "num_steps": 0}
    written = 0.0

    def listen(record: Mapping[str, Any]) -> None:
        nonlocal written
        state.update({key: record[key] for key in ("step", "num_steps") if key in record})
        if time.monotonic() - written > _STATUS_SECONDS:
            written = time.monotonic()
            scratch = path.with_suffix(".new")
            with contextlib.suppress(OSError):  # nobody waits for it
                scratch.write_text(json.dumps(state), encoding="utf-8")
                scratch.replace(path)

    return listen

"""One cell: from its config to its result, done once, whoever asks and however often it is killed.

CELL_DIR/config.yaml is trained (or a run that was killed is gone on with) in CELL_DIR/run, and
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chainlora.config.loading import load_config
from chainlora.config.schema import RunConfig
from chainlora.errors import ChainLoRAError, DivergedError
from chainlora.experiments.execution.records import write_atomically

logger = logging.getLogger(__name__)

RESULT, CONFIG, ERROR, STATUS, RUN = "result.json", "config.yaml", "error.txt", "status.json", "run"
_STATUS_SECONDS = 1.0


def work_on(directory: Path) -> int:
    """Bring the cell in `directory` to its end unless it is there; return 0 when its result is,
    else 1."""
    with _lock(directory / "lock"):
        if (directory / RESULT).is_file():
            return 0
        try:
            run_cell(directory)
        except Exception as error:
            if not isinstance(error, ChainLoRAError):
                logger.exception("cell %s", directory.name)
            kind = (
                "" if isinstance(error, ChainLoRAError) else f"unexpected {type(error).__name__}: "
            )
            write_atomically(directory / ERROR, kind + " ".join(str(error).split())[:2000] + "\n")
            return 1
    return 0


def run_cell(directory: Path) -> dict[str, Any]:
    """Train the config in `directory` and write its result there; return the result."""
    config = load_config(directory / CONFIG)
    result = compute(config, directory / RUN, listener=_status_writer(directory / STATUS))
    write_atomically(directory / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name in (ERROR, STATUS):
        (directory / name).unlink(missing_ok=True)
    return result


def compute(
    config: RunConfig, run: Path, listener: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train a config in the run directory `run`, going on with one begun, and return the cell's
    fields."""
    from chainlora.experiments.execution.measure import diverged, summarise
    from chainlora.training.loop import train

    if run.exists() and config.chain.tune == "full":
        logger.warning("full fine-tuning cannot resume: %s is begun anew", run)
        shutil.rmtree(run)
    config = config.model_copy(update={"output": str(run)})
    try:
        result = train(config, resume=run.exists(), listener=listener)
    except DivergedError as error:
        return diverged(config, str(error))
    found = summarise(config, result, run)
    shutil.rmtree(
        run / "model", ignore_errors=True
    )  # full fine-tuning keeps its weights there: gigabytes a cell
    return found


def _status_writer(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """Return a listener that keeps a small file with step and number of steps, for the runner's
    progress."""
    state = {"step": 0, "num_steps": 0}
    written = 0.0

    def listen(record: Mapping[str, Any]) -> None:
        nonlocal written
        state.update({key: record[key] for key in ("step", "num_steps") if key in record})
        if time.monotonic() - written > _STATUS_SECONDS:
            written = time.monotonic()
            scratch = path.with_suffix(".new")
            scratch.write_text(json.dumps(state), encoding="utf-8")
            scratch.replace(path)

    return listen


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel drops when this process dies; on Windows, which has none, hold
    nothing."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

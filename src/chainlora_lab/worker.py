"""Where cells run: each in a process of its own, some at a time, or one by one in this process.

CELL_DIR/config.yaml is trained in CELL_DIR/run (a run that was killed is resumed), and
CELL_DIR/result.json is written last and atomically: a cell is done exactly when that file is there.
A lock that dies with its process keeps two runners of one folder from training the same cell twice;
the second waits, then finds the result.

``python -m chainlora_lab.worker CELL_DIR`` is the process of one cell. It costs some
seconds of start-up and buys a true peak memory, and a crash that takes nothing along: the pool of
`concurrent.futures` fails as a whole where one process is killed for its memory, and leaves its
processes behind where the runner is killed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from chainlora import train
from chainlora.config.reading import read_tree
from chainlora.errors import ChainLoRAError, DivergedError
from chainlora.registry import load_plugins
from chainlora_lab.expansion import Cell
from chainlora_lab.loops import CellConfig, fine_tune
from chainlora_lab.measure import described, origin, summarise
from chainlora_lab.outputs import write_whole
from chainlora_lab.protocol import with_files
from chainlora_lab.sequences import learn_sequence

logger = logging.getLogger(__name__)

RESULT, CONFIG, ERROR, RUN = "result.json", "config.yaml", "error.txt", "run"
ROWS = "rows"  # files of the rows that are drawn
_POLL_SECONDS = 0.2

Work = Sequence[tuple[Cell, Path]]
Poll = Callable[[Sequence[Cell]], None]
Ended = Iterator[tuple[Cell, str | None]]


# --- one cell ---


def work_on(directory: Path) -> int:
    """Compute the cell in `directory` unless it is done; return 0 if it has its result, else 1."""
    with FileLock(directory / "lock"):
        if (directory / RESULT).is_file():
            return 0
        try:
            found = _compute(load_cell(directory), directory)
            write_whole(directory / RESULT, dumped(found))  # from now on the cell is done
        except Exception as error:
            expected = isinstance(error, ChainLoRAError)
            if not expected:
                logger.exception("cell %s", directory.name)
            kind = "" if expected else f"unexpected {type(error).__name__}: "
            write_whole(directory / ERROR, kind + " ".join(str(error).split())[:2000] + "\n")
            return 1
        (directory / ERROR).unlink(missing_ok=True)
    return 0


def dumped(tree: Mapping[str, Any]) -> str:
    """Return JSON for people to read, which is YAML too: a text such as 1e5 stays a text."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def load_cell(directory: Path) -> CellConfig:
    """Return the config of the cell in `directory`. Raises ConfigError: not there, or wrong."""
    return CellConfig(**read_tree(directory / CONFIG))


def _compute(config: CellConfig, directory: Path) -> dict[str, Any]:
    """Train a config, resuming a run that is there, and return the cell's fields."""
    run, data = directory / RUN, with_files(config.data, directory / ROWS)
    plain = config.model_copy(update={"data": data}).plain
    rows = plain.start_data or "none"  # a cell is one stage, scored on its own rows
    plain = plain.model_copy(update={"output": str(run), "start_data": rows})
    try:
        if config.stages:
            load_plugins(config.plugins)
            fields, first = learn_sequence(config, run)
            return described(config, "done") | origin(config, first) | fields
        if config.loop is not None:
            result = fine_tune(plain)
        else:
            result = train(plain, resume=run.exists(), progress=False)
    except DivergedError as error:
        return described(config, "diverged") | {"message": str(error)}
    return summarise(config, result, run)


# --- many ---


def run_inline(work: Work, poll: Poll) -> Ended:
    """Run cells one by one in this process, and yield each with its error, or None, as it ends."""
    for cell, directory in work:
        poll([cell])
        yield cell, None if work_on(directory) == 0 else _error(directory, 1)


def run_processes(work: Work, poll: Poll, *, workers: int) -> Ended:
    """Run cells as processes of this machine, `workers` at a time, and yield them as they end."""
    waiting = list(work)
    running: dict[int, tuple[Cell, Path, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for slot in sorted(set(range(workers)) - running.keys())[: len(waiting)]:
                cell, directory = waiting.pop(0)
                running[slot] = (cell, directory, _start(directory, slot, workers))
            ended = [slot for slot, (*_, process) in running.items() if process.poll() is not None]
            for slot in ended:
                cell, directory, process = running.pop(slot)
                yield cell, _error(directory, process.returncode)
            if not ended:
                poll([cell for cell, *_ in running.values()])
                time.sleep(_POLL_SECONDS)
    finally:
        for *_, process in running.values():
            process.terminate()
            process.wait()


def _start(directory: Path, slot: int, workers: int) -> subprocess.Popen[bytes]:
    with (directory / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | worker_environment(slot, workers, os.environ),
        )


def _error(directory: Path, status: int) -> str | None:
    if (directory / RESULT).is_file():
        return None
    try:
        return (directory / ERROR).read_text(encoding="utf-8").strip()
    except OSError:
        return f"its process ended with status {status} and no result; see {directory / 'log.txt'}"


def _num_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def worker_environment(slot: int, workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker's environment adds: its share of the threads, and of the GPUs listed."""
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, _num_cores() // workers))
    added = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    added["TOKENIZERS_PARALLELISM"] = "false"
    listed = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = [device for device in listed if device.strip()]
    if len(devices) > 1:
        added["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return added


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

    `sys.stdin` is not touched: a read of it holds its lock, for which a forked process waits.
    """
    while os.read(0, 1):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())

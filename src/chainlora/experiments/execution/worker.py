"""The process of one cell: ``python -m chainlora.experiments.execution.worker CELL_DIR``."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

from chainlora.experiments.execution.cells import work_on


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

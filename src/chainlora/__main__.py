"""Entry point of the commands ``chainlora`` and ``python -m chainlora``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from chainlora.cli.main import run  # inside `try`: catches Ctrl-C during imports

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("chainlora: interrupted", file=sys.stderr)
        status = 130
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a launcher started several processes
        from chainlora.training.processes import leave_processes

        leave_processes(status)
    sys.exit(status)


if __name__ == "__main__":
    main()

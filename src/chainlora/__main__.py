"""``chainlora`` and ``python -m chainlora``: the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from chainlora.cli.main import run  # Ctrl-C while modules load is caught too

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("chainlora: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
